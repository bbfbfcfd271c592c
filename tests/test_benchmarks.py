"""The benchmarks run to their tables; kernel_speed.py's own tests stand beside the kernels'."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, make_corpus, shell
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import speedrun
import utilization
from sides import VOCABULARY, Shape


def rows(text):
    """The cells of each line of a table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_all_learn_and_are_scored_alike(tmp_path):
    pytest.importorskip("transformers")
    make_corpus(tmp_path / "speech", {"train": [("a ball .", 0)], "val": [("a bear .", 0)]})
    grammar = tmp_path / "zorro"
    grammar.mkdir()
    (grammar / "one.txt").write_text("a ball look .\nlook a ball .\n")
    meta = json.loads((tmp_path / "speech" / "meta.json").read_text())
    val = meta["splits"]["val"]
    guess = math.log2(meta["vocab_size"]) * val["text"] / val["characters"]
    for minutes in (0.02, 0.2):  # a busy machine has time for two or three steps: then longer
        done = shell(
            ROOT / "benchmarks/quality.py", "--data=speech", f"--minutes={minutes}", "--length=32",
            "--models", "ours", "muon", "llama", "gpt2", "babyllava", "--seeds", "1",
            "--zorro=zorro", "--device=cpu", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        table = rows(done.stdout)[2:]
        if float(table[0][5]) < guess:
            break
    assert [row[1] for row in table] == ["1"] * 5
    assert [row[0] for row in table][:4] == ["ours", "ours, by Muon", "Llama", "GPT-2"]
    assert table[0][2] == table[2][2]  # Llama has our parameters, to the last
    for row in table:
        assert int(row[3].replace(",", "")) > 0 and float(row[6]) in (0.0, 1.0)
    # whoever learns needs fewer bits than a guess among all tokens
    assert float(table[0][5]) < guess


def test_targets_are_measured_side_by_side(tmp_path):
    done = shell(ROOT / "benchmarks/targets.py", "--steps=3", "--shapes=S", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = rows(done.stdout)[2:]
    assert [row[:2] for row in table] == [["S", phase] for phase in ("phase 1", "phase 2")]
    for row in table:
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d - \d+\.\d\d\)", row[4])


def test_optimizers_take_turns(tmp_path):
    done = shell(ROOT / "benchmarks/optimizers.py", "--rounds=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    head, _, *table = rows(done.stdout)
    assert head[1:] == ["AdamW", "our Muon", "PyTorch's Muon"] and len(table) == 3
    for row in table:
        assert 0 < float(row[1]) < float(row[2])  # Muon computes more


def test_jpegs_are_read_by_each_way(tmp_path):
    flags = ["--count=8", "--rounds=1", "--sides", "64x48", "--size=16"]
    done = shell(ROOT / "benchmarks/jpegs.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = rows(done.stdout)[2:]
    ways = [row[1] for row in table]
    assert [*dict.fromkeys(ways)] == ["a plain loop of Pillow", "ours, bilinear", "ours, reduced"]
    assert table[0][4] == "1.00" and all(float(row[4]) > 0 for row in table)


def test_growth_is_measured_along_its_axes_and_drawn(tmp_path):
    done = shell(
        ROOT / "benchmarks/growth.py", "--rounds=1", "--most=4", "--draw=g.png", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = rows(done.stdout)[2:]
    assert [row[:2] for row in table] == [
        [axis, str(count)] for axis in ("batch", "pictures") for count in (1, 2, 4)
    ]
    for axis, count, whole, unit in table:
        ms, each = float(whole.split()[0]), float(unit.split()[0])
        parts = int(count) * (4 if axis == "pictures" else 1)
        assert ms > 0 and abs(each * parts / ms - 1) < 0.05
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.size == (600, 240)


def test_a_data_set_grows_in_sparse_files(tmp_path):
    done = shell(
        ROOT / "benchmarks/growth.py", "--rounds=1", "--most=1000", "--axes", "data set",
        cwd=tmp_path,
    )  # fmt: skip
    [[axis, count, opened, cost]] = rows(done.stdout)[2:]
    assert (axis, count) == ("data set", "1,000") and opened.endswith("s to open")
    assert float(cost.split()[0]) > 0


def test_the_command_for_a_gpu_runs_whole_in_a_tiny_form(tmp_path):
    """Each step ends well within its limit; its output is what the step is for."""
    env = {**os.environ, "DRY": "1", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), str(tmp_path)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = {row[0]: int(row[1]) for row in rows((tmp_path / "steps.md").read_text())[2:]}
    failed = {name: (tmp_path / f"{name}.err").read_text()[-500:] for name in steps if steps[name]}
    assert not failed
    assert [*steps] == "machine data kernels utilization toy same peers shards".split()
    said = {name: (tmp_path / f"{name}.txt").read_text() for name in steps}
    # kernels: beside all of PyTorch's, and near fp64
    table = [line.split("|")[1:-1] for line in said["kernels"].splitlines() if line[:1] == "|"]
    table = [[cell.strip() for cell in row] for row in table]
    for name in ("ours", "sdpa flash", "sdpa cuDNN", "sdpa efficient", "flex, compiled", "eager"):
        assert name in [row[0] for row in table]
    ours = [row for row in table if row[0] == "ours"]
    assert len(ours) == 3 and all(float(row[-1]) < 1e-5 for row in ours)
    # what a machine could do, beside what it does
    head, _, *table = rows(said["utilization"])
    assert head[4:7] == ["TFLOP/s", "of products", "busy"]
    named = ["language, 64 wide", "phase1, 64 wide", "phase2, 64 wide", "features, ViT-B/14"]
    assert [row[0] for row in table] == named
    for _, dtype, ms, per_second, *_, share, busy, memory in table:
        assert dtype == "float32" and float(ms) > 0 and float(share.rstrip("%")) > 0
        assert float(per_second.replace(",", "")) > 0 and busy == memory == "-"
    assert "written: out/toy/results.json" in said["toy"]
    assert "captions are the same" in said["same"] and "language.shards" in said["shards"]
    # beside a peer: a ratio of rounds
    table = rows(said["peers"])
    assert [row[2] for row in table[2:5]] == ["its tower", "ours", "LLaVA"]
    for row in table[2:5]:
        shown = re.fullmatch(r"(\S+) \((\S+) - (\S+)\)", row[4])
        low, middle, high = map(float, shown.group(2, 1, 3))
        assert 0 < low <= middle <= high
    head, _, [work, shape, who, eager, best] = table[5:]
    assert head[2:] == ["beside", "eager", "best"]
    assert (work, shape, who) == ("phase2", "S", "LLaVA") and eager == best


def test_the_gpu_benchmarks_say_what_they_lack(tmp_path):
    done = shell(ROOT / "benchmarks/utilization.py", "--widths=100", cwd=tmp_path)
    assert done.returncode == 1 and "multiples of 64" in done.stderr


def test_a_steps_flops_are_those_of_its_products():
    """Counted by hand: every product has a multiplication and an addition."""
    layers, C, hidden, row = 12, 64, 192, 128
    block = 4 * C * C + 3 * C * hidden  # weights of a block's products
    forward = 2 * row * (layers * block + VOCABULARY * C) + layers * 4 * row * row * C
    shape = Shape(0, (), layers, batch=2, words=row, width=C, heads=1)
    assert utilization.step_flops("language", shape) == 2 * 3 * forward

    T, places, E, words = 196 + 60 - 1, 196, 384, 60
    wanted = T - 192  # positions of the last block, from the first target on, rounded to eights
    last = 2 * T * 3 * C * C + 2 * wanted * (C * C + 3 * C * hidden)  # its qkv is of all positions
    products = (layers - 1) * 2 * T * block + last + 2 * words * VOCABULARY * C
    attention = (layers - 1) * 4 * T * T * C + 4 * wanted * T * C
    projector = 2 * 2 * places * E * C + 3 * 2 * places * C * C  # nobody asks for its input's
    shape = utilization.shape_of("phase1", C, 256)
    # frozen weights have no gradients; attention's has twice its products
    assert utilization.step_flops("phase1", shape) == 2 * products + 3 * attention + projector


def test_busy_is_what_spans_cover_once():
    assert utilization.busy_share([(0, 2), (1, 3), (5, 6), (5.5, 5.6), (8, 10)]) == 0.6
    assert utilization.busy_share([(3, 4)]) == 1.0


def test_a_speedrun_is_timed_and_judged(home):
    """Trained for four steps, a recipe reaches no target."""
    flags = [f"data={home / 'data/tiny'}", *(flag.removeprefix("--") for flag in SMALL)]
    done = shell(ROOT / "benchmarks/speedrun.py", "--seeds=2", "--flags", *flags, cwd=home)
    assert done.returncode == 0, done.stderr
    head, _, *table = rows(done.stdout)
    assert head == ["target", "at least", "seed 2"]
    assert [row[0] for row in table[:-2]] == [name for name, *_ in speedrun.TARGETS]
    assert "(missed)" in table[0][2] and re.fullmatch(r"\d+ s", table[-2][2])
    seconds, recipe, state, *_ = table[-1]
    assert seconds.endswith(" s") and recipe.startswith("toy.py, data=") and "binding" in state
