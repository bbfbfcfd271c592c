"""The house rules: sizes, imports, packages, words."""

import ast
import re
import subprocess
import sys

import layers
import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("course/*.md"))]
MODULES = sorted(layers.find_modules().values())
ALL = [
    *MODULES,
    *ROOT.glob("tests/*.py"),
    *ROOT.glob("benchmarks/*.py"),
    *ROOT.glob("configs/**/*.py"),
    *ROOT.glob("course/**/*.py"),
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
    """torch, numpy, tiktoken, pillow, triton, tqdm; nltk, imageio-ffmpeg and jinja2 (which torch
    needs itself) are optional, each tried in one place."""
    known = (
        set(sys.stdlib_module_names)
        | PACKAGES
        | {path.stem for path in MODULES}
        | {"torch", "numpy", "tiktoken", "PIL", "triton", "tqdm"}
    )
    for path in MODULES:
        optional = {
            "scores": {"nltk"},
            "ffmpeg": {"imageio_ffmpeg"},
            "chat_templates": {"jinja2"},
            "babyvlm": {"lmms_eval", "huggingface_hub"},  # it runs inside lmms-eval
        }.get(path.stem, set())
        assert imports(path) - known <= optional, path.name


def test_the_readme_is_one_page():
    assert len(README.split()) <= 2300
    assert "![" in "\n".join(README.splitlines()[:12])  # a picture on the first screen


MADE = {  # names in the pages of files that a command or a user makes
    "captions.png", "report.html", "results.json", "log.jsonl", "skipped.txt", "transcripts.txt",
    "frames.txt", "NAME.py", "meta.json", "config.json", "pairs.csv", "train.json", "val.json",
    "hits.json", "compare.html", "run.json", "language.pt",
    "submission.json", "scores.json", "test.json", "vocab.json",
    "SAYCam_train_data.json", "tokenizer.json", "answers/1_1_count_pairs.py",
}  # fmt: skip


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_pages_name_only_files_that_exist(path):
    text = path.read_text()
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|txt|pt|png|md|toml|json))`", text):
        known = name in MADE or name.startswith(("out/", "sources/NAME", "tasks/NAME"))
        exists = (ROOT / name).exists() or (ROOT / "configs" / name).exists()
        assert known or exists, name
    for name in re.findall(r"\]\(([^)#:]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        assert (path.parent / (name[0] or name[1])).exists(), name


ODD = re.compile(  # words of our own, and paraphrases, where the field has a noun
    r"\b(knobs?|mend(s|ed)?|spoilt|sift(s|ed|ing)?|dealt|has a say|made anew|"
    r"what (the|a|an|it|they) \w+ (makes?|made|holds?|takes?|knows?)|"
    r"where there (is|are) (one|none))\b",
    re.I,
)


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=lambda path: path.name)
def test_words_are_the_fields_own(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if path.name != "config.py" or "mend" not in line:  # the old option's name is refused there
            assert not ODD.search(line), f"{path.name}:{number}: {line}"


def test_the_project_speaks_of_itself_only():
    for path in [*PAGES, *ALL]:
        for foreign in ("/work" + "/", "../" + "shared", "/tmp" + "/", "issue" + " #"):
            assert foreign not in path.read_text(), path


def test_no_error_of_ours_is_hidden():
    """Around a main stands config.run, which catches UserError and OSError alone."""
    for path in MODULES:
        text = path.read_text()
        if path.name == "data.py":  # its command is in sources/command.py
            assert text.endswith("    config.run(main)\n")
        elif '__name__ == "__main__"' in text:
            assert text.endswith('if __name__ == "__main__":\n    config.run(main)\n'), path.name


def test_ruff_is_content():
    pytest.importorskip("ruff")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
