"""
What a run will take, before it is started.

    python train.py configs/phase1.py --plan
    python train.py configs/llava_next.py --plan --gpu h100 --mfu 0.35

A step of each phase is run on tensors without numbers (PyTorch's FakeTensorMode): every operation
of the forward and the backward pass is counted, and every tensor that is alive at once. Small
models are also measured by real steps on this machine, see measure.py. Corpora and weights that are
not here are computed with their published sizes, see published.py.
"""

import copy
import math
import os
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import checkpoint
from common import shards
from config import UserError
from data import Data
from fast import products
from training import advice, measure, phases, published, rehearsal, resume, sharding
from training.optimizer import moments_of

GB = 1e9
# {name: (bf16 TFLOP/s without sparsity, GB of memory)}, from the makers' data sheets
GPUS = {
    "t4": (65, 16),
    "v100": (125, 32),
    "a10": (125, 24),
    "a100": (312, 80),
    "l40s": (362, 48),
    "rtx3090": (71, 24),
    "rtx4090": (165, 24),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 192),
}
CONFIGS = Path(__file__).parent.parent / "configs"
SAMPLED = 24  # steps of a run of which the lengths are looked at


@dataclass
class Plan:
    """What a phase will take. Bytes are of one process."""

    name: str
    parts: dict  # {part: (parameters trained, parameters in all)}
    rows: int
    steps: int
    passes: float
    reads: str  # what a step reads, in words
    flop: float  # a step, of all processes
    feature_flop: float  # once, for the features that are stored
    weights: int
    gradients: int
    moments: int
    activations: int
    feature_bytes: int
    checkpoint_bytes: int
    gathered: int = 0  # with sharding: what is whole at a time
    measured: dict | None = None  # {"memory": bytes, "seconds": of the phase}, see measure.py

    @property
    def memory(self):
        own = self.weights + self.gradients + self.moments
        return own + self.gathered + self.activations

    @property
    def total_flop(self):
        return self.flop * self.steps + self.feature_flop


# ---------------------------------------------------------------------------------------------
# Counting a step


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, and the most that were alive at once.
    Views share their storage and count once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return made

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key):
        self.now -= self.sizes.pop(key)


def attention_flop(query, key, value, *args, **kwargs):
    """Two products of T x T x D for each head. As usual all T x T scores count, though half of them
    are masked. query, key, value: shapes (B, H, T, D)."""
    B, H, T, D = query
    return 2 * 2 * B * H * T * key[2] * D


def attention_backward_flop(gradient, query, key, value, *args, **kwargs):
    return 2.5 * attention_flop(query, key, value)  # five products: scores, dP, dV, dQ, dK


@contextmanager
def plain_products():
    """Products by PyTorch's own operations, which the counter knows."""
    before, products.ONEDNN = products.ONEDNN, False
    try:
        yield
    finally:
        products.ONEDNN = before


@contextmanager
def counting():
    """Everything inside is counted and nothing is computed: (a FlopCounterMode, an Alive)."""
    # imported late: they import PyTorch's compiler, which takes two seconds
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    name, aten = "_scaled_dot_product_flash_attention_for_cpu", torch.ops.aten
    formulas = {}
    if hasattr(aten, name):  # from PyTorch 2.2 on
        formulas[getattr(aten, name)] = attention_flop
        formulas[getattr(aten, f"{name}_backward")] = attention_backward_flop
    counter, alive = FlopCounterMode(display=False, custom_mapping=formulas), Alive()
    with FakeTensorMode(allow_non_fake_inputs=True), plain_products():
        yield counter, alive


def count_step(one, plan, rows, sharded=False):
    """(FLOP, most bytes alive beside the weights) of the forward and backward passes over the first
    `rows` rows of a batch; with gradient accumulation the second micro-batch is counted, when the
    gradients of the first are alive. sharded: the gathered weights are in the dtype of the run."""
    batch = one.batches[0].read(plan, slice(0, rows))
    dtype = phases.compute_dtype(one.settings, one.device)
    model = copy.deepcopy(one.model)
    if sharded:
        model.to(dtype)
    with counting() as (counter, alive):
        model.to_empty(device="cpu")
        with alive:
            for _ in range(min(one.settings.grad_accum, 2)):
                with counter:  # it starts from 0 again
                    with phases.autocast("cpu", dtype):
                        inputs = model.inputs(batch, one.dataset.image_format, 0, 0)
                        loss = model(*inputs)[1]
                    if loss.requires_grad:
                        loss.backward()
            most = alive.most
    return counter.get_total_flops(), most


