"""
Scores: accuracies with intervals, ties, which names a text contains, and METEOR.
"""

import itertools
import math
import re

import numpy as np


def wilson(hits, n):
    """95 % interval of a proportion of n trials (Wilson 1927); hits may be fractional."""
    z, p = 1.959964, hits / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1)]
    return [round(min(max(end, 0.0), 1.0), 4) for end in ends]


class Result(dict):
    """{"score", "n", "chance", "ci95"} of a measure. hits: of each item, to compare two models on
    the same items."""

    hits = None


def accuracy(hits, chance):
    """The Result of a list of hits, each 0 to 1."""
    score, interval = round(float(np.mean(hits)), 4), wilson(float(np.sum(hits)), len(hits))
    result = Result(score=score, n=len(hits), chance=chance, ci95=interval)
    result.hits = [round(float(hit), 4) for hit in hits]
    return result


def paired_difference(before, after, samples=2000):
    """(mean of after - before, its 95 % interval) of two lists of hits on the same items: a
    bootstrap over items (Efron 1979), with a fixed seed."""
    differences = np.subtract(after, before)
    chosen = np.random.RandomState(0).randint(0, len(differences), (samples, len(differences)))
    low, high = np.percentile(differences[chosen].mean(1), [2.5, 97.5])
    return float(differences.mean()), (float(low), float(high))


def lowest(scores, right, ties):
    """1 if scores[right] is the lowest, else 0. If k scores are equally low, 1 / k; with ties
    "published" 1: that scorer puts the target first, where it wins every tie."""
    best = np.flatnonzero(scores == np.min(scores))
    if right not in best:
        return 0.0
    return 1.0 / len(best) if ties == "fair" else 1.0


def over_ties(scores, rule, ties):
    """rule(*scores), 0 or 1, averaged over all orders of tied scores. With ties "published" a tie
    breaks every inequality."""
    if ties == "published" or len(set(scores)) == len(scores):
        return float(rule(*scores))
    outcomes = []
    for breaker in itertools.permutations(range(len(scores))):
        order = sorted(range(len(scores)), key=lambda i: (scores[i], breaker[i]))
        outcomes.append(rule(*(order.index(i) for i in range(len(scores)))))
    return float(np.mean(outcomes))


def spaced(text):
    """The words of a text with a space before and after each, without punctuation."""
    return " " + " ".join(re.findall(r"[^\W_]+", text)) + " "


def names_in(text, names):
    """The names that occur in a text as whole words; of "ball" and "beach ball" only the longer."""
    found = {name for name in names if spaced(name) in spaced(text)}
    parts_of_longer = set()
    for name in found:
        if any(name != longer and spaced(name) in spaced(longer) for longer in found):
            parts_of_longer.add(name)
    return found - parts_of_longer


def meteor_exact(reference, said):
    """METEOR (Banerjee and Lavie 2005) with exact matches only, nltk's parameters: 0.9, 3, 0.5.

    nltk's greedy alignment matches the last occurrences first. reference, said: lists of words."""
    left, matches = list(enumerate(reference)), []
    for i in range(len(said) - 1, -1, -1):
        for k in range(len(left) - 1, -1, -1):
            if left[k][1] == said[i]:
                matches.append((i, left.pop(k)[0]))
                break
    if not matches:
        return 0.0
    matches.sort()
    precision, recall = len(matches) / len(said), len(matches) / len(reference)
    chunks = 1
    for (i, k), (next_i, next_k) in itertools.pairwise(matches):
        chunks += (next_i, next_k) != (i + 1, k + 1)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def choose_meteor():
    """("meteor", nltk's with stems and WordNet) if nltk and its data are installed, else
    ("meteor_exact", ours). Two names, because the numbers are not comparable."""
    try:
        from nltk.translate.meteor_score import single_meteor_score

        single_meteor_score(["a"], ["b"])  # unequal words need WordNet, which may be missing
        return "meteor", single_meteor_score
    except (ImportError, LookupError):
        return "meteor_exact", meteor_exact
