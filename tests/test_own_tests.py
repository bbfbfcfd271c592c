"""Tests made from held-out recordings: what is asked, and what a model that knows or does not know
scores."""

import csv

import numpy as np
import pytest
from conftest import make_corpus

from config import UserError
from sources import hold_out_films, own_tests
from tasks import recordings


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus of pairs, whose held-out part has eight utterances, and its tests."""
    import data

    words = [f"look , a {name} !" for name in ("ball", "bear", "cat", "dog", "cup", "hat", "car")]
    made = []

    def finish(writer, original=data.Writer.finish):
        own_tests.write_tests(writer)
        made.append(original(writer))
        return made[-1]

    monkeypatch.setattr(data.Writer, "finish", finish)
    samples = [(text, 1) for text in [*words, words[0]]]
    make_corpus(tmp_path / "made", {"train": samples * 3, "val": samples})
    return tmp_path / "made"


def test_each_utterance_is_asked_about_once_and_its_foils_differ(corpus):
    pictures = rows_of(corpus / "eval" / "which_picture.csv")
    texts = rows_of(corpus / "eval" / "which_utterance.csv")
    assert len(pictures) == len(texts) == 8  # "ball" twice, in two clips
    for picture, text in zip(pictures, texts):
        shown = [picture[name] for name in recordings.PICTURES]
        said = [text[name] for name in recordings.TEXTS]
        assert len(set(shown)) == len(set(said)) == 4
        assert picture["text"] == said[0] and text["image"] == shown[0]
        assert all((corpus / "eval" / "images" / name).exists() for name in shown)


def test_the_pictures_are_the_frames_that_the_model_is_validated_on(corpus):
    from PIL import Image

    from data import Data

    frames = Data(corpus).open("val", "frames")
    names = [row["image"] for row in rows_of(corpus / "eval" / "caption.csv")]
    for number, name in enumerate(names):
        picture = np.asarray(Image.open(corpus / "eval" / "images" / name))
        assert (picture == frames[number]).all()


def test_too_few_different_utterances_make_no_tests_and_say_so(tmp_path, monkeypatch, capsys):
    import data

    monkeypatch.setattr(data.Writer, "finish", lambda writer: own_tests.write_tests(writer))
    make_corpus(tmp_path / "made", {"train": [("a ball .", 1)] * 9, "val": [("a ball .", 1)] * 9})
    assert "no tests" in capsys.readouterr().out
    assert not (tmp_path / "made" / "eval" / "which_picture.csv").exists()


class Oracle:
    """A subject whose NLL is low for the right picture; blinded it knows only how common words
    are."""

    def __init__(self, right, sees=True):
        self.right, self.sees = right, sees

    def nll(self, images, texts):
        if self.sees:
            return np.array([0.0 if self.right.get(i) == t else 1.0 for i, t in zip(images, texts)])
        return np.array([float(len(text)) for text in texts])

    def blinded(self):
        return Oracle(self.right, sees=False)


def test_who_knows_scores_one_and_who_is_blind_scores_chance(corpus):
    pictures = rows_of(corpus / "eval" / "which_picture.csv")
    texts = rows_of(corpus / "eval" / "which_utterance.csv")
    oracle = Oracle({row["image"]: row["text1"] for row in texts})
    found = recordings.which_picture(pictures, oracle, "fair")
    assert found["accuracy"]["score"] == 1.0
    assert found["cannot_see"]["score"] == 0.25  # four equal scores: a quarter each
    found = recordings.which_utterance(texts, oracle, "fair")
    assert found["accuracy"]["score"] == 1.0 and found["cannot_see"]["score"] < 1.0
    assert found["accuracy"]["chance"] == found["cannot_see"]["chance"] == 0.25


# ---------------------------------------------------------------------------------------------
# Holding out


def films_of(count, each=20):
    return [(f"film{film}", number) for film in range(count) for number in range(each)]


@pytest.mark.parametrize(
    "count, held", [(1, 0), (4, 0), (5, 1), (9, 1), (10, 1), (30, 3), (200, 20)]
)
def test_of_five_films_or_more_whole_ones_are_held_out(capsys, count, held):
    parts = hold_out_films(films_of(count), lambda item: item[0])
    train, val = ({film for film, _ in parts[name]} for name in ("train", "val"))
    if held:
        assert (
            not train & val
            and len(val) == held
            and f"{held} of {count} films" in (capsys.readouterr().out)
        )
    else:
        assert val <= train and parts["val"]


def test_films_may_be_named(capsys):
    items = films_of(3)
    parts = hold_out_films(items, lambda item: item[0], ("film1",))
    assert {film for film, _ in parts["val"]} == {"film1"} and len(parts["train"]) == 40
    with pytest.raises(UserError, match="no such film"):
        hold_out_films(items, lambda item: item[0], ("film7",))
    with pytest.raises(UserError, match="nothing is left"):
        hold_out_films(items, lambda item: item[0], ("film0", "film1", "film2"))


def test_frames_say_their_film():
    from sources.saycam import film_of_frame

    assert film_of_frame("S_20130531_0601_01_012_03.jpg") == "S_20130531_0601_01"
    assert film_of_frame("frames/GX01/GX01_17.jpg") == "GX01"
    assert film_of_frame("photo.jpg") is None and film_of_frame("a/photo.jpg") is None


def test_a_few_films_hold_out_stretches_whose_items_share_no_picture(capsys):
    """Utterances over one picture stay in one part: neither is the other's test."""
    items = [(number // 3, "film") for number in range(300)]  # three over each picture
    parts = hold_out_films(items, lambda item: item[1], key=lambda item: item[0])
    pictures = {name: {picture for picture, _ in part} for name, part in parts.items()}
    assert parts["val"] and not pictures["train"] & pictures["val"]


def test_a_users_own_test_is_not_replaced(tmp_path):
    path = tmp_path / "caption.csv"
    assert own_tests.is_ours(path)
    path.write_text("image,text\nS_1.jpg,a ball .\n")
    assert not own_tests.is_ours(path)
    path.write_text("image,text\nheld_out_1.png,a ball .\n")
    assert own_tests.is_ours(path)
