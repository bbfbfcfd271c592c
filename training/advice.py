"""
Commands that train.py advises: what to run next, and how to train with an option changed.
"""

import re
import shlex
from pathlib import Path


def phase_flag(name):
    """The --phase value that trains a phase: "1" for phase1."""
    return name.removeprefix("phase")


def elsewhere(settings, phase, value):
    """The command that repeats this one with a new value of an option, in a folder of its own. What
    the phase starts from is taken from the finished run."""
    word = re.sub(r"[^\w.=-]+", "_", str(value)).strip("_") or "new"
    command = ["python", "train.py", *without(settings.arguments, "--out")]
    command += ["--out", f"{settings.out}_{word}"]
    if phase.starts_from and not settings.init:
        command += ["--init", settings.out]
    return shlex.join(command)


def without(arguments, flag):
    """A command line without an option and its value."""
    kept, values = [], iter(arguments)
    for word in values:
        if word == flag:
            next(values, None)
        elif not word.startswith(flag + "="):
            kept.append(word)
    return kept


def next_commands(settings, name, last, phases):
    """The commands that one may run next, after phase `name` whose checkpoint is `last`. phases:
    train.py's table."""
    commands = []
    if phases[name].validates_on:  # not a tower alone
        pictures = sorted((Path(settings.data) / "eval" / "images").glob("*.png"))
        words = str(pictures[0]) if pictures else "YOUR_PICTURE.jpg"
        if not phases[name].starts_from:  # it cannot see
            words = '--prompt "where \'s the"'
        commands.append(f"python sample.py {words} --checkpoint {last}")
    following = [other for other, row in phases.items() if name in row.starts_from]
    has_tests = any((Path(settings.data) / "eval").glob("*.*"))
    if settings.phase == "all" and has_tests:
        commands.append(
            f"python eval.py --checkpoint {last} --shuffle  # random pictures: at chance or below"
        )
    elif following and settings.phase != "all":
        # phase 1 starts from vision and from language, and one of them may be missing
        parents = phases[following[0]].starts_from if settings.phase == name else ()
        missing = [
            one
            for one in parents
            if one != name
            and not (Path(last).parent / f"{one}.pt").exists()
            and not getattr(settings, f"{one}_weights", "")
        ]
        commands.append(following_command(settings, phase_flag((missing or following)[0])))
    commands = [command for command in commands if command]
    return "next: " + "\n      ".join(commands) if commands else ""


def following_command(settings, phase):
    """This command for another phase; a file configs/phase1.py stands for the one of that phase, ""
    if there is none."""
    arguments = list(settings.arguments)
    where = settings.given["phase"]
    if where != "--phase":  # a file says the phase
        path = Path(settings.file)
        other = path.with_name(re.sub(r"\d(?=\.py$)", phase, path.name))
        if not other.exists():
            return ""
        arguments = [str(other) if one == settings.file else one for one in arguments]
        return shlex.join(["python", "train.py", *arguments])
    for i, one in enumerate(arguments):
        if one == "--phase":
            arguments[i + 1] = phase
        elif one.startswith("--phase="):
            arguments[i] = f"--phase={phase}"
    return shlex.join(["python", "train.py", *arguments])
