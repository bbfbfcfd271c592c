"""
Files of the DevCV Toolbox, as they are published: finding them, reading their items, and reading
answers. Asking and scoring: tasks/toolbox.py.

    python eval.py --checkpoint out/toy_v2/phase3.pt --task toolbox --json DIR

DIR has a file for each test: NAME.json, NAME_test.json or NAME/data.json, under our names or the
published ones (PUBLISHED). A file is a list of {"image": ["images/a.jpg", ...], "conversations":
[{"from": "human", "value": "Touch the image of 'ball' (A)<image> ..."}, {"from": "gpt", "value":
"B"}], "subset": "seen"}, with two fields for Memory: "labels", what each picture of each round
shows, or our "learnt" (see labels_of() in toolbox.py). Number of options, pictures and rounds are
the item's own. Looking While Listening is two pictures and two phrases: {"image", "phrases"}, or
the published baby_winoground.csv.
"""

import re
from collections import defaultdict, namedtuple
from pathlib import Path

from common.files import read_csv, read_list
from config import UserError
from sources.toolbox_prompts import DIRECTIONS, TESTS
from tasks.babyvlm import WINOGROUND_COLUMNS, pair_instances

# The names of each test in the releases for SAYCam, BabyView, Ego4D and NIH, and on the leaderboard
PUBLISHED = {
    "picture_vocabulary": ("pv", "picture_vocab", "picture_vocab_selected"),
    "localization": ("localize",),
    "left_right": ("leftright",),
    "spatial_details": ("spatialdetails", "spatial"),
    "delayed_response": ("vdr_binary", "vdr"),
    "delayed_response_open": ("vdr_open",),
    "memory": (),
    "more_synthetic": ("compare_synthetic", "whohasmore_synthetic", "who_has_more_synthetic"),
    "more_natural": ("compare_real", "whohasmore_naturalistic", "whohasmore", "who_has_more"),
    "subitizing": ("subitize",),
    "object_counting": ("count",),
    "looking_while_listening": ("baby_winoground", "winoground"),
}


def known_name(name):
    """Our name of a test that is called `name` in a release, or ""."""
    name = re.sub(r"[-\s]", "_", name.lower())
    short = name.removeprefix("baby_")
    for test in TESTS:
        names = (test, *PUBLISHED.get(test, ()))
        if name in names or short in names:
            return test
    return ""


# ---------------------------------------------------------------------------------------------
# Finding files


def candidates(directory):
    """Yield (name, split, path) of the files in a folder that could be tests; split: "test",
    "val", "train", or "" if the name does not say it."""
    for path in sorted(Path(directory).iterdir()):
        name, _, split = path.stem.rpartition("_")
        if split not in ("test", "val", "train"):
            name, split = path.stem, ""
        if path.is_dir():
            inside = [path / "data.json", path / f"{path.name}.json", path / f"{path.name}.csv"]
            for file in inside:
                if file.is_file():
                    yield path.name, "", file
        elif path.suffix == ".json" or (path.suffix == ".csv" and name == "baby_winoground"):
            yield name, split, path


def has_listening(directory):
    """Whether a folder has our own looking_while_listening.json: then its baby_winoground.csv, of
    the toy world, is another test."""
    return (Path(directory) / "looking_while_listening.json").exists()


def find_tests(directory):
    """[(key, test, path)] of the Toolbox's tests in a folder, in the order of TESTS. The key is the
    test's name; a second file of a test (NIH has two of Picture Vocabulary) is keyed by its file
    name. The first split found is used: test, unnamed, val, train.

    Raises UserError if there are none, or two files of one name in two layouts."""
    found, others = defaultdict(dict), []
    if not Path(directory).is_dir():
        raise UserError(f"--json {directory}: no such folder")
    for name, split, path in candidates(directory):
        test = known_name(name)
        if path.suffix == ".csv" and has_listening(directory):
            continue
        if not test:
            others.append(path)
        elif (name, split) in found[test]:
            raise UserError(f"{found[test][name, split]} and {path} are the same test: keep one")
        else:
            found[test][name, split] = path
    tests = []
    for test in TESTS:
        chosen = {}
        for split in ("test", "", "val", "train"):
            for (name, own), path in found[test].items():
                if own == split:
                    chosen.setdefault(name, path)
        names = sorted(chosen, key=lambda name: (name != test, name))  # our own name first
        for number, name in enumerate(names):
            tests.append((name if number else test, test, chosen[name]))
    if not tests:
        splits = [name for name in ("test", "val", "train") if (Path(directory) / name).is_dir()]
        hint = f"; give {Path(directory) / splits[0]}" if splits else ""
        names = ", ".join(f"{name}.json" for name in TESTS)
        raise UserError(f"{directory}: none of {names}, nor the published names{hint}")
    known = ("choice", "MANIFEST")  # of the toy worlds, and of the published samples
    for path in others:
        if path.stem not in known:
            print(f"{path}: not a test of the Toolbox by its name: left out")
    return tests


