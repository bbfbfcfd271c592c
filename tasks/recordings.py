"""
Tests of recordings of one's own, which data.py makes from what it holds out (sources/own_tests.py).

    which_picture     under which of four pictures is the utterance likeliest?
    which_utterance   which of four utterances is likeliest over the picture?

Each has its blind control: the same model, which is shown the mean of all pictures instead. Blind,
it must guess a picture; it may do better with utterances, of which some are common. So the second
test tells something only above its control.
"""

import numpy as np

from tasks.scores import accuracy, lowest

PICTURES = ("image1", "image2", "image3", "image4")
TEXTS = ("text1", "text2", "text3", "text4")


def score(images, texts, subject, ties):
    """The accuracy of trials of four (picture, utterance), the first of each right."""
    table = subject.nll(images, texts).reshape(-1, 4)
    return accuracy([lowest(row, 0, ties) for row in table], 1 / 4)


def with_blind(images, texts, subject, ties):
    """{"accuracy", "cannot_see": its control}."""
    blind = subject.blinded()
    return {
        "accuracy": score(images, texts, subject, ties),
        "cannot_see": score(images, texts, blind, ties),
    }


def which_picture(rows, subject, ties):
    images = [row[column] for row in rows for column in PICTURES]
    return with_blind(images, list(np.repeat([row["text"] for row in rows], 4)), subject, ties)


def which_utterance(rows, subject, ties):
    texts = [row[column] for row in rows for column in TEXTS]
    return with_blind([row["image"] for row in rows for _ in range(4)], texts, subject, ties)
