"""
Two more tests that people hold: Machine-DevBench (of EgoBabyVLM) and DevBench.

    python eval.py --task machine_devbench --csv FILE.csv --images DIR
    python eval.py --task devbench --csv manifest.csv --images DIR [--human human.csv]

Machine-DevBench's CSV has the columns task, bin, image1, image2, text1, text2: `lexical` has no
text2, and is right where text1 is likelier after image1 than after image2; the grammatical tasks
are right where the sums say so: s11 + s22 > s12 + s21. A task's score is the mean over its
frequency bins; overall, the mean of lexical and of the mean of the grammatical ones.

DevBench's manifest has image1 ... image_k and text1 ... text_m, the first of each right. A
human.csv (trial, image1 ... image_k, or text1 ...; several rows a trial for several ages) has the
shares of children who chose each: how far from theirs are the model's choices,
softmax(beta * score), for the best beta?
"""

import re
from collections import defaultdict

import numpy as np

from config import UserError
from files import read_csv
from scores import accuracy, lowest, wilson

LEXICAL = "lexical"


def read_machine(path):
    """The rows of Machine-DevBench's CSV."""
    rows = read_csv(path, ("task", "bin", "image1", "image2", "text1"))
    for row in rows:
        if (row["task"] == LEXICAL) == bool(row.get("text2")):
            raise UserError(
                f"{path}:{row['line']}: {row['task']} with{'' if row.get('text2') else 'out'} a "
                f"text2: {LEXICAL} has one text, the others two"
            )
    return rows


def machine(rows, subject, ties):
    """{"lexical", one measure for each grammatical task, "grammatical", "overall"}."""
    hits, bins = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        first, second = ([row[f"image{i}"] for row in own] for i in (1, 2))
        texts = [row["text1"] for row in own]
        left, right = subject.nll(first, texts), subject.nll(second, texts)
        if task != LEXICAL:  # NLLs: lower is better
            foils = [row["text2"] for row in own]
            left = left + subject.nll(second, foils)
            right = right + subject.nll(first, foils)
        for row, pair in zip(own, zip(left, right)):
            hit = lowest(np.array(pair), 0, ties)
            hits[task].append(hit)
            bins[task][row["bin"]].append(hit)
    results = {}
    for task, own in hits.items():
        mean = float(np.mean([np.mean(one) for one in bins[task].values()]))
        # of bins of different sizes the mean is as sure as one of so many items (Kish 1965)
        sure = len(bins[task]) ** 2 / sum(1 / len(one) for one in bins[task].values())
        results[task] = accuracy(own, 0.5) | {
            "score": round(mean, 4),
            "ci95": wilson(mean * sure, sure),
        }
    grammatical = [results[task]["score"] for task in results if task != LEXICAL]
    means = {"grammatical": grammatical}
    if grammatical and LEXICAL in results:
        means["overall"] = [results[LEXICAL]["score"], float(np.mean(grammatical))]
    for name, parts in means.items():
        if parts:
            score = round(float(np.mean(parts)), 4)
            results[name] = {"score": score, "n": len(parts), "chance": 0.5, "ci95": None}
    return results


# ---------------------------------------------------------------------------------------------
# DevBench


def columns_of(row, kind):
    """The values of image1, image2 ... that a row has, in order."""
    found = {}
    for name, value in row.items():
        number = re.fullmatch(kind + r"(\d+)", str(name))
        if number and value:
            found[int(number.group(1))] = value
    return [found[number] for number in sorted(found)]


def read_manifest(path):
    """The rows of a manifest.csv, with their `images` and `texts`."""
    rows = read_csv(path, ("image1", "text1"))
    for number, row in enumerate(rows, 1):
        row["images"], row["texts"] = columns_of(row, "image"), columns_of(row, "text")
        row["trial"] = row.get("trial") or str(number)
        if len(row["images"]) < 2 and len(row["texts"]) < 2:
            raise UserError(f"{path}:{row['line']}: one picture and one text: nothing to choose")
    return rows


