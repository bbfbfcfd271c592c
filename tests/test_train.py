"""The loop: what learns in each phase, resuming to the bit, ranks, stale chains, and refusals."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FORKS, ROOT, SMALL, TINY, furthest, make_corpus, one_line, same, shell, weights
from PIL import Image

import checkpoint
import config
import data
import eval as evaluation
import inference
import kernels
import train
import vision
from batches import SampleBatches
from common.files import read_log
from config import UserError
from sources import command
from training import features, phases
from training.prefetch import in_advance
from training.processes import Processes, is_lost_process

sys.path.insert(0, str(ROOT / "benchmarks"))
import processes  # noqa: E402

LEARNING_TOWER = ["--phase2_learn", "projector", "gpt", "tower=5e-4"]


def run(*args, out="out/full"):
    train.main([str(ROOT / "configs/toy.py"), "--data=data/tiny", f"--out={out}", *SMALL, *args])


def begin(recipe, out, *names):
    """A run folder that has these checkpoints of the recipe's; returns its path."""
    folder = Path("out") / out
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in names:
        shutil.copy(recipe / f"{name}.pt", folder / f"{name}.pt")
    return folder


# ---- what learns


def test_the_main_job_leaves_all_it_promises(recipe):
    assert {path.name for path in recipe.iterdir()} - {".lock"} == {
        "vision.pt",
        "language.pt",
        "phase1.pt",
        "phase2.pt",
        "log.jsonl",
        "run.json",
        "results.json",
        "hits.json",
        "report.html",
        "captions.png",
    }
    log = read_log(recipe / "log.jsonl")
    for phase in ("vision", "language", "phase1", "phase2"):
        assert [e["step"] for e in log if e["phase"] == phase and "loss" in e] == [0, 1, 2, 3]
    assert "not SAYCam" in (recipe / "report.html").read_text()
    assert json.loads((recipe / "results.json").read_text())["source"] == "toy"


def test_exactly_the_phases_own_parameters_learn(recipe, home, monkeypatch):
    """The optimizer of each phase holds its parameters, and each part has its rate."""
    runs = {}
    monkeypatch.setattr(train, "loop", lambda run, clock: runs.update({run.name: run}))
    begin(recipe, "sets", "vision", "language", "phase1", "phase2")
    expected = {"language": {"gpt"}, "phase1": {"projector"}, "phase2": {"projector", "gpt"}}
    for phase in expected:
        Path(f"out/sets/{phase}.pt").rename("out/sets/away.pt")
        run("--phase", phase.removeprefix("phase"), out="out/sets")
        Path("out/sets/away.pt").rename(f"out/sets/{phase}.pt")
    Path("out/sets/phase2.pt").unlink()
    for phase, parts in expected.items():
        check_learning(runs[phase], dict.fromkeys(parts))
    run("--phase=2", *LEARNING_TOWER, out="out/sets")
    check_learning(runs["phase2"], {"projector": None, "gpt": None, "tower": 5e-4})
    run("--phase=2", "--phase2_learn", "tower.blocks.1=1e-5", "projector", out="out/sets")
    check_learning(runs["phase2"], {"tower.blocks.1": 1e-5, "projector": None})


def check_learning(found, parts):
    """A Run's optimizer holds exactly these parts, at these rates or else the phase's own."""
    own = getattr(found.settings, f"{found.name}_lr")
    groups = [group for optimizer in found.optimizers for group in optimizer.param_groups]
    rates = {id(p): group["highest_lr"] for group in groups for p in group["params"]}
    for name, parameter in found.raw_model.named_parameters():
        part = next((part for part in parts if name.startswith(part + ".")), None)
        assert parameter.requires_grad == (part is not None) == (id(parameter) in rates), name
        if part:
            assert rates[id(parameter)] == (parts[part] or own)
    for name, module in found.raw_model.named_modules():
        inside = any((name + ".").startswith(part + ".") for part in parts)
        assert module.training == inside, name  # what is frozen is in eval mode, dropout too


def test_what_is_frozen_keeps_every_bit(recipe):
    at = lambda phase, prefix: weights(recipe / f"{phase}.pt", prefix)
    assert same(at("language", "gpt."), at("phase1", "gpt."))
    assert not same(at("phase1", "gpt."), at("phase2", "gpt."))
    assert not same(at("phase1", "proj"), at("phase2", "proj"))
    tower = {
        name.replace("teacher.backbone.", "tower."): value
        for name, value in at("vision", "teacher.backbone").items()
    }
    assert same(tower, at("phase1", "tower.")) and same(tower, at("phase2", "tower."))


def test_phase_2_with_the_tower_learning(recipe, home):
    folder = begin(recipe, "learning", "vision", "language", "phase1")
    run("--phase=2", *LEARNING_TOWER, out="out/learning")
    before, after = weights(recipe / "phase1.pt", "tower."), weights(folder / "phase2.pt", "tower.")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("blocks.0.attn" in name for name in moved) and len(moved) > 20
    loaded = checkpoint.load(folder / "phase2.pt")
    name = "data/tiny/eval/images/vtwt/" + os.listdir("data/tiny/eval/images/vtwt")[0]
    assert inference.caption_pictures(
        loaded, inference.embed_pictures(loaded, inference.read_pictures(loaded, [name])), 5
    )


def test_live_features_train_as_stored_ones_do(recipe, home):
    folder = begin(recipe, "live", "vision", "language")
    run("--phase=1", "--features=live", out="out/live")
    assert furthest(weights(folder / "phase1.pt"), weights(recipe / "phase1.pt")) < 1e-3


