"""
How a phase is made ready: its model, what it starts from, what of it learns.

Which phases there are is a table in train.py; this file knows none of them by name but for the
parts that models are made of.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import checkpoint
import features
import vision
from batches import SampleBatches
from config import UserError
from dino import DINO
from model import GPT, BabyLLaVA, GPTConfig, Projector, projector_fault

EVERY_PHASE = ("warmup", "weight_decay", "beta2", "clip", "seed", "dtype")  # concern all of them


@dataclass(frozen=True)
class Phase:
    """A row of the table. `learns`: the parts that do, by prefixes of parameters' names, each maybe
    with a rate of its own ("tower=2e-4"). `shape`: the knobs that decide what is made, which all
    later phases inherit. `knobs`: the others that concern it. `watch`: what is measured."""

    learns: tuple
    batches: type
    splits: tuple
    make: object
    starts_from: tuple
    shape: tuple
    knobs: tuple
    watch: object
    unit: str = "tokens/s"

    def own_knobs(self, name):
        """The knobs that this phase must be resumed with as it was begun."""
        rates = tuple(f"{name}_{quantity}" for quantity in ("steps", "lr", "batch"))
        return self.shape + self.knobs + rates + EVERY_PHASE


@dataclass
class Processes:
    """Who this process is among those that train together, and what it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self):
        return self.rank == 0

    def say(self, line):
        if self.is_first:
            tqdm.write(line)

    def wait(self):
        if self.world > 1:
            dist.barrier()


# ---------------------------------------------------------------------------------------------
# How each model is made


def new_dino(config, dataset, parents):
    sizes = (config.patch, config.vision_width, config.vision_depth, config.vision_heads)
    if dataset.image_format.size % config.patch or config.vision_width % config.vision_heads:
        raise UserError(
            f"frames of {dataset.image_format.size} pixels in patches of {config.patch}, "
            f"vision_width {config.vision_width} over vision_heads {config.vision_heads}: neither "
            "division may leave a rest"
        )
    student, teacher = (vision.ViT(dataset.image_format.size, *sizes) for _ in range(2))
    return DINO(
        student,
        teacher,
        config.prototypes,
        config.local_views,
        config.teacher_temperature,
        config.momentum,
    )


def new_gpt(config, dataset, parents):
    sizes = GPTConfig(
        vocab_size=dataset.tokenizer.vocab_size,
        block_size=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_kv_head=config.n_kv_head,
        n_hidden=config.n_hidden,
        dropout=config.dropout,
        attention=config.attention,
        norm=config.norm,
    )
    if sizes.fault():
        raise UserError(sizes.fault())
    return BabyLLaVA(GPT(sizes), image_token=dataset.tokenizer.image)


def introduce(config, dataset, parents):
    """Tower and GPT of the phases before, and a new projector between them."""
    backends = {"attention": config.attention, "norm": config.norm}
    gpt = checkpoint.build(parents["phase0"], **backends).model.gpt
    tower = checkpoint.build(parents["vision"]).model.tower
    if tower.fault(dataset.image_format.size, config.select_layer):
        raise UserError(tower.fault(dataset.image_format.size, config.select_layer))
    fault = projector_fault(config.projector, tower.width, gpt.config.n_embd)
    if fault:
        raise UserError(f"--projector: {fault}")
    return BabyLLaVA(
        gpt,
        Projector(config.projector, tower.width, gpt.config.n_embd),
        tower,
        dataset.tokenizer.image,
        config.select_layer,
        config.keep_cls,
        config.image_attention,
    )


def carry_on(config, dataset, parents):
    """The model of the phase before, with this phase's dropout."""
    (parent,) = parents.values()
    gpt = parent["parts"]["gpt"] | {"dropout": config.dropout}
    parent = parent | {"parts": parent["parts"] | {"gpt": gpt}}
    return checkpoint.build(parent, attention=config.attention, norm=config.norm).model


# ---------------------------------------------------------------------------------------------
# What a phase starts from


def find_parents(config, row, dataset):
    """{phase: finished checkpoint} that a phase starts from, on data that fits them."""
    parents = {}
    for parent in row.starts_from:
        path = Path(config.out) / f"{parent}.pt"
        how = "0 --tower vision" if parent == "vision" else parent[-1]
        found = checkpoint.read(path) if path.exists() else None
        if not found or not found["done"]:
            state = f"is at step {found['step']}" if found else "does not exist"
            raise UserError(f"{path} {state}: finish it first with --phase {how}")
        check_data(path, found, dataset)
        parents[parent] = found
    return parents


def check_data(path, found, dataset):
    """Refuse data with another vocabulary or other pictures than a checkpoint was trained on."""
    tokenizer = dataset.tokenizer
    if found["tokenizer"] and found["tokenizer"]["ranks"] != tokenizer.dump():
        raise UserError(
            f"{path} speaks another vocabulary than {dataset.directory}: train phase 0 on the "
            "data you use in later phases, or prepare that data as it was"
        )
    if found["images"] != asdict(dataset.image_format):
        raise UserError(
            f"{path} was trained on pictures made as {found['images']}, {dataset.directory} has "
            f"{asdict(dataset.image_format)}: prepare it as it was, or train from phase 0"
        )


