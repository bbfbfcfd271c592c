"""
Our speed beside what a user would pick instead: transformers' GPT2LMHeadModel and LlamaForCausalLM
(phase 0) and LlavaForConditionalGeneration (phases 1 and 2, generation).

    pip install transformers
    python benchmarks/peers.py                                  # all of it
    python benchmarks/peers.py --work phase2 --shapes B --modes eager
    python benchmarks/peers.py --work memory start

All are given the same shapes, precision and threads, and take turns, step by step, in one process,
so that whatever else the machine does slows all alike. A step is forward, loss, backward, clipping
and AdamW: ours is train.py's own take_step(), theirs what their own trainer does. Ratios are those
of one round, so above 1 ours is faster, and are given as median and quartiles; "best" compares the
faster of eager and compiled on either side.

Our phases 1 and 2 read features from a file, because the tower is frozen; theirs run it in each
step. So that this alone does not decide, its time is taken off theirs, measured beside it. Shapes,
32 words each, all of them targets, GPT 256 wide, 6,000 tokens:

    S    image 96 / 16 (36 tokens), ViT 192 wide of 4 layers, GPT of 4 layers, 4 heads, batch 8
    B    image 224 / 16 (196 tokens), ViT 384 wide of 12 layers, GPT of 8 layers, 4 heads, batch 4
    L    phase 0: no image, GPT of 8 layers, 4 heads, 256 words, all of them targets, batch 8
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import checkpoint
import config
import phases
import train
from batches import Batch
from config import knob
from images import ImageFormat
from model import GPT, BabyLLaVA, GPTConfig, Projector
from vision import ViT

ROOT = Path(__file__).resolve().parent.parent
WORK = ("phase0", "phase1", "phase2", "generation", "memory", "start")
MODES = ("eager", "compiled")
VOCABULARY, WORDS, ANSWER = 6000, 32, 64
IMAGE, PAD = 5999, 5998


@dataclasses.dataclass
class Config(config.Knobs):
    work: tuple[str, ...] = knob(WORK, choices=WORK)  # what to measure
    shapes: tuple[str, ...] = knob(("S", "B"), choices=("S", "B"))  # of all but phase 0, which is L
    modes: tuple[str, ...] = knob(MODES, choices=MODES)  # of steps; all else is eager
    rounds: int = knob(15, low=3, high=10**6)  # all take a step in each, after 3 that do not count
    device: str = ""  # cpu or cuda; empty: cuda where there is one
    one: str = knob(
        "", choices=("", "ours", "LLaVA")
    )  # its memory alone, as --work memory calls it


@dataclasses.dataclass(frozen=True)
class Shape:
    side: int  # of an image, in pixels
    tower: tuple  # width, layers, heads
    layers: int  # of the GPT
    batch: int
    words: int = WORDS

    @property
    def image_tokens(self):
        return (self.side // 16) ** 2


SHAPES = {
    "S": Shape(96, (192, 4, 3), 4, 8),
    "B": Shape(224, (384, 12, 6), 8, 4),
    "L": Shape(0, (), 8, 8, 256),
}


def make_data(shape):
    """(tokens (B, T) with placeholders first, targets (B, T) aligned with them, -100 where there is
    none); of shape L all tokens but the first are targets."""
    rng, P = np.random.RandomState(0), shape.image_tokens
    tokens = rng.randint(0, 5000, (shape.batch, P + shape.words))
    tokens[:, :P] = IMAGE
    targets = np.full_like(tokens, -100)
    first = max(1, P)
    targets[:, first:] = tokens[:, first:]
    return tokens, targets


# ---------------------------------------------------------------------------------------------
# Ours and theirs


class Ours:
    """Our model of a shape and train.py's step on it."""

    def __init__(self, shape, work, device):
        torch.manual_seed(0)
        P = shape.image_tokens
        sizes = GPTConfig(VOCABULARY, P + shape.words + ANSWER, shape.layers, 4, 256)
        if P:
            tower = ViT(shape.side, 16, *shape.tower).requires_grad_(False)
            projector = Projector("mlp2x_gelu", tower.width, 256)
            self.model = BabyLLaVA(GPT(sizes), projector, tower, IMAGE).to(device)
        else:
            self.model = BabyLLaVA(GPT(sizes)).to(device)
        tokens, targets = make_data(shape)
        features, x, y = None, tokens[:, :-1], targets[:, 1:]
        if P:
            self.pixels = torch.zeros(shape.batch, 3, shape.side, shape.side, device=device)
            features = self.model.encode_images(self.pixels).detach().half().cpu().numpy()
        places = np.flatnonzero(y.flatten() != -100) if P else None
        wanted = y.flatten()[places] if P else y.flatten()
        self.batch = Batch(np.ascontiguousarray(x), wanted, places, features, len(wanted))
        self.prompt = torch.tensor(tokens[:, : P + 1], device=device)
        self.device, self.work, self.shape = device, work, shape

    def prepare(self, mode):
        """Make ready for steps in this mode."""
        compiled = "on" if mode == "compiled" else "off"
        settings = train.Config(compile=compiled, dtype="float32")  # on a GPU too, as theirs
        processes = phases.Processes(0, 1, self.device)
        groups = phases.set_learning(self.model, train.PHASES[self.work].learns, 1e-4)
        self.run = phases.Run(
            settings=settings,
            name=self.work,
            dataset=SimpleNamespace(image_format=ImageFormat(self.shape.side or 16)),
            processes=processes,
            parents={},
            decided={},
            raw_model=self.model,
            model=phases.wrap(self.model, settings, processes, None),
            optimizer=phases.make_optimizer(settings, groups, self.device),
            train_batches=None,
            val_batches=None,
            start=0,
            steps=10**6,
            batch=self.shape.batch,
        )

    def step(self):
        return float(train.take_step(self.run, 10**5, [self.batch])[0])

    @torch.no_grad()
    def look(self, rows):
        return self.model.encode_images(self.pixels[:1].expand(rows, -1, -1, -1))

    def say(self, rows):
        """ANSWER greedy tokens after a picture and a word, from pixels on."""
        features = self.look(rows)
        said = self.model.generate(self.prompt[:1].expand(rows, -1), features, ANSWER)
        return torch.stack(list(said), 1)


