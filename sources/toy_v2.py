"""
The toy world in the form of BabyLLaVA-V2's data: single pictures, clips in which something happens,
interleaved moments, and the ten tests of the DevCV Toolbox, with training parts.

    python data.py toy_v2

The language model also reads the tests' wording, with random answers. Phase 1 is trained on single
pictures, phase 2 on all three kinds, phase 3 on the training parts of the tests; two tests have
none, as in the original. Two things are ours: phase 3 starts with a curriculum of games (--games,
see toy_games.py), which ask picture by picture what a test asks about several at once; and it also
captions pictures, so that naming is not forgotten, and counts things in rooms (--replay).

eval/NAME.json are the tests, with their own pictures. Held-out pairs of colour and thing occur in
no training picture and no training text; the subsets of a test separate them.
"""

import json
from dataclasses import dataclass
from itertools import count

import numpy as np
from PIL import Image
from tqdm import tqdm

import config
from common.cores import begin, end
from common.files import writing
from common.images import ImageFormat
from config import option
from sources import adopt, toy
from sources.toolbox_prompts import DIRECTIONS, TESTS, opposite, write
from sources.toy import THINGS, Scene, pick, random_scene, random_thing, utterance
from sources.toy_chat import article
from sources.toy_games import IS_IT, SEEN, STAGES, games_of
from sources.toy_items import (
    FEWER_TO_TEST,
    FEWER_TO_TRAIN,
    MAKE,
    MAKE_TO_TRAIN,
    UNTRAINED,
    Album,
    Placed,
    count_in_room,
    paint,
    path_out,
    plural,
    some_light,
    some_room,
    stand,
)
from tokenizer import TEMPLATES, Tokenizer, caption_sample, chat_sample


@dataclass
class Config(config.Options):
    name: str = ""  # write to data/<name>; empty: toy_v2
    size: int = option(64, low=16, high=1024)  # S: frames are S x S pixels
    vocab_size: int = option(720, low=260, high=1 << 20)  # BPE tokens, specials included
    seed: int = option(2, low=0, high=2**32 - 1)  # of the world
    scenes: int = option(4000, low=10, high=10**8)  # of single pictures, each filmed twice
    clips: int = option(1500, low=10, high=10**8)  # clips in which something happens
    moments: int = option(700, low=10, high=10**8)  # sequences of 4 to 8 pictures and utterances
    lines: int = option(
        20000, low=10, high=10**8
    )  # utterances without pictures, for the language model
    items: int = option(12000, low=10, high=10**8)  # training items of each test; fewer of some
    games: int = option(62000, low=0, high=10**8)  # of the curriculum, read first
    replay: int = option(7000, low=0, high=10**8)  # captions and counts among the training items
    questions: int = option(200, low=10, high=10**6)  # test items of each test


# ---------------------------------------------------------------------------------------------
# Clips in which something happens, and moments in a row

EVENTS = {
    "enters": ["here comes {the} !", "look , {a} is coming ."],
    "leaves": ["bye bye , {thing} !", "the {thing} goes away .", "{the} is all gone ."],
    "hides": ["peek a boo ! there 's {the} .", "where 's {the} ? there it is !"],
    "joins": ["{the} goes on {the2} .", "now {the} is on {the2} ."],
}
CLOTHS = ((90, 90, 110), (150, 110, 90), (100, 130, 110))


# A quoted word. Tests quote what they ask for, and a word in quotes is another token than the same
# word after a space; without these sentences that token would be untrained.
SAY = ["say '{thing}' !", "can you say '{thing}' ?", "'{thing}' , yes , a '{thing}' ."]


def talk(scene, rng):
    """A sentence about a scene; for one thing every fourth time one with a quoted word."""
    if len(scene.things) == 1 and rng.randint(4) == 0:
        return toy.fill_in(pick(rng, SAY), scene, rng)
    return utterance(scene, rng)


def speech(settings, split):
    """The utterances of toy.py, sentences with quoted words, and sometimes the wording of tests and
    games with a random answer. Tokens that the language model never reads all get the same
    embedding, and A would be indistinguishable from B for thousands of steps."""
    rng = np.random.RandomState([settings.seed, toy.SPLITS[split][0], 8])
    asking = [test for test in TESTS if TESTS[test].answers]
    for line in toy.speech(settings, split, THINGS):
        yield line
        if rng.randint(8) == 0:
            yield toy.fill_in(pick(rng, SAY), random_scene(rng, THINGS, 1), rng)
        if rng.randint(8) == 0:
            test, way = pick(rng, asking), pick(rng, DIRECTIONS)
            asked = fill_prompt(test, pick(rng, list(THINGS)), way)
            yield f"{asked} {pick(rng, TESTS[test].answers)}"
        if rng.randint(8) == 0:
            question = pick(rng, IS_IT).format(pick(rng, list(THINGS)))
            word, thing = pick(rng, (*SEEN, "yes", "no")), random_thing(rng, THINGS)
            yield f"{question} {word} , {article(pick(rng, (thing.kind, thing.name)))} ."


