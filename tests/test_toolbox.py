"""The ten tests of the Toolbox: answers read, scores against slow loops, both controls, and the
toy world's items true to their pictures."""

import hashlib
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image

import eval as evaluation
import train
from config import UserError
from data import Data
from sources import command, toolbox_prompts, toy, toy_games, toy_items
from sources.toolbox_prompts import DIRECTIONS, LEARNT, LETTERS, ROUNDS, TESTS, opposite
from sources.toy import THINGS, Thing
from sources.toy_chat import article
from tasks import toolbox
from tasks.toolbox import make_rule, score_answers
from tasks.toolbox_files import Round, parse, read_items

FLAGS = (
    "--size=16 --scenes=12 --clips=12 --moments=12 --lines=200 --items=20 --games=62 "
    "--replay=20 --questions=10"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    import os

    folder, before = tmp_path_factory.mktemp("v2"), os.getcwd()
    os.chdir(folder)
    command.main(["toy_v2", *FLAGS.split(), "--vocab_size=400"])
    os.chdir(before)
    return folder / "data" / "toy_v2"


# ---------------------------------------------------------------------------------------------
# Reading answers


@pytest.mark.parametrize(
    "said, strict, published",
    [
        ("B", "B", "B"),
        ("(b).", "B", "B"),
        ("a ball", "", "A"),  # the original's trap: the word "a" is an A
        ("the answer is C", "", "C"),
        ("E", "", ""),
        ("", "", ""),
        ("AB", "", ""),
    ],
)
def test_letters(said, strict, published):
    assert parse(said, LETTERS, "strict") == strict
    assert parse(said, LETTERS, "published") == published


@pytest.mark.parametrize(
    "said, strict, published",
    [
        ("12", "12", "12"),
        ("1 2", "", "1"),
        ("i see 3 .", "", "3"),
        ("3.", "3", "3"),
        ("13", "13", "13"),
        ("0", "0", "0"),
        ("007", "", "7"),
        ("Two", "", "2"),
        ("i see three cups", "", "3"),
        ("ten 4", "", "10"),
        ("b2b", "", "2"),
        ("eleven", "", ""),
        ("9" * 5000, "9" * 5000, "9" * 1000),  # more digits than int() takes
        ("none", "", ""),
    ],
)
def test_numbers(said, strict, published):
    assert parse(said, (), "strict") == strict
    assert parse(said, (), "published") == published


def test_directions():
    for said, strict, published in [
        ("top left", "top left", "top left"),
        (" Top Left ", "top left", "top left"),
        ("top left .", "top left", ""),  # a full stop loses the point there
        ("it goes top left", "", ""),
        ("left or right", "", ""),
        ("up", "", ""),
    ]:
        assert parse(said, DIRECTIONS, "strict") == strict, said
        assert parse(said, DIRECTIONS, "published") == published, said
    assert parse("Right.", ("left", "right"), "strict") == "right"
    assert parse("top", ("left", "right"), "strict") == ""


def test_every_answer_is_read_as_itself_by_both_rules():
    for name, test in TESTS.items():
        options = () if name in NUMBERS else test.answers
        for answer, rule in itertools.product(test.answers, ("strict", "published")):
            assert parse(answer, options, rule) == answer


# ---------------------------------------------------------------------------------------------
# Against scorers written here a second time, by the published rules, slowly

NUMBERS = ("subitizing", "object_counting")
LETTER = "abcdABCD"
WORDS = "zero one two three four five six seven eight nine ten".split()
JUNK = ["a", "B", "c.", "(D)", "E", "ab", "a ball", "the", "top", "left", "top left",
        "Bottom Right", "7", "07", "12", "three", "Ten", "eleven", "4th", "x9", "", " ", "?",
        "I see", "\n", "_a",
        "a_b", "right .", "é", "bottom-left"]  # fmt: skip


def slow_letter(reply):
    """The first of A to D with no letter, digit or _ on either side."""
    is_word = lambda c: c.isalnum() or c == "_"
    for i, c in enumerate(reply):
        before, after = reply[i - 1 : i], reply[i + 1 : i + 2]
        if c in LETTER and not (before and is_word(before)) and not (after and is_word(after)):
            return c.upper()
    return None


def slow_number(reply):
    """The first run of digits, or of letters that spells a number."""
    run, kind = "", ""
    for c in reply.lower() + " ":
        own = "digit" if c.isdigit() else "letter" if "a" <= c <= "z" else ""
        if own != kind and run:
            if kind == "digit":
                return int(run)
            if run in WORDS:
                return WORDS.index(run)
        run = (run if own == kind else "") + (c if own else "")
        kind = own
    return None


def random_replies(count=10_000):
    rng = np.random.RandomState(0)
    for _ in range(count):
        parts = [JUNK[rng.randint(len(JUNK))] for _ in range(rng.randint(1, 5))]
        yield (" " if rng.randint(3) else "").join(parts)


def test_published_rules_equal_slow_ones_on_random_replies():
    around = {
        "left": "top left, left, bottom left", "right": "top right, right, bottom right",
        "top": "top left, top, top right", "bottom": "bottom left, bottom, bottom right",
        "top right": "top, top right, right", "top left": "top, top left, left",
        "bottom right": "bottom, bottom right, right", "bottom left": "bottom, bottom left, left",
    }  # fmt: skip
    read = 0
    for number, reply in enumerate(random_replies()):
        assert (parse(reply, LETTERS, "published") or None) == slow_letter(reply), reply
        found = parse(reply, (), "published")
        assert (int(found) if found else None) == slow_number(reply), reply
        truth = DIRECTIONS[number % 8]
        asked = [row([truth], options=DIRECTIONS)]
        own = [[parse(reply, DIRECTIONS, "published")]]
        results = score_answers("delayed_response_open", asked, own, "published")
        whole = reply.strip().lower()
        assert results["exact"]["score"] == (whole == truth), reply
        assert results["adjacent"]["score"] == (whole in around[truth].split(", ")), reply
        read += bool(own[0][0])
    assert read > 300


def slow_memory(predicted, right, labels):
    """The adjusted accuracy of a dialogue, by the published code's rule."""
    base, hits = (len(predicted) + 1) // 3, 0
    learnt = set().union(*map(set, labels[:base]))
    for label in learnt:
        rounds = [i for i in range(base, len(labels)) if label in labels[i]]
        hits += len(rounds) == 2 and all(predicted[i] == right[i] for i in rounds)
    return hits / base


@pytest.mark.parametrize("things", [5, 10])
def test_memory_equals_the_published_rule(things):
    """Of 15 rounds and of NIH's 30; some dialogues have a thing that comes a third time."""
    rng, rows, said, slow = np.random.RandomState(things), [], [], []
    for seed in range(100):
        images, answers, labels = dialogue(seed, things)
        if seed % 3 == 0:  # the last round shows another thing than it should
            labels[-1] = labels[-2]
        rows.append(row(answers, images, options=("A", "B"), labels=labels))
        said.append([LETTERS[rng.randint(2)] for _ in answers])
        slow.append(slow_memory(said[-1], answers, labels))
    results = score_answers("memory", rows, said, "published", [r["labels"] for r in rows])
    assert results["adjusted"]["score"] == pytest.approx(np.mean(slow), abs=1e-4)
    hits = [
        [a == b for a, b in zip(own, [r.answer for r in one["rounds"]])]
        for own, one in zip(said, rows)
    ]
    assert results["learning"]["score"] == pytest.approx(
        np.mean([h[:things] for h in hits]), abs=1e-4
    )
    assert results["testing"]["score"] == pytest.approx(
        np.mean([h[things:] for h in hits]), abs=1e-4
    )
    assert results["adjusted"]["n"] == 100 * things
    strict = score_answers("memory", rows, said, "strict", [r["labels"] for r in rows])
    assert strict["adjusted"]["n"] < results["adjusted"]["n"]  # without what cannot be tested


# ---------------------------------------------------------------------------------------------
# Scores: what is always right, always one answer, or thrown, against counted sets


def row(answers, images=None, options=LETTERS, **more):
    rounds = [Round("<image>", options, answer) for answer in answers]
    return {"rounds": rounds, "image": images or []} | more


SINGLE = [name for name in TESTS if TESTS[name].answers and not name.startswith("memory")]


def offered(name, answer):
    """The options beside this answer, as the test's questions offer them."""
    if name == "delayed_response":
        return (answer, opposite(answer))
    return () if name in NUMBERS else TESTS[name].answers


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("rule", ["strict", "published"])
def test_right_constant_and_wrong_answers_score_what_they_must(name, rule):
    answers = TESTS[name].answers
    rows = [row([answer], options=offered(name, answer)) for answer in answers for _ in range(3)]
    right = [[answer] for answer in answers for _ in range(3)]
    for measure, result in score_answers(name, rows, right, rule).items():
        assert result["score"] == 1 and (0 < result["chance"] < 1), measure
    constant = score_answers(name, rows, [[answers[0]]] * len(rows), rule)
    share = {"adjacent": 3 / 8}  # as balanced as the answers are
    for measure, result in constant.items():
        assert result["score"] == pytest.approx(share.get(measure, 1 / len(answers)), abs=1e-4)
    for result in score_answers(name, rows, [[""]] * len(rows), rule).values():
        assert result["score"] == 0


@pytest.mark.parametrize("name", SINGLE)
def test_thrown_answers_score_chance(name):
    rng, answers = np.random.RandomState(0), TESTS[name].answers
    rows = [row([a], options=offered(name, a)) for a in rng.choice(answers, 6000).tolist()]
    thrown = [[rng.choice(r["rounds"][0].options or answers)] for r in rows]
    for result in score_answers(name, rows, thrown, "strict").values():
        assert result["score"] == pytest.approx(result["chance"], abs=0.02)


def test_neighbours_on_the_clock_are_adjacent():
    rows = [row(["top"], options=DIRECTIONS)]
    near = [
        score_answers("delayed_response_open", rows, [[word]], "strict")["adjacent"]["score"]
        for word in DIRECTIONS
    ]
    assert near == [1, 1, 0, 0, 0, 0, 0, 1]


def dialogue(seed, things=LEARNT):
    """A Memory dialogue by the rule as the paper has it, made here in another way: (pictures,
    answers, labels)."""
    rng = np.random.RandomState(seed)
    images, answers, labels, fresh = ["t0"], ["A"], [["t0"]], 0
    rounds = [(f"t{i - 1}", f"t{i}") for i in range(1, things)]
    for i in rng.permutation(list(range(things)) * 2):
        rounds.append((f"t{i}", f"n{fresh}"))
        fresh += 1
    for old, new in rounds:
        first = rng.randint(2)
        images += [new, old] if first else [old, new]
        labels.append(images[-2:])
        answers.append("A" if first else "B")
    return images, answers, labels


def adjusted(rows, said, labels):
    """The number of things that both rounds found, and of all things."""
    result = score_answers("memory", rows, said, "strict", labels)["adjusted"]
    return round(result["score"] * result["n"]), result["n"]


def test_memory_wants_both_rounds_of_a_thing():
    images, answers, labels = dialogue(3)
    assert len(images) == 29 and len(answers) == ROUNDS
    one = row(answers, images)
    assert adjusted([one], [answers], [labels]) == (LEARNT, LEARNT)
    wrong = list(answers)
    wrong[7] = "B" if wrong[7] == "A" else "A"
    assert adjusted([one], [wrong], [labels]) == (LEARNT - 1, LEARNT)  # one thing of five is lost
    testing = score_answers("memory", [one], [wrong], "strict", [labels])["testing"]
    assert testing["score"] == 0.9
    early = ["B", "A", "A", "A", "A", *answers[5:]]  # the learning rounds do not count
    assert adjusted([one], [early], [labels]) == (LEARNT, LEARNT)


def test_thrown_answers_score_a_quarter_in_memory():
    rng, rows, thrown, all_labels = np.random.RandomState(0), [], [], []
    for seed in range(600):
        images, answers, labels = dialogue(seed)
        rows.append(row(answers, images))
        thrown.append([LETTERS[rng.randint(2)] for _ in answers])
        all_labels.append(labels)
    hits, n = adjusted(rows, thrown, all_labels)
    assert n == 600 * LEARNT and hits / n == pytest.approx(0.25, abs=0.02)


def test_a_constant_answer_never_finds_both_pictures_of_a_thing_but_by_chance():
    """All that a constant A can hit of 600 dialogues, counted another way."""
    rows, both, all_labels = [], [], []
    for seed in range(600):
        images, answers, labels = dialogue(seed)
        rows.append(row(answers, images))
        all_labels.append(labels)
        for thing in {images[0], *images[1:9:2], *images[2:9:2]}:
            own = [
                answers[number]
                for number in range(LEARNT, ROUNDS)
                if thing in images[2 * number - 1 : 2 * number + 1]
            ]
            both.append(own == ["A", "A"])
    hits, n = adjusted(rows, [["A"] * ROUNDS] * 600, all_labels)
    assert n == len(both) == 600 * LEARNT and hits == sum(both)
    assert hits / n == pytest.approx(0.25, abs=0.02)


class Listener:
    """A Subject whose log-likelihoods are given: nll(image, phrase)."""

    def __init__(self, nll):
        self.one = nll

    def nll(self, images, phrases):
        return np.array([self.one(*pair) for pair in zip(images, phrases)])

    def blinded(self):
        return Listener(lambda image, phrase: self.one("", phrase))


@pytest.mark.parametrize(
    "nll, score, cannot_see",
    [
        (lambda image, phrase: float(image[-1:] != phrase[-1:]), 1, 1 / 6),  # the right answer
        (lambda image, phrase: float(image[-1:] == phrase[-1:]), 0, 1 / 6),  # the wrong one
        (lambda image, phrase: 1.0, 1 / 6, 1 / 6),  # always the same
    ],
)
def test_listening_scores_what_it_must(nll, score, cannot_see):
    rows = [{"image": [f"{i}a", f"{i}b"], "phrases": ["an a", "a b"]} for i in range(20)]
    results = toolbox.listening(rows, Listener(nll), "fair")
    assert results["accuracy"]["score"] == pytest.approx(score, abs=1e-4)
    assert results["cannot_see"]["score"] == pytest.approx(cannot_see, abs=1e-4)
    assert results["cannot_read"]["score"] == pytest.approx(1 / 6, abs=1e-4)
    assert "solved_by" not in results["accuracy"]


def test_thrown_likelihoods_score_a_sixth():
    rng = np.random.RandomState(0)
    rows = [{"image": [f"{i}a", f"{i}b"], "phrases": ["an a", "a b"]} for i in range(6000)]
    results = toolbox.listening(rows, Listener(lambda image, phrase: rng.rand()), "fair")
    assert results["accuracy"]["score"] == pytest.approx(1 / 6, abs=0.02)


# ---------------------------------------------------------------------------------------------
# The controls


def asked(name, rows, frames, answers):
    """The results of a test whose model gives these answers, without a model."""
    settings = SimpleNamespace(parse="strict", skip=False)
    subject = SimpleNamespace(
        settings=settings,
        digest=lambda name: hashlib.sha256(frames[name]).hexdigest(),
        frames=lambda names: np.stack([frames[name] for name in names]),
        once=lambda key, rows, make: {
            "seeing": lambda: answers,
            "blind": lambda: [[""] * len(one) for one in answers],
            "pixels": lambda: make(rows),
            "labels": lambda: make(rows),
        }[key](),
    )
    return make_rule(name)(rows, subject, "fair")


def noise(seed, size=64):
    return np.random.RandomState(seed).randint(0, 256, (size, size, 3), np.uint8)


def test_who_cannot_read_finds_an_identical_picture_and_no_more():
    frames, rows = {}, []
    for i in range(30):
        frames |= {f"q{i}": noise(i), f"m{i}": noise(i)[:, ::-1]}
        place = i % 3
        options = [f"m{i}"] * 3
        options[place] = f"q{i}"
        rows.append(row([LETTERS[place]], [f"q{i}", *options], LETTERS[:3]))
    wrong = [["A" if r["rounds"][0].answer != "A" else "B"] for r in rows]
    results = asked("left_right", rows, frames, wrong)
    assert results["cannot_read"]["score"] == 1 and results["accuracy"]["score"] == 0
    assert results["accuracy"]["solved_by"] == "cannot_read"
    other = [row([LETTERS[i % 3]], [f"q{i}", *[f"m{i}"] * 3], LETTERS[:3]) for i in range(30)]
    assert asked("left_right", other, frames, wrong)["cannot_read"]["score"] < 0.5


def test_who_cannot_read_remembers_pictures():
    frames, rows = {}, []
    for seed in range(4):
        images, answers, _ = dialogue(seed)
        own = [f"{seed}{name}" for name in images]
        frames |= {name: noise(hash(name) % (1 << 30)) for name in set(own)}
        one = row(answers, own, ("A", "B"))
        pictures = ["<image>"] + ["<image><image>"] * (ROUNDS - 1)
        one["rounds"] = [r._replace(question=p) for r, p in zip(one["rounds"], pictures)]
        rows.append(one)
    said = [[""] * ROUNDS for _ in rows]
    results = asked("memory", rows, frames, said)
    assert results["cannot_read"]["score"] == 1 and results["unread"]["score"] == 1


def test_who_cannot_read_says_what_is_commonest():
    rows = [row([number], options=()) for number in ("2", "3", "3", "1")]
    results = asked("subitizing", rows, {}, [["2"], ["3"], ["3"], ["1"]])
    assert results["cannot_read"]["score"] == 0.5 and results["accuracy"]["score"] == 1
    assert "solved_by" not in results["accuracy"]


def test_overall_is_the_mean_of_eleven_columns():
    one = {"score": 0.5, "n": 1, "chance": 0.25, "ci95": None}
    keys = [toolbox.key_of(c, m) for c in ("", *toolbox.CONTROLS) for _, m in toolbox.PAPER_COLUMNS]
    tasks = {name: {"all": dict.fromkeys(keys, one)} for name, _ in toolbox.PAPER_COLUMNS}
    tasks["object_counting"]["all"] = dict.fromkeys(keys, one | {"score": 1.0})
    means = toolbox.overall(tasks)["toolbox"]["all"]
    assert means["mean"]["n"] == 11 and means["mean"]["score"] == pytest.approx(6 / 11, abs=1e-4)
    del tasks["memory"]
    assert toolbox.overall(tasks) == {}


# ---------------------------------------------------------------------------------------------
# The toy world's items


def test_items_fit_their_tests(made):
    for name in TESTS:
        items = read_items(name, made / "eval" / f"{name}.json")
        assert {item["subset"] for item in items} == {"seen", "held_out"}
        for item in items:
            assert all((made / "eval" / "images" / image).exists() for image in item["image"])
        pictures = [len(item["image"]) for item in items]
        if name.startswith("memory"):
            assert set(pictures) == {29}
        if name.startswith("delayed"):
            assert set(pictures) <= {5, 6, 7, 8, 9}


def test_the_wording_is_the_originals():
    say = toolbox_prompts.write
    assert say("picture_vocabulary", 4, "basket") == (
        "Touch the image of 'basket' (A)<image> (B)<image> (C)<image> (D)<image>"
    )
    assert say("left_right", 4) == (
        "<image> Which of the following is the same as this? (A) <image> (B) <image> (C) <image>"
    )
    assert say("delayed_response", 5, "lamp") == (
        "<image>" * 5 + " does the lamp leave the frame through the right side of the frame or the "
        "left side of the frame? respond ONLY with 'right' or 'left'."
    )
    assert say("delayed_response", 5, "bag", ("top left", "bottom right")).endswith(
        "through the top left corner of the frame or the bottom right corner of the frame? respond "
        "ONLY with 'top left' or 'bottom right'."
    )
    assert say("memory", 2) == "Let's try more. Touch the new image. (A) <image> (B) <image>"
    assert say("more_natural", 2, "cups") == (
        "Which image has more cups? Answer (A) <image> (B) <image>"
    )


def test_no_test_picture_is_in_training_and_no_pair_held_out(made):
    dataset = Data(made)
    seen = set()
    for split in ("train", "val", "chat_train", "chat_val"):
        frames = dataset.open(split, "frames")
        seen |= {hashlib.sha256(frame.tobytes()).digest() for frame in frames}
    for path in (made / "eval" / "images").glob("*.png"):
        frame = np.asarray(Image.open(path))
        assert hashlib.sha256(frame.tobytes()).digest() not in seen
    names = {
        Thing(kind, colour).name
        for kind, colour in itertools.product(THINGS, toy.COLOURS)
        if toy.held_out(Thing(kind, colour))
    }
    assert len(names) == 16
    for split in ("train", "chat_train"):
        said = dataset.tokenizer.decode(dataset.open(split, "tokens"))
        assert not any(f" {name} " in said for name in names)


def album(held_out=False, size=64):
    """An Album that remembers what was drawn: {number: frame}."""
    frames = []

    def keep(frame, new_clip):
        frames.append(np.array(frame))
        return len(frames) - 1

    return toy_items.Album(keep, np.random.RandomState(0), size, held_out), frames


def test_left_right_shows_the_same_picture_once_and_its_mirror_image_twice():
    some, frames = album()
    for _ in range(10):
        pictures, [(_, letter)], _ = toy_items.left_right("left_right", some)
        query, *options = (frames[i] for i in pictures)
        for option, name in zip(options, LETTERS):
            same = query if name == letter else query[:, ::-1]
            assert (option == same).all()


def test_the_fair_form_has_no_identical_picture():
    some, frames = album()
    for _ in range(10):
        pictures, _, _ = toy_items.left_right_fair("left_right_fair", some)
        for a, b in itertools.combinations(pictures, 2):
            assert (frames[a] != frames[b]).any()
            assert (frames[a] != frames[b][:, ::-1]).any()


def test_what_faces_has_a_mirror_image_of_its_own():
    """Drawn in the middle, without tilt: the mirror image is another picture, and one thing drawn
    mirrored is the mirror image of the other drawn plain."""
    for kind in toy_items.FACING:
        views = [
            toy_items.paint(
                [toy_items.Placed(Thing(kind, "red"), 0.5, 0.5, 0.8, 0.0, mirrored)],
                np.random.RandomState(0),
                64,
            ).astype(int)
            for mirrored in (0, 1)
        ]
        apart = np.abs(views[0] - views[0][:, ::-1]).mean()
        alike = np.abs(views[0] - views[1][:, ::-1]).mean()
        assert apart > 3 * alike, kind


def test_memory_items_follow_the_dialogues_rule():
    some, _ = album()
    for name in ("memory", "memory_fair"):
        pictures, turns, more = toy_items.memory(name, some)
        assert len(turns) == ROUNDS and len(pictures) == 29
        learnt = more.get("learnt", {})
        seen, times = [pictures[0]], {}
        for number, (_, letter) in enumerate(turns[1:], 1):
            pair = pictures[2 * number - 1 : 2 * number + 1]
            new, old = pair if letter == "A" else pair[::-1]
            old = learnt.get(old, old)
            assert new not in seen and old in seen
            if number >= LEARNT:
                times[old] = times.get(old, 0) + 1
            seen += [new]
        assert sorted(times.values()) == [2] * LEARNT


def test_memory_is_trained_on_in_dialogues_of_every_length():
    """Of each length as many rounds in all."""
    some, _ = album()
    rounds = [len(toy_items.some_memory("memory", some)[1]) for _ in range(1000)]
    lengths, times = np.unique(rounds, return_counts=True)
    assert lengths.tolist() == [3, 6, 9, 12, ROUNDS]
    shares = lengths * times / sum(rounds)
    assert (abs(shares - 0.2) < 0.06).all()


GAMES = [game for _, *games in toy_games.STAGES for game in games]


class Shown(toy_items.Album):
    """An Album whose pictures are what they show, and a number."""

    def __init__(self, seed):
        super().__init__(None, np.random.RandomState(seed), 64)
        self.numbers = itertools.count()

    def paint(self, placed, room=None, light=1.0):
        return placed[0].thing, next(self.numbers)


def answers(turns):
    """[(first word, the name after it)] of answers picture by picture; then the letter, if any."""
    said = [answer for _, answer in turns]
    ends = [] if " , " in said[-1] else [said.pop()]
    return [tuple(answer[:-2].split(" , ")) for answer in said] + ends


def one_by_one(rights, things):
    """What answers() must find in a game, and the letter of the one that is right."""
    assert sum(rights) == 1
    names = [article(thing.kind) for thing in things]
    words = ["yes" if right else "no" for right in rights]
    return [*zip(words, names), LETTERS[rights.index(True)]]


@pytest.mark.parametrize("seed", range(20))
def test_games_are_true_to_their_pictures(seed):
    pictures, turns = toy_games.is_it(Shown(seed))
    things, words = [thing for thing, _ in pictures], turns[0][0].replace("'", " ").split()
    want = [("yes" if thing.kind in words else "no", article(thing.kind)) for thing in things]
    assert answers(turns) == want

    pictures, turns = toy_games.touch(Shown(seed))
    things, kind = [thing for thing, _ in pictures], turns[0][0].split("'")[1]
    assert answers(turns) == one_by_one([thing.kind == kind for thing in things], things)

    (first, *others), turns = toy_games.is_same(Shown(seed))
    things = [thing for thing, _ in others]
    assert answers(turns) == one_by_one([picture == first for picture in others], things)
    (first, *others), [(_, letter)] = toy_games.is_same(Shown(seed), at_once=True)
    assert others[LETTERS.index(letter)] == first and others.count(first) == 1

    pictures, turns = toy_games.is_new(Shown(seed))
    for round_ in range(3):
        before = pictures[: 2 * round_ - 6]
        pair = pictures[len(before) : len(before) + 2]
        new = [picture not in before for picture in pair]
        words = [("new" if is_new else "again", article(p[0].kind)) for is_new, p in zip(new, pair)]
        assert answers(turns[3 * round_ : 3 * round_ + 3]) == [*words, LETTERS[new.index(True)]]
        assert sum(new) == 1


@pytest.mark.parametrize("seed", range(20))
def test_what_is_counted_in_a_room_is_there(seed):
    shown = Shown(seed)
    shown.paint = lambda placed, room, light: (placed, room)
    [(placed, room)], [(question, answer)] = toy_items.count_in_room(shown)
    kinds = {one.thing.kind for one in placed}
    assert room is not None and len(kinds) == 1 and answer == str(len(placed))
    assert question == toolbox_prompts.write("object_counting", 1, toy_items.plural(*kinds))


@pytest.mark.parametrize("game", GAMES)
def test_a_game_shows_what_it_asks_about_and_nothing_held_out(game):
    for seed in range(10):
        pictures, turns = game(Shown(seed))
        assert "".join(words for words, _ in turns).count("<image>") == len(pictures)
        assert not any(toy.held_out(thing) for thing, _ in pictures)


def test_games_say_what_the_tests_say():
    """Else a game would be learnt in words that no test uses."""
    asked = lambda game: "".join(words for words, _ in game(Shown(0))[1])
    words = asked(toy_games.touch)
    assert words == toolbox_prompts.write("picture_vocabulary", 4, words.split("'")[1]) + " ?"
    same = {asked(lambda _, seed=seed: toy_games.is_same(Shown(seed)))[:-2] for seed in range(9)}
    tests = [toolbox_prompts.write(test, 4) for test in ("left_right", "spatial_details")]
    assert len(same) == 2 and all(any(t.startswith(words) for t in tests) for words in same)
    assert asked(toy_games.is_new).endswith(2 * (toolbox_prompts.write("memory", 2) + " ?"))


def test_games_lead_in_their_order(made):
    """Each stage after the one before, and the tests' own training parts after all of them."""
    dataset = Data(made)
    tokens, samples = dataset.open("chat_train", "tokens"), dataset.open("chat_train", "samples")
    said = [
        dataset.tokenizer.decode(tokens[a : a + n]) for a, n, *_ in samples.astype(int).tolist()
    ]
    curriculum = dataset.count("chat_train", "curriculum")
    assert (
        curriculum == sum(toy_games.games_of(62)) == 62
        and dataset.count("train", "curriculum") == 0
    )
    first = [next(i for i, one in enumerate(said) if re.search(mark, one)) for mark in MARKS]
    ends = np.cumsum(toy_games.games_of(62)).tolist()
    assert [sum(end <= i for end in ends) for i in first] == [0, 1, 2, 3, 4, 5]
    assert not any("no , a" in one or "again , a" in one for one in said[curriculum:])


# What the samples of a stage say that no stage before does, and what comes after all of them
SIX = "(new image.*){6}"
MARKS = ("is it", "Touch the image of", "the same as this", "again ,", SIX, "How many")


def blobs(frame):
    """How many connected patches there are on black, by flooding."""
    bright, found = frame.max(-1) > 60, 0
    while bright.any():
        found += 1
        flood = [tuple(np.argwhere(bright)[0])]
        while flood:
            y, x = flood.pop()
            if 0 <= y < len(bright) and 0 <= x < len(bright) and bright[y, x]:
                bright[y, x] = False
                flood += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return found


@pytest.mark.parametrize("number", range(1, 13))
def test_as_many_are_drawn_as_the_answer_says(number):
    rng = np.random.RandomState(number)
    placed = toy_items.crowd([Thing("ball", "red")] * number, rng, even=True)
    assert blobs(toy_items.paint(placed, rng, 128)) == number


def test_what_leaves_is_gone_at_the_end_and_went_that_way():
    rng = np.random.RandomState(0)
    for direction in DIRECTIONS:
        places = toy_items.path_out(direction, rng, 7)
        moved = places[-1] - places[0]
        angle = np.degrees(np.arctan2(moved[0], -moved[1])) % 360
        assert angle == pytest.approx(45 * DIRECTIONS.index(direction))
        assert np.abs(places[-1] - 0.5).max() > 0.5 + 0.2  # its middle is well out of the picture


# ---------------------------------------------------------------------------------------------
# From the command line


@pytest.fixture(scope="module")
def trained(made):
    """All phases, and the tests after the last: the world's folder, with out/v2."""
    import os

    folder, before = made.parent.parent, os.getcwd()
    sizes = (
        "--patch=4 --image_pool=2 --vision_width=16 --vision_depth=1 --vision_heads=2 "
        "--select_layer=-1 "
        "--prototypes=16 --n_layer=1 --n_head=2 --n_embd=16 --block_size=700 --vision_steps=2 "
        "--language_steps=2 --phase1_steps=2 --phase2_steps=2 --phase3_steps=2 --vision_batch=4 "
        "--language_batch=2 --phase1_batch=4 --phase2_batch=4 --phase3_batch=4 --device=cpu"
    ).split()
    os.chdir(folder)
    train.main(["--data=data/toy_v2", "--out=out/v2", *sizes])
    os.chdir(before)
    return folder


def test_all_tests_from_the_command_line(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    evaluation.main(["--checkpoint=out/v2/phase3.pt", "--task=toolbox"])
    printed = capsys.readouterr().out
    results = json.load(open("out/v2/results_toolbox.json"))["tasks"]
    assert set(results) == {*TESTS, "toolbox"}
    for name in toolbox.TESTS:
        assert {"all", "seen", "held_out"} == set(results[name])
        assert "cannot_see" in str(results[name]["all"])
    assert results["toolbox"]["all"]["mean"]["n"] == 11 and "cannot_read" in printed
    model = torch.load("out/v2/phase3.pt", weights_only=True)
    assert model["parts"]["seeing"]["image_pool"] == 2


def test_answers_read_as_published_lie_beside_the_strict_ones(trained, monkeypatch):
    monkeypatch.chdir(trained)
    flags = ["--checkpoint=out/v2/phase3.pt", "--task=left_right"]
    evaluation.main(flags)
    evaluation.main([*flags, "--parse=published"])
    for name in ("strict", "published"):
        suffix = "" if name == "strict" else "_published"
        assert json.load(open(f"out/v2/results_left_right{suffix}.json"))["parse"] == name
    with pytest.raises(UserError, match="reads a file for each test") as error:
        evaluation.main([flags[0], "--task=toolbox", "--csv=data/toy_v2/eval/left_right.json"])
    assert one_line(error)
    for words in (["--task=vtwt", "--parse=published"], ["--task=vtwt", "--human=h.csv"]):
        with pytest.raises(UserError, match="asked for is vtwt") as error:
            evaluation.main([flags[0], *words])
        assert one_line(error)


def test_a_context_that_is_full_counts_as_unread(made, trained, capsys):
    """A model that talks on has no room left in Memory; a question too long is an error."""
    import checkpoint

    loaded = checkpoint.load(trained / "out/v2/phase3.pt")
    loaded.model.gpt.config.block_size = 300
    settings = evaluation.Config()
    embed = torch.zeros(4, loaded.model.gpt.config.n_embd)
    subject = SimpleNamespace(
        loaded=loaded, settings=settings, together=lambda images: [embed] * len(images)
    )
    rows = read_items("memory", made / "eval" / "memory.json")[:2]
    said = toolbox.ask(rows, subject)
    assert [len(own) for own in said] == [ROUNDS] * 2 and said[0][-1] == ""
    assert "rounds did not fit into 300 tokens" in capsys.readouterr().out
    loaded.model.gpt.config.block_size = 8
    with pytest.raises(UserError, match="this model holds, 8"):
        toolbox.ask(rows, subject)


def talked(*turns):
    """An item of (question, answer) turns, with as many pictures as its questions show."""
    said = [
        {"from": who, "value": words}
        for turn in turns
        for who, words in zip(("human", "gpt"), turn)
    ]
    count = sum(question.count("<image>") for question, _ in turns)
    return {"image": ["a.png"] * count, "conversations": said}


ONCE = ("(A) <image>", "A")
TWICE = ("(A) <image> (B) <image>", "A")
FOUR = " (A) (B) (C) (D)"


@pytest.mark.parametrize(
    "name, item, why",
    [
        ("left_right", talked(("<image><image> (A) (B) (C)", "A")), "2 pictures, want 4"),
        ("picture_vocabulary", talked(("<image>" * 5 + FOUR, "A")), "5 pictures, want 4"),
        ("picture_vocabulary", talked(("<image>" * 4, "A")), "offers no options"),
        ("object_counting", talked(("how many?", "3")), "conversations"),
        ("object_counting", talked(("<image> how many?", "some")), "'some' is no answer"),
        ("delayed_response", talked(("where?", "left")), "conversations"),
        ("delayed_response", talked(("<image> ONLY 'left' or 'right'", "top")), "no answer"),
        ("delayed_response_open", talked(("<image> ONLY 'up' or 'left'", "left")), "no direction"),
        ("delayed_response", talked(("<image> ONLY 'left' or 'up'", "up")), "'up' is no direction"),
        ("memory", talked(ONCE, ("<image><image> (A)", "A"), TWICE), "a letter for each"),
        ("memory", talked(ONCE, TWICE, TWICE) | {"learnt": {"a.png": "z"}}, "its learnt must"),
        ("more_natural", talked(TWICE, TWICE), "2 questions, want one"),
        ("left_right", talked(("<image> ONLY with 'left' or 'top'", "left")), "options (A) (B)"),
        ("memory", talked(*[ONCE] * ROUNDS), "first of 1 picture, others of 2"),
        ("memory", talked(TWICE, TWICE, TWICE), "first of 1 picture, others of 2"),
        ("memory_fair", talked(ONCE, TWICE), "want 3 rounds or more"),
        ("memory", talked(ONCE, TWICE, TWICE) | {"labels": [["a"]]}, "its labels must be 3 lists"),
        ("memory", talked(ONCE, TWICE, TWICE) | {"labels": "abc"}, "its labels must be 3 lists"),
        ("memory", talked(ONCE, TWICE, TWICE) | {"learnt": ["a"]}, "its learnt must be"),
        ("left_right", talked(("<image>" * 4 + FOUR, "A")) | {"subset": 3}, "its subset"),
        ("left_right", {"image": ["a", "b"], "phrases": ["c", "d"]}, "want a conversation"),
        ("looking_while_listening", talked(TWICE), "two pictures and two phrases"),
    ],
)
def test_items_of_another_form_are_refused(tmp_path, name, item, why):
    """Whatever the file is called; each of these ended in a traceback, or in half a sentence."""
    path = tmp_path / "other.json"
    path.write_text(json.dumps([item]))
    with pytest.raises(UserError) as error:
        read_items(name, path)
    assert one_line(error) and why in str(error.value) and f"{path}: item 0" in str(error.value)


@pytest.mark.parametrize(
    "content, why",
    [
        ("{", "not JSON"),
        ("[]", "want a list of items"),
        ('[{"image": "a.png"}]', "item 0"),
        ('[{"image": ["a"], "conversations": []}]', "human and gpt in turn"),
        (
            '[{"image": ["a"], "conversations": [{"from": "human", "value": "?"}, '
            '{"from": "gpt", "value": "A"}]}]',
            "offers no options",
        ),
        (json.dumps([talked(("<image>" * 4 + FOUR, "Z"))]), "'Z' is no answer"),
    ],
)
def test_corrupted_files(tmp_path, content, why):
    path = tmp_path / "picture_vocabulary.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_items("picture_vocabulary", path)
    assert one_line(error) and why in str(error.value) and str(path) in str(error.value)
