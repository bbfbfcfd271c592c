"""
How a phase is made ready: its model, what of it learns, how it is saved. What it starts from:
parents.py.

Which phases there are is a table in train.py; this file knows by name only the two that every model
with eyes and words is put together from, and phase 3, with which a template is saved.
"""

import math
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import checkpoint
import data
import features
import lora
import vision
from batches import SampleBatches
from config import UserError
from dino import DINO
from files import append_log, locked
from fused import keep_memory
from model import GPT, BabyLLaVA, GPTConfig, Projector, projector_fault

DRAWN = ("toy", "toy_chat", "toy_v2")  # sources that need nothing but themselves
# knobs that concern phases 2 and 3, `init` also phase 1
LATER_KNOBS = ("init", "lora_rank", "lora_alpha")
# knobs that concern all of them
EVERY_PHASE = ("warmup", "weight_decay", "beta2", "grad_clip", "seed", "dtype")


@dataclass(frozen=True)
class Phase:
    """A row of the table."""

    learns: tuple  # the parts that do, by prefixes of their names; "tower=2e-4": at its own rate
    batches: type  # what it reads, see batches.py
    splits: tuple  # to train on, and, where it is watched by its loss, to validate on
    make: object  # make(settings, dataset, parents): its model
    watch: object  # watch(run): {measure: value} for the log
    starts_from: tuple = ()  # the phases before
    inherited: tuple = ()  # knobs that decide what is made, which all later phases inherit
    knobs: tuple = ()  # other knobs that concern it
    unit: str = "tokens/s"

    def own_knobs(self, name):
        """The knobs that this phase must be resumed with as it was begun."""
        rates = tuple(f"{name}_{quantity}" for quantity in ("steps", "lr", "batch"))
        return self.inherited + self.knobs + rates + EVERY_PHASE


@dataclass
class Processes:
    """Who this process is among those that train together, and what it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self):
        return self.rank == 0

    def print(self, line):
        if self.is_first:
            tqdm.write(line)

    def record(self, log, **entry):
        if self.is_first:
            append_log(log, entry)

    def wait(self):
        if self.world > 1:
            dist.barrier()


@dataclass
class Run:
    """A phase that is set up: all that the loop needs."""

    settings: object  # train.Config
    name: str
    dataset: object  # data.Data
    processes: Processes
    parents: dict
    decided: dict  # {knob: value} that later phases inherit
    raw_model: torch.nn.Module  # to save and evaluate; `model` is the same under compile and DDP
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    train_batches: object
    val_batches: object
    start: int
    steps: int
    batch: int
    skipped: int = 0  # steps whose gradient was not finite

    @property
    def path(self):
        return Path(self.settings.out) / f"{self.name}.pt"

    @property
    def learning(self):
        return [p for p in self.raw_model.parameters() if p.requires_grad]

    def autocast(self):
        dtype = compute_dtype(self.settings, self.processes.device)
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype != torch.float32)


def find_processes(settings):
    """This process among torchrun's, or the only one there is."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = checkpoint.choose_device(settings.device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        keep_memory()
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        patience = timedelta(minutes=settings.patience)
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=patience))
            own = meet(store, rank, world, patience)
            dist.init_process_group(
                backend, store=own, rank=rank, world_size=world, timeout=patience
            )
        except dist.DistError as error:
            raise UserError(
                f"rank {rank}: {world} processes did not come together within "
                f"{settings.patience:g} minutes (--patience): {str(error).splitlines()[0]}"
            ) from None
    return Processes(rank, world, device)


