"""
Knobs: the defaults in a script, then files, then flags; and the one error that a user can mend.

A script keeps its knobs in a flat dataclass of int, float, bool, str and tuples of these, one
comment each. `knob()` gives a default its range or its choices:

    @dataclass
    class Config(config.Knobs):
        n_layer: int = knob(4, low=1)  # blocks
        device: str = ""  # cpu, cuda, mps; empty: cuda where there is one

A file holds lines of `name = literal` in Python's syntax (+ - * / // allowed). It is parsed, never
run. On the command line `--key=value` and `--key value` both work, a bare `--key` switches a bool
on, and a knob that takes several values takes them one after the other.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import sys
import typing
from pathlib import Path

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class UserError(Exception):
    """Something that a user can put right. One line: what is wrong, where, and what to do."""


@dataclasses.dataclass
class Knobs:
    """What a script's Config inherits: `given` says where each knob that is not at its default
    was set, {"n_layer": "configs/phase0.py:17", "seed": "--seed"}."""

    def __post_init__(self):
        self.given = {}


def knob(default, low=None, high=None, choices=None, once=False):
    """A default with the values that are allowed: low <= value <= high, or one of `choices`.

    once: a file and a flag must not disagree on it."""
    allowed = {"low": low, "high": high, "choices": choices, "once": once}
    return dataclasses.field(default=default, metadata=allowed)


# ---------------------------------------------------------------------------------------------
# Reading


def literal(node):
    """The value of a syntax tree of literals, tuples and arithmetic. Raises ValueError."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](literal(node.left), literal(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -literal(node.operand)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(literal(element) for element in node.elts)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool, str):
        return node.value
    raise ValueError("not a literal")


def regular(path):
    """The path, where it is a file or nothing at all. Raises UserError for a folder, a pipe or a
    device: to open a pipe that nobody writes to is to wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: a folder, a pipe or a device, and not a file")
    return path


def read_file(path):
    """[(name, value, "file:line")] of a config file."""
    try:
        tree = ast.parse(Path(regular(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{path}:{line}: not Python syntax") from None
    found = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}:{node.lineno}"
        try:
            (target,) = node.targets
            found.append((target.id, literal(node.value), where))
        except (AttributeError, ValueError, TypeError, ZeroDivisionError, OverflowError):
            message = f"{where}: want `name = literal`, with + - * / // and tuples allowed"
            raise UserError(message) from None
    return found


def parse(text, kind):
    """The value of type `kind` that a flag's text means; the text itself where it means none."""
    if kind is str:
        return text
    source = text.capitalize() if kind is bool else text
    try:
        return literal(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, OverflowError):
        return text  # check() says what type is wanted


def read_flags(flags, kinds):
    """[(name, value, "--name")] of flags; values are parsed by their knob's type."""
    found, flags = [], list(flags)
    while flags:
        flag = flags.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag}: config files come first, knobs start with --")
        name, has_value, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        kind = kinds.get(name, str)
        several = typing.get_origin(kind) is tuple
        values = [value] if has_value else []
        takes = math.inf if several else 1
        while flags and len(values) < takes and not flags[0].startswith("--"):
            values.append(flags.pop(0))
        if not values and kind is bool:
            values = ["True"]
        if not values and name in kinds:
            raise UserError(f"--{name}: no value given")
        if several:
            element = typing.get_args(kind)[0]
            parsed = tuple(parse(v, element) for v in values)
            for earlier in [entry for entry in found if entry[0] == name]:
                found.remove(earlier)
                parsed = earlier[1] + parsed  # --image a --image b is --image a b
            found.append((name, parsed, f"--{name}"))
        else:
            found.append((name, parse((values or [""])[0], kind), f"--{name}"))
    return found


