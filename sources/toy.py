"""
The toy world: a nursery drawn with Pillow, what a grown-up says about it, and test trials in the
form of BabyVLM's four tests. Nothing is downloaded, and nothing here is SAYCam.

    python data.py toy                      # draw the world below into data/toy
    python data.py toy --name photos --sprites DIR    # with your transparent PNGs as things

A scene is a room, one to three things, and how they stand to each other; a clip films one scene
several times while the things and the camera move a little, as they do before an infant's eyes.
All random numbers are from numpy's RandomState, whose stream never changes (NEP 19), and all shapes
are integer polygons, so a seed gives the same bytes on every machine.
"""

import re
import shutil
from dataclasses import dataclass
from math import ceil, cos, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import config
from common.cores import begin, end
from common.files import write_csv
from common.images import ImageFormat, load_picture
from config import UserError, option, regular
from tokenizer import Tokenizer, caption_sample


@dataclass
class Config(config.Options):
    name: str = ""  # write to data/<name>; empty: toy
    size: int = option(64, low=8, high=2048)  # S: frames are S x S pixels
    vocab_size: int = option(512, low=260, high=1 << 20)  # BPE tokens, specials included
    seed: int = option(1, low=0, high=2**32 - 1)  # the same seed draws the same bytes everywhere
    scenes: int = option(6000, low=1, high=10**8)  # for training; validation has a tenth as many
    clip_frames: int = option(2, low=1, high=1000)  # frames filmed of each scene
    captions: int = option(2, low=1, high=100)  # of each frame
    lines: int = option(
        20000, low=10, high=10**8
    )  # utterances without pictures, for the language model
    trials: float = option(1.0, low=0.01, high=1000.0)  # 1: 320 Labeled-S trials, 560 VTWT, ...
    trials_seed: int = option(0, low=0, high=2**32 - 1)  # other trials, to tune on; 0: as seed
    sprites: str = ""  # a folder of transparent PNGs to draw instead of the drawn things


# ---------------------------------------------------------------------------------------------
# Things, and what is said about them

# fmt: off
COLOURS = {"red": (214, 45, 45), "orange": (240, 140, 30), "yellow": (240, 215, 50),
           "green": (60, 165, 75), "blue": (50, 95, 215), "purple": (140, 65, 175),
           "white": (240, 240, 240), "brown": (125, 80, 45)}
ROOMS = [((196, 190, 176), (150, 128, 104)), ((176, 190, 198), (132, 136, 140)),
         ((200, 186, 190), (140, 120, 124)), ((182, 196, 178), (126, 132, 108))]  # wall, floor


# fmt: on
def oval(x, y, rx, ry, shade="c"):
    """An ellipse as a polygon: centre and radii in the unit square of the thing, y downwards."""
    return [(x + rx * cos(a * pi / 12), y + ry * sin(a * pi / 12)) for a in range(24)], shade


def poly(shade, *xy):
    """A polygon from x, y, x, y ... in the unit square. Shades: c colour, d dark, l light, k, w."""
    return list(zip(xy[::2], xy[1::2])), shade


def rect(x0, y0, x1, y1, shade="c"):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], shade


