"""
Grow a small vision-language model from what one infant saw and heard, phase by phase.

    python train.py configs/toy.py                           # the whole recipe on the toy world
    python train.py configs/toy.py --phase 1                 # one phase of it
    python train.py --phase 1                                # the same as configs/phase1.py
    torchrun --nproc_per_node=8 train.py configs/phase1.py   # on eight GPUs

Each phase writes out/<run>/<phase>.pt and starts from the ones before. Run again, an interrupted
phase goes on where it was last saved, to the same bits on a CPU; a finished one is left alone.
A new phase, or another set of parts that learn, is a row of PHASES below.
"""

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import config
import data
import eval as evaluation
import weights
from batches import ClipBatches, SampleBatches, TextBatches
from config import UserError, knob
from dino import DINO
from files import only_one, trim_log
from model import BabyLLaVA
from phases import (
    Phase,
    Processes,
    carry_on,
    check_backends,
    compute_dtype,
    find_parents,
    find_resume,
    inherit,
    introduce,
    make_optimizer,
    new_dino,
    new_gpt,
    set_learning,
    stored_features,
    wrap,
)


@dataclass
class Config(config.Knobs):
    phase: str = knob("all", choices=("0", "1", "2", "3", "all"), once=True)  # all: and evaluate
    tower: str = knob("both", choices=("both", "vision", "language"))  # narrows phase 0
    data: str = "data/toy"  # a folder that data.py wrote; data/toy is drawn if it is not there
    out: str = "out/toy"  # where checkpoints, log.jsonl and results go
    vision_weights: str = ""  # a tower to use as it is (.pth, .safetensors); empty, none: train one
    # the tower
    patch: int = knob(8, low=1, high=1024)  # pixels a side of a patch: P = (S / patch)^2
    vision_width: int = knob(128, low=1, high=1 << 16)  # E
    vision_depth: int = knob(4, low=1, high=1000)  # blocks
    vision_heads: int = knob(4, low=1, high=1 << 12)  # 128 / 4 = 32 wide each
    prototypes: int = knob(128, low=1, high=1 << 20)  # K, outputs of DINO's head
    local_views: int = knob(0, low=0, high=100)  # small crops, beside the two large ones
    teacher_temperature: float = knob(0.04, low=1e-4, high=10.0)  # sharpening; higher flattens
    momentum: float = knob(0.99, low=0.0, high=1.0)  # of the teacher, at first; it climbs to 1
    # what the projector is given of the tower, and the projector
    select_layer: int = knob(-1, high=-1)  # -1: last block, normed; -2: the one before, not normed
    keep_cls: bool = False  # hand the projector the CLS token too, before the patches
    projector: str = "mlp2x_gelu"  # linear, mlpNx_gelu, identity
    image_attention: str = knob("causal", choices=("causal", "full"))  # full: images see themselves
    features: str = knob("stored", choices=("stored", "live"))  # live: the tower runs in each step
    # the language model
    n_layer: int = knob(4, low=1, high=1000)  # blocks
    n_head: int = knob(4, low=1, high=1 << 12)  # heads
    n_kv_head: int = knob(0, low=0, high=1 << 12)  # key and value heads; 0: as many as n_head
    n_embd: int = knob(128, low=2, high=1 << 16)  # C
    n_hidden: int = knob(0, low=0, high=1 << 18)  # width of the MLP; 0: 8/3 of n_embd, rounded up
    block_size: int = knob(128, low=2, high=1 << 20)  # the longest sequence: image tokens and words
    dropout: float = knob(0.0, low=0.0, high=0.99)  # in the GPT, while it learns; differs by rank
    # steps, learning rate, and batch over all processes, for each thing that is trained
    vision_steps: int = knob(1500, low=1)  # DINO
    vision_lr: float = knob(1e-3, low=0.0)  # at its highest
    vision_batch: int = knob(32, low=1, high=1 << 20)  # frames
    phase0_steps: int = knob(300, low=1)  # GPT
    phase0_lr: float = knob(1e-3, low=0.0)  # at its highest
    phase0_batch: int = knob(16, low=1, high=1 << 20)  # rows of block_size tokens
    phase1_steps: int = knob(150, low=1)  # projector
    phase1_lr: float = knob(3e-3, low=0.0)  # at its highest
    phase1_batch: int = knob(32, low=1, high=1 << 20)  # samples
    phase2_steps: int = knob(1200, low=1)  # projector and GPT
    phase2_lr: float = knob(3e-3, low=0.0)  # at its highest
    phase2_batch: int = knob(32, low=1, high=1 << 20)  # samples
    phase2_learn: tuple[str, ...] = ()  # parts, as projector gpt tower=2e-4; empty: see PHASES
    phase3_steps: int = knob(600, low=1)  # the same, on conversations
    phase3_lr: float = knob(1e-3, low=0.0)  # at its highest
    phase3_batch: int = knob(32, low=1, high=1 << 20)  # samples
    phase3_learn: tuple[str, ...] = ()  # as phase2_learn
    grad_accum: int = knob(1, low=1, high=1 << 20)  # micro-batches of each process's share
    warmup: float = knob(0.03, low=0.0, high=1.0)  # share of the steps; then a cosine to 0
    weight_decay: float = knob(0.1, low=0.0, high=10.0)  # of matrices; vectors are not decayed
    beta2: float = knob(0.95, low=0.0, high=0.99999)  # AdamW's; beta1 is 0.9
    clip: float = knob(1.0, low=1e-6)  # largest norm of the gradient
    # the machine
    seed: int = knob(1, low=0, high=2**32 - 1)  # of weights, order and dropout
    device: str = ""  # cpu, cuda, cuda:1, mps; empty: cuda where there is one
    dtype: str = knob("", choices=("", "float32", "bfloat16"))  # empty: bfloat16 on cuda
    compile: str = knob("", choices=("", "on", "off"))  # torch.compile; empty: on for cuda
    attention: str = knob("auto", choices=("auto", "triton", "sdpa", "reference"))  # see kernels.py
    norm: str = knob("auto", choices=("auto", "triton", "torch", "reference"))  # see kernels.py
    # how often, in steps
    log_every: int = knob(10, low=1)  # a line in log.jsonl
    eval_every: int = knob(250, low=1)  # validation loss, or the tower's probes
    eval_batches: int = knob(20, low=1)  # of the validation set, always the same samples
    save_every: int = knob(100, low=1)  # what an interruption can cost at most
    evaluate: bool = True  # after phase all: run eval.py on the last checkpoint