def count_features(one, frames):
    """FLOP of a frozen tower on so many frames."""
    size, few = one.dataset.image_format.size, min(frames, 4)
    if not few:
        return 0
    model = copy.deepcopy(one.model)
    with counting() as (counter, _):
        model.to_empty(device="cpu")
        with torch.no_grad(), counter:
            model.encode_images(torch.empty(few, 3, size, size))
    return counter.get_total_flops() * frames / few


# ---------------------------------------------------------------------------------------------
# A phase


def count_parts(one):
    """{part: (parameters trained, parameters in all)} of the modules of a model."""
    trained = {id(p) for found, _ in one.groups for p in found.values()}
    parts = {}
    for name, module in one.model.named_children():
        parameters = list(module.parameters())
        learnt = sum(p.numel() for p in parameters if id(p) in trained)
        parts[name] = learnt, sum(p.numel() for p in parameters)
    own = list(one.model.parameters(recurse=False))  # the newline of tiles
    if own:
        parts["newline"] = (sum(p.numel() for p in own if id(p) in trained), own[0].numel())
    return {name: counts for name, counts in parts.items() if counts[1]}


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sampled_plans(one):
    """The batches.Plans of some steps, evenly spread over the run."""
    steps = np.linspace(0, max(one.steps - 1, 0), SAMPLED).astype(int)
    return [one.batches[0].plan(step) for step in np.unique(steps).tolist()]


def make_plan(one, sharded=False):
    """The Plan of a rehearsal.Rehearsal. sharded: over its processes, see sharding.py."""
    settings, batches, batch = one.settings, one.batches[0], one.batch
    world, accum = one.world, settings.grad_accum
    plans = sampled_plans(one)
    lengths = [plan.length for plan in plans]
    typical = plans[int(np.argmin(np.abs(np.array(lengths) - np.mean(lengths))))]
    longest = plans[int(np.argmax(lengths))]
    rows = batch // (world * accum)
    flop, most = count_step(one, typical, rows, sharded)
    if longest.length > typical.length:
        most = max(most, count_step(one, longest, rows, sharded)[1])
    trained = [p for found, _ in one.groups for p in found.values()]
    weights = bytes_of(one.model.parameters()) + bytes_of(one.model.buffers())
    moments = 4 * moments_of(one.settings, one.groups)
    gradients = bytes_of(trained) * (2 if world > 1 else 1)  # DDP keeps them in buckets, too
    frames = sum(one.dataset.count(split, "frames") for split in one.phase.splits)
    stores, own, gathered, counted = one.stores_features, weights, 0, bytes_of(trained)
    if sharded:
        size = phases.compute_dtype(settings, one.device).itemsize
        counted = sum(p.numel() for p in trained) * size  # gradients, which are not activations
        gathered = gathered_bytes(one)
        own = bytes_of(one.model.parameters()) / world + bytes_of(one.model.buffers())
        gradients = bytes_of(trained) / world
    return Plan(
        name=one.name,
        parts=count_parts(one),
        rows=batches.rows,
        steps=one.steps,
        passes=one.steps * batch / batches.rows,
        reads=batches.describe(plans),
        flop=flop * world * accum,
        feature_flop=count_features(one, frames) if one.pays_features else 0,
        weights=own,
        gradients=gradients,
        moments=moments / (world if sharded else 1),
        activations=max(most - counted, 0),
        feature_bytes=frames * one.features_an_image * 2 if stores else 0,
        checkpoint_bytes=weights + moments,
        gathered=gathered,
    )


