"""
The ten tests of the DevCV Toolbox, on which BabyLLaVA-V2 is tested: asking, scores, and two
controls for each. Their files and how answers are read: toolbox_files.py. Their wording:
sources/toolbox_prompts.py. The leaderboard's scores: board.py.

    python eval.py --checkpoint out/toy_v2/phase3.pt --task toolbox
    python eval.py --checkpoint DIR --task toolbox --json DIR2 --images DIR3    # others' files

The model answers freely, and --parse says how an answer is read and scored. `strict`, ours, accepts
the answer alone and counts the rest as unread. `published` follows the code of BabyLLaVA-V2, flaws
included: the word "a" counts as A, things that Memory cannot test count as wrong, and in Looking
While Listening a tie is wrong.

Control `cannot_see`: the same model, shown the mean of all pictures instead of each picture.
Control `cannot_read`: a baseline without a model that chooses the picture with the most similar 32
x 32 pixels (in Memory, the one least similar to all before), or, if there is nothing to compare,
the commonest answer. If a control solves a test, distrust the test's name.
"""

from collections import Counter, defaultdict
from functools import partial

import numpy as np
from PIL import Image

import inference
from config import UserError
from sources.toolbox_prompts import DIRECTIONS, TESTS
from tasks.babyvlm import winoground
from tasks.scores import accuracy
from tasks.toolbox_files import parse

# The eleven columns whose mean the paper gives as overall
PAPER_COLUMNS = (
    ("picture_vocabulary", "accuracy"),
    ("localization", "accuracy"),
    ("left_right", "accuracy"),
    ("spatial_details", "accuracy"),
    ("delayed_response", "accuracy"),
    ("delayed_response_open", "exact"),
    ("delayed_response_open", "adjacent"),
    ("memory", "adjusted"),
    ("more_synthetic", "accuracy"),
    ("more_natural", "accuracy"),
    ("object_counting", "accuracy"),
)
CONTROLS = ("cannot_see", "cannot_read")


# ---------------------------------------------------------------------------------------------
# Asking the model


def ask(rows, subject):
    """The model's answers: a list for each row, with an answer for each of its rounds. Its own
    answers stay in the context; questions that do not fit into it get "", and a line says how many.
    Raises UserError if no first question fits."""
    loaded = subject.loaded
    template, system = inference.question_template(loaded, subject.settings.template)
    dialogues = [([r.question for r in row["rounds"]], row["image"]) for row in rows]
    answers, unanswered = inference.answer_dialogues(
        loaded, dialogues, subject.together, template, system, subject.settings.max_new_tokens
    )
    block_size = loaded.model.gpt.config.block_size
    if unanswered[0] == len(rows):
        first = dialogues[0][0][0].count("<image>")
        raise UserError(
            f"no question fits: {first} pictures and their question are more tokens than this "
            f"model holds, {block_size}, its answer included"
        )
    for count, what in zip(unanswered, ("first questions", "later rounds")):
        if count:
            print(f"{count} {what} did not fit into {block_size} tokens: they count as unread")
    return answers


# ---------------------------------------------------------------------------------------------
# The control cannot_read


def thumbnails(names, subject):
    """{name: its picture as 32 x 32 x 3 floats}."""
    names = list(dict.fromkeys(names))
    small = [
        Image.fromarray(frame).resize((32, 32), Image.Resampling.BOX)
        for frame in subject.frames(names)
    ]
    return {name: np.asarray(picture, np.float32) for name, picture in zip(names, small)}


def distance(a, b):
    return float(((a - b) ** 2).sum())


def by_pixels(test, rows, subject):
    """The answers of the control cannot_read, as ask() returns them."""
    counts = Counter(round_.answer for row in rows for round_ in row["rounds"])
    answers = []
    for row in rows:
        last, pictures = row["rounds"][-1], len(row["image"])
        if TESTS[test].query and pictures == len(last.options) + 1:
            query, *others = pixels_of(row, subject)
            distances = [distance(query, other) for other in others]
            answers.append([last.options[int(np.argmin(distances))]])
        elif test.startswith("memory"):
            answers.append(newest_by_pixels(row, pixels_of(row, subject)))
        else:
            answers.append([max(last.options or counts, key=lambda option: counts[option])])
    return answers


def pixels_of(row, subject):
    small = thumbnails(row["image"], subject)
    return [small[name] for name in row["image"]]


