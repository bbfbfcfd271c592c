"""
A phase: what a row of train.py's table says, how a run of it is set up, and how it is saved.

No function here asks for the name of a phase: what differs between phases is a field of Phase.
"""

import inspect
import os
import shutil
from collections import ChainMap
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
from batches import SampleBatches
from common import shards
from config import UserError
from training import features, lora, models, resume, sharding
from training.optimizer import make_optimizers, set_trainable
from training.processes import Processes

# Options that concern the phases after the first projector
LATER_OPTIONS = ("dropout", "init", "lora_rank", "lora_alpha")
# Options that concern every phase
EVERY_PHASE = (
    "optimizer",
    "muon_rate",
    "warmup",
    "weight_decay",
    "beta2",
    "grad_clip",
    "seed",
    "dtype",
    "truncate",
    "keep",
)


@dataclass(frozen=True)
class Phase:
    """A row of the table PHASES in train.py. The options NAME_steps, NAME_lr and NAME_batch,
    and optionally NAME_epochs, belong to the phase called NAME, and NAME_learn if it starts from
    other phases."""

    learns: tuple  # the parts that are trained, as optimizer.parse_part() takes them
    batches: type  # what it reads, see batches.py
    splits: tuple  # to train on, and optionally to validate on
    make: object  # make(settings, dataset, parents): its model, see models.py; not used with --init
    validate: object  # validate(run): {measure: value} for the log, see validation.py
    starts_from: tuple = ()  # the phases before
    inherited: tuple = ()  # options that fix the model; later phases must not contradict them
    options: tuple = ()  # its other options; none of own_options() may change on resuming
    weights_option: str = ""  # the option that replaces training by weights from elsewhere
    load_weights: object = None  # load_weights(path, dataset): a BabyLLaVA of that part alone
    fixes_images: bool = True  # later phases need images of the same format
    saves_template: bool = False  # it learns conversations in the template of the data
    can_shard: bool = True  # --shard is for it, too; see sharding.py
    unit: str = "tokens/s"

    def own_options(self, name):
        """The options that must not change when this phase is resumed."""
        kinds = ("steps", "lr", "batch", "learn") if self.starts_from else ("steps", "lr", "batch")
        own = tuple(f"{name}_{kind}" for kind in kinds)
        return self.inherited + self.options + own + EVERY_PHASE

    @property
    def validates_on(self):
        """{"split", "batches"} that eval.py computes the validation loss on; None for a tower."""
        if len(self.splits) < 2:
            return None
        return {"split": self.splits[1], "batches": self.batches.__name__}


@dataclass
class Run:
    """A phase that is set up: all that the loop needs."""

    settings: object  # train.Config
    name: str
    phase: Phase
    dataset: object  # data.Data
    processes: Processes
    parents: dict
    inherited: dict  # {option: value} that later phases inherit
    raw_model: torch.nn.Module  # to save and evaluate; `model` is it under compile and DDP
    model: torch.nn.Module
    optimizers: list
    train_batches: object
    val_batches: object
    start: int
    steps: int
    batch: int
    skipped: int = 0  # steps whose gradient was not finite
    best: dict | None = None  # {"step", "val_loss"} of the weights that --keep best chose
    saver: sharding.Saver | None = None  # of a sharded model

    @property
    def is_sharded(self):
        return self.settings.shard == "on"

    @property
    def path(self):
        suffix = "shards" if self.is_sharded else "pt"
        return Path(self.settings.out) / f"{self.name}.{suffix}"

    @property
    def best_path(self):
        """The weights of the lowest validation loss so far, with --keep best."""
        return self.path.with_suffix(f".best{self.path.suffix}")

    @property
    def trained_parameters(self):
        return [p for p in self.raw_model.parameters() if p.requires_grad]

    def reduce_gradients(self, now):
        """Whether the next backward pass sums gradients over processes: once a step."""
        self.model.require_backward_grad_sync = now  # DDP's
        if self.is_sharded:
            self.model.set_requires_gradient_sync(now)
            self.model.set_reshard_after_backward(now)

    def drop_padding(self, batches):
        """After a step on texts alone drop the gradients of tower and projector, which are 0: the
        optimizer would go on in their old direction. A model that is not sharded has none."""
        if self.is_sharded and not any(batch.shows for batch in batches):
            for name, parameter in self.raw_model.named_parameters():
                if not name.startswith("gpt."):
                    parameter.grad = None

    def autocast(self):
        return autocast(
            self.processes.device.type, compute_dtype(self.settings, self.processes.device)
        )


