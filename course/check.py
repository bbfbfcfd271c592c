"""
Check exercises: is your function right, and if not, where does it go wrong?

    python course/check.py 2.3          # answers/2_3_NAME.py
    python course/check.py              # all: right, wrong, not written yet, not begun

The exit code is 1 if one that was asked for is not right. An answer may import numpy, torch, triton
and Python's own modules, and none of this repository. It has a minute.
"""

import ast
import contextlib
import importlib.util
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from exercise import Wrong, choose, find_exercises

import config

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
SECONDS = 60
NOT_WRITTEN = "not written yet"


def load(one):
    """The student's function. Raises UserError, Wrong."""
    if not one.path.exists():
        raise config.UserError(
            f"{one.path}: no such file; `python course/start.py {one.number}` writes it"
        )
    refuse_imports(one)
    where = one.path.resolve()
    spec = importlib.util.spec_from_file_location(f"answer_{one.path.stem}", where)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Wrong:  # the time limit
        raise
    except Exception as error:
        raise Wrong(last_line(error, one.path)) from error
    if not callable(getattr(module, one.name, None)):
        raise Wrong(f"{one.path} has no function {one.name}")
    return getattr(module, one.name)


def refuse_imports(one):
    """Raises Wrong if an answer imports a module of this repository, which may have the answer."""
    try:
        tree = ast.parse(one.path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise Wrong(last_line(error, one.path)) from error
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            top = name.split(".")[0]
            places = [folder / end for folder in (ROOT, COURSE) for end in (top, f"{top}.py")]
            if any(place.exists() for place in places):
                raise Wrong(f"{one.path}:{node.lineno}: it imports {name}; write it yourself")


@contextlib.contextmanager
def time_limit(seconds):
    """Raises Wrong in a block that takes longer. Windows has no such signal, and no limit."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_):
        raise Wrong(f"it still runs after {seconds} seconds", "Is there a loop that never ends?")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


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
        return Wrong(NOT_WRITTEN)
    except Exception as error:
        given = getattr(error, "given", "")
        return Wrong(last_line(error, one.path) + (f"; with {given}" if given else ""))
    return None


def report(number):
    """Print whether an exercise is right. Returns whether it is."""
    one = choose(number)
    try:
        with time_limit(SECONDS):
            wrong = fault_of(one, load(one))
    except Wrong as found:
        wrong = found
    if wrong is None:
        print(f"{number} {one.name}: right")
        return True
    if str(wrong) == NOT_WRITTEN:
        print(f"{number} {one.name}: {wrong}")
        return False
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
    exercises, right = find_exercises(), 0
    for number, one in exercises.items():
        if one.path.exists():
            right += report(number)
        else:
            print(f"{number} {one.name}: not begun ({one.level})")
    print(f"{right} of {len(exercises)} right")


if __name__ == "__main__":
    config.run(main)
