"""Exercises of chapter 1: words from bytes, and a GPT."""

import itertools

import torch
import torch.nn.functional as F
from exercise import call, check, exercise, same

from kernels import attention_weights


@exercise("1.1", "easy")
def count_pairs(words):
    """The first half of a step of BPE (Sennrich et al. 2016, arXiv 1508.07909): count which two
    tokens stand side by side.

    words: {tuple of token ids: how often this word occurs}: {(1, 2, 2): 5}.
    Returns {(left id, right id): how often}, pairs that overlap counted too: (2, 2, 2) has (2, 2)
    twice."""


@check(count_pairs)
def check_count_pairs(yours):
    for words, wanted in (
        ({}, {}),
        ({(1,): 3}, {}),
        ({(1, 2, 2): 5}, {(1, 2): 5, (2, 2): 5}),
        ({(2, 2, 2): 2}, {(2, 2): 4}),
        ({(1, 2): 3, (2, 1, 2): 4}, {(1, 2): 7, (2, 1): 4}),
    ):
        hint = "Each word counts as often as it occurs; pairs do not cross the ends of words."
        same(call(yours, words), wanted, {"words": words}, hint)


@exercise("1.2", "easy")
def merge(word, pair, new):
    """The second half of a step of BPE: a pair becomes one token.

    word: tuple of token ids; pair: two of them; new: the id of the new token.
    Returns the word with each occurrence of the pair replaced, from left to right: (2, 2, 2) with
    the pair (2, 2) and the new token 9 is (9, 2)."""


@check(merge)
def check_merge(yours):
    for word, wanted in (
        ((2, 2, 2), (9, 2)),
        ((1, 2, 3), (1, 2, 3)),
        ((2, 2), (9,)),
        ((1, 2, 2, 3, 2, 2), (1, 9, 3, 9)),
        ((2,), (2,)),
        ((), ()),
        ((2, 2, 2, 2), (9, 9)),
    ):
        given = {"word": word, "pair": (2, 2), "new": 9}
        same(tuple(call(yours, word, (2, 2), 9)), wanted, given, "After a merge, skip two tokens.")
    for word, wanted in (((1, 2, 1), (5, 1)), ((2, 1, 2), (2, 5))):
        given = {"word": word, "pair": (1, 2), "new": 5}
        same(tuple(call(yours, word, (1, 2), 5)), wanted, given, "The order matters.")


@exercise("1.3", "medium")
def train_bpe(counts, merges):
    """BPE from beginning to end: `merges` times, the most frequent pair becomes a token. Of equally
    frequent pairs take the one with the smaller left id, then with the smaller right id.

    counts: {word as bytes: how often}: {b"ball": 12}. Tokens 0 to 255 are the bytes; the first new
    token is 256. Stop early when no pair occurs twice.
    Returns the list of merged pairs of ids, in order. If you use your functions of 1.1 and 1.2,
    copy them into this file."""


@check(train_bpe)
def check_train_bpe(yours):
    text = "the ball . a red ball . look , the red ball ! is it a bell ? the bell rings ."
    words = text.split()
    for counts, merges in (
        ({b"aaa": 1}, 5),
        ({b"ab": 2, b"cd": 2}, 1),
        ({word.encode(): words.count(word) for word in words}, 12),
        ({}, 3),
    ):
        found = [tuple(pair) for pair in call(yours, counts, merges)]
        hint = "Ties: compare (left id, right id). Count again after each merge."
        same(found, train_bpe_by_hand(counts, merges), {"counts": counts, "merges": merges}, hint)


def train_bpe_by_hand(counts, merges):
    """By counting everything again for each merge."""
    words, found = [([*word], n) for word, n in counts.items()], []
    for new in range(256, 256 + merges):
        seen = {}
        for word, n in words:
            for pair in itertools.pairwise(word):
                seen[pair] = seen.get(pair, 0) + n
        if max(seen.values(), default=0) < 2:
            break
        best = min(seen, key=lambda pair: (-seen[pair], pair))
        found.append(best)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
    return found