# fmt: off
# Each thing is a silhouette in the colour that is named, then details.
THINGS = {
    "ball": [oval(.5, .5, .48, .48), poly("l", .06, .36, .94, .36, .98, .5, .94, .64, .06, .64),
             oval(.5, .5, .12, .12, "d")],
    "cup": [oval(.78, .48, .2, .22, "d"), oval(.78, .48, .1, .12, "w"),
            poly("c", .1, .12, .76, .12, .66, .95, .2, .95), rect(.1, .12, .76, .24, "l")],
    "car": [poly("c", .02, .75, .02, .5, .2, .46, .34, .22, .7, .22, .84, .46, .98, .52, .98, .75),
            poly("w", .38, .3, .66, .3, .74, .46, .3, .46), oval(.25, .76, .14, .14, "k"),
            oval(.75, .76, .14, .14, "k")],
    "boat": [poly("c", .02, .62, .98, .62, .8, .95, .2, .95), rect(.46, .05, .52, .62, "k"),
             poly("l", .54, .06, .92, .54, .54, .54), poly("d", .44, .18, .14, .54, .44, .54)],
    "duck": [oval(.45, .68, .42, .28), oval(.68, .32, .22, .22), oval(.72, .27, .05, .05, "k"),
             poly("k", .86, .3, 1, .38, .86, .44), poly("d", .2, .6, .6, .6, .36, .84)],
    "fish": [oval(.42, .5, .4, .27), poly("c", .7, .5, .99, .2, .99, .8),
             oval(.22, .42, .06, .06, "k"), poly("d", .4, .22, .62, .05, .64, .3),
             poly("l", .46, .4, .6, .5, .46, .62)],
    "cat": [poly("c", .14, .44, .12, .03, .42, .22), poly("c", .86, .44, .88, .03, .58, .22),
            oval(.5, .56, .42, .4), oval(.34, .48, .07, .1, "k"), oval(.66, .48, .07, .1, "k"),
            poly("d", .42, .64, .58, .64, .5, .76), rect(.0, .68, .3, .71, "k"),
            rect(.7, .68, 1., .71, "k")],
    "bear": [oval(.2, .2, .18, .18), oval(.8, .2, .18, .18), oval(.2, .2, .09, .09, "d"),
             oval(.8, .2, .09, .09, "d"), oval(.5, .55, .44, .42), oval(.5, .7, .2, .17, "l"),
             oval(.5, .63, .08, .06, "k"), oval(.33, .45, .06, .06, "k"),
             oval(.67, .45, .06, .06, "k")],
    "hat": [oval(.5, .78, .5, .14), poly("c", .24, .78, .3, .14, .7, .14, .76, .78),
            poly("d", .25, .68, .26, .54, .74, .54, .75, .68)],
    "shoe": [poly("c", .08, .2, .42, .2, .5, .48, .86, .56, .98, .8, .06, .8),
             rect(.06, .78, .98, .9, "k"), rect(.34, .36, .54, .4, "w"),
             rect(.42, .47, .62, .51, "w")],
    "spoon": [oval(.5, .24, .2, .23), rect(.44, .4, .56, .98), oval(.5, .22, .11, .14, "d")],
    "book": [poly("c", .02, .1, .5, .2, .98, .1, .98, .82, .5, .94, .02, .82),
             poly("d", .47, .19, .53, .19, .53, .94, .47, .94), rect(.12, .3, .4, .36, "w"),
             rect(.12, .46, .4, .52, "w"), rect(.6, .3, .88, .36, "w"),
             rect(.6, .46, .88, .52, "w")],
    "chair": [rect(.14, .02, .28, .98), rect(.14, .5, .86, .62), rect(.74, .56, .86, .98),
              rect(.14, .06, .62, .16, "d"), rect(.14, .26, .62, .36, "d"),
              rect(.52, .06, .62, .5, "d")],
    "star": [([(.5 + (.5, .2)[i % 2] * sin(i * pi / 5), .52 - (.5, .2)[i % 2] * cos(i * pi / 5))
               for i in range(10)], "c"), oval(.42, .46, .04, .05, "k"),
             oval(.58, .46, .04, .05, "k")],
    "flower": [rect(.46, .5, .54, .99, "k"),
               *[oval(.5 + .24 * sin(i * pi / 3), .34 - .24 * cos(i * pi / 3), .15, .15)
                 for i in range(6)], oval(.5, .34, .13, .13, "l")],
    "house": [rect(.12, .45, .88, .97), poly("d", .02, .47, .5, .03, .98, .47),
              rect(.42, .64, .6, .97, "k"), rect(.2, .55, .34, .7, "w"),
              rect(.68, .55, .82, .7, "w")],
}

# Sentences about one thing, two, three, and about nothing in view. {a} is "a red ball", {the} "the
# red ball" (every other time without the colour), {thing} "ball"; 2 is the second thing.
NAMING = ["look , {a} !", "that 's {a} .", "it 's {a} .", "here 's {the} .", "see {the} ?",
          "what 's that ? it 's {a} .", "where 's {the} ? there it is .", "oh , {a} !", "{a} .",
          "do you see {the} ? yes , {a} .", "good girl ! you found {the} .",
          "is that {a} ? yes , that 's right .", "do you want {the} ?", "{name} .", "{thing} !",
          "{thing} . {thing} .", "{thing} , yeah .", "{thing} ? yes , {a} ."]
COLOUR = ["the {thing} is {colour} .", "what colour is the {thing} ? it 's {colour} .",
          "it 's {colour} . {a} .", "{colour} . {colour} {thing} ."]