def scores_of(rows, subject):
    """Of each row (images, texts) log-probabilities, a mean a token."""
    images = [image for row in rows for image in row["images"] for _ in row["texts"]]
    texts = [text for row in rows for _ in row["images"] for text in row["texts"]]
    flat, tables = -subject.nll(images, texts), []
    for row in rows:
        shape = len(row["images"]), len(row["texts"])
        tables.append(flat[: shape[0] * shape[1]].reshape(shape))
        flat = flat[shape[0] * shape[1] :]
    return tables


def choices(table):
    """The scores that are chosen from: the pictures' under the first text, or, of one picture, the
    texts'."""
    return table[:, 0] if table.shape[0] > 1 else table[0]


def devbench(rows, subject, ties):
    """{"accuracy"} and, given --human, {"kl", "beta"}. Where there are two pictures and two texts,
    also {"group"}: each picture likelier with its own text, each text with its own picture."""
    tables = scores_of(rows, subject)
    hits = [lowest(-choices(table), 0, ties) for table in tables]
    chance = float(np.mean([1 / len(choices(table)) for table in tables]))
    results = {"accuracy": accuracy(hits, round(chance, 4))}
    square = [table for table in tables if table.shape == (2, 2)]
    if square:
        own = [min(t[0, 0], t[1, 1]) > max(t[0, 1], t[1, 0]) for t in square]
        results["group"] = accuracy(own, round(1 / 6, 4))
    if subject.settings.human:
        results |= beside_children(rows, tables, read_human(subject.settings.human, subject.rows))
    return results


def read_human(path, rows):
    """{trial: [shares of each age bin]} of a human.csv, each summing to 1."""
    known, shares = {row["trial"]: row for row in rows}, defaultdict(list)
    for row in read_csv(path, ("trial",)):
        where = f"{path}:{row['line']}"
        values = columns_of(row, "image") or columns_of(row, "text")
        try:
            own = np.array([float(value) for value in values])
        except ValueError:
            raise UserError(f"{where}: shares of choices must be numbers") from None
        if row["trial"] not in known:
            continue  # of a trial that is not asked here
        wanted = len(known[row["trial"]]["images"])
        wanted = wanted if wanted > 1 else len(known[row["trial"]]["texts"])
        if len(own) != wanted or not (own >= 0).all() or not 0 < own.sum() < np.inf:
            raise UserError(f"{where}: want {wanted} shares of choices, not negative")
        shares[row["trial"]].append(own / own.sum())
    if not shares:
        raise UserError(f"{path}: none of its trials is in the manifest")
    return shares


def divergence(human, scores, beta):
    """KL(human || softmax(beta * scores)), in nats."""
    logits = beta * (scores - scores.max())
    log_model = logits - np.log(np.exp(logits).sum())
    seen = human > 0
    return float((human[seen] * (np.log(human[seen]) - log_model[seen])).sum())


def beside_children(rows, tables, human):
    """{"kl", "beta"}: the mean divergence, for the beta in [0.025, 40] under which it is least."""
    pairs = [
        (own, choices(table))
        for row, table in zip(rows, tables)
        for own in human.get(row["trial"], [])
    ]
    if not pairs:  # children were not asked what is in this subset
        return {}
    mean = lambda beta: float(np.mean([divergence(own, scores, beta) for own, scores in pairs]))
    low, high = np.log(0.025), np.log(40.0)
    for _ in range(6):  # the mean is convex in beta: a finer grid around the best, again and again
        grid = np.linspace(low, high, 41)
        best = int(np.argmin([mean(np.exp(b)) for b in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    beta = float(np.exp(grid[best]))
    none = {"n": len(pairs), "chance": None, "ci95": None}
    return {"kl": {"score": round(mean(beta), 4)} | none, "beta": {"score": round(beta, 4)} | none}
