"""The tools that break things on purpose; what takes minutes is benchmarks/reliability.py's."""

import json
import os
import random
import sys

import pytest
import torch
from conftest import ROOT, shell

sys.path.insert(0, str(ROOT / "benchmarks"))
import bad_inputs
import endurance
import processes
import reliability

from config import UserError


def test_corrupted_input_of_every_kind_ends_in_success_or_one_line(tmp_path):
    """A sample of what the benchmark does ten thousand times."""
    flags = ["--what=inputs", "--cases=19", "--seed=7"]
    own = {"PYTHONPATH": ""}  # a process of its own: it forks, too
    done = shell(ROOT / "benchmarks/reliability.py", *flags, cwd=tmp_path, **own)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == sorted(bad_inputs.KINDS)
    assert all(int(row[1]) == 1 and int(row[4]) == 0 for row in rows), done.stderr[-3000:]
    assert "19 cases, 0 ended otherwise; none of the good files changed" in done.stdout


@pytest.mark.parametrize(
    "code, said, megabytes, fault",
    [
        (0, "", 100, ""),
        (1, "\rwork: 3%\rerror: x.csv: no rows\n", 100, ""),
        (1, "error: a\nerror: b\n", 100, "not one line"),
        (1, "Traceback (most recent call last):\n  KeyError: 1\n", 100, "traceback"),
        (-11, "", 100, "exit -11"),
        (None, "", 100, "over 30 s"),
        (0, "", 3000, "3000 MB"),
    ],
)
def test_what_counts_as_a_fault(tmp_path, code, said, megabytes, fault):
    (tmp_path / "here").mkdir()
    assert bad_inputs.fault(code, said, megabytes, tmp_path / "here", set()) == fault


def test_a_file_where_none_should_be_is_a_fault(tmp_path):
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    (here / "data" / "x").touch()
    assert bad_inputs.fault(0, "", 1, here, {"data"}) == ""
    (here / "pictures").mkdir()
    assert bad_inputs.fault(0, "", 1, here, {"data"}) == "wrote pictures"
    assert bad_inputs.fault(0, "", 1, here, {"data"}, ["--out=pictures/é"]) == ""
    replaced = ["--out=pictures", "--out=data"]  # of a flag given twice the last is what counts
    assert bad_inputs.fault(0, "", 1, here, {"data"}, replaced) == "wrote pictures"
    (here / "pictures").rmdir()
    (tmp_path / "outside").touch()
    assert bad_inputs.fault(0, "", 1, here, {"data"}) == "wrote outside"


def test_commands_are_watched_in_forks(tmp_path, monkeypatch):
    """A command that ends well, one with a line, one whose line names what no encoding has, one of
    ours with a traceback, one that hangs."""
    monkeypatch.setattr(bad_inputs, "SECONDS", 1)

    class Script:
        @staticmethod
        def main(argv):
            if argv == ["line"]:
                raise UserError("x.csv: no rows")
            if argv == ["odd"]:
                raise UserError("\udc80: no such file")
            if argv == ["ours"]:
                raise ZeroDivisionError
            while argv == ["hangs"]:
                pass

    import config  # noqa: F401 - a fork finds it by its name

    monkeypatch.setitem(sys.modules, "script", Script)
    tried = ("", "line", "odd", "ours", "hangs")
    ends = [bad_inputs.attempt("script", [word], tmp_path)[:2] for word in tried]
    assert [code for code, _ in ends] == [0, 1, 1, 1, None]
    assert ends[1][1].startswith("error: x.csv: no rows")
    assert ends[2][1] == "error: \\udc80: no such file\n"


def test_a_fork_that_fails_before_its_command_ends(tmp_path, monkeypatch):
    """Else it would come back as a second parent, and leave its mark in the folder."""

    def play(script, words, folder):
        (folder / "stderr").touch()
        raise OSError

    monkeypatch.setattr(bad_inputs, "play", play)
    parent = os.getpid()
    try:
        assert bad_inputs.attempt("script", [], tmp_path)[:2] == (1, "")
    finally:
        if os.getpid() != parent:
            (tmp_path / "came back").touch()
            os._exit(1)
    assert not (tmp_path / "came back").exists()


def test_corrupting_changes_one_file_and_follows_from_its_seed(tmp_path):
    content, found = json.dumps([{"a": [1, "x"], "b": "y"}] * 4), []
    for seed in (1, 1, 2, 3, 4, 5):
        path = tmp_path / f"{len(found)}.json"
        path.write_text(content)
        bad_inputs.corrupt_json(random.Random(seed), path)
        found.append(path.read_text())
    assert found[0] == found[1] and len(set(found)) > 3 and content not in found[2:4]


def test_digests_see_weights_and_steps_but_not_speed(tmp_path):
    found = []
    for step, speed, weight in ((1, 5, 1.0), (1, 6, 1.0), (1, 6, 2.0), (2, 6, 2.0)):
        entry = {"phase": "a", "step": step, "loss": 2.0, "tokens/s": speed}
        (tmp_path / "log.jsonl").write_text(json.dumps(entry) + "\n")
        torch.save({"x": [torch.tensor([weight])], "y": "z"}, tmp_path / "a.pt")
        found.append(reliability.Scene("", tmp_path, [], ".").result(tmp_path))
    assert found[0] == found[1]
    assert found[1]["a.pt"] != found[2]["a.pt"] and found[1]["log.jsonl"] == found[2]["log.jsonl"]
    assert found[2]["log.jsonl"] != found[3]["log.jsonl"]


def test_the_soak_runs_and_sees_all_phases(tmp_path, capsys):
    settings = reliability.Config(steps=40)
    endurance.soak(tmp_path, settings)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(processes.PHASES) and all("%" in row for row in rows[1:])