TOGETHER = ["{a} and {a2} .", "look , {a} and {a2} !", "there 's {a} and {a2} ."]
WHERE = ["the {thing} is {where} the {thing2} .", "look , {the} is {where} {the2} .",
         "where 's the {thing} ? it 's {where} the {thing2} ."]
THREE = ["{a} , {a2} and {a3} .", "look , {a} , {a2} and {a3} !"]
ROUTINE = ["are you hungry ?", "good job !", "all done .", "let 's go outside .",
           "come here , sweetie .", "do you want some milk ?", "time for bed .",
           "oh , what are you doing ?", "be careful .", "clap your hands !", "shall we read ?",
           "peek a boo !", "yes , that 's right .", "uh oh .", "let 's wash your hands .",
           "are you tired ?", "where 's daddy ?", "one , two , three !",
           "no , not in your mouth .", "that 's so funny .", "you 're such a good girl .",
           "say bye bye .", "can you give it to mummy ?", "what do you think ?", "up we go !"]
# fmt: on


# ---------------------------------------------------------------------------------------------
# Scenes: drawing, filming, talking about them


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str = ""

    @property
    def name(self):
        return f"{self.colour} {self.kind}".strip()


@dataclass(frozen=True)
class Scene:
    room: int
    things: tuple
    where: str = ""  # the first thing is "on", "left of", "right of", "next to" the second


def pick(rng, options):
    return options[rng.randint(len(options))]