def llava(shape):
    """LlavaForConditionalGeneration of a shape, with weights that are random."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    width, layers, heads = shape.tower
    seen = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=shape.side,
        patch_size=16,
        projection_dim=width,
    )
    settings = LlavaConfig(
        vision_config=seen,
        text_config=LlamaConfig(**llama_sizes(shape)),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=shape.image_tokens,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(settings)


def llama_sizes(shape):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 704,  # as ours
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": shape.image_tokens + shape.words + ANSWER,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def language_model(kind, shape):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "Llama":
        return LlamaForCausalLM(LlamaConfig(**llama_sizes(shape)))
    sizes = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=shape.words,
        n_embd=256,
        n_layer=shape.layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(sizes)


class Peer:
    """A model of transformers and what its Trainer does in a step: loss, clipping, fused AdamW."""

    def __init__(self, kind, shape, work, device):
        torch.manual_seed(0)
        made = llava(shape) if kind == "LLaVA" else language_model(kind, shape)
        self.model = made.to(device).train()
        if kind == "LLaVA":
            self.model.model.vision_tower.requires_grad_(False)
            if work == "phase1":
                self.model.model.language_model.requires_grad_(False)
        tokens, labels = make_data(shape)
        tokens, labels = torch.tensor(tokens, device=device), torch.tensor(labels, device=device)
        self.inputs = {"input_ids": tokens, "labels": labels}
        self.prompt = tokens[:, : shape.image_tokens + 1]
        if kind == "LLaVA":
            self.pixels = torch.zeros(shape.batch, 3, shape.side, shape.side, device=device)
            self.inputs["pixel_values"] = self.pixels

    def prepare(self, mode):
        self.learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, 1e-4, weight_decay=0.1, fused=True)
        self.called = torch.compile(self.model) if mode == "compiled" else self.model
        if hasattr(self, "pixels"):
            tower = self.model.model.vision_tower
            self.tower = torch.compile(tower) if mode == "compiled" else tower

    def step(self):
        loss = self.called(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def look(self, rows):
        """The tower alone, as a step runs it."""
        self.tower(self.pixels[:1].expand(rows, -1, -1, -1))

    @torch.no_grad()
    def say(self, rows):
        said = self.model.generate(
            input_ids=self.prompt[:1].expand(rows, -1),
            attention_mask=torch.ones_like(self.prompt[:1].expand(rows, -1)),
            pixel_values=self.pixels[:1].expand(rows, -1, -1, -1),
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
        )
        return said[:, self.prompt.shape[1] :]


# ---------------------------------------------------------------------------------------------
# Taking turns


def timed(action, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def take_turns(actions, rounds, device):
    """{name: [ms in each round]}; all act once a round, after three rounds that do not count."""
    took = {name: [] for name in actions}
    for number in range(rounds + 3):
        for name, action in actions.items():
            ms = timed(action, device)
            if number >= 3:
                took[name].append(ms)
    return took


def spread(values, digits):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def print_times(work, name, took):
    for (who, mode), values in took.items():
        print(f"| {work} | {name} | {who} | {mode} | {spread(values, 1)} |", flush=True)


def best_ratio(ours, theirs):
    """Of {mode: values} of both sides the ratios theirs / ours, each side in its faster mode."""
    a, b = (min(side.values(), key=statistics.median) for side in (ours, theirs))
    return [y / x for x, y in zip(a, b)]


def compare(settings, work, name, took):
    """Print the times of {(who, mode): ms}, return lines with the ratios to each peer."""
    print_times(work, name, took)
    sides = {}
    for (who, mode), values in took.items():
        sides.setdefault(who, {})[mode] = values
    ours, lines = sides.pop("ours"), []
    for who, modes in sides.items():
        each = [
            spread(best_ratio({mode: ours[mode]}, {mode: modes[mode]}), 2) if mode in modes else "-"
            for mode in settings.modes
        ]
        lines.append([work, name, who, *each, spread(best_ratio(ours, modes), 2)])
    return lines


def take_off(took, who, looks):
    """Take the tower's time off, round by round."""
    took[who] = [whole - look for whole, look in zip(took[who], looks)]


