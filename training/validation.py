"""
Validation: the loss on held-out samples, and linear probes on a vision tower.
"""

import functools

import numpy as np
import torch
import torch.distributed as dist

from common.files import read_csv
from common.images import read_image, to_pixels
from dino import linear_probe


@torch.no_grad()
def val_loss(model, batches, image_format, limit=0, rank=0, world=1):
    """Mean NLL per target over `limit` rows (0: all), always the same ones. Each of `world`
    processes computes its share of the batches."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    is_mps = model.gpt.device.type == "mps"  # which has no float64
    sum_dtype = torch.float32 if is_mps else torch.float64
    total = torch.zeros(2, device=model.gpt.device, dtype=sum_dtype)  # sum of NLL, targets
    plans = batches.fixed_plan(limit)
    for first in range(0, len(plans), world):
        number = first + rank
        # the last round may be too short: then the last batch again, because all processes of a
        # sharded model must compute, but without weight
        batch = batches.read(plans[min(number, len(plans) - 1)])
        count = batch.count if number < len(plans) else 0
        loss = model(*model.inputs(batch, image_format, 0, 0))[1].to(sum_dtype)
        total += torch.stack([loss * count, torch.full_like(loss, count)])
    if world > 1:
        dist.all_reduce(total)
    for module, mode in modes.items():
        module.training = mode
    return float(total[0] / total[1])


@functools.lru_cache(maxsize=1)  # a run probes its tower many times, on the same frames
def read_probe(path, image_format, corpus):
    """(rows, frames (n, S, S, 3) uint8) of a corpus's probe.csv."""
    rows = read_csv(path, ("image", "kind", "colour"))
    images = path.parent / "images"
    return rows, np.stack([read_image(images / row["image"], image_format) for row in rows])


@torch.no_grad()
def probe(tower, dataset):
    """{"kind", "colour"}: accuracies of linear probes on a tower, from eval/probe.csv; {} if there
    is none. Fitted on three quarters of the frames, on [CLS, mean of the patches] after the last
    layer, and scored on the rest."""
    path, image_format = dataset.directory / "eval" / "probe.csv", dataset.image_format
    if not path.exists():
        return {}
    rows, frames = read_probe(path, image_format, dataset.meta["corpus"])
    device, features = next(tower.parameters()).device, []
    for start in range(0, len(frames), 64):
        x = tower(to_pixels(frames[start : start + 64], image_format, device)).float().cpu()
        features.append(torch.cat([x[:, 0], x[:, 1:].mean(1)], 1))
    features, accuracies = torch.cat(features), {}
    for name in ("kind", "colour"):
        labels = np.unique([row[name] for row in rows], return_inverse=True)[1]
        accuracies[name] = linear_probe(features, torch.tensor(labels), len(rows) * 3 // 4)
    return accuracies


# ---------------------------------------------------------------------------------------------
# The field `validate` of a phase: {measure: value} of a phases.Run, for the log


def validate_tower(run):
    return probe(run.raw_model.teacher["backbone"], run.dataset)


def validate_loss(run):
    """The loss on --eval_batches of the validation set; eval.py computes it on all of it."""
    limit, image_format = run.settings.eval_batches * run.batch, run.dataset.image_format
    rank, world = run.processes.rank, run.processes.world
    mean = val_loss(run.raw_model, run.val_batches, image_format, limit, rank, world)
    return {"val_loss": mean}