def newest_by_pixels(row, pictures):
    """Memory's answers: in each round the picture that is least similar to all before it."""
    own, before = ["A"], pictures[:1]
    for first, round_ in zip(range(1, len(pictures), 2), row["rounds"][1:]):
        pair = pictures[first : first + 2]
        far = [min(distance(picture, old) for old in before) for picture in pair]
        own.append(round_.options[int(np.argmax(far))])
        before += pair
    return own


# ---------------------------------------------------------------------------------------------
# Scores


def score_answers(test, rows, parsed, rule, labels=None):
    """{measure: result} of parsed answers, a list for each row. rule: strict or published. labels:
    of Memory, see labels_of()."""
    if test.startswith("memory"):
        return score_memory(rows, parsed, labels, rule)
    pairs = [(own[0], row["rounds"][0].answer) for own, row in zip(parsed, rows)]
    exact = [own == right for own, right in pairs]
    options = [row["rounds"][0].options for row in rows]
    if options[0]:
        chance = round(float(np.mean([1 / len(own) for own in options])), 4)
    else:  # numbers: those of the test, and others that occur
        chance = 1 / len({*TESTS[test].answers, *(right for _, right in pairs)})
    near = [  # of NIH's questions with letters none
        are_adjacent(own, right)
        for (own, right), offered in zip(pairs, options)
        if offered and offered[0] in DIRECTIONS
    ]
    if test == "delayed_response_open" and near:
        return {"exact": accuracy(exact, chance), "adjacent": accuracy(near, 3 / 8)}
    results = {"accuracy": accuracy(exact, chance)}
    if test == "delayed_response" and near and rule == "published":
        results["adjacent"] = accuracy(near, 0.5)
    return results


def are_adjacent(own, right):
    """Whether two directions are equal or neighbours; "" is none."""
    return bool(own) and (DIRECTIONS.index(own) - DIRECTIONS.index(right)) % 8 in (0, 1, 7)


def learning_rounds(row):
    """How many rounds of a Memory dialogue show new things, before they are tested: 5 of 15."""
    return (len(row["rounds"]) + 1) // 3


def labels_of(row, subject):
    """For each round of a Memory dialogue what its pictures show: the item's own labels, else a
    digest of each picture's bytes, because a picture that is shown again is another file with the
    same bytes. Our fair form shows another picture of the thing, and names the first in `learnt`.
    """
    if row.get("labels"):
        return row["labels"]
    learnt, first, labels = row.get("learnt", {}), 0, []
    for round_ in row["rounds"]:
        names = row["image"][first : first + round_.question.count("<image>")]
        labels.append([subject.digest(learnt.get(name, name)) for name in names])
        first += len(names)
    return labels


def things_tested(row, labels):
    """[(round, round)] of a Memory dialogue, counted from 0: for each thing of the learning rounds
    the two later rounds that show it again. Things that are shown once or three times are
    skipped."""
    base = learning_rounds(row)
    learnt = {label for own in labels[:base] for label in own}
    rounds = defaultdict(list)
    for number in range(base, len(labels)):
        for label in dict.fromkeys(labels[number]):
            if label in learnt:
                rounds[label].append(number)
    return [tuple(own) for own in rounds.values() if len(own) == 2]


def score_memory(rows, parsed, labels, rule):
    """{"adjusted": the share of things that both rounds found; "learning", "testing": the share of
    rounds that are right, while things are learnt and after}. Under `published` each dialogue is
    scored, then the mean is taken, and `adjusted` divides by all things that were learnt."""
    dialogues = defaultdict(list)
    for row, own, shown in zip(rows, parsed, labels):
        base = learning_rounds(row)
        right = [answer == round_.answer for answer, round_ in zip(own, row["rounds"])]
        things = [right[a] and right[b] for a, b in things_tested(row, shown)]
        if rule == "published":
            things += [False] * (base - len(things))
        dialogues["adjusted"].append(things)
        dialogues["learning"].append(right[:base])
        dialogues["testing"].append(right[base:])
    learning = [round_ for row in rows for round_ in row["rounds"][: learning_rounds(row)]]
    chance = float(np.mean([1 / len(round_.options) for round_ in learning]))
    chances = {"adjusted": 0.25, "learning": round(chance, 4), "testing": 0.5}
    results = {}
    for measure, hits in dialogues.items():
        together = [hit for own in hits for hit in own]
        if not together:  # no dialogue has an adjusted score
            continue
        results[measure] = accuracy(together, chances[measure])
        if rule == "published":
            results[measure]["score"] = round(float(np.mean([np.mean(own) for own in hits])), 4)
    return results