def inherit(config, parents):
    """Set the knobs that earlier phases have decided; returns all that is decided now but for this
    phase's own. Raises UserError where one was given here and says something else."""
    decided = {}
    for parent, found in parents.items():
        for name, value in found["decided"].items():
            wanted = getattr(config, name)
            if name in config.given and wanted != value:
                raise UserError(
                    f"{config.given[name]}: {name} {wanted!r} contradicts {config.out}/{parent}.pt,"
                    f" which has {value!r}: leave it out, or give another --out"
                )
            setattr(config, name, value)
            decided[name] = value
    return decided


def find_resume(config, name, row, dataset, parents, say):
    """This phase's own checkpoint, to go on from or to leave alone; None where there is none, or
    where it started from others than there are now.

    Raises UserError where it was made with other knobs or on other data."""
    path = Path(config.out) / f"{name}.pt"
    if not path.exists():
        return None
    found = checkpoint.read(path)
    for own in row.own_knobs(name):
        before, now = found["settings"].get(own), getattr(config, own)
        if before != now:
            raise UserError(
                f"{path} was made with {own}={before}, now it is {now}: give another --out, or "
                "delete the file to train it again"
            )
    if found["corpus"] != dataset.meta["corpus"]:
        raise UserError(
            f"{path} was trained on other data: {dataset.directory} was prepared anew since "
            f"({found['corpus'][:12]}, now {dataset.meta['corpus'][:12]}): give another --out, or "
            "delete the file to train it again"
        )
    if found["parents"] != {parent: p["digest"] for parent, p in parents.items()}:
        say(f"{name}: {path} started from other checkpoints than there are now: training it again")
        return None
    return found


# ---------------------------------------------------------------------------------------------
# What learns, and on what


def compute_dtype(config, device):
    name = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return getattr(torch, name)


def set_learning(model, learns, lr):
    """Let the parts in `learns` learn and freeze all else. Returns [(parameters, rate)]."""
    model.requires_grad_(False).eval()  # frozen means frozen: no dropout there either
    groups = []
    for entry in learns:
        part, _, rate = entry.partition("=")
        named = [
            (n, p) for n, p in model.named_parameters() if n == part or n.startswith(part + ".")
        ]
        modules = dict(model.named_modules())
        if part not in modules and not named:
            parts = ", ".join(name for name in modules if name and name.count(".") < 2)
            raise UserError(f"learn {entry!r}: no such part; one of {parts}")
        try:
            groups.append(([p for _, p in named], float(rate) if rate else lr))
        except ValueError:
            raise UserError(f"learn {entry!r}: want a part, or part=rate") from None
        for _, parameter in named:
            parameter.requires_grad_(True)
        if part in modules:
            modules[part].train()
    return groups


def make_optimizer(config, groups, device):
    """AdamW over [(parameters, rate)], matrices with weight decay and vectors without; None where
    there is nothing to learn (an identity projector)."""
    parts = []
    for parameters, rate in groups:
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        decays = ((matrices, config.weight_decay), (vectors, 0.0))
        parts += [
            {"params": params, "weight_decay": decay, "highest_lr": rate, "lr": rate}
            for params, decay in decays
            if params
        ]
    if not parts:
        return None
    return torch.optim.AdamW(parts, betas=(0.9, config.beta2), fused=device.type == "cuda")


def stored_features(config, dataset, splits, model, device):
    """The features of both splits, computed if need be; (None, None) where frames are wanted,
    because the tower learns or --features=live."""
    tower = getattr(model, "tower", None)
    learns = tower is not None and any(p.requires_grad for p in tower.parameters())
    if tower is None or learns or config.features == "live":
        return None, None
    stored = []
    for split in splits:
        if dataset.count(split, "frames"):
            features.store(dataset, split, model, device)
        stored.append(features.open_stored(dataset, split, model))
    return stored


def wrap(model, config, processes, batches):
    """The model under torch.compile and DDP, as asked for."""
    device = processes.device
    if config.compile == "on" or (config.compile == "" and device.type == "cuda"):
        model = torch.compile(model)
    if processes.world > 1:
        devices = [device.index] if device.type == "cuda" else None
        # a batch of texts leaves the projector out, an early layer the tower's last blocks
        unused = isinstance(batches, SampleBatches)
        model = DDP(model, devices, broadcast_buffers=False, find_unused_parameters=unused)
    return model


def check_backends(config, model, device):
    """Refuse kernels that were asked for by name and cannot run here."""
    if getattr(model, "gpt", None) is not None:
        try:
            model.gpt.backends(compute_dtype(config, device))
        except ValueError as error:
            raise UserError(str(error)) from None
