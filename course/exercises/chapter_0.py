"""Exercises of chapter 0: what a baby sees and hears."""

import numpy as np
from exercise import call, check, exercise, same


@exercise("0.1", "easy")
def count_words(lines):
    """How often each word is said.

    lines: utterances as data.py stores them, lower case, words and marks separated by spaces:
    ["a red cup .", "look , a cup !"]. A word is a piece between spaces that contains a letter:
    "it 's" has the words "it" and "'s", and "." is not a word.
    Returns {word: how often}."""


@check(count_words)
def check_count_words(yours):
    for lines, wanted in (
        ([], {}),
        (["a red ball ."], {"a": 1, "red": 1, "ball": 1}),
        (["look , a ball !", "it 's a ball ."], {"look": 1, "a": 2, "ball": 2, "it": 1, "'s": 1}),
        (["cat . cat .", "", "  cat  "], {"cat": 3}),
    ):
        same(call(yours, lines), wanted, {"lines": lines}, "Is a lonely '.' counted, or ''?")


@exercise("0.2", "easy")
def share_that_names(captions, things):
    """How often speech names what is in view. In SAYCam it often does not.

    captions: n sentences as in 0.1; things: n sets, the names of all things in view: {"ball"}.
    A caption names a thing if the name is one of its words; "football" does not name a ball.
    Returns the share of captions that name at least one thing of their own frame, 0 to 1; 0.0 if
    there are no captions."""


@check(share_that_names)
def check_share_that_names(yours):
    hint = "Split the caption into words; a name counts once, in its own caption alone."
    for captions, things, wanted in (
        (["a red ball .", "good job !"], [{"ball"}, {"cup"}], 0.5),
        (["look , a football !"], [{"ball"}], 0.0),
        (["ball and cup and ball .", "no .", "cup ."], [{"ball", "cup"}, {"cup"}, {"ball"}], 1 / 3),
        (["the ball"], [{"ball"}], 1.0),
        (["the ball"], [{"ball", "cup"}], 1.0),
        ([], [], 0.0),
    ):
        given = {"captions": captions, "things": things}
        same(call(yours, captions, things), wanted, given, hint)


@exercise("0.3", "medium")
def other_frames(clips):
    """Which frames can form a pair with each frame: the other frames of its clip, which are the
    frames filmed of one scene.

    clips: (F,) int array, the clip of each frame; frames of a clip need not be neighbours.
    Returns a list of F int arrays: for frame i the numbers of the other frames of its clip, in
    ascending order; empty if it is alone."""


@check(other_frames)
def check_other_frames(yours):
    random = np.random.RandomState(0)
    hint = "A frame is not its own partner. Compare clips, not positions."
    for clips in ([0, 0, 1, 1], [0, 1, 0, 2, 0], [7], random.randint(0, 5, 20).tolist()):
        clips = np.array(clips)
        wanted = []
        for i in range(len(clips)):
            wanted.append(
                np.array([j for j in range(len(clips)) if j != i and clips[j] == clips[i]])
            )
        found = call(yours, clips)
        same([np.asarray(row) for row in found], wanted, {"clips": clips.tolist()}, hint)


@exercise("0.4", "medium")
def leaks(training, held_out):
    """Which training sentences give away a held-out pair of colour and thing.

    training: sentences as in 0.1; held_out: a set of pairs (colour, thing): {("red", "star")}.
    A sentence leaks if it has the colour and, as the very next word, the thing. "a red cup and a
    star ." does not leak ("red", "star").
    Returns the numbers of the leaking sentences, in ascending order."""


@check(leaks)
def check_leaks(yours):
    pairs = {("red", "star"), ("blue", "ball")}
    for training, wanted in (
        (["a red star .", "a red ball .", "the blue ball"], [0, 2]),
        (["a red ball and a star .", "star red", "red , star"], []),
        (["a ball . a red red star", "a predred star", "red stars"], [0]),
        ([], []),
    ):
        hint = "Look at neighbouring words, and at whole words."
        same(list(call(yours, training, pairs)), wanted, {"training": training}, hint)
