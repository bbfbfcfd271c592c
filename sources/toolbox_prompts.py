"""
The wording of the ten tests of the DevCV Toolbox: prompts and answers. How they are scored:
tasks/toolbox.py; how the toy world draws them: toy_items.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Test:
    """prompt: # is a picture, {} the thing asked for, {ways} the two ways out of Visual Delayed
    Response; for Memory the prompt of the later rounds. answers: the possible ones. query: the
    first picture is the question, the others are the choices. options: how many of the answers a
    question offers; 0: all."""

    prompt: str
    answers: tuple
    query: bool = False
    ours: bool = False  # a fair form, which the original does not have
    options: int = 0

    @property
    def chance(self):
        return 1 / (self.options or len(self.answers))


LETTERS = ("A", "B", "C", "D")
# In circular order, so that neighbours are adjacent and opposites four apart
DIRECTIONS = (
    "top",
    "top right",
    "right",
    "bottom right",
    "bottom",
    "bottom left",
    "left",
    "top left",
)
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
    "delayed_response": Test("# does the {} leave the frame {ways}.", DIRECTIONS, options=2),
    "delayed_response_open": Test(
        "# which part of the frame does the {} leave from? respond ONLY with one of: 'top', "
        "'bottom', 'left', 'right', 'top right', 'top left', 'bottom right', or 'bottom left'.",
        DIRECTIONS,
    ),
    "memory": Test(LATER, LETTERS[:2]),
    "memory_fair": Test(LATER, LETTERS[:2], ours=True),
    "more_synthetic": Test("Which image has more {}? Answer (A) # (B) #", LETTERS[:2]),
    "more_natural": Test("Which image has more {}? Answer (A) # (B) #", LETTERS[:2]),
    "subitizing": Test("# How many of {} do you see?", ("1", "2", "3")),
    "object_counting": Test("# How many {} do you see?", tuple(map(str, range(1, 13)))),
    "looking_while_listening": Test("", ()),  # two pictures and two phrases, not a question
}
ROUNDS, LEARNT = 15, 5  # of Memory; rounds 1 to 5 show one new thing each


def opposite(direction):
    return DIRECTIONS[(DIRECTIONS.index(direction) + 4) % 8]


def two_ways(first, second):
    """The end of Visual Delayed Response's question, about the sides or corners `first` and
    `second`."""
    corner = "corner" if " " in first else "side"
    frame = f"through the {first} {corner} of the frame or the {second} {corner} of the frame?"
    return f"{frame} respond ONLY with '{first}' or '{second}'"


def write(test, pictures, word="", ways=("right", "left")):
    """A test's question about so many pictures; a clip is several <image> in a row. ways: the two
    that Visual Delayed Response asks about."""
    prompt = TESTS[test].prompt.replace("{}", word).replace("{ways}", two_ways(*ways))
    clip = "<image>" * (pictures + 1 - prompt.count("#"))  # for the first #
    return prompt.replace("#", clip, 1).replace("#", "<image>")
