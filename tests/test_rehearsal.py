"""Mistakes are found before the first step, and what a run takes is known before it is started."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, one_line, shell

import kernels
import train
from config import UserError
from training import advice, measure, planning, published, rehearsal, resume, run_card
from training.processes import Processes
from training.progress import Clock

CPU = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def no_step(monkeypatch):
    """Any step of training fails the test."""

    def fail(*arguments):
        raise AssertionError("a phase was trained before the mistake was found")

    monkeypatch.setattr(train, "train_phase", fail)


def flags_of(text):
    return ["--data=data/tiny", "--out=out/mistakes", *SMALL, *text.split()]


MISTAKES = {
    # those of a first reading
    "--projector mlp": "--projector: no projector 'mlp': one of linear, mlp",
    "--block_size 6": "over block_size 6: raise",
    "--phase2_learn gtp": "learn 'gtp': no such part; one of gpt",
    "--image_pool 3": "image_pool 3: 2 x 2 patches do not divide",
    "--attention triton --device cpu": "backend triton: it needs an NVIDIA GPU",
    "--select_layer -9": "select_layer -9: a ViT of 2 blocks takes -1 to -2",
    # twenty more
    "--norm triton --device cpu": "backend triton",
    "--vision_heads 3": "neither division may leave a remainder",
    "--patch 5": "neither division may leave a remainder",
    "--n_head 3": "the head width must be a whole, even number",
    "--n_kv_head 3 --n_head 4": "n_head 4 is no multiple of n_kv_head 3",
    "--n_embd 15": "the head width must be a whole, even number",
    "--phase1_batch 7 --grad_accum 2": "phase1_batch 7 does not divide",
    "--phase2_batch 7 --grad_accum 2": "phase2_batch 7 does not divide",
    "--phase1_learn projector=fast": "learn 'projector=fast': want a part, or part=rate",
    "--phase2_learn gpt gpt.layers.0": "it is part of another that is trained already",
    "--phase2_learn gpt.norm --lora_rank 2": "with lora_rank nothing of it is trained",
    "--phase2_learn tower.blocks.7": "no such part",
    "--projector identity --n_embd 32": "an identity projector from width 16 to 32",
    "--projector mlp0x_gelu": "no projector 'mlp0x_gelu'",
    "--vision_tower convnext": "give --conv_stages",
    "--vision_tower resnext": "a ResNeXt is not trained here",
    "--conv_stages 1 1": "conv_stages are a convnext's",
    "--extra_stage 1": "only a ConvNeXt has stages",
    "--vision_weights none.pth": "no none.pth",
    "--language_weights none": "none/config.json",
    "--phase 3": "finish it first with --phase 2",
    "--phase 2 --phase2_steps 0": "phase2_steps is 0",
    "--init none": "--init none: there is none",
    "--image_attention full --phase 1 --data data/none": "no data/none/meta.json",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_found_before_the_first_step(home, no_step, monkeypatch, flags):
    monkeypatch.setattr(kernels, "lacking", lambda device: "it needs an NVIDIA GPU")
    with pytest.raises(UserError) as error:
        train.main(flags_of(flags))
    assert MISTAKES[flags] in str(error.value) and one_line(error)
    assert not list(Path("out/mistakes").glob("*.pt"))


def test_a_mistake_takes_seconds_even_where_no_toy_world_is_drawn(tmp_path):
    """Cold, without PyTorch's compiler, and nothing is drawn."""
    code = (
        "import sys, train\n"
        "try:\n    train.main(['--projector', 'mlp'])\n"
        "except train.UserError as error:\n    print(error, 'torch._dynamo' in sys.modules)"
    )
    done = shell("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stdout.endswith("identity False\n"), done.stdout
    assert not (tmp_path / "data").exists()


def test_a_rehearsal_has_the_shapes_that_training_has(recipe, home):
    settings = train.load_settings(flags_of(""))
    names = ("vision", "language", "phase1", "phase2")
    from data import Data

    dataset = Data("data/tiny")
    for one in rehearsal.rehearse(settings, names, train.PHASES, dataset, CPU):
        saved = torch.load(recipe / f"{one.name}.pt", weights_only=True)
        found = {name: weight.shape for name, weight in one.model.result().state_dict().items()}
        assert found == {name: weight.shape for name, weight in saved["weights"].items()}
        assert all(parameter.is_meta for parameter in one.model.parameters())
        trained = {name for parameters, _ in one.groups for name in parameters}
        assert trained == {n for n, p in one.model.named_parameters() if p.requires_grad}


def test_a_changed_option_after_a_finished_run_prints_the_command_that_works(recipe, home):
    """It names a folder of its own, and takes the tower and the GPT from the finished run."""
    argv = ["--data=data/tiny", "--out=out/full", *SMALL]
    with pytest.raises(UserError) as error:
        train.main([*argv, "--projector=linear"])
    command = shlex.split(str(error.value).split("write to another folder: ")[1])
    assert command[:2] == ["python", "train.py"]
    settings = train.load_settings(command[2:])
    assert (settings.out, settings.init) == ("out/full_linear", "out/full")
    from data import Data

    names = resume.choose_phases(settings, Data("data/tiny"), train.PHASES)
    assert names == ("phase1", "phase2")
    assert len(rehearsal.rehearse(settings, names, train.PHASES, Data("data/tiny"), CPU)) == 2


# ---------------------------------------------------------------------------------------------
# Epochs


def steps_of(home, *flags):
    from data import Data

    settings = train.load_settings(flags_of(" ".join(flags)))
    names = ("vision", "language", "phase1", "phase2")
    found = rehearsal.rehearse(settings, names, train.PHASES, Data("data/tiny"), CPU)
    return {one.name: (one.steps, one.batches[0].rows) for one in found}, settings


def test_epochs_are_passes_over_the_rows(home):
    found, settings = steps_of(home, "--phase2_epochs=2.5", "--vision_epochs=3")
    steps, rows = found["phase2"]
    assert steps == round(2.5 * rows / 8) == settings.phase2_steps and found["phase1"][0] == 4
    assert found["vision"][0] == round(3 * found["vision"][1] / 8)


def test_of_steps_and_epochs_the_later_one_counts(home, tmp_path):
    file = tmp_path / "a.py"
    file.write_text("phase2_epochs = 5\nphase1_steps = 7\n")
    load = lambda *flags: train.load_settings([str(file), *flags])
    assert load("--phase2_steps=3").phase2_epochs == 0 and load().phase2_epochs == 5
    settings = load("--phase1_epochs=2")
    assert settings.phase1_steps == train.Config().phase1_steps and settings.phase1_epochs == 2


def test_many_passes_are_warned_of(home, capfd, monkeypatch):
    monkeypatch.setattr(train, "train_phase", lambda *arguments: None)
    train.main([*flags_of("--evaluate=False"), "--phase2_epochs=60"])
    shown = "".join(capfd.readouterr())
    assert "warning: phase2 reads its data 60 times" in shown


# ---------------------------------------------------------------------------------------------
# Counting


def one_of(name, *flags):
    """The Rehearsal of a phase on the toy world's stand-in."""
    settings = train.load_settings(["--data=data/toy", "--out=out/none", *flags])
    missing = planning.Missing()
    found, _ = planning.rehearse_all(settings, train.PHASES, train.load_settings, CPU, missing)
    return next(one for one in found if one.name == name)


def test_flop_of_the_gpt_are_those_of_the_formula(tmp_path, monkeypatch):
    """2 for each weight and token forward, 4 backward; attention's two products of T x T x C
    forward and five backward."""
    monkeypatch.chdir(tmp_path)
    one = one_of("language")
    gpt, B, T = one.model.gpt.config, 16, 128
    C, H, V, L = gpt.n_embd, gpt.n_hidden, gpt.vocab_size, gpt.n_layer
    weights = L * (4 * C * C + 3 * C * H) + V * C
    attention = L * 2 * B * T * T * C
    expected = 6 * B * T * weights + (2 + 5) * attention
    assert abs(planning.make_plan(one).flop / expected - 1) < 0.01
    assert 0.5 < one.work / one.steps / expected < 2  # the rough one, of the time left


def test_the_most_that_is_alive_is_counted_to_the_byte():
    with planning.counting() as (counter, alive):
        x = torch.ones(100, 100)  # 40,000 bytes, before
        with alive, counter:
            a = x @ x  # + 40,000
            b = a + 1  # + 40,000
            view = b[:10]  # nothing
            del a  # - 40,000
            c = torch.cat([b, b])  # + 80,000: 120,000 alive, the most
            del b, view, c
            x + 1
    assert alive.most == 120_000 and counter.get_total_flops() == 2 * 100**3


def test_recomputing_needs_less_memory_and_more_flop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, less = (planning.make_plan(one_of("language", *f)) for f in ([], ["--recompute"]))
    # not by a fixed share: cycles of references live until Python collects them
    assert less.activations < 0.95 * plain.activations and less.flop > plain.flop
    half = planning.make_plan(one_of("language", "--grad_accum=2"))
    assert half.activations < 0.7 * plain.activations
    assert abs(half.flop / plain.flop - 1) < 0.01


@pytest.mark.parametrize(
    "files, parts",
    [  # published counts; ours are explained in the configs' comments
        (["phase1.py"], {"tower": 22_979_904, "gpt": 7_962_880, "projector": 590_336}),
        # DINOv2's ViT-B/14 without the mask token, which only its training has
        (
            ["ego/phase1.py"],
            {"tower": 86_580_480 - 768, "gpt": 124_889_856, "projector": 1_181_184},
        ),
        # CLIP without the norm that only its class token has; Vicuna with 64 more tokens
        (
            ["llava15_stage1.py"],
            {
                "tower": 303_507_456 - 2048,
                "gpt": 6_738_415_616 + 2 * 64 * 4096,
                "projector": 20_979_712,
            },
        ),
        (["llava_next.py"], {"gpt": 8_030_261_248 + 2 * 64 * 4096}),
        # ConvNeXt-L's 196,230,336 without the norm of its head, and the fifth stage
        (["v2_phase1.py"], {"tower": 303_301_632}),
    ],
)
def test_parameters_are_the_published_ones(tmp_path, monkeypatch, files, parts):
    monkeypatch.chdir(tmp_path)
    settings = train.load_settings([str(ROOT / "configs" / name) for name in files])
    missing = planning.Missing()
    found, _ = planning.rehearse_all(settings, train.PHASES, train.load_settings, CPU, missing)
    counts = planning.count_parts(found[-1])
    assert {name: counts[name][1] for name in parts} == parts
    assert missing.names


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("**/*.py")), ids=lambda path: path.name
)
def test_every_config_can_be_planned_without_its_data(tmp_path, monkeypatch, path):
    """Rehearsed with what it starts from; --plan then counts one step of each phase."""
    if path.name == "words.py":
        return  # it is given after another config
    monkeypatch.chdir(tmp_path)
    settings = train.load_settings([str(path)])
    missing = planning.Missing()
    load = train.load_settings
    if path.name == "own.py":
        with pytest.raises(UserError, match="no data/video/meta.json"):
            planning.rehearse_all(settings, train.PHASES, load, CPU, missing)
        return
    found, _ = planning.rehearse_all(settings, train.PHASES, load, CPU, missing)
    assert found and all(one.steps > 0 for one in found) and missing.names


