"""
The rules of BabyVLM's four tests, and of two others of their form.

Each takes the rows of its CSV, a tasks.Subject and how to count ties, and returns {measure:
result}. The columns of each test are in tasks.TASKS.
"""

from collections import defaultdict

import numpy as np

from config import UserError
from tasks.scores import accuracy, choose_meteor, lowest, names_in, over_ties


def labeled_s(rows, subject, ties):
    """Some pictures, one word: under which picture is the word likeliest?"""
    scores = subject.nll([row["image"] for row in rows], [row["target_category"] for row in rows])
    trials = defaultdict(list)
    for row, score in zip(rows, scores):
        trials[row["trial_id"]].append((score, row["target_category"] == row["real_category"]))
    hits, chances = [], []
    for name, trial in trials.items():
        right = [i for i, (_, is_target) in enumerate(trial) if is_target]
        if len(right) != 1:
            raise UserError(f"labeled_s: trial {name} has {len(right)} pictures of its target")
        hits.append(lowest(np.array([score for score, _ in trial]), right[0], ties))
        chances.append(1 / len(trial))
    return {"accuracy": accuracy(hits, float(np.mean(chances)))}


def first_is_lower(firsts, seconds, ties):
    hits = [lowest(np.array(pair), 0, ties) for pair in zip(firsts, seconds)]
    return {"accuracy": accuracy(hits, 0.5)}


def vtwt(rows, subject, ties):
    """One picture, a true phrase and its foil: which is likelier?"""
    images = [row["image"] for row in rows]
    positive = subject.nll(images, [row["positive_phrase"] for row in rows])
    negative = subject.nll(images, [row["negative_phrase"] for row in rows])
    return first_is_lower(positive, negative, ties)


def two_by_one(rows, subject, ties):
    """Two pictures, one phrase: under which is it likelier?"""
    phrases = [row["phrase"] for row in rows]
    true = subject.nll([row["image"] for row in rows], phrases)
    foil = subject.nll([row["foil_image"] for row in rows], phrases)
    return first_is_lower(true, foil, ties)


# L00: NLL of the positive picture and positive phrase; L01: positive picture, negative phrase; and
# so on. Chance is that of four scores in random order: 4 of the 24 orders pass the group rule.
WINOGROUND = {
    "image": (lambda L00, L01, L10, L11: L00 < L10 and L11 < L01, 1 / 4),
    "text": (lambda L00, L01, L10, L11: L00 < L01 and L11 < L10, 1 / 4),
    "group": (lambda L00, L01, L10, L11: max(L00, L11) < min(L01, L10), 1 / 6),
    "positive_context": (lambda L00, L01, L10, L11: L00 < min(L01, L10), 1 / 3),
    "negative_context": (lambda L00, L01, L10, L11: L11 < min(L01, L10), 1 / 3),
}


def winoground(instances, subject, ties):
    """instances: (positive picture, negative picture, positive phrase, negative phrase)."""
    images = [image for instance in instances for image in instance[:2] for _ in range(2)]
    phrases = [phrase for instance in instances for _ in range(2) for phrase in instance[2:]]
    tables = subject.nll(images, phrases).reshape(-1, 4)  # rows of L00, L01, L10, L11
    if ties == "published":
        tables = tables.astype(np.float32)  # the precision of the original's losses
    results = {}
    for measure, (rule, chance) in WINOGROUND.items():
        hits = [over_ties(table, rule, ties) for table in tables.tolist()]
        results[measure] = accuracy(hits, chance)
    return results


WINOGROUND_COLUMNS = ("instance_id", "positive_phrase", "negative_phrase", "image", "image_tag")


def pair_instances(rows):
    """[(positive picture, negative picture, positive phrase, negative phrase)] of Baby Winoground's
    CSV, which has a row for each picture. Raises UserError."""
    by_instance = defaultdict(list)
    for row in rows:
        by_instance[row["instance_id"]].append(row)
    instances = []
    for name, sides in by_instance.items():
        images = {row["image_tag"]: row["image"] for row in sides}
        phrases = {(row["positive_phrase"], row["negative_phrase"]) for row in sides}
        if len(sides) != 2 or set(images) != {"positive", "negative"} or len(phrases) != 1:
            raise UserError(
                f"baby_winoground:{sides[-1].get('line', '')}: instance {name} needs one row "
                "tagged positive and one tagged negative, with the same two phrases"
            )
        instances.append((images["positive"], images["negative"], *phrases.pop()))
    return instances


def baby_winoground(rows, subject, ties):
    """Two pictures, two phrases, each phrase true of one."""
    return winoground(pair_instances(rows), subject, ties)


def two_by_two(rows, subject, ties):
    """Baby Winoground with one row for each instance."""
    columns = ("image", "foil_image", "phrase", "foil_phrase")
    return winoground([tuple(row[c] for c in columns) for row in rows], subject, ties)


def captions(rows, subject, ties):
    """METEOR of each caption against one reference. If the CSV has a column `thing`: how often the
    caption names that thing and no other; if it has `colour`: how often the colour is right, of
    the captions that name a colour."""
    answers = subject.caption([row["image"] for row in rows])
    name, meteor = choose_meteor()
    scores = [meteor(row["text"].split(), said.split()) for row, said in zip(rows, answers)]
    score = round(float(np.mean(scores)), 4)
    results = {name: {"score": score, "n": len(rows), "chance": None, "ci95": None}}
    things = {row["thing"] for row in subject.rows if row.get("thing")}
    colours = {row["colour"] for row in subject.rows if row.get("colour")}
    if things:
        hits = [names_in(said, things) == {row["thing"]} for row, said in zip(rows, answers)]
        results["names_thing"] = accuracy(hits, None)
    if colours:
        said_colours = [names_in(said, colours) for said in answers]
        hits = [said == {row["colour"]} for row, said in zip(rows, said_colours) if said]
        if hits:
            results["colour_if_said"] = accuracy(hits, None)
    return results
