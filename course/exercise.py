"""
What an exercise is, and how its check finds a fault.

An exercise is a function without a body: its docstring has shapes, units and the source of the
formula. Below it stands its check, which calls the student's function and compares it with an
independent truth: a slow loop, fp64, a counted set, or the product's own function.

    @exercise("1.1", "easy")
    def add(a, b):
        \"\"\"The sum of two numbers.\"\"\"

    @check(add)
    def check_add(yours):
        for a, b in ((1, 2), (0, 0)):
            same(call(yours, a, b), a + b, given={"a": a, "b": b}, hint="What does + do?")

`python course/start.py 1.1` writes the stub, `python course/check.py 1.1` checks the
student's file.
"""

import copy
import importlib
import importlib.util
import inspect
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

COURSE = Path(__file__).resolve().parent
for folder in (COURSE, COURSE.parent):
    sys.path.insert(0, str(folder))
os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: kernels run on a CPU

import numpy as np  # noqa: E402
import torch  # noqa: E402

from config import UserError  # noqa: E402

LEVELS = ("easy", "medium", "hard")
ANSWERS = Path("answers")  # where a student's files are, in the current folder


@dataclass
class Exercise:
    number: str  # "2.3": chapter 2, the third
    level: str  # easy, medium, hard
    stub: object  # the function without a body; a kernel is wrapped by Triton
    check: object = None  # called with the student's function

    @property
    def function(self):
        return getattr(self.stub, "fn", self.stub)

    @property
    def name(self):
        return self.function.__name__

    @property
    def path(self):
        """The student's file."""
        return ANSWERS / f"{self.number.replace('.', '_')}_{self.name}.py"

    def source(self):
        """The text of the student's file at the start."""
        lines = inspect.getsource(self.function).splitlines(keepends=True)
        stub = "".join(lines[1:])  # without @exercise
        needs = [name for name in ("math", "torch", "triton") if f"{name}." in stub]
        needs = [f"import {name}\n" for name in needs]
        if "tl." in stub:
            needs.append("import triton.language as tl\n")
        space = "\n\n" if needs else ""
        if "triton" in stub:
            body = "    pass  # your code\n"
        else:
            body = '    raise NotImplementedError("your code")\n'
        return "".join(needs) + space + stub + body


EXERCISES = {}  # {number: Exercise}, in the order of the chapters


def exercise(number, level):
    """A decorator: this function is the stub of an exercise."""
    assert level in LEVELS and number not in EXERCISES, number

    def add(stub):
        EXERCISES[number] = Exercise(number, level, stub)
        return stub

    return add


def check(stub):
    """A decorator: this function is the check of an exercise."""

    def add(function):
        (of,) = (one for one in EXERCISES.values() if one.stub is stub)
        of.check = function
        return function

    return add


def find_exercises():
    """EXERCISES, with all chapters read, in order."""
    for path in sorted((COURSE / "exercises").glob("chapter_*.py")):
        if "triton" not in path.stem or importlib.util.find_spec("triton"):
            importlib.import_module(f"exercises.{path.stem}")
    return dict(sorted(EXERCISES.items()))


def choose(number):
    """The Exercise of a number. Raises UserError."""
    found = find_exercises()
    if number not in found:
        raise UserError(f"exercise {number}: there is none; one of {', '.join(found)}")
    return found[number]


# ---------------------------------------------------------------------------------------------
# For checks


class Wrong(Exception):
    """The student's function is wrong. found: how; hint: where to look."""

    def __init__(self, found, hint=""):
        super().__init__(found)
        self.hint = hint


def call(function, *arguments, may_be_none=False):
    """What a function gives. It must return something, and leave its arguments as they are. Raises
    Wrong; an exception of the function has the arguments as its attribute `given`."""
    before = copy.deepcopy(arguments)
    try:
        result = function(*arguments)
    except Exception as error:
        names = inspect.signature(function).parameters
        error.given = describe_arguments(dict(zip(names, before)))
        raise
    if result is None and not may_be_none:
        raise Wrong("it returned nothing", "Is there a return?")
    for number, (was, now) in enumerate(zip(before, arguments), 1):
        if difference(now, was, 0.0):
            raise Wrong(f"argument {number} is changed", "Work on a copy, or on a new tensor.")
    return result


def describe_arguments(given):
    return ", ".join(f"{name} = {shorten(value)}" for name, value in given.items())


def is_array(value):
    return isinstance(value, (torch.Tensor, np.ndarray))


def difference(found, wanted, tolerance):
    """What differs, in words; "" if nothing does. Numbers may differ by tolerance, times the
    largest of them where it is above 1."""
    if is_array(wanted):
        if not is_array(found):
            return f"it is a {type(found).__name__}, not a tensor"
        if tuple(found.shape) != tuple(wanted.shape):
            return f"its shape is {tuple(found.shape)}, not {tuple(wanted.shape)}"
        a, b = (np.asarray(torch.as_tensor(v).detach().double()) for v in (found, wanted))
        if not a.size:
            return ""
        allowed = tolerance * max(1.0, float(np.abs(b[np.isfinite(b)]).max(initial=0.0)))
        with np.errstate(invalid="ignore"):
            wrong = ~((a == b) | (np.abs(a - b) <= allowed))
        if not wrong.any():
            return ""
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f"[{', '.join(map(str, place))}] " if place else ""
        share = f" ({wrong.mean():.0%} of the numbers are wrong)" if where else ""
        return f"{where or 'it '}is {a[place]:.6g}, not {b[place]:.6g}{share}"
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return f"it is a {type(found).__name__}, not a dict"
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            if key not in found or key not in wanted:
                return f"key {key!r} is {'missing' if key in wanted else 'too many'}"
            if inner := difference(found[key], wanted[key], tolerance):
                return f"at key {key!r} {inner}"
        return ""
    if isinstance(wanted, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(wanted):
            return f"it is {shorten(found)}, not {shorten(wanted)}"
        for i, (a, b) in enumerate(zip(found, wanted)):
            if inner := difference(a, b, tolerance):
                return f"item {i}: {inner}"
        return ""
    if isinstance(wanted, float):
        try:
            number = float(found)
        except (TypeError, ValueError):
            return f"it is {shorten(found)}, not a number"
        good = number == wanted or abs(number - wanted) <= tolerance * max(1.0, abs(wanted))
        return "" if good else f"it is {number:.6g}, not {wanted:.6g}"
    same_value = found == wanted and isinstance(found, bool) == isinstance(wanted, bool)
    return "" if same_value else f"it is {shorten(found)}, not {shorten(wanted)}"


def shorten(value, most=160):
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def same(found, wanted, given, hint, tolerance=1e-5):
    """Raise Wrong if found is not what is wanted. given: {name of an argument: value}, or words."""
    how = difference(found, wanted, tolerance)
    if how:
        if isinstance(given, dict):
            given = describe_arguments(given)
        raise Wrong(f"with {given}: {how}", hint)


def describe(number):
    """An exercise in a list: number, level, name, and what its docstring begins with."""
    one = EXERCISES[number]
    words = re.sub(r" ?\([^()]*\)", "", " ".join(one.function.__doc__.split()))
    title = re.split(r"[.:;?] |, ", words)[0]
    return f"{number:<5} {one.level:<7} {one.name:<20} {textwrap.shorten(title, 66)}"
