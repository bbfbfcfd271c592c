"""
Machine-DevBench (of EgoBabyVLM) and DevBench.

    python eval.py --task machine_devbench --csv DIR                    # the published folder
    python eval.py --task machine_devbench --csv FILE.csv --images DIR
    python eval.py --task devbench --csv manifest.csv --images DIR [--human human.csv]

Machine-DevBench's folder has the manifests Lexical/Nouns/manifest_nouns_STYLE.json and
Grammatical/gram_negation/manifest_grammatical_negation_STYLE.json, with pictures beside them, in
the styles realistic and cartoon, which are subsets here. A CSV has the columns task, bin, image1,
image2, text1, text2.

A lexical item (no text2) is right if text1 is likelier after image1 than after image2; a
grammatical one if s11 + s22 > s12 + s21, with s_ij the log-likelihood of text j after image i. A
lexical task scores the mean over its frequency bins, of which the two lowest are one; a
grammatical task the plain mean over its items; `lexical` and `grammatical` are the means of their
tasks, `overall` the mean of both. With --ties published a tie is wrong, as in the original.

DevBench's manifest has image1 ... image_k and text1 ... text_m; the first of each is right. A
human.csv (trial, and image1 ... image_k or text1 ...; several rows a trial for several ages) has
the fraction of children who chose each. `kl` is the divergence from theirs of the model's choices,
softmax(beta * score), for the best beta.
"""

import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from common.files import read_csv, read_json
from config import UserError
from tasks.scores import accuracy, lowest, wilson

LEXICAL = "lex"  # the names of lexical tasks start with it
PARTS_OF_SPEECH = ("nouns", "verbs", "adjectives")
MERGED = {"[1,2)": "[1,4)", "[2,4)": "[1,4)"}  # frequency bins


def read_machine_devbench(path):
    """The rows of Machine-DevBench's folder or CSV. Raises UserError."""
    if Path(path).is_dir():
        return read_manifests(Path(path))
    rows = read_csv(path, ("task", "bin", "image1", "image2", "text1"), ("text1", "text2"))
    for row in rows:
        if row["task"].startswith(LEXICAL) == bool(row.get("text2")):
            raise UserError(
                f"{path}:{row['line']}: {row['task']} with{'' if row.get('text2') else 'out'} a "
                "text2: lexical tasks have one text, the others two"
            )
    return rows


def read_manifests(folder):
    """The rows of all manifests in Machine-DevBench's folder, with absolute paths of pictures."""
    rows = []
    for part in PARTS_OF_SPEECH:
        directory = folder / "Lexical" / part.capitalize()
        for path in sorted(directory.glob(f"manifest_{part}_*.json")):
            keys = ("frequency_bin", "image_positive", "image_negative", "caption_positive")
            rows += read_manifest_items(path, f"lex_{part}", f"manifest_{part}_", keys)
    for directory in sorted(folder.glob("Grammatical/gram_*")):
        start = f"manifest_grammatical_{directory.name.removeprefix('gram_')}_"
        for path in sorted(directory.glob(f"{start}*.json")):
            keys = ("freq_bin", "image_0", "image_1", "caption_a", "caption_b")
            rows += read_manifest_items(path, directory.name, start, keys)
    if not rows:
        raise UserError(f"{folder}: no Lexical/Nouns/manifest_nouns_*.json, nor any other manifest")
    return rows


def read_manifest_items(path, task, start, keys):
    """The rows of a manifest. start: of its file's name, before the style; keys: of an item, bin,
    pictures and texts."""
    content, rows = read_json(path), []
    items = content.get("items") if isinstance(content, dict) else None
    for number, item in enumerate(items if isinstance(items, list) else [None]):
        values = [item.get(key) for key in keys] if isinstance(item, dict) else [None] * len(keys)
        values[0] = str(values[0] or "unknown")  # a task of unknown frequencies is one bin
        if not all(isinstance(value, str) and value for value in values):
            raise UserError(f'{path}: item {number}: want {{"items": [{{{", ".join(keys)}}}]}}')
        own_bin, first, second, *texts = values
        row = {"task": task, "bin": own_bin, "subset": path.stem.removeprefix(start)}
        for column, name in (("image1", first), ("image2", second)):
            row[column] = os.path.abspath(path.parent / name)
        rows.append(row | dict(zip(("text1", "text2"), texts)))
    return rows


