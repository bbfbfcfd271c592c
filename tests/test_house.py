"""The house rules: sizes, imports, packages, words."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("sources/*.py")])
ALL = [
    *MODULES,
    *ROOT.glob("tests/*.py"),
    *ROOT.glob("benchmarks/*.py"),
    *ROOT.glob("configs/*.py"),
]
# A file's name as others import it: sources/__init__.py is "sources".
NAME = {path: path.parent.name if path.stem == "__init__" else path.stem for path in MODULES}
LESSON = "config images tokenizer data batches model vision train sample".split()
# Imports run downwards only: a file may import any of a row above its own, and none of its own.
FLOORS = [
    {"config", "fused"},
    {"kernels"},
    {"checks"},
    {
        "places",
        "files",
        "ahead",
        "scores",
        "tokenizer",
        "templates",
        "tiles",
        "convnets",
        "model",
        "lora",
    },
    {"images", "vision", "tokenizer_json", "tensors", "films", "transcripts"},
    {"data", "report", "dino"},
    {"batches", "features"},
    {"sources", "checkpoint"},
    {"toy", "pairs", "saycam", "video", "towers"},
    {"export", "hf_config", "watch", "chat", "inference"},
    {"huggingface"},
    {"weights", "llava"},
    {"sample", "toy_chat", "phases", "babyvlm", "choice", "devbench", "parents"},
    {"toolbox"},
    {"eval", "curate", "_toy_items"},
    {"_toy_games"},
    {"train", "toy_v2"},
]
KNOWS_NO_FILES = ("model", "vision", "dino", "kernels", "scores")


def imports(path):
    """The top names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def lines(path):
    return path.read_text().count("\n")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_no_line_no_function_and_no_file_is_too_long(path):
    assert max(map(len, path.read_text().splitlines())) <= 100
    if path not in MODULES:
        return
    assert lines(path) <= (550 if path.name == "kernels.py" else 500)
    if path.name != "kernels.py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_the_lesson_is_an_evenings_reading():
    """Below 2,200 lines, those between paragraphs not counted."""
    written = "\n".join((ROOT / f"{name}.py").read_text() for name in LESSON)
    assert len([line for line in written.splitlines() if line.strip()]) < 2200


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_imports_run_downwards(path):
    floor = next(i for i, names in enumerate(FLOORS) if NAME[path] in names)
    above = set().union(*FLOORS[:floor])
    ours = set().union(*FLOORS)
    assert imports(path) & ours <= above, path.name


def test_the_floor_plan_is_of_the_files_there_are():
    assert set(NAME.values()) == set().union(*FLOORS)


@pytest.mark.parametrize("name", KNOWS_NO_FILES)
def test_what_computes_knows_no_files_and_no_command_line(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    calls = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print"} and "sys" not in imports(ROOT / f"{name}.py")


def test_only_the_named_packages_are_imported():
    """torch, numpy, tiktoken, pillow, triton, tqdm; nltk and imageio-ffmpeg are optional, each
    tried in one place."""
    known = (
        set(sys.stdlib_module_names)
        | set(NAME.values())
        | {"torch", "numpy", "tiktoken", "PIL", "triton", "tqdm"}
    )
    for path in MODULES:
        optional = {"scores": {"nltk"}, "films": {"imageio_ffmpeg"}}.get(path.stem, set())
        assert imports(path) - known <= optional, path.name


def test_the_readmes_table_tells_each_files_size():
    """Rounded to 50 lines, and no more than a fifth off."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == {str(path.relative_to(ROOT)) for path in MODULES}
    for name, size in rows:
        assert int(size) % 50 == 0
        assert abs(int(size) - lines(ROOT / name)) <= max(0.2 * lines(ROOT / name), 25), name


def test_the_readme_names_only_files_that_exist():
    made = {"captions.png", "skipped.txt", "transcripts.txt", "frames.txt", "NAME.py"}
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|txt|pt|png|md|toml))`", README):
        exists = (ROOT / name).exists() or name in made or name.startswith(("out/", "sources/NAME"))
        assert exists, name


def test_there_is_a_test_file_for_each_module():
    for path in MODULES:
        together = {
            "features": "batches",
            "checks": "batches",
            "ahead": "train",
            "parents": "train",
            "lora": "train",
            "towers": "weights",
            "tensors": "weights",
            "chat": "huggingface",
            "export": "huggingface",
            "hf_config": "huggingface",
            "convnets": "vision",
            "babyvlm": "eval",
            "films": "video",
            "transcripts": "video",
            "toy_v2": "toolbox",
            "_toy_items": "toolbox",
            "_toy_games": "toolbox",
            "places": "images",
            "inference": "sample",
            "phases": "train",
            "watch": "eval",
        }  # tested where they are used
        assert (ROOT / f"tests/test_{together.get(NAME[path], NAME[path])}.py").exists(), path.name


def test_the_project_speaks_of_itself_only():
    for path in [ROOT / "README.md", ROOT / "benchmarks/README.md", *ALL]:
        for foreign in ("/work" + "/", "../" + "shared", "/tmp" + "/", "issue" + " #"):
            assert foreign not in path.read_text(), path


def test_no_error_of_ours_is_hidden():
    """Around a main stands config.run, which catches UserError and OSError alone."""
    for path in MODULES:
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            assert text.endswith('if __name__ == "__main__":\n    config.run(main)\n'), path.name


def test_ruff_is_content():
    pytest.importorskip("ruff")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