def test_images_that_see_one_another_can_be_trained(recipe, home):
    folder = begin(recipe, "seeing", "vision", "language")
    run("--phase=1", "--image_attention=full", out=str(folder))
    run("--phase=2", out=str(folder))
    assert checkpoint.load(folder / "phase2.pt").model.image_attention == "full"


def test_an_identity_projector_is_passed_over_in_phase_1(home, recipe):
    """It has nothing to learn, and phase 1 once failed on it."""
    folder = begin(recipe, "identity", "vision", "language")
    run("--phase=1", "--projector=identity", out="out/identity")
    run("--phase=2", out="out/identity")
    assert not weights(folder / "phase2.pt", "projector")
    assert checkpoint.read(folder / "phase1.pt")["done"]


def test_conversations_are_phase_3_where_there_are_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captions = [("a ball", 1), ("look , a red ball !", 1)] * 12
    make_corpus(
        "data/c",
        {
            "train": captions,
            "val": captions[:4],
            "chat_train": captions + [("a", 0)] * 8,
            "chat_val": captions[:4],
        },
    )
    train.main(["--data=data/c", "--out=out/c", *SMALL])
    assert checkpoint.read("out/c/phase3.pt")["parents"].keys() == {"phase2"}
    assert set(json.loads(Path("out/c/results.json").read_text())) >= {"val_loss"}


def test_all_is_what_the_data_has_samples_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a ball .\nlook !\nthe cat\n" * 90)
    command.main(["pairs", "--name=speech", "--text=t.txt", "--vocab_size=280"])
    train.main(["--data=data/speech", "--out=out/speech", *SMALL])
    assert [path.name for path in Path("out/speech").glob("*.pt")] == ["language.pt"]


# ---- resuming


class Killed(Exception):
    pass


def dying(monkeypatch, step_number):
    """AdamW that is killed in this step."""
    step, count = torch.optim.AdamW.step, [0]

    def killed(self, *rest):
        count[0] += 1
        if count[0] == step_number:
            raise Killed
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", killed)


@pytest.mark.parametrize(
    "phase, flags",
    [
        ("vision", []),
        ("language", ["--dropout=0.2"]),
        ("phase1", []),
        ("phase2", ["--dropout=0.2"]),
        ("phase2", LEARNING_TOWER),
        ("vision", ["--optimizer=muon", "--student_mask=0.5"]),
        ("phase2", ["--optimizer=muon", *LEARNING_TOWER]),
        ("phase2", ["--optimizer=muon", "--lora_rank=2"]),
    ],
)
@pytest.mark.parametrize("killed_in", [2, 4])
def test_a_killed_run_goes_on_to_the_same_bits(recipe, home, monkeypatch, phase, flags, killed_in):
    """Stopped before the first save, or after one at 2, with dropout on; the log has each step
    once."""
    parents = {"phase1": ("vision", "language"), "phase2": ("phase1",)}
    folder = begin(recipe, "killed", *parents.get(phase, ()))
    args = ["--phase", phase.removeprefix("phase"), *flags]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch, killed_in)
        run(*args, out="out/killed")
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"phase": "' + phase)  # half a line, of a full disk
    assert (folder / f"{phase}.pt").exists() == (killed_in == 4)
    run(*args, out="out/killed")
    steps = [e["step"] for e in read_log(folder / "log.jsonl") if "loss" in e]
    assert steps == [0, 1, 2, 3]
    resumed = weights(folder / f"{phase}.pt")
    (folder / f"{phase}.pt").unlink()
    run(*args, out="out/killed")
    assert same(resumed, weights(folder / f"{phase}.pt"))
    entries = [(e["phase"], e["step"], "loss" in e) for e in read_log(folder / "log.jsonl")]
    assert len(entries) == len(set(entries))  # trained again, logged once


def test_dropout_learns_and_evaluation_does_not_disturb_training(home):
    run("--phase=language", "--dropout=0.3", out="out/often")
    run("--phase=language", "--dropout=0.3", "--eval_every=100", out="out/seldom")
    assert same(weights("out/often/language.pt"), weights("out/seldom/language.pt"))
    run("--phase=language", out="out/without")
    assert not same(weights("out/often/language.pt"), weights("out/without/language.pt"))


@pytest.mark.parametrize(
    "phase, flags", [("vision", []), ("phase1", []), ("phase2", LEARNING_TOWER)]
)
def test_micro_batches_add_up(recipe, home, phase, flags):
    """DINO's views and centre included: a batch may be cut as one likes."""
    folders = []
    for pieces in (1, 4):
        folder = begin(recipe, f"pieces{pieces}", "vision", "language", "phase1")
        (folder / f"{phase}.pt").unlink(missing_ok=True)
        run(
            "--phase",
            phase.removeprefix("phase"),
            f"--grad_accum={pieces}",
            *flags,
            out=f"out/pieces{pieces}",
        )
        folders.append(folder)
    a, b = (weights(folder / f"{phase}.pt") for folder in folders)
    assert furthest(a, b) < 1e-4


