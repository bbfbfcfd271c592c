"""
A phase: what a row of train.py's table says, how a run of it is set up, and how it is saved.

No function here asks for the name of a phase: what differs between phases is a field of Phase.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
from batches import SampleBatches
from config import UserError
from training import features, lora, models, resume
from training.optimizer import make_optimizers, set_trainable
from training.processes import Processes

# Options that concern the phases after the first projector
LATER_OPTIONS = ("dropout", "init", "lora_rank", "lora_alpha")
# Options that concern every phase
EVERY_PHASE = ("warmup", "weight_decay", "beta2", "grad_clip", "seed", "dtype", "truncate", "keep")


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

    @property
    def path(self):
        return Path(self.settings.out) / f"{self.name}.pt"

    @property
    def best_path(self):
        """The weights of the lowest validation loss so far, with --keep best."""
        return Path(self.settings.out) / f"{self.name}.best.pt"

    @property
    def trained_parameters(self):
        return [p for p in self.raw_model.parameters() if p.requires_grad]

    def autocast(self):
        dtype = compute_dtype(self.settings, self.processes.device)
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype != torch.float32)


# ---------------------------------------------------------------------------------------------
# Setting up


def set_up(settings, name, phases, dataset, processes):
    """The Run of a phase, from its parents or from where it stopped; None if it is done already.
    phases: train.py's table."""
    phase, device = phases[name], processes.device
    check_batch(settings, name, processes)
    parents = resume.find_parents(settings, name, phases, dataset, processes.print)
    inherited = resume.inherit(settings, parents)
    inherited |= {own: getattr(settings, own) for own in phase.inherited}
    saved = resume.find_saved(settings, name, phase, dataset, parents, processes.print)
    if saved and saved["done"]:
        processes.print(f"{name}: done already, {settings.out}/{name}.pt")
        return None
    torch.manual_seed(settings.seed)
    raw_model = models.make_model(settings, phase, dataset, parents)
    if saved:
        restore_model(raw_model, saved, f"{settings.out}/{name}.pt")
    raw_model.to(device)
    check_backends(settings, raw_model, device)

    steps = getattr(settings, f"{name}_steps")
    groups = set_trainable(raw_model, *what_is_trained(settings, name, phase))
    optimizers = make_optimizers(settings, groups, device)
    if not optimizers:
        processes.print(f"{name}: nothing in it can be trained; it is saved as it is")
        steps = 0
    stored = stored_features(settings, dataset, phase.splits, raw_model, device)
    batches = open_batches(settings, name, phase, dataset, raw_model, stored)
    if saved:
        restore_optimizers(optimizers, saved, f"{settings.out}/{name}.pt")
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
    )


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
    return [
        phase.batches(dataset, split, batch, settings.seed, model, of_split, settings.truncate)
        for split, of_split in zip(phase.splits, stored)
    ]


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


def wrap(model, settings, processes, batches):
    """The model under torch.compile and DDP, as the options ask."""
    device = processes.device
    if settings.compile == "on" or (settings.compile == "" and device.type == "cuda"):
        model = torch.compile(model)
    model = WithGradient(model)
    if processes.world > 1:
        devices = [device.index] if device.type == "cuda" else None
        # a batch of texts does not use the projector, an early layer not the tower's last blocks
        unused = isinstance(batches, SampleBatches)
        model = DDP(model, devices, broadcast_buffers=False, find_unused_parameters=unused)
    return model


# ---------------------------------------------------------------------------------------------
# Saving


def check_weights(run, step):
    """Raise UserError for weights that are not finite, before they replace a good checkpoint."""
    if not all(bool(parameter.isfinite().all()) for parameter in run.trained_parameters):
        raise UserError(f"{run.name} step {step}: a weight is not finite; lower {run.name}_lr")


def keep_best(run, step, loss):
    """With --keep best: store the weights if their validation loss is the lowest so far; after the
    last step take the stored ones, which save() then writes."""
    path, is_first = run.best_path, run.processes.is_first
    if not is_first:  # only the first process saves
        return
    if step == 0:
        path.unlink(missing_ok=True)  # of an earlier run
    best = checkpoint.read_torch(path) if path.exists() else {"loss": float("inf")}
    if loss < best["loss"]:
        best = {"loss": loss, "step": step, "weights": run.raw_model.state_dict()}
        checkpoint.save(path, best)
    if step == run.steps:
        run.raw_model.load_state_dict(best["weights"])
        run.best = {"step": best["step"], "val_loss": best["loss"]}
        run.processes.print(f"{run.name}: kept step {best['step']}, val_loss {best['loss']:.3f}")


def save(run, step):
    """Write the checkpoint of a run; checkpoint.py lists what is in it."""
    if not run.processes.is_first:
        return
    check_weights(run, step)
    model = run.raw_model.result()
    state, factors = lora.merge(model) if lora.has_lora(model) else (None, None)
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
    if model is not run.raw_model:
        contents["dino"] = run.raw_model.state_dict()
    if factors:
        contents["lora"] = factors
    if run.optimizers:
        contents["optimizers"] = [optimizer.state_dict() for optimizer in run.optimizers]
    if run.skipped:
        contents["skipped"] = run.skipped
    if run.best:
        contents["best"] = run.best
    checkpoint.save(run.path, contents)
    if run.best:
        run.best_path.unlink(missing_ok=True)