def happen(rng, size, frames=5):
    """(frames, utterance) of a clip: a thing enters, leaves through a side, is covered for a while,
    or is put on another."""
    event = pick(rng, list(EVENTS))
    scene = random_scene(rng, THINGS, 2 if event == "joins" else 1)
    room, light, thing = some_room(rng), some_light(rng), scene.things[0]
    own = stand(thing, rng, 0.5, 0.55, rng.uniform(0.35, 0.45))
    at = lambda x, y: Placed(thing, x, y, own.side, own.tilt, own.mirrored)
    pictures = []
    if event == "joins":
        below = stand(scene.things[1], rng, 0.5, 0.72, 0.44)
        for share in np.linspace(0, 1, frames):
            pictures.append([at(0.15 + 0.35 * share, 0.2 + 0.12 * share), below])
    elif event == "hides":
        pictures = [[at(0.5, 0.55)]] * frames
    else:
        ways = path_out(pick(rng, ("left", "right")), rng, frames)
        pictures = [[at(x, y)] for x, y in (ways if event == "leaves" else ways[::-1])]
    drawn = [paint(placed, rng, size, room, light) for placed in pictures]
    if event == "hides":  # a cloth over it, in the middle frames
        cloth, reach = pick(rng, CLOTHS), int(0.7 * own.side * size)
        y, x = int(0.55 * size), size // 2
        for frame in drawn[1:-1]:
            frame[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = cloth
    return drawn, toy.fill_in(pick(rng, EVENTS[event]), scene, rng)


def moments(rng, size):
    """4 to 8 (frame, utterance) in a row; the scene changes every other time."""
    scene, told = random_scene(rng, THINGS), []
    for _ in range(rng.randint(4, 9)):
        told.append((toy.film(scene, rng, size, THINGS), talk(scene, rng)))
        if rng.randint(2):
            scene = random_scene(rng, THINGS)
    return told


# ---------------------------------------------------------------------------------------------
# Preparing


class Clips:
    """Adds frames to a split, with clip numbers; returns their image ids."""

    def __init__(self, part):
        self.part, self.clip = part, -1

    def __call__(self, frame, new_clip):
        self.clip += bool(new_clip)
        return self.part.image(np.ascontiguousarray(frame), self.clip)


def write_samples(part, settings, rng, one_in):
    """Write the samples of phases 1 and 2: pictures, clips, moments."""
    tokenizer, bare, keep = part.writer.tokenizer, TEMPLATES["bare"], Clips(part)
    for _ in tqdm(range(settings.scenes // one_in), f"{part.name} pictures", unit="scene"):
        scene = random_scene(rng, THINGS)
        for number in range(2):  # two frames, two utterances each
            image = keep(toy.film(scene, rng, settings.size, THINGS), number == 0)
            for _ in range(2):
                part.sample(*caption_sample(tokenizer, talk(scene, rng)), [image])
    for _ in tqdm(range(settings.clips // one_in), f"{part.name} clips", unit="clip"):
        frames, words = happen(rng, settings.size)
        images = [keep(frame, i == 0) for i, frame in enumerate(frames)]
        part.sample(*caption_sample(tokenizer, words, len(images)), images)
    for _ in tqdm(range(settings.moments // one_in), f"{part.name} moments", unit="walk"):
        told = moments(rng, settings.size)
        images = [keep(frame, True) for frame, _ in told]
        part.sample(*chat_sample(tokenizer, bare, [("<image>", w) for _, w in told]), images)


def write_tuning(part, settings, rng, one_in):
    """Write the samples of phase 3: the games, the training parts of the tests, captions,
    counts."""
    most = max(2, 20 // one_in), max(2, settings.items // 12 // one_in)
    album = Album(Clips(part), rng, settings.size, most=most)
    put = lambda pictures, turns, *_: part.sample(
        *chat_sample(part.writer.tokenizer, TEMPLATES["bare"], turns), pictures
    )
    stages = games_of(settings.games // one_in)
    for many, (_, *games) in zip(tqdm(stages, f"{part.name} games", unit="stage"), STAGES):
        for number in range(many):
            put(*games[number % len(games)](album))
    tests = [name for name in TESTS if name not in UNTRAINED]
    for test in tqdm(tests, f"{part.name} tests", unit="test"):
        for _ in range(settings.items // one_in // FEWER_TO_TRAIN.get(test, 1)):
            put(*MAKE_TO_TRAIN[test](test, album))
    for number in range(settings.replay // one_in):
        if number % 2:
            put(*count_in_room(album))
        else:
            thing = album.thing()
            words = talk(Scene(0, (thing,)), rng)
            part.sample(*caption_sample(part.writer.tokenizer, words), [album.portrait(thing)])


def write_tests(settings, directory):
    """Write eval/NAME.json of the ten tests with their pictures, and toy.py's tests."""
    trials = settings.questions / 200
    toy.draw_trials(toy.Config(size=settings.size, seed=settings.seed, trials=trials), directory)
    folder = directory / "eval" / "images"
    number = count()

    def keep(frame, new_clip):
        name = f"{next(number):06d}.png"
        Image.fromarray(np.ascontiguousarray(frame)).save(folder / name)
        return name

    write_grammar(settings, directory)
    for k, test in enumerate(TESTS):
        rng, items = np.random.RandomState([settings.seed, 6, k]), []
        for subset, held_out in (("seen", False), ("held_out", True)):
            album = Album(keep, rng, settings.size, held_out)
            for _ in range(max(1, settings.questions // 2 // FEWER_TO_TEST.get(test, 1))):
                pictures, turns, more_fields = MAKE[test](test, album)
                items.append(as_item(f"{test}_{len(items)}", pictures, turns, subset) | more_fields)
        with writing(directory / "eval" / f"{test}.json") as file:
            file.write(json.dumps(items, indent=1).encode())


# Minimal pairs of the toy world's grammar: (wrong, right) sentence patterns.
GRAMMAR = {
    "article": ("it 's {wrong} {name} .", "it 's {a} ."),
    "order": ("look , the {thing} {colour} !", "look , the {colour} {thing} !"),
    "position": ("the {thing} on is the {thing2} .", "the {thing} is on the {thing2} ."),
    "question": ("where the 's {thing} ?", "where 's the {thing} ?"),
}


def write_grammar(settings, directory):
    """Write eval/grammar/NAME.txt in Zorro's form: a wrong sentence, then the right one."""
    rng = np.random.RandomState([settings.seed, 7])
    for name, pair in GRAMMAR.items():
        lines = []
        for _ in range(settings.questions):
            scene = random_scene(rng, THINGS, 2)
            wrong = "a" if article(scene.things[0].name).startswith("an ") else "an"
            lines += [toy.fill_in(line.replace("{wrong}", wrong), scene) for line in pair]
        with writing(directory / "eval" / "grammar" / f"{name}.txt") as file:
            file.write("\n".join(lines).encode())


def as_item(name, pictures, turns, subset):
    """An item in LLaVA's form."""
    said = [
        {"from": who, "value": words}
        for turn in turns
        for who, words in zip(("human", "gpt"), turn)
    ]
    return {"id": name, "image": pictures, "conversations": said, "subset": subset}


def fill_prompt(test, kind, direction="left"):
    """A test's prompt without its pictures. direction: of Visual Delayed Response, beside its
    opposite."""
    prompt = TESTS[test].prompt
    word = plural(kind) if "many" in prompt or "more" in prompt else kind
    words = write(test, prompt.count("#"), word, (direction, opposite(direction)))
    return words.replace("<image>", " ")


def prompts():
    """Yield the prompts of all tests, to train the vocabulary."""
    for test in TESTS:
        for number, kind in enumerate(THINGS):
            yield fill_prompt(test, kind, DIRECTIONS[number % len(DIRECTIONS)])
    for number in range(1, 13):
        yield f"{number}"


def write_all_tuning(settings, writer):
    """Write the samples of phase 3 for both splits."""
    for split, (number, one_in) in toy.SPLITS.items():
        part = writer.split(f"chat_{split}")
        write_tuning(part, settings, np.random.RandomState([settings.seed, number, 11]), one_in)
        for written in part.bins.values():
            written.close()


def prepare(settings, writer):
    """Draw everything; what shares no random numbers is drawn in parallel."""
    words = [*speech(settings, "train"), *(line for line in prompts() for _ in range(40))]
    tokenizer = Tokenizer.train(words, settings.vocab_size)
    writer.start(tokenizer, ImageFormat(settings.size), {"name": "bare", "system": ""})
    tests = begin(write_tests, settings, writer.directory)
    tuning = begin(write_all_tuning, settings, writer)
    for split, (number, one_in) in toy.SPLITS.items():
        part = writer.split(split)
        part.text(speech(settings, split))
        rng = np.random.RandomState([settings.seed, number, 10])
        write_samples(part, settings, rng, one_in)
        writer.split(f"chat_{split}")
    end(tuning, f"{writer.directory}/chat_*")
    for split, (_, one_in) in toy.SPLITS.items():
        part = writer.split(f"chat_{split}")
        adopt(part)
        part.curriculum = sum(games_of(settings.games // one_in))
    end(tests, f"{writer.directory}/eval")