def test_stand_ins_are_as_the_toy_worlds_are():
    """As the sources draw them; the shipped model was trained on the first."""
    shipped = torch.load(ROOT / "assets" / "toy.pt", weights_only=True)
    toy = published.StandIn("data/toy")
    assert toy.meta["vocab_size"] == shipped["parts"]["gpt"]["vocab_size"]
    assert toy.image_format.size == shipped["images"]["size"]
    assert toy.count("train", "frames") == 12000 and toy.count("train", "samples") == 24001
    assert set(published.TOY_WORLDS) <= set(published.CORPORA)
    for name in published.CORPORA:
        part = published.StandIn(f"data/{name}")
        assert all(counts.get("frames", 1) for counts in part.meta["splits"].values())


# ---------------------------------------------------------------------------------------------
# Memory


def test_too_much_memory_is_refused_with_the_option_that_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = one_of("language")
    plan = planning.make_plan(one)
    monkeypatch.setattr(planning, "machine_memory", lambda device: plan.memory * 0.7)
    with pytest.raises(UserError, match="language would need") as error:
        planning.check_memory([one])
    advised = re.search(r"--grad_accum (\d+)", str(error.value))[0]
    assert one_line(error)
    planning.check_memory([one_of("language", *advised.split())])  # it helps
    monkeypatch.setattr(planning, "machine_memory", lambda device: plan.memory * 1.2)
    planning.check_memory([one])