def meet(store, rank, world, patience):
    """A part of the store that these processes alone write to; waits for all of them.

    torchrun's store outlives a restart, and in it lies where processes listened that are dead by
    now. Who asks under a word just invented is alive, and so is who answers it: the first process
    answers all others with the name of the part, until each has written there that it is present.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", word)
        store.wait([f"answer/{word}"], patience)
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/present/{rank}", "")
        return dist.PrefixStore(name, store)
    name, absent, limit = word, set(range(1, world)), time.monotonic() + patience.total_seconds()
    while absent:
        if time.monotonic() > limit:
            raise dist.DistStoreError(f"ranks {sorted(absent)} did not come")
        for other in absent:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
        absent = {other for other in absent if not store.check([f"{name}/present/{other}"])}
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def is_about_others(error):
    """Whether an error of a collective says that another process is gone or silent."""
    signs = ("gloo", "Connection closed by peer", "Connection reset", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def draw_if_missing(directory):
    """Draw a drawn world that is not there yet. Of several processes that want it the first draws,
    and the others wait for its lock: on the file system, where nothing times out."""
    source, meta = str(directory).removeprefix("data/"), Path(directory) / "meta.json"
    if source in DRAWN and not meta.exists():
        Path("data").mkdir(exist_ok=True)
        with locked(f"data/.{source}.lock"):
            if not meta.exists():
                data.prepare(source, [])


# ---------------------------------------------------------------------------------------------
# How each model is made


def new_tower(settings, size):
    """A ViT, or with conv_stages a ConvNeXt, for frames of size x size pixels."""
    if settings.conv_stages:
        tower = vision.ConvNeXt(settings.conv_stages, settings.vision_width, settings.patch)
        if tower.fault(size, -1):
            raise UserError(tower.fault(size, -1))
        return tower
    sizes = (settings.patch, settings.vision_width, settings.vision_depth, settings.vision_heads)
    if size % settings.patch or settings.vision_width % settings.vision_heads:
        raise UserError(
            f"frames of {size} pixels in patches of {settings.patch}, "
            f"vision_width {settings.vision_width} over vision_heads {settings.vision_heads}: "
            "neither division may leave a rest"
        )
    return vision.ViT(size, *sizes)


def new_dino(settings, dataset, parents):
    student, teacher = (new_tower(settings, dataset.image_format.size) for _ in range(2))
    return DINO(
        student,
        teacher,
        settings.prototypes,
        settings.local_views,
        settings.teacher_temperature,
        settings.momentum,
    )


def new_gpt(settings, dataset, parents):
    sizes = GPTConfig(
        vocab_size=dataset.tokenizer.vocab_size,
        block_size=settings.block_size,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        n_embd=settings.n_embd,
        n_kv_head=settings.n_kv_head,
        n_hidden=settings.n_hidden,
        dropout=settings.dropout,
        attention=settings.attention,
        norm=settings.norm,
    )
    if sizes.fault():
        raise UserError(sizes.fault())
    return BabyLLaVA(GPT(sizes), image_token=dataset.tokenizer.image)


def new_projector(settings, dataset, parents):
    """Tower and GPT of the phases before, and a new projector between them."""
    backends = {"attention": settings.attention, "norm": settings.norm}
    parent = with_gpt(parents["phase0"], block_size=settings.block_size)
    gpt = checkpoint.build(parent, **backends).model.gpt
    tower = checkpoint.build(parents["vision"]).model.tower
    if settings.extra_stage:
        tower = with_extra_stage(tower, settings.extra_stage)
    if tower.fault(dataset.image_format.size, settings.select_layer):
        raise UserError(tower.fault(dataset.image_format.size, settings.select_layer))
    side = int(tower.num_patches(dataset.image_format.size) ** 0.5)
    if side % settings.image_pool:
        raise UserError(
            f"image_pool {settings.image_pool}: {side} x {side} patches do not divide into that"
        )
    fault = projector_fault(settings.projector, tower.width, gpt.config.n_embd)
    if fault:
        raise UserError(f"--projector: {fault}")
    return BabyLLaVA(
        gpt,
        Projector(settings.projector, tower.width, gpt.config.n_embd),
        tower,
        dataset.tokenizer.image,
        settings.select_layer,
        settings.keep_cls,
        settings.image_attention,
        tiled=bool(dataset.image_format.canvases),
        image_pool=settings.image_pool,
    )


def with_extra_stage(tower, depth):
    """A ConvNeXt with one more stage, random, on top: ConvLLaVA's fifth."""
    if not isinstance(tower, vision.ConvNeXt):
        raise UserError("extra_stage: only a ConvNeXt has stages")
    arguments = tower.arguments | {"depths": [*tower.arguments["depths"], depth]}
    larger = vision.ConvNeXt(**arguments)
    larger.load_state_dict(larger.state_dict() | tower.state_dict())
    return larger