def gathered_bytes(one):
    """The most that a process holds whole of a sharded model, in the dtype of the run: what is in
    no block, and two blocks, because the next is gathered while one computes; and the gradients of
    what is in no block and of one block, which are summed in fp32. With several micro-batches all
    parameters and all gradients."""
    size = phases.compute_dtype(one.settings, one.device).itemsize
    units = sharding.find_units(one.model)
    whole = sum(p.numel() for p in one.model.parameters())
    of_units = [sum(p.numel() for p in unit.parameters()) for unit in units]
    if one.settings.grad_accum > 1:
        trained = sum(p.numel() for found, _ in one.groups for p in found.values())
        return whole * size + trained * 4
    largest = max(of_units, default=0)
    root = whole - sum(of_units)
    return (root + 2 * largest) * size + (root + largest) * (size + 4)


# ---------------------------------------------------------------------------------------------
# Memory


def machine_memory(device):
    """Bytes of memory of a GPU, or of this machine as far as this process may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path).read_text().strip() if Path(path).exists() else ""
        if limit.isdigit():
            whole = min(whole, int(limit))
    return whole


def memory_bound(one):
    """An upper bound of a phase's memory in bytes, without counting a step."""
    settings, rows = one.settings, one.batch // (one.world * one.settings.grad_accum)
    weights = bytes_of(one.model.parameters())
    trained = bytes_of(p for found, _ in one.groups for p in found.values())
    length = max(plan.length for plan in sampled_plans(one))
    gpt = getattr(one.model, "gpt", None)
    tokens = 0 if gpt is None else rows * length * gpt.config.n_layer * gpt.config.n_embd * 400
    images = 0
    if one.reads_frames:
        views = 2 + settings.local_views if gpt is None else 1
        images = rows * views * one.dataset.image_format.size**2 * 3 * 4 * 250
    return weights + 3 * trained + tokens + images


def choose_sharding(rehearsals):
    """{phase: "on" or "off"}, as --shard says; "auto": as the phase was begun, else on where one
    GPU does not hold it and there are several."""
    chosen = {}
    for one in rehearsals:
        if one.settings.shard == "auto" and one.start:
            sharded = shards.is_shards(checkpoint.find(one.settings.out, one.name))
        else:
            sharded = needs_shards(one, machine_memory(one.device))
        chosen[one.name] = "on" if sharded else "off"
    return chosen


def needs_shards(one, limit):
    """Whether a phase that has not begun is sharded, on GPUs of so many bytes."""
    if not one.phase.can_shard or one.settings.shard == "off":
        return False
    if one.settings.shard == "on":
        return True
    if one.world == 1 or one.device.type != "cuda" or memory_bound(one) < 0.5 * limit:
        return False
    return make_plan(one).memory > limit


def check_memory(rehearsals):
    """Raise UserError for a phase that needs more memory than this machine has, with an option that
    helps. Phases that are surely small are not counted."""
    for one in rehearsals:
        limit = machine_memory(one.device)
        if memory_bound(one) < 0.5 * limit:
            continue
        plan = make_plan(one, needs_shards(one, limit))
        if plan.memory > limit:
            raise UserError(
                f"{one.name} would need {plan.memory / GB:.1f} GB of memory and this machine has "
                f"{limit / GB:.1f}: {memory_advice(one, plan, limit)}"
            )


def memory_advice(one, plan, limit):
    """The option that makes a phase need less memory."""
    settings, rest = one.settings, plan.memory - plan.activations
    rows = one.batch // one.world
    for accum in range(settings.grad_accum + 1, rows + 1):
        if rows % accum == 0 and rest + plan.activations * settings.grad_accum / accum < limit:
            return f"--grad_accum {accum} trains the same in smaller parts"
    if rest < limit and hasattr(one.model, "gpt") and not settings.recompute:
        return "--recompute stores fewer activations"
    if rest < limit:
        return f"take a smaller {one.name}_batch or shorter samples"
    if "lora_rank" in one.phase.options and not settings.lora_rank:
        return "--lora_rank 16 trains thin factors of the GPT instead of all its weights"
    return "take a smaller model, or train fewer parts (--" + one.name + "_learn)"


# ---------------------------------------------------------------------------------------------
# All phases of a run


