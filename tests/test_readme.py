"""Every command of the README's quick start, typed as it stands there, on a tiny world."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, TINY, shell

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
BLOCKS = re.findall(r"<!-- (?:run|more|change) -->\n```sh\n(.*?)```", README, re.S)
COMMANDS = [
    command.strip()
    for block in BLOCKS
    for line in block.splitlines()
    for command in line.split("#")[0].split("&&")
    if command.strip()
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder that looks like the repository, where data/ and out/ can be written."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [
        *ROOT.glob("*.py"),
        *(path.parent for path in ROOT.glob("*/__init__.py")),
        ROOT / "configs",
        ROOT / "assets",
        ROOT / "requirements.txt",
    ]:
        os.symlink(path, folder / path.name)
    subprocess.run([sys.executable, "data.py", "toy", *TINY], cwd=folder, check=True)
    return folder


def test_the_quick_start_is_there():
    assert any(c.startswith("python train.py configs/toy.py") for c in COMMANDS)
    assert any(c.startswith("torchrun") for c in COMMANDS) and len(COMMANDS) >= 7


@pytest.mark.parametrize("path", PAGES)
def test_no_table_is_empty(path):
    """A head and its rule, and then nothing: figures that were to be put in and were not."""
    lines = [*(ROOT / path).read_text().splitlines(), ""]
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"\|(?:-+\|)+", line)]
    assert all(lines[i + 1].startswith("|") for i in rules)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(clone, command):
    words = shlex.split(command)
    if words[0] == "pip":
        assert words == ["pip", "install", "-r", "requirements.txt"]
        return  # .ci/run does it, in a fresh environment
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", "--master_port=29517", *words[1:]]
    tiny = SMALL if "train.py" in words else []
    if "--plan" in words:  # computed, not measured, which is a test of its own
        tiny = [*tiny, "--gpu=h100"]
    done = shell(*words[1:], *tiny, cwd=clone)
    assert done.returncode == 0, done.stderr[-2000:]
    if "--attention" in words:
        assert (clone / "out.png").stat().st_size > 1000
