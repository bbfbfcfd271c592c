"""
What a step reads: made ahead by a thread, in pinned memory where a GPU fetches it.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch


def pinned(batch):
    """The batch with its arrays as tensors in pinned memory: a GPU fetches these while it works."""
    arrays = {name: part for name, part in vars(batch).items() if isinstance(part, np.ndarray)}
    as_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array)).pin_memory()
    return replace(batch, **{name: as_tensor(array) for name, array in arrays.items()})


def make_batches(run, step):
    """(rows of the whole batch, positions that they fill, this process's share of them in pieces),
    of a train.py's Run: of each group of rows, which are of like length, grad_accum pieces."""
    plans = [run.train_batches.plan(step * run.groups + i) for i in range(run.groups)]
    pieces = []
    for rows, length in plans:
        size = len(rows) // (run.processes.world * run.settings.grad_accum)
        first = run.processes.rank * size * run.settings.grad_accum
        starts = range(first, first + size * run.settings.grad_accum, size)
        pieces += [run.train_batches.read(rows[i : i + size], length, i) for i in starts]
    if run.processes.device.type == "cuda":
        pieces = [pinned(piece) for piece in pieces]
    filled = sum(len(rows) * length for rows, length in plans)
    return np.concatenate([rows for rows, _ in plans]), filled, pieces


def made_ahead(make, steps, depth):
    """Yield make(step) for each step, made by a thread while the model works on the one before;
    `depth` of them lie ready. What is made follows from its step, not from depth or from time.

    Close it, and the thread has ended."""
    if not depth:
        yield from map(make, steps)
        return
    thread, coming = ThreadPoolExecutor(1, "batches"), deque()
    try:
        for step in steps:
            coming.append(thread.submit(make, step))
            if len(coming) > depth:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