def test_two_processes_train_the_model_of_one(recipe, home):
    """On gloo: the recipe's four phases, and phase 2 with the tower learning: the same
    weights within float tolerance."""
    flags = ["--data=data/tiny", "--evaluate=False", *SMALL]
    folder = begin(recipe, "one", "phase1")
    run("--phase=2", *LEARNING_TOWER, out="out/one")
    for more in ([], ["--phase=2", *LEARNING_TOWER]):
        if more:
            Path("out/two/phase2.pt").rename("out/two/frozen.pt")
        command = [
            str(ROOT / "train.py"),
            str(ROOT / "configs/toy.py"),
            *flags,
            "--out=out/two",
            *more,
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        for done in FORKS.run_group(2, command, home, env):
            assert done.returncode == 0, done.stderr[-3000:]
    for phase in ("vision", "language", "phase1"):
        a, b = weights(home / f"out/two/{phase}.pt"), weights(recipe / f"{phase}.pt")
        assert furthest(a, b) < 2e-4, phase
    frozen = weights(home / "out/two/frozen.pt")
    assert furthest(frozen, weights(recipe / "phase2.pt")) < 2e-4
    assert furthest(weights(home / "out/two/phase2.pt"), weights(folder / "phase2.pt")) < 1e-3


def test_two_processes_take_the_same_steps_of_muon(home):
    """Each computes the polar factors of the same averaged gradients, in fp32."""
    phase = ["--phase=language", "--optimizer=muon", "--muon_rate=2"]
    run(*phase, out="out/muon_one")
    command = [str(ROOT / "train.py"), str(ROOT / "configs/toy.py"), "--data=data/tiny"]
    command += [*SMALL, *phase, "--out=out/muon_two"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    for done in FORKS.run_group(2, command, home, env):
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (weights(home / f"out/muon_{name}/language.pt") for name in ("one", "two"))
    assert furthest(one, two) < 2e-5


@pytest.mark.parametrize("ranks, pieces", [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_every_sample_is_seen_once_a_pass_however_many_share_it(recipe, home, ranks, pieces):
    """And from step 5 on by another number of processes, as after a resume."""
    dataset = data.Data("data/tiny")
    model = checkpoint.load("out/full/phase2.pt").model
    batches = SampleBatches(dataset, "train", 8, 1, model)
    batches.read = lambda plan, part: list(plan.rows[part])
    seen, steps = [], batches.rows // 8 * batches.WINDOW  # whole windows of it, and whole passes
    for step in range(steps):
        sharing = 1 if step >= 5 else ranks
        for rank in range(sharing):
            run = SimpleNamespace(
                train_batches=batches,
                processes=Processes(rank, sharing, torch.device("cpu")),
                settings=SimpleNamespace(grad_accum=pieces),
            )
            plan, pieces_of = train.read_batch(run, step)
            rows = plan.rows
            assert len(rows) == 8 and len(pieces_of) == pieces
            seen += [int(row) for piece in pieces_of for row in piece]
    times = np.bincount(seen, minlength=batches.rows)
    assert times.min() >= steps * 8 // batches.rows - 1 and times.max() - times.min() <= 1


def test_what_a_lost_process_leaves_its_peers_is_told_from_mistakes_of_ours():
    words = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:21094"
    assert is_lost_process(RuntimeError(words))
    assert not is_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_process_that_dies_ends_the_others_and_its_job(recipe, home):
    """Within a minute, and what was saved is whole."""
    folder = begin(recipe, "orphan", "vision", "language", "phase1")
    flags = ["--data=data/tiny", "--out=out/orphan", *SMALL, "--phase=2"]
    command = processes.torchrun(2, str(ROOT / "train.py"), *flags, port=29519)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run_ = subprocess.Popen(
        [*command, "--phase2_steps=100000"], stderr=subprocess.PIPE, text=True, env=env
    )
    processes.wait_for(lambda: len(read_log(folder / "log.jsonl")) > 5)
    began = time.time()
    os.kill(processes.workers_of(run_)[1], signal.SIGKILL)
    said = run_.communicate(timeout=120)[1]
    assert run_.returncode != 0 and time.time() - began < 60
    assert "Signal 9" in said
    assert checkpoint.read(folder / "phase2.pt")["step"] > 0


def test_finished_phases_are_left_alone(recipe, home, capfd):
    before = (recipe / "phase1.pt").stat().st_mtime_ns
    run("--phase=1")
    assert (recipe / "phase1.pt").stat().st_mtime_ns == before
    assert "phase1: done already" in capfd.readouterr().out


def test_a_second_run_in_the_same_folder_is_refused(home):
    code = "import time; from common.files import only_one\nwith only_one(%r, 'x'): time.sleep(60)"
    command = [sys.executable, "-c", code % str(home / "out/held")]
    process = subprocess.Popen(command, cwd=ROOT)
    while not (home / "out/held/.lock").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    with pytest.raises(UserError, match="another run is training here"):
        run("--phase=0", out="out/held")
    process.kill()
    process.wait()


# ---- chains


def test_later_phases_notice_that_an_earlier_one_was_trained_again(recipe, home, capfd):
    """Deleting language.pt once left phases 1 and 2 "done already", on another's weights."""
    folder = begin(recipe, "chain", "vision", "language", "phase1", "phase2")
    (folder / "language.pt").unlink()
    run("--evaluate=False", out="out/chain")  # to the same bits: nothing else need be done
    assert capfd.readouterr().out.count("done already") == 3
    (folder / "language.pt").unlink()
    run("--language_lr=0.01", "--evaluate=False", out="out/chain")
    said = capfd.readouterr().out
    assert said.count("training it again") == 2 and said.count("done already") == 1
    parents = checkpoint.read(folder / "phase1.pt")["parents"]
    assert parents["language"] == checkpoint.read(folder / "language.pt")["digest"]
    assert same(weights(folder / "language.pt", "gpt."), weights(folder / "phase1.pt", "gpt."))


def test_new_content_of_the_same_vision_weights_is_noticed(recipe, home, capfd):
    folder = begin(recipe, "file", "language")
    torch.manual_seed(0)
    flags = ["--phase=vision", "--vision_weights=vit.pth"]
    for name in ("first", "second"):
        torch.save(vision.ViT(16, 8, 192, 1, 3).state_dict(), "vit.pth")
        run(*flags, out="out/file")
        run(*flags, out="out/file")
        said = capfd.readouterr().out
        assert said.count("as it is") == 1 and said.count("was loaded before") == 1, name
        written = weights(folder / "vision.pt")
        assert torch.equal(
            written["tower.pos_embed"], torch.load("vit.pth", weights_only=True)["pos_embed"]
        )


def test_a_trained_tower_is_not_overwritten_by_one_from_a_file(recipe, home):
    begin(recipe, "trained", "vision")
    flags = ["--phase=vision", f"--vision_weights={recipe}/phase2.pt"]
    with pytest.raises(UserError, match="was trained: give another --out"):
        run(*flags, out="out/trained")
    run("--phase=vision", "--vision_weights=none", out="out/trained")  # as it was


def test_data_with_too_little_for_a_phase_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_corpus("data/c", {"chat_val": [("a ball", 1)] * 12})
    with pytest.raises(UserError, match="phase2.pt does not exist"):
        train.main(["--data=data/c", "--out=out/c", *SMALL, "--phase=3"])
    with pytest.raises(UserError, match="data/c: nothing to train on"):
        train.main(["--data=data/c", "--out=out/c", *SMALL])
    make_corpus("data/d", {"train": [("a ball", 1)] * 12, "val": [("a ball", 1)] * 4})
    train.main(["--data=data/d", "--out=out/d", *SMALL, "--evaluate=False"])
    with pytest.raises(UserError, match="no data/d/chat_train_samples.bin: data/d was prepared"):
        train.main(["--data=data/d", "--out=out/d", *SMALL, "--phase=3"])


def test_a_corpus_changed_under_a_run_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command.main(["toy", "--name=tiny", *TINY])
    run("--evaluate=False", out="out/c")
    command.main(["toy", "--name=tiny", *TINY, "--seed=5"])
    with pytest.raises(UserError, match="was trained on other data: data/tiny was prepared again"):
        run("--phase=language", out="out/c")
    Path("out/c/phase2.pt").unlink()
    with pytest.raises(UserError, match="has another vocabulary than data/tiny") as error:
        run("--phase=2", out="out/c")
    assert one_line(error)
    command.main(["toy", "--name=tiny", *TINY])  # the same bytes again: all is well
    run("--evaluate=False", out="out/c")


def test_pictures_of_another_size_are_refused(recipe, home):
    tiny = [flag for flag in TINY if not flag.startswith("--size")]
    command.main(["toy", "--name=larger", *tiny, "--size=24"])
    begin(recipe, "sizes", "vision", "language")
    with pytest.raises(UserError, match="was trained on pictures made as") as error:
        train.main(["--data=data/larger", "--out=out/sizes", *SMALL, "--phase=1"])
    assert one_line(error)


# ---- inheritance


def test_later_phases_inherit_what_earlier_ones_decided(recipe, home):
    """Phase 1 with a linear projector, then phase 2: phase2.pt once could not be loaded. Phase 2
    is given none of the sizes here; it has them all from the checkpoint."""
    folder = begin(recipe, "linear", "vision", "language")
    run("--phase=1", "--projector=linear", "--select_layer=-2", "--keep_cls", out="out/linear")
    kept = ("_steps=", "_batch=", "_every=", "--device")
    small = [flag for flag in SMALL if any(part in flag for part in kept)]
    train.main(["--data=data/tiny", "--out=out/linear", "--phase=2", *small])
    loaded = checkpoint.load(folder / "phase2.pt")
    assert isinstance(loaded.model.projector, torch.nn.Linear)
    assert (loaded.model.select_layer, loaded.model.keep_cls) == (-2, True)
    settings = loaded.checkpoint["settings"]
    assert settings["projector"] == "linear" and settings["n_embd"] == 16
    assert loaded.checkpoint["inherited"]["block_size"] == 48


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--n_layer=3", "--n_layer: n_layer 3 contradicts out/none/phase1.pt, which has 2"),
        ("--n_embd=32", "n_embd 32 contradicts"),
        ("--block_size=24", "block_size 24 contradicts"),
        ("--patch=4", "patch 4 contradicts"),
        ("--projector=linear", "'linear' contradicts"),
        ("--select_layer=-2", "select_layer -2 contradicts"),
        ("--keep_cls", "True contradicts"),
        ("--vision_weights=x.pth", "'x.pth' contradicts out/none/phase1.pt, which has ''"),
        ("--image_attention=full", "'full' contradicts"),
    ],
)
def test_a_knob_that_contradicts_its_inheritance_is_refused_with_both_values(
    recipe, home, flag, message
):
    """They were once ignored, yet recorded."""
    begin(recipe, "none", "vision", "language", "phase1")
    with pytest.raises(UserError, match=message) as error:
        run("--phase=2", flag, out="out/none")
    assert one_line(error)


def test_phase_2_may_have_a_dropout_of_its_own(recipe, home):
    begin(recipe, "drop", "phase1")
    run("--phase=2", "--dropout=0.25", out="out/drop")
    assert checkpoint.load("out/drop/phase2.pt").model.gpt.config.dropout == 0.25
    assert checkpoint.read("out/drop/phase2.pt")["settings"]["dropout"] == 0.25


@pytest.mark.parametrize(
    "flags, trained",
    [
        (["--select_layer=-2"], {"phase1", "phase2"}),
        (["--projector=linear"], {"phase1", "phase2"}),
        (["--phase1_steps=2"], {"phase1", "phase2"}),
        (["--phase2_lr=1e-4"], {"phase2"}),
        (["--prototypes=8", "--phase=1"], set()),
    ],
)
def test_the_readmes_exercises_start_from_what_is_there(recipe, home, capfd, flags, trained):
    """A option that does not concern a phase is no reason to refuse it; these once were."""
    begin(recipe, "exercise", "vision", "language", *({"phase1"} - trained))
    run("--evaluate=False", *flags, out="out/exercise")
    said = capfd.readouterr().out
    for phase in ("vision", "language", "phase1", "phase2"):
        if "--phase=1" not in flags:
            assert (f"{phase}: done already" in said) == (phase not in trained)
    if "--phase=1" in flags:
        assert "phase1: done already" in said


def test_without_a_file_it_says_which_one_it_took(tmp_path):
    done = shell(ROOT / "train.py", "--phase", "1", cwd=tmp_path)
    assert "taking configs/phase1.py" in done.stdout
    assert done.returncode == 1 and "run `python data.py saycam" in done.stderr
    done = shell(ROOT / "train.py", ROOT / "configs/phase1.py", "--phase", "2", cwd=tmp_path)
    assert "phase '2' contradicts phase '1' of" in done.stderr


# ---- refusals


@pytest.mark.parametrize(
    "args, out, message",
    [
        (
            ["--phase=1"],
            "out/none",
            "vision.pt does not exist: finish it first with --phase vision",
        ),
        (
            ["--phase=2", "--phase2_lr=0.5"],
            "out/full",
            "was made with phase2_lr=0.002, now it is 0.5",
        ),
        (["--phase=0", "--vision_heads=3"], "out/none", "neither division"),
        (["--phase=0", "--patch=7"], "out/none", "neither division"),
        (["--phase=language", "--n_head=3"], "out/none", "the head width must be"),
        (["--phase=language", "--n_kv_head=3", "--n_head=4"], "out/none", "no multiple"),
        (
            ["--phase=language", "--language_batch=9", "--grad_accum=2"],
            "out/none",
            "does not divide",
        ),
        (["--phase=0", "--vision_weights=nothing.pt"], "out/none", "no nothing.pt: fetch that"),
        (["--phase=0", "--vision_weights=data/tiny/meta.json"], "out/none", "meta.json"),
        (
            ["--phase=language", "--attention=triton"],
            "out/none",
            "backend triton: it needs an NVIDIA GPU",
        ),
        (["--phase=language", "--norm=flash"], "out/none", "'flash' is not allowed"),
        (["--phase=language", "--data=data/nowhere"], "out/none", "no data/nowhere/meta"),
        (["--phase=1", "--select_layer=-9"], "out/fresh", "takes -1 to -2"),
        (
            ["--phase=1", "--projector=mlp0x_gelu"],
            "out/fresh",
            "--projector: no projector .mlp0x_gelu.: one of",
        ),
        (["--phase=2", "--phase2_learn", "nose"], "out/fresh", "'nose': no such part; one of gpt"),
        (["--phase=2", "--phase2_learn", "gpt=fast"], "out/fresh", "want a part, or part=rate"),
        (["--phase=2", "--phase2_learn", "gpt=-1"], "out/fresh", "want a part, or part=rate"),
        (["--phase=2", "--phase2_learn="], "out/fresh", "want a part, or part=rate"),
        (["--phase=2", "--phase2_steps=0"], "out/fresh", "phase2_steps is 0: give"),
        (["--phase=2", "--phase2_learn", "gpt", "gpt.norm=1e-4"], "out/fresh", "trained already"),
    ],
)
def test_mistakes_are_one_clear_line(recipe, home, monkeypatch, args, out, message):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    shutil.rmtree("out/none", ignore_errors=True)
    begin(recipe, "fresh", "vision", "language", *(["phase1"] if "--phase=2" in args else []))
    with pytest.raises(UserError, match=message) as error:
        run(*args, out=out)
    assert one_line(error)


def test_a_mistake_of_ours_keeps_its_traceback(recipe, home, tmp_path):
    """`a, b = x.shape` put into a model once ended as "error: too many values to unpack"."""
    for path in [
        *ROOT.glob("*.py"),
        ROOT / "configs",
        *(p.parent for p in ROOT.glob("*/__init__.py")),
    ]:
        if path.name != "model.py":
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, tmp_path / path.name)
    text = (ROOT / "model.py").read_text()
    old = "        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)\n"
    assert old in text
    (tmp_path / "model.py").write_text(text.replace(old, "        a, b = x.shape\n" + old))
    done = shell(
        tmp_path / "train.py",
        tmp_path / "configs/toy.py",
        "--data=data/tiny",
        "--out=out/ours",
        "--phase=language",
        *SMALL,
        cwd=home,
    )
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "too many values to unpack" in done.stderr and "a, b = x.shape" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(home):
    with pytest.raises(UserError, match="lower language_lr"):
        run("--phase=language", "--language_lr=1e30", "--language_steps=40", out="out/nan")


@pytest.fixture
def corrupted(recipe, home):
    """A copy of the corpus in which the features of one frame are infinite; the samples that show
    it."""
    shutil.rmtree("data/corrupted", ignore_errors=True)
    shutil.copytree("data/tiny", "data/corrupted")
    dataset = data.Data("data/corrupted")
    model = checkpoint.load("out/full/phase2.pt").model
    stored = np.memmap(
        features.find_path(dataset, "train", model),
        "float16",
        "r+",
        shape=features.find_shape(dataset, "train", model),
    )
    stored[5] = np.inf
    stored.flush()
    samples, shown = dataset.open("train", "samples"), dataset.open("train", "image_ids")
    return {row for row, sample in enumerate(samples.tolist()) if shown[sample[2]] == 5}


def test_a_step_that_is_not_finite_is_named_with_its_samples(corrupted, recipe):
    folder = begin(recipe, "inf", "vision", "language")
    flags = ["--data=data/corrupted", "--phase=1", "--phase1_steps=12", "--eval_every=100"]
    with pytest.raises(UserError, match=r"phase1 step \d+: the loss or .* rows [\d, ]+") as error:
        run(*flags, "--save_every=100", out="out/inf")
    assert one_line(error) and "none was saved" in str(error.value)
    named = {
        int(row) for row in re.search("rows ([\\d, ]+)", str(error.value)).group(1).split(", ")
    }
    assert corrupted & named and not (folder / "phase1.pt").exists()


def test_bad_steps_are_skipped_and_logged_as_often_as_allowed(corrupted, recipe):
    folder = begin(recipe, "skip", "vision", "language")
    flags = ["--data=data/corrupted", "--phase=1", "--phase1_steps=12", "--eval_every=100"]
    run(*flags, "--skip_bad_steps=100", out="out/skip")
    entries = [e for e in read_log(folder / "log.jsonl") if "loss" in e or "skipped" in e]
    skipped = [entry for entry in entries if "skipped" in entry]
    assert [entry["step"] for entry in entries] == list(range(12))
    assert len(skipped) > 1 and all(corrupted & set(entry["skipped"]) for entry in skipped)
    assert all(w.isfinite().all() for w in weights(folder / "phase1.pt").values())
    for allowed in (len(skipped) - 1, len(skipped)):
        (folder / "phase1.pt").unlink()
        if allowed < len(skipped):
            with pytest.raises(UserError, match="not finite"):
                run(*flags, f"--skip_bad_steps={allowed}", out="out/skip")
        else:
            run(*flags, f"--skip_bad_steps={allowed}", out="out/skip")


def test_bad_steps_before_a_save_count_after_it(corrupted, recipe):
    """Two halves of a run may skip no more than the whole."""
    folder = begin(recipe, "skip_on", "vision", "language")
    flags = ["--data=data/corrupted", "--phase=1", "--phase1_steps=12", "--save_every=1"]
    run(*flags, "--skip_bad_steps=100", out="out/skip_on")
    log = read_log(folder / "log.jsonl")
    bad = [entry["step"] for entry in log if "skipped" in entry]
    (folder / "phase1.pt").unlink()

    def stop(run, step, validate_and_save=train.validate_and_save):
        validate_and_save(run, step)
        if step > bad[0]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "validate_and_save", stop)
        run(*flags, "--skip_bad_steps=1", out="out/skip_on")
    with pytest.raises(UserError, match=f"step {bad[1]}: .* not finite"):
        run(*flags, "--skip_bad_steps=1", out="out/skip_on")


