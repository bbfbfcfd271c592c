"""
Games that lead to the ten tests of the Toolbox: yes or no, picture by picture.

A test that shows several pictures asks at once what a game asks one by one: does this picture go
with this word, with that picture? Then: so which one? Its letter can be read off the answers, and
later has to be known without them. A game is drawn through an Album: (pictures, [(question,
answer)]).
"""

from functools import partial

from sources._toy_items import MAKE, details, four_kinds, of_kind, shuffled
from sources.toy import THINGS, pick
from sources.toy_chat import article
from toolbox import LEARNT, LETTERS, NEW, write

IS_IT = ("is it {} ?", "is this the {} ?", "can you see the '{}' ?", "touch the '{}' !")
SEEN = ("again", "new")  # not no and yes: everywhere else yes is said of a match


def one_by_one(question, rights, names, mark="", words=("no", "yes")):
    """Turns of one picture each, answered as people do, who say what it is instead: no , a cup .

    The question stands before the first. words: for a picture that is not right, and one that is.
    With a mark, as "({})", a letter stands before each, and last it is asked which is right."""
    turns, before = [], question
    for letter, right, name in zip(LETTERS, map(int, rights), names):
        answer = f"{words[right]} , {article(name)} ."
        turns.append((f"{before}{mark.format(letter)}<image>", answer))
        before = " " if mark else ""
    return [*turns, (" ?", LETTERS[rights.index(True)])] if mark else turns


def is_it(album):
    """One word, and four pictures, each of it or not."""
    rng, kind = album.rng, album.thing().kind
    rights = rng.randint(2, size=4).tolist()
    things = [of_kind(kind, rng) if right else album.other([kind]) for right in rights]
    turns = one_by_one(pick(rng, IS_IT).format(kind), rights, [thing.kind for thing in things])
    return [album.portrait(thing) for thing in things], turns


def touch(album):
    """Picture Vocabulary, one by one."""
    things = four_kinds(album)
    question = f"Touch the image of '{things[0].kind}' "
    things, right = shuffled(album.rng, things, 0)
    rights, kinds = [letter == right for letter in LETTERS], [thing.kind for thing in things]
    turns = one_by_one(question, rights, kinds, "({})")
    return [album.portrait(thing) for thing in things], turns


def is_same(album, again=False, at_once=False):
    """One picture, and three others in the words of Left/Right or Spatial Details: which is of the
    same thing? again: it is the same picture."""
    rng, target = album.rng, album.thing()
    first = album.portrait(target)
    things = [target, *(album.other([target.kind]) for _ in range(2))]
    pictures = [first if again else album.portrait(target), *map(album.portrait, things[1:])]
    options, right = shuffled(rng, list(zip(pictures, things)), 0)
    pictures, things = zip(*options)
    question = write(pick(rng, ("left_right", "spatial_details")), 4)
    if at_once:
        return [first, *pictures], [(question, right)]
    return [first, *pictures], each_option(question, right, [thing.kind for thing in things])


def is_exactly(album):
    """Spatial Details, one by one."""
    pictures, things, right = details(album)
    turns = each_option(write("spatial_details", 4), right, [thing.name for thing in things])
    return pictures, turns


def each_option(question, right, names):
    """Turns of a test's three pictures to choose from, the one with the letter `right` among them;
    of its question what stands before these."""
    rights = [letter == right for letter in LETTERS[:3]]
    return one_by_one(question.partition("(A)")[0], rights, names, "({}) ")


def is_new(album, most=LEARNT):
    """Some pictures, or one, without a word; then Memory, one by one."""
    rng = album.rng
    kinds = [str(kind) for kind in rng.permutation(list(THINGS))]
    pictures = [album.portrait(of_kind(kind, rng)) for kind in kinds]
    learnt = rng.randint(1, most + 1)
    shown, turns, question = list(range(learnt)), [], "<image>" * learnt + " "
    for new in range(learnt, learnt + 3):
        pair = [new, rng.randint(learnt)][:: rng.choice([-1, 1])]
        rights, names = [i == new for i in pair], [kinds[i] for i in pair]
        turns += one_by_one(question + NEW, rights, names, "({}) ", SEEN)
        shown, question = shown + pair, "Let's try more. "
    return [pictures[i] for i in shown], turns


def playing(test, **how):
    """A test's own question as a game."""
    return lambda album: MAKE[test](test, album, **how)[:2]


VOCABULARY, DETAILS = playing("picture_vocabulary"), playing("spatial_details")
# Stages: so many of 70 games, of these kinds in turn. First what a test is made of, then the test.
# Picture Vocabulary is asked all along: when it was not, it was lost
STAGES = (
    (10, is_it),
    (12, touch, VOCABULARY),
    (14, partial(is_same, again=True), partial(is_same, again=True, at_once=True), VOCABULARY),
    (14, is_exactly, partial(is_same, at_once=True), DETAILS, VOCABULARY),
    (10, partial(is_new, most=2), is_new, DETAILS, VOCABULARY),
    (10, is_new, playing("memory", rounds=7, learnt=3), DETAILS, VOCABULARY),
)


def games_of(games):
    """How many of so many games each stage has."""
    whole = sum(share for share, *_ in STAGES)
    return [games * share // whole for share, *_ in STAGES]
