"""The format on disk: what goes in comes out, and what is missing or stale is refused."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from conftest import TINY, make_corpus, one_line

import data
from common.images import ImageFormat
from config import UserError
from data import Data, Writer, open_bin
from sources import command, toy
from tokenizer import Tokenizer


def test_bins_hold_what_was_drawn_and_said(world):
    dataset = Data(world / "data/tiny")
    samples, shown = dataset.open("train", "samples"), dataset.open("train", "image_ids")
    tokens, loss_mask = dataset.open("train", "tokens"), dataset.open("train", "loss_mask")
    frames, images = dataset.open("train", "frames"), dataset.open("train", "images")
    assert len(samples) == 48 and frames.shape == (24, 16, 16, 3)
    assert list(dataset.open("train", "clips")[:4]) == [0, 0, 1, 1]
    config = toy.Config()
    rng = np.random.RandomState([config.seed, 0, 1])  # the training split's frames
    for i, (first, length, first_shown, number) in enumerate(samples[:8].tolist()):
        if i % 4 == 0:  # two clips of two frames with two utterances each
            scene = toy.random_scene(rng, toy.THINGS)
        if i % 2 == 0:
            filmed = toy.film(scene, rng, 16, toy.THINGS)
        assert number == 1
        image = images[shown[first_shown]]
        assert np.array_equal(frames[image[0]], filmed) and list(image[1:]) == [0, 0, 16, 16]
        ids = tokens[first : first + length].tolist()
        assert ids[0] == dataset.tokenizer.image and ids[-1] == dataset.tokenizer.eos
        assert dataset.tokenizer.decode(ids) == toy.utterance(scene, rng)
        assert loss_mask[first : first + length].tolist() == [0] + [1] * (length - 1)


def test_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        command.main(["toy", f"--name={name}", *TINY])
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / "data" / name).glob("[!.]*.*")}
        for name in ("a", "b")
    ]
    assert files[0] == files[1] and len(files[0]) == 18
    command.main(["toy", "--name=b", *TINY, "--seed=2"])
    corpora = [Data(f"data/{name}").meta["corpus"] for name in ("a", "b")]
    assert corpora[0] != corpora[1]


def test_a_sample_is_any_number_of_images_and_texts(tmp_path):
    samples = [("a ball", 0), ("a red ball", 1), ("two", 3)]
    make_corpus(tmp_path, {"train": samples})
    dataset = Data(tmp_path)
    numbers = dataset.open("train", "samples")[:, 3].tolist()
    assert numbers == [0, 1, 3] and dataset.open("train", "image_ids").tolist() == [0, 1, 2, 3]


def test_a_sample_that_does_not_add_up_is_a_mistake_of_ours(tmp_path):
    writer = Writer(tmp_path, "made")
    tokenizer = Tokenizer.train(["a ball"] * 9, 270)
    writer.start(tokenizer, ImageFormat(8))
    part = writer.split("train")
    for tokens, loss_mask, images in (
        ([tokenizer.image, 5], [0, 1], ()),  # an image that is not shown
        ([5, 6], [0, 1, 1], ()),
        ([5, 6], [1, 0], ()),  # nothing to learn: the first token is no target
    ):
        with pytest.raises(ValueError, match="a sample of"):
            part.sample(tokens, loss_mask, images)


def test_large_vocabularies_take_32_bits(tmp_path):
    assert data.bin_shape("tokens", {"vocab_size": 65_536, "images": {"size": 8}})[0] == "uint16"
    assert data.bin_shape("tokens", {"vocab_size": 65_537, "images": {"size": 8}})[0] == "uint32"


# ---- what is missing, stale or half done


def test_missing_data_says_which_command_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"no .*meta.json: run `python data.py toy") as error:
        Data(tmp_path / "toy")
    assert one_line(error)


def test_a_folder_of_the_first_edition_is_refused_with_its_command(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"format": 1, "source": "toy"}))
    with pytest.raises(UserError, match="format 1, .*remake it with `python data.py toy --name"):
        Data(tmp_path)


def test_a_bin_of_more_numbers_than_there_are_is_refused(world):
    path = world / "data/tiny/train_text.bin"
    with pytest.raises(UserError, match="want 2,361,183,241,434,822,606,848: remake it"):
        open_bin(path, "uint16", (2**70,), "remake it")


def test_a_bin_of_another_size_is_refused(world, tmp_path):
    shutil.copytree(world / "data/tiny", tmp_path / "d")
    (tmp_path / "d/train_text.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="5 bytes, want"):
        Data(tmp_path / "d").open("train", "text")


def test_a_killed_preparation_is_no_corpus(world, tmp_path, monkeypatch):
    """Killed while it makes the folder anew: neither the old nor half of the new is read."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "data/tiny", tmp_path / "data/tiny")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.SplitWriter, "text", killed)
        command.main(["toy", "--name=tiny", *TINY, "--seed=2", "--vocab_size=290"])
    with pytest.raises(UserError, match="is half prepared: run"):
        (tmp_path / "data/tiny/train_text.partial").write_bytes(b"")
        Data("data/tiny")
    command.main(["toy", "--name=tiny", *TINY])
    ours, theirs = Data("data/tiny").meta, Data(world / "data/tiny").meta
    assert ours == theirs and not list((tmp_path / "data/tiny").glob("*.partial"))


