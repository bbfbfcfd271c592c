"""A toy world small enough to train on in seconds, and a run of the whole recipe on it."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)
# Without a GPU, Triton's kernels run in its interpreter: set before anything imports triton.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

TINY = ["--size=16", "--scenes=12", "--clip=2", "--lines=200", "--trials=0.03", "--vocab_size=300"]
SMALL = ["--patch=8", "--vision_width=16", "--vision_depth=2", "--vision_heads=2",
         "--prototypes=16", "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=48",
         "--vision_steps=4", "--phase0_steps=4", "--phase1_steps=4", "--phase2_steps=4",
         "--vision_batch=8", "--phase0_batch=8", "--phase1_batch=8", "--phase2_batch=8",
         "--eval_every=2", "--save_every=2", "--log_every=1", "--device=cpu"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with data/tiny in it; the tests of a session share it and only read it."""
    import data
    folder = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(folder)
    data.main(["toy", "--name=tiny", *TINY])
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
