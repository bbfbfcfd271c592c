"""The loop: what learns in each phase, resuming to the bit, ranks, and refusals."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import configs
import data
import kernels
import sample
import train
import vision
from conftest import ROOT, SMALL
from configs import ConfigError
from data import DataError


def run(*args, out="out/full"):
    train.main([str(ROOT / "configs/toy.py"), "--data=data/tiny", f"--out={out}", *SMALL, *args])


def weights(path, prefix=""):
    checkpoint = torch.load(path, weights_only=True)
    return {
        k: v
        for k, v in checkpoint.get("dino", checkpoint.get("model")).items()
        if k.startswith(prefix)
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_main_job_leaves_all_it_promises(recipe):
    assert {p.name for p in recipe.iterdir()} == {
        "vision.pt",
        "phase0.pt",
        "phase1.pt",
        "phase2.pt",
        "log.jsonl",
        "results.json",
        "report.html",
        "captions.png",
    }
    log = [json.loads(line) for line in (recipe / "log.jsonl").read_text().splitlines()]
    for phase in train.PHASES:
        assert [e["step"] for e in log if e["phase"] == phase and "loss" in e] == [0, 1, 2, 3]
    assert "not SAYCam" in (recipe / "report.html").read_text()
    assert json.loads((recipe / "results.json").read_text())["source"] == "toy"


def test_exactly_the_phases_own_parameters_learn(recipe, home, monkeypatch):
    """The optimizer of each phase holds its parameters; the others keep every bit."""
    learnt = {}
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda groups, **how: (
            learnt.update({phase: [p for g in groups for p in g["params"]]}) or adamw(groups, **how)
        ),
    )
    expected = {"phase0": "gpt.", "phase1": "projector.", "phase2": ("gpt.", "projector.")}
    built = {}
    build = train.build_model
    monkeypatch.setattr(
        train, "build_model", lambda c, name, *rest: built.setdefault(name, build(c, name, *rest))
    )
    for number in "012":
        phase = f"phase{number}"
        if number != "0":
            for name in ("vision", "phase0", "phase1"):
                (home / "out/sets").mkdir(exist_ok=True)
                if not (home / f"out/sets/{name}.pt").exists():
                    os.link(recipe / f"{name}.pt", home / f"out/sets/{name}.pt")
            (home / f"out/sets/{phase}.pt").unlink(missing_ok=True)
        run("--phase", number, "--tower=language", out="out/sets")
        model = built[phase][0]
        inside = {id(p) for p in learnt[phase]}
        names = {n for n, p in model.named_parameters() if id(p) in inside}
        assert names == {n for n, _ in model.named_parameters() if n.startswith(expected[phase])}
        assert len(inside) == len(learnt[phase]) == len(names)


def test_what_is_frozen_keeps_every_bit(recipe):
    assert same(weights(recipe / "phase0.pt", "gpt."), weights(recipe / "phase1.pt", "gpt."))
    assert not same(weights(recipe / "phase1.pt", "gpt."), weights(recipe / "phase2.pt", "gpt."))
    assert not same(weights(recipe / "phase1.pt", "proj"), weights(recipe / "phase2.pt", "proj"))
    towers = [
        torch.load(recipe / f"{p}.pt", weights_only=True)["tower"]
        for p in ("vision", "phase1", "phase2")
    ]
    assert same(towers[0], towers[1]) and same(towers[0], towers[2])


class Killed(Exception):
    pass


@pytest.mark.parametrize("phase", ["vision", "phase0", "phase2"])
def test_a_killed_run_goes_on_to_the_same_bits(recipe, home, monkeypatch, phase):
    """Stopped in step 3, after a save at 2, with dropout on; the log has each step once."""
    out = home / "out" / f"kill_{phase}"
    out.mkdir(parents=True)
    before = train.PHASES[phase][2]
    if before:
        for name in (before, "vision"):
            os.link(recipe / f"{name}.pt", out / f"{name}.pt")
    args = [
        "--phase",
        phase[-1] if before else "0",
        "--dropout=0.2",
        f"--tower={'vision' if phase == 'vision' else 'language'}",
    ]
    step, count = torch.optim.AdamW.step, [0]

    def dying(self, *rest):
        count[0] += 1
        if count[0] == 4:
            raise Killed
        return step(self, *rest)

    if before:  # phase 1's checkpoint was made without dropout, and carries its config
        args[2] = "--dropout=0.0"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, "step", dying)
        run(*args, out=f"out/kill_{phase}")
    assert torch.load(out / f"{phase}.pt", weights_only=True)["step"] == 2
    run(*args, out=f"out/kill_{phase}")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "loss" in e] == [0, 1, 2, 3]
    resumed = weights(out / f"{phase}.pt")
    (out / f"{phase}.pt").unlink()
    run(*args, out=f"out/kill_{phase}")
    assert same(resumed, weights(out / f"{phase}.pt"))


def test_dropout_learns_and_evaluation_does_not_disturb_training(home):
    run("--phase=0", "--tower=language", "--dropout=0.3", out="out/often")
    run("--phase=0", "--tower=language", "--dropout=0.3", "--eval_every=100", out="out/seldom")
    assert same(weights("out/often/phase0.pt"), weights("out/seldom/phase0.pt"))
    run("--phase=0", "--tower=language", out="out/without")
    assert not same(weights("out/often/phase0.pt"), weights("out/without/phase0.pt"))


def test_pieces_of_a_batch_add_up(recipe, home):
    for name in ("vision", "phase0"):
        (home / "out/pieces").mkdir(exist_ok=True)
        os.link(recipe / f"{name}.pt", home / f"out/pieces/{name}.pt")
    run("--phase=1", "--grad_accum=4", out="out/pieces")
    a, b = weights("out/pieces/phase1.pt"), weights(recipe / "phase1.pt")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_two_processes_train_the_model_of_one(recipe, home):
    """torchrun on gloo, the recipe's four phases: the same weights within float tolerance."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29513",
            str(ROOT / "train.py"),
            "--data=data/tiny",
            "--out=out/two",
            "--evaluate=False",
            *SMALL,
        ],
        check=True,
        env=env,
        cwd=home,
    )
    for phase in train.PHASES:
        a, b = weights(home / f"out/two/{phase}.pt"), weights(recipe / f"{phase}.pt")
        assert a.keys() == b.keys()
        assert max((a[k].float() - b[k].float()).abs().max() for k in a) < 2e-4, phase