# ---------------------------------------------------------------------------------------------
# The phases


def watch_tower(run):
    metrics = evaluation.probe(run.raw_model.teacher["backbone"], run.dataset)
    return metrics or {"frames": run.train_batches.rows}


def watch_loss(run):
    limit = run.config.eval_batches * run.batch
    processes = (run.processes.rank, run.processes.world)
    image_format = run.dataset.image_format
    loss = evaluation.val_loss(run.raw_model, run.val_batches, image_format, limit, *processes)
    return {"val_loss": loss}


TOWER = ("patch", "vision_width", "vision_depth", "vision_heads", "vision_weights")
SELF_DISTILLATION = ("prototypes", "local_views", "teacher_temperature", "momentum")
SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "block_size")
SEEING = ("select_layer", "keep_cls", "projector", "image_attention")
# fmt: off
PHASES = {
    "vision": Phase(("student",), ClipBatches, ("train", "val"), new_dino, (), TOWER,
                    SELF_DISTILLATION, watch_tower, "frames/s"),
    "phase0": Phase(("gpt",), TextBatches, ("train", "val"), new_gpt, (), SIZES, ("dropout",),
                    watch_loss),
    "phase1": Phase(("projector",), SampleBatches, ("train", "val"), introduce,
                    ("vision", "phase0"), SEEING, (), watch_loss),
    "phase2": Phase(("projector", "gpt"), SampleBatches, ("train", "val"), carry_on,
                    ("phase1",), (), ("dropout", "phase2_learn"), watch_loss),
    "phase3": Phase(("projector", "gpt"), SampleBatches, ("chat_train", "chat_val"), carry_on,
                    ("phase2",), (), ("dropout", "phase3_learn"), watch_loss),
}
# fmt: on
def choose_phases(config, dataset):
    """The names in PHASES that --phase and --tower ask for; of `all`, those that the data has
    something to learn from for."""
    narrowed = {"both": ("vision", "phase0"), "vision": ("vision",), "language": ("phase0",)}
    if config.phase == "0":
        return narrowed[config.tower]
    if config.phase != "all":
        return (f"phase{config.phase}",)
    bins = {ClipBatches: "frames", TextBatches: "text", SampleBatches: "samples"}
    return tuple(
        name
        for name, row in PHASES.items()
        if all(dataset.count(split, bins[row.batches]) for split in row.splits)
    )


