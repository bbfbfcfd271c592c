"""
The ten tests of the DevCV Toolbox, by which BabyLLaVA-V2 is asked what infants are asked: their
wording, how an answer is read, their scores, and two controls beside each.

    python eval.py --checkpoint out/toy_v2/phase3.pt --task toolbox
    python eval.py --checkpoint DIR --task toolbox --json DIR2 --images DIR3    # others' files

A test is a JSON file, NAME.json, of {"image": [...], "conversations": [{"from": "human", "value":
"Touch the image of 'ball' (A)<image> ..."}, {"from": "gpt", "value": "B"}], "subset": "seen"}. The
model answers in its own words, which are read by a rule: `strict`, ours, takes the answer alone and
counts what it cannot read; `published` takes a letter as the original does, traps included: the
word "a" counts as A. (Of numbers and words its rule is not public: the first number, and the
longest answer that is named.)

One control cannot see: the same model, shown the mean of all pictures each time. One cannot read:
it takes the picture most like the one asked about, by 32 x 32 pixels (in Memory, the one least like
all before), or, where there is none, the commonest answer. What a control solves does not test what
its name says.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

import babyvlm
import choice
from config import UserError
from files import read_list
from scores import accuracy
from templates import TEMPLATES, chat_sample, end_tokens, expand


@dataclass(frozen=True)
class Test:
    """prompt: # is a picture, {} what is asked for; of Memory, the later rounds'. answers: what may
    be said. query: the first picture is asked about, the others are to choose from."""

    prompt: str
    answers: tuple
    query: bool = False
    ours: bool = False  # a fairer variant, which the original has not

    @property
    def chance(self):
        return 1 / len(self.answers)


LETTERS = ("A", "B", "C", "D")
SIDES = ("left", "right")
# Round the clock, so that neighbours are adjacent
DIRECTIONS = ("up", "up right", "right", "down right", "down", "down left", "left", "up left")
SAME = "# Which of the following is the same as this? (A) # (B) # (C) #"
NEW = "Touch the new image. "
LATER = "Let's try more. " + NEW + "(A) # (B) #"

TESTS = {
    "picture_vocabulary": Test("Touch the image of '{}' (A)# (B)# (C)# (D)#", LETTERS),
    "localization": Test(
        "# Point at the {}. Is it in the (A) top left or (B) top right or (C) bottom left or "
        "(D) bottom right of the image?",
        LETTERS,
    ),
    "left_right": Test(SAME, LETTERS[:3], query=True),
    "left_right_fair": Test(SAME, LETTERS[:3], query=True, ours=True),
    "spatial_details": Test(
        "# Which of the following contains exactly this object? (A) # (B) # (C) #. Pay attention "
        "to details and give only a letter A-C.",
        LETTERS[:3],
        query=True,
    ),
    "delayed_response": Test(
        "# does the {} leave the frame through the right side of the frame or the left side of "
        "the frame? respond ONLY with 'right' or 'left'.",
        SIDES,
    ),
    # in our words: the original's are not public
    "delayed_response_open": Test(
        "# in which direction does the {} leave the frame? respond ONLY with the direction.",
        DIRECTIONS,
    ),
    "memory": Test(LATER, LETTERS[:2]),
    "memory_fair": Test(LATER, LETTERS[:2], ours=True),
    "more_synthetic": Test("Which image has more {}? Answer (A) # (B) #", LETTERS[:2]),
    "more_natural": Test("Which image has more {}? Answer (A) # (B) #", LETTERS[:2]),
    "subitizing": Test("# How many of {} do you see?", ("1", "2", "3")),
    "object_counting": Test("# How many {} do you see?", tuple(map(str, range(1, 13)))),
    "looking_while_listening": Test("", ()),  # two pictures and two phrases: which belong together?
}
ROUNDS, LEARNT = 15, 5  # of a Memory dialogue; rounds 1 to 5 show a new thing each
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


def write(test, pictures, word=""):
    """The human's words of a test about so many pictures; a clip is a run of <image>."""
    prompt = TESTS[test].prompt.replace("{}", word)
    clip = "<image>" * (pictures + 1 - prompt.count("#"))  # what the first # stands for
    return prompt.replace("#", clip, 1).replace("#", "<image>")


# ---------------------------------------------------------------------------------------------
# Reading files and answers


def check(name, item):
    """Why an item is no question of a test of the Toolbox, or ""."""
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
    return check_pictures(name, asked) or check_answers(name, item)


def check_pictures(name, asked):
    """Why questions that show so many pictures each are none of a test's, or ""."""
    want = [TESTS[name].prompt.count("#")]
    if name.startswith("memory"):
        want = [1] + want * (ROUNDS - 1)
        return "" if asked == want else f"want {ROUNDS} rounds, the first of 1 picture, others of 2"
    if name.startswith("delayed_response"):
        return "" if sum(asked) else "want a clip, one picture at least"
    return "" if asked == want else f"{sum(asked)} pictures, want {want[0]} and one question"


def read(name, path):
    """The items of a test's JSON file. Raises UserError, with file and item."""
    items = read_list(path, "items")
    for i, item in enumerate(items):
        fault = check(name, item)
        if fault:
            raise UserError(f"{path}: item {i}: {fault}")
    return items


def check_answers(name, item):
    """Why the answers of an item are none of a test's, or ""."""
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
    """Which of `answers` was said, or "" where that cannot be told."""
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
    said = re.sub(r"[().!,'\"]", " ", answer)  # marks around it are no words
    said = " ".join(said.split()).lower()
    return {word.lower(): word for word in answers}.get(said, "")