def training(settings, work, name, device):
    """Steps of a phase, ours beside theirs."""
    shape, kinds = SHAPES[name], ("LLaVA",) if work != "phase0" else ("GPT-2", "Llama")
    actions = {}
    for mode in settings.modes:
        for kind in ("ours", *kinds):
            side = Ours(shape, work, device) if kind == "ours" else Peer(kind, shape, work, device)
            side.prepare(mode)
            actions[kind, mode] = side.step
            if kind == "LLaVA":
                actions["its tower", mode] = partial(side.look, shape.batch)
    took = take_turns(actions, settings.rounds, device)
    for mode in settings.modes:
        if ("its tower", mode) in took:
            looks = {("its tower", mode): took.pop(("its tower", mode))}
            print_times(work, name, looks)
            take_off(took, ("LLaVA", mode), *looks.values())
    return compare(settings, work, name, took)


def generation(settings, name, device):
    """Greedy answers of ANSWER tokens to a picture and a word, the tower's time taken off."""
    ours = Ours(SHAPES[name], "phase2", device)
    theirs = Peer("LLaVA", SHAPES[name], "phase2", device)
    theirs.prepare("eager")
    for side in (ours, theirs):
        side.model.eval()
    lines = []
    for rows in (1, 8):
        actions = {
            ("ours", "eager"): lambda: ours.say(rows),
            ("LLaVA", "eager"): lambda: theirs.say(rows),
            ("our tower", "eager"): lambda: ours.look(rows),
            ("its tower", "eager"): lambda: theirs.look(rows),
        }
        took = take_turns(actions, settings.rounds, device)
        print_times(f"generation, {rows} at once", name, took)
        for who, tower in (("ours", "our tower"), ("LLaVA", "its tower")):
            take_off(took, (who, "eager"), took.pop((tower, "eager")))
        lines += compare(settings, f"generation, {rows} at once, without towers", name, took)
    return lines