def test_a_small_phase_is_not_counted(tmp_path, monkeypatch):
    """Counting takes seconds; the cheap bound is above what is counted."""
    monkeypatch.chdir(tmp_path)
    for name in ("vision", "language", "phase1", "phase2"):
        one = one_of(name)
        assert planning.memory_bound(one) > planning.make_plan(one).memory
    monkeypatch.setattr(planning, "make_plan", None)
    planning.check_memory([one])


# ---------------------------------------------------------------------------------------------
# From the command line


def test_the_plan_of_a_published_system_without_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--plan --gpu h100 --gpus 16 --shard on --mfu 0.4".split()
    train.main([str(ROOT / "configs/llava_next.py"), *flags])
    shown = capsys.readouterr().out
    assert "data/llava_next" in shown and "(as llava_next_stage1.py trains)" in shown
    assert "sharded over 16 processes: phase3" in shown and "more than the 80 GB" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("| phase3"))
    assert "23,750" in row and re.search(r"\d h ", row)
    gigabytes = float(re.search(r"\| (\d+) GB +\|", row)[1])  # of one process
    assert 8.4 + 3.4 < gigabytes < 80
    assert not list(tmp_path.iterdir())


def test_the_plan_of_small_models_is_measured(home, capsys, monkeypatch):
    """In this process: that of its own is measured by benchmarks/plan.py."""
    monkeypatch.setattr(measure, "SECONDS", 0)
    monkeypatch.setattr(measure, "in_a_process", lambda function, *rest: function(*rest))
    train.main(flags_of("--plan"))
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows) == 5 and all(re.search(r"\d:\d\d min", row) for row in rows[1:])
    assert "measured by real steps" in shown and not Path("out/mistakes/vision.pt").exists()