def machine_devbench(rows, subject, ties):
    """{a measure for each task, "lexical", "grammatical", "overall"}."""
    hits = defaultdict(lambda: defaultdict(list))
    for task in sorted({row["task"] for row in rows}):
        own = [row for row in rows if row["task"] == task]
        first, second = ([row[f"image{i}"] for row in own] for i in (1, 2))
        texts = [row["text1"] for row in own]
        left, right = subject.nll(first, texts), subject.nll(second, texts)
        if not task.startswith(LEXICAL):  # NLLs: lower is better
            foils = [row["text2"] for row in own]
            left = left + subject.nll(second, foils)
            right = right + subject.nll(first, foils)
        for row, pair in zip(own, zip(left, right)):
            hit = (
                float(pair[0] < pair[1]) if ties == "published" else lowest(np.array(pair), 0, ties)
            )
            hits[task][MERGED.get(row["bin"], row["bin"])].append(hit)
    results = {}
    for task, bins in hits.items():
        together = [hit for own in bins.values() for hit in own]
        results[task] = accuracy(together, 0.5)
        if task.startswith(LEXICAL):
            # the effective sample size of a mean over bins of different sizes (Kish 1965)
            effective = len(bins) ** 2 / sum(1 / len(own) for own in bins.values())
            mean = task_score(task, bins)
            results[task] |= {"score": round(mean, 4), "ci95": wilson(mean * effective, effective)}
    scores = {task: task_score(task, bins) for task, bins in hits.items()}
    for name, score in means_of_tasks(scores):
        if name not in results:  # a CSV may have one lexical task, of this name
            count = sum(name in ("overall", kind_of(task)) for task in hits)
            results[name] = {"score": round(score, 4), "n": count, "chance": 0.5, "ci95": None}
    return results


def kind_of(task):
    return "lexical" if task.startswith(LEXICAL) else "grammatical"


def task_score(task, bins):
    """The score of a task, from {bin: hits}."""
    if kind_of(task) == "lexical":
        return sum(sum(own) / len(own) for own in bins.values()) / len(bins)
    together = [hit for own in bins.values() for hit in own]
    return sum(together) / len(together)


def means_of_tasks(scores):
    """Yield ("lexical", mean), ("grammatical", mean) and ("overall", mean of both) of {task:
    score}; of one kind alone, overall is that kind."""
    means = []
    for kind in ("lexical", "grammatical"):
        own = [score for task, score in scores.items() if kind_of(task) == kind]
        if own:
            means.append(sum(own) / len(own))
            yield kind, means[-1]
    yield "overall", sum(means) / len(means)


# ---------------------------------------------------------------------------------------------
# DevBench


def columns_of(row, kind):
    """The values of a row's columns image1, image2 ..., in order."""
    found = {}
    for name, value in row.items():
        number = re.fullmatch(kind + r"(\d+)", str(name))
        if number and value:
            found[int(number.group(1))] = value
    return [found[number] for number in sorted(found)]


def read_manifest(path):
    """The rows of a manifest.csv, with their `images` and `texts`."""
    texts = [f"text{i}" for i in range(1, 10)]
    rows = read_csv(path, ("image1", "text1"), texts)
    for number, row in enumerate(rows, 1):
        row["images"], row["texts"] = columns_of(row, "image"), columns_of(row, "text")
        row["trial"] = row.get("trial") or str(number)
        if len(row["images"]) < 2 and len(row["texts"]) < 2:
            raise UserError(f"{path}:{row['line']}: one picture and one text: nothing to choose")
    return rows


def scores_of(rows, subject):
    """A table (images, texts) of mean log-probabilities per token for each row."""
    images = [image for row in rows for image in row["images"] for _ in row["texts"]]
    texts = [text for row in rows for _ in row["images"] for text in row["texts"]]
    flat, tables = -subject.nll(images, texts), []
    for row in rows:
        shape = len(row["images"]), len(row["texts"])
        tables.append(flat[: shape[0] * shape[1]].reshape(shape))
        flat = flat[shape[0] * shape[1] :]
    return tables


def choices(table):
    """The scores to choose from: of the pictures with the first text, or of the texts if there is
    one picture."""
    return table[:, 0] if table.shape[0] > 1 else table[0]


def devbench(rows, subject, ties):
    """{"accuracy"}; with --human also {"kl", "beta"}; for trials of two pictures and two texts also
    {"group"}: each picture likelier with its own text, each text with its own picture."""
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
    """{trial: [fractions of each age bin]} of a human.csv, each summing to 1. Raises UserError."""
    known, shares = {row["trial"]: row for row in rows}, defaultdict(list)
    for row in read_csv(path, ("trial",)):
        where = f"{path}:{row['line']}"
        values = columns_of(row, "image") or columns_of(row, "text")
        try:
            own = np.array([float(value) for value in values])
        except ValueError:
            raise UserError(f"{where}: shares of choices must be numbers") from None
        if row["trial"] not in known:
            continue  # a trial that is not in the manifest
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
    """{"kl", "beta"}: the smallest mean divergence over beta in [0.025, 40]."""
    pairs = [
        (own, choices(table))
        for row, table in zip(rows, tables)
        for own in human.get(row["trial"], [])
    ]
    if not pairs:  # no trial of this subset was shown to children
        return {}
    mean = lambda beta: float(np.mean([divergence(own, scores, beta) for own, scores in pairs]))
    low, high = np.log(0.025), np.log(40.0)
    for _ in range(6):  # the mean is convex in beta: search on ever finer grids around the best
        grid = np.linspace(low, high, 41)
        best = int(np.argmin([mean(np.exp(b)) for b in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    beta = float(np.exp(grid[best]))
    none = {"n": len(pairs), "chance": None, "ci95": None}
    return {"kl": {"score": round(mean(beta), 4)} | none, "beta": {"score": round(beta, 4)} | none}