@pytest.mark.parametrize("phase, flags", [("vision", []), ("phase2", [])])
def test_nothing_but_its_settings_decides_what_a_run_learns(recipe, home, phase, flags):
    """Not how many batches lie ready, how often it is watched, saved or logged."""
    found = []
    for how in (["--batches_ahead=0"], ["--batches_ahead=7", "--eval_every=1", "--log_every=3"]):
        folder = begin(recipe, "ahead", "vision", "language", "phase1")
        (folder / f"{phase}.pt").unlink(missing_ok=True)
        run("--phase", phase.removeprefix("phase"), *flags, *how, "--save_every=1", out="out/ahead")
        found.append(weights(folder / f"{phase}.pt"))
    assert same(*found)


def test_batches_are_in_advance_in_order_and_the_thread_ends():
    made, threads = [], threading.active_count()
    coming = in_advance(lambda step: made.append(step) or step * step, range(9), 3)
    assert next(coming) == 0
    while len(made) < 4:  # three lie ready, and no more are made
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3] and list(coming) == [n * n for n in range(1, 9)]
    coming = in_advance(lambda step: 1 // (2 - step), range(9), 3)
    with pytest.raises(ZeroDivisionError):  # where the batch is asked for
        [*coming]
    coming = in_advance(lambda step: step, iter(range(10**9)), 3)
    next(coming)
    coming.close()
    assert threading.active_count() == threads


def test_ctrl_c_ends_a_run_at_once_and_it_goes_on(recipe, home):
    folder = begin(recipe, "stopped", "vision", "language", "phase1")
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--data=data/tiny",
        "--out=out/stopped",
        *SMALL,
    ]
    command += ["--phase=2", "--phase2_steps=100000"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup ignores it
    )
    while len(read_log(folder / "log.jsonl")) < 20:
        time.sleep(0.05)
    began = time.time()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and said.splitlines()[-1] == "interrupted"
    assert time.time() - began < 10 and "Traceback" not in said
    assert checkpoint.read(folder / "phase2.pt")["step"] > 0