def held_out(thing):
    """Whether this pair of colour and thing is held out of all training pictures and speech.

    One colour for each kind, two kinds for each colour: 16 of the 128 pairs. Never for a sprite."""
    if not thing.colour:
        return False
    kind = list(THINGS).index(thing.kind)
    return list(COLOURS).index(thing.colour) == (3 * kind + kind // 8) % 8


def random_thing(rng, kinds, only_held_out=False, but=()):
    """A thing whose kind is not among `but`: not held out, or with only_held_out one that is."""
    while True:
        kind = pick(rng, list(kinds))
        thing = Thing(kind, pick(rng, list(COLOURS)) if kinds is THINGS else "")
        if held_out(thing) == only_held_out and thing.kind not in but:
            return thing


def random_scene(rng, kinds, count=None):
    """One thing (60 %), two (30 %) or three (10 %) of different kinds, in some room."""
    things = []
    for _ in range(count or pick(rng, (1, 1, 1, 1, 1, 1, 2, 2, 2, 3))):
        things.append(random_thing(rng, kinds, but=[t.kind for t in things]))
    where = pick(rng, ("on", "left of", "right of", "next to")) if len(things) == 2 else ""
    return Scene(rng.randint(len(ROOMS)), tuple(things), where)


def film(scene, rng, size, kinds):
    """One frame of a scene, (size, size, 3) uint8, with the layout of the scene and random
    positions, sizes, tilts, camera, a hand, blur and noise."""
    big = 2 * size  # drawn twice as large, then averaged, for smooth edges
    image = draw_room(scene.room, rng, big)
    centres = {1: ((0.5, 0.5),), 2: ((0.29, 0.54), (0.71, 0.54))}
    places = centres.get(len(scene.things), ((0.2, 0.6), (0.52, 0.42), (0.82, 0.6)))
    extent = (0.74, 0.46, 0.38)[len(scene.things) - 1]
    if scene.where == "on":
        places = (0.5, 0.28), (0.5, 0.72)
    elif scene.where == "right of" or (scene.where == "next to" and rng.randint(2)):
        places = places[::-1]
    shift = rng.uniform(-0.05, 0.05, 2)
    for thing, place in reversed(list(zip(scene.things, places))):  # later ones may hide earlier
        jitter = rng.uniform(-0.06, 0.06, 2) * (1.5 if len(places) == 1 else 0.6)
        centre = ((place + shift + jitter) * big).tolist()  # floats of Python's: faster to round
        side = extent * rng.uniform(0.8, 1.15) * big
        tilt, mirrored = rng.uniform(-0.35, 0.35), rng.randint(2)
        draw_thing(image, thing, kinds, centre, side, tilt, mirrored)
    if rng.randint(8) == 0:  # the infant's own hand comes into view
        x, wrist = rng.randint(big), big * 4 // 5
        left, right = (x - big // 6, big), (x + big // 6, big)
        knuckles = [(x - big // 8, wrist), (x, big * 3 // 4), (x + big // 8, wrist)]
        ImageDraw.Draw(image).polygon([left, *knuckles, right], (224, 172, 140))

    frame = np.asarray(image, np.int32)
    if rng.randint(5) == 0:  # a quick turn of the head
        frame = sum(np.roll(frame, step, axis=1) for step in range(-2, 3)) // 5
    frame = halved(frame)
    frame = frame * rng.randint(85, 116) // 100 + rng.randint(-6, 7, frame.shape)
    return frame.clip(0, 255).astype(np.uint8)


def halved(frame):
    """A frame of half the side: means of 2 x 2 pixels, rounded down."""
    rows = frame[0::2] + frame[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) // 4


def draw_room(room, rng, big):
    """An empty room seen from somewhere in it, big x big pixels."""
    wall, floor = ROOMS[room]
    image = Image.new("RGB", (big, big), wall)
    draw = ImageDraw.Draw(image)
    pan, horizon = rng.randint(-big // 2, big // 2), rng.randint(big * 5 // 10, big * 8 // 10)
    for stripe in range(-2, 5):  # wallpaper or planks, so that rooms differ in more than hue
        x = pan + stripe * big // (3 + room)
        draw.rectangle((x, 0, x + big // 24, big), tuple(c - 8 for c in wall))
    draw.rectangle((0, horizon, big, big), floor)
    return image


def draw_thing(image, thing, kinds, centre, side, tilt, mirrored):
    """Draw one thing about `centre` with its unit square `side` pixels wide, turned by `tilt`."""
    looks = kinds[thing.kind]
    if not isinstance(looks, list):  # a sprite
        scale = side / max(looks.size)
        sprite = looks.resize([max(1, round(n * scale)) for n in looks.size])
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else sprite
        sprite = sprite.rotate(tilt * 180 / pi, expand=True)
        image.paste(sprite, [round(c - n / 2) for c, n in zip(centre, sprite.size)], sprite)
        return
    colour = COLOURS[thing.colour]
    dark = tuple(c * 7 // 10 for c in colour)
    light = tuple(c + (255 - c) * 4 // 10 for c in colour)
    shades = {"c": colour, "d": dark, "l": light, "k": (35, 32, 38), "w": (250, 250, 245)}
    cosine, sine, draw = cos(tilt) * side, sin(tilt) * side, ImageDraw.Draw(image)
    for points, shade in looks:
        corners = []
        for x, y in points:
            x, y = (0.5 - x if mirrored else x - 0.5), y - 0.5
            turned = x * cosine - y * sine, x * sine + y * cosine
            corners.append((round(centre[0] + turned[0]), round(centre[1] + turned[1])))
        draw.polygon(corners, shades[shade])


def fill_in(line, scene, rng=None):
    """A sentence pattern, filled in; with an rng every other colour is left out."""
    words = {"where": scene.where}
    for suffix, thing in zip(("", "2", "3"), scene.things):
        name = thing.name if rng is None or rng.randint(2) else thing.kind
        article = "an " if name[0] in "aeiou" else "a "
        words |= {"a" + suffix: article + name, "the" + suffix: "the " + name}
        words |= {"name" + suffix: name, "thing" + suffix: thing.kind}
        words["colour" + suffix] = thing.colour
    return line.format(**words)


def utterance(scene, rng, routine=12):
    """A sentence about a scene, in lower case and spaced like CVCL's transcripts; in `routine` of a
    hundred cases one that names nothing in view."""
    if rng.randint(100) < routine:
        return pick(rng, ROUTINE)
    one = COLOUR if scene.things[0].colour and rng.randint(4) == 0 else NAMING
    lines = (one, TOGETHER if rng.randint(2) else WHERE, THREE)[len(scene.things) - 1]
    return fill_in(pick(rng, lines), scene, rng=rng)


# ---------------------------------------------------------------------------------------------
# Trials: the four BabyVLM tasks, and frames of single things for the tower's linear probe

COLUMNS = {
    "labeled_s": "trial_id target_category real_category image subset".split(),
    "vtwt": "image positive_phrase negative_phrase subset".split(),
    "baby_winoground": "instance_id positive_phrase negative_phrase image image_tag subset".split(),
    "caption": "image text thing colour subset".split(),
    "probe": "image kind colour".split(),
}


class Trials:
    """The rows of each test's CSV, and the pictures that they name.

    The columns are BabyVLM's, plus `subset`, which eval.py reports separately: "seen" and
    "held_out" pairs of colour and thing and, in Winoground, "binding" (which thing has which
    colour) and "position" (what is on what)."""

    def __init__(self, rng, size, kinds):
        self.rng, self.size, self.kinds = rng, size, kinds
        self.images, self.rows = {}, {name: [] for name in COLUMNS}

    def film(self, folder, *things, where=""):
        """Film things in a random room; returns the name of the picture."""
        name = f"{folder.replace(' ', '_')}/img_{len(self.images)}.png"
        scene = Scene(self.rng.randint(len(ROOMS)), things, where)
        self.images[name] = film(scene, self.rng, self.size, self.kinds)
        return name

    def foil(self, thing, trial):
        """A thing, not held out, that differs from this one only in colour (odd trials) or only in
        kind. Sprites have no colours and always differ in kind."""
        recolour = self.kinds is THINGS and trial % 2 == 1
        other = thing
        while other == thing or held_out(other):
            new = random_thing(self.rng, self.kinds)
            if recolour:
                other = Thing(thing.kind, new.colour)
            else:
                other = Thing(new.kind, thing.colour)
        return other

    def labeled_s(self, subset, only_held_out, trials):
        for trial in range(trials):
            target = random_thing(self.rng, self.kinds, only_held_out)
            shown = [target]
            while len(shown) < 4:
                kinds_so_far = [thing.kind for thing in shown]
                shown.append(random_thing(self.rng, self.kinds, but=kinds_so_far))
            for thing in shown:
                image = self.film(thing.kind, thing)
                name = f"{subset}_{trial}"
                self.rows["labeled_s"].append((name, target.kind, thing.kind, image, subset))

    def vtwt(self, subset, only_held_out, trials):
        for trial in range(trials):
            thing = random_thing(self.rng, self.kinds, only_held_out)
            other = self.foil(thing, trial)
            self.rows["vtwt"].append((self.film("vtwt", thing), thing.name, other.name, subset))

    def winoground(self, subset, positive, negative, image, foil_image):
        instance = len(self.rows["baby_winoground"]) // 2
        for name, tag in ((image, "positive"), (foil_image, "negative")):
            self.rows["baby_winoground"].append((instance, positive, negative, name, tag, subset))

    def one_thing_winoground(self, subset, only_held_out, trials):
        for trial in range(trials):
            thing = random_thing(self.rng, self.kinds, only_held_out)
            other = self.foil(thing, trial)
            images = self.film("winoground", thing), self.film("winoground", other)
            self.winoground(subset, thing.name, other.name, *images)

    def position(self, a, b):
        """Is a on b, or b on a?"""
        on, orders = "the {thing} is on the {thing2} .", ((a, b), (b, a))
        phrases = [fill_in(on, Scene(0, order)) for order in orders]
        images = [self.film("winoground", *order, where="on") for order in orders]
        self.winoground("position", *phrases, *images)

    def binding(self, a, b):
        """Which of the two has which colour? No trial if the exchanged colours are held out or
        equal."""
        c, d = Thing(a.kind, b.colour), Thing(b.kind, a.colour)
        if a.colour == b.colour or held_out(c) or held_out(d):
            return
        both = "{a} and {a2} ."
        phrases = fill_in(both, Scene(0, (a, b))), fill_in(both, Scene(0, (c, d)))
        images = self.film("winoground", a, b), self.film("winoground", c, d)
        self.winoground("binding", *phrases, *images)

    def captions(self, subset, only_held_out, trials):
        for _ in range(trials):
            thing = random_thing(self.rng, self.kinds, only_held_out)
            text = fill_in("look , {a} !", Scene(0, (thing,)))
            image = self.film("caption", thing)
            self.rows["caption"].append((image, text, thing.kind, thing.colour, subset))

    def probe(self, frames):
        for _ in range(frames):
            thing = random_thing(self.rng, self.kinds)
            self.rows["probe"].append((self.film("probe", thing), thing.kind, thing.colour))


def make_trials(rng, size, kinds, times=1.0):
    """All trials, `times` the usual number; for held-out pairs a third of those for seen ones."""
    trials = Trials(rng, size, kinds)
    subsets = [("seen", False, 3), ("held_out", True, 1)][: 2 if kinds is THINGS else 1]
    for subset, only_held_out, share in subsets:
        trials.labeled_s(subset, only_held_out, ceil(80 * share * times))
        trials.vtwt(subset, only_held_out, ceil(140 * share * times))
        trials.one_thing_winoground(subset, only_held_out, ceil(50 * share * times))
        trials.captions(subset, only_held_out, ceil(70 * share * times))
    for _ in range(ceil(50 * times)):
        a, b = random_scene(rng, kinds, 2).things
        trials.position(a, b)
        trials.binding(a, b)
    if kinds is THINGS:
        trials.probe(ceil(2400 * times))
    return trials


# ---------------------------------------------------------------------------------------------
# Preparing

SPLITS = {"train": (0, 1), "val": (1, 10)}  # number in the seed; fraction 1 / n of scenes and lines


def speech(settings, split, kinds):
    """Yield the utterances without pictures of a split."""
    number, one_in = SPLITS[split]
    rng = np.random.RandomState([settings.seed, number, 0])
    for _ in range(max(1, settings.lines // one_in)):
        yield utterance(random_scene(rng, kinds), rng, routine=30)


def clips(settings, split, kinds):
    """Yield (frame, clip number, its captions) of a split's scenes, each filmed several times."""
    number, one_in = SPLITS[split]
    rng = np.random.RandomState([settings.seed, number, 1])
    for clip in range(max(1, settings.scenes // one_in)):
        scene = random_scene(rng, kinds)
        for _ in range(settings.clip_frames):
            frame = film(scene, rng, settings.size, kinds)
            yield frame, clip, [utterance(scene, rng) for _ in range(settings.captions)]


def prepare(settings, writer):
    """Draw the toy world, its captions and its trials."""
    kinds = load_kinds(settings.sprites)
    tokenizer = Tokenizer.train(speech(settings, "train", kinds), settings.vocab_size)
    writer.start(tokenizer, ImageFormat(settings.size))
    trials = begin(
        draw_trials, settings, writer.directory
    )  # it shares no random numbers with the rest
    for split, (_, one_in) in SPLITS.items():
        part = writer.split(split)
        part.text(speech(settings, split, kinds))
        total = max(1, settings.scenes // one_in) * settings.clip_frames
        filmed = clips(settings, split, kinds)
        for frame, clip, captions in tqdm(filmed, f"{split} frames", total, unit="frame"):
            image = part.image(frame, clip)
            for caption in captions:
                part.sample(*caption_sample(tokenizer, caption), [image])
    end(trials, f"{writer.directory}/eval")


def draw_trials(settings, directory):
    """Write the trials of make_trials into eval/: pictures, and a CSV for each task."""
    shutil.rmtree(directory / "eval", ignore_errors=True)
    kinds = load_kinds(settings.sprites)  # again: another process may have its own THINGS
    rng = np.random.RandomState([settings.trials_seed or settings.seed, 2])
    trials = make_trials(rng, settings.size, kinds, settings.trials)
    for name, frame in trials.images.items():
        path = directory / "eval" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(path)
    for name, rows in trials.rows.items():
        if rows:
            write_csv(directory / "eval" / f"{name}.csv", COLUMNS[name], rows)


def load_kinds(directory):
    """THINGS, or {name: RGBA image} from a directory of transparent PNGs.

    The name is the first sentence of the .txt beside the PNG ("A green apple." -> "green apple"),
    else that of the file. Skipped: pictures without transparency, names of more than three words or
    with other characters than letters, digits, ' and -."""
    if not directory:
        return THINGS
    sprites = {}
    for path in sorted(Path(directory).rglob("*.png")):
        text, title = path.with_suffix(".txt"), re.sub("[_-]", " ", path.stem)
        if text.exists():
            title = regular(text).read_text(encoding="utf-8", errors="replace")
        words = re.split(r"[.!?(\n]", title.lower())[0].split()
        if words[:1] in (["a"], ["an"], ["the"]):
            words = words[1:]
        image = load_picture(path).convert("RGBA")
        alpha = image.getchannel("A")
        has_transparency = alpha.getbbox() and alpha.getextrema()[0] == 0
        is_name = 0 < len(words) <= 3 and all(re.fullmatch(r"[\w'-]+", word) for word in words)
        if has_transparency and is_name:
            image = image.crop(alpha.getbbox())
            image.thumbnail((160, 160))
            sprites.setdefault(" ".join(words), image)
    if len(sprites) < 8:
        found = f"{directory}: {len(sprites)} transparent PNGs with a short name"
        raise UserError(f"{found}; the trials need at least 8 things to tell apart")
    return sprites