# ---------------------------------------------------------------------------------------------
# Setting a phase up


@dataclass
class Run:
    """A phase that is set up: all that the loop needs."""

    config: Config
    name: str
    dataset: data.Data
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

    @property
    def path(self):
        return Path(self.config.out) / f"{self.name}.pt"

    @property
    def learning(self):
        return [p for p in self.raw_model.parameters() if p.requires_grad]

    def autocast(self):
        dtype = compute_dtype(self.config, self.processes.device)
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype != torch.float32)


def set_up(config, name, dataset, processes):
    """The Run of a phase: from nothing, from the phases before, or from where it stopped; None
    where it is done."""
    row, device = PHASES[name], processes.device
    steps, lr, batch = (getattr(config, f"{name}_{knob}") for knob in ("steps", "lr", "batch"))
    if batch % (processes.world * config.grad_accum):
        raise UserError(
            f"{name}_batch {batch} does not divide into {processes.world} processes x "
            f"grad_accum {config.grad_accum}"
        )
    parents = find_parents(config, row, dataset)
    decided = inherit(config, parents) | {name: getattr(config, name) for name in row.shape}
    resume = find_resume(config, name, row, dataset, parents, processes.say)
    if resume and resume["done"]:
        processes.say(f"{name}: done already, {config.out}/{name}.pt")
        return None
    torch.manual_seed(config.seed)
    raw_model = row.make(config, dataset, parents)
    if resume:
        raw_model.load_state_dict(resume.get("dino") or resume["weights"])
    raw_model.to(device)
    check_backends(config, raw_model, device)

    groups = set_learning(raw_model, getattr(config, f"{name}_learn", ()) or row.learns, lr)
    optimizer = make_optimizer(config, groups, device)
    if optimizer is None:
        processes.say(f"{name}: nothing in it can learn; it is saved as it is")
        steps = 0
    stored = stored_features(config, dataset, row.splits, raw_model, device)
    train_batches, val_batches = (
        row.batches(dataset, split, batch, config.seed, raw_model, kept)
        for split, kept in zip(row.splits, stored)
    )
    model = wrap(raw_model, config, processes, train_batches) if optimizer else raw_model
    if resume:
        optimizer.load_state_dict(resume["optimizer"])
    start = resume["step"] if resume else 0
    return Run(
        config,
        name,
        dataset,
        processes,
        parents,
        decided,
        raw_model,
        model,
        optimizer,
        train_batches,
        val_batches,
        start,
        steps,
        batch,
    )


