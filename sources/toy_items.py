"""
Items of the ten tests of the Toolbox, drawn in the toy world. Each function of MAKE draws by an
Album and returns (pictures, [(question, answer)], more fields).
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sources import toy
from sources.toolbox_prompts import DIRECTIONS, LEARNT, LETTERS, NEW, TESTS, opposite, write
from sources.toy import COLOURS, ROOMS, THINGS, Thing, draw_room, draw_thing, pick, random_thing
from sources.toy_chat import article

# ---------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class Placed:
    """A thing at a position: centre and side in picture widths, tilt in radians."""

    thing: Thing
    x: float
    y: float
    side: float
    tilt: float = 0.0
    mirrored: int = 0


def paint(placed, rng, size, room=None, light=1.0):
    """A frame (size, size, 3) uint8 of placed things, the first in front, in a room (index of
    toy.ROOMS, seed of its appearance) or on black."""
    big = 2 * size  # drawn twice as large, then averaged
    page = Image.new("RGB", (big, big))
    if room is not None:
        page = draw_room(room[0], np.random.RandomState(room[1]), big)
    for one in reversed(placed):
        centre = one.x * big, one.y * big
        draw_thing(page, one.thing, THINGS, centre, one.side * big, one.tilt, one.mirrored)
    frame = toy.halved(np.asarray(page, np.int32))
    frame = frame * int(100 * light) // 100 + rng.randint(-6, 7, frame.shape)
    return frame.clip(0, 255).astype(np.uint8)


def some_room(rng):
    return rng.randint(len(ROOMS)), rng.randint(1 << 30)


def some_light(rng):
    return rng.uniform(0.85, 1.15)


def stand(thing, rng, x, y, side):
    return Placed(thing, x, y, side, rng.uniform(-0.35, 0.35), rng.randint(2))


def portrait(thing, rng):
    """A thing, in the middle or nearly."""
    x, y = rng.uniform(0.38, 0.62, 2)
    return stand(thing, rng, x, y, rng.uniform(0.5, 0.8))


QUARTERS = ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73))  # A, B, C, D of Localization


def in_quarters(things, rng):
    """Things in quarters of the picture; returns (placed, the quarters' numbers)."""
    quarters = rng.permutation(4)[: len(things)].tolist()
    placed = []
    for thing, quarter in zip(things, quarters):
        x, y = QUARTERS[quarter] + rng.uniform(-0.06, 0.06, 2)
        placed.append(stand(thing, rng, x, y, rng.uniform(0.34, 0.46)))
    return placed, quarters


def aside(things, rng):
    """Things to one side, so that the mirror image is another picture."""
    placed = []
    for thing in things:
        x = 0.5 + rng.choice([-1, 1]) * rng.uniform(0.14, 0.3)
        placed.append(stand(thing, rng, x, rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.55)))
    return placed


FACING = ("boat", "chair", "cup", "duck", "fish", "shoe")  # whose mirror image is another


def facing(thing, rng, mirrored):
    """A thing that faces one way, somewhere in the middle, nearer or farther."""
    x, y = rng.uniform(0.35, 0.65, 2)
    return Placed(thing, x, y, rng.uniform(0.4, 0.8), rng.uniform(-0.2, 0.2), mirrored)


