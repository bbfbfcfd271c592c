"""
The ten tests of the DevCV Toolbox, on which BabyLLaVA-V2 is tested: reading answers, scores, and
two controls for each. Their wording: sources/toolbox_prompts.py.

    python eval.py --checkpoint out/toy_v2/phase3.pt --task toolbox
    python eval.py --checkpoint DIR --task toolbox --json DIR2 --images DIR3    # others' files

A test is a JSON file, NAME.json, of {"image": [...], "conversations": [{"from": "human", "value":
"Touch the image of 'ball' (A)<image> ..."}, {"from": "gpt", "value": "B"}], "subset": "seen"}. The
model answers freely, and --parse says how an answer is read. `strict`, ours, accepts the answer
alone and counts the rest as unread. `published` takes the first letter as the original does, flaws
included: the word "a" counts as A. (The original's rule for numbers and words is not public: here
the first number, and the longest answer that occurs.)

Control `cannot_see`: the same model, shown the mean of all pictures instead of each picture.
Control `cannot_read`: a baseline without a model that chooses the picture with the most similar 32
x 32 pixels (in Memory, the one least similar to all before), or, if there is nothing to compare,
the commonest answer. If a control solves a test, distrust the test's name.
"""

import re
from collections import Counter

import numpy as np
from PIL import Image

from common.files import read_list
from config import UserError
from sources.toolbox_prompts import DIRECTIONS, LEARNT, ROUNDS, TESTS
from tasks.babyvlm import winoground
from tasks.choice import answer_all
from tasks.scores import accuracy
from tokenizer import TEMPLATES, chat_sample, end_tokens, expand

