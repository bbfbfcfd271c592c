"""Muon: what its step is, and what it is for."""

import pytest
import torch
from conftest import SMALL

import checkpoint
import data
import train
from config import UserError
from training import models, muon, optimizer, planning
from training.processes import Processes

MUON = train.Config(optimizer="muon", weight_decay=0.3, muon_rate=2.0)


def factors_of(matrix):
    U, _, V = torch.linalg.svd(matrix, full_matrices=False)
    return U, V


@pytest.mark.parametrize("shape", [(24, 24), (96, 32), (16, 80)])
def test_a_step_is_along_the_polar_factor(shape):
    """In fp64, by the singular vectors of the second step's momentum, with Nesterov: all singular
    values of the step are near 1 (Muon's iteration ends between 0.6 and 1.25), times AdamW's
    size."""
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(shape))
    (own,) = optimizer.make_optimizers(MUON, [({"w": matrix}, 0.01)], torch.device("cpu"))
    momentum = torch.zeros(shape, dtype=torch.float64)
    for _ in range(2):
        before, matrix.grad = matrix.detach().double(), torch.randn(shape)
        own.param_groups[0]["lr"] = 0.02  # as train.py's loop does
        own.step()
        momentum = 0.95 * momentum + 0.05 * matrix.grad.double()
    U, V = factors_of(0.95 * momentum + 0.05 * matrix.grad.double())
    rate = 0.01 * MUON.muon_rate
    moved = before * (1 - rate * MUON.weight_decay) - matrix.detach().double()
    values = U.T @ moved @ V.T / (rate * 0.2 * max(shape) ** 0.5)
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.25
    off = values - values.diagonal().diag()
    assert off.abs().max() < 1e-4


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_directions_of_any_size_become_alike(size):
    """Singular values from 1 down to 1/100 of the largest, whatever the gradient's size."""
    torch.manual_seed(0)
    U, V = factors_of(torch.randn(3, 32, 48))
    found = muon.polar_factors(size * (U * torch.logspace(0, -2, 32)) @ V)
    values = torch.linalg.svdvals(found.double())
    assert values.max() < 1.25 and (size < 1e-9 or values.min() > 0.6)
    assert not muon.polar_factors(torch.zeros(2, 3, 4)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9")
def test_equal_to_pytorchs_muon(monkeypatch):
    """Of many shapes at once, for steps whose rates change; PyTorch's alone computes in bf16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setattr(muon, "MOST_NUMBERS", 1200)  # two of 24 x 24 at a time
    shapes = [(24, 24), (96, 32), (16, 80), (24, 24), (32, 96), (24, 24), (1, 7), (5, 1)]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    of_torch = torch.optim.Muon(theirs, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    (own,) = optimizer.make_optimizers(
        MUON, [({str(i): p for i, p in enumerate(ours)}, 0.01)], torch.device("cpu")
    )
    for step in range(4):
        for p, q in zip(ours, theirs):
            p.grad = None if step == 2 and p.shape == (96, 32) else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        for one in (own, of_torch):
            for group in one.param_groups:
                group["lr"] = 0.02 / (step + 1)
            one.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_matrices_of_one_shape_are_computed_together():
    shapes = [(24, 24), (96, 32), (24, 24), (32, 96), (24, 24)]
    matrices = [torch.empty(shape) for shape in shapes]
    assert muon.group_by_shape(matrices) == [[0, 2, 4], [1, 3]]


def test_large_matrices_are_computed_one_at_a_time(monkeypatch):
    monkeypatch.setattr(muon, "MOST_NUMBERS", 1000)
    assert muon.group_by_shape([torch.empty(24, 24)] * 2 + [torch.empty(60, 60)] * 2) == [
        [0], [1], [2], [3]
    ]  # fmt: skip


def split(model, parts):
    """(names of what Muon trains, names of what AdamW trains)."""
    groups = optimizer.set_trainable(model, parts, 1e-3)
    of_muon, adamw = optimizer.make_optimizers(MUON, groups, torch.device("cpu"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        {names[p] for group in one.param_groups for p in group["params"]}
        for one in (of_muon, adamw)
    ]
    assert not found[0] & found[1]
    assert found[0] | found[1] == {n for n, p in model.named_parameters() if p.requires_grad}
    for group in of_muon.param_groups:
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
