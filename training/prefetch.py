"""
Batches prepared in advance by a thread, and pinned memory for a GPU.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch


def pinned(batch):
    """The batch with its arrays as tensors in pinned memory, which a GPU copies while it works."""

    def pin(part):
        if isinstance(part, tuple):
            return tuple(pin(one) for one in part)
        if not isinstance(part, (np.ndarray, torch.Tensor)):
            return part
        return torch.as_tensor(np.ascontiguousarray(part)).pin_memory()

    return replace(batch, **{name: pin(part) for name, part in vars(batch).items()})


def in_advance(make, steps, depth):
    """Yield make(step) for each step; a thread prepares up to `depth` of them in advance. What is
    made depends on the step alone, not on depth or on time."""
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


@contextmanager
def prefetched(make, steps, depth):
    """in_advance() as a context: at its end the thread has ended."""
    coming = in_advance(make, steps, depth)
    try:
        yield coming
    finally:
        coming.close()