def test_a_given_tower_is_used_as_it_is(recipe, home):
    run("--phase=vision", f"--vision_weights={recipe}/vision.pt", out="out/given")
    assert same(weights("out/given/vision.pt"), weights(recipe / "phase1.pt", "tower."))
    assert checkpoint.load("out/given/vision.pt").model.tower is not None


def test_a_tower_of_another_size_sees_the_frames_as_they_are(home):
    """A ViT made for 32 pixels on 16-pixel frames: P = 4, in the bins as in sampling."""
    torch.manual_seed(0)
    torch.save(vision.ViT(32, 8, 192, 1, 3).state_dict(), "vit32.pth")
    wide = [flag for flag in SMALL if "patch" not in flag and "vision_" not in flag[:9]]
    rest = ["--vision_steps=4", "--vision_batch=8", "--evaluate=False"]
    train.main(["--data=data/tiny", "--out=out/other", *wide, *rest, "--vision_weights=vit32.pth"])
    loaded = checkpoint.load("out/other/phase2.pt")
    dataset = data.Data("data/tiny")
    assert features.open_stored(dataset, "train", loaded.model).shape == (24, 4, 192)
    frames = dataset.open("train", "frames")[:3]
    assert inference.encode_frames(loaded, frames).shape == (3, 4, 192)
    Image.fromarray(frames[0]).save("frame0.png")
    embeds = inference.embed_pictures(loaded, inference.read_pictures(loaded, ["frame0.png"]))
    assert embeds[0].shape == (4, loaded.model.gpt.config.n_embd)
    assert inference.make_prompt(loaded, embeds, "") == [loaded.tokenizer.image] * 4


