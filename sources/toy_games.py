"""
A curriculum of games before the ten tests of the Toolbox: yes or no, picture by picture.

A test about several pictures asks at once what a game asks one by one: does this picture match this
word, or that picture? Then the game asks which one matches; its letter can be read off the answers
so far. A test wants the letter without them. A game is drawn by an Album and is (pictures,
[(question, answer)]).
"""

from functools import partial

from sources.toolbox_prompts import LETTERS, NEW, write
from sources.toy import THINGS, pick
from sources.toy_chat import article
from sources.toy_items import MAKE, four_kinds, of_kind, shuffled

IS_IT = ("is it {} ?", "is this the {} ?", "can you see the '{}' ?", "touch the '{}' !")
SEEN = ("again", "new")  # instead of no and yes: elsewhere yes means a match


def one_by_one(question, rights, names, mark="", words=("no", "yes")):
    """Turns of one picture each. The answer also names the picture: no , a cup .

    question: before the first picture. words: for a wrong and a right picture. mark, as "({})": put
    a letter before each picture, and ask at the end which one is right."""
    turns, before = [], question
    for letter, right, name in zip(LETTERS, map(int, rights), names):
        answer = f"{words[right]} , {article(name)} ."
        turns.append((f"{before}{mark.format(letter)}<image>", answer))
        before = " " if mark else ""
    return [*turns, (" ?", LETTERS[rights.index(True)])] if mark else turns


def is_it(album):
    """One word and four pictures: does each show it?"""
    rng, kind = album.rng, album.thing().kind
    rights = rng.randint(2, size=4).tolist()
    things = [of_kind(kind, rng) if right else album.other([kind]) for right in rights]
    turns = one_by_one(pick(rng, IS_IT).format(kind), rights, [thing.kind for thing in things])
    return [album.portrait(thing) for thing in things], turns


def touch(album):
    """Picture Vocabulary, picture by picture."""
    things = four_kinds(album)
    question = f"Touch the image of '{things[0].kind}' "
    things, right = shuffled(album.rng, things, 0)
    rights, kinds = [letter == right for letter in LETTERS], [thing.kind for thing in things]
    turns = one_by_one(question, rights, kinds, "({})")
    return [album.portrait(thing) for thing in things], turns


def is_same(album, at_once=False):
    """One picture and three others, in the wording of Left/Right or Spatial Details: which one is
    the same?"""
    rng, target = album.rng, album.thing()
    first = album.portrait(target)
    things = [target, *(album.other([target.kind]) for _ in range(2))]
    pictures = [first, *map(album.portrait, things[1:])]
    options, right = shuffled(rng, list(zip(pictures, things)), 0)
    pictures, things = zip(*options)
    question = write(pick(rng, ("left_right", "spatial_details")), 4)
    if at_once:
        return [first, *pictures], [(question, right)]
    rights, names = [letter == right for letter in LETTERS[:3]], [thing.kind for thing in things]
    turns = one_by_one(question.partition("(A)")[0], rights, names, "({}) ")
    return [first, *pictures], turns


def is_new(album):
    """One or two pictures, then Memory, picture by picture."""
    rng = album.rng
    kinds = [str(kind) for kind in rng.permutation(list(THINGS))]
    pictures = [album.portrait(of_kind(kind, rng)) for kind in kinds]
    learnt = rng.randint(1, 3)
    shown, turns, question = list(range(learnt)), [], "<image>" * learnt + " "
    for new in range(learnt, learnt + 3):
        pair = [new, rng.randint(learnt)][:: rng.choice([-1, 1])]
        rights, names = [i == new for i in pair], [kinds[i] for i in pair]
        turns += one_by_one(question + NEW, rights, names, "({}) ", SEEN)
        shown, question = shown + pair, "Let's try more. "
    return [pictures[i] for i in shown], turns


def playing(test, **how):
    """A question of a test as a game."""
    return lambda album: MAKE[test](test, album, **how)[:2]


def memory_of(learnt):
    """Memory with so many things to remember."""
    return playing("memory", learnt=learnt)


VOCABULARY, SAME = playing("picture_vocabulary"), partial(is_same, at_once=True)
# Stages: (how many of 62 games, the kinds of game, in turn). Parts of a test come before the test.
# Earlier games are repeated: without that, Picture Vocabulary was forgotten.
STAGES = (
    (10, is_it),
    (12, touch, VOCABULARY),
    (20, is_same, SAME, VOCABULARY),
    (10, is_new, memory_of(1), memory_of(1), SAME, VOCABULARY),
    (10, memory_of(2), memory_of(3), SAME, VOCABULARY),
)


def games_of(games):
    """The number of games in each stage, of so many in all."""
    whole = sum(share for share, *_ in STAGES)
    return [games * share // whole for share, *_ in STAGES]
