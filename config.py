"""
Options: defaults in a script, then config files, then flags; and UserError, the one exception that
a user's mistake raises.

A script keeps its options in a flat dataclass of int, float, bool, str and tuples of these, with
one comment each. `option()` adds a range or a list of choices to a default:

    @dataclass
    class Config(config.Options):
        n_layer: int = option(4, low=1)  # blocks
        device: str = ""  # cpu, cuda, mps; empty: cuda if there is a GPU

A config file holds lines of `name = literal` in Python's syntax; + - * / // are allowed. It is
parsed, never run. On the command line `--key=value` and `--key value` both work, a bare `--key`
sets a bool to True, and an option of several values takes them one after the other.
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
    """A mistake that the user can correct. One line: what is wrong, where, and what to do."""


@dataclasses.dataclass
class Options:
    """The base class of a script's Config.

    `given` maps each option that was set to where it was set:
    {"n_layer": "configs/phase0.py:17", "seed": "--seed"}."""

    def __post_init__(self):
        self.given = {}


# Options of earlier versions: {old name: what to write now}. They are refused with this advice.
RENAMED = {
    "tower": "--phase vision or --phase language",
    "phase0_steps": "language_steps",
    "phase0_lr": "language_lr",
    "phase0_batch": "language_batch",
    "curate": "filter",
    "mend": "fix",
}


def option(default, low=None, high=None, choices=None, once=None):
    """A default with its allowed values: low <= value <= high, or one of `choices`.

    once: what a file or flag has set must not be changed by a later one; a dict of the exceptions,
    {value: values that may replace it}, {} for none. With {"0": ("vision", "language")} a file may
    say phase = "0", and --phase vision narrow it."""
    allowed = {"low": low, "high": high, "choices": choices, "once": once}
    return dataclasses.field(default=default, metadata=allowed)


# ---------------------------------------------------------------------------------------------
# Parsing


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
    """The path, if it is a regular file or does not exist. Raises UserError for a folder, a pipe
    or a device: opening a pipe that nobody writes to would wait forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a file, but a folder, a pipe or a device")
    return path


