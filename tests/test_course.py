"""The course: each check accepts a right solution and finds typical wrong ones."""

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL

sys.path.insert(0, str(ROOT / "course"))
import check  # noqa: E402
import course_solutions  # noqa: E402
import exercise  # noqa: E402
import experiments  # noqa: E402
import start  # noqa: E402

from config import UserError  # noqa: E402

EXERCISES = exercise.find_exercises()
NUMBERS = list(EXERCISES)
IMPORTS = """import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl


"""


@pytest.fixture
def answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers").mkdir()


def solution(one):
    """(source of the right solution, its replacements)."""
    function, replacements = course_solutions.SOLUTIONS[one.name]
    source = inspect.getsource(getattr(function, "fn", function))
    return source[re.search(r"^(@triton|def )", source, re.M).start() :], replacements


def fault(one, source):
    """The Wrong of the check, as for a student's file."""
    one.path.write_text(IMPORTS + source)
    try:
        return check.fault_of(one, check.load(one))
    except exercise.Wrong as wrong:
        return wrong


def test_there_are_enough_of_each_kind():
    assert len(NUMBERS) >= 30
    levels = [one.level for one in EXERCISES.values()]
    assert all(levels.count(level) >= 5 for level in exercise.LEVELS)
    assert {number.split(".")[0] for number in NUMBERS} == set("0123456789")
    assert set(course_solutions.SOLUTIONS) == {one.name for one in EXERCISES.values()}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_right_solution_passes(number, answers):
    one = EXERCISES[number]
    assert fault(one, solution(one)[0]) is None


@pytest.mark.parametrize("number", NUMBERS)
def test_wrong_solutions_fail(number, answers):
    """Each in words: where, and a hint."""
    one = EXERCISES[number]
    source, replacements = solution(one)
    assert len(replacements) >= 4
    for old, new in replacements:
        assert old in source, old
        found = fault(one, source.replace(old, new))
        assert found is not None, (old, new)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_stub_is_not_written_yet(number, answers):
    one = EXERCISES[number]
    start.start(number)
    text = one.path.read_text()
    assert one.function.__doc__.strip() in text
    found = check.fault_of(one, check.load(one))
    assert found is not None
    with pytest.raises(UserError, match="is there already"):
        start.start(number)


CHAPTERS = sorted((ROOT / "course").glob("[0-9]_*.md"))


def find(name):
    """The object of a dotted name: the longest module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if (ROOT / Path(*parts[:length]).with_suffix(".py")).exists() or (
            ROOT / Path(*parts[:length]) / "__init__.py"
        ).exists():
            found = importlib.import_module(module)
            for part in parts[length:]:
                found = getattr(found, part)
            return found
    raise AttributeError(name)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_names_code_and_exercises_that_exist(path):
    page = path.read_text()
    read = page[page.index("## Read") : page.index("## Run") if "## Run" in page else None]
    names = re.findall(r"`([\w.]+\.(?!json)\w+)`", read)
    assert len(names) >= 3
    for name in names:
        find(name)
    number = path.stem[0]
    listed = set(re.findall(rf"\b{number}\.\d\b", page[page.index("## Exercises") :]))
    assert listed == {one for one in NUMBERS if one[0] == number}
    assert len(page.split()) <= 1500
    for part in ("**After this chapter you can**", "## What can go wrong", "## Questions"):
        assert part in page


def shell(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, text=True, capture_output=True
    )


def test_the_commands(tmp_path):
    folder = ROOT / "course"
    listed = shell(folder / "start.py", cwd=tmp_path).stdout.splitlines()
    assert len(listed) == len(NUMBERS)
    done = shell(folder / "start.py", "1.1", cwd=tmp_path)
    assert done.returncode == 0 and "answers/1_1_count_pairs.py" in done.stdout
    done = shell(folder / "check.py", "1.1", cwd=tmp_path)
    assert done.returncode == 1 and "it is not written yet" in done.stdout
    done = shell(folder / "check.py", "1.2", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: answers/1_2_merge.py: no such")
    done = shell(folder / "check.py", "7.9", cwd=tmp_path)
    assert done.returncode == 1 and "there is none; one of 0.1," in done.stderr
    one = EXERCISES["1.1"]
    (tmp_path / one.path).write_text("def count_pairs(words):\n    return words[0]\n")
    done = shell(folder / "check.py", "1.1", cwd=tmp_path)
    assert done.returncode == 1 and "1_1_count_pairs.py:2: KeyError: 0" in done.stdout
    (tmp_path / one.path).write_text(solution(one)[0])
    done = shell(folder / "check.py", cwd=tmp_path)
    assert done.returncode == 0 and "1.1 count_pairs: right" in done.stdout
    assert "1.2 merge: not begun (easy)" in done.stdout


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory, world):
    """A folder for tiny experiments, that share their runs."""
    folder = tmp_path_factory.mktemp("laboratory")
    shutil.copytree(world / "data", folder / "data")
    return folder


def in_this_process(script, *arguments, before=""):
    """experiments.launch() without a new process."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (("dino", "recolour"), ("model", "PROJECTORS")):
            original = getattr(importlib.import_module(module), name)
            patch.setattr(f"{module}.{name}", original)
        exec(before, {})
        if script == "data.py":
            from sources import command

            return command.main([*arguments])
        importlib.import_module(script.removesuffix(".py")).main([*arguments])


def table_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


@pytest.mark.parametrize("name", list(experiments.EXPERIMENTS))
def test_an_experiment_runs_in_a_tiny_form(name, laboratory, monkeypatch, capsys):
    monkeypatch.chdir(laboratory)
    monkeypatch.setattr(experiments, "launch", in_this_process)
    tiny = ["--size=16", "--lines=200", "--vocab_size=300"]
    monkeypatch.setattr(experiments, "DRAWN", [*tiny, "--scenes=16", "--trials=0.1"])
    talks = [*tiny, "--talks=24", "--questions=2"]
    how = {"toy_tiles": [*talks, "--canvases", "32x16", "16x32"], "toy_flat": talks}
    monkeypatch.setattr(experiments, "TALKS", how)
    flags = [flag.removeprefix("--") for flag in SMALL if "phase2_steps" not in flag]
    flags.append("block_size=300")  # a conversation of tiles
    experiments.main(
        [
            name,
            "--seeds",
            "1",
            "--steps=3",
            "--data=data/tiny",
            "--scenes=16",
            "--write=False",
            "--flags",
            *flags,
        ]
    )
    head, _, *rows = table_of(capsys.readouterr().out)
    assert rows and all(len(row) == len(head) for row in rows)


def test_a_table_is_written_into_its_chapter(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "COURSE", tmp_path)
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    (tmp_path / "c.md").write_text(page)
    experiments.write_table("x", "c", "new\nlines")
    assert (tmp_path / "c.md").read_text() == page.replace("old", "new\nlines")
    for name, (_, chapter) in experiments.EXPERIMENTS.items():
        assert f"<!-- table: {name} -->\n" in (ROOT / f"course/{chapter}.md").read_text()


def test_a_cell_has_students_interval():
    assert experiments.cell([0.5]) == "0.500"
    assert experiments.cell([0.91, 0.94, 0.98]) == "0.943 ± 0.087"


def test_a_changed_argument_is_said(answers):
    one = EXERCISES["1.1"]
    source = "def count_pairs(words):\n    found = {}\n    words[(1, 1)] = 1\n    return found\n"
    assert "argument 1 is changed" in str(fault(one, source))