def check(field, value, where):
    """`value` as `field` takes it. Raises UserError when its type or its size is not allowed."""
    kind, allowed = field.type, field.metadata
    several = typing.get_origin(kind) is tuple
    element = typing.get_args(kind)[0] if several else kind
    values = value if isinstance(value, tuple) else (value,)
    if element is float:
        values = tuple(float(v) if type(v) is int else v for v in values)
    if (not several and len(values) != 1) or any(type(v) is not element for v in values):
        many = "several " if several else ""
        raise UserError(f"{where}: {field.name} takes {many}{element.__name__}, not {value!r}")
    for v in values:
        if isinstance(v, float) and not math.isfinite(v):
            raise UserError(f"{where}: {field.name} {v} is not a finite number")
        if allowed and not is_allowed(allowed, v):
            raise UserError(f"{where}: {field.name} {v!r} is not allowed: {describe(allowed)}")
    return values if several else values[0]


def is_allowed(allowed, value):
    if allowed["choices"] is not None:
        return value in allowed["choices"]
    above = allowed["low"] is None or value >= allowed["low"]
    below = allowed["high"] is None or value <= allowed["high"]
    return above and below


def describe(allowed):
    """The values that a knob allows, in words; empty where all are."""
    low, high = allowed.get("low"), allowed.get("high")
    if allowed.get("choices"):
        return "one of " + ", ".join(str(choice) or "(empty)" for choice in allowed["choices"])
    if low is not None and high is not None:
        return f"{low} to {high}"
    if low is not None:
        return f"{low} or more"
    return f"at most {high}" if high is not None else ""


# ---------------------------------------------------------------------------------------------
# All together


def split_arguments(argv):
    """(config files that argv begins with, the flags after them)."""
    count = 0
    while count < len(argv) and argv[count].endswith(".py") and not argv[count].startswith("--"):
        count += 1
    return list(argv[:count]), list(argv[count:])


def show_help(Config, description):
    """Print what a script does and each of its knobs: default, type, range, comment."""
    source = "".join(inspect.getsource(kind) for kind in Config.__mro__[:-1])
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    print(description.strip() + "\n\nknobs:")
    for field in dataclasses.fields(Config):
        kind = getattr(field.type, "__name__", "")
        if typing.get_origin(field.type) is tuple:
            kind = f"several {typing.get_args(field.type)[0].__name__}"
        allowed = describe(field.metadata)
        kind += f", {allowed}" if allowed else ""
        print(f"  --{field.name}={field.default!r}  ({kind}) {comments[field.name]}")


def load(Config, argv, description=""):
    """A Config from its defaults, the files that argv begins with, then flags.

    Raises UserError, with the place, for an unknown name (naming the nearest), a wrong type, a
    value that is not allowed, or a file and a flag that disagree on a knob that is set `once`.
    --help prints every knob and exits."""
    if "--help" in argv or "-h" in argv:
        show_help(Config, description)
        sys.exit(0)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    files, flags = split_arguments(argv)
    settings = [setting for path in files for setting in read_file(path)]
    settings += read_flags(flags, {name: field.type for name, field in fields.items()})
    config = Config()
    for name, value, where in settings:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, 1, 0.0)[0]
            raise UserError(f"{where}: no knob {name!r}; did you mean {nearest!r}?")
        value = check(fields[name], value, where)
        before = getattr(config, name)
        if fields[name].metadata.get("once") and config.given.get(name) and before != value:
            message = f"{where}: {name} {value!r} contradicts {name} {before!r} of"
            raise UserError(f"{message} {config.given[name]}")
        setattr(config, name, value)
        config.given[name] = where
    return config


def run(main):
    """Call main(arguments). A UserError, and what the operating system says of a user's file,
    become one line and exit code 1; any other exception is ours and shows its traceback."""
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (MemoryError, RuntimeError) as error:  # the latter: torch's words for it
        if not re.search("(allocate|out of) memory", str(error) or "out of memory"):
            raise
        sys.exit("error: out of memory: take a smaller batch, a smaller model or smaller pictures")
