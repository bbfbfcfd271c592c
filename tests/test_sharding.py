"""Sharded training: the weights of a run that is not sharded, whoever saves and whoever goes on."""

import functools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FORKS, ROOT, SMALL, one_line, shell
from test_llava import many, prepare
from torch._dynamo.utils import counters

import checkpoint
import train
from common import shards
from config import UserError
from training import planning
from training.processes import Processes

pytest.importorskip("torch.distributed.fsdp", reason="PyTorch 2.6")
EXACT = 2e-5
TOWER = "--phase3_learn projector gpt tower=2e-4".split()
# LLaVA-NeXT's shape a thousand times smaller: tiles, a tower that learns at its own rate, gradient
# checkpointing, batches of texts alone. Then what else changes the path of a step.
CASES = {
    "next": [*TOWER, "--recompute=True"],
    "lora": ["--lora_rank=4"],  # and stored features of a frozen tower
    "accum": [*TOWER, "--grad_accum=2", "--optimizer=muon"],
    "best": ["--keep=best", "--phase3_lr=0.2", "--warmup=0.01"],  # it keeps step 2
}
# train.main() of each list of flags in turn; DIE: the process is killed in its N-th save
CHILD = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
import torch, train
from common import shards
begin, saves = shards.begin, []
def dying(*rest):
    saves.append(begin(*rest))
    if len(saves) == int(os.environ.get("DIE", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return saves[-1]
shards.begin = dying
for flags in json.loads(sys.argv[1]):
    train.main(flags)
"""


def flags_of(case, out, recipe):
    flags = ["--data=data/tiled", "--phase=3", f"--init={recipe}/phase2.pt", "--evaluate=False"]
    flags += ["--block_size=300", "--phase3_steps=6", f"--out=out/{out}"]
    flags += ["--eval_batches=1"]
    return [*SMALL, *flags, *CASES[case]]


def launch(processes, runs, folder, **env):
    """So many processes, in which each trains with each list of flags in turn."""
    (folder / "child.py").write_text(CHILD.format(root=str(ROOT)))
    command = [str(folder / "child.py"), json.dumps(runs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **env}
    imports = ("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo")
    return FORKS.run_group(processes, command, folder, env, imports)


def furthest(one, other):
    a, b = (checkpoint.read(path)["weights"] for path in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def place(tmp_path_factory, recipe):
    """A folder with data/tiled, and each case trained by one process, not sharded."""
    folder, before = tmp_path_factory.mktemp("shards"), os.getcwd()
    os.chdir(folder)
    (folder / "pictures").mkdir()
    from PIL import Image

    for i in range(20):
        size = (40, 20) if i % 2 else (20, 40)
        Image.new("RGB", size, (10 * i, 200, 100)).save(f"pictures/{i}.png")
    prepare(many(40), f"--like={recipe}/phase2.pt", "--canvases", "32x16", "16x32", name="tiled")
    for case in CASES:
        train.main(flags_of(case, f"{case}_whole", recipe))
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def test_one_process_sharded(place, recipe):
    for case in ("next", "best"):
        train.main([*flags_of(case, f"{case}_1", recipe), "--shard=on"])
        assert furthest(f"out/{case}_whole/phase3.pt", f"out/{case}_1/phase3.shards") < EXACT
    best = checkpoint.read("out/best_1/phase3.shards")["best"]["step"]
    assert best == checkpoint.read("out/best_whole/phase3.pt")["best"]["step"] < 6


def graphs(flags, capsys):
    """How many graphs a run compiled, of blocks in training and in validation."""
    torch.compiler.reset()  # of other tests
    counters.clear()
    train.main([*flags, "--shard=on", "--compile=on"])
    said = re.search(r"compiled (\d+) graphs with 0 breaks", capsys.readouterr().out)
    return int(said[1])


def test_all_layers_share_a_compiled_graph(place, recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    words = [*SMALL, f"--data={recipe.parent.parent}/data/tiny", "--phase=language", "--n_layer=6"]
    words += ["--evaluate=False", "--language_steps=1", "--eval_batches=1"]
    for recompute in (False, True):
        more = [f"--out=out/words_{recompute}", f"--recompute={recompute}"]
        assert graphs([*words, *more], capsys) == 2
    # blocks of the GPT, its last one, which computes fewer positions, and the tower's
    assert graphs(flags_of("next", "next_compiled", recipe), capsys) == 2 * 3
    assert furthest("out/next_whole/phase3.pt", "out/next_compiled/phase3.shards") < EXACT


def test_two_processes_sharded(place, recipe):
    """In one launch, one case after the other."""
    cases = ("next", "lora", "accum")
    runs = [[*flags_of(case, f"{case}_2", recipe), "--shard=on"] for case in cases]
    for done in launch(2, runs, place):
        assert done.returncode == 0, done.stderr[-3000:]
    for case in cases:
        whole, sharded = f"out/{case}_whole/phase3.pt", f"out/{case}_2/phase3.shards"
        assert furthest(whole, sharded) < EXACT, case
        a, b = checkpoint.read(whole), checkpoint.read(sharded)
        for name in ("parts", "inherited", "corpora", "template", "images", "done"):
            assert a.get(name) == b.get(name), (case, name)
    # it is opened as any other, written as one file, and starts another run
    done = shell(ROOT / "export.py", "out/lora_2/phase3.shards", "out/one.pt", cwd=place)
    assert done.returncode == 0, done.stderr
    assert furthest("out/one.pt", "out/lora_2/phase3.shards") == 0
    assert checkpoint.load("out/lora_2/phase3.shards").model.gpt is not None


def test_killed_with_two_processes_and_continued_with_four(place, recipe):
    flags = [*flags_of("next", "killed", recipe), "--shard=on"]
    # while they write the save of step 4
    assert [done.returncode for done in launch(2, [flags], place, DIE="2")] == [-9, -9]
    folder = Path("out/killed/phase3.shards")
    assert shards.find_save(folder) == folder / "step_2" and (folder / "step_4").is_dir()
    assert checkpoint.read(folder)["step"] == 2
    with pytest.raises(UserError, match="was begun with --shard on: go on so"):
        train.main([*flags, "--shard=off"])
    for done in launch(4, [flags], place):
        assert done.returncode == 0, done.stderr[-3000:]
    assert furthest("out/next_whole/phase3.pt", folder) < EXACT
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_6"]
    steps = [json.loads(line) for line in open("out/killed/log.jsonl")]
    assert [entry["step"] for entry in steps if "loss" in entry] == list(range(6))


# ---- what is read


class Evil:
    def __reduce__(self):
        return os.system, ("touch touched",)


def test_a_description_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save = tmp_path / "a.shards" / "step_1"
    save.mkdir(parents=True)
    (save.parent / "latest").write_text("step_1")
    torch.save({}, save / "facts.pt")
    (save / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a checkpoint, or cut short .it names posix.system"):
        checkpoint.read(save.parent)
    assert not Path("touched").exists()
    (save.parent / "latest").write_text("../elsewhere")
    with pytest.raises(UserError, match="no save in it is whole"):
        checkpoint.read(save.parent)


@pytest.mark.parametrize("name", ["facts.pt", "__0_0.distcp", ".metadata"])
def test_a_file_that_is_cut_short_is_one_line(place, recipe, name):
    train.main([*flags_of("lora", "cut", recipe), "--shard=on"])
    path = Path("out/cut/phase3.shards/step_6") / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="not a checkpoint, or cut short") as error:
        checkpoint.read("out/cut/phase3.shards")
    assert one_line(error)
    shutil.rmtree("out/cut")


# ---- what it will take


def test_the_plan_of_llava_next_on_sixteen_gpus(tmp_path, monkeypatch, capsys):
    """8.36 billion parameters: 16 bytes each in weights, gradients and moments, over 16 GPUs."""
    monkeypatch.chdir(tmp_path)
    settings = train.load_settings([str(ROOT / "configs/llava_next.py"), "--gpu=h100"])
    sixteen = Processes(0, 16, torch.device("cpu"))
    missing = planning.Missing()
    (one,), _ = planning.rehearse_all(settings, train.PHASES, train.load_settings, sixteen, missing)
    one.device = torch.device("cuda")
    # activations are left out; tests/test_rehearsal.py has the whole
    monkeypatch.setattr(planning, "count_step", lambda *rest: (0.0, 0))
    plan = planning.make_plan(one, sharded=True)
    count = 8_030_785_536 + 20_979_712 + 303_505_408 + 4_096
    tables = 2 * 8192 * 128 * 4  # of rotary positions
    own = plan.weights + plan.gradients + plan.moments
    assert own == pytest.approx(16 * count / 16 + tables, rel=1e-9)
    # Llama's head and embedding, CLIP's and the projector, two blocks of 218 million
    block = 218_112_000
    root = count - 32 * block - 24 * 12_596_224
    assert plan.gathered == pytest.approx((root + 2 * block) * 2 + (root + block) * 6, rel=1e-6)
    assert plan.memory < 80e9
    # auto: where one GPU is too small, and there are several
    for limit, world, needed in ((80e9, 16, True), (200e9, 16, False), (80e9, 1, False)):
        one.world = world
        assert planning.needs_shards(one, limit) == needed
        monkeypatch.setattr(planning, "machine_memory", lambda device, limit=limit: limit)
        chosen = planning.choose_sharding([one])
        assert chosen == {"phase3": "on" if needed else "off"}