def test_finished_phases_are_left_alone(recipe, home, capfd):
    before = (recipe / "phase1.pt").stat().st_mtime_ns
    run("--phase=1")
    assert (recipe / "phase1.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "args, out, message",
    [
        (["--phase=1"], "out/none", "does not exist: finish it first with --phase 0"),
        (
            ["--phase=2", "--phase2_lr=0.5"],
            "out/full",
            "was made with phase2_lr=0.002, now it is 0.5",
        ),
        (["--phase=0", "--dtype=fp16"], "out/none", "float32 or bfloat16"),
        (["--phase=0", "--vision_heads=3"], "out/none", "neither division"),
        (["--phase=3"], "out/none", "0, 1, 2 or all"),
        (["--tower=nose"], "out/none", "vision, language or both"),
        (
            ["--phase=0", "--tower=language", "--phase0_batch=9", "--grad_accum=2"],
            "out/none",
            "does not divide",
        ),
        (["--phase=0", "--vision_weights=nothing.pt"], "out/none", "no nothing.pt: fetch that"),
        (["--phase=0", "--vision_weights=data/tiny/meta.json"], "out/none", "meta.json"),
        (
            ["--phase=0", "--attention=triton", "--tower=language"],
            "out/none",
            "backend triton: it needs an NVIDIA GPU",
        ),
        (
            ["--phase=0", "--norm=flash", "--tower=language"],
            "out/none",
            "no backend 'flash': choose",
        ),
        (
            ["--phase=0", "--tower=language", "--data=data/nowhere"],
            "out/none",
            "no data/nowhere/meta",
        ),
    ],
)
def test_mistakes_are_one_clear_line(recipe, home, monkeypatch, args, out, message):
    monkeypatch.setattr(kernels, "INTERPRET", False)
    with pytest.raises((DataError, ConfigError, ValueError), match=message) as error:
        run(*args, out=out)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run(home):
    with pytest.raises(DataError, match="lower phase0_lr"):
        run("--phase=0", "--tower=language", "--phase0_lr=1e30", "--phase0_steps=40", out="out/nan")


def test_a_given_eye_is_used_as_it_is(recipe, home):
    tower = torch.load(recipe / "vision.pt", weights_only=True)["tower"]
    run("--phase=0", "--tower=vision", f"--vision_weights={recipe}/vision.pt", out="out/given")
    assert same(torch.load("out/given/vision.pt", weights_only=True)["tower"], tower)
    assert sample.load("out/given/vision.pt").tower is not None


def test_an_eye_of_another_size_sees_the_frames_as_they_are(home):
    """A ViT made for 32 pixels on 16-pixel frames: P = 4, in the bins as in sampling."""
    torch.manual_seed(0)
    torch.save(vision.ViT(32, 8, 64, 1, 1).state_dict(), "vit32.pt")
    shutil.copytree("data/tiny", "data/other")
    run("--data=data/other", "--vision_weights=vit32.pt", "--vision_heads=1", out="out/other")
    assert data.Data("data/other").open("train", "features").shape == (24, 4, 64)
    parts = sample.load("out/other/phase2.pt")
    frames = data.Data("data/other").open("train", "frames")[:3]
    assert sample.see(parts, frames).shape == (3, 4, 64) and parts.meta["S"] == 16
    Image.fromarray(frames[0]).save("frame0.png")
    assert sample.begin(parts, ["frame0.png"], "")[1].shape == (1, 4, 64)


def test_compiled_training_equals_eager(recipe, home):
    run("--phase=0", "--tower=language", "--compile=on", out="out/compiled")
    a, b = weights("out/compiled/phase0.pt"), weights(recipe / "phase0.pt")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-4


def test_the_backends_are_chosen_by_name_and_said_once(home, capfd):
    few = ["--phase=0", "--tower=language", "--phase0_steps=2", "--phase0_batch=2"]
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
    a, b = weights("out/triton/phase0.pt"), weights("out/reference/phase0.pt")
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in b)


def test_the_published_sizes_are_what_the_configs_comments_say():
    """Counted on the meta device: the arithmetic in configs/phase0.py, words.py and phase1.py."""
    for files, vocabulary, expected in (
        (["phase0.py"], 6000, 7_962_880),
        (["phase0.py", "words.py"], 2353, 7_029_248),
    ):
        config = configs.load(train.Config, [str(ROOT / "configs" / name) for name in files])
        with torch.device("meta"):
            gpt = train.GPT(
                train.GPTConfig(
                    vocabulary,
                    config.block_size,
                    config.n_layer,
                    config.n_head,
                    config.n_kv_head,
                    config.n_embd,
                )
            )
            projector = train.Projector("mlp2x_gelu", 2048, config.n_embd)
        assert sum(p.numel() for p in gpt.parameters()) == expected
        assert sum(p.numel() for p in projector.parameters()) == 590_336
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