# ---------------------------------------------------------------------------------------------
# In processes of their own


def again(*flags):
    """(seconds, what it printed) of this file or another in a fresh process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, flags))}: {done.stderr[-3000:]}")
    return time.perf_counter() - start, done.stdout


def memory(settings, name, device):
    """The largest memory of a process that takes five steps of phase 2, libraries and all."""
    peaks = {}
    for who in ("ours", "LLaVA"):
        flags = f"--one={who}", f"--shapes={name}", f"--device={device}"
        peaks[who] = float(again(__file__, *flags)[1])
        print(f"| memory, phase 2 | {name} | {who} | eager | {peaks[who]:.0f} MB |", flush=True)
    ratio = f"{peaks['LLaVA'] / peaks['ours']:.2f}"
    return [["memory, phase 2", name, "LLaVA", *["-"] * len(settings.modes), ratio]]


def measure_one(settings, device):
    who, shape = settings.one, SHAPES[settings.shapes[0]]
    side = Ours(shape, "phase2", device) if who == "ours" else Peer(who, shape, "phase2", device)
    side.prepare("eager")
    for _ in range(5):
        side.step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)  # it is in KiB


# What a user of transformers types for a caption of a picture.
THEIR_CAPTION = """
import sys
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
picture = Image.open(sys.argv[2]).convert("RGB")
inputs = processor(images=picture, text="<image>", return_tensors="pt")
said = model.generate(**inputs, max_new_tokens=50, do_sample=False)
print(processor.decode(said[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def start(settings, name, device):
    """From the command line to the first caption of the model that comes with the repository, and
    of the same model exported for transformers."""
    picture, flags = ROOT / "assets" / "scene.png", f"--device={device}"
    with tempfile.TemporaryDirectory() as folder:
        again(ROOT / "weights.py", "export", ROOT / "assets/toy.pt", f"{folder}/llava")
        said, took = {}, {("ours", "eager"): [], ("LLaVA", "eager"): []}
        for _ in range(settings.rounds):
            for who, command in (
                ("ours", (ROOT / "sample.py", f"--image={picture}", flags)),
                ("LLaVA", ("-c", THEIR_CAPTION, f"{folder}/llava", picture)),
            ):
                seconds, said[who] = again(*command)
                took[who, "eager"].append(1000 * seconds)
    print(f"ours: {said['ours'].strip()}; theirs: {said['LLaVA'].strip()}", file=sys.stderr)
    return compare(settings, "cold start to a caption", "toy", took)


def main(argv):
    settings = config.load(Config, argv, __doc__)
    device = checkpoint.choose_device(settings.device)
    if settings.one:
        return measure_one(settings, device)
    import transformers

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {device}, fp32, "
        f"{torch.get_num_threads()} threads\n\n"
        "| work | shape | who | mode | ms |\n|---|---|---|---|---|"
    )
    measure = {"generation": generation, "memory": memory, "start": start}
    lines = []
    for work in settings.work:
        names = {"phase0": ("L",), "start": ("toy",)}.get(work, settings.shapes)
        for name in names:
            if work in measure:
                lines += measure[work](settings, name, device)
            else:
                lines += training(settings, work, name, device)
    heads = ["work", "shape", "beside", *settings.modes, "best"]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    config.run(main)
