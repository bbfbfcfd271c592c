"""Anybody's captioned pictures and transcripts, and what must not leak."""

import os

import numpy as np
import pytest
from conftest import one_line
from PIL import Image

from config import UserError
from data import Data
from sources import command


def write_pictures(count, captions=1, order=None):
    """`count` pictures whose shade is their number, each with so many captions that say it, in a
    CSV in some order."""
    rows = []
    for i in range(count):
        Image.new("RGB", (20, 10), (i, i, i)).save(f"{i}.png")
        rows += [f'{i}.png,"a thing , number {i} , said {c}"' for c in range(captions)]
    if order is not None:
        rows = [rows[i] for i in order]
    open("p.csv", "w").write("\n".join(["image,caption", *rows]) + "\n")


def samples(dataset, split):
    """[(shade of the picture, caption)] read back."""
    tokens, shown = dataset.open(split, "tokens"), dataset.open(split, "image_ids")
    frames, images = dataset.open(split, "frames"), dataset.open(split, "images")
    found = []
    for first, length, image, _ in dataset.open(split, "samples").tolist():
        frame = frames[images[shown[image], 0]]
        found.append(
            (int(frame[0, 0, 0]), dataset.tokenizer.decode(tokens[first : first + length]))
        )
    return found


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepare(*flags):
    command.main(["pairs", "--csv=p.csv", "--size=16", "--vocab_size=300", *flags])
    return Data("data/pairs")


def test_pictures_and_transcripts_are_imported(tmp_path):
    write_pictures(120)
    whole = (tmp_path / "8.png").read_bytes()
    (tmp_path / "7.png").write_bytes(whole[:45])  # truncated
    (tmp_path / "t.txt").write_text("\n".join(f"line {i} ." for i in range(200)))
    dataset = prepare("--text=t.txt")
    assert dataset.count("train", "frames") == 109 and dataset.count("val", "frames") == 10
    assert "p.csv:9: " in (tmp_path / "data/pairs/skipped.txt").read_text()
    for split in ("train", "val"):
        assert all(f"number {shade} " in said for shade, said in samples(dataset, split))
    images = dataset.open("train", "images")
    assert images[0].tolist() == [0, 0, 0, 20, 10]  # the picture's own width and height
    val = dataset.tokenizer.decode(dataset.open("val", "text"))
    assert "line 18 ." in val and "line 19 ." in val and "line 17 ." not in val
    with pytest.raises(UserError, match="over max_skipped 0.001"):
        prepare("--max_skipped=0.001")


def test_no_picture_is_in_both_parts():
    """A shuffled CSV with several captions a picture once put all validation pictures into
    training."""
    order = np.random.RandomState(0).permutation(3 * 100)
    write_pictures(100, captions=3, order=order)
    dataset = prepare()
    train, val = (samples(dataset, split) for split in ("train", "val"))
    assert len(train) == 270 and len(val) == 30
    assert not {shade for shade, _ in train} & {shade for shade, _ in val}
    assert dataset.count("train", "frames") == 90  # each picture once, with all its captions
    assert all(f"number {shade} " in said for shade, said in train + val)


def test_what_is_said_over_validation_pictures_is_not_learnt_before(capsys):
    """A separately ordered --text once put 89 of 100 validation captions into phase 0."""
    write_pictures(100)
    captions = [line.split(",", 1)[1].strip('"\n') for line in open("p.csv")][1:]
    open("t.txt", "w").write("\n".join(["hello there .", *reversed(captions)]))
    dataset = prepare("--text=t.txt")
    text = dataset.tokenizer.decode(dataset.open("train", "text"))
    held = [said for _, said in samples(dataset, "val")]
    assert len(held) == 10 and not any(said in text for said in held)
    assert "hello there ." in text and "lines are validation captions" in capsys.readouterr().out


def test_pictures_may_lie_in_a_zip(tmp_path):
    import zipfile

    write_pictures(100)
    with zipfile.ZipFile("z.zip", "w") as archive:
        for i in range(100):
            archive.write(f"{i}.png", f"deep/{i}.png")
    (tmp_path / "elsewhere").mkdir()
    for i in range(100):
        (tmp_path / f"{i}.png").rename(tmp_path / "elsewhere" / f"{i}.png")
    one = prepare("--images=z.zip")
    bins = {path.name: path.read_bytes() for path in tmp_path.glob("data/pairs/*.bin")}
    prepare("--images=elsewhere")
    again = {path.name: path.read_bytes() for path in tmp_path.glob("data/pairs/*.bin")}
    assert bins == again and one.count("train", "frames") == 90


def test_a_picture_is_made_square_as_asked():
    write_pictures(100)
    dataset = prepare("--fit=pad", "--resample=bicubic")
    assert dataset.image_format.fit == "pad" and dataset.image_format.resample == "bicubic"
    frame = dataset.open("train", "frames")[0]
    assert frame[0, 0].tolist() == [int(255 * m) for m in dataset.image_format.mean]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no column image, caption"),
        ("image,caption\n", "no rows below the header"),
        ("image,text\na.png,hi\n", ":1: no column caption"),
        ("image,caption\na.png,\n", ":2: empty"),
        ("image,caption\na.png,hi\n", "1 pictures; need at least 10"),
    ],
)
def test_a_bad_csv_is_one_clear_line(content, message):
    open("p.csv", "w").write(content)
    with pytest.raises(UserError, match=message) as error:
        prepare()
    assert one_line(error)


def test_speech_alone_is_enough_for_phase_0(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(f"line {i} .\n" for i in range(200)))
    command.main(["pairs", "--name=speech", "--text=t.txt", "--vocab_size=300"])
    dataset = Data("data/speech")
    assert dataset.count("train", "text") and not dataset.count("train", "frames")
    with pytest.raises(UserError, match="was prepared without; see `python data.py pairs --help`"):
        dataset.open("train", "frames")
    with pytest.raises(UserError, match="give --csv FILE"):
        command.main(["pairs"])


def test_a_picture_is_looked_for_where_it_was_said_to_be(tmp_path, monkeypatch):
    """A name that is not in --images was once taken from the folder one stood in."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "elsewhere"):
        os.mkdir(folder)
    for i in range(20):
        Image.new("RGB", (8, 8)).save(f"photos/{i}.png")
    rows = "".join(f"photos/{i}.png,a ball\n" for i in range(20))
    open("pairs.csv", "w").write("image,caption\n" + rows)
    with pytest.raises(UserError, match="elsewhere/photos/0.png: no such image"):
        command.main(["pairs", "--csv=pairs.csv", "--images=elsewhere"])