# ---------------------------------------------------------------------------------------------
# Setting up


def set_up(settings, name, phases, dataset, processes):
    """The Run of a phase, from its parents or from where it stopped; None if it is done already.
    phases: train.py's table."""
    phase, device = phases[name], processes.device
    check_batch(settings, name, processes)
    is_sharded = settings.shard == "on"
    parents = resume.find_parents(
        settings, name, phases, dataset, processes.print, mapped=is_sharded
    )
    inherited = resume.inherit(settings, parents)
    inherited |= {own: getattr(settings, own) for own in phase.inherited}
    saved = resume.find_saved(settings, name, phase, dataset, parents, processes.print)
    if saved and saved["done"]:
        processes.print(f"{name}: done already, {checkpoint.find(settings.out, name)}")
        return None
    torch.manual_seed(settings.seed)
    make = make_sharded if is_sharded else make_whole
    raw_model, optimizers, stored = make(settings, name, phase, dataset, parents, saved, device)
    steps = getattr(settings, f"{name}_steps")
    if not optimizers:
        processes.print(f"{name}: nothing in it can be trained; it is saved as it is")
        steps = 0
    batches = open_batches(settings, name, phase, dataset, raw_model, stored)
    return Run(
        settings=settings,
        name=name,
        phase=phase,
        dataset=dataset,
        processes=processes,
        parents=parents,
        inherited=inherited,
        raw_model=raw_model,
        model=wrap(raw_model, settings, processes, batches[0]) if optimizers else raw_model,
        optimizers=optimizers,
        train_batches=batches[0],
        val_batches=batches[1] if len(batches) > 1 else None,
        start=saved["step"] if saved else 0,
        steps=steps,
        batch=getattr(settings, f"{name}_batch"),
        skipped=saved.get("skipped", 0) if saved else 0,
        saver=sharding.Saver(processes) if is_sharded else None,
    )


def make_whole(settings, name, phase, dataset, parents, saved, device):
    """(model, optimizers, stored features of each split) of a phase that is not sharded."""
    path = f"{settings.out}/{name}.pt"
    model = models.make_model(settings, phase, dataset, parents)
    if saved:
        restore_model(model, saved, path)
    model.to(device)
    check_backends(settings, model, device)
    groups = set_trainable(model, *what_is_trained(settings, name, phase))
    optimizers = make_optimizers(settings, groups, device)
    stored = stored_features(settings, dataset, phase.splits, model, device)
    if saved:
        restore_optimizers(optimizers, saved, path)
    return model, optimizers, stored


def make_sharded(settings, name, phase, dataset, parents, saved, device):
    """As make_whole(), but of each parameter a process has its part alone; see sharding.py."""
    sharding.make_group(device)
    without = {parent: resume.on_meta(found) for parent, found in parents.items()}
    # parts that this phase adds are initialised; all others are on the meta device
    model = models.make_model(settings, phase, dataset, without)
    check_backends(settings, model, device)
    groups = set_trainable(model, *what_is_trained(settings, name, phase))
    weights = ChainMap(*(found["weights"] for found in parents.values()))
    if stores_features(settings, model):  # they are computed by a whole tower
        sharding.fill(model.tower, weights, device, prefix="tower.")
    stored = stored_features(settings, dataset, phase.splits, model, device)
    dtype, is_compiled = compute_dtype(settings, device), compiles(settings, device)
    sharding.shard(model, device, dtype, settings.grad_accum > 1, is_compiled)
    sharding.fill(model, weights, device)
    own = dict(model.named_parameters())  # others than before
    groups = [({n: own[n] for n in found}, rate) for found, rate in groups]
    optimizers = make_optimizers(settings, groups, device)
    if saved:
        sharding.restore(model, optimizers, checkpoint.find(settings.out, name))
    return model, optimizers, stored


def check_batch(settings, name, processes):
    """Raise UserError for a batch that does not divide among processes and micro-batches."""
    batch, parts = getattr(settings, f"{name}_batch"), processes.world * settings.grad_accum
    if batch % parts:
        raise UserError(
            f"{name}_batch {batch} does not divide into {processes.world} processes x "
            f"grad_accum {settings.grad_accum}"
        )


def what_is_trained(settings, name, phase):
    """(the parts that a phase trains, their highest learning rate)."""
    parts = getattr(settings, f"{name}_learn", ()) or phase.learns
    return parts, getattr(settings, f"{name}_lr")


