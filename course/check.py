"""
Check exercises: is your function right, and if not, where does it go wrong?

    python course/check.py 2.3          # answers/2_3_NAME.py
    python course/check.py              # all: right, wrong, not begun

The exit code is 1 if one that was asked for is wrong.
"""

import importlib.util
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from exercise import Wrong, choose, find_exercises

import config


def load(one):
    """The student's function. Raises UserError, Wrong."""
    if not one.path.exists():
        raise config.UserError(
            f"{one.path}: no such file; `python course/start.py {one.number}` writes it"
        )
    where = one.path.resolve()
    spec = importlib.util.spec_from_file_location(f"answer_{one.path.stem}", where)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Wrong(last_line(error, one.path)) from error
    if not callable(getattr(module, one.name, None)):
        raise Wrong(f"{one.path} has no function {one.name}")
    return getattr(module, one.name)


def last_line(error, path):
    """Where in the student's file an exception arose: NAME.py:12: ValueError: ..."""
    own = path.resolve()
    places = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == own]
    line = places[-1].lineno if places else getattr(error, "lineno", None)
    where = f"{path}:{line}" if line else str(path)
    return f"{where}: {type(error).__name__}: {error}"


def fault_of(one, function):
    """The Wrong that the check of an exercise finds in a function, or None."""
    try:
        one.check(function)
    except Wrong as wrong:
        return wrong
    except NotImplementedError:
        return Wrong("it is not written yet")
    except Exception as error:
        return Wrong(last_line(error, one.path))
    return None


def report(number):
    """Print whether an exercise is right. Returns whether it is."""
    one = choose(number)
    try:
        wrong = fault_of(one, load(one))
    except Wrong as found:
        wrong = found
    if wrong is None:
        print(f"{number} {one.name}: right")
        return True
    print(f"{number} {one.name}: wrong: {wrong}")
    if wrong.hint:
        print(f"  hint: {wrong.hint}")
    return False


def main(argv):
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if argv:
        are_right = [report(number) for number in argv]
        if not all(are_right):
            sys.exit(1)
        return
    for number, one in find_exercises().items():
        if one.path.exists():
            report(number)
        else:
            print(f"{number} {one.name}: not begun ({one.level})")


if __name__ == "__main__":
    config.run(main)