def test_torchrun_shows_one_line_from_one_process(tmp_path):
    """A user's mistake, without torchrun's traceback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=29741", str(ROOT / "train.py"), str(ROOT / "configs/phase1.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("error: no data/saycam/meta.json")
    assert "agreement with Databrary" in lines[0] and "configs/toy.py" in lines[0]
    assert "Traceback" not in done.stderr


def test_the_run_card_tells_command_machine_and_versions(recipe):
    card = json.loads((recipe / "run.json").read_text())[0]
    assert card["command"].startswith("python train.py --data=data/tiny")
    assert run_card.read(recipe).keys() >= {"command", "seed", "data", "machine", "versions"}
    assert torch.__version__ in card["versions"] and "thread" in card["machine"]
    assert run_card.read(recipe / "none") == {}


def test_the_time_left_follows_the_arithmetic():
    """Two phases of equal work, the first half done in 10 s: 10 + 20 s are left."""
    clock = Clock({"a": 100.0, "b": 100.0})
    assert clock.left("a", 0.5, 10.0) == pytest.approx(30.0)
    clock.finish("a", 20.0)
    assert clock.left("b", 0.25, 5.0) == pytest.approx(15.0)


@pytest.mark.parametrize(
    "argv, name, expected",
    [
        ([], "phase2", "python sample.py YOUR_PICTURE.jpg --checkpoint out/toy/phase2.pt"),
        (["--phase=1", "--data=data/x"], "phase1", "python train.py --phase=2 --data=data/x"),
        (["CONFIGS/phase0.py"], "language", "python train.py CONFIGS/phase1.py"),
        (
            ["CONFIGS/toy.py", "--phase", "language", "--out", "out/words"],
            "language",
            "python train.py CONFIGS/toy.py --phase vision --out out/words",
        ),
        (["CONFIGS/toy.py", "--phase", "2"], "phase2", "python train.py CONFIGS/toy.py --phase 3"),
    ],
)
def test_at_the_end_the_next_commands_are_printed(argv, name, expected):
    here = str(ROOT / "configs")
    settings = train.load_settings([word.replace("CONFIGS", here) for word in argv])
    last = Path(settings.out) / f"{name}.pt"
    shown = advice.next_commands(settings, name, last, train.PHASES)
    assert shown.startswith("next: ") and expected.replace("CONFIGS", here) in shown


def test_the_memory_of_this_machine_is_known():
    whole = planning.machine_memory(torch.device("cpu"))
    assert 1e8 < whole < 1e14


def test_every_gpu_has_a_peak_and_memory():
    assert all(peak > 10 and memory >= 16 for peak, memory in planning.GPUS.values())


def test_an_advised_command_has_each_option_once(home, recipe):
    settings = train.load_settings(flags_of("--out out/full --projector=linear"))
    said = advice.elsewhere(settings, train.PHASES["phase1"], "linear")
    assert said.count("--out") == 1 and said.endswith("--out out/full_linear --init out/full")