# ---------------------------------------------------------------------------------------------
# Reading answers

# A question of an item: its text, with <image>s; its options, or () if the answer is a number; and
# the right answer
Round = namedtuple("Round", "question options answer")
SPELLED = "zero one two three four five six seven eight nine ten".split()


def read_options(question):
    """The options that a question offers: letters for "(A) <image> (B) <image>", words for "respond
    ONLY with 'right' or 'left'.", else (), a number."""
    letters = []
    for letter in re.findall(r"\(([A-Z])\)", question):
        if letter == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[len(letters)]:
            letters.append(letter)
    if letters:
        return tuple(letters)
    _, _, offered = question.partition("ONLY")  # as in "respond ONLY with 'right' or 'left'."
    return tuple(dict.fromkeys(re.findall(r"['‘\"“]([^'‘’\"“”]+)['’\"”]", offered)))


def parse(reply, options, rule):
    """Which option a reply means, or which number, as text; "" if it cannot be read.

    rule strict: the reply is the option alone, but for punctuation and case. published, as in
    BabyLLaVA-V2's code: the first letter A to D that stands alone ("a ball" is an A); the first
    number in digits or spelled ("three" is 3, "007" is 7); of words the whole reply."""
    if rule == "published":
        if not options:
            return first_number(reply)
        if options[0] == "A":
            found = re.search(r"\b[A-Da-d]\b", reply)
            return found.group().upper() if found else ""
        reply = reply.strip().lower()
    else:
        reply = " ".join(re.sub(r"[().!,'\"]", " ", reply).split()).lower()
    if not options:
        return reply if re.fullmatch(r"0|[1-9][0-9]*", reply) else ""
    words = options
    if rule == "published" and options[0] in DIRECTIONS:
        words = DIRECTIONS  # a neighbour of the right one counts there, offered or not
    return {word.lower(): word for word in words}.get(reply, "")


def first_number(reply):
    """The first number of a text, in digits or spelled, zero to ten, as digits; or ""."""
    for token in re.findall(r"\d+|[a-zA-Z]+", reply.lower()):
        if token.isdigit():
            return str(int(token[:1000]))  # int() refuses longer ones than 4,300
        if token in SPELLED:
            return str(SPELLED.index(token))
    return ""


# ---------------------------------------------------------------------------------------------
# Reading items


def read_items(test, path, skip=False):
    """The rows of a test's file: dicts with "image", the names of its pictures, "rounds", a list of
    Round, and "subset", "labels", "learnt" where the item has them. Looking While Listening has
    "phrases" instead of rounds.

    skip: leave out items that cannot be scored, and print how many. Raises UserError, with file
    and item."""
    if test == "looking_while_listening" and str(path).endswith(".csv"):
        rows = read_csv(path, WINOGROUND_COLUMNS, ("positive_phrase", "negative_phrase"))
        return [
            {"image": [positive, negative], "phrases": [phrase, foil]}
            for positive, negative, phrase, foil in pair_instances(rows)
        ]
    rows, faults, bare = [], [], []
    for i, item in enumerate(read_list(path, "items")):
        try:
            row = read_item(test, item)
        except ValueError as error:
            faults.append(f"item {i}: {error}")
            if not skip:
                raise UserError(
                    f"{path}: item {i}: {error}; --skip leaves such items out"
                ) from None
            continue
        rows.append(row)
        bare += [i] if row.pop("bare", False) else []
    if faults:
        print(f"{path}: {len(faults)} items left out, which cannot be scored; {faults[0]}")
    if bare:
        what = f"{path}: {len(bare)} items have pictures and no <image>, item {bare[0]} first"
        print(f"{what}: their pictures are put before the question, as the original does")
    if not rows:
        raise UserError(f"{path}: no item can be scored")
    warn_of_equal_pictures(path, rows)
    return rows


