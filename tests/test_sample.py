"""The quick caption, as a user types it, and every way to get it wrong."""

import os
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import sample
from conftest import ROOT
from data import DataError


def shell(*args, cwd):
    env = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=env, text=True, capture_output=True
    )


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


def test_the_shipped_model_captions_the_shipped_picture(tmp_path):
    """From any folder, cold, in under 5 s on an idle machine; it stops by itself."""
    start = time.perf_counter()
    done = shell(ROOT / "sample.py", "--image", ROOT / "assets/scene.png", cwd=tmp_path)
    assert time.perf_counter() - start < 20
    assert done.returncode == 0 and done.stderr == ""
    assert "stopped at the limit" not in done.stdout and len(done.stdout.split()) > 1
    assert sum(p.stat().st_size for p in (ROOT / "assets").iterdir()) <= 8e6


def test_captions_end_with_eos_not_with_the_limit():
    parts = sample.load(ROOT / "assets/toy.pt")
    frame = data.read_image(ROOT / "assets/scene.png", parts.meta["S"])
    assert 1 < len(sample.caption(parts, frame[None], 60)[0].split()) < 30


def test_prompt_samples_and_several_pictures(recipe, home, picture, capsys):
    sample.main(
        [
            "--checkpoint",
            "out/full/phase2.pt",
            "--image",
            picture,
            f"--image={picture}",
            "--prompt",
            "look",
            "--num_samples=2",
            "--temperature=1",
            "--max_new_tokens=3",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("look") for line in lines)
    sample.main(["--checkpoint=out/full/phase0.pt", "--max_new_tokens=3"])  # words alone
    assert capsys.readouterr().out


def test_attention_is_drawn(recipe, home, picture, tmp_path):
    sample.main(
        [
            "--checkpoint=out/full/phase2.pt",
            "--image",
            picture,
            "--max_new_tokens=4",
            f"--attention={tmp_path}/out.png",
        ]
    )
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.size[1] == 142 and sheet.size[0] > 128


def test_a_picture_means_the_same_in_sampling_as_in_training(recipe, home):
    """The features sample.py makes of an image file are those that phase 1 read from its bin."""
    dataset = data.Data("data/tiny")
    frames = dataset.open("train", "frames")
    Image.fromarray(frames[3]).save("frame3.png")
    parts = sample.load("out/full/phase2.pt")
    size = parts.meta["S"]
    seen = sample.see(parts, data.read_image("frame3.png", size)[None])[0]
    stored = torch.tensor(dataset.open("train", "features")[3].astype("float32"))
    assert (seen - stored).abs().max() < 1e-2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no such image"),
        (lambda p: p.write_text("hello"), "not a picture"),
        (lambda p: p.write_bytes(b""), "not a picture"),
        (lambda p: p.mkdir(), "cannot be read"),
    ],
)
def test_a_bad_picture_is_one_clear_line(recipe, home, tmp_path, make, message):
    path = tmp_path / "bad.jpg"
    make(path)
    with pytest.raises(DataError, match=message) as error:
        sample.main(["--checkpoint=out/full/phase2.pt", f"--image={path}"])
    assert "\n" not in str(error.value)


def test_a_truncated_jpeg_is_one_clear_line(recipe, home, tmp_path):
    Image.effect_noise((200, 200), 90).save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read whole"):
        sample.main(["--checkpoint=out/full/phase2.pt", f"--image={tmp_path}/x.jpg"])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--checkpoint=none.pt"], "no such checkpoint"),
        (["--checkpoint=data/tiny/meta.json"], "not a checkpoint, or cut short"),
        (["--checkpoint=out/full/vision.pt"], "an eye alone"),
        (["--checkpoint=out/full/phase0.pt", "--image=frame.png"], "cannot see"),
        (
            ["--checkpoint=out/full/phase2.pt", "--image=frame.png", "--prompt=" + "ball " * 99],
            "this model holds 48",
        ),
        (["--checkpoint=out/full/phase2.pt", "--device=gpu"], "cpu, cuda or mps"),
        (["--checkpoint=out/full/phase2.pt", "--attention=x.png"], "needs an --image"),
    ],
)
def test_mistakes_are_one_clear_line(recipe, home, args, message):
    Image.new("RGB", (9, 9)).save("frame.png")
    with pytest.raises(DataError, match=message) as error:
        sample.main(args)
    assert "\n" not in str(error.value)


def test_a_cut_checkpoint_is_one_clear_line(recipe, tmp_path):
    whole = (recipe / "phase2.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut short"):
        sample.read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "command",
    [
        ["sample.py", "--image", "nowhere.jpg"],
        ["sample.py", "--imge", "x"],
        ["eval.py", "--checkpoint", "none.pt"],
        ["train.py", "configs/none.py"],
        ["data.py", "pairs", "--csv", "none.csv"],
        ["sample.py", "--device", "mps", "--image", str(ROOT / "assets/scene.png")],
    ],
)
def test_no_mistake_shows_a_traceback(tmp_path, command):
    done = shell(ROOT / command[0], *command[1:], cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


def test_pictures_matter_to_the_shipped_model(tmp_path, monkeypatch):
    """On a fresh toy world it answers well; its pictures dealt to other captions, it guesses."""
    monkeypatch.chdir(tmp_path)
    data.main(["toy", "--scenes=1", "--lines=50", "--trials=0.25", "--seed=99"])
    parts = sample.load(ROOT / "assets/toy.pt")
    config = evaluation.Config(checkpoint="assets/toy.pt", data="data/toy")
    seen = evaluation.evaluate(parts, config)[0]["tasks"]
    assert seen["labeled_s"]["subsets"]["seen"]["accuracy"] > 0.7
    assert seen["vtwt"]["subsets"]["seen"]["accuracy"] > 0.8
    config.shuffle = True
    blind = evaluation.evaluate(parts, config)[0]["tasks"]
    for task in ("labeled_s", "vtwt"):
        low, high = blind[task]["ci95"]
        assert low - 0.05 < blind[task]["chance"] < high + 0.05, task
