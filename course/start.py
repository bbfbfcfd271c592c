"""
Begin an exercise: write its stub, with a docstring that says what to compute.

    python course/start.py              # the list of exercises
    python course/start.py 2.3          # writes answers/2_3_NAME.py

A file that exists is left alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from exercise import choose, describe, find_exercises

import config


def start(number):
    """Write the stub of an exercise. Returns its path. Raises UserError."""
    one = choose(number)
    if one.path.exists():
        raise config.UserError(f"{one.path} is there already; delete it to begin again")
    one.path.parent.mkdir(exist_ok=True)
    one.path.write_text(one.source())
    return one.path


def main(argv):
    if argv in (["-h"], ["--help"]):
        print(__doc__.strip())
    elif not argv:
        for number in find_exercises():
            print(describe(number))
    else:
        for number in argv:
            print(f"{start(number)}: read it, write it, then")
            print(f"python {Path(sys.argv[0]).parent / 'check.py'} {number}")


if __name__ == "__main__":
    config.run(main)
