"""Exercises of chapter 5: asking fairly."""

import itertools

import torch
from exercise import call, check, exercise, same

from tasks.scores import wilson


@exercise("5.1", "easy")
def score(logits, tokens, first):
    """The score of a phrase after a prompt: the mean over the phrase's tokens of -ln p.

    logits: (T, V), position t predicts token t + 1; tokens: (T,) int, the prompt, then the phrase
    from position `first` on (first >= 1). Returns a scalar tensor; the lower, the more likely."""


@check(score)
def check_score(yours):
    torch.manual_seed(0)
    for T, first, scale in ((5, 3, 1.0), (4, 1, 1.0), (6, 5, 1.0), (6, 2, 1e4)):
        logits, tokens = scale * torch.randn(T, 7), torch.randint(7, (T,))
        log_p = logits.double().log_softmax(-1)
        terms = [-log_p[t - 1, tokens[t]] for t in range(first, T)]
        hint = "Which position predicts a token? The mean is over the phrase alone."
        given = {"tokens": tokens.tolist(), "first": first, "largest logit": scale}
        same(
            torch.as_tensor(call(yours, logits, tokens, first)),
            sum(terms) / len(terms),
            given,
            hint,
        )


@exercise("5.2", "easy")
def hit(scores, right):
    """Whether the model chose the right answer, with ties counted fairly. 1.0 if the right answer
    alone has the lowest score; 0.0 if another answer has a lower score; 1/n if the right answer is
    one of n that share the lowest score. So a model that scores all answers alike gets chance.

    scores: list of floats; right: the index of the right answer. Returns a float."""


@check(hit)
def check_hit(yours):
    for scores in itertools.product((1.0, 1.0001, 3.0), repeat=3):
        for right in range(3):
            best = [i for i, s in enumerate(scores) if s == min(scores)]
            wanted = float(right in best) / len(best)
            given = {"scores": list(scores), "right": right}
            same(call(yours, list(scores), right), wanted, given, "How many have the lowest score?")


@exercise("5.3", "medium")
def wilson_interval(hits, n):
    """The 95 % interval of an accuracy p = hits / n (Wilson 1927), with z = 1.96:

        (p + z^2 / (2 n)  -+  z sqrt(p (1 - p) / n + z^2 / (4 n^2))) / (1 + z^2 / n)

    low has the minus, high the plus. Returns (low, high), floats from 0 to 1."""


@check(wilson_interval)
def check_wilson_interval(yours):
    for hits, n in ((0, 10), (10, 10), (3, 7), (95, 100), (1, 1), (250, 1000)):
        found = tuple(map(float, call(yours, hits, n)))
        given = {"hits": hits, "n": n}
        same(
            found,
            wilson(hits, n),
            given,
            "Is everything divided by 1 + z^2 / n? Compare with the formula, term by term.",
            1e-3,
        )


@exercise("5.4", "medium")
def winoground_group(nll):
    """Winoground's group score (Thrush et al. 2022). An item is right if each picture prefers its
    own phrase and each phrase prefers its own picture, which are four comparisons. To prefer is to
    have the lower loss. This is the published rule, where equal losses are no preference; eval.py
    averages over the orders of equal losses instead.

    nll: (n, 2, 2) tensor, nll[:, p, t] is the loss of phrase t with picture p. Phrase 0 belongs to
    picture 0, phrase 1 to picture 1. Returns the share of right items, a float."""


@check(winoground_group)
def check_winoground_group(yours):
    hint = "Four comparisons: phrases for each picture, pictures for each phrase. Equal fails."
    torch.manual_seed(0)
    ordered = torch.tensor(
        [[[a, b], [c, d]] for a, b, c, d in itertools.permutations((1.0, 2, 3, 4))]
    )
    same(call(yours, ordered), 1 / 6, "all 24 orders of four different scores, once each", hint)
    for item, wanted in (
        ([[1.0, 2.0], [2.0, 1.0]], 1.0),
        ([[1.0, 1.0], [2.0, 1.0]], 0.0),
        ([[1.0, 1.0], [2.0, 0.5]], 0.0),
        ([[1.0, 5.0], [0.5, 0.4]], 0.0),
        ([[2.0, 3.0], [9.0, 2.5]], 1.0),
        ([[1.0, 2.0], [1.0, 0.5]], 0.0),
    ):
        same(call(yours, torch.tensor([item])), wanted, {"nll": item}, hint)


@exercise("5.5", "hard")
def bootstrap_difference(before, after, samples, seed):
    """Is one model better than another on the same items? The bootstrap (Efron 1979) draws n of the
    n items with replacement, many times. An item that is drawn brings the answers of both models.
    The differences of accuracy in these samples give a 95 % interval.

    before, after: (n,) numpy arrays of 0.0 to 1.0, the hits of the two models on the same n items;
    samples: the number of samples; draw all items at once by
    numpy.random.RandomState(seed).randint(0, n, (samples, n)).
    Returns (difference, low, high), floats: the mean of after - before over the n items, and the
    2.5th and 97.5th percentile of the samples' differences (numpy.percentile)."""


@check(bootstrap_difference)
def check_bootstrap_difference(yours):
    import numpy as np

    random = np.random.RandomState(1)
    for n, better in ((40, 0.0), (200, 0.2), (10, -0.5)):
        before = (random.rand(n) < 0.5).astype(float)
        after = np.clip(before + (random.rand(n) < abs(better)) * np.sign(better), 0, 1)
        drawn = []
        for row in np.random.RandomState(7).randint(0, n, (300, n)):
            drawn.append(np.mean([after[i] - before[i] for i in row]))
        wanted = (float((after - before).mean()), *map(float, np.percentile(drawn, (2.5, 97.5))))
        found = tuple(map(float, call(yours, before, after, 300, 7)))
        hint = "Draw items once, for both models. Percentiles are 2.5 and 97.5 of 100."
        same(found, wanted, f"n = {n}, after - before = {wanted[0]:.3g}", hint, 1e-9)