def read_item(test, item):
    """The row of an item, see read_items(). Raises ValueError with the reason if it is none."""
    if not isinstance(item, dict) or not item.get("image"):
        raise ValueError('want {"image": [...], "conversations": [...]}')
    images = [item["image"]] if isinstance(item["image"], str) else item["image"]
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise ValueError("its image must be a name, or a list of names")
    if not isinstance(item.get("subset") or "", str):
        raise ValueError("its subset must be a name")
    row = {"image": images, "subset": item.get("subset") or ""}
    if test == "looking_while_listening":
        phrases = item.get("phrases")
        whole = isinstance(phrases, list) and all(isinstance(p, str) and p for p in phrases)
        if not (whole and len(phrases) == len(images) == 2):
            raise ValueError("want two pictures and two phrases")
        return row | {"phrases": phrases}
    turns = read_turns(item.get("conversations"))
    asked = [question.count("<image>") for question, _ in turns]
    if not any(asked) and len(turns) == 1:
        turns = [(" ".join(["<image>"] * len(images)) + "\n" + turns[0][0], turns[0][1])]
        asked, row["bare"] = [len(images)], True
    if sum(asked) != len(images):
        raise ValueError(f"{sum(asked)} <image> for {len(images)} pictures")
    row["rounds"] = [read_round(test, *turn) for turn in turns]
    if test.startswith("memory"):
        check_memory(item, asked, row["rounds"])
        row |= {key: item[key] for key in ("labels", "learnt") if item.get(key)}
    elif len(turns) > 1:
        raise ValueError(f"{len(turns)} questions, want one")
    else:
        check_pictures(test, len(images), len(row["rounds"][0].options))
    return row


def read_turns(turns):
    """[(question, answer)] of an item's conversation. Raises ValueError."""
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError("want a conversation of human and gpt in turn")
    for i, turn in enumerate(turns):
        whole = isinstance(turn, dict) and isinstance(turn.get("value"), str)
        if not whole or turn.get("from") != ("human", "gpt")[i % 2]:
            raise ValueError(f'turn {i} is no {{"from": "{("human", "gpt")[i % 2]}", "value"}}')
    said = [turn["value"] for turn in turns]
    return list(zip(said[::2], said[1::2]))


def read_round(test, question, answer):
    """The Round of a question and its right answer. Raises ValueError if it does not fit a test."""
    numbers = test in ("object_counting", "subitizing")
    options = () if numbers else read_options(question)
    if not numbers and not options:
        raise ValueError("its question offers no options: want (A) (B) ..., or ONLY with '...'")
    if options and options[0] != "A" and not test.startswith("delayed_response"):
        raise ValueError("want options (A) (B) ...")
    if test.startswith("delayed_response") and options and options[0] != "A":
        foreign = [option for option in options if option not in DIRECTIONS]
        if foreign:
            raise ValueError(f"{foreign[0]!r} is no direction: want {', '.join(DIRECTIONS)}")
    right = parse(answer, options, "strict")
    if not right or (options and right not in options):
        wanted = ", ".join(options) or "a number"
        raise ValueError(f"{answer!r} is no answer: want {wanted}")
    return Round(question, options, right)


def check_pictures(test, pictures, options):
    """Raise ValueError if so many pictures do not fit a test's question. All pictures on one sheet
    fit, as in NIH's Picture Vocabulary."""
    wanted = None
    if TESTS[test].query:
        wanted = options + 1
    elif test.startswith(("picture", "more")):
        wanted = options
    if wanted and pictures not in (1, wanted):
        raise ValueError(f"{pictures} pictures, want {wanted} and one question")


def check_memory(item, asked, rounds):
    """Raise ValueError if an item is no Memory dialogue. asked: pictures of each round."""
    if len(asked) < 3 or asked[0] != 1 or set(asked[1:]) != {2}:
        raise ValueError("want 3 rounds or more, the first of 1 picture, others of 2")
    if any(len(round_.options) != count for round_, count in zip(rounds, asked)):
        raise ValueError("each round wants a letter for each of its pictures: (A) or (A) (B)")
    labels, learnt = item.get("labels"), item.get("learnt")
    if labels and not (
        isinstance(labels, list)
        and len(labels) == len(asked)
        and all(isinstance(own, list) and all(isinstance(w, str) for w in own) for own in labels)
    ):
        raise ValueError(f"its labels must be {len(asked)} lists of names, one for each round")
    names = set(item["image"])
    if learnt and not (isinstance(learnt, dict) and {*learnt, *map(str, learnt.values())} <= names):
        raise ValueError("its learnt must be {picture: the picture of the same thing}")


def warn_of_equal_pictures(path, rows):
    """Print how many items offer one file as every option: nobody can answer them."""
    equal = [
        i
        for i, row in enumerate(rows)
        if len(row["image"]) > 2 and len(set(row["image"])) == 1 and offers_letters(row)
    ]
    if equal:
        what = f"{path}: {len(equal)} items offer one file as every option, item {equal[0]} first"
        print(f"{what}: they have no answer")


def offers_letters(row):
    return "rounds" in row and row["rounds"][0].options[:1] == ("A",)