def test_a_tokenizer_that_is_not_the_bins_own_is_refused(world, tmp_path):
    shutil.copytree(world / "data/tiny", tmp_path / "d")
    path = tmp_path / "d/tokenizer.tiktoken"
    path.write_text("".join(path.read_text().splitlines(True)[:-1]))
    with pytest.raises(UserError, match="its tokenizer is not the one"):
        Data(tmp_path / "d")


def test_preparing_holds_no_bin_in_memory(tmp_path):
    writer = Writer(tmp_path, "made")
    writer.start(Tokenizer.train(["a ball"] * 9, 270), ImageFormat(64))
    frame = np.zeros((64, 64, 3), np.uint8)  # 12 KB; 3,000 of them are 37 MB
    tracemalloc.start()
    part = writer.split("train")
    for i in range(3000):
        part.image(frame + i % 7, i)
    writer.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "train_frames.bin").stat().st_size == 3000 * 64 * 64 * 3
    assert peak < 8e6


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["nothing"],
            "nothing: no such source; python data.py babyview | llava | pairs | saycam | toy",
        ),
        (["toy", "--name=../x"], "want a plain name"),
        (["toy", "--name=.."], "want a plain name"),
        (["toy", "--scenes=0"], "scenes 0 is not allowed: 1 to"),
        (["toy", "--vocab_size=5"], "vocab_size 5 is not allowed: 260 to"),
        (["toy", "--sprites=none"], "0 transparent PNGs"),
        ([], "give a source"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as error:
        command.main(argv)
    assert one_line(error) and not list(tmp_path.rglob("*.bin"))


def test_clip_numbers_may_not_fall(tmp_path):
    writer = Writer(tmp_path, "made")
    writer.start(Tokenizer.train(["a ball"] * 9, 270), ImageFormat(8))
    part = writer.split("train")
    part.image(np.zeros((8, 8, 3), np.uint8), 3)
    with pytest.raises(ValueError, match="their numbers must rise"):
        part.image(np.zeros((8, 8, 3), np.uint8), 2)


def test_a_folder_of_another_source_is_left_alone(tmp_path):
    make_corpus(tmp_path / "x", {"train": [("a ball .", 1)], "val": [("a bear .", 1)]})
    (tmp_path / "x" / "eval").mkdir()
    writer = Writer(tmp_path / "x", "another")
    with pytest.raises(UserError, match="was made by `data.py made`") as error:
        writer.start(Tokenizer.train(["a ball"] * 9, 270), ImageFormat(8))
    assert one_line(error)
    assert Data(tmp_path / "x").count("train", "samples") == 1
    make_corpus(tmp_path / "x", {"train": [("a ball .", 1)], "val": [("a bear .", 1)]})
    assert (tmp_path / "x" / "eval").exists()  # what a user put there stays


def test_an_image_is_neither_learnt_nor_last(tmp_path):
    writer = Writer(tmp_path / "x", "made")
    tokenizer = Tokenizer.train(["a ball"] * 9, 270)
    writer.start(tokenizer, ImageFormat(8))
    part, image = writer.split("train"), tokenizer.image
    number = part.image(np.zeros((8, 8, 3), np.uint8), 0)
    for tokens, loss_mask in (([5, 6, image], [0, 1, 0]), ([5, image, 6], [0, 1, 1])):
        with pytest.raises(ValueError, match="a sample of 3 tokens"):
            part.sample(tokens, loss_mask, [number])
    part.sample([image, 5, 6], [0, 1, 1], [number])
