"""Exercises of chapter 8: from one core to many GPUs."""

import numpy as np
import torch
from exercise import call, check, exercise, same

from model import GPT, GPTConfig


@exercise("8.1", "easy")
def rows_of(rank, world, micro_batches, batch):
    """Which rows of a batch a process reads (train.read_batch). The batch is cut into world *
    micro_batches equal pieces. Process 0 reads the first micro_batches pieces, one after the other,
    process 1 the next, and so on.

    batch: the number of rows, a multiple of world * micro_batches; rank: the number of the process,
    0 to world - 1. Returns a list of micro_batches lists of row numbers."""


@check(rows_of)
def check_rows_of(yours):
    for world, micro, batch in ((1, 1, 4), (2, 2, 8), (4, 1, 4), (2, 3, 12)):
        pieces = np.arange(batch).reshape(world, micro, -1).tolist()
        for rank in range(world):
            given = {"rank": rank, "world": world, "micro_batches": micro, "batch": batch}
            hint = "All ranks together read each row once."
            found = [[int(i) for i in piece] for piece in call(yours, rank, world, micro, batch)]
            same(found, pieces[rank], given, hint)


@exercise("8.2", "medium")
def combine(losses, counts):
    """The loss of a whole batch from the losses of its micro-batches. Each target has the same
    weight, so a micro-batch with more targets counts more (train.take_step).

    losses: list of floats, the mean loss over the targets of each micro-batch; counts: how many
    targets each has. The loss of a micro-batch without targets is given as 0. At least one
    micro-batch has a target.
    Returns the mean loss over all targets, a float."""


@check(combine)
def check_combine(yours):
    for losses, counts, wanted in (
        ([1.0, 3.0], [1, 1], 2.0),
        ([1.0, 3.0], [3, 1], 1.5),
        ([2.0, 0.0, 4.0], [5, 0, 5], 3.0),
        ([0.5], [7], 0.5),
    ):
        hint = "A mean of means is not the mean."
        same(call(yours, losses, counts), wanted, {"losses": losses, "counts": counts}, hint)


@exercise("8.3", "medium")
def count_parameters(vocabulary, width, layers, heads, kv_heads, hidden):
    """How many parameters our GPT has (model.GPT), head and embedding shared, no biases: the
    embedding; for each block queries of all heads, keys and values of kv_heads (head width = width
    / heads), the output matrix, gate, up and down of the MLP, two norms; a last norm.

    Returns an int."""


@check(count_parameters)
def check_count_parameters(yours):
    for shape in ((500, 128, 4, 4, 4, 352), (97, 64, 2, 4, 2, 100), (50, 32, 1, 8, 1, 48)):
        vocabulary, width, layers, heads, kv_heads, hidden = shape
        config = GPTConfig(
            vocabulary,
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            block_size=16,
            n_kv_head=kv_heads,
            n_hidden=hidden,
        )
        wanted = sum(p.numel() for p in GPT(config).parameters())
        given = dict(zip("vocabulary width layers heads kv_heads hidden".split(), shape))
        same(call(yours, *shape), wanted, given, "Beside model.GPT. Gate and up are two matrices.")


@exercise("8.4", "easy")
def training_memory(parameters, processes, sharded):
    """The least memory of AdamW in fp32, in bytes for each process, without activations: 4 bytes
    each for a parameter, its gradient and the optimizer's two moments. Sharded (ZeRO-3, arXiv
    1910.02054), each process holds an equal part of all four.

    Returns a float."""


@check(training_memory)
def check_training_memory(yours):
    for parameters, processes, sharded, wanted in (
        (1000, 1, False, 16000.0),
        (1000, 8, False, 16000.0),
        (1000, 8, True, 2000.0),
        (7_000_000_000, 4, True, 28e9),
    ):
        given = {"parameters": parameters, "processes": processes, "sharded": sharded}
        found = float(call(yours, parameters, processes, sharded))
        same(found, wanted, given, "Without shards each process holds all of it.")


@exercise("8.5", "hard")
def ring_all_reduce(vectors):
    """How GPUs add their gradients: in a ring, where each process sends only to the next one. Each
    of W processes cuts its vector into W equal pieces. In each of W - 1 rounds every process sends
    one piece to the next process, which adds it to its own. After these rounds every process has
    the complete sum of one piece. In W - 1 more rounds the complete pieces travel round the ring.

    vectors: list of W tensors (W * n,). They are not changed. Returns (sums, sent): a list of W
    tensors, each the sum of all; and how many numbers each process has sent, a list of W ints."""


@check(ring_all_reduce)
def check_ring_all_reduce(yours):
    torch.manual_seed(0)
    for world, n in ((1, 3), (2, 2), (4, 3), (5, 1)):
        vectors = [torch.randn(world * n) for _ in range(world)]
        sums, sent = call(yours, vectors)
        given = f"{world} processes, {world * n} numbers each"
        same(list(sums), [sum(vectors)] * world, given, "In a round all send at once.", 1e-5)
        hint = "In each of 2 (W - 1) rounds one piece: n numbers."
        same([int(count) for count in sent], [2 * (world - 1) * n] * world, given, hint)
