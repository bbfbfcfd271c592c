"""Muon: what its step is, and what it is for."""

import pytest
import torch
from conftest import SMALL, one_line

import checkpoint
import data
import train
from config import UserError
from training import models, optimizer, planning
from training.processes import Processes

MUON = train.Config(optimizer="muon", weight_decay=0.3, muon_rate=2.0)


@pytest.mark.parametrize("shape", [(24, 24), (96, 32), (16, 80)])
def test_a_step_is_along_the_polar_factor(shape):
    """In fp64, by the singular vectors of the second step's momentum, with Nesterov: all singular
    values of the step are near 1 (Muon's iteration ends between 0.6 and 1.25), times AdamW's
    size."""
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(shape))
    (muon,) = optimizer.make_optimizers(MUON, [({"w": matrix}, 0.01)], torch.device("cpu"))
    momentum = torch.zeros(shape, dtype=torch.float64)
    for _ in range(2):
        before, matrix.grad = matrix.detach().double(), torch.randn(shape)
        muon.step()
        momentum = 0.95 * momentum + 0.05 * matrix.grad.double()
    ahead = 0.95 * momentum + 0.05 * matrix.grad.double()
    U, _, V = torch.linalg.svd(ahead, full_matrices=False)
    rate = 0.01 * MUON.muon_rate
    moved = before * (1 - rate * MUON.weight_decay) - matrix.detach().double()
    values = U.T @ moved @ V.T / (rate * 0.2 * max(shape) ** 0.5)
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.25
    off = values - values.diagonal().diag()
    assert off.abs().max() < 0.05  # bf16


def split(model, parts):
    """(names of what Muon trains, names of what AdamW trains)."""
    groups = optimizer.set_trainable(model, parts, 1e-3)
    muon, adamw = optimizer.make_optimizers(MUON, groups, torch.device("cpu"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        {names[p] for group in one.param_groups for p in group["params"]} for one in (muon, adamw)
    ]
    assert not found[0] & found[1]
    assert found[0] | found[1] == {n for n, p in model.named_parameters() if p.requires_grad}
    for group in muon.param_groups:
        assert group["highest_lr"] == 2e-3 and group["weight_decay"] == 0.3
    for group in adamw.param_groups:
        decayed = all(p.ndim >= 2 for p in group["params"])
        assert group["weight_decay"] == (0.3 if decayed else 0.0) and group["highest_lr"] == 1e-3
    return found


def test_tables_and_vectors_are_split(recipe, home):
    model = checkpoint.load("out/full/phase2.pt").model
    matrices, others = split(model, ["projector", "gpt", "tower"])
    blocks = [f"gpt.layers.{i}." for i in range(2)]
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    wanted = {f"{block}{part}.weight" for block in blocks for part in parts}
    wanted |= {"projector.0.weight", "projector.2.weight"}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    wanted |= {f"tower.blocks.{i}.{part}.weight" for i in range(2) for part in parts}
    assert matrices == wanted
    tables = {"gpt.embed_tokens.weight", "tower.patch_embed.proj.weight", "tower.pos_embed"}
    assert tables <= others and "gpt.norm.weight" in others


def test_the_prototypes_are_a_table(home):
    settings = train.load_settings([*SMALL, "--data=data/tiny"])
    dino = models.new_dino(settings, data.Data("data/tiny"), {})
    matrices, others = split(dino, ["student"])
    assert "student.head.last.weight" in others
    assert {f"student.head.mlp.{i}.weight" for i in (0, 2, 4)} <= matrices


def test_an_older_pytorch_says_so_at_once(home, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="--optimizer muon needs PyTorch 2.9") as error:
        train.main(["--data=data/tiny", "--out=out/old", *SMALL, "--optimizer=muon"])
    assert one_line(error)


def test_another_optimizer_is_another_run(recipe, home):
    with pytest.raises(UserError, match="was made with optimizer=adamw, now it is muon"):
        train.main(["--data=data/tiny", "--out=out/full", *SMALL, "--optimizer=muon"])


def test_a_plan_counts_one_number_for_a_matrix(home):
    plans = {}
    for name in ("adamw", "muon"):
        flags = ["--data=data/tiny", "--out=out/none", *SMALL, f"--optimizer={name}"]
        settings = train.load_settings(flags)
        found, _ = planning.rehearse_all(
            settings, train.PHASES, train.load_settings, Processes(0, 1, torch.device("cpu")),
            planning.Missing(),
        )  # fmt: skip
        plans[name] = planning.make_plan(found[1]).moments
    model = checkpoint.load("out/full/language.pt").model
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    matrices = sum(size for name, size in sizes.items() if "proj" in name)
    assert plans["adamw"] == 8 * sum(sizes.values())
    assert plans["muon"] == 8 * sum(sizes.values()) - 4 * matrices