@exercise("1.4", "easy")
def bits_per_character(nll, characters):
    """A loss that does not depend on the tokenizer: how many bits a model needs for each character
    of a text.

    nll: (T,) tensor, -ln p of each token; characters: how many characters the text has.
    Returns bits per character, a float: the sum of -log2 p over the number of characters."""


@check(bits_per_character)
def check_bits_per_character(yours):
    hint = "One bit is ln 2 nats. Divide by characters, not by tokens."
    same(call(yours, torch.full((8,), 0.6931472), 8), 1.0, "8 tokens of 1 bit, 8 characters", hint)
    same(call(yours, torch.full((4,), 2.0794415), 24), 0.5, "4 tokens of 3 bits, 24", hint)
    same(call(yours, torch.tensor([0.0, 0.0]), 5), 0.0, "two certain tokens", hint)


@exercise("1.5", "easy")
def cross_entropy(logits, targets):
    """The loss of a language model: the mean of -ln p(target), where p is the softmax of the
    logits.

    logits: (K, V) float, may be as large as 1e4; targets: (K,) int, -100 where there is no target.
    Returns a scalar tensor; 0 if no position has a target."""


@check(cross_entropy)
def check_cross_entropy(yours):
    torch.manual_seed(0)
    for scale in (1.0, 1e4):
        logits, targets = scale * torch.randn(6, 5), torch.tensor([0, 4, -100, 2, 2, -100])
        wanted = F.cross_entropy(logits.double(), targets)
        hint = "Is -100 left out of the sum and of the count? Can an exponential overflow?"
        given = f"logits of a deviation of {scale:g}, targets {targets.tolist()}"
        same(torch.as_tensor(call(yours, logits, targets)), wanted, given, hint)
    none = call(yours, torch.randn(2, 3), torch.tensor([-100, -100]))
    same(torch.as_tensor(none), torch.tensor(0.0), "no target at all", "0 / 0 is no number.")


@exercise("1.6", "medium")
def causal_attention(q, k, v, prefix=0):
    """Attention (Vaswani et al. 2017, arXiv 1706.03762) with a causal mask: position i sees the
    positions 0 to i, and every position sees the first `prefix` ones
    (kernels.attention_reference).

        y_i = sum over j of softmax_j(q_i . k_j / sqrt(D)) v_j

    q, k, v: (T, D) float. Returns (T, D)."""


@check(causal_attention)
def check_causal_attention(yours):
    torch.manual_seed(0)
    for T, D, prefix in ((1, 4, 0), (5, 8, 0), (6, 4, 3), (4, 16, 4)):
        q, k, v = torch.randn(3, T, D)
        weights = attention_weights(*(x[None, :, None].double() for x in (q, k)), prefix)[0, 0]
        hint = "Is the softmax over keys? Is it scaled? prefix counts keys that every query sees."
        given = f"T = {T}, D = {D}, prefix = {prefix}"
        same(call(yours, q, k, v, prefix), weights @ v.double(), given, hint)


@exercise("1.7", "hard")
def rotate(x, base=10000.0):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), with the pairs of Llama: at position t
    the pair (a, b) = (x_i, x_(i + D/2)) is rotated by the angle w = t * base^(-2 i / D):

        a' = a cos w - b sin w,   b' = b cos w + a sin w

    x: (T, D) float, D even; row t is position t. Returns (T, D)."""


@check(rotate)
def check_rotate(yours):
    torch.manual_seed(0)
    for T, D, base in ((1, 4, 1e4), (5, 8, 1e4), (7, 6, 100.0)):
        x = torch.randn(T, D)
        angles = torch.arange(T)[:, None] * base ** (-2 * torch.arange(D // 2).double() / D)
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.exp(1j * angles)
        hint = "Pair i with i + D/2, not with i + 1. Each pair has its own angle. Check the signs."
        wanted = torch.cat([turned.real, turned.imag], -1)
        same(call(yours, x, base), wanted, f"T = {T}, D = {D}, base = {base:g}", hint, 1e-4)
