"""
Each change of docs/contributing.md's table, made on a copy of the repository and run there; it may
touch only the files that the table names.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, SMALL, shell

PAGE = (ROOT / "docs" / "contributing.md").read_text()


class Tree:
    """A copy of the code beside the shared tiny world, and the files that a change touched."""

    def __init__(self, folder, world):
        self.folder, self.touched = folder, set()
        for path in [*ROOT.glob("*.py"), *(p.parent for p in ROOT.glob("*/__init__.py"))]:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, folder / path.name)
        (folder / "data").mkdir()
        (folder / "data" / "tiny").symlink_to(world / "data" / "tiny")
        (folder / "out").mkdir()
        (folder / "out" / "full").symlink_to(world / "out" / "full")

    def add(self, name, content):
        (self.folder / name).write_text(content)
        self.touched.add(name)

    def edit(self, name, old, new):
        text = (self.folder / name).read_text()
        assert text.count(old) == 1, (name, old)
        self.add(name, text.replace(old, new))

    def run(self, *command):
        done = shell(*command, cwd=self.folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def train(self, *flags):
        return self.run("train.py", "--data=data/tiny", "--evaluate=False", *SMALL, *flags)

    def load(self, name):
        return torch.load(self.folder / "out" / name, weights_only=True)


@pytest.fixture
def tree(tmp_path, recipe, world):
    return Tree(tmp_path, world)


def allowed_files(change):
    """The files that the table names for a change, NAME being any name."""
    row = re.search(rf"^\| {change} \| (.*?) \|", PAGE, re.M).group(1)
    return [re.escape(name).replace("NAME", r"\w+") for name in re.findall(r"`([^`]+)`", row)]


def check_touched(tree, change):
    for name in tree.touched:
        assert any(re.fullmatch(file, name) for file in allowed_files(change)), name


TOWER = '''

class PatchTower(nn.Module):
    """Each patch is projected by itself."""

    def __init__(self, patch, width):
        super().__init__()
        self.arguments = {"patch": patch, "width": width}
        self.patch, self.width = patch, width
        self.proj = nn.Conv2d(3, width, patch, patch)

    @classmethod
    def from_options(cls, options, size):
        return cls(options.patch, options.vision_width)

    def num_patches(self, size):
        return (size // self.patch) ** 2

    def fault(self, size, select_layer):
        return ""

    def forward(self, x, select_layer=-1, only_cls=False):
        x = self.proj(x).flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        return x[:, :1] if only_cls else x


'''


def test_a_tower_that_is_built_from_options(tree):
    tree.edit("vision.py", "\n\ndef resnext():", TOWER + "def resnext():")
    tree.edit("vision.py", 'TOWERS = {"vit"', 'TOWERS = {"patches": lambda: PatchTower, "vit"')
    check_touched(tree, "a tower")
    tree.train("--out=out/a", "--vision_tower=patches")
    assert tree.load("a/phase2.pt")["parts"]["tower"]["kind"] == "patches"
    image = sorted((tree.folder / "data/tiny/eval/images/vtwt").glob("*.png"))[0]
    tree.run("sample.py", f"--image={image}", "--checkpoint=out/a/phase2.pt", "--max_new_tokens=2")


SOURCE = '''"""Counting rhymes."""
from dataclasses import dataclass

import config
from common.images import ImageFormat
from tokenizer import Tokenizer


@dataclass
class Config(config.Options):
    name: str = ""  # write to data/<name>; empty: rhymes
    lines: int = config.option(200, low=10)  # how many


def prepare(settings, writer):
    lines = [f"one , two , {number} !" for number in range(settings.lines)]
    writer.start(Tokenizer.train(lines, 280), ImageFormat(16))
    writer.split("train").text(lines[10:])
    writer.split("val").text(lines[:10])
'''


def test_a_source(tree):
    tree.add("sources/rhymes.py", SOURCE)
    check_touched(tree, "a source of data")
    assert "text" in tree.run("data.py", "rhymes")
    assert "rhymes" in shell("data.py", "nothing", cwd=tree.folder).stderr
    tree.train("--out=out/a", "--phase=language", "--data=data/rhymes")
    assert tree.load("a/language.pt")["source"] == "rhymes"


RULE = '''"""Is the caption at least as long as the reference?"""
from tasks.scores import accuracy


def longer(rows, subject, ties):
    captions = subject.caption([row["image"] for row in rows])
    hits = [len(caption) >= len(row["text"]) for row, caption in zip(rows, captions)]
    return {"accuracy": accuracy(hits, None)}
'''


def test_a_test(tree):
    tree.add("tasks/longer.py", RULE)
    imports = (
        "from tasks import babyvlm, board, choice, devbench, recordings, toolbox, toolbox_files\n"
    )
    tree.edit("tasks/__init__.py", imports, imports.replace("devbench,", "devbench, longer,"))
    entry = 'TASKS = {\n    "longer": Task(("image", "text"), ("image",), longer.longer),\n'
    tree.edit("tasks/__init__.py", "TASKS = {\n", entry)
    check_touched(tree, "a test")
    flags = ["--csv=data/tiny/eval/caption.csv", "--images=data/tiny/eval/images", "--out=out/a"]
    (tree.folder / "out/a").mkdir()
    tree.run("eval.py", "--checkpoint=out/full/phase2.pt", "--task=longer", *flags)
    results = json.loads((tree.folder / "out/a/results_longer.json").read_text())
    assert results["tasks"]["longer"]["all"]["accuracy"]["n"] > 0


TEMPLATE = 'TEMPLATES = {\n    "qa": Template("Q: {} A:", " {}", begin="", picture="<image>"),\n'
TALK = "toy_chat --template=qa --talks=40 --lines=200 --questions=1 --size=16 --vocab_size=300"
OPTIONS = """    phase4_steps: int = option(4, low=1)  # conversations again
    phase4_lr: float = option(1e-3, low=0.0)  # highest learning rate
    phase4_batch: int = option(8, low=1)  # samples
    phase4_learn: tuple[str, ...] = ()  # as phase1_learn