def read_config_file(path):
    """[(name, value, "file:line")] of a config file. Raises UserError."""
    try:
        tree = ast.parse(Path(regular(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{path}:{line}: not Python syntax") from None
    settings = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}:{node.lineno}"
        try:
            (target,) = node.targets
            settings.append((target.id, literal(node.value), where))
        except (AttributeError, ValueError, TypeError, ZeroDivisionError, OverflowError):
            message = f"{where}: want `name = literal`; + - * / // and tuples are allowed"
            raise UserError(message) from None
    return settings


def parse_value(text, kind):
    """The text of a flag as a value of type `kind`; the text itself if it is no such value, and
    check_value() then reports the type."""
    if kind is str:
        return text
    source = text.capitalize() if kind is bool else text
    try:
        return literal(ast.parse(source, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, OverflowError):
        return text


def read_flags(flags, kinds):
    """[(name, value, "--name")] of flags; kinds: {option: type}. Raises UserError."""
    settings, flags = [], list(flags)
    while flags:
        flag = flags.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"{flag}: config files come first, options start with --")
        name, has_value, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        kind = kinds.get(name, str)
        several = typing.get_origin(kind) is tuple
        values = [value] if has_value else []
        at_most = math.inf if several else 1
        while flags and len(values) < at_most and not flags[0].startswith("--"):
            values.append(flags.pop(0))
        if not values and kind is bool:
            values = ["True"]
        if not values and name in kinds:
            raise UserError(f"--{name}: no value given")
        if several:
            element = typing.get_args(kind)[0]
            parsed = tuple(parse_value(v, element) for v in values)
            for earlier in [entry for entry in settings if entry[0] == name]:
                settings.remove(earlier)
                parsed = earlier[1] + parsed  # --image a --image b is --image a b
            settings.append((name, parsed, f"--{name}"))
        else:
            settings.append((name, parse_value((values or [""])[0], kind), f"--{name}"))
    return settings


# ---------------------------------------------------------------------------------------------
# Checking


def check_value(field, value, where):
    """The value, with ints made floats where `field` wants floats. Raises UserError for a wrong
    type or a value out of range."""
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
            wanted = describe_range(allowed)
            raise UserError(f"{where}: {field.name} {v!r} is not allowed: {wanted}")
    return values if several else values[0]


def is_allowed(allowed, value):
    if allowed["choices"] is not None:
        return value in allowed["choices"]
    above = allowed["low"] is None or value >= allowed["low"]
    below = allowed["high"] is None or value <= allowed["high"]
    return above and below


def describe_range(allowed):
    """The allowed values of an option in words; "" if all are allowed."""
    low, high = allowed.get("low"), allowed.get("high")
    if allowed.get("choices"):
        return "one of " + ", ".join(str(choice) or "(empty)" for choice in allowed["choices"])
    if low is not None and high is not None:
        return f"{low} to {high}"
    if low is not None:
        return f"{low} or more"
    return f"at most {high}" if high is not None else ""


# ---------------------------------------------------------------------------------------------
# Loading


def split_arguments(argv):
    """(the config files at the start of argv, the flags after them)."""
    count = 0
    while count < len(argv) and argv[count].endswith(".py") and not argv[count].startswith("--"):
        count += 1
    return list(argv[:count]), list(argv[count:])


def read_comments(Config):
    """{option: the comment at the end of its definition}."""
    comments = {}
    for kind in Config.__mro__[:-1]:
        source = inspect.getsource(kind)
        lines, (definition,) = source.splitlines(), ast.parse(source).body
        for node in definition.body:
            if isinstance(node, ast.AnnAssign):
                comments[node.target.id] = lines[node.end_lineno - 1].partition("  # ")[2]
    return comments


def print_help(Config, description):
    """Print a script's description and each of its options: default, type, range, comment."""
    comments = read_comments(Config)
    print(description.strip() + "\n\noptions:")
    for field in dataclasses.fields(Config):
        kind = getattr(field.type, "__name__", "")
        if typing.get_origin(field.type) is tuple:
            kind = f"several {typing.get_args(field.type)[0].__name__}"
        allowed = describe_range(field.metadata)
        kind += f", {allowed}" if allowed else ""
        print(f"  --{field.name}={field.default!r}  ({kind}) {comments[field.name]}")


def refuse_unknown(name, where, known):
    """Raise UserError for an option that does not exist: its new name, else the nearest name."""
    if name in RENAMED:
        raise UserError(f"{where}: {name} has a new name: {RENAMED[name]}")
    nearest = difflib.get_close_matches(name, known, 1, 0.0)[0]
    raise UserError(f"{where}: no option {name!r}; did you mean {nearest!r}?")


def load(Config, argv, description=""):
    """A Config from its defaults, then the config files at the start of argv, then flags.

    Raises UserError, with the place, for an unknown name, a wrong type, a value that is not
    allowed, or an option declared `once` that a file and a flag set differently.
    --help prints all options and exits."""
    if "--help" in argv or "-h" in argv:
        print_help(Config, description)
        sys.exit(0)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    files, flags = split_arguments(argv)
    settings = [setting for path in files for setting in read_config_file(path)]
    settings += read_flags(flags, {name: field.type for name, field in fields.items()})
    config = Config()
    for name, value, where in settings:
        if name not in fields:
            refuse_unknown(name, where, fields)
        value = check_value(fields[name], value, where)
        before = getattr(config, name)
        once = fields[name].metadata.get("once")
        if (
            once is not None
            and name in config.given
            and value not in (before, *once.get(before, ()))
        ):
            message = f"{where}: {name} {value!r} contradicts {name} {before!r} of"
            raise UserError(f"{message} {config.given[name]}")
        setattr(config, name, value)
        config.given[name] = where
    return config


def run(main):
    """Call main(arguments). A UserError or an OSError becomes one line and exit code 1; any other
    exception is a bug of ours and shows its traceback. What a terminal cannot print is escaped."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"),
                           (sys.stdin, "replace")):  # fmt: skip
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for a CPU that is out of memory, only this wording
        if not re.search("(allocate|out of) memory", str(error) or "out of memory"):
            raise
        sys.exit("error: out of memory: take a smaller batch, a smaller model or smaller pictures")