def test_two_towers_on_one_corpus_keep_to_their_own_features(recipe, home):
    """At once, they once trained on each other's: now each finds its own by its key."""
    before = {path.name for path in Path("data/tiny/features").glob("*.bin")}
    flags = [str(ROOT / "configs/toy.py"), "--data=data/tiny", *SMALL, "--evaluate=False"]
    command = [str(ROOT / "train.py"), *flags]
    commands = [[*command, f"--out=out/tower{seed}", f"--seed={seed}"] for seed in (11, 12)]
    env = {**os.environ, "PYTHONPATH": ""}
    for done in FORKS.run_all(commands, home, [env, env]):
        assert done.returncode == 0, done.stderr[-2000:]
    made = {path.name for path in Path("data/tiny/features").glob("*.bin")} - before
    assert len(made) == 4  # two towers, two splits
    for seed in (11, 12):
        again = f"out/again{seed}"
        run("--evaluate=False", f"--seed={seed}", out=again)
        assert same(weights(f"{again}/phase2.pt"), weights(f"out/tower{seed}/phase2.pt"))


# ---- the machine


def test_compiled_training_equals_eager(recipe, home, monkeypatch):
    """Captured, decomposed and partitioned as for Inductor, whose C++ takes a minute to build."""
    backend = {"backend": "aot_eager_decomp_partition"}
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **backend))
    folder = begin(recipe, "compiled", "phase1")
    run("--phase=2", "--compile=on", "--evaluate=False", out="out/compiled")
    assert furthest(weights(folder / "phase2.pt"), weights(recipe / "phase2.pt")) < 1e-4