# ---------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, steps, warmup):
    """The share of its highest rate at a step: a climb from 0, then half a cosine back to 0."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))


def micro_batches(run, step):
    """This process's share of a step's batch, in grad_accum pieces."""
    rows, length = run.train_batches.plan(step)
    share = len(rows) // (run.processes.world * run.config.grad_accum)
    first = run.processes.rank * share * run.config.grad_accum
    starts = range(first, first + share * run.config.grad_accum, share)
    return [run.train_batches.read(rows[i : i + share], length, i) for i in starts]


def take_step(run, step):
    """Forward, backward, update. Returns the loss, mean over all targets of the whole batch."""
    world, config = run.processes.world, run.config
    for group in run.optimizer.param_groups:
        group["lr"] = group["highest_lr"] * learning_rate(step, run.steps, config.warmup)
    # All randomness of a step follows from its number, so a resumed run repeats none of it.
    # Dropout draws other masks on each rank, so results differ by rank where it is on.
    torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + run.processes.rank)
    batches = micro_batches(run, step)
    total = torch.tensor(float(sum(batch.count for batch in batches)), device=run.processes.device)
    if world > 1:
        dist.all_reduce(total)
    loss_sum = torch.zeros((), device=run.processes.device)
    for i, batch in enumerate(batches):
        run.model.require_backward_grad_sync = i == len(batches) - 1  # DDP: reduce once a step
        inputs = run.raw_model.inputs(batch, run.dataset.image_format, config.seed, step)
        with run.autocast():
            _, loss = run.model(*inputs)
        # Every target counts the same, however they fell to micro-batches and processes; x world
        # because DDP divides by it.
        loss = loss * (batch.count / total) * world
        loss.backward()
        loss_sum += loss.detach() / world
    torch.nn.utils.clip_grad_norm_(run.learning, config.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.raw_model.after_step(step / run.steps)
    return loss_sum


def loop(run):
    """Train from run.start to run.steps. It goes round once more than there are steps, so that the
    last evaluation and save are no second copy."""
    config, processes, log = run.config, run.processes, Path(run.config.out) / "log.jsonl"
    progress = tqdm(total=run.steps, initial=run.start, desc=run.name, disable=processes.rank > 0)
    clock, units = time.perf_counter(), 0  # since when, and how much was seen since
    for step in range(run.start, run.steps + 1):
        is_last = step == run.steps
        if step % config.eval_every == 0 or is_last:
            with run.autocast():
                metrics = PHASES[run.name].watch(run)
            record(log, processes, phase=run.name, step=step, **metrics)
            values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            processes.say(f"{run.name} step {step}: {values}")
            clock, units = time.perf_counter(), 0
        if is_last or (step > run.start and step % config.save_every == 0):
            save(run, step)
        if is_last:
            break
        loss = take_step(run, step)
        progress.update()
        rows, length = run.train_batches.plan(step)
        units += len(rows) * (length if PHASES[run.name].unit == "tokens/s" else 1)
        if step % config.log_every == 0:
            if processes.world > 1:
                dist.all_reduce(loss)
            check_finite([loss], run, step)
            speed = {PHASES[run.name].unit: round(units / (time.perf_counter() - clock))}
            progress.set_postfix(loss=f"{float(loss):.3f}", **speed)
            lr = run.optimizer.param_groups[0]["lr"]
            record(
                log,
                processes,
                phase=run.name,
                step=step,
                loss=round(float(loss), 5),
                lr=lr,
                **speed,
            )
    progress.close()


def record(path, processes, **entry):
    """Append a line to the log."""
    if processes.is_first:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def check_finite(tensors, run, step):
    """A run that has gone to NaN stops before it is saved over a good one."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise UserError(
            f"{run.name} step {step}: the loss or a weight is not finite; lower {run.name}_lr. "
            f"{run.path} holds the last good step, if any"
        )


def save(run, step):
    """Write the checkpoint of a run; see checkpoint.py for what is in it."""
    if not run.processes.is_first:
        return
    check_finite(run.learning, run, step)
    is_dino, model = isinstance(run.raw_model, DINO), run.raw_model
    if is_dino:
        model = BabyLLaVA(None, tower=run.raw_model.teacher["backbone"])
    contents = checkpoint.describe(
        run.config, run.name, run.dataset, model, step, step == run.steps
    )
    contents["decided"] = run.decided
    contents["parents"] = {name: parent["digest"] for name, parent in run.parents.items()}
    if is_dino:
        contents["dino"] = run.raw_model.state_dict()
    if run.optimizer:
        contents["optimizer"] = run.optimizer.state_dict()
    checkpoint.save(run.path, contents)


