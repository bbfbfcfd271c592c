"""
Conversations about drawn pictures, small and large, made by the toy world's grammar. Nothing is
downloaded, and no other model is used.

    python data.py toy_chat                                   # pictures padded to a square
    python data.py toy_chat --name toy_tiles --canvases 128x64 64x128 128x128

Each has three turns or more: what, what colour, how many, where, which of two pictures, is there a
..., and what the little thing in the corner of a large picture is. The toy world's held-out pairs
of colour and thing are held out here too. With the seed of data/toy it has the same tokens, so a
model trained there can be trained further here. It also writes captions and speech for the earlier
phases, and eval/choice.json, which is the same for every image format.
"""

import json
import shutil
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

import config
from common.files import writing
from common.images import FITS, to_picture
from config import option
from sources import toy
from sources.llava import image_format
from sources.toy import COLOURS, ROOMS, THINGS, Scene, Thing, pick, random_scene, random_thing
from tokenizer import (
    TEMPLATES,
    Tokenizer,
    caption_sample,
    chat_sample,
    check_vocabulary,
    with_pictures,
)


@dataclass
class Config(config.Options):
    name: str = ""  # write to data/<name>; empty: toy_chat
    size: int = option(64, low=8, high=2048)  # S: frames are S x S pixels
    fit: str = option("", choices=("", *FITS))  # to a square; empty: pad, or squash with canvases
    resample: str = option("bilinear", choices=("bilinear", "bicubic"))  # how it is resized
    norm: str = option("imagenet", choices=("imagenet", "clip", "half"))  # mean and deviation
    canvases: tuple[str, ...] = ()  # as 128x64 128x128, several: tiles; empty: none
    template: str = option("bare", choices=tuple(TEMPLATES))  # how conversations are written
    vocab_size: int = option(512, low=260, high=1 << 20)  # BPE tokens, specials included
    seed: int = option(1, low=0, high=2**32 - 1)  # of the world; data/toy has the same
    talks: int = option(
        12000, low=1, high=10**8
    )  # conversations for training; a tenth for validation
    lines: int = option(
        20000, low=10, high=10**8
    )  # utterances without pictures, for the language model
    questions: int = option(100, low=1, high=10**6)  # of each kind in eval/choice.json


NUMBERS = ("no", "one", "two", "three")
SHAPES = ((128, 128), (128, 96), (128, 84), (128, 64), (96, 128), (84, 128), (64, 128))
LITTLE = 22  # pixels a side of the little thing in a large picture


# ---------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class View:
    """The content of a picture: a scene, and in a large picture also a little thing."""

    scene: Scene
    little: Thing | None = None

    @property
    def things(self):
        return self.scene.things


def random_view(rng, large=None):
    """A large picture of one thing and a little one (every other time), or a scene."""
    if large or (large is None and rng.randint(2) == 0):
        thing = random_thing(rng, THINGS)
        little = random_thing(rng, THINGS, but=[thing.kind])
        return View(Scene(rng.randint(len(ROOMS)), (thing,)), little)
    return View(random_scene(rng, THINGS))