def open_batches(settings, name, phase, dataset, model, stored=None):
    """The batches of each split of a phase. stored: the features of each split, see
    stored_features()."""
    batch, stored = getattr(settings, f"{name}_batch"), stored or [None] * len(phase.splits)
    batches = [
        phase.batches(dataset, split, batch, settings.seed, model, of_split, settings.truncate)
        for split, of_split in zip(phase.splits, stored)
    ]
    for one in batches:
        one.always_images = settings.shard == "on"
    return batches


def set_steps(settings, name, batches):
    """Set the option NAME_steps of a phase that has NAME_epochs, an option that may be missing."""
    epochs, batch = getattr(settings, f"{name}_epochs", 0), getattr(settings, f"{name}_batch")
    if epochs:
        setattr(settings, f"{name}_steps", max(1, round(epochs * batches.rows / batch)))


def restore_model(model, saved, path):
    """Give a model the weights of its checkpoint at `path`. Raises UserError."""
    try:
        models.restore(model, saved)
    except RuntimeError as error:  # load_state_dict's, of several lines
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not of this model: {why}") from None


def restore_optimizers(optimizers, saved, path):
    """Give optimizers their states. Raises UserError if they were others."""
    if len(optimizers) != len(saved["optimizers"]):
        raise UserError(f"{path} was saved by other optimizers: take another --out")
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)


def compute_dtype(settings, device):
    name = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return getattr(torch, name)


def autocast(kind, dtype):
    """The context in which a kind of device computes in a dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(kind, dtype)


def check_backends(settings, model, device):
    """Raise UserError for kernels that were asked for by name and cannot run here."""
    if getattr(model, "gpt", None) is not None:
        try:
            model.gpt.backends(compute_dtype(settings, device), device)
        except ValueError as error:
            raise UserError(str(error)) from None


def stores_features(settings, model):
    """Whether the features of the frames are computed once and stored."""
    tower = getattr(model, "tower", None)
    is_trained = tower is not None and any(p.requires_grad for p in tower.parameters())
    return tower is not None and not is_trained and settings.features == "stored"


def stored_features(settings, dataset, splits, model, device):
    """The stored features of each split, computed if needed; None for each if the tower runs in
    every step, because it is trained or because of --features=live."""
    if not stores_features(settings, model):
        return [None] * len(splits)
    return [
        features.store(dataset, split, model, device) if dataset.count(split, "frames") else None
        for split in splits
    ]


# DDP's option for buffers, of which we have none that change: its new name, from PyTorch 2.12 on
SYNC_BUFFERS = "forward_sync_buffers"
if SYNC_BUFFERS not in inspect.signature(DDP).parameters:
    SYNC_BUFFERS = "broadcast_buffers"


class WithGradient(nn.Module):
    """A model whose loss always has a gradient, of 0 if the batch uses no trained parameter: a
    batch of texts while only the projector is trained. backward() needs one, and DDP waits for it.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        logits, loss = self.model(*inputs)
        if not loss.requires_grad:
            loss = loss + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return logits, loss


def compiles(settings, device):
    """Whether to use torch.compile: as the option says, else on a GPU that has what it needs."""
    if settings.compile:
        return settings.compile == "on"
    return device.type == "cuda" and not compiler_lacking()


def compiler_lacking():
    """What torch.compile needs for a GPU and this machine has not, or ""."""
    if find_spec("triton") is None:
        return "the package triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "a C compiler"
    return ""


def compiled():
    """What torch.compile has done since the last reset, in words."""
    from torch._dynamo import utils

    graphs = utils.counters["stats"]["unique_graphs"]
    breaks = sum(utils.counters["graph_break"].values())
    said = f"compiled {graphs} graphs with {breaks} breaks"
    if hasattr(utils, "cumulative_time_spent_ns"):  # not in PyTorch 2.5 and before
        said += f", in {utils.calculate_time_spent()['total_wall_time']:.0f} s"
        utils.cumulative_time_spent_ns.clear()
    utils.counters.clear()
    return said


def wrap(model, settings, processes, batches):
    """The model under torch.compile and DDP, as the options ask; a sharded one as it is."""
    device = processes.device
    if settings.shard == "on":
        return model
    if compiles(settings, device):
        model = torch.compile(model)
    model = WithGradient(model)
    if processes.world > 1:
        devices = [device.index] if device.type == "cuda" else None
        # a batch of texts does not use the projector, an early layer not the tower's last blocks
        unused = isinstance(batches, SampleBatches)
        model = DDP(model, devices, **{SYNC_BUFFERS: False}, find_unused_parameters=unused)
    return model


