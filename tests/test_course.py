"""The course: each check accepts a right solution and finds typical wrong ones."""

import contextlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import FORKS, ROOT, SMALL, shell
from PIL import Image

sys.path.insert(0, str(ROOT / "course"))
import check  # noqa: E402
import course_solutions  # noqa: E402
import exercise  # noqa: E402
import experiments  # noqa: E402
import figures  # noqa: E402
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
    words = [line for line in page.splitlines() if not line.startswith("|")]  # without tables
    assert len(" ".join(words).split()) <= 1500
    for part in ("**After this chapter you can**", "## What can go wrong", "## Questions"):
        assert part in page


def test_the_commands(tmp_path):
    folder = ROOT / "course"
    listed = shell(folder / "start.py", cwd=tmp_path).stdout.splitlines()
    assert len(listed) == len(NUMBERS)
    done = shell(folder / "start.py", "1.1", cwd=tmp_path)
    assert done.returncode == 0 and "answers/1_1_count_pairs.py" in done.stdout
    done = shell(folder / "check.py", "1.1", cwd=tmp_path)
    assert done.returncode == 1 and "not written yet" in done.stdout
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
    assert done.stdout.endswith(f"1 of {len(NUMBERS)} right\n")


def test_an_answer_may_not_import_the_repository(answers):
    one = EXERCISES["1.2"]
    for line in (
        "from tokenizer import merge",
        "import tasks.scores",
        "def f():\n    from exercises.chapter_1 import train_bpe_by_hand",
        "import exercise as e",
    ):
        one.path.write_text(line + "\n")
        with pytest.raises(exercise.Wrong, match=r":\d+: it imports .*; write it yourself"):
            check.load(one)
    one.path.write_text("import torch.nn.functional as F\nfrom math import pi\n")
    with pytest.raises(exercise.Wrong, match="has no function merge"):
        check.load(one)
    one.path.write_text("def merge(:\n")
    with pytest.raises(exercise.Wrong, match="1_2_merge.py:1: SyntaxError"):
        check.load(one)


@pytest.mark.parametrize("head", ["def merge(word, pair, new):\n    ", ""])
def test_a_loop_without_end_is_stopped(head, answers, monkeypatch, capsys):
    monkeypatch.setattr(check, "SECONDS", 1)
    one = EXERCISES["1.2"]
    one.path.write_text(head + "while True: pass\n")
    assert not check.report("1.2")
    assert "wrong: it still runs after 1 seconds" in capsys.readouterr().out


def test_shuffled_data_have_other_pictures_and_the_same_words(tmp_path, monkeypatch):
    """Also when the toy world is not drawn yet."""
    monkeypatch.chdir(tmp_path)
    settings = experiments.Config(data="world")

    def parents(*_):
        if not Path("world").exists():
            Path("world/features").mkdir(parents=True)
            Path("world/meta.json").write_text("{}")
            Path("world/train_tokens.bin").write_bytes(b"words")
            np.arange(100, dtype=np.int32).tofile("world/train_image_ids.bin")

    monkeypatch.setattr(experiments, "parents", parents)
    monkeypatch.setattr(experiments, "compare", lambda settings, rows: rows)
    experiments.shuffled(settings)
    ids = np.fromfile("world_shuffled/train_image_ids.bin", np.int32)
    assert sorted(ids) == list(range(100)) and (ids == np.arange(100)).sum() < 10
    assert Path("world_shuffled/train_tokens.bin").read_bytes() == b"words"
    assert not Path("world_shuffled/features").exists()
    assert Path("world_shuffled/meta.json").exists()