def film(view, rng):
    """A picture of a view, a PIL image: 64 x 64 pixels, or larger with the little thing."""
    if view.little is None:
        return Image.fromarray(toy.film(view.scene, rng, 64, THINGS))
    width, height = pick(rng, SHAPES)
    page = toy.draw_room(view.scene.room, rng, 2 * max(width, height))
    page = page.crop((0, 0, 2 * width, 2 * height))  # twice as large, then averaged
    extent = min(width, height)
    draw = lambda thing, centre, side: toy.draw_thing(
        page,
        thing,
        THINGS,
        (2 * centre[0], 2 * centre[1]),
        2 * side,
        rng.uniform(-0.35, 0.35),
        rng.randint(2),
    )
    middle = np.array([width, height]) / 2 + rng.uniform(-0.04, 0.04, 2) * extent
    draw(view.things[0], middle, extent * rng.uniform(0.5, 0.62))
    corner = [rng.choice([LITTLE * 0.7, side - LITTLE * 0.7]) for side in (width, height)]
    draw(view.little, corner, LITTLE)
    frame = toy.halved(np.asarray(page, np.int32))
    frame = frame * rng.randint(85, 116) // 100 + rng.randint(-6, 7, frame.shape)
    return Image.fromarray(frame.clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------
# Questions. Each takes a View and random numbers and gives (question, answer, other answers), or
# None where it cannot be asked of that view.


def article(name):
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def listing(things):
    """ "a red ball , a cup and a hat" """
    names = [article(thing.name) for thing in things]
    return " and ".join([" , ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def absent(view, rng):
    """A thing that is not in view."""
    shown = [thing.kind for thing in (*view.things, view.little) if thing]
    return random_thing(rng, THINGS, but=shown)


def what(view, rng):
    """What is this? A ball. What do you see? A red ball."""
    if len(view.things) > 1:
        return None
    question = pick(rng, ["what is this ?", "what do you see ?", "tell me what this is ."])
    name = lambda thing: thing.kind if question == "what is this ?" else thing.name
    thing, others = view.things[0], []
    while len(others) < 3:
        other = f"{article(name(random_thing(rng, THINGS, but=[thing.kind])))} ."
        if other not in others:
            others.append(other)
    return question, f"{article(name(thing))} .", others


def everything(view, rng):
    if len(view.things) < 2:
        return None
    return "what do you see ?", f"{listing(view.things)} .", []


def colour(view, rng):
    thing = pick(rng, view.things)
    others = [f"{name} ." for name in COLOURS if name != thing.colour]
    question = pick(
        rng, [f"what colour is the {thing.kind} ?", f"which colour has the {thing.kind} ?"]
    )
    return question, f"{thing.colour} .", list(rng.permutation(others)[:3])


def count(view, rng):
    if view.little:
        return None
    others = [f"{NUMBERS[n]} ." for n in (1, 2, 3) if n != len(view.things)]
    return "how many things are there ?", f"{NUMBERS[len(view.things)]} .", others


def where(view, rng):
    if view.scene.where not in ("on", "left of", "right of"):
        return None
    first, second = (thing.kind for thing in view.things)
    others = [w for w in ("on", "left of", "right of") if w != view.scene.where]
    question = f"where is the {first} ?"
    return question, f"{view.scene.where} the {second} .", [f"{w} the {second} ." for w in others]


def there_is(view, rng):
    """Is there a ...? Half of the time there is not."""
    thing = pick(rng, view.things)
    if rng.randint(2):
        return f"is there {article(thing.kind)} ?", f"yes , {article(thing.name)} .", ["no"]
    question = f"is there {article(absent(view, rng).kind)} ?"
    return question, f"no , there is {listing(view.things)} .", ["yes"]


def is_it(view, rng):
    """Is it this colour? Half of the time it is not, and the answer corrects it."""
    thing = pick(rng, view.things)
    if rng.randint(2):
        return f"is the {thing.kind} {thing.colour} ?", "yes .", ["no"]
    other = thing
    while other == thing or toy.held_out(other):
        other = Thing(thing.kind, pick(rng, list(COLOURS)))
    return f"is the {thing.kind} {other.colour} ?", f"no , it is {thing.colour} .", ["yes"]


def false_premise(view, rng):
    other = absent(view, rng)
    question = f"what colour is the {other.kind} ?"
    answer = f"there is no {other.kind} , there is {listing(view.things)} ."
    return question, answer, [f"{name} ." for name in rng.permutation(list(COLOURS))[:3]]


def little(view, rng):
    """What is the little thing in the corner? This needs resolution."""
    if view.little is None:
        return None
    others = []
    while len(others) < 3:
        kind = random_thing(rng, THINGS, but=[view.little.kind, view.things[0].kind]).kind
        if article(kind) + " ." not in others:
            others.append(f"{article(kind)} .")
    return "what is the little thing ?", f"{article(view.little.kind)} .", others


QUESTIONS = {
    "what": what,
    "everything": everything,
    "colour": colour,
    "count": count,
    "where": where,
    "there_is": there_is,
    "is_it": is_it,
    "false_premise": false_premise,
    "little": little,
}


def which(views, rng):
    """Of two pictures: which one has it?"""
    place = rng.randint(2)
    answers = ["the first .", "the second ."]
    thing = views[place].things[0]
    return f"which picture has the {thing.kind} ?", answers[place], [answers[1 - place]]


def compare(views, rng):
    """Three questions about two pictures."""
    place = rng.randint(2)
    picture = ("first", "second")[place]
    turns = [which(views, rng)[:2]]
    turns.append(
        (f"what is in the {picture} picture ?", f"{article(views[place].things[0].name)} .")
    )
    other = which(views, rng)[:2]
    if other == turns[0]:
        colour = views[place].things[0].colour
        other = f"what colour is the thing in the {picture} picture ?", f"{colour} ."
    return [*turns, other]


def talk_about(view, rng):
    """Three to five different questions about a view, [(question, answer)]. If there is one
    thing, one time in three the second is about what was just named: what colour is it?"""
    turns = []
    if len(view.things) == 1 and not view.little and rng.randint(3) == 0:
        thing = view.things[0]
        turns = [("what is this ?", f"{article(thing.kind)} .")]
        turns.append(("what colour is it ?", f"{thing.colour} ."))
    kinds = list(rng.permutation([*QUESTIONS, "there_is", "is_it", "false_premise"]))
    if view.little:  # what only large pictures are asked
        kinds.sort(key=lambda kind: kind != "little")
    for kind in kinds:
        asked = QUESTIONS[kind](view, rng)
        if asked and len(turns) < 5 and asked[0] not in [question for question, _ in turns]:
            turns.append(asked[:2])
    return turns


# ---------------------------------------------------------------------------------------------
# Preparing


def show(turns, template, images):
    """The turns, with `images` pictures before the first question."""
    (question, answer), *rest = turns
    return [(with_pictures(TEMPLATES[template], question, images), answer), *rest]


def write_split(writer, settings, split, number, talks):
    """Write captions to a split, and conversations to its chat split."""
    rng = np.random.RandomState([settings.seed, number, 3])
    plain, chat = writer.split(split), writer.split(f"chat_{split}")
    plain.text(toy.speech(settings, split, THINGS))
    tokenizer, template = writer.tokenizer, settings.template
    for clip in tqdm(range(talks), f"{split} talks", unit="talk"):
        if rng.randint(6) == 0:
            one = random_thing(rng, THINGS)
            two = random_thing(rng, THINGS, but=[one.kind])
            views = [View(Scene(rng.randint(len(ROOMS)), (thing,))) for thing in (one, two)]
            turns = compare(views, rng)
        else:
            views = [random_view(rng)]
            turns = talk_about(views[0], rng)
        pictures = [to_picture(film(view, rng), writer.image_format) for view in views]
        numbers = [chat.image(picture, clip) for picture in pictures]
        turns = show(turns, template, len(numbers))
        chat.sample(*chat_sample(tokenizer, TEMPLATES[template], turns), numbers)
        if len(views) == 1:
            image = plain.image(pictures[0], clip)
            words = toy.utterance(views[0].scene, rng)
            plain.sample(*caption_sample(tokenizer, words), [image])


def held_out_view(rng):
    thing = random_thing(rng, THINGS, only_held_out=True)
    return View(Scene(rng.randint(len(ROOMS)), (thing,)))


def make_questions(settings):
    """Yield (views, subset, turns, choices) of eval/choice.json: the last turn is asked, the first
    choice is right."""
    rng = np.random.RandomState([settings.seed, 4])
    kinds = [kind for kind in QUESTIONS if kind != "everything"]
    for kind in [*kinds, "which", "follow_up", "what_held_out", "colour_held_out"]:
        made, wanted = 0, settings.questions
        if kind == "little":  # what tiles are for: counted more finely
            wanted *= 3
        while made < wanted:
            turns = []
            if kind == "which":
                one = random_thing(rng, THINGS)
                two = random_thing(rng, THINGS, but=[one.kind])
                views = [View(Scene(rng.randint(len(ROOMS)), (thing,))) for thing in (one, two)]
                asked = which(views, rng)
            elif kind == "follow_up":
                views = [View(random_scene(rng, THINGS, 1))]
                _, answer, others = colour(views[0], rng)
                turns = [("what is this ?", f"{article(views[0].things[0].kind)} .")]
                asked = "what colour is it ?", answer, others
            elif kind.endswith("held_out"):
                views = [held_out_view(rng)]
                asked = QUESTIONS[kind.removesuffix("_held_out")](views[0], rng)
            else:
                views = [random_view(rng, large=kind == "little")]
                asked = QUESTIONS[kind](views[0], rng)
            if asked is None:
                continue
            made += 1
            question, answer, others = asked
            if kind in ("there_is", "is_it"):  # told apart by their first word
                answer = answer.split()[0]
            if kind == "false_premise":
                answer = " ".join(answer.split()[:4]) + " ."
            yield views, kind, [*turns, (question, None)], [answer, *map(str, others)], rng


def write_questions(settings, directory):
    """Write eval/choice.json and its pictures."""
    shutil.rmtree(directory / "eval", ignore_errors=True)
    folder = directory / "eval" / "images"
    folder.mkdir(parents=True)
    items, shuffle = [], np.random.RandomState([settings.seed, 5])
    for views, subset, turns, choices, rng in make_questions(settings):
        names = []
        for view in views:
            names.append(f"{len(items):05d}_{len(names)}.png")
            film(view, rng).save(folder / names[-1])
        order = shuffle.permutation(len(choices)).tolist()
        conversation = []
        for question, answer in show(turns, settings.template, len(names)):
            conversation.append({"from": "human", "value": question})
            if answer:
                conversation.append({"from": "gpt", "value": answer})
        items.append(
            {
                "image": names,
                "conversations": conversation,
                "choices": [choices[i] for i in order],
                "answer": order.index(0),
                "subset": subset,
            }
        )
    with writing(directory / "eval" / "choice.json") as file:
        file.write(json.dumps(items, indent=1).encode())


def prepare(settings, writer):
    """Draw, ask and answer."""
    speech = toy.speech(settings, "train", THINGS)
    tokenizer = Tokenizer.train(speech, settings.vocab_size)  # that of data/toy
    check_vocabulary(tokenizer, TEMPLATES[settings.template])
    template = {"name": settings.template, "system": ""}
    writer.start(tokenizer, image_format(settings), template)
    for split, (number, one_in) in toy.SPLITS.items():
        write_split(writer, settings, split, number, max(1, settings.talks // one_in))
    write_questions(settings, writer.directory)
