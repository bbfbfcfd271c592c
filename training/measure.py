"""
Memory and time of a phase on this machine, measured by real steps in a process of its own: steps,
features and validation. The weights are random, the data its own.
"""

import multiprocessing
import time
from functools import partial

import numpy as np
import torch

from data import Data
from fast.memory import keep_memory
from training import features, phases
from training.optimizer import make_optimizers
from training.prefetch import prefetched
from training.processes import Processes
from training.progress import peak_memory

SECONDS = 6  # of measuring, at least; and at least STEPS steps
STEPS = 12
WARM = 3  # first steps, which import and allocate, and are not like the others
MOST_FLOP = 2e11  # of a step that is measured: some seconds on a laptop


def is_small(one, plan, memory):
    """Whether the steps of a phase can be measured on this machine."""
    real = isinstance(one.dataset, Data) and one.dataset.directory.joinpath("meta.json").exists()
    return real and one.device.type == "cpu" and plan.flop < MOST_FLOP and plan.memory < memory / 2


def in_a_process(function, *arguments):
    """function(*arguments), called in a fresh process, whose peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@torch.no_grad()
def fill(model):
    """Give a model random weights, so small that nothing overflows."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    for buffer in model.buffers():
        buffer.fill_(1)
    if getattr(model, "gpt", None) is not None:
        model.gpt.set_rotary()


def as_run(one):
    """A phases.Run of a rehearsal.Rehearsal, with random weights and features."""
    settings, dataset, splits = one.settings, one.dataset, one.phase.splits
    model = one.model.to_empty(device=one.device)
    fill(model)
    stored = [None] * len(splits)
    if one.stores_features:
        shapes = [features.find_shape(dataset, split, model) for split in splits]
        some = np.random.RandomState(0).randn(1, *shapes[0][1:]).astype(np.float16)
        stored = [np.broadcast_to(some, shape) if shape[0] else None for shape in shapes]
    batches = phases.open_batches(settings, one.name, one.phase, dataset, model, stored)
    return phases.Run(
        settings=settings,
        name=one.name,
        phase=one.phase,
        dataset=dataset,
        processes=Processes(0, 1, one.device),
        parents={},
        inherited={},
        raw_model=model,
        model=phases.wrap(model, settings, Processes(0, 1, one.device), batches[0]),
        optimizers=make_optimizers(settings, one.groups, one.device),
        train_batches=batches[0],
        val_batches=batches[1] if len(batches) > 1 else None,
        start=0,
        steps=one.steps,
        batch=one.batch,
    )


def measure(one, read_batch, take_step):
    """{"memory": bytes, "seconds": of the whole phase}. read_batch, take_step: train.py's."""
    began, settings = time.perf_counter(), one.settings
    if one.device.type == "cpu":
        keep_memory()  # as find_processes() does
    run = as_run(one)
    preparing = time.perf_counter() - began  # PyTorch imports its compiler for an optimizer
    if not run.optimizers or not run.steps:
        return {"memory": peak_memory(one.device) * 1e6, "seconds": preparing}
    with torch.no_grad():
        run.phase.validate(run)  # a run begins with it, and the heap is as full as it leaves it
    spread = np.linspace(0, run.steps - 1, 2000).astype(int).tolist()
    np.random.RandomState(0).shuffle(spread)  # so that the first ones are of all lengths
    times, began = [], time.perf_counter()
    with prefetched(partial(read_batch, run), spread, settings.batches_ahead) as coming:
        for step, (_, batches) in zip(spread, coming):
            start = time.perf_counter()
            take_step(run, step, batches)
            times.append(time.perf_counter() - start)
            if len(times) >= STEPS + WARM and time.perf_counter() - began > SECONDS:
                break
    seconds = (
        preparing + sum(times[:WARM]) + float(np.mean(times[WARM:])) * max(run.steps - WARM, 0)
    )
    with torch.no_grad():
        began = time.perf_counter()  # the first validation was slower: it imported and read files
        run.phase.validate(run)
        seconds += count_validations(run) * (time.perf_counter() - began)
        seconds += seconds_of_features(one, run)
    return {"memory": peak_memory(one.device) * 1e6, "seconds": seconds}


def count_validations(run):
    every = run.settings.eval_every
    return len(range(0, run.steps, every)) + 1


def seconds_of_features(one, run):
    """Seconds to compute the features of all frames; 0 if they are stored already."""
    if not one.pays_features:
        return 0.0
    seconds, few = 0.0, 256
    for split in one.phase.splits:
        count = one.dataset.count(split, "frames")
        if not count:
            continue
        frames = np.array(one.dataset.open(split, "frames")[:few])
        extract = features.extract(run.raw_model, frames, one.dataset.image_format, one.device)
        began = time.perf_counter()
        list(extract)
        seconds += (time.perf_counter() - began) * count / len(frames)
    return seconds
