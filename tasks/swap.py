"""
LongTail-Swap and Visual-Property Swap, of EgoBabyVLM: is a sentence likelier with its own word than
with the word of another sentence? It tests rare and frequent words.

    python eval.py --checkpoint out/ego/language.pt --swap DIR

DIR holds wordswap_pairs.txt, inflswap_pairs.txt, agrswap_pairs.txt and vp_swap_*_pairs.txt. Their
rows are fields between |: the frequency bin, the rule, and twice a word, a sentence and the
position of the word in it (wordswap has another sentence and position before each). The second
word is put into the first sentence and the first into the second, and each right sentence must be
likelier than what it becomes.

The scores follow the published code, quirks included: a table of bin x rule, rounded to 4 digits,
in which a cell without any hit counts as missing, and rules that the lowest bin lacks do not count;
means over rules, then over bins, rounded to 3 digits; a sentence's first token is not scored, but
an <eos> after it is.
"""

import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np

import inference
from common.files import read_lines
from config import UserError

FILES = {
    "wordswap": "wordswap_pairs.txt",
    "inflswap": "inflswap_pairs.txt",
    "agrswap": "agrswap_pairs.txt",
    "visual": "vp_swap_*_pairs.txt",
}
BINS = 11  # of words that occur 0, 1, 2-3, 4-7, ... times
RULES = ("VERB", "NOUN", "LONG", "SHORT", "VISUAL")  # those whose cells exist without a hit


def read_row(line, kind):
    """(bin, rule, [(word, sentence, position), the same of the other]) of a line; None if it does
    not parse or, in `visual`, a word is not in its sentence."""
    fields = line.rstrip().split("|")
    if kind == "wordswap" and len(fields) == 12:
        fields = [*fields[:3], *fields[5:8], *fields[10:]]
    if len(fields) != 8:
        return None
    try:
        number, at_first, at_second = int(fields[0]), int(fields[4]), int(fields[7])
    except ValueError:
        return None
    rule, first, one, second, two = fields[1], fields[2], fields[3], fields[5], fields[6]
    if kind == "visual" and not (first.strip() in one and second.strip() in two):
        return None
    if kind in ("wordswap", "visual"):
        rule = rule.split("_")[0]
    elif kind == "agrswap":
        is_short = "SHORT" in rule or "DET" in rule
        rule = "SHORT" if is_short else "LONG" if "LONG" in rule else rule
    return number, rule, [(first, one, at_first), (second, two, at_second)]


def swap(pair):
    """The two sentences with each other's word, first letters in upper case. Positions count
    characters; if a word is not at its character in either, they count words. Raises IndexError."""
    (first, one, at_first), (second, two, at_second) = pair
    is_at = lambda word, text, at: text[at : at + len(word)].lower() == word
    if is_at(first, one, at_first) and is_at(second, two, at_second):
        swapped = [
            one[:at_first] + second + one[at_first + len(first) :],
            two[:at_second] + first + two[at_second + len(second) :],
        ]
    else:
        words, others = one.split(" "), two.split(" ")
        words[at_first], others[at_second] = second, first
        swapped = [" ".join(words), " ".join(others)]
    return [text[0].upper() + text[1:] for text in swapped]


def score_sentences(loaded, sentences, batch):
    """{sentence: log-probability of its tokens from the second on, and of an <eos>}; 0 of a
    sentence of one token."""
    tokenizer, scores = loaded.tokenizer, {}
    tokens = {
        text: [*tokenizer.start, *tokenizer.encode(text)] for text in dict.fromkeys(sentences)
    }
    long = [text for text, own in tokens.items() if len(own) > 1]
    prompts = [tokens[text][:1] for text in long]
    rest = [[*tokens[text][1:], tokenizer.eos] for text in long]
    nll = inference.nll_after(loaded, prompts, None, rest, batch) if long else []
    for text, mean, own in zip(long, nll, rest):
        scores[text] = -float(mean) * len(own)
    return {text: scores.get(text, 0.0) for text in tokens}


def table_of(rows, hits):
    """(table (bins, rules) of accuracies with NaN for missing cells, bins, rules). rows: as
    read_row() gives them; hits: 0 to 2 for each."""
    found, tried = defaultdict(int), defaultdict(int)
    for (number, rule, _), own in zip(rows, hits):
        found[number, rule] += own
        tried[number, rule] += 2
    cells = {key: np.around(found[key] / tried[key], 4) for key in tried if found[key]}
    bins = sorted({number for number, rule in tried if found[number, rule] or rule in RULES})
    rules = sorted({rule for number, rule in cells if bins and number == bins[0]})
    table = [[cells.get((number, rule), np.nan) for rule in rules] for number in bins]
    return np.array(table, float).reshape(len(bins), len(rules)), bins, rules


def mean_of(table):
    """The mean over rules in each bin, then over bins, both rounded to 3 digits; NaN if no cell of
    the table counts, 0 if there is no table."""
    if not len(table):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a row without cells
        return float(np.around(np.nanmean(np.around(np.nanmean(table, axis=1), 3)), 3))


def run_kind(loaded, paths, kind, batch):
    """The result of a kind's files. Prints how many rows were skipped. Raises UserError."""
    lines = [line for path in paths for line in read_lines(path) if line.strip()]
    rows, sentences, skipped = [], [], 0
    for line in lines:
        row = read_row(line, kind)
        try:
            bad = swap(row[2]) if row else None
        except IndexError:  # a position outside its sentence
            bad = None
        if not bad:
            skipped += 1
            continue
        if not 0 <= row[0] < BINS:
            raise UserError(f"{paths[0]}: bin {row[0]}: want 0 to {BINS - 1}")
        rows.append(row)
        sentences.append([*(text for _, text, _ in row[2]), *bad])
    if skipped:
        print(
            f"{kind}: {skipped} of {len(lines)} rows skipped: they do not parse, or lack the word"
        )
    if not rows:
        raise UserError(f"{paths[0]}: none of its rows can be read")
    scores = score_sentences(loaded, [text for four in sentences for text in four], batch)
    hits = [
        (scores[good] > scores[bad]) + (scores[other] > scores[worse])
        for good, other, bad, worse in sentences
    ]
    table, _, _ = table_of(rows, hits)
    return {"score": mean_of(table), "n": 2 * len(rows), "chance": 0.5, "ci95": None}


def run_swap(directory, loaded, batch):
    """{"all": {kind: result}} of the files in a folder. Raises UserError."""
    results = {}
    for kind, pattern in FILES.items():
        paths = sorted(Path(directory).glob(pattern))
        if paths:
            results[kind] = run_kind(loaded, paths, kind, batch)
    if not results:
        raise UserError(f"{directory}: none of {', '.join(FILES.values())}")
    return {"all": results}


def language_scores(zorro, swaps):
    """{"syntax", "semantics", "overall"} of EgoBabyVLM's leaderboard: the means of Zorro, InflSwap
    and AgrSwap; of WordSwap and VP-Swap; and of both. {} if a part is missing."""
    parts = {name: result["score"] for name, result in swaps.items()}
    if set(FILES) - set(parts) or "thirteen" not in zorro:
        return {}
    syntax = np.mean([zorro["thirteen"]["score"], parts["inflswap"], parts["agrswap"]])
    semantics = np.mean([parts["wordswap"], parts["visual"]])
    means = {"syntax": syntax, "semantics": semantics, "overall": np.mean([syntax, semantics])}
    return {
        name: {"score": round(float(score), 4), "n": n, "chance": 0.5, "ci95": None}
        for (name, score), n in zip(means.items(), (3, 2, 2))
    }
