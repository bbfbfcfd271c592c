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
import shutil
import sys
import textwrap
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

    `given` maps each option that was set, the last one last, to where it was set:
    {"n_layer": "configs/phase0.py:17", "seed": "--seed"}. `arguments` is the command line, `file`
    its last config file."""

    def __post_init__(self):
        self.given, self.arguments, self.file = {}, [], ""


# Options of earlier versions: {old name: what to write now}. They are refused with this advice.
RENAMED = {
    "tower": "--phase vision or --phase language",
    "phase0_steps": "language_steps",
    "phase0_lr": "language_lr",
    "phase0_batch": "language_batch",
    "curate": "filter",
    "mend": "fix",
}


# What other programs call an option: {their name: ours, or advice}.
MEANINGS = {
    "learning_rate": "phase2_lr (each phase has its own)",
    "batch_size": "phase2_batch (each phase has its own)",
    "max_iters": "phase2_steps (each phase has its own)",
    "num_train_epochs": "phase2_epochs (each phase has its own)",
    "output_dir": "out",
    "out_dir": "out",
    "output": "out",
    "dataset": "data",
    "data_dir": "data",
    "model": "checkpoint",
    "model_path": "checkpoint",
    "ckpt": "checkpoint",
    "weights": "checkpoint",
    "images": "image",
    "picture": "image",
    "file": "image",
    "question": "prompt",
    "text": "prompt",
    "temp": "temperature",
    "max_tokens": "max_new_tokens",
    "n_layers": "n_layer",
    "layers": "n_layer",
    "num_layers": "n_layer",
    "heads": "n_head",
    "num_heads": "n_head",
    "hidden_size": "n_embd",
    "width": "n_embd",
    "context": "block_size",
    "context_length": "block_size",
    "max_length": "block_size",
    "model_max_length": "block_size",
    "patch_size": "patch",
    "wd": "weight_decay",
    "clip": "grad_clip",
    "warmup_ratio": "warmup",
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "gradient_accumulation_steps": "grad_accum",
    "gradient_checkpointing": "recompute",
    "bf16": "dtype bfloat16",
    "fp16": "dtype bfloat16",
    "resume": "the same command again: it resumes by itself",
    "gpus": "torchrun --nproc_per_node=8 train.py ...",
    "num_gpus": "torchrun --nproc_per_node=8 train.py ...",
    "tokenizer": "vocab_size, of data.py",
    "image_size": "size, of data.py",
    "vision_tower_path": "vision_weights",
    "tower": "vision_tower",
    "lora_r": "lora_rank",
    "video": "videos",
    "transcript": "transcripts",
    "subtitles": "transcripts",
}


def option(default, low=None, high=None, choices=None, once=None, listed=None):
    """A default with its allowed values: low <= value <= high, or one of `choices`. listed: names
    that --help shows and the script itself checks.

    once: what a file or flag has set must not be changed by a later one; a dict of the exceptions,
    {value: values that may replace it}, {} for none. With {"0": ("vision", "language")} a file may
    say phase = "0", and --phase vision narrow it."""
    allowed = {"low": low, "high": high, "choices": choices, "once": once, "listed": listed}
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
    except FileNotFoundError:
        beside = [str(other) for other in Path(path).parent.glob("*.py")]
        near = difflib.get_close_matches(str(path), beside, 1, 0.6)
        advice = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{path}: No such file{advice}") from None
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


def read_flags(flags, kinds, plain=""):
    """[(name, value, "--name")] of flags; kinds: {option: type}; plain: the option that arguments
    without a name are values of. Raises UserError."""
    settings, flags = [], list(flags)
    while flags:
        flag = flags.pop(0)
        if not flag.startswith("--") and not plain:
            raise UserError(f"{flag}: config files come first, options start with --")
        if not flag.startswith("--"):
            flag = f"--{plain}={flag}"
        name, has_value, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        kind = kinds.get(name, str)
        several = typing.get_origin(kind) is tuple
        values = [value] if has_value else []
        at_most = math.inf if several and not has_value else 1
        while flags and len(values) < at_most and not flags[0].startswith("--"):
            if plain and kind is bool and flags[0].lower() not in ("true", "false"):
                break  # --chat img.jpg
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
    """{option: (the heading above it, the comment at the end of its definition)}. A heading is a
    comment on a line of its own."""
    comments = {}
    for kind in Config.__mro__[:-1]:
        source = inspect.getsource(kind)
        lines, (definition,), heading, last = source.splitlines(), ast.parse(source).body, "", 0
        for node in definition.body:
            if isinstance(node, ast.AnnAssign):
                for line in lines[last : node.lineno - 1]:
                    if line.startswith("    # "):
                        heading = line.strip("# ")
                last = node.end_lineno
                comment = lines[last - 1].partition("  # ")[2]
                comments[node.target.id] = heading, comment
    return comments


def show_value(value):
    """A value as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "(none)"
    return str(value) if value != "" else "(empty)"


