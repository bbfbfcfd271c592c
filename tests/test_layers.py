"""Imports run one way, a step runs few files, and training imports no more than it needs."""

import re
import sys
import threading

import layers
from conftest import ROOT, SMALL, shell

import train


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


def test_no_module_is_imported_by_a_computed_name_but_a_source():
    """sources/__init__.py finds a source of its own folder by name."""
    for name, path in layers.find_modules().items():
        computed = re.findall(r"import_module|__import__", path.read_text(encoding="utf-8"))
        assert not computed or name == "sources", name


def test_the_page_shows_the_layers_there_are():
    page = (ROOT / "docs" / "contributing.md").read_text()
    shown = re.findall(r"^\d\. (.*)$", page, re.M)
    assert len(shown) == len(layers.LAYERS)
    for line, names in zip(shown, layers.LAYERS):
        found = {name.rstrip("/") for name in re.findall(r"`([\w./]+)`", line)}
        assert found == set(names) - {"adapters"}, line


def files_of_a_step(monkeypatch, *flags):
    """Our files in which a function runs between steps 2 and 3 of phase 2, in any thread."""
    found, recording = set(), []

    def record(frame, event, argument):
        if recording and event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            found.add(frame.f_code.co_filename.removeprefix(f"{ROOT}/"))

    def mark(run, step, original=train.validate_and_save):
        recording.clear()
        original(run, step)
        recording.extend([True] * (step == 2))

    monkeypatch.setattr(train, "validate_and_save", mark)
    threading.setprofile(record)
    sys.setprofile(record)
    try:
        train.main([
            str(ROOT / "configs/toy.py"), "--data=data/tiny", "--out=out/traced", *SMALL,
            "--init=out/full", "--phase=2", "--batches_ahead=0", *flags,
        ])  # fmt: skip
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found - {"tests/test_layers.py"}


def test_a_step_runs_at_most_twelve_of_our_files(recipe, home, monkeypatch):
    found = files_of_a_step(monkeypatch)
    print(sorted(found))
    assert {"train.py", "batches.py", "model.py", "kernels.py"} <= found and len(found) <= 12
    readme = " ".join((ROOT / "README.md").read_text().split())
    sentence = re.search(r"of our files: (.*?); with Muon (.*?) too\. ", readme)
    names, more = (set(re.findall(r"`([\w./]+)`", part)) for part in sentence.groups())
    assert names == found
    assert files_of_a_step(monkeypatch, "--out=out/muon", "--optimizer=muon") == found | more


def test_training_imports_only_what_it_needs(recipe, home):
    """Nothing of pretrained/ but the reading of vocabularies, and no test before the tests run."""
    code = (
        "import sys, train\n"
        f"train.main(['--data=data/tiny', '--out=out/imports', '--evaluate=False', *{SMALL!r}])\n"
        "print(*[m for m in sys.modules if m.split('.')[0] in ('pretrained', 'tasks', 'eval')])"
    )
    done = shell("-c", code, cwd=home, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    found = done.stdout.splitlines()[-1].split()
    vocabularies = ["pretrained.split_patterns", "pretrained.tokenizer_json"]
    assert sorted(found) == ["pretrained", *vocabularies]


def test_how_threads_wait_is_set_before_torch_is_imported(tmp_path):
    """libgomp reads it once, when torch loads it; a value that a user has set stays."""
    for name in ("train", "sample", "eval"):
        code = (
            "import os, sys\n"
            "class Watch:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'torch':\n"
            "            print(os.environ.get('GOMP_SPINCOUNT'))\n"
            "            sys.exit()\n"
            "sys.meta_path.insert(0, Watch())\n"
            f"import {name}"
        )
        for given, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
            done = shell("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT), **given)
            assert done.stdout.strip() == expected, (name, done.stderr[-500:])