def with_gpt(parent, **sizes):
    """A checkpoint's dict with some of its GPT's sizes replaced, those that are not None: such a
    knob did not decide it."""
    gpt = parent["parts"]["gpt"] | {k: v for k, v in sizes.items() if v is not None}
    return parent | {"parts": parent["parts"] | {"gpt": gpt}}


def from_phase_before(settings, dataset, parents):
    """The model of the phase before, with this phase's dropout."""
    (parent,) = parents.values()
    own = {"dropout": settings.dropout}
    if "block_size" in parent["decided"]:  # else it is another's, and keeps its own
        own["block_size"] = settings.block_size
    parent = with_gpt(parent, **own)
    model = checkpoint.build(parent, attention=settings.attention, norm=settings.norm).model
    if dataset.image_format.canvases:
        model.use_tiles()
    return model


def make_model(settings, phase, dataset, parents):
    """The model of a phase, before anything of it was trained."""
    make = from_phase_before if list(parents) == ["init"] else phase.make
    model = make(settings, dataset, parents)
    rank = getattr(settings, "lora_rank", 0) if "lora_rank" in phase.knobs else 0
    if rank:
        lora.add(model.gpt, rank, settings.lora_alpha)
    if isinstance(model, BabyLLaVA):
        model.gpt.recompute = settings.recompute
    return model


def restore(model, resume):
    """Give a model what a killed run of its phase had learnt."""
    if lora.is_in(model):  # the weights in the file have the factors merged: keep those before
        kept = lora.merged_into(model)
        state = {n: w for n, w in resume["weights"].items() if n not in kept} | resume["lora"]
        model.load_state_dict(model.state_dict() | state)
    else:
        model.load_state_dict(resume.get("dino") or resume["weights"])


def progress_of(resume):
    """Where a run is: the step it starts from, and how many it has skipped."""
    resume = resume or {"step": 0}
    return {"start": resume["step"], "skipped": resume.get("skipped", 0)}


# ---------------------------------------------------------------------------------------------
# What learns, and on what


def compute_dtype(settings, device):
    name = settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return getattr(torch, name)


def parse_part(entry, lr):
    """(part, rate) of "tower" or "tower=2e-4". Raises UserError."""
    part, has_rate, rate = entry.partition("=")
    try:
        rate = float(rate) if has_rate else lr
    except ValueError:
        rate = math.nan
    if not part or not (math.isfinite(rate) and rate >= 0):
        raise UserError(f"learn {entry!r}: want a part, or part=rate")
    return part, rate


def set_learning(model, learns, lr):
    """Let the parts in `learns` learn and freeze all else. Returns [(parameters, rate)]."""
    model.requires_grad_(False).eval()  # frozen means frozen: no dropout there either
    modules, groups, with_lora = dict(model.named_modules()), [], lora.is_in(model)
    for entry in learns:
        part, rate = parse_part(entry, lr)
        named = {n: p for n, p in model.named_parameters() if (n + ".").startswith(part + ".")}
        if part == "projector" and getattr(model, "tiled", False):
            named["image_newline"] = model.image_newline
        if with_lora:  # of the GPT, factors alone
            named = {n: p for n, p in named.items() if lora.is_factor(n) or n[:4] != "gpt."}
            if not named:
                raise UserError(f"learn {entry!r}: with lora_rank nothing of it learns")
        if part not in modules and not named:
            parts = ", ".join(name for name in modules if name and name.count(".") < 2)
            raise UserError(f"learn {entry!r}: no such part; one of {parts}")
        if any(parameter.requires_grad for parameter in named.values()):
            raise UserError(f"learn {entry!r}: it is part of another that learns already")
        for parameter in named.values():
            parameter.requires_grad_(True)
        if part in modules:
            modules[part].train()
        groups.append((list(named.values()), rate))
    return groups


