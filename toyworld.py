"""
A toy nursery that anybody can run: frames drawn with Pillow, what a grown-up says about them, and
evaluation trials in the four BabyVLM forms. Nothing is downloaded, nothing here is SAYCam.

    python data.py toy                      # draw the world below into data/toy
    python data.py toy --sprites DIR        # the same nursery, furnished with your transparent PNGs

A scene is a room, one to three things, and how they stand to each other; a clip films one scene
several times while the things and the camera move a little, as they do before an infant's eyes.
All randomness is numpy's RandomState, whose stream is frozen for ever (NEP 19), and all drawing is
flat integer polygons, so that a seed gives the same bytes on every machine.
"""
from dataclasses import dataclass
from math import ceil, cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (214, 45, 45), "orange": (240, 140, 30), "yellow": (240, 215, 50),
           "green": (60, 165, 75), "blue": (50, 95, 215), "purple": (140, 65, 175),
           "white": (240, 240, 240), "brown": (125, 80, 45)}
ROOMS = [((196, 190, 176), (150, 128, 104)), ((176, 190, 198), (132, 136, 140)),
         ((200, 186, 190), (140, 120, 124)), ((182, 196, 178), (126, 132, 108))]  # wall, floor


def oval(x, y, rx, ry, shade="c"):
    """An ellipse as a polygon: centre and radii in the thing's unit square, y downwards."""
    return [(x + rx * cos(a * pi / 12), y + ry * sin(a * pi / 12)) for a in range(24)], shade


def poly(shade, *xy):
    """A polygon from x, y, x, y ... in the unit square. Shades: c colour, d dark, l light, k, w."""
    return list(zip(xy[::2], xy[1::2])), shade


def rect(x0, y0, x1, y1, shade="c"):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], shade


# What a toddler meets: each thing is its silhouette in the one colour that is said, then details.
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

# What is said: of one thing, of two, and of nothing that is there. {a} "a red ball", {the} "the
# red ball" (the colour is said about every other time), {thing} "ball"; 2 is the second thing.
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