"""
PHASE = """PHASES = {
    "phase4": Phase(
        learns=("gpt",),
        batches=SampleBatches,
        splits=("chat_train", "chat_val"),
        make=models.from_phase_before,
        validate=validation.validate_loss,
        starts_from=("phase3",),
        options=LATER_OPTIONS,
        saves_template=True,
    ),
"""


def test_a_template_and_a_fifth_phase(tree):
    """A phase on conversations in a new template: saved with it, validated, and asked in it."""
    tree.edit("tokenizer.py", "TEMPLATES = {\n", TEMPLATE)
    check_touched(tree, "a chat template")
    tree.touched.clear()
    lora = "    lora_rank: int = option("
    tree.edit("train.py", lora, OPTIONS + lora)
    tree.edit("train.py", "PHASES = {\n", PHASE)
    check_touched(tree, "a phase")
    tree.run("data.py", *TALK.split())
    flags = ["--data=data/toy_chat", "--block_size=300", "--out=out/a"]
    tree.train(*flags, "--phase=all")
    tree.train(*flags, "--phase=4")
    saved = tree.load("a/phase4.pt")
    assert saved["phase"] == "phase4" and saved["template"] == {"name": "qa", "system": ""}
    said = tree.run("eval.py", "--checkpoint=out/a/phase4.pt", "--data=data/toy_chat")
    assert "val_loss" in said
    log = (tree.folder / "out/a/log.jsonl").read_text()
    assert re.search('"phase": "phase4".*val_loss', log)
    image = sorted((tree.folder / "data/tiny/eval/images/vtwt").glob("*.png"))[0]
    flags = ["--checkpoint=out/a/phase4.pt", f"--image={image}", "--max_new_tokens=2"]
    tree.run("sample.py", *flags, "--prompt=what is it ?")


RESAMPLER = '''
class Resampler(nn.Module):
    """resamplerN: N learnt queries attend to the features; always N image tokens."""

    keeps_grid = False

    def __init__(self, kind, width_in, width_out):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(int(kind[9:]), width_in) / width_in**0.5)
        self.proj = Linear(width_in, width_out)

    def num_tokens(self, features):
        return len(self.queries)

    def forward(self, x):
        weights = (self.queries @ x.mT / x.shape[-1] ** 0.5).softmax(-1)
        return self.proj(weights @ x)


PROJECTORS = {
    "resampler[0-9]+": Resampler,
'''


def test_a_projector_with_a_fixed_number_of_tokens(tree):
    tree.edit("model.py", "PROJECTORS = {\n", RESAMPLER)
    check_touched(tree, "a projector")
    tree.train("--out=out/a", "--init=out/full", "--projector=resampler3")
    image = sorted((tree.folder / "data/tiny/eval/images/vtwt").glob("*.png"))[0]
    flags = ["--checkpoint=out/a/phase2.pt", "--task=vtwt"]
    assert "vtwt" in tree.run("eval.py", *flags)
    show = ["data.py", "show", "data/tiny", "0", "--checkpoint=out/a/phase2.pt"]
    assert ", 3 image tokens" in tree.run(*show)
    flags = [f"--image={image}", "--checkpoint=out/a/phase2.pt", "--max_new_tokens=2"]
    tree.run("sample.py", *flags)
    done = shell("sample.py", *flags, "--attention=a.png", cwd=tree.folder)
    assert done.returncode == 1 and "not a grid of patches" in done.stderr
    refused = shell(
        "train.py", "--data=data/tiny", *SMALL, "--out=out/b", "--init=out/full", "--phase=1",
        "--projector=resampler3", "--image_pool=2", cwd=tree.folder,
    )  # fmt: skip
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1


OPTIMIZER = """    momentum = [group for group in of_adamw if group["weight_decay"]]
    others = [group for group in of_adamw if not group["weight_decay"]]
    return [
        torch.optim.SGD(momentum, momentum=0.9),
        torch.optim.AdamW(others, betas=(0.9, settings.beta2)),
    ]
"""


def test_another_optimizer_for_matrices(tree):
    text = (ROOT / "training/optimizer.py").read_text()
    tree.edit("training/optimizer.py", text[text.index("    optimizers = []") :], OPTIMIZER)
    check_touched(tree, "an optimizer")
    tree.train("--out=out/a", "--init=out/full")
    states = tree.load("a/phase2.pt")["optimizers"]
    assert len(states) == 2 and "momentum_buffer" in str(states[0]["state"][0].keys())