def make_optimizer(settings, groups, device):
    """AdamW over [(parameters, rate)], matrices with weight decay and vectors without; None where
    there is nothing to learn (an identity projector)."""
    parts = []
    for parameters, rate in groups:
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        decays = ((matrices, settings.weight_decay), (vectors, 0.0))
        parts += [
            {"params": params, "weight_decay": decay, "highest_lr": rate, "lr": rate}
            for params, decay in decays
            if params
        ]
    if not parts:
        return None
    return torch.optim.AdamW(parts, betas=(0.9, settings.beta2), fused=device.type != "mps")


def stored_features(settings, dataset, splits, model, device):
    """The features of both splits, computed if need be; (None, None) where frames are wanted,
    because the tower learns or --features=live."""
    tower = getattr(model, "tower", None)
    learns = tower is not None and any(p.requires_grad for p in tower.parameters())
    if tower is None or learns or settings.features == "live":
        return None, None
    return [
        features.store(dataset, split, model, device) if dataset.count(split, "frames") else None
        for split in splits
    ]


def wrap(model, settings, processes, batches):
    """The model under torch.compile and DDP, as asked for."""
    device = processes.device
    if settings.compile == "on" or (settings.compile == "" and device.type == "cuda"):
        model = torch.compile(model)
    if processes.world > 1:
        devices = [device.index] if device.type == "cuda" else None
        # a batch of texts leaves the projector out, an early layer the tower's last blocks
        unused = isinstance(batches, SampleBatches)
        model = DDP(model, devices, broadcast_buffers=False, find_unused_parameters=unused)
    return model


def check_backends(settings, model, device):
    """Refuse kernels that were asked for by name and cannot run here."""
    if getattr(model, "gpt", None) is not None:
        try:
            model.gpt.backends(compute_dtype(settings, device))
        except ValueError as error:
            raise UserError(str(error)) from None


# ---------------------------------------------------------------------------------------------
# Checking a run, and saving it


def check_steps(run, taken):
    """Whether any of the steps taken, (step, rows, loss, norm of the gradient), was skipped because
    its loss or gradient is not finite. Raises UserError where more are than may be skipped."""
    if not taken:
        return False
    finite = torch.stack([loss + norm for _, _, loss, norm in taken]).isfinite().tolist()
    bad = [(step, rows) for (step, rows, _, _), good in zip(taken, finite) if not good]
    for step, rows in bad:
        run.skipped += 1
        if run.skipped > run.settings.skip_bad_steps:
            some = ", ".join(map(str, rows.tolist()))
            held = f"{run.path} holds the last good step" if run.path.exists() else "none was saved"
            raise UserError(
                f"{run.name} step {step}: the loss or the gradient of rows {some} is not finite; "
                f"{held}; lower {run.name}_lr, mend the data, or give --skip_bad_steps"
            )
        log = Path(run.settings.out) / "log.jsonl"
        run.processes.record(log, phase=run.name, step=step, skipped=rows.tolist())
    return bool(bad)


def check_weights(run, step):
    """A run that has gone to NaN stops before it is saved over a good one."""
    if not all(bool(parameter.isfinite().all()) for parameter in run.learning):
        raise UserError(f"{run.name} step {step}: a weight is not finite; lower {run.name}_lr")


def save(run, step):
    """Write the checkpoint of a run; see checkpoint.py for what is in it."""
    if not run.processes.is_first:
        return
    check_weights(run, step)
    is_dino, model = isinstance(run.raw_model, DINO), run.raw_model
    if is_dino:
        model = BabyLLaVA(None, tower=run.raw_model.teacher["backbone"])
    state, factors = lora.merge(model) if lora.is_in(model) else (None, None)
    contents = checkpoint.describe(
        run.settings,
        run.name,
        run.dataset,
        model,
        step,
        done=step == run.steps,
        parents={name: parent["digest"] for name, parent in run.parents.items()},
        decided=run.decided,
        state=state,
    )
    if run.name == "phase3":
        contents["template"] = run.dataset.meta.get("template")
    if is_dino:
        contents["dino"] = run.raw_model.state_dict()
    if factors:
        contents["lora"] = factors
    if run.optimizer:
        contents["optimizer"] = run.optimizer.state_dict()
    if run.skipped:
        contents["skipped"] = run.skipped
    checkpoint.save(run.path, contents)
