"""
Batches made ahead by a thread, and the pinned memory that a GPU fetches them from.
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