# The eleven columns whose mean is published as overall
COLUMNS = (
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
# Reading files and answers


def fault_of(name, item):
    """Why an item is not a valid question of a test, or ""."""
    if not isinstance(item, dict) or not isinstance(item.get("image"), list):
        return 'want {"image": [...], "conversations": [...]}'
    if not all(isinstance(name, str) for name in item["image"]):
        return "its image must be a list of names"
    if not isinstance(item.get("subset", ""), str):
        return "its subset must be a name"
    if name == "looking_while_listening":
        phrases = item.get("phrases")
        whole = isinstance(phrases, list) and all(isinstance(p, str) and p for p in phrases)
        fits = whole and len(phrases) == len(item["image"]) == 2
        return "" if fits else "want two pictures and two phrases"
    turns = item.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        return "want a conversation of human and gpt in turn"
    for i, turn in enumerate(turns):
        whole = isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if not whole or turn.get("from") != ("human", "gpt")[i % 2]:
            return f'turn {i} is no {{"from": "{("human", "gpt")[i % 2]}", "value"}}'
    asked = [turn["value"].count("<image>") for turn in turns[::2]]
    if sum(asked) != len(item["image"]):
        return f"{sum(asked)} <image> for {len(item['image'])} pictures"
    return fault_of_pictures(name, asked) or fault_of_answers(name, item)


def fault_of_pictures(name, asked):
    """Why questions with so many pictures each do not fit a test, or ""."""
    want = [TESTS[name].prompt.count("#")]
    if name.startswith("memory"):
        want = [1] + want * (ROUNDS - 1)
        return "" if asked == want else f"want {ROUNDS} rounds, the first of 1 picture, others of 2"
    if name.startswith("delayed_response"):
        return "" if sum(asked) else "want a clip, one picture at least"
    return "" if asked == want else f"{sum(asked)} pictures, want {want[0]} and one question"


def read_items(name, path):
    """The items of a test's JSON file. Raises UserError, with file and item."""
    items = read_list(path, "items")
    for i, item in enumerate(items):
        fault = fault_of(name, item)
        if fault:
            raise UserError(f"{path}: item {i}: {fault}")
    return items


def fault_of_answers(name, item):
    """Why the right answers of an item do not fit a test, or ""."""
    said = [turn["value"] for turn in item["conversations"][1::2]]
    if name.startswith("memory") and len(said) != ROUNDS:
        return f"{len(said)} rounds, want {ROUNDS}"
    if not name.startswith("memory") and len(said) != 1:
        return f"{len(said)} questions, want one"
    for answer in said:
        if answer not in TESTS[name].answers:
            return f"{answer!r} is no answer: want {', '.join(TESTS[name].answers)}"
    return ""


def parse(answer, answers, rule):
    """Which of `answers` an answer means, or "" if it cannot be read. rule: strict or published."""
    if rule == "published":
        if answers[0] == "A":
            found = re.search(r"\b[A-Da-d]\b", answer)
            return found.group().upper() if found else ""
        if answers[0] == "1":
            found = re.search(r"\d+", answer)
            return found.group() if found else ""
        said = re.sub(r"[^a-z]+", " ", answer.lower()).strip()
        within = [word for word in answers if re.search(rf"\b{word}\b", said)]
        return max(within, key=len, default="")
    said = re.sub(r"[().!,'\"]", " ", answer)  # punctuation around it is allowed
    said = " ".join(said.split()).lower()
    return {word.lower(): word for word in answers}.get(said, "")


# ---------------------------------------------------------------------------------------------
# Asking the model


def turns_of(row):
    said = [turn["value"] for turn in row["conversations"]]
    return list(zip(said[::2], said[1::2]))


def ask(rows, subject):
    """The model's answers: a list for each row, with an answer for each of its rounds. Its own
    answers stay in the context; rounds that no longer fit into it get "", and a line says how
    many."""
    loaded, settings = subject.loaded, subject.settings
    template, system = loaded.choose_template(settings.template)
    template = template or TEMPLATES["bare"]  # if it was trained on captions alone
    stop = end_tokens(loaded.tokenizer, template)
    said, full, block_size = [[] for _ in rows], 0, loaded.model.gpt.config.block_size
    for number in range(max(len(turns_of(row)) for row in rows)):
        prompts, all_embeds, asked = [], [], []
        for row, own in zip(rows, said):
            questions = [question for question, _ in turns_of(row)][: number + 1]
            if number >= len(turns_of(row)):
                continue
            pictures = sum(question.count("<image>") for question in questions)
            embeds = subject.together(row["image"][:pictures])
            turns = [*zip(questions, own), (questions[-1], None)]
            tokens, _ = chat_sample(loaded.tokenizer, template, turns, system)
            tokens = expand(tokens, loaded.tokenizer.image, [len(e) for e in embeds])
            if len(tokens) < block_size:
                prompts.append(tokens)
                all_embeds.append(embeds)
                asked.append(own)
                continue
            if number == 0:
                raise UserError(
                    f"{pictures} pictures and their question make {len(tokens)} tokens; this model "
                    f"holds {block_size}, its answer included"
                )
            own.append("")
            full += 1
        answers = answer_all(loaded, prompts, all_embeds, stop, max_new_tokens=10, batch=64)
        for own, answer in zip(asked, answers):
            own.append(answer.replace("<image>", ""))  # an untrained model may generate it
    if full:
        print(f"{full} rounds did not fit into {block_size} tokens: they count as unread")
    return said


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


def by_pixels(name, rows, subject):
    """The answers of the control cannot_read, as ask() returns them."""
    test = TESTS[name]
    if not test.query and not name.startswith("memory"):
        counts = Counter(turns_of(row)[0][1] for row in rows)
        return [[max(test.answers, key=lambda answer: counts[answer])]] * len(rows)
    answers = []
    for row in rows:
        small = thumbnails(row["image"], subject)
        pictures = [small[image] for image in row["image"]]
        if test.query:
            far = [distance(pictures[0], other) for other in pictures[1:]]
            answers.append([test.answers[int(np.argmin(far))]])
            continue
        own, before = ["A"], pictures[:1]
        for first in range(1, len(pictures), 2):  # the new one is the least similar to all before
            pair = pictures[first : first + 2]
            far = [min(distance(picture, old) for old in before) for picture in pair]
            own.append(test.answers[int(np.argmax(far))])
            before += pair
        answers.append(own)
    return answers


# ---------------------------------------------------------------------------------------------
# Scores


def hits_of(name, rows, parsed):
    """{measure: (hits, chance)} of parsed answers, a list for each row."""
    true = [[answer for _, answer in turns_of(row)] for row in rows]
    if name.startswith("memory"):
        hits = []
        for row, own, right in zip(rows, parsed, true):
            hits += both_right(row, own, right)
        rounds = [a == b for own, right in zip(parsed, true) for a, b in zip(own, right)]
        return {"adjusted": (hits, 0.25), "rounds": (rounds, None)}
    pairs = [(own[0], right[0]) for own, right in zip(parsed, true)]
    exact = [own == right for own, right in pairs]
    if name == "delayed_response_open":
        near = []
        for own, right in pairs:
            apart = DIRECTIONS.index(own) - DIRECTIONS.index(right) if own else 4
            near.append(apart % 8 in (0, 1, 7))
        return {"exact": (exact, 1 / 8), "adjacent": (near, 3 / 8)}
    return {"accuracy": (exact, TESTS[name].chance)}


def both_right(row, own, right):
    """For each thing to remember, whether both rounds that test it were answered right."""
    pictures, tested = row["image"], {}
    for number in range(LEARNT, ROUNDS):
        first = 2 * number - 1  # round 1 has one picture, the others two
        pair = pictures[first : first + 2]
        old = pair[1 - "AB".index(right[number])]  # the one that is not new
        learnt = row.get("learnt", {}).get(old, old)  # the fair form shows another picture of it
        tested.setdefault(learnt, []).append(own[number] == right[number])
    return [all(hits) for hits in tested.values()]


class CannotRead:
    """A subject to which all phrases are equally likely."""

    def nll(self, images, phrases):
        return np.zeros(len(images))


def listening(rows, subject, ties):
    """Looking While Listening: two pictures, two phrases, Baby Winoground's group rule."""
    instances = [(*row["image"], *row["phrases"]) for row in rows]
    seeing = winoground(instances, subject, ties)["group"]
    blind = winoground(instances, subject.blinded(), ties)["group"]
    unread = winoground(instances, CannotRead(), ties)["group"]
    return with_mark({"accuracy": seeing, "cannot_see": blind, "cannot_read": unread})


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


def make_rule(name):
    """The rule of a test, for tasks.TASKS."""

    def score(rows, subject, ties):
        if name == "looking_while_listening":
            return listening(rows, subject, ties)
        parse_all = lambda answers: [
            [parse(one, TESTS[name].answers, subject.settings.parse) for one in own]
            for own in answers
        ]
        blinded = lambda items: ask(items, subject.blinded())
        seeing = parse_all(subject.once("seeing", rows, lambda items: ask(items, subject)))
        blind = parse_all(subject.once("blind", rows, blinded))
        pixels = subject.once("pixels", rows, lambda items: by_pixels(name, items, subject))
        results = {}
        for control, parsed in (("", seeing), ("cannot_see", blind), ("cannot_read", pixels)):
            for measure, (hits, chance) in hits_of(name, rows, parsed).items():
                results[key_of(control, measure)] = accuracy(hits, chance)
        unread = [one == "" for own in seeing for one in own]
        return with_mark(results) | {"unread": accuracy(unread, None)}

    return score


def example(rows, subject):
    """(frames, last question, right answer, the model's answer) of the first item."""
    question, right = turns_of(rows[0])[-1]
    (answers,) = subject.once("seeing", rows[:1], lambda items: ask(items, subject))
    return subject.frames(rows[0]["image"]), question, right, answers[-1]


def overall(tasks):
    """{"toolbox": ...}: the mean of the eleven columns, of the model and each control; {} if a test
    is missing."""
    if not all(name in tasks for name, _ in COLUMNS):
        return {}
    means = {}
    for who in ("", *CONTROLS):
        scores, chances = [], []
        for name, measure in COLUMNS:
            own = tasks[name]["all"]
            scores.append(own[key_of(who, measure)]["score"])
            chances.append(own[measure]["chance"])
        mean = {"score": round(float(np.mean(scores)), 4), "n": len(scores), "ci95": None}
        means[who or "mean"] = mean | {"chance": round(float(np.mean(chances)), 4)}
    return {"toolbox": {"all": means}}
