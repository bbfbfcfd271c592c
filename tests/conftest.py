"""A toy world small enough to train on in seconds, and a run of the whole recipe on it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# One thread for each of pytest-xdist's workers, two for a single process; commands that tests start
# get as many, because the number of threads decides how sums are rounded.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)
# Without a GPU, Triton's kernels run in its interpreter: set before anything imports triton.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    # xdist starts the files with the most tests first; those with the fewest take longest
    config.option.loadscopereorder = False


FORKS = Forks()
TINY = "--size=16 --scenes=12 --clip_frames=2 --lines=200 --trials=0.03 --vocab_size=300".split()
# The last options are train.py's defaults, for tests that also read configs/toy.py
SMALL = (
    "--patch=8 --vision_width=16 --vision_depth=2 --vision_heads=2 --prototypes=16 --n_layer=2 "
    "--n_head=2 --n_embd=16 --block_size=48 --vision_steps=4 --language_steps=4 --phase1_steps=4 "
    "--phase2_steps=4 --phase3_steps=4 --vision_batch=8 --language_batch=8 --phase1_batch=8 "
    "--phase2_batch=8 --phase3_batch=8 --eval_every=2 --save_every=2 --log_every=1 --device=cpu "
    "--select_layer=-1 --optimizer=adamw --muon_rate=1 --student_mask=0 --image_pool=1 "
    "--phase2_lr=2e-3"
).split()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with data/tiny in it; the tests of a session share it and only read it."""
    from sources import command

    folder = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(folder)
    command.main(["toy", "--name=tiny", *TINY])
    os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def recipe(world):
    """out/full: the whole recipe, once."""
    import train

    before = os.getcwd()
    os.chdir(world)
    train.main(["--data=data/tiny", "--out=out/full", *SMALL])
    os.chdir(before)
    return world / "out" / "full"


@pytest.fixture
def home(world, monkeypatch):
    """The test runs in the shared world's folder."""
    monkeypatch.chdir(world)
    return world


def shell(*args, cwd, input=None, **env):
    """Run a script as a user would. One that needs no environment, module or code of its own is run
    in a fork of a process that has imported torch."""
    command = [*map(str, args)]
    if not env and not command[0].startswith("-") and hasattr(os, "fork"):
        return FORKS.run(command, cwd, {**os.environ, "PYTHONPATH": ""}, input)
    env = {**os.environ, "PYTHONPATH": "", **env}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, input=input)


def one_line(error):
    """Whether an error is what a user should see: one line, not empty."""
    return bool(str(error.value)) and "\n" not in str(error.value)


def weights(path, prefix=""):
    """The tensors of a checkpoint whose names begin so; all of DINO's, where it has them."""
    found = torch.load(path, weights_only=True)
    state = found.get("dino") or found["weights"]
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def furthest(a, b):
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def logits_after(model, tokens, image_embeds):
    """Logits (B, T, V) of tokens (B, T), the images being embedded already (M, C)."""
    return model.gpt.head(model.hidden_states(tokens, image_embeds))


def make_corpus(folder, splits, size=16):
    """A corpus written sample by sample. splits: {split: [(words, number of images)]};
    tokens may be ids, or words for a caption. Pictures are noise."""
    from common.images import ImageFormat
    from data import Writer
    from tokenizer import Tokenizer, caption_sample

    tokenizer = Tokenizer.train(["look , a red ball !", "a ball . a bear ."] * 9, 280)
    writer = Writer(folder, "made")
    writer.start(tokenizer, ImageFormat(size))
    rng = np.random.RandomState(0)
    for split, samples in splits.items():
        part = writer.split(split)
        part.text(["look , a red ball !"] * 30)
        for clip, (words, images) in enumerate(samples):
            noise = [rng.randint(0, 256, (size, size, 3), np.uint8) for _ in range(images)]
            numbers = [part.image(frame, clip) for frame in noise]
            part.sample(*caption_sample(tokenizer, words, images), numbers)
    writer.finish()
