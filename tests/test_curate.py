"""Sifting: gains against a slow loop, what is kept is kept whole, and nothing else changes."""

import json

import numpy as np
import pytest
import torch
from conftest import logits_after, one_line
from PIL import Image

import checkpoint
import data
from config import UserError
from data import Data
from sources import command, filtering

FLAGS = ["--csv=pairs.csv", "--images=.", "--size=16", "--vocab_size=300"]


@pytest.fixture
def folder(tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["image,caption"]
    for i in range(30):
        noise = np.random.RandomState(i).randint(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        lines += [f"{i}.png,look a {'red blue green'.split()[i % 3]} ball !", f"{i}.png,a cup ."]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    return tmp_path


def samples_of(name, split="train"):
    dataset = Data(f"data/{name}")
    tokens, shown = dataset.open(split, "tokens"), dataset.open(split, "image_ids")
    frames, images = dataset.open(split, "frames"), dataset.open(split, "images")
    found = []
    for first, length, begin, count in dataset.open(split, "samples").astype(int).tolist():
        own = [frames[images[k][0]].tobytes() for k in shown[begin : begin + count]]
        found.append((tuple(tokens[first : first + length].tolist()), *own))
    return found


def test_gains_by_a_slow_loop(recipe):
    loaded = checkpoint.load(recipe / "phase2.pt")
    rng = np.random.RandomState(0)
    width = loaded.model.gpt.config.n_embd
    clips = [[torch.tensor(rng.randn(4, width), dtype=torch.float32)] for _ in range(6)]
    words = [loaded.tokenizer.encode(text) for text in ("a ball", "a cup .", "no", "b", "c", "d")]
    found = filtering.gains(loaded, clips, words, 3, np.random.RandomState(5))

    def loss(i, k):
        """The mean NLL of words i after clip k, one token at a time."""
        total, tokens = 0.0, []
        for token in words[i]:
            stream = torch.tensor([[loaded.tokenizer.image] * 4 + tokens])
            with torch.no_grad():
                logits = logits_after(loaded.model, stream, clips[k][0])
            total -= float(logits[0, -1].double().log_softmax(-1)[token])
            tokens.append(token)
        return total / len(words[i])

    draws = np.random.RandomState(5)
    others = [(np.arange(6) + draws.randint(1, 6, 6)) % 6 for _ in range(3)]
    for i in range(6):
        foreign = np.mean([loss(i, order[i]) for order in others])
        assert all(order[i] != i for order in others)
        assert found[i] == pytest.approx(foreign - loss(i, i), abs=1e-4)


def test_what_gains_too_little_is_left_out_and_the_rest_is_whole(folder, recipe):
    command.main(["pairs", "--name=all", *FLAGS])
    model = f"--filter={recipe / 'phase2.pt'}"
    command.main(["pairs", "--name=kept", *FLAGS, model, "--min_gain=0"])
    gains = json.load(open("data/kept/gains.json"))
    everything, kept = samples_of("all"), samples_of("kept")
    assert len(gains) == len(everything) and 0 < len(kept) < len(everything)
    assert kept == [s for s, gain in zip(everything, gains) if gain >= 0]
    assert samples_of("kept", "val") == samples_of("all", "val")
    command.main(["pairs", "--name=lax", *FLAGS, model, "--min_gain=-1e9"])
    assert samples_of("lax") == everything
    digest = torch.load(recipe / "phase2.pt", weights_only=True)["digest"]
    assert Data("data/kept").meta["filtered"] == {"by": digest, "min_gain": 0.0, "most": 0}


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--min_gain=1e9"], "nothing is left"),
        (["--filter=nothing.pt"], "nothing.pt"),
        (["--filter=PHASE0"], "cannot see"),
    ],
)
def test_what_cannot_be_sifted(folder, recipe, flags, why):
    flags = [flag.replace("PHASE0", str(recipe / "language.pt")) for flag in flags]
    with pytest.raises(UserError) as error:
        command.main(["pairs", *FLAGS, f"--filter={recipe / 'phase2.pt'}", *flags])
    assert one_line(error) and why in str(error.value)
    assert not (folder / "data/pairs/meta.json").exists()


def test_most_keeps_the_pairs_of_the_highest_gain(folder, recipe):
    """The published recipe wants a number of pairs, not a threshold."""
    model = f"--filter={recipe / 'phase2.pt'}"
    command.main(["pairs", "--name=all", *FLAGS])
    command.main(["pairs", "--name=best", *FLAGS, model, "--min_gain=-1e9", "--most=7"])
    gains = json.load(open("data/best/gains.json"))
    best = sorted(range(len(gains)), key=lambda i: -gains[i])[:7]
    assert samples_of("best") == [s for i, s in enumerate(samples_of("all")) if i in best]


def test_a_model_that_is_not_there_costs_no_data(folder):
    command.main(["pairs", *FLAGS])
    before = {path: path.read_bytes() for path in (folder / "data/pairs").iterdir()}
    with pytest.raises(UserError, match="typo.pt"):
        command.main(["pairs", *FLAGS, "--filter=typo.pt"])
    assert before == {path: path.read_bytes() for path in (folder / "data/pairs").iterdir()}


def test_clips_are_judged_as_one_and_moments_are_not(recipe, tmp_path):
    """A sample of several pictures and one text is judged; one whose turns alternate stays."""
    loaded = checkpoint.load(recipe / "phase2.pt")
    writer = data.Writer(tmp_path / "data", "toy")
    writer.start(loaded.tokenizer, loaded.image_format)
    part, image = writer.split("train"), loaded.tokenizer.image
    frames = np.random.RandomState(0).randint(0, 256, (8, 16, 16, 3), np.uint8)
    numbers = [part.image(frame, i) for i, frame in enumerate(frames)]
    part.sample([image, image, 9, 10], [0, 0, 1, 1], numbers[:2])
    part.sample([image, 9, 10], [0, 1, 1], numbers[2:3])
    part.sample([image, 9, image, 10], [0, 1, 0, 1], numbers[3:5])
    part.sample([image, 11, 10], [0, 1, 1], numbers[5:6])
    found = filtering.find_gains(part, loaded, 2, 0)
    assert np.isfinite(found).tolist() == [True, True, False, True]


def test_filtering_wants_a_model(folder):
    """Else --min_gain would leave all in, and say nothing."""
    for flag in ("--min_gain=0.1", "--others=2"):
        with pytest.raises(UserError, match="is for --filter FILE, which is missing") as error:
            command.main(["pairs", *FLAGS, "--name=idle", flag])
        assert one_line(error)
    assert not (folder / "data/idle").exists() or not (folder / "data/idle/meta.json").exists()
