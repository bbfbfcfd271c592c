"""
Configuration: the defaults in a script, then files, then flags; nothing is ever executed.

A script keeps its knobs in a flat dataclass of int, float, bool and str, one comment each. A file
is lines of `name = literal` in Python's syntax (arithmetic + - * / // allowed) and is parsed, not
run. `--key=value` and `--key value` both work; a bare `--key` switches a bool on.
"""
import ast
import dataclasses
import difflib
import inspect
import operator
import re
import sys
from pathlib import Path

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}


class ConfigError(Exception):
    """One line: where, what is wrong, what to write instead."""


def literal(node):
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](literal(node.left), literal(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -literal(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool, str):
        return node.value
    raise ValueError("not a literal")


def read_file(path):
    """[(name, value, "file:line")] of a config file."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}:{getattr(error, 'lineno', 1)}: not Python syntax") from None
    found = []
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}:{node.lineno}"
        try:
            (target,), value = node.targets, literal(node.value)
            found.append((target.id, value, where))
        except (AttributeError, ValueError, TypeError, ZeroDivisionError):
            raise ConfigError(f"{where}: want `name = literal`, + - * / // allowed") from None
    return found


def read_flags(argv, kinds, many):
    """[(name, value, "--name")] of the flags; values are parsed by each knob's type."""
    found, argv = [], list(argv)
    while argv:
        flag = argv.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"{flag}: config files come first, knobs start with --")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if kinds.get(name) is bool and (not argv or argv[0].startswith("--")):
                value = "True"
            elif argv:
                value = argv.pop(0)
                while name in many and argv and not argv[0].startswith("--"):
                    value += "\n" + argv.pop(0)
            elif name in kinds:
                raise ConfigError(f"--{name}: no value given")
        if kinds.get(name, str) is not str:
            try:
                value = literal(ast.parse(value.capitalize() if kinds[name] is bool else value,
                                          mode="eval").body)
            except (SyntaxError, ValueError, TypeError, ZeroDivisionError):
                pass  # left a string: assign() says what type is wanted
        found.append((name, value, f"--{name}"))
    return found


def load(Config, argv, description="", many=()):
    """A Config from its defaults, the files that argv begins with, then flags. Knobs in `many`
    take several values, after one flag or several, a line each in the string that comes out.

    Raises ConfigError for an unknown name (naming the nearest), a wrong type, or a file and a
    flag that disagree on `phase`. --help prints every knob with its comment and exits."""
    if "--help" in argv or "-h" in argv:
        print(description.strip() + "\n\nknobs:")
        knobs = r"^    (\w+): (\w+) = (.+?)  # (.*)$"
        for knob in re.findall(knobs, inspect.getsource(Config), re.M):
            print("  --{0}={2}  ({1}) {3}".format(*knob))
        sys.exit(0)
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    files = []
    while argv and argv[0].endswith(".py") and not argv[0].startswith("--"):
        files, argv = files + [argv[0]], argv[1:]
    flags = read_flags(argv, kinds, many)
    phase = [value for name, value, _ in flags if name == "phase"]
    if phase and not files:
        path = Path(__file__).parent / f"phase{phase[-1]}.py"
        files = [str(path)] if path.exists() else []
    config, said = Config(), {}
    for name, value, where in [item for path in files for item in read_file(path)] + flags:
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1, 0.0)[0]
            raise ConfigError(f"{where}: no knob {name!r}; did you mean {near!r}?")
        if kinds[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not kinds[name]:
            raise ConfigError(f"{where}: {name} takes {kinds[name].__name__}, not {value!r}")
        if name == "phase" and said.get(name, value) != value:
            raise ConfigError(f"{where}: phase {value!r} contradicts phase {said[name]!r} of "
                              f"{files[-1]}")
        said[name] = value = f"{said[name]}\n{value}" if name in many and name in said else value
        setattr(config, name, value)
    return config


def run(main, *errors):
    """Call main(arguments); the named errors become one line and exit code 1, not a traceback."""
    try:
        main(sys.argv[1:])
    except (ConfigError, OSError, *errors) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to go on")