# ---------------------------------------------------------------------------------------------
# Saving


def check_weights(run, step):
    """Raise UserError for weights that are not finite, before they replace a good checkpoint. Of a
    sharded model all processes call it."""
    own = [sharding.local(parameter).isfinite().all() for parameter in run.trained_parameters]
    all_finite = torch.stack(own).all().float() if own else torch.ones(())
    if run.is_sharded:
        dist.all_reduce(all_finite, dist.ReduceOp.MIN)
    if not all_finite:
        raise UserError(f"{run.name} step {step}: a weight is not finite; lower {run.name}_lr")


def keep_best(run, step, loss):
    """With --keep best: store the weights if their validation loss is the lowest so far; after the
    last step take the stored ones, which save() then writes."""
    if not (run.processes.is_first or run.is_sharded):
        return
    path, best = run.best_path, {"loss": float("inf")}
    if step == 0 and run.processes.is_first:
        remove(path)  # of an earlier run
    if step > 0 and path.exists():
        best = shards.read(path, mapped=True) if run.is_sharded else checkpoint.read_torch(path)
    if loss < best["loss"]:
        best = {"loss": loss, "step": step}
        if run.is_sharded:
            run.saver.save(path, step, best, sharding.weights_of(run.raw_model), wait=True)
        else:
            best["weights"] = run.raw_model.state_dict()
            checkpoint.save(path, best)
    if step == run.steps:
        if run.is_sharded:
            sharding.restore(run.raw_model, [], path)
        else:
            run.raw_model.load_state_dict(best["weights"])
        run.best = {"step": best["step"], "val_loss": best["loss"]}
        run.processes.print(f"{run.name}: kept step {best['step']}, val_loss {best['loss']:.3f}")


def remove(path):
    """Remove a checkpoint, a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe(run, step, state):
    """The facts of a checkpoint; checkpoint.py lists them. state: its weights."""
    model = run.raw_model.result()
    contents = checkpoint.describe(
        run.settings,
        run.name,
        run.dataset,
        model,
        step,
        done=step == run.steps,
        parents={name: parent["digest"] for name, parent in run.parents.items()},
        inherited=run.inherited,
        validates_on=run.phase.validates_on,
        state=state,
    )
    before = [one for parent in run.parents.values() for one in checkpoint.corpora_of(parent)]
    contents["corpora"] = before + checkpoint.corpora_of(contents)
    if run.phase.saves_template:
        contents["template"] = run.dataset.meta.get("template")
    else:  # a phase on captions keeps what an earlier phase on conversations has learnt
        contents["template"] = next((p.get("template") for p in run.parents.values()), None)
    if run.skipped:
        contents["skipped"] = run.skipped
    if run.best:
        contents["best"] = run.best
    return contents


def save(run, step):
    """Write the checkpoint of a run."""
    if run.is_sharded:
        check_weights(run, step)
        return save_sharded(run, step)
    if not run.processes.is_first:
        return
    check_weights(run, step)
    model = run.raw_model.result()
    state, factors = lora.merge(model) if lora.has_lora(model) else (None, None)
    contents = describe(run, step, state)
    if model is not run.raw_model:
        contents["dino"] = run.raw_model.state_dict()
    if factors:
        contents["lora"] = factors
    if run.optimizers:
        contents["optimizers"] = [optimizer.state_dict() for optimizer in run.optimizers]
    checkpoint.save(run.path, contents)
    remove(run.path.with_suffix(".shards"))  # of other parents
    if run.best:
        remove(run.best_path)


def save_sharded(run, step):
    """Write this process's part of a checkpoint; the last one is waited for."""
    weights, contents = sharding.weights_of(run.raw_model), describe(run, step, {})
    del contents["weights"]
    if lora.has_lora(run.raw_model):
        contents["lora_scale"] = run.settings.lora_alpha / run.settings.lora_rank
    if contents["done"]:
        contents["digest"] = sharding.digest_parts(weights)
    tensors = weights | sharding.states_of(run.raw_model, run.optimizers)
    run.saver.save(run.path, step, contents, tensors, wait=contents["done"])
    if contents["done"] and run.processes.is_first:
        remove(run.path.with_suffix(".pt"))  # of other parents
        remove(run.best_path)