class Missing:
    """What is not on this machine, and is computed with published sizes. names: of it; corpora: the
    names of folders that may be missing."""

    def __init__(self, corpora=tuple(published.CORPORA)):
        self.names, self.corpora = [], corpora

    def open_data(self, directory):
        """The data.Data of a folder, or a stand-in of its published shape. Raises UserError."""
        here = (Path(directory) / "meta.json").exists()
        is_known = str(directory) == f"data/{Path(directory).name}"
        if here or not is_known or Path(directory).name not in self.corpora:
            return Data(directory)
        self.names.append(str(directory))
        return published.StandIn(directory)

    def load_weights(self, phase, source, dataset):
        """The weights from elsewhere that a phase takes, or others of their size."""
        if Path(source).exists():
            return phase.load_weights(source, dataset)
        self.names.append(source)
        return published.load_weights(phase.weights_option, source)


def rehearse_all(settings, table, load_settings, processes, missing):
    """(the Rehearsals of a run, {phase: checkpoint on the meta device} of these and of the phases
    before them). Phases before that have not been trained are rehearsed from the config file that
    trains them. load_settings: train.py's. Raises UserError."""
    dataset = missing.open_data(settings.data)
    names = resume.choose_phases(settings, dataset, table)
    planned = rehearse_parents(settings, names, table, load_settings, processes, missing)
    names = [name for name in names if name not in planned]
    if settings.init and planned:  # --init is missing here: the planned phases replace it
        settings = copy.copy(settings)
        settings.init = ""
    load_weights = partial(missing.load_weights, dataset=dataset)
    found = rehearsal.rehearse(settings, names, table, dataset, processes, planned, load_weights)
    return found, planned


def missing_parents(settings, names, table):
    """(folder, phases): what the phases `names` start from and is not there."""
    init = Path(settings.init)
    if settings.init and not init.exists() and init.suffix == ".pt":
        return init.parent, {init.stem}
    if settings.init and not init.exists():
        return init, {name for name in names if not table[name].starts_from}
    wanted = set()
    for name in [] if settings.init else names:
        parents = table[name].starts_from
        while len(parents) == 1 and not getattr(settings, f"{parents[0]}_steps"):
            parents = table[parents[0]].starts_from
        wanted |= {p for p in parents if not resume.find_checkpoint(settings, p)[0].exists()}
    return Path(settings.out), wanted - set(names)


def rehearse_parents(settings, names, table, load_settings, processes, missing):
    """{phase: checkpoint on the meta device} of what a run starts from and is not there, from the
    config that trains it; "init" for the model that --init names."""
    folder, wanted = missing_parents(settings, names, table)
    for path in sorted(CONFIGS.glob("**/*.py")) if wanted else ():
        other = load_settings([str(path)])
        if Path(other.out) != folder or str(path) == settings.file:
            continue
        if not wanted <= set(phases_of(other, table)):
            continue
        _, planned = rehearse_all(other, table, load_settings, processes, missing)
        missing.names.append(f"{', '.join(sorted(wanted))} of {folder} (as {path.name} trains)")
        is_model = Path(settings.init).suffix == ".pt"
        return {"init" if is_model else name: planned[name] for name in wanted}
    return {}


def phases_of(settings, table):
    """The phases that a config may train."""
    if settings.phase in ("all", "0"):
        return [n for n, row in table.items() if settings.phase == "all" or not row.starts_from]
    return [name for name in table if advice.phase_flag(name) == settings.phase]


# ---------------------------------------------------------------------------------------------
# Showing it

COLUMNS = ("phase", "parameters", "rows", "a step reads", "steps", "passes", "FLOP a step",
           "FLOP", "memory", "on disk", "time")  # fmt: skip