def test_a_run_that_two_rows_need_is_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(experiments.RUNNING, "workers", 4)
    monkeypatch.setattr(experiments, "LOCKS", defaultdict(threading.Lock))
    made, at_once, most = [], set(), []

    def launch(script, *arguments, before=""):
        out = next(a for a in arguments if a.startswith("--out=")).removeprefix("--out=")
        at_once.add(out)
        most.append(len(at_once))
        time.sleep(0.05)
        Path(out).mkdir(parents=True)
        at_once.discard(out)
        made.append(out)

    monkeypatch.setattr(experiments, "launch", launch)
    settings = experiments.Config()
    run = lambda out: experiments.train(settings, Path(out), seed=1)
    experiments.side_by_side(run, ["a/1", "a/1", "b/1", "b/2", "a/2", "a/2", "b/2", "b/1"])
    assert sorted(made) == ["a/1", "a/2", "b/1", "b/2"] and max(most) > 1


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


def in_forks(command, **_):
    """subprocess.run of experiments.processes(), in forks of a process that has imported torch."""
    script, env = command[1:], {**os.environ, "PYTHONPATH": ""}
    if script[0] == "-m":  # torchrun --nproc_per_node=2
        assert script[1:3] == ["torch.distributed.run", "--nproc_per_node=2"]
        first, second = FORKS.run_group(2, script[3:], Path.cwd(), env)
        return second if second.returncode else first
    return FORKS.run(script, Path.cwd(), env)