def crowd(things, rng, even):
    """Things apart from each other, on a grid of 4 x 4 or coarser; even: copies of one size."""
    grid = rng.randint(max(2, int(np.ceil(len(things) ** 0.5))), 5)
    cells = rng.permutation(grid * grid)[: len(things)]
    side = rng.uniform(0.7, 0.95)
    placed = []
    for thing, cell in zip(things, cells):
        own = side if even else rng.uniform(0.6, 1.0)
        x, y = (cell % grid + 0.5) / grid, (cell // grid + 0.5) / grid
        placed.append(Placed(thing, x, y, own / grid, rng.uniform(-0.2, 0.2), rng.randint(2)))
    return placed


def path_out(direction, rng, steps):
    """Positions of a thing that leaves: it stands, then goes in a direction until it is out of
    view, which the last frame or two show."""
    angle = DIRECTIONS.index(direction) * np.pi / 4
    step = np.array([np.sin(angle), -np.cos(angle)])
    start = np.array([0.5, 0.5]) + rng.uniform(-0.12, 0.12, 2) - 0.1 * step
    gone = steps - rng.randint(1, 3)  # so many frames still show some of it
    return [start + step * (1.0 * i / gone) for i in range(steps)]


def leaving(thing, direction, rng, size):
    """5 to 9 frames in which a thing leaves the view."""
    frames, room, light = [], some_room(rng), some_light(rng)
    own = stand(thing, rng, 0.5, 0.5, rng.uniform(0.3, 0.42))
    for x, y in path_out(direction, rng, rng.randint(5, 10)):
        moved = Placed(thing, x, y, own.side, own.tilt, own.mirrored)
        frames.append(paint([moved], rng, size, room, light))
    return frames


# ---------------------------------------------------------------------------------------------
# Items of the tests


class Album:
    """Pictures for items, by what they show.

    keep(frame, new_clip): gives a picture its number or name. most: so many pictures of a thing are
    drawn, and so many scenes of a test, then chosen from; (0, 0): each is drawn when needed, as in
    the test parts."""

    def __init__(self, keep, rng, size, held_out=False, most=(0, 0)):
        self.keep, self.rng, self.size = keep, rng, size
        self.held_out, self.pools = held_out, defaultdict(list)
        self.most, self.scenes = most

    def thing(self, but=()):
        """What is asked about."""
        return random_thing(self.rng, THINGS, self.held_out, but)

    def other(self, but):
        """What stands beside it: never a pair that is held out."""
        return random_thing(self.rng, THINGS, False, but)

    def take(self, key, draw, most=None):
        """One of the pictures of a kind; draw() makes a new one."""
        pool, most = self.pools[key], self.most if most is None else most
        if self.most and len(pool) >= most:
            return pick(self.rng, pool)
        pool.append(draw())
        return pool[-1]

    def paint(self, placed, room=None, light=1.0):
        return self.keep(paint(placed, self.rng, self.size, room, light), True)

    def portrait(self, thing):
        draw = lambda: self.paint(
            [portrait(thing, self.rng)], some_room(self.rng), some_light(self.rng)
        )
        return self.take(("portrait", thing), draw)

    def crowd(self, thing, count, natural):
        """`count` things of a kind: copies on black, or in a room, in several colours and sizes."""

        def draw():
            if not natural:
                return self.paint(crowd([thing] * count, self.rng, even=True))
            kin = [thing, *(of_kind(thing.kind, self.rng) for _ in range(count - 1))]
            placed = crowd(kin, self.rng, even=False)
            return self.paint(placed, some_room(self.rng), some_light(self.rng))

        return self.take(("crowd", thing, count, natural), draw, self.most // 4 or 1)


def of_kind(kind, rng, held_out=False):
    """A thing of this kind, of a pair that is held out or not."""
    while True:
        thing = Thing(kind, pick(rng, list(COLOURS)))
        if toy.held_out(thing) == held_out:
            return thing


def plural(kind):
    return kind if kind == "fish" else f"{kind}s"


def shuffled(rng, pictures, right):
    """(pictures in another order, the letter of the one that was number `right`)."""
    order = rng.permutation(len(pictures)).tolist()
    return [pictures[i] for i in order], LETTERS[order.index(right)]


# Each of these makes an item of a test: (pictures, [(question, answer)], more fields)


def one(test, pictures, answer, word=""):
    return pictures, [(write(test, len(pictures), word), answer)], {}


def four_kinds(album):
    """What is asked for, and three things of other kinds."""
    things = [album.thing()]
    while len(things) < 4:
        things.append(album.other([thing.kind for thing in things]))
    return things


def picture_vocabulary(test, album):
    things = four_kinds(album)
    pictures, letter = shuffled(album.rng, [album.portrait(thing) for thing in things], 0)
    return one(test, pictures, letter, things[0].kind)


def localization(test, album):
    def draw():
        things = [album.thing()]
        while len(things) < 3:
            things.append(album.other([thing.kind for thing in things]))
        things = things[: album.rng.randint(2, 4)]
        placed, quarters = in_quarters(things, album.rng)
        picture = album.paint(placed, some_room(album.rng), some_light(album.rng))
        return picture, [(thing.kind, LETTERS[q]) for thing, q in zip(things, quarters)]

    picture, asked = album.take("quarters", draw, 4 * album.scenes)
    kind, letter = pick(album.rng, asked) if album.most else asked[0]
    return one(test, [picture], letter, kind)


def left_right(test, album):
    rng = album.rng

    def draw():
        things = [album.thing()]
        if rng.randint(2):
            things.append(album.other([things[0].kind]))
        frame = paint(aside(things, rng), rng, album.size, some_room(rng), some_light(rng))
        mirrored = album.keep(frame[:, ::-1], True)
        picture = album.keep(frame, True)
        return picture, picture, mirrored, mirrored

    query, *options = album.take(test, draw, album.scenes)
    options, letter = shuffled(rng, options, 0)
    return one(test, [query, *options], letter)


def left_right_fair(test, album):
    """Which faces the same way? All are other pictures of one thing: in other places and rooms, in
    another light and size; two face the other way."""
    rng, thing = album.rng, album.thing()
    while thing.kind not in FACING:
        thing = album.thing()
    way = rng.randint(2)

    def view(mirrored):
        draw = lambda: album.paint([facing(thing, rng, mirrored)], some_room(rng), some_light(rng))
        return album.take(("facing", thing, mirrored), draw)

    options = [view(way), view(1 - way), view(1 - way)]
    options, letter = shuffled(rng, options, 0)
    return one(test, [view(way), *options], letter)


def spatial_details(test, album):
    """A thing cut out; the picture it was cut out of, and two of its kind in other colours."""
    rng, target = album.rng, album.thing()

    def draw():
        own = portrait(target, rng)
        cut = Placed(target, 0.5, 0.5, own.side, own.tilt, own.mirrored)
        return album.paint([cut]), album.paint([own], some_room(rng), some_light(rng))

    query, right = album.take(("details", target), draw)
    others = []
    while len(others) < 2:
        other = of_kind(target.kind, rng)
        if other != target and other not in others:
            others.append(other)
    options, letter = shuffled(rng, [right, *map(album.portrait, others)], 0)
    return one(test, [query, *options], letter)


def delayed_response(test, album):
    def draw():
        thing = album.thing()
        direction = pick(album.rng, TESTS[test].answers)
        frames = leaving(thing, direction, album.rng, album.size)
        return [album.keep(frame, i == 0) for i, frame in enumerate(frames)], thing.kind, direction

    pictures, kind, direction = album.take(test, draw, album.scenes)
    ways = direction, opposite(direction)
    if album.rng.randint(2):
        ways = ways[::-1]
    return pictures, [(write(test, len(pictures), kind, ways), direction)], {}


def memory(test, album, learnt=LEARNT):
    """learnt: how many things the first rounds show; each is asked about in two later rounds,
    beside a new one."""
    rng, fair = album.rng, TESTS[test].ours
    kinds = [str(kind) for kind in rng.permutation(list(THINGS))][: 3 * learnt]
    things = [of_kind(k, rng, album.held_out and i < learnt) for i, k in enumerate(kinds)]
    pictures = [album.portrait(thing) for thing in things]
    first, new = pictures[:learnt], pictures[learnt:]
    shown, turns, same = [first[0]], [(NEW + "(A) <image>", "A")], {}
    pairs = list(zip(range(learnt - 1), first[1:]))  # the last new one, and a newer
    tested = rng.permutation(list(range(learnt)) * 2).tolist()
    for number, (old, newer) in enumerate([*pairs, *zip(tested, new)]):
        before = first[old]
        if fair and number >= learnt - 1:  # another picture of it
            before = album.portrait(things[old])
            same[before] = first[old]
        pair, letter = shuffled(rng, [newer, before], 0)
        shown += pair
        turns.append((write(test, 2), letter))
    return shown, turns, {"learnt": same} if fair else {}


def some_memory(test, album):
    """Memory for training, with 1 to LEARNT things; equally many rounds of each number."""
    sizes = np.arange(1, LEARNT + 1)
    return memory(test, album, album.rng.choice(sizes, p=1 / sizes / (1 / sizes).sum()))


def more(test, album):
    natural = test == "more_natural"
    thing, most = album.thing(), 6 if natural else 9
    few, many = sorted(album.rng.permutation(most)[:2] + 1)
    pictures = [album.crowd(thing, int(n), natural) for n in (many, few)]
    pictures, letter = shuffled(album.rng, pictures, 0)
    return one(test, pictures, letter, plural(thing.kind))


def counting(test, album):
    thing, answers = album.thing(), TESTS[test].answers
    answer = pick(album.rng, answers)
    picture = album.crowd(thing, int(answer), test == "subitizing")
    word = thing.kind if test == "subitizing" else plural(thing.kind)
    return one(test, [picture], answer, word)


def count_in_room(album):
    """Object Counting of up to three things in a room, where Subitizing also counts."""
    thing, number = album.thing(), album.rng.randint(1, 4)
    question = write("object_counting", 1, plural(thing.kind))
    return [album.crowd(thing, number, natural=True)], [(question, f"{number}")]


def listening(test, album):
    target = album.thing()
    other = album.other([target.kind])
    pictures = [album.portrait(target), album.portrait(other)]
    phrases = [f"look , {article(thing.name)} !" for thing in (target, other)]
    return pictures, [], {"phrases": phrases}


MAKE = {
    "picture_vocabulary": picture_vocabulary,
    "localization": localization,
    "left_right": left_right,
    "left_right_fair": left_right_fair,
    "spatial_details": spatial_details,
    "delayed_response": delayed_response,
    "delayed_response_open": delayed_response,
    "memory": memory,
    "memory_fair": memory,
    "more_synthetic": more,
    "more_natural": more,
    "subitizing": counting,
    "object_counting": counting,
    "looking_while_listening": listening,
}
MAKE_TO_TRAIN = MAKE | {"memory": some_memory, "memory_fair": some_memory}
UNTRAINED = ("subitizing", "looking_while_listening")  # these have no tuning data
# Training items of a test are divided by this, test items by the next: few of what is learnt easily
# and of the fair forms, many of Picture Vocabulary and Object Counting, which take longest
FEWER_TO_TRAIN = {
    "localization": 2,
    "left_right": 3,
    "left_right_fair": 6,
    "spatial_details": 2,
    "delayed_response": 8,
    "delayed_response_open": 3,
    "memory": 3,
    "memory_fair": 12,
    "more_synthetic": 5,
    "more_natural": 3,
}
FEWER_TO_TEST = {"memory": 5, "memory_fair": 5}
