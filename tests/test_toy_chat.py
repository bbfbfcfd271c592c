"""The toy world's conversations: true to their pictures, and held-out pairs held out."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from data import Data
from sources import command, toy, toy_chat
from sources.toy import THINGS, Scene, Thing
from sources.toy_chat import QUESTIONS, View

FLAGS = ["--talks=60", "--lines=300", "--questions=4", "--vocab_size=300"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    import os

    folder, before = tmp_path_factory.mktemp("chat"), os.getcwd()
    os.chdir(folder)
    command.main(["toy_chat", *FLAGS])
    command.main(["toy_chat", "--name=tiles", *FLAGS, "--canvases", "128x64", "64x128"])
    os.chdir(before)
    return folder / "data"


def conversations(folder, split):
    dataset = Data(folder)
    tokens = dataset.open(split, "tokens")
    for first, length, _, _ in dataset.open(split, "samples").astype(int).tolist():
        yield dataset.tokenizer.decode(tokens[first : first + length])


ONE = View(Scene(0, (Thing("ball", "red"),)))
TWO = View(Scene(0, (Thing("ball", "red"), Thing("cup", "blue")), "on"))
LARGE = View(Scene(0, (Thing("ball", "red"),)), Thing("star", "green"))


def asked(kind, view, times=40):
    rng = np.random.RandomState(0)
    return {QUESTIONS[kind](view, rng)[:2] for _ in range(times)}


def test_every_answer_is_true():
    """Counted by hand for three views."""
    assert asked("what", ONE) == {
        ("what is this ?", "a ball ."),
        ("what do you see ?", "a red ball ."),
        ("tell me what this is .", "a red ball ."),
    }
    assert asked("everything", TWO) == {("what do you see ?", "a red ball and a blue cup .")}
    assert asked("count", TWO) == {("how many things are there ?", "two .")}
    assert asked("where", TWO) == {("where is the ball ?", "on the cup .")}
    assert asked("little", LARGE) == {("what is the little thing ?", "a star .")}
    assert ("what colour is the cup ?", "blue .") in asked("colour", TWO)
    for question, answer in asked("there_is", TWO, 200):
        is_there = any(f" {kind} " in question for kind in ("ball", "cup"))
        assert answer.startswith("yes , a " if is_there else "no , there is a red ball and a blue")
    for question, answer in asked("is_it", ONE, 200):
        assert answer == ("yes ." if "red" in question else "no , it is red .")
    for question, answer in asked("false_premise", ONE, 200):
        kind = re.search(r"is the (\w+) \?", question)[1]
        assert kind != "ball" and answer == f"there is no {kind} , there is a red ball ."
    for kind, view in [("where", ONE), ("little", ONE), ("what", TWO), ("everything", ONE)]:
        assert QUESTIONS[kind](view, np.random.RandomState(0)) is None
    views = [ONE, View(Scene(0, (Thing("cup", "blue"),)))]
    for question, answer, others in [
        toy_chat.which(views, np.random.RandomState(i)) for i in range(9)
    ]:
        assert (answer == "the first .") == ("ball" in question) and others != [answer]


def test_held_out_pairs_are_in_no_word_of_training(made):
    pairs = [
        f"{colour} {kind}"
        for kind in THINGS
        for colour in toy.COLOURS
        if toy.held_out(Thing(kind, colour))
    ]
    assert len(pairs) == 16
    written = " ".join([*conversations(made / "toy_chat", "chat_train")])
    written += " ".join(conversations(made / "toy_chat", "train"))
    assert not [pair for pair in pairs if pair in written]
    for colour, kind in re.findall(r"is the (\w+) (\w+) \?", " ".join(toy.COLOURS)):
        assert not toy.held_out(Thing(kind, colour))
    asked_for = (made / "toy_chat/eval/choice.json").read_text()
    assert any(pair in asked_for for pair in pairs)


def test_conversations_have_three_turns_or_more(made):
    dataset = Data(made / "toy_chat")
    samples, tokens = (dataset.open("chat_train", kind) for kind in ("samples", "tokens"))
    spans = [(first, first + length) for first, length, _, _ in samples.astype(int).tolist()]
    turns = [(tokens[a:b] == dataset.tokenizer.eos).sum() for a, b in spans]
    two_pictures = samples[:, 3] == 2
    assert min(n for n, two in zip(turns, two_pictures) if not two) >= 3 and two_pictures.any()


def test_questions_are_the_same_whatever_the_form_of_the_pictures(made):
    one, two = (
        json.loads((made / n / "eval/choice.json").read_text()) for n in ("toy_chat", "tiles")
    )
    assert one == two and len({item["subset"] for item in one}) == 12
    for item in one:
        assert len(set(item["choices"])) == len(item["choices"]) > item["answer"] >= 0
        for name in item["image"]:
            a, b = (Image.open(made / n / "eval/images" / name) for n in ("toy_chat", "tiles"))
            assert (np.array(a) == np.array(b)).all()
        if item["subset"] == "little":
            assert max(a.size) == 128
    where_the_answer_is = [item["answer"] for item in one]
    assert len(set(where_the_answer_is)) == 4  # not always the first


def test_the_same_seed_says_the_same(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command.main(["toy_chat", *FLAGS])
    assert Data("data/toy_chat").meta["corpus"] == Data(made / "toy_chat").meta["corpus"]


def test_a_little_thing_is_little_and_in_its_picture():
    rng = np.random.RandomState(0)
    for _ in range(20):
        view = toy_chat.random_view(rng, large=True)
        bare = View(view.scene, view.things[0])
        state = rng.get_state()
        with_it = np.asarray(toy_chat.film(view, rng), int)
        rng.set_state(state)
        other = np.asarray(toy_chat.film(bare, rng), int)
        changed = (abs(with_it - other).max(-1) > 0).nonzero()
        if len(changed[0]):
            assert np.ptp(changed[0]) < 40 and np.ptp(changed[1]) < 40