def table_of(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


@pytest.mark.parametrize("name", list(experiments.EXPERIMENTS))
def test_an_experiment_runs_in_a_tiny_form(name, laboratory, monkeypatch, capsys):
    monkeypatch.chdir(laboratory)
    monkeypatch.setattr(experiments, "launch", in_this_process)
    if name == "processes":
        monkeypatch.setattr(experiments.subprocess, "run", in_forks)
    tiny = ["--size=16", "--lines=200", "--vocab_size=300"]
    monkeypatch.setattr(experiments, "DRAWN", [*tiny, "--scenes=16", "--trials=0.1"])
    talks = [*tiny, "--talks=24", "--questions=2"]
    how = {"toy_tiles": [*talks, "--canvases", "32x16", "16x32"], "toy_flat": talks}
    monkeypatch.setattr(experiments, "TALKS", how)
    flags = [flag.removeprefix("--") for flag in SMALL if "phase2_steps" not in flag]
    flags += ["block_size=300", "eval_every=50", "save_every=50"]  # a conversation of tiles; quick
    experiments.main(
        [
            name,
            "--seeds",
            "1",
            "--steps=3",
            "--data=data/tiny",
            "--scenes=16",
            "--workers=1",
            "--flags",
            *flags,
        ]
    )
    tables = [table_of(part) for part in capsys.readouterr().out.split("\n\n")]
    for head, _, *rows in filter(None, tables):
        assert rows and all(len(row) == len(head) for row in rows)
    assert len(list(filter(None, tables))) == (2 if name == "growth" else 1)


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


def test_a_star_marks_a_difference_seed_by_seed():
    """Beside the p of a paired t-test, from the density of Student's t."""
    random = np.random.RandomState(0)
    stars = 0
    for _ in range(60):
        n, shift = random.randint(2, 6), random.choice([0.0, 0.1, 0.4])
        a = random.rand(n)
        differences = shift + 0.1 * random.randn(n)
        t = abs(differences.mean()) / (differences.std(ddof=1) / math.sqrt(n))
        angle = np.linspace(0, math.atan(t / math.sqrt(n - 1)), 100_001)  # x = sqrt(n - 1) tan
        inside = np.trapezoid(np.cos(angle) ** (n - 2), angle)
        scale = 2 * math.gamma(n / 2) / (math.sqrt(math.pi) * math.gamma((n - 1) / 2))
        stars += scale * inside > 0.95
        found = experiments.differ((a + differences).tolist(), a.tolist())
        assert found == (scale * inside > 0.95)
        assert experiments.cell_beside(a.tolist(), a.tolist()) == experiments.cell(a.tolist())
    assert 10 < stars < 50
    assert experiments.differ([0.5, 0.6], [0.4, 0.5])  # by 0.1 in each
    assert experiments.cell_beside([0.5, 0.6], [0.4, 0.5]).endswith(" *")
    assert experiments.cell_beside([0.9], [0.1]) == "0.900"
    assert experiments.cell_beside([None, None], [0.4, 0.5]) == "-"


def test_a_changed_argument_is_said(answers):
    one = EXERCISES["1.1"]
    source = "def count_pairs(words):\n    found = {}\n    words[(1, 1)] = 1\n    return found\n"
    assert "argument 1 is changed" in str(fault(one, source))


# ---------------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def desk(tmp_path, world, monkeypatch):
    """A folder with data/tiny and the logs that figures read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "DATA", str(world / "data/tiny"))
    lines = [{"step": n, "loss": 5.0 - n, "kind": 0.1 * n, "val_loss": 4.0} for n in range(4)]
    for name in ("vision", "language_language_steps_300"):
        for seed in "123":
            folder = experiments.RUNS / name / seed
            folder.mkdir(parents=True)
            (folder / "log.jsonl").write_text("".join(json.dumps(n) + "\n" for n in lines))
    grown = {"scores": {"ball": [[1, 20], [9, 20], [18, 20], [20, 20]]}, "ages": {"ball": 4}}
    (experiments.RUNS / "growth.json").write_text(json.dumps(grown))
    return tmp_path


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_a_figure_is_drawn_light_and_dark(name, desk):
    light, dark = figures.draw(name, desk)
    assert light.read_bytes() != dark.read_bytes()
    for path in (light, dark):
        if path.suffix == ".png":
            picture = Image.open(path)
            assert picture.mode == "RGBA" and picture.width <= 890
        else:
            root = ElementTree.fromstring(path.read_text())
            assert root.get("viewBox").startswith("0 0 890 ")
            numbers = re.findall(r" (?:points|x|y|cx|cy)='([^']*)'", path.read_text())
            assert all(math.isfinite(float(n)) for part in numbers for n in re.split("[ ,]", part))


def test_chapters_show_their_figures():
    """Each has at least one, in two forms, with words for those who cannot see it."""
    shown = {}
    for path in CHAPTERS:
        for block in re.findall(r"<picture>.*?</picture>", path.read_text(), re.S):
            dark = re.search(r'srcset="figures/(\w+)-dark\.(png|svg)"', block)
            name, suffix = dark.groups()
            assert f'src="figures/{name}-light.{suffix}"' in block
            assert len(re.search(r'alt="([^"]*)"', block).group(1)) > 20
            assert "prefers-color-scheme: dark" in block
            shown[name] = path.stem
            for theme in ("light", "dark"):
                assert (ROOT / f"course/figures/{name}-{theme}.{suffix}").exists()
    assert shown == {name: chapter for name, (_, chapter) in figures.FIGURES.items()}


@pytest.mark.parametrize("name", ["stream", "intervals", "moved", "memory"])
def test_figures_of_the_repository_are_of_this_code(name, tmp_path):
    for path in figures.draw(name, tmp_path):
        assert path.read_text() == (ROOT / "course/figures" / path.name).read_text()


def test_axes_place_points():
    axes = figures.Axes("light", 50, (0, 10), (1, 3), ("a", "b"), (200, 100))
    assert axes.at(0, 1) == (50, 134) and axes.at(5, 2) == (150, 84)
    axes = figures.Axes("light", 50, (10, 1000), (1, 100), ("a", "b"), (200, 100), log=True)
    assert axes.at(100, 10) == pytest.approx((150, 84))


def test_losses_of_counting_are_those_of_a_slow_loop():
    train, val, V = [0, 1, 2, 1, 2, 0, 1], [1, 2, 0, 1, 1], 3
    text = SimpleNamespace(
        tokenizer=SimpleNamespace(vocab_size=V),
        open=lambda split, kind: np.array({"train": train, "val": val}[split]),
    )
    single, double = [], []
    for before, after in zip(val, val[1:]):
        single.append(-math.log((train.count(after) + 1) / (len(train) + V)))
        follows = [b for a, b in zip(train, train[1:]) if a == before]
        double.append(-math.log((follows.count(after) + 1) / (len(follows) + V)))
    wanted = math.log(V), sum(single) / 4, sum(double) / 4
    assert figures.entropies(text) == pytest.approx(wanted)


def test_numbers_moved_are_those_of_the_formula_step_by_step():
    """Each operation reads its inputs and writes its result."""
    T, D, C = 7, 4, 5
    vectors, scores = T * D, T * T
    # (read, written): q k^T, scale, mask, softmax, weights v
    steps = [(2 * vectors, scores), *[(scores, scores)] * 3, (scores + vectors, vectors)]
    assert experiments.moved_by_attention(T, D) == (sum(map(sum, steps)), 4 * vectors)
    # square, mean, + eps, rsqrt, x * rsqrt, ... * weight
    x = T * C
    steps = [(x, x), (x, T), (T, T), (T, T), (x + T, x), (x + C, x)]
    assert experiments.moved_by_norm(T, C) == (sum(map(sum, steps)), x + C + x)


# ---------------------------------------------------------------------------------------------
# The words of growth


def test_an_age_is_where_a_word_stays_known():
    shares = (1, 2, 4, 8)
    known, unknown = (20, 20), (5, 20)
    assert experiments.age([known] * 4, shares) == 1
    assert experiments.age([known, unknown, known, known], shares) == 4
    assert experiments.age([unknown, unknown, unknown, known], shares) == 8
    assert experiments.age([known, known, known, unknown], shares) is None
    # an interval that reaches chance is not above it: 9 of 20 begins at .26, 8 of 20 at .22
    assert experiments.age([(8, 20), (9, 20), known, known], shares) == 2


def test_scores_of_words_are_counted(tmp_path):
    (tmp_path / "eval").mkdir()
    rows = ["trial_id,target_category", "0,cup", "0,cup", "1,ball", "1,ball", "2,cup", "2,cup"]
    (tmp_path / "eval/labeled_s.csv").write_text("\n".join(rows) + "\n")
    for name, hits in (("a", [1.0, 0.0, 0.5]), ("b", [1.0, 1.0, 0.0])):
        (tmp_path / name).mkdir()
        own = {"labeled_s": {"hits": {"all": {"accuracy": hits}}}}
        (tmp_path / name / "hits.json").write_text(json.dumps(own))
    found = experiments.word_scores(tmp_path, [tmp_path / "a", tmp_path / "b"])
    assert found == {"ball": (0.5, 1), "cup": (1.25, 2)}


# ---------------------------------------------------------------------------------------------
# The notebook


def test_the_notebook_runs(tmp_path, recipe, monkeypatch):
    """Its cells, one after the other, with a tiny run in the place of out/toy."""
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "train.py").touch()
    (tmp_path / "course").mkdir()
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
    shutil.copytree(recipe, tmp_path / "out/toy")
    (tmp_path / "data/toy").symlink_to(Path(recipe).resolve().parent.parent / "data/tiny")
    monkeypatch.chdir(tmp_path / "course")
    monkeypatch.setenv("STEPS", "2")

    original = subprocess.run

    def run(command, **options):
        """subprocess.run; our scripts in this process, train.py with a tiny model."""
        if command[0] != sys.executable:
            return original(command, **options)
        script, *arguments = command[1:]
        if script == "train.py":
            arguments += [*SMALL, "--phase1_steps=2"]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            importlib.import_module(script.removesuffix(".py")).main(arguments)
        return SimpleNamespace(stdout=output.getvalue(), stderr="", returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    notebook = json.loads((ROOT / "course/chapter_3.ipynb").read_text())
    assert notebook["nbformat"] == 4
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert not cell["outputs"]
                exec("".join(cell["source"]), names)
    assert "its first part is the picture: True" in printed.getvalue()
    assert (tmp_path / "out/linear/phase1.pt").exists()
    assert (tmp_path / "out/mlp2x_gelu/phase1.pt").exists()