# ---------------------------------------------------------------------------------------------
# All phases


def import_tower(config, dataset, processes):
    """Phase 0 for a tower that comes from a file: save it as it is, unless it is there already."""
    path, source = Path(config.out) / "vision.pt", Path(config.vision_weights)
    tower = weights.load_tower(source)  # complains if there is none
    with open(source, "rb") as file:
        parents = {"vision_weights": hashlib.file_digest(file, "sha256").hexdigest()}
    # the other knobs of TOWER did not make this one: None contradicts them all
    decided = dict.fromkeys(TOWER) | {"vision_weights": config.vision_weights}
    if path.exists() and checkpoint.read(path)["parents"] == parents:
        processes.say(f"vision: the tower of {source}, as it was, {path}")
    elif processes.is_first:
        model = BabyLLaVA(None, tower=tower)
        contents = checkpoint.describe(config, "vision", dataset, model, step=0, done=True)
        checkpoint.save(path, contents | {"parents": parents, "decided": decided})
        processes.say(f"vision: the tower of {source}, as it is")


def train_phase(config, name, dataset, processes):
    """Train one phase to its end."""
    run = set_up(config, name, dataset, processes)
    if run is None:
        return
    count = sum(p.numel() for p in run.learning)
    whole = sum(p.numel() for p in run.raw_model.parameters())
    passes = run.steps * run.batch / run.train_batches.rows
    dtype = compute_dtype(config, processes.device)
    line = f"{name}: {count:,} of {whole:,} parameters learn; {run.steps} steps x {run.batch} rows"
    line += f" = {passes:.1f} passes; {processes.device}, {str(dtype)[6:]}"
    if isinstance(run.raw_model, BabyLLaVA):
        line += ", attention {}, norm {}".format(*run.raw_model.gpt.backends(dtype))
    processes.say(line)
    if processes.is_first:
        trim_log(Path(config.out) / "log.jsonl", name, run.start)
    loop(run)


def load_settings(argv):
    """The Config of the command line; `--phase 1` without a file means configs/phase1.py."""
    files, flags = config.split_arguments(argv)
    settings = config.load(Config, argv, __doc__)
    path = Path(__file__).parent / "configs" / f"phase{settings.phase}.py"
    if not files and "phase" in settings.given and path.exists():
        print(f"no config file given: taking configs/{path.name}")
        settings = config.load(Config, [str(path), *flags], __doc__)
    return settings


def find_processes(settings):
    """This process among torchrun's, or the only one there is."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = checkpoint.choose_device(settings.device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, world, device)


def train(settings, processes):
    """All phases that are asked for, and the tests after the last."""
    if processes.is_first and settings.data == "data/toy" and not Path("data/toy").exists():
        data.prepare("toy", [])
    processes.wait()
    dataset = data.Data(settings.data)
    names = choose_phases(settings, dataset)
    for name in names:
        # a phase changes what it inherits, and the next one must not take that for given
        config_of_phase = Config(**asdict(settings))
        config_of_phase.given = settings.given
        foreign = settings.vision_weights not in ("", "none")
        if name == "vision" and foreign:
            import_tower(config_of_phase, dataset, processes)
        else:
            train_phase(config_of_phase, name, dataset, processes)
        processes.wait()  # the next phase reads what the first process has written
    if settings.phase == "all" and settings.evaluate and processes.is_first:
        last = f"--checkpoint={settings.out}/{names[-1]}.pt"
        flags = [last, f"--data={settings.data}", f"--device={settings.device}"]
        if names[-1] != "vision":
            evaluation.main(flags)


def main(argv):
    settings = load_settings(argv)
    processes = find_processes(settings)
    try:
        if processes.is_first:
            with only_one(settings.out, "training"):
                train(settings, processes)
        else:
            train(settings, processes)
    finally:
        if processes.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main)
