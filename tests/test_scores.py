"""Scores, against formulas, enumerations and nltk."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from tasks import scores
from tasks.babyvlm import WINOGROUND
from tasks.scores import names_in


def test_the_interval_is_wilsons():
    assert scores.wilson(8, 10) == [0.4902, 0.9433]  # Brown, Cai and DasGupta 2001's formula
    low, high = scores.wilson(0, 20)
    assert low == 0 and 0.15 < high < 0.17
    assert all(
        0 <= end <= 1 for n in (1, 7, 3000) for hits in (0, n) for end in scores.wilson(hits, n)
    )


def test_the_lowest_wins_and_ties_are_shared():
    assert scores.lowest(np.array([3, 1, 2]), 1, "fair") == 1
    assert scores.lowest(np.array([3, 1, 2]), 0, "fair") == 0
    assert scores.lowest(np.array([1, 1, 2]), 1, "fair") == 0.5
    assert scores.lowest(np.array([1, 1, 1]), 2, "published") == 1


@pytest.mark.parametrize("measure", WINOGROUND)
def test_winogrounds_chances_over_every_order_and_every_tie(measure):
    """A rule's mean over all 24 orders is its chance, and so is what a constant model scores. With
    some values equal the score is the mean over the orders that could have been."""
    rule, chance = WINOGROUND[measure]
    orders = list(itertools.permutations(range(4)))
    assert np.mean([rule(*order) for order in orders]) == pytest.approx(chance)
    assert scores.over_ties([7, 7, 7, 7], rule, "fair") == pytest.approx(chance)
    assert scores.over_ties([7, 7, 7, 7], rule, "published") == 0
    for values in itertools.product(range(3), repeat=4):
        agreeing = [
            order
            for order in orders
            if all(order[i] < order[j] for i in range(4) for j in range(4) if values[i] < values[j])
        ]
        want = np.mean([rule(*order) for order in agreeing])
        assert scores.over_ties(list(values), rule, "fair") == pytest.approx(want)


def test_winogrounds_rules_are_the_papers_inequalities():
    for L00, L01, L10, L11 in itertools.permutations(range(4)):
        want = {
            "image": L00 < L10 and L11 < L01,
            "text": L00 < L01 and L11 < L10,
            "positive_context": L00 < L10 and L00 < L01,
            "negative_context": L11 < L01 and L11 < L10,
        }
        want["group"] = want["image"] and want["text"]
        for measure, value in want.items():
            assert WINOGROUND[measure][0](L00, L01, L10, L11) == value


def test_names_are_whole_words_and_the_longer_wins():
    names = {"ball", "beach ball", "cat"}
    assert scores.names_in("look , a ball !", names) == {"ball"}
    assert scores.names_in("a beach ball .", names) == {"beach ball"}
    assert scores.names_in("a cat and a ball", names) == {"ball", "cat"}
    assert scores.names_in("catch the football", names) == set()


def test_meteor_is_nltks_without_its_thesaurus():
    nltk = pytest.importorskip("nltk.translate.meteor_score")
    empty = SimpleNamespace(synsets=lambda word: [])
    plain = SimpleNamespace(stem=lambda word: word)
    rng = np.random.RandomState(0)
    for _ in range(300):
        a, b = ([str(w) for w in rng.randint(0, 6, rng.randint(1, 10))] for _ in range(2))
        theirs = nltk.single_meteor_score(a, b, stemmer=plain, wordnet=empty)
        assert scores.meteor_exact(a, b) == pytest.approx(theirs)
    assert scores.meteor_exact(["a"], []) == 0.0


def test_punctuation_may_touch_a_name():
    assert names_in("Look, a ball.", {"ball"}) == {"ball"}
    assert names_in("a t-shirt !", {"t-shirt", "shirt"}) == {"t-shirt"}
    assert names_in("a football", {"ball"}) == set()
