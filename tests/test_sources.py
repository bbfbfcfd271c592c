"""What sources share: what is held out, and reading on after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import sources
from common.archives import Archives
from common.images import ImageFormat
from data import Data, Writer
from sources import hold_out, keep_out, read_images
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def test_every_tenth_stretch_is_held_out():
    parts = hold_out(list(range(1000)))
    assert parts["val"] == [i for i in range(1000) if i // 10 % 10 == 9]
    assert sorted(parts["train"] + parts["val"]) == list(range(1000))
    items = [i // 3 for i in range(60)]  # three of a kind, in order
    parts = hold_out(items, key=lambda item: item)
    assert not set(parts["train"]) & set(parts["val"]) and len(parts["val"]) == 6


def test_what_is_kept_out_is_said(capsys):
    assert keep_out(["a ball ."], ["a ball .", "a ball", "a bear ."]) == ["a ball", "a bear ."]
    assert "1 lines are validation captions" in capsys.readouterr().out
    assert keep_out([], ["a ball ."]) == ["a ball ."] and not capsys.readouterr().out


TWO_ASIDE = """
import os, signal, sys, time
from common import cores

# a shell that starts the tests in the background has it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)

def beat(name):
    for _ in range(1000):
        with open(name, "a") as file:
            file.write(".")
        time.sleep(0.02)

kept = [cores.begin(beat, name) for name in ("one", "two")]
while not all(map(os.path.exists, ("one", "two"))):
    time.sleep(0.02)
try:
    print("begun", flush=True)
    sys.exit(1) if "leave" in sys.argv else time.sleep(100)
except KeyboardInterrupt:
    sys.exit(1)
"""


@pytest.mark.parametrize("how", ["kill", "leave", "interrupt"])
def test_what_is_begun_aside_ends_with_the_process_that_began_it(tmp_path, how):
    """By kill -9, which it cannot hear of, by its own error or Ctrl-C: else it would write on."""
    run = subprocess.Popen(
        [sys.executable, "-c", TWO_ASIDE, how],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert run.stdout.readline() == b"begun\n"
    if how == "kill":
        run.kill()
    if how == "interrupt":
        os.killpg(run.pid, signal.SIGINT)
    assert b"Traceback" not in run.communicate(timeout=60)[1]
    size = lambda: [(tmp_path / name).stat().st_size for name in ("one", "two")]
    still, patience = None, 100
    while size() != still and patience:
        still, patience = size(), patience - 1
        time.sleep(0.2)
    assert patience and max(still) < 500  # of 1,000: it did not simply come to its end


def interrupted(locations, image_format):
    raise KeyboardInterrupt
    yield


def test_what_a_killed_run_read_is_not_taken_for_another_runs(tmp_path, monkeypatch):
    """A run is killed; one that reads in another way dies before its first picture; the same again
    must not take the first one's pictures for its own."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        Image.new("RGB", (40, 20), (60 * i, 0, 0)).save(f"{i}.png")
    places = [Archives(["."]).find(f"{i}.png") for i in range(4)]
    tokenizer = Tokenizer.train(["a ball"] * 9, 270)

    def begin(fit):
        writer = Writer("data/x", "made")
        writer.start(tokenizer, ImageFormat(8, fit))
        part = writer.split("train")
        return writer, part, read_images(part, places, range(4), [""] * 4, 0.5)

    _, part, numbers = begin("squash")
    assert [next(numbers), next(numbers), next(numbers)] == [0, 1, 2]
    numbers.close()  # killed
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sources, "read_all", interrupted)
        next(begin("pad")[2])
    writer, _, numbers = begin("pad")
    assert list(numbers) == [0, 1, 2, 3]
    writer.finish()
    frames = Data("data/x").open("train", "frames")
    assert (frames[:, 0] == [int(255 * m) for m in ImageFormat(8).mean]).all()