def table_of(plans, settings, world):
    """Lines of a Markdown table of Plans, aligned."""
    rows = [COLUMNS, *(row_of(plan, settings, world) for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["| " + " | ".join(t.ljust(w) for t, w in zip(row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]


def row_of(plan, settings, world):
    """The cells of a Plan under COLUMNS."""
    trained = sum(learnt for learnt, _ in plan.parts.values())
    whole = sum(count for _, count in plan.parts.values())
    disk = f"{in_bytes(plan.checkpoint_bytes)}"
    if plan.feature_bytes:
        disk += f" + {in_bytes(plan.feature_bytes)}"
    memory = plan.measured["memory"] if plan.measured else plan.memory
    return (
        plan.name,
        f"{trained:,} of {whole:,}",
        f"{plan.rows:,}",
        plan.reads,
        f"{plan.steps:,}",
        f"{plan.passes:.1f}",
        f"{plan.flop:.2e}",
        f"{plan.total_flop:.2e}",
        in_bytes(memory),
        disk,
        time_of(plan, settings, world),
    )


def time_of(plan, settings, world):
    """The time of a phase in words: on a named GPU, as measured here, or how to ask for it."""
    if settings.gpu:
        peak = GPUS[settings.gpu][0] * 1e12
        return in_time(plan.total_flop / (peak * settings.mfu * world))
    return in_time(plan.measured["seconds"]) if plan.measured else "give --gpu"


def in_bytes(count):
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.{0 if count >= 10 * size else 1}f} {unit}"
    return f"{count / 1e3:.0f} KB"


def in_time(seconds):
    if seconds < 3600:
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360000 else f"{seconds / 3600:,.0f} h"


def parts_of(plan):
    """A line with the parameters of each part of a model."""
    parts = []
    for name, (learnt, count) in plan.parts.items():
        state = "trained" if learnt == count else f"{learnt:,} trained" if learnt else "frozen"
        parts.append(f"{name} {count:,} ({state})")
    gathered = f", gathered {in_bytes(plan.gathered)}" if plan.gathered else ""
    memory = (
        f"weights {in_bytes(plan.weights)}, gradients {in_bytes(plan.gradients)}, optimizer "
        f"{in_bytes(plan.moments)}{gathered}, activations {in_bytes(plan.activations)}"
    )
    return f"{plan.name}: {', '.join(parts)}; {memory}"


def show(settings, table, load_settings, processes, measured):
    """Print what the phases of a run will take. measured(name): see measure.measure(), in a process
    of its own."""
    missing = Missing()
    rehearsals, _ = rehearse_all(settings, table, load_settings, processes, missing)
    plans = []
    for one in rehearsals:
        if settings.gpu:
            one.device = torch.device("cuda")  # its dtype
        limit = GPUS[settings.gpu][1] * GB if settings.gpu else machine_memory(one.device)
        plan = make_plan(one, needs_shards(one, limit))
        if not settings.gpu and measure.is_small(one, plan, machine_memory(one.device)):
            print(f"{one.name}: measuring some steps ...", file=sys.stderr)
            plan.measured = measured(one.name)
        plans.append(plan)
    for name in dict.fromkeys(missing.names):
        print(f"not here, computed with its published size: {name}")
    if not plans:
        print("nothing to train: all phases are done")
        return
    print(*table_of(plans, settings, processes.world), "", sep="\n")
    print(*map(parts_of, plans), sep="\n")
    print(explanation(settings, plans, processes.world))


def explanation(settings, plans, world):
    """What the columns of the table are of."""
    lines = []
    if settings.gpu:
        name, memory = settings.gpu, GPUS[settings.gpu][1] * GB
        lines.append(
            f"time: at {settings.mfu:.0%} of the bf16 peak of {world} {name}, "
            f"{GPUS[name][0]} TFLOP/s each"
        )
        large = [plan.name for plan in plans if plan.memory > memory]
        if large:
            lines.append(f"more than the {memory / GB:.0f} GB of a {name}: {', '.join(large)}")
    if any(plan.gathered for plan in plans):
        lines.append(
            f"sharded over {world} processes: " + ", ".join(p.name for p in plans if p.gathered)
        )
    if any(plan.measured for plan in plans):
        lines.append("memory and time: of this machine as it is now, measured by real steps")
    if any(not plan.measured for plan in plans):
        lines.append("memory: of tensors, without PyTorch itself (some 0.4 GB)")
    return "\n".join(lines)
