"""Exercises of chapter 9: research."""

import itertools
import math

import numpy as np
from exercise import call, check, exercise, same

from tasks.scores import wilson


@exercise("9.1", "easy")
def over_seeds(scores):
    """A score with its uncertainty over seeds: the mean, and half the width of its 95 % interval by
    Student's t, which is t * s / sqrt(n). s is the standard deviation with n - 1.

    scores: list of n >= 2 floats, n at most 5; t for n = 2, 3, 4, 5: 12.706, 4.303, 3.182, 2.776.
    Returns (mean, half width), floats."""


@check(over_seeds)
def check_over_seeds(yours):
    for scores in ([0.5, 0.7], [0.91, 0.94, 0.98], [1.0] * 4, [0.1, 0.2, 0.4, 0.8, 0.9]):
        n = len(scores)
        mean = math.fsum(scores) / n
        deviation = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (n - 1))
        t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[n]
        found = tuple(map(float, call(yours, scores)))
        hint = "n - 1 in the deviation, sqrt(n) in the width; three seeds have t = 4.303."
        same(found, (mean, t * deviation / math.sqrt(n)), {"scores": scores}, hint)


@exercise("9.2", "medium")
def permutation_test(before, after):
    """Could the difference of two settings be luck? If the settings were equally good, the two
    scores of a seed could be exchanged. There are 2^n ways to exchange the scores of some seeds
    (none and all of them included). In what share of these ways is the absolute mean difference at
    least as large as the one measured?

    before, after: lists of n <= 10 floats, the two scores of each seed. Returns the share, a float
    from 0 to 1. Differences that agree within 1e-12 count as equal."""


@check(permutation_test)
def check_permutation_test(yours):
    for before, after in (
        ([0.5, 0.6, 0.7], [0.6, 0.7, 0.8]),
        ([0.5, 0.6, 0.7, 0.5], [0.6, 0.5, 0.9, 0.5]),
        ([0.1], [0.9]),
        ([0.3, 0.3], [0.3, 0.3]),
    ):
        differences = [b - a for a, b in zip(before, after)]
        seen, count = abs(sum(differences)), 0
        for signs in itertools.product((1, -1), repeat=len(differences)):
            count += abs(sum(s * d for s, d in zip(signs, differences))) >= seen - 1e-12
        hint = "An exchanged pair changes the sign of its difference; nothing exchanged counts too."
        given = {"before": before, "after": after}
        same(call(yours, before, after), count / 2 ** len(before), given, hint)


@exercise("9.3", "medium")
def age_of_learning(hits, n, ages, chance):
    """When is a word learnt? A model knows a word if the whole 95 % interval of its accuracy
    (tasks.scores.wilson) lies above chance. The word is learnt at the first age from which on the
    model knows it, at this age and at all later ages.

    hits: list, the right answers of n trials at each age; ages: list of floats, ascending, the
    share of the data seen (or days, or months); chance: a float. Returns the age, or None if the
    word is never learnt."""


@check(age_of_learning)
def check_age_of_learning(yours):
    ages = [0.125, 0.25, 0.5, 1.0]
    for hits in (
        [3, 12, 15, 18],
        [18, 4, 16, 17],
        [5, 5, 5, 5],
        [18, 18, 18, 18],
        [8, 9, 15, 18],
        [2, 2, 2, 15],
    ):
        known = [wilson(h, 20)[0] > 0.25 for h in hits]
        wanted = None
        for i in range(len(ages)):
            if all(known[i:]):
                wanted = ages[i]
                break
        given = {"hits": hits, "n": 20, "ages": ages, "chance": 0.25}
        found = call(yours, hits, 20, ages, 0.25, may_be_none=True)
        found = found if found is None else float(found)
        same(found, wanted, given, "A word that the model loses again is not learnt yet.")


@exercise("9.4", "medium")
def blind_control(seen, blind):
    """Does a test need the picture? Compare the answers with the right pictures and with random
    pictures, item by item.

    seen, blind: (n,) numpy arrays of hits, 0.0 to 1.0, with the right and with random pictures. An
    answer is right if its hit is above 0.5: here a tie counts as wrong. Returns (share of items
    that are right only with the right picture, share that are right only with a random one, their
    difference), floats."""


@check(blind_control)
def check_blind_control(yours):
    random = np.random.RandomState(0)
    for n in (1, 10, 57):
        seen, blind = random.choice([0.0, 0.5, 1.0], (2, n))
        a = sum(s > 0.5 and not b > 0.5 for s, b in zip(seen, blind)) / n
        b = sum(t > 0.5 and not s > 0.5 for s, t in zip(seen, blind)) / n
        found = tuple(map(float, call(yours, seen, blind)))
        given = {"seen": seen.tolist(), "blind": blind.tolist()}
        same(found, (a, b, a - b), given, "A hit of 0.5 is a tie of two: not right.")