def describe_limits(field):
    """The allowed values of an option, for --help: choices, and limits that one may reach."""
    allowed = field.metadata
    if allowed.get("choices") or allowed.get("listed"):
        names = [str(name) for name in allowed["choices"] or allowed["listed"] if name != ""]
        return "one of " + ", ".join(names)
    low, high = allowed.get("low"), allowed.get("high")
    if high is not None and high <= 100:
        return f"{low} to {high}" if low is not None else f"at most {high}"
    return f"at least {low}" if low is not None and low > 1 else ""


def print_help(Config, description, config):
    """Print a script's description and its options, grouped under their headings, with the values
    that `config` has, and what is allowed."""
    comments, width = read_comments(Config), min(shutil.get_terminal_size((100, 24)).columns, 100)
    from_file = f", with the values of {config.file}" if config.file else ""
    print(f"{description.strip()}\n\noptions{from_file}:")
    fields = dataclasses.fields(Config)
    headings = dict.fromkeys(["", *(comments[field.name][0] for field in fields)])
    indent = " " * 26
    for heading in headings:
        own = [field for field in fields if comments[field.name][0] == heading]
        if own:
            print(f"\n{heading}:" if heading else "")
        for field in own:
            comment = comments[field.name][1]
            begin = f"  --{field.name} {show_value(getattr(config, field.name))}"
            limits = describe_limits(field)
            text = f"{comment}; {limits}" if comment and limits else comment or limits
            if len(begin) >= len(indent):
                print(begin)
                begin = ""
            wrapped = textwrap.wrap(text, width - len(indent)) or [""]
            print(begin.ljust(len(indent)) + f"\n{indent}".join(wrapped))


def refuse_unknown(name, where, known):
    """Raise UserError for an option that does not exist: its new name, else options of the same
    meaning, else the nearest name."""
    if name in RENAMED:
        raise UserError(f"{where}: {name} has a new name: {RENAMED[name]}")
    if name in MEANINGS and (MEANINGS[name] in known or " " in MEANINGS[name]):
        raise UserError(f"{where}: no option {name!r}; did you mean {MEANINGS[name]!r}?")
    related = [other for other in known if name in other.split("_")]
    near = related or difflib.get_close_matches(name, known, 1, 0.6)
    advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "--help lists all"
    raise UserError(f"{where}: no option {name!r}; {advice}")


def load(Config, argv, description="", plain=""):
    """A Config from its defaults, then the config files at the start of argv, then flags; plain:
    see read_flags().

    Raises UserError, with the place, for an unknown name, a wrong type, a value that is not
    allowed, or an option declared `once` that a file and a flag set differently.
    --help prints all options, with the values of these files and flags, and exits."""
    wants_help = "--help" in argv or "-h" in argv
    argv = [argument for argument in argv if argument not in ("--help", "-h")]
    fields = {field.name: field for field in dataclasses.fields(Config)}
    files, flags = split_arguments(argv)
    settings = [setting for path in files for setting in read_config_file(path)]
    settings += read_flags(flags, {name: field.type for name, field in fields.items()}, plain)
    config = Config()
    config.arguments, config.file = list(argv), (files or [""])[-1]
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
        config.given.pop(name, None)
        config.given[name] = where
    if wants_help:
        print_help(Config, description, config)
        sys.exit(0)
    return config


def error_line(error):
    return f"error: {' '.join(str(error).split())}"


def run(main):
    """Call main(arguments). A UserError or an OSError becomes one line and exit code 1; any other
    exception is a bug of ours and shows its traceback. What a terminal cannot print is escaped."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"),
                           (sys.stdin, "replace")):  # fmt: skip
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        sys.exit(error_line(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for a CPU that is out of memory, only this wording
        if not re.search("(allocate|out of) memory", str(error) or "out of memory"):
            raise
        sys.exit("error: out of memory: take a smaller batch, a smaller model or smaller pictures")
