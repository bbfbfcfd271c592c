"""
A step on a GPU waits for nothing. Where there is none the meta device takes its place: its tensors
have no numbers, and a copy between it and the CPU is one between a GPU and the CPU.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train
from batches import ClipBatches, SampleBatches
from dino import DINO
from model import GPT, BabyLLaVA, GPTConfig, make_projector
from training import phases, published
from training.optimizer import set_trainable
from training.prefetch import pinned
from training.processes import Processes
from vision import ViT


class Waits(TorchDispatchMode):
    """Collects the operations for which the host would wait until the GPU has done all its work: a
    number that is read from it, a copy that blocks, a tensor whose size depends on values."""

    SIZES = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        made = function(*args, **kwargs)
        tensors = [t for t in (*args, made) if isinstance(t, torch.Tensor)]
        crosses = len({t.device.type for t in tensors}) > 1
        goes_on = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if crosses and name in ("_to_copy", "copy_") and not goes_on:
            self.found.append(name)
        if name in self.SIZES and tensors[0].device.type == "meta":
            self.found.append(name)
        return made


def run_of(net, parts, dataset, device="meta", rate=1e-3):
    """A phases.Run for take_step()."""
    groups = set_trainable(net, parts, rate)
    parameters = [p for found, _ in groups for p in found.values()]
    groups = [{"params": parameters, "lr": rate, "highest_lr": rate}]
    device = torch.device(device)
    return phases.Run(
        settings=train.Config(shard="off", dtype="float32"), name="phase2", phase=None,
        dataset=dataset, processes=Processes(0, 1, device), parents={}, inherited={},
        raw_model=net, model=phases.WithGradient(net),
        optimizers=[torch.optim.AdamW(groups, foreach=True)], train_batches=None, val_batches=None,
        start=0, steps=10, batch=4,
    )  # fmt: skip


def waits_of(make, parts, dataset, batch, monkeypatch):
    """The operations for which the third step waits; the first ones make AdamW's states."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # which needs a GPU
    batch = pinned(batch)
    monkeypatch.setattr(phases.Run, "autocast", lambda self: nullcontext())  # none on meta
    monkeypatch.setattr(model, "autocast_dtype", lambda x: None)
    run = run_of(make().to("meta"), parts, dataset)
    with Waits() as waits:
        for step in range(3):
            waits.found.clear()
            train.take_step(run, step, [batch])
    return waits.found


def make_seeing(dataset):
    sizes = GPTConfig(dataset.tokenizer.vocab_size, 512, 2, 2, 16, attention="sdpa", norm="torch")
    tower = ViT(dataset.image_format.size, 8, 16, 2, 2)
    projector = make_projector("mlp2x_gelu", 16, 16)
    tiled = bool(dataset.image_format.canvases)
    return BabyLLaVA(GPT(sizes), projector, tower, dataset.tokenizer.image, -1, tiled=tiled)


@pytest.mark.parametrize("corpus, split", [("toy", "train"), ("toy_tiles", "chat_train")])
def test_a_step_on_pictures_waits_for_nothing(corpus, split, monkeypatch):
    dataset = published.StandIn(f"data/{corpus}")
    batches = SampleBatches(dataset, split, 4, 1, make_seeing(dataset))
    batch = batches.read(batches.plan(0))
    assert batch.images.dtype == np.uint8 and bool(batch.arrangement) == (corpus == "toy_tiles")
    parts = ("projector", "gpt", "tower")
    make = lambda: make_seeing(dataset)  # noqa: E731
    assert waits_of(make, parts, dataset, batch, monkeypatch) == []


def test_a_step_of_dino_waits_for_nothing(monkeypatch):
    dataset = published.StandIn("data/toy")
    batches = ClipBatches(dataset, "train", 4, 1)
    batch = batches.read(batches.plan(0))
    make = lambda: DINO(ViT(64, 8, 16, 2, 2), ViT(64, 8, 16, 2, 2), 16, local_views=2)  # noqa: E731
    assert waits_of(make, ("student",), dataset, batch, monkeypatch) == []


@pytest.mark.parametrize(
    "action, found",
    [
        (lambda: torch.ones(3).to("meta"), ["_to_copy"]),
        (lambda: torch.as_tensor(np.ones(3), device="meta"), ["_to_copy"]),
        (lambda: torch.ones(3).to("meta", non_blocking=True), []),
        (lambda: torch.full((), 1.0, device="meta"), []),
    ],
)
def test_the_check_sees_what_waits(action, found):
    """But not torch.tensor(1.0, device=...), which a real GPU waits for."""
    with Waits() as waits:
        action()
    assert waits.found == found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_waits_for_nothing():
    dataset = published.StandIn("data/toy")
    net = make_seeing(dataset).to("cuda")
    batches = SampleBatches(dataset, "train", 4, 1, net)
    run = run_of(net, ("projector", "gpt", "tower"), dataset, device="cuda")
    made = [pinned(batches.read(batches.plan(step))) for step in range(6)]
    for step, batch in enumerate(made):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        train.take_step(run, step, [batch])
    torch.cuda.set_sync_debug_mode("default")
