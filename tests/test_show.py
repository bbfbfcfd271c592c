"""`data.py show`: a sample as a person sees it, against the bins."""

import numpy as np
import pytest
from conftest import ROOT, one_line, shell
from PIL import Image

from config import UserError
from data import Data
from sources import show


def run(capsys, *flags):
    show.main([*map(str, flags)])
    return capsys.readouterr().out.splitlines()


def test_a_caption_with_its_tokens_apart_and_its_loss_in_brackets(home, capsys):
    dataset = Data("data/tiny")
    head, text = run(capsys, "data/tiny", 5)
    first, length = dataset.open("train", "samples")[5, :2].tolist()
    tokens = dataset.open("train", "tokens")[first : first + length].tolist()
    words = [dataset.tokenizer.decode([token]) for token in tokens[1:-1]]
    assert text.strip() == "|".join(["<image> x 4", *(f"[{word}]" for word in words), "[<eos>]"])
    assert head == (
        f"train 5: {length} tokens, {length - 1} in the loss; 1 images, 4 image tokens; "
        f"{length + 3} positions"
    )


def test_image_tokens_are_those_of_the_model(recipe, home, capsys):
    head, _ = run(capsys, "data/tiny", 5, "--checkpoint=out/full/phase2.pt")
    assert ", 4 image tokens;" in head  # 16 pixels in patches of 8
    assert ", 16 image tokens;" in run(capsys, "data/tiny", 5, "--patch=4")[0]


def test_colour_on_a_terminal_only(home, capsys, monkeypatch):
    monkeypatch.setattr(show, "has_colour", lambda: True)
    assert "\033[32m" in run(capsys, "data/tiny", 5)[1]


def test_pictures_of_several_samples(home, tmp_path, capsys):
    dataset, out = Data("data/tiny"), tmp_path / "a.png"
    lines = run(capsys, "data/tiny", 0, 3, "--split=val", "--out", out)
    assert sum(line.startswith("val ") for line in lines) == 2
    page = np.asarray(Image.open(out))
    assert page.shape == (2 * 132, 132, 3)
    for row, number in enumerate((0, 3)):
        first = dataset.open("val", "samples")[number, 2]
        frame = dataset.open("val", "frames")[dataset.open("val", "image_ids")[first]]
        corner = page[row * 132 + 4, 4].astype(int)
        assert np.abs(corner - frame[0, 0]).max() < 40  # resized


def test_two_frames_of_one_clip(home, tmp_path, capsys):
    out = tmp_path / "pair.png"
    lines = run(capsys, "data/tiny", 7, "--clips", "--out", out)
    assert "clip 3, which has the frames [6, 7]" in lines[0]
    assert Image.open(out).size == (2 * 132, 132)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["data/tiny"], "want: python data.py show FOLDER NUMBER"),
        (["data/tiny", "x"], "want: python data.py show FOLDER NUMBER"),
        (["data/tiny", "99999"], "train has .* samples, from 0; no 99999"),
        (["data/tiny", "99999", "--clips"], "24 frames, from 0; no 99999"),
        (["data/tiny", "0", "--split=test"], "--split test: one of train, val"),
        (["data/none", "0"], "no data/none/meta.json"),
        (["data/tiny", "0", "--checkpoint=out/full/vision.pt"], "has no projector"),
    ],
)
def test_mistakes_are_one_line(recipe, home, flags, message):
    with pytest.raises(UserError, match=message) as error:
        show.main(flags)
    assert one_line(error)


def test_the_command(home):
    done = shell(ROOT / "data.py", "show", "data/tiny", "17", cwd=home)
    assert done.returncode == 0 and done.stdout.startswith("train 17: ")
    help_text = shell(ROOT / "data.py", "show", "--help", cwd=home).stdout
    assert "--clips" in help_text and "data/toy 17" in help_text