def test_the_backends_are_chosen_by_name_and_said_once(home, capfd):
    few = ["--phase=language", "--language_steps=2", "--language_batch=2", "--block_size=24"]
    few += ["--eval_batches=1", "--n_layer=1"]
    pytest.importorskip("triton")
    run(*few, "--attention=triton", "--norm=triton", out="out/triton")
    run(*few, "--attention=reference", "--norm=reference", out="out/reference")
    run(*few, out="out/auto")
    said = capfd.readouterr().out
    for line in (
        "attention triton, norm triton",
        "attention reference, norm reference",
        "attention sdpa, norm torch",
    ):
        assert said.count(line) == 1
    assert furthest(weights("out/triton/language.pt"), weights("out/reference/language.pt")) < 1e-4


def test_the_learning_rate_climbs_and_falls():
    rates = [train.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[99] < 0.001
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert train.learning_rate(0, 1, 1.0) == 1.0


def test_the_published_sizes_are_what_the_configs_comments_say():
    """Counted on the meta device: the arithmetic in configs/phase0.py, words.py and phase1.py."""
    from model import GPT, GPTConfig, make_projector

    for files, vocabulary, expected in (
        (["phase0.py"], 6000, 7_962_880),
        (["phase0.py", "words.py"], 2353, 7_029_248),
    ):
        settings = config.load(train.Config, [str(ROOT / "configs" / name) for name in files])
        with torch.device("meta"):
            gpt = GPT(
                GPTConfig(
                    vocabulary,
                    settings.block_size,
                    settings.n_layer,
                    settings.n_head,
                    settings.n_embd,
                )
            )
            projector = make_projector("mlp2x_gelu", 2048, settings.n_embd)
        assert sum(p.numel() for p in gpt.parameters()) == expected
        assert sum(p.numel() for p in projector.parameters()) == 590_336
    settings = config.load(train.Config, [str(ROOT / "configs/ego/phase0.py")])
    later = config.load(train.Config, [str(ROOT / "configs/ego/phase1.py")])
    sizes = (getattr(settings, name) for name in ("block_size", "n_layer", "n_head", "n_embd"))
    with torch.device("meta"):
        gpt = GPT(GPTConfig(52000, *sizes))
        projector = make_projector("mlp2x_gelu", settings.vision_width, settings.n_embd)
    assert sum(p.numel() for p in gpt.parameters()) == 124_889_856
    assert sum(p.numel() for p in projector.parameters()) == 1_181_184
    assert (settings.language_epochs, later.phase1_epochs) == (30, 5)
    transformers = pytest.importorskip("transformers")
    for vocabulary, context, expected in ((6000, 2048, 8_378_880), (2350, 1024, 7_182_336)):
        with torch.device("meta"):
            theirs = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(
                    vocab_size=vocabulary,
                    n_positions=context,
                    n_embd=256,
                    n_layer=8,
                    n_head=32,
                    n_inner=1024,
                )
            )
        assert theirs.num_parameters() == expected


