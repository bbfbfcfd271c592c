"""The house rules: sizes, imports, packages, words."""

import ast
import re
import subprocess
import sys

import layers
import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
MODULES = sorted(layers.find_modules().values())
ALL = [
    *MODULES,
    *ROOT.glob("tests/*.py"),
    *ROOT.glob("benchmarks/*.py"),
    *ROOT.glob("configs/*.py"),
]
KNOWS_NO_FILES = ("model", "vision", "dino", "kernels")
PACKAGES = {"common", "sources", "tasks", "training", "pretrained", "adapters", "fast"}


def imports(path):
    """The top names that a file imports."""
    tree = ast.parse(path.read_text())
    return {name.split(".")[0] for name in layers.imported_names(tree)}


def test_the_root_shows_fourteen_modules_and_seven_packages_at_most():
    assert len([*ROOT.glob("*.py")]) <= 14
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= PACKAGES


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_lines_have_at_most_100_columns(path):
    assert max(map(len, path.read_text().splitlines()), default=0) <= 100


def test_imports_run_one_way():
    """From the ninth layer down to the first; inside a layer without circles."""
    graph = layers.find_graph()
    assert len(layers.LAYERS) <= 9
    for name, found in graph.items():
        up = [other for other in found if layers.layer_of(other) > layers.layer_of(name)]
        assert not up, f"{name} imports {up}"
    assert not layers.find_circle(graph)


def test_a_circle_would_be_found():
    assert layers.find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


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
        | PACKAGES
        | {path.stem for path in MODULES}
        | {"torch", "numpy", "tiktoken", "PIL", "triton", "tqdm"}
    )
    for path in MODULES:
        optional = {"scores": {"nltk"}, "ffmpeg": {"imageio_ffmpeg"}}.get(path.stem, set())
        assert imports(path) - known <= optional, path.name


def test_the_readme_names_only_files_that_exist():
    made = {"captions.png", "skipped.txt", "transcripts.txt", "frames.txt", "NAME.py"}
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|txt|pt|png|md|toml))`", README):
        exists = (ROOT / name).exists() or name in made or name.startswith(("out/", "sources/NAME"))
        assert exists, name


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