COLUMNS = {
    "labeled_s": ("trial_id", "target_category", "real_category", "image", "subset"),
    "vtwt": ("image", "positive_phrase", "negative_phrase", "subset"),
    "baby_winoground": ("instance_id", "positive_phrase", "negative_phrase", "image", "image_tag",
                        "subset"),
    "caption": ("image", "text", "subset"), "probe": ("image", "kind", "colour")}


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
    """Whether this colour x thing pair is kept out of all training, pictures and speech alike.

    One colour a kind, two kinds a colour: 16 of the 128 pairs. Never true of a sprite."""
    if not thing.colour:
        return False
    kind = list(THINGS).index(thing.kind)
    return list(COLOURS).index(thing.colour) == (3 * kind + kind // 8) % 8


def random_thing(rng, kinds, held=False, but=()):
    """A thing whose kind is not among `but`; held=True draws from the held-out pairs only."""
    while True:
        thing = Thing(pick(rng, list(kinds)), pick(rng, list(COLOURS)) if kinds is THINGS else "")
        if held_out(thing) == held and thing.kind not in but:
            return thing


def random_scene(rng, kinds, count=None, held=False):
    """One thing (60 %), two (30 %) or three (10 %), of different kinds, somewhere in the house."""
    things = []
    for _ in range(count or pick(rng, (1, 1, 1, 1, 1, 1, 2, 2, 2, 3))):
        things.append(random_thing(rng, kinds, held, [t.kind for t in things]))
    where = pick(rng, ("on", "left of", "right of", "next to")) if len(things) == 2 else ""
    return Scene(rng.randint(len(ROOMS)), tuple(things), where)


def film(scene, rng, size, kinds):
    """One frame of a scene, (size, size, 3) uint8: the layout is the scene's, while positions,
    sizes, tilts, the camera, a passing hand, blur and noise are drawn anew."""
    big = 2 * size  # drawn twice as large, then averaged: smooth edges from integer polygons
    wall, floor = ROOMS[scene.room]
    image = Image.new("RGB", (big, big), wall)
    draw = ImageDraw.Draw(image)
    pan, horizon = rng.randint(-big // 2, big // 2), rng.randint(big * 5 // 10, big * 8 // 10)
    for stripe in range(-2, 5):  # wallpaper or planks, so that rooms differ in more than hue
        x = pan + stripe * big // (3 + scene.room)
        draw.rectangle((x, 0, x + big // 24, big), tuple(c - 8 for c in wall))
    draw.rectangle((0, horizon, big, big), floor)

    centres = {1: ((.5, .5),), 2: ((.29, .54), (.71, .54)), 3: ((.2, .6), (.52, .42), (.82, .6))}
    places = centres[len(scene.things)]
    extent = (.74, .46, .38)[len(scene.things) - 1]
    if scene.where == "on":
        places = (.5, .28), (.5, .72)
    elif scene.where == "right of" or scene.where == "next to" and rng.randint(2):
        places = places[::-1]
    shift = rng.uniform(-.05, .05, 2)
    for thing, place in reversed(list(zip(scene.things, places))):  # later ones may hide earlier
        jitter = rng.uniform(-.06, .06, 2) * (1.5 if len(places) == 1 else .6)
        side = extent * rng.uniform(.8, 1.15) * big
        draw_thing(image, thing, kinds, (place + shift + jitter) * big, side,
                   rng.uniform(-.35, .35), rng.randint(2))
    if rng.randint(8) == 0:  # the infant's own hand comes into view
        x = rng.randint(big)
        draw.polygon([(x - big // 6, big), (x - big // 8, big * 4 // 5), (x, big * 3 // 4),
                      (x + big // 8, big * 4 // 5), (x + big // 6, big)], (224, 172, 140))

    frame = np.asarray(image, np.int32)
    if rng.randint(5) == 0:  # a quick turn of the head
        frame = sum(np.roll(frame, step, axis=1) for step in range(-2, 3)) // 5
    frame = frame.reshape(size, 2, size, 2, 3).sum(axis=(1, 3)) // 4
    frame = frame * rng.randint(85, 116) // 100 + rng.randint(-6, 7, frame.shape)
    return frame.clip(0, 255).astype(np.uint8)


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
    shades = {"c": colour, "d": tuple(c * 7 // 10 for c in colour), "k": (35, 32, 38),
              "l": tuple(c + (255 - c) * 4 // 10 for c in colour), "w": (250, 250, 245)}
    cosine, sine, draw = cos(tilt) * side, sin(tilt) * side, ImageDraw.Draw(image)
    for points, shade in looks:
        points = [((.5 - x if mirrored else x - .5), y - .5) for x, y in points]
        draw.polygon([(round(centre[0] + x * cosine - y * sine),
                       round(centre[1] + x * sine + y * cosine)) for x, y in points], shades[shade])


def speak(line, scene, rng=None):
    """A line of the grammar, filled in; given an rng, every other colour is left unsaid."""
    words = {"where": scene.where}
    for suffix, thing in zip(("", "2", "3"), scene.things):
        name = thing.name if rng is None or rng.randint(2) else thing.kind
        words |= {"a" + suffix: ("an " if name[0] in "aeiou" else "a ") + name,
                  "the" + suffix: "the " + name, "name" + suffix: name,
                  "thing" + suffix: thing.kind, "colour" + suffix: thing.colour}
    return line.format(**words)


def utterance(scene, rng, routine=12):
    """What is said over a scene: one line of lower-case words, spaced like CVCL's transcripts.

    In `routine` of a hundred cases the words name nothing that is in view."""
    if rng.randint(100) < routine:
        return pick(rng, ROUTINE)
    one = COLOUR if scene.things[0].colour and rng.randint(4) == 0 else NAMING
    lines = (one, TOGETHER if rng.randint(2) else WHERE, THREE)[len(scene.things) - 1]
    return speak(pick(rng, lines), scene, rng=rng)


def evaluation(rng, size, kinds, times=1.0):
    """The four BabyVLM tasks and a probe: ({file: (header, rows)}, {image name: frame}).

    The columns are BabyVLM's own, and `subset`, by which eval.py reports apart: "seen" pairs of
    colour and thing, "held_out" ones and, in Winoground, "binding" (whose colour is which) and
    "place" (what is on what). probe.csv labels frames for the eye's linear probe."""
    images, rows = {}, {name: [] for name in COLUMNS}
    drawn = kinds is THINGS

    def shoot(folder, *things, where=""):
        name = f"{folder.replace(' ', '_')}/img_{len(images)}.png"
        images[name] = film(Scene(rng.randint(len(ROOMS)), things, where), rng, size, kinds)
        return name

    def foil(thing, recolour):
        """A thing, never a held-out one, that differs from this one in colour or in kind alone."""
        other = thing
        while other == thing or held_out(other):
            new = random_thing(rng, kinds)
            other = Thing(thing.kind, new.colour) if recolour else Thing(new.kind, thing.colour)
        return other

    def compare(subset, positive, negative, image, foil_image):
        number = len(rows["baby_winoground"]) // 2
        for name, tag in ((image, "positive"), (foil_image, "negative")):
            rows["baby_winoground"].append((number, positive, negative, name, tag, subset))

    for subset, held, share in (("seen", False, 3), ("held_out", True, 1))[:2 if drawn else 1]:
        for trial in range(ceil(80 * share * times)):
            target = random_thing(rng, kinds, held)
            shown = [target]
            while len(shown) < 4:
                shown.append(random_thing(rng, kinds, but=[t.kind for t in shown]))
            rows["labeled_s"] += [(f"{subset}_{trial}", target.kind, thing.kind,
                                   shoot(thing.kind, thing), subset) for thing in shown]
        for trial in range(ceil(140 * share * times)):
            thing = random_thing(rng, kinds, held)
            other = foil(thing, drawn and trial % 2)
            rows["vtwt"].append((shoot("vtwt", thing), thing.name, other.name, subset))
        for trial in range(ceil(50 * share * times)):
            thing = random_thing(rng, kinds, held)
            other = foil(thing, drawn and trial % 2)
            compare(subset, thing.name, other.name, shoot("winoground", thing),
                    shoot("winoground", other))
        for trial in range(ceil(70 * share * times)):
            scene = Scene(0, (random_thing(rng, kinds, held),))
            rows["caption"].append((shoot("caption", *scene.things), speak("look , {a} !", scene),
                                    subset))
    for trial in range(ceil(50 * times)):
        a, b = two = random_scene(rng, kinds, 2).things
        compare("place", *(speak("the {thing} is on the {thing2} .", Scene(0, pair))
                           for pair in (two, two[::-1])),
                shoot("winoground", a, b, where="on"), shoot("winoground", b, a, where="on"))
        c, d = Thing(a.kind, b.colour), Thing(b.kind, a.colour)
        if a.colour != b.colour and not held_out(c) and not held_out(d):
            compare("binding", *(speak("{a} and {a2} .", Scene(0, pair))
                                 for pair in ((a, b), (c, d))),
                    shoot("winoground", a, b), shoot("winoground", c, d))
    for trial in range(ceil(2400 * times) if drawn else 0):
        thing = random_thing(rng, kinds)
        rows["probe"].append((shoot("probe", thing), thing.kind, thing.colour))
    return {name: (COLUMNS[name], lines) for name, lines in rows.items() if lines}, images