def test_every_row_of_the_table_names_options_that_are_there():
    options = set(train.Config.__dataclass_fields__)
    for name, row in train.PHASES.items():
        assert set(row.own_options(name)) <= options, name
        assert set(row.starts_from) <= set(train.PHASES)
    assert phases.EVERY_PHASE


# torchrun's part of it: a store that lives on. In a process of its own, because one that is forked
# after it has held a store dies of it.
AGENT = """
import os, time, traceback
import torch, torch.distributed as dist
import config, train
from training.processes import find_processes

agent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(agent.port)}
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
"""

STARTS_OVER = """
os.environ["WORLD_SIZE"] = "2"

def join(rank):
    os.environ["RANK"] = str(rank)
    time.sleep(0.3 * (rank == 0))  # the other one meets what the dead have left
    find_processes(train.Config(device="cpu", patience=0.2))
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    assert total == 1

def fork(rank):
    child = os.fork()
    if not child:
        try:
            join(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # and leaves the store as it is
    return child

for _ in range(8):
    children = [fork(0), fork(1)]
    assert not any(os.waitpid(child, 0)[1] for child in children)
"""

ALONE = """
os.environ["WORLD_SIZE"] = "3"
for rank, port in ((0, agent.port), (1, agent.port), (1, 1)):
    os.environ |= {"RANK": str(rank), "MASTER_PORT": str(port)}
    try:
        find_processes(train.Config(device="cpu", patience=0.01))
    except config.UserError as error:
        print(error)
"""


def with_agent(script):
    """What a script prints that has torchrun's store; it must succeed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", AGENT + script]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_processes_started_again_do_not_look_for_the_dead():
    """torchrun keeps its store over a restart, and in it where the dead ones listened."""
    with_agent(STARTS_OVER)


def test_processes_that_do_not_come_are_told_in_one_line():
    lines = with_agent(ALONE).splitlines()
    assert len(lines) == 3
    for line, rank in zip(lines, "011"):
        assert line.startswith(f"rank {rank}: 3 processes did not come together within 0.01 min")
    assert lines[0].endswith("ranks [1, 2] did not come")


# ---------------------------------------------------------------------------------------------
# The best weights, and speech that is replayed

OVERFIT = [*SMALL, "--data=data/tiny", "--phase=language", "--language_steps=24",
           "--language_lr=0.03", "--eval_every=4", "--save_every=6",
           "--eval_batches=1000"]  # fmt: skip


def losses_of(out):
    lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


def test_the_best_weights_are_kept_if_asked_for(home, capfd, monkeypatch):
    """Their loss is the lowest that was logged, also if the run was interrupted on the way. The
    rate is far too high from step 14 on."""
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1.0 if step < 14 else 100.0)
    train.main([*OVERFIT, "--out=out/best", "--keep=best"])
    logged = losses_of("out/best")
    saved = checkpoint.read("out/best/language.pt")
    step = min(logged, key=logged.get)
    assert step < 24 and saved["best"] == {"step": step, "val_loss": logged[step]}
    assert f"language: kept step {step}" in capfd.readouterr().out
    assert not Path("out/best/language.best.pt").exists() and saved["done"]
    loaded = checkpoint.load("out/best/language.pt")
    found = evaluation.losses(loaded, data.Data("data/tiny"))["val_loss"]
    assert found == pytest.approx(logged[step], abs=1e-5)

    real = train.take_step

    def stop_at_20(run, step, batches):
        if step == 20:
            raise KeyboardInterrupt
        return real(run, step, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "take_step", stop_at_20)
        train.main([*OVERFIT, "--out=out/again", "--keep=best"])
    train.main([*OVERFIT, "--out=out/again", "--keep=best"])
    again = checkpoint.read("out/again/language.pt")
    assert again["best"] == saved["best"] and again["digest"] == saved["digest"]

    train.main([*OVERFIT, "--out=out/last"])
    last = checkpoint.read("out/last/language.pt")
    assert "best" not in last and last["digest"] != saved["digest"]
    with pytest.raises(UserError, match="was made with keep=last"):
        train.main([*OVERFIT, "--out=out/last", "--keep=best"])


def test_replayed_speech_is_in_the_training_samples_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = ["image,caption"]
    for number in range(20):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,a red thing {number} .")
    Path("pairs.csv").write_text("\n".join(rows))
    Path("speech.txt").write_text("\n".join(f"say line {number} again ." for number in range(200)))
    flags = ["pairs", "--csv=pairs.csv", "--images=pictures", "--text=speech.txt", "--size=16"]
    command.main([*flags, "--vocab_size=300", "--replay=0.5", "--name=replay"])
    made = data.Data("data/replay")
    kinds = {split: made.open(split, "samples")[:, 3].tolist() for split in ("train", "val")}
    assert kinds == {"train": [1] * 18 + [0] * 9, "val": [1] * 2}
    tokens, samples = made.open("train", "tokens"), made.open("train", "samples").astype(int)
    mask = made.open("train", "loss_mask")
    said = []
    for first, length, *_ in samples[18:].tolist():
        own = tokens[first : first + length].tolist()
        assert own[0] == own[-1] == made.tokenizer.eos
        assert mask[first : first + length].tolist() == [0] + [1] * (length - 1)
        said.append(made.tokenizer.decode(own[1:-1]))
    text = made.tokenizer.decode(made.open("train", "text").tolist())
    assert len(set(said)) == 9 and all(line in text for line in said)