# ---------------------------------------------------------------------------------------------
# The model, and the model that cannot see


def turns_of(row):
    said = [turn["value"] for turn in row["conversations"]]
    return list(zip(said[::2], said[1::2]))


def ask(rows, subject):
    """What the model says: of each row a list, an answer for each of its rounds. Its own answers
    stay in the context; where it has talked that full, it says nothing more, and a line says so."""
    loaded, settings = subject.loaded, subject.settings
    name, system = loaded.choose_template(settings.template)
    template = TEMPLATES[name or "bare"]  # of one that learnt no conversations: the words alone
    stop = end_tokens(loaded.tokenizer, template)
    said, full, room = [[] for _ in rows], 0, loaded.model.gpt.config.block_size
    for number in range(max(len(turns_of(row)) for row in rows)):
        prompts, shown, asked = [], [], []
        for row, own in zip(rows, said):
            questions = [question for question, _ in turns_of(row)][: number + 1]
            if number >= len(turns_of(row)):
                continue
            pictures = sum(question.count("<image>") for question in questions)
            embeds = subject.embeds(row["image"][:pictures])
            turns = [*zip(questions, own), (questions[-1], None)]
            tokens, _ = chat_sample(loaded.tokenizer, template, turns, system)
            tokens = expand(tokens, loaded.tokenizer.image, [len(e) for e in embeds])
            if len(tokens) < room:
                prompts.append(tokens)
                shown.append(embeds)
                asked.append(own)
                continue
            if number == 0:
                raise UserError(
                    f"{pictures} pictures and their question make {len(tokens)} tokens; this model "
                    f"holds {room}, its answer included"
                )
            own.append("")
            full += 1
        answers = choice.answers_to(loaded, prompts, shown, stop, max_new_tokens=10, batch=64)
        for own, answer in zip(asked, answers):
            own.append(answer.replace("<image>", ""))  # a model that knows little may say even that
    if full:
        print(f"{full} rounds did not fit into the context of {room} tokens: they count as unread")
    return said


# ---------------------------------------------------------------------------------------------
# The control that cannot read


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
    """What one answers who looks and cannot read."""
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
        for first in range(1, len(pictures), 2):  # the new one is least like all before
            pair = pictures[first : first + 2]
            far = [min(distance(picture, old) for old in before) for picture in pair]
            own.append(test.answers[int(np.argmax(far))])
            before += pair
        answers.append(own)
    return answers


# ---------------------------------------------------------------------------------------------
# Scores


def hits_of(name, rows, parsed):
    """{measure: (hits, chance)} of what was understood, a list of answers a row."""
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
    """Of each learnt thing, whether both rounds that test it were answered right."""
    pictures, tested = row["image"], {}
    for number in range(LEARNT, ROUNDS):
        first = 2 * number - 1  # round 1 has one picture, the others two
        pair = pictures[first : first + 2]
        old = pair[1 - "AB".index(right[number])]  # the one that is not new
        learnt = row.get("learnt", {}).get(old, old)  # the fair form shows it filmed anew
        tested.setdefault(learnt, []).append(own[number] == right[number])
    return [all(hits) for hits in tested.values()]


class CannotRead:
    """To whom all phrases are as likely as each other."""

    def nll(self, images, phrases):
        return np.zeros(len(images))


def listening(rows, subject, ties):
    """Two pictures, two phrases: is each likelier with its own? By Baby Winoground's group rule."""
    instances = [(*row["image"], *row["phrases"]) for row in rows]
    seeing = babyvlm.winoground(instances, subject, ties)["group"]
    blind = babyvlm.winoground(instances, subject.blinded(), ties)["group"]
    unread = babyvlm.winoground(instances, CannotRead(), ties)["group"]
    return with_mark({"accuracy": seeing, "cannot_see": blind, "cannot_read": unread})


def key_of(control, measure):
    """Under which name a control's score stands beside a measure's."""
    if not control:
        return measure
    return control if measure in ("accuracy", "adjusted") else f"{control}_{measure}"


def with_mark(results):
    """Results in which a measure that a control solves says so: the control is better than chance,
    and no worse than the model's interval."""
    for measure, result in results.items():
        if measure.startswith(CONTROLS) or result["chance"] is None:
            continue
        for control in CONTROLS:
            own = results.get(key_of(control, measure))
            if own and own["ci95"][0] > own["chance"] and own["score"] >= result["ci95"][0]:
                result["solved_by"] = control
    return results


def rule(name):
    """The rule of a test, as eval.TASKS wants it."""

    def score(rows, subject, ties):
        if name == "looking_while_listening":
            return listening(rows, subject, ties)
        read_as = lambda said: [
            [parse(one, TESTS[name].answers, subject.settings.parse) for one in own] for own in said
        ]
        seeing = read_as(subject.once("seeing", rows, lambda all: ask(all, subject)))
        blind = read_as(subject.once("blind", rows, lambda all: ask(all, subject.blinded())))
        pixels = subject.once("pixels", rows, lambda all: by_pixels(name, all, subject))
        results = {}
        for control, parsed in (("", seeing), ("cannot_see", blind), ("cannot_read", pixels)):
            for measure, (hits, chance) in hits_of(name, rows, parsed).items():
                results[key_of(control, measure)] = accuracy(hits, chance)
        unread = [one == "" for own in seeing for one in own]
        return with_mark(results) | {"unread": accuracy(unread, None)}

    return score


def overall(tasks):
    """{"toolbox": ...} with the mean of the eleven columns, and each control's; {} where a test
    was not made."""
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