class CannotRead:
    """A subject to which all phrases are equally likely."""

    def nll(self, images, phrases):
        return np.zeros(len(images))


def listening(rows, subject, ties):
    """Looking While Listening: two pictures, two phrases, Baby Winoground's rules. `accuracy` is
    the group rule."""
    instances = [(*row["image"], *row["phrases"]) for row in rows]
    results = {}
    for control, who in (
        ("", subject),
        ("cannot_see", subject.blinded()),
        ("cannot_read", CannotRead()),
    ):
        measured = winoground(instances, who, ties)
        results[key_of(control, "accuracy")] = measured["group"]
        for measure in ("image", "text"):
            results[key_of(control, measure)] = measured[measure]
    return with_mark(results)


def key_of(control, measure):
    """The name of a control's score for a measure; of the measure itself for ""."""
    if not control:
        return measure
    return control if measure in ("accuracy", "adjusted") else f"{control}_{measure}"


def with_mark(results):
    """The results, with "solved_by" in each measure that a control solves: its interval is above
    chance, and its score not below the model's interval."""
    for measure, result in results.items():
        if measure.startswith(CONTROLS) or result["chance"] is None:
            continue
        for control in CONTROLS:
            own = results.get(key_of(control, measure))
            if own and own["ci95"][0] > own["chance"] and own["score"] >= result["ci95"][0]:
                result["solved_by"] = control
    return results


def memory_labels(rows, subject):
    """labels_of() of each row. Prints how many have no `adjusted` score, because no thing of the
    learning rounds comes again in two later rounds. They count in the other measures; under
    `published` they are wrong."""
    labels = [labels_of(row, subject) for row in rows]
    untested = [i for i, own in enumerate(labels) if not things_tested(rows[i], own)]
    if untested:
        print(
            f"{len(untested)} of {len(rows)} dialogues have no adjusted score, dialogue "
            f"{untested[0]} first: no label and no equal file shows which picture comes again "
            "(by the leaderboard's rules they are wrong)"
        )
    return labels


def score(test, rows, subject, ties, rule=""):
    """{measure: result} of a test, its controls among them. rule: strict or published; "": that of
    --parse."""
    rule = rule or subject.settings.parse
    if test == "looking_while_listening":
        return listening(rows, subject, "published" if rule == "published" else ties)
    asked = {
        "": subject.once("seeing", rows, lambda items: ask(items, subject)),
        "cannot_see": subject.once("blind", rows, lambda items: ask(items, subject.blinded())),
        "cannot_read": subject.once("pixels", rows, lambda items: by_pixels(test, items, subject)),
    }
    labels = None
    if test.startswith("memory"):
        labels = subject.once("labels", rows, lambda items: memory_labels(items, subject))
    results = {}
    for control, answers in asked.items():
        parsed = [
            [parse(said, round_.options, rule) for said, round_ in zip(own, row["rounds"])]
            for own, row in zip(answers, rows)
        ]
        for measure, result in score_answers(test, rows, parsed, rule, labels).items():
            results[key_of(control, measure)] = result
        if not control:
            unread = [one == "" for own in parsed for one in own]
    return with_mark(results) | {"unread": accuracy(unread, None)}


def make_rule(test):
    """The rule of a test, for tasks.TASKS."""
    return partial(score, test)


def example(rows, subject):
    """(frames, last question, right answer, the model's answer) of the first item."""
    last = rows[0]["rounds"][-1]
    (answers,) = subject.once("seeing", rows[:1], lambda items: ask(items, subject))
    return subject.frames(rows[0]["image"]), last.question, last.answer, answers[-1]


def overall(tasks):
    """{"toolbox": ...}: the mean of the eleven columns, of the model and each control; {} if a test
    is missing."""
    if not all(measure in tasks.get(name, {}).get("all", {}) for name, measure in PAPER_COLUMNS):
        return {}
    means = {}
    for who in ("", *CONTROLS):
        scores, chances = [], []
        for name, measure in PAPER_COLUMNS:
            own = tasks[name]["all"]
            scores.append(own[key_of(who, measure)]["score"])
            chances.append(own[measure]["chance"])
        mean = {"score": round(float(np.mean(scores)), 4), "n": len(scores), "ci95": None}
        means[who or "mean"] = mean | {"chance": round(float(np.mean(chances)), 4)}
    return {"toolbox": {"all": means}}
