"""
Grow a small vision-language model from what one infant saw and heard, phase by phase.

    python train.py configs/toy.py                           # the whole recipe on the toy world
    python train.py configs/toy.py --phase 1                 # one phase of it
    python train.py --phase 1                                # the same as configs/phase1.py
    torchrun --nproc_per_node=8 train.py configs/phase1.py   # on eight GPUs

Each phase writes out/<run>/<phase>.pt and starts from the ones before. Run again, an interrupted
phase goes on where it was last saved, to the same bits on a CPU; a finished one is left alone.
A new phase is a row of PHASES below; other parts to learn are the knob phase1_learn and its like.
"""

import copy
import math
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import ahead
import config
import data
import eval as evaluation
import parents as start
import phases
import watch
from batches import ClipBatches, PairBatches, SampleBatches, TextBatches
from config import UserError, knob
from files import only_one, trim_log
from fused import return_memory
from model import BabyLLaVA
from phases import Phase


@dataclass
class Config(config.Knobs):
    phase: str = knob("all", choices=("0", "1", "2", "3", "all"), once=True)  # all: and evaluate
    tower: str = knob("both", choices=("both", "vision", "language"))  # narrows phase 0
    data: str = "data/toy"  # a folder that data.py wrote; a drawn world is drawn if not there
    out: str = "out/toy"  # where checkpoints, log.jsonl and results go
    init: str = ""  # where phases start whose parents are not in out: a run's folder, .pt or LLaVA
    vision_weights: str = ""  # a tower to use as it is, a file or folder; empty, none: train one
    language_weights: str = ""  # the folder of a language model to use as it is; empty: train one
    # the tower
    patch: int = knob(8, low=1, high=1024)  # pixels a side of a patch: P = (S / patch)^2
    vision_width: int = knob(128, low=1, high=1 << 16)  # E
    vision_depth: int = knob(4, low=1, high=1000)  # blocks
    vision_heads: int = knob(4, low=1, high=1 << 12)  # 128 / 4 = 32 wide each
    conv_stages: tuple[int, ...] = ()  # blocks of each stage of a ConvNeXt; empty: a ViT
    extra_stage: int = knob(0, low=0, high=100)  # blocks of one more, put on the trained ConvNeXt
    prototypes: int = knob(128, low=1, high=1 << 20)  # K, outputs of DINO's head
    local_views: int = knob(0, low=0, high=100)  # small crops, beside the two large ones
    teacher_temperature: float = knob(0.04, low=1e-4, high=10.0)  # sharpening; higher flattens
    momentum: float = knob(0.99, low=0.0, high=1.0)  # of the teacher, at first; it climbs to 1
    # what the projector is given of the tower, and the projector
    select_layer: int = knob(-1, high=-1)  # -1: last block, normed; -2: the one before, not normed
    keep_cls: bool = False  # hand the projector the CLS token too, before the patches
    image_pool: int = knob(1, low=1, high=64)  # 2: one image token of the mean of 2 x 2 patches
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
    phase0_steps: int = knob(150, low=1)  # GPT
    phase0_lr: float = knob(1e-3, low=0.0)  # at its highest
    phase0_batch: int = knob(16, low=1, high=1 << 20)  # rows of block_size tokens
    phase1_steps: int = knob(100, low=1)  # projector
    phase1_lr: float = knob(3e-3, low=0.0)  # at its highest
    phase1_batch: int = knob(32, low=1, high=1 << 20)  # samples
    phase1_learn: tuple[str, ...] = ()  # parts, as projector gpt tower=2e-4; empty: see PHASES
    phase2_steps: int = knob(2300, low=0)  # projector and GPT; 0: leave this phase out
    phase2_lr: float = knob(2e-3, low=0.0)  # at its highest
    phase2_batch: int = knob(16, low=1, high=1 << 20)  # samples
    phase2_learn: tuple[str, ...] = ()  # as phase1_learn
    phase3_steps: int = knob(600, low=1)  # the same, on conversations
    phase3_lr: float = knob(1e-3, low=0.0)  # at its highest
    phase3_batch: int = knob(32, low=1, high=1 << 20)  # samples
    phase3_learn: tuple[str, ...] = ()  # as phase1_learn
    lora_rank: int = knob(0, low=0, high=1 << 14)  # phases 2, 3: of the GPT only such factors learn
    lora_alpha: float = knob(16.0, low=0.0)  # their product counts alpha / rank times
    recompute: bool = False  # gradient checkpointing: less memory, a third more time
    grad_accum: int = knob(1, low=1, high=1 << 20)  # micro-batches of each process's share
    warmup: float = knob(0.03, low=0.0, high=1.0)  # share of the steps; then a cosine to 0
    weight_decay: float = knob(0.1, low=0.0, high=10.0)  # of matrices; vectors are not decayed
    beta2: float = knob(0.95, low=0.0, high=0.99999)  # AdamW's; beta1 is 0.9
    grad_clip: float = knob(1.0, low=1e-6)  # largest norm of the gradient
    # the machine
    seed: int = knob(1, low=0, high=2**32 - 1)  # of weights, order and dropout
    device: str = ""  # cpu, cuda, cuda:1, mps; empty: cuda where there is one
    dtype: str = knob("", choices=("", "float32", "bfloat16"))  # empty: bfloat16 on cuda
    compile: str = knob("", choices=("", "on", "off"))  # torch.compile; empty: on for cuda
    attention: str = knob("auto", choices=("auto", "triton", "sdpa", "reference"))  # see kernels.py
    norm: str = knob("auto", choices=("auto", "triton", "torch", "reference"))  # see kernels.py
    batches_ahead: int = knob(2, low=0, high=1000)  # made by a thread; 0: none, each when needed
    patience: float = knob(10.0, low=0.01, high=1e6)  # minutes that processes wait for each other
    # how often, in steps
    log_every: int = knob(10, low=1)  # a line in log.jsonl
    eval_every: int = knob(500, low=1)  # validation loss, or the tower's probes
    eval_batches: int = knob(20, low=1)  # of the validation set, always the same samples
    save_every: int = knob(250, low=1)  # what an interruption can cost at most
    skip_bad_steps: int = knob(0, low=0)  # so many whose gradient is not finite; then it stops
    evaluate: bool = True  # after phase all: run eval.py on the last checkpoint


# ---------------------------------------------------------------------------------------------
# The phases


PHASES = {
    "vision": Phase(
        learns=("student",),
        batches=ClipBatches,
        splits=("train",),
        make=phases.new_dino,
        watch=watch.tower,
        inherited=(
            "patch",
            "vision_width",
            "vision_depth",
            "vision_heads",
            "vision_weights",
            "conv_stages",
        ),
        knobs=("prototypes", "local_views", "teacher_temperature", "momentum"),
        unit="frames/s",
    ),
    "phase0": Phase(
        learns=("gpt",),
        batches=TextBatches,
        splits=("train", "val"),
        make=phases.new_gpt,
        watch=watch.loss,
        inherited=(
            "n_layer",
            "n_head",
            "n_kv_head",
            "n_embd",
            "n_hidden",
            "block_size",
            "language_weights",
        ),
        knobs=("dropout",),
    ),
    "phase1": Phase(
        learns=("projector",),
        batches=PairBatches,
        splits=("train", "val"),
        make=phases.new_projector,
        watch=watch.loss,
        starts_from=("vision", "phase0"),
        inherited=(
            "select_layer",
            "keep_cls",
            "image_pool",
            "projector",
            "image_attention",
            "extra_stage",
        ),
        knobs=("phase1_learn", "init"),
    ),
    "phase2": Phase(
        learns=("projector", "gpt"),
        batches=SampleBatches,
        splits=("train", "val"),
        make=phases.from_phase_before,
        watch=watch.loss,
        starts_from=("phase1",),
        knobs=("dropout", "phase2_learn", *phases.LATER_KNOBS),
    ),
    # of conversations, in splits of their own
    "phase3": Phase(
        learns=("projector", "gpt"),
        batches=SampleBatches,
        splits=("chat_train", "chat_val"),
        make=phases.from_phase_before,
        watch=watch.loss,
        starts_from=("phase2",),
        knobs=("dropout", "phase3_learn", *phases.LATER_KNOBS),
    ),
}


# ---------------------------------------------------------------------------------------------
# Setting a phase up


def set_up(settings, name, dataset, processes):
    """The Run of a phase, from its parents or from where it stopped; None where it is done."""
    phase, device = PHASES[name], processes.device
    steps, lr, batch = (getattr(settings, f"{name}_{what}") for what in ("steps", "lr", "batch"))
    if batch % (processes.world * settings.grad_accum):
        raise UserError(
            f"{name}_batch {batch} does not divide into {processes.world} processes x "
            f"grad_accum {settings.grad_accum}"
        )
    parents = start.find_parents(settings, name, PHASES, dataset, processes.print)
    decided = start.inherit(settings, parents)
    decided |= {own: getattr(settings, own) for own in phase.inherited}
    resume = start.find_resume(settings, name, phase, dataset, parents, processes.print)
    if resume and resume["done"]:
        processes.print(f"{name}: done already, {settings.out}/{name}.pt")
        return None
    torch.manual_seed(settings.seed)
    raw_model = phases.make_model(settings, phase, dataset, parents)
    if resume:
        phases.restore(raw_model, resume)
    raw_model.to(device)
    phases.check_backends(settings, raw_model, device)

    learns = getattr(settings, f"{name}_learn", ()) or phase.learns
    groups = phases.set_learning(raw_model, learns, lr)
    optimizer = phases.make_optimizer(settings, groups, device)
    if optimizer is None:
        processes.print(f"{name}: nothing in it can learn; it is saved as it is")
        steps = 0
    stored = phases.stored_features(settings, dataset, phase.splits, raw_model, device)
    batches = [
        phase.batches(dataset, split, batch, settings.seed, raw_model, kept)
        for split, kept in zip(phase.splits, stored)
    ]
    if resume:
        optimizer.load_state_dict(resume["optimizer"])
    return phases.Run(
        settings=settings,
        name=name,
        dataset=dataset,
        processes=processes,
        parents=parents,
        decided=decided,
        raw_model=raw_model,
        model=phases.wrap(raw_model, settings, processes, batches[0]) if optimizer else raw_model,
        optimizer=optimizer,
        train_batches=batches[0],
        val_batches=batches[1] if len(batches) > 1 else None,
        **phases.progress_of(resume),
        steps=steps,
        batch=batch,
    )


# ---------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, steps, warmup):
    """The share of its highest rate at a step: a straight climb, then half a cosine down to 0."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))


def make_batches(run, step):
    """(rows of the whole batch, tokens a row, this process's share of it in grad_accum pieces)."""
    (rows, length), count = run.train_batches.plan(step), run.settings.grad_accum
    size = len(rows) // (run.processes.world * count)
    first = run.processes.rank * size * count
    starts = range(first, first + size * count, size)
    pieces = [run.train_batches.read(rows[i : i + size], length, i) for i in starts]
    if run.processes.device.type == "cuda":
        pieces = [ahead.pinned(piece) for piece in pieces]
    return rows, length, pieces


def take_step(run, step, batches):
    """Forward, backward, update. Returns the mean loss of the whole batch, the gradient's norm."""
    world, settings = run.processes.world, run.settings
    for group in run.optimizer.param_groups:
        group["lr"] = group["highest_lr"] * learning_rate(step, run.steps, settings.warmup)
    # All randomness of a step follows from its number, so a resumed run repeats none of it.
    # Dropout draws other masks on each rank, so results differ by rank where it is on.
    torch.manual_seed((settings.seed * 1_000_003 + step) * 1009 + run.processes.rank)
    total = torch.tensor(float(sum(batch.count for batch in batches)), device=run.processes.device)
    if world > 1:
        dist.all_reduce(total)
    loss_sum = torch.zeros((), device=run.processes.device)
    for i, batch in enumerate(batches):
        run.model.require_backward_grad_sync = i == len(batches) - 1  # DDP: reduce once a step
        inputs = run.raw_model.inputs(batch, run.dataset.image_format, settings.seed, step)
        with run.autocast():
            _, loss = run.model(*inputs)
        # Every target counts the same, however they fell to micro-batches and processes; x world
        # because DDP divides by it.
        loss = loss * (batch.count / total) * world
        loss.backward()
        loss_sum += loss.detach() / world
    norm = torch.nn.utils.clip_grad_norm_(run.learning, settings.grad_clip)
    taken = not settings.skip_bad_steps or bool(norm.isfinite())  # the same on all ranks
    if taken:
        run.optimizer.step()
    run.raw_model.after_step(step / run.steps, taken)
    run.optimizer.zero_grad(set_to_none=True)
    return loss_sum, norm


def watch_and_save(run, step):
    """What is due between two steps: to look how it learns, to save."""
    settings, is_last = run.settings, step == run.steps
    if step % settings.eval_every == 0 or is_last:
        with run.autocast():
            metrics = PHASES[run.name].watch(run)
        log = Path(settings.out) / "log.jsonl"
        run.processes.record(log, phase=run.name, step=step, **metrics)
        values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        values = values or "no eval/probe.csv to probe the tower with"
        run.processes.print(f"{run.name} step {step}: {values}")
    if is_last or (step > run.start and step % settings.save_every == 0):
        phases.save(run, step)
        return_memory()


def loop(run):
    """Train from run.start to run.steps."""
    settings, processes, log = run.settings, run.processes, Path(run.settings.out) / "log.jsonl"
    progress = tqdm(total=run.steps, initial=run.start, desc=run.name, disable=processes.rank > 0)
    steps, unit = range(run.start, run.steps), PHASES[run.name].unit
    coming = ahead.made_ahead(partial(make_batches, run), steps, settings.batches_ahead)
    clock, units, taken = time.perf_counter(), 0, []  # units: what was seen since the clock's time
    with closing(coming), progress:
        for step, (rows, length, batches) in zip(steps, coming):
            began = time.perf_counter()
            watch_and_save(run, step)
            clock += time.perf_counter() - began
            loss, norm = take_step(run, step, batches)
            progress.update()
            units += len(rows) * (length if unit == "tokens/s" else 1)  # padding counts too
            taken.append((step, rows, loss, norm))
            is_due = step % settings.log_every == 0
            if is_due and processes.world > 1:
                dist.all_reduce(loss)
            if is_due or settings.skip_bad_steps or (step + 1) % settings.save_every == 0:
                skipped = phases.check_steps(run, taken)
                taken.clear()
            if is_due and not skipped:
                speed = {unit: round(units / (time.perf_counter() - clock))}
                progress.set_postfix(loss=f"{float(loss):.3f}", **speed)
                entry = {"loss": round(float(loss), 5), "lr": run.optimizer.param_groups[0]["lr"]}
                processes.record(log, phase=run.name, step=step, **entry, **speed)
    phases.check_steps(run, taken)
    watch_and_save(run, run.steps)


# ---------------------------------------------------------------------------------------------
# All phases


def train_phase(settings, name, dataset, processes):
    """Train one phase to its end."""
    run = set_up(settings, name, dataset, processes)
    if run is None:
        return
    count = sum(p.numel() for p in run.learning)
    whole = sum(p.numel() for p in run.raw_model.parameters())
    passes = run.steps * run.batch / run.train_batches.rows
    dtype = phases.compute_dtype(settings, processes.device)
    line = f"{name}: {count:,} of {whole:,} parameters learn; {run.steps} steps x {run.batch} rows"
    line += f" = {passes:.1f} passes; {processes.device}, {str(dtype)[6:]}"
    if isinstance(run.raw_model, BabyLLaVA):
        line += ", attention {}, norm {}".format(*run.raw_model.gpt.backends(dtype))
    processes.print(line)
    if processes.is_first:
        trim_log(Path(settings.out) / "log.jsonl", name, run.start)
    loop(run)


def load_settings(argv):
    """The Config of the command line; `--phase 1` without a file means configs/phase1.py."""
    files, flags = config.split_arguments(argv)
    settings = config.load(Config, argv, __doc__)
    path = Path(__file__).parent / "configs" / f"phase{settings.phase}.py"
    if not files and "phase" in settings.given and path.exists():
        print(f"no config file given: taking configs/{path.name}")
        settings = config.load(Config, [str(path), *flags], __doc__)
    if settings.vision_weights == "none":  # says so aloud, where a file names a tower
        settings.vision_weights = ""
    return settings


def train(settings, processes):
    """All phases that are asked for, and the tests after the last."""
    phases.draw_if_missing(settings.data)
    dataset = data.Data(settings.data)
    names = start.choose_phases(settings, dataset, PHASES)
    if not names:
        raise UserError(f"{settings.data}: it has nothing to learn from; prepare it with more")
    for name in names:
        # a phase changes what it inherits, and the next one must not take that for given
        own = copy.copy(settings)
        if name == "vision" and settings.vision_weights:
            start.import_tower(own, PHASES["vision"], dataset, processes)
        elif name == "phase0" and settings.language_weights:
            start.import_language(own, PHASES["phase0"], dataset, processes)
        else:
            train_phase(own, name, dataset, processes)
        processes.wait()  # the next phase reads what the first process has written
    if settings.phase == "all" and settings.evaluate and processes.is_first:
        last = f"--checkpoint={settings.out}/{names[-1]}.pt"
        flags = [last, f"--data={settings.data}", f"--device={settings.device}"]
        if names[-1] != "vision":
            evaluation.main(flags)


def main(argv):
    settings = load_settings(argv)
    processes = phases.find_processes(settings)
    try:
        with only_one(settings.out, "training") if processes.is_first else nullcontext():
            train(settings, processes)
    except RuntimeError as error:
        if processes.world == 1 or not phases.is_about_others(error):
            raise
        raise UserError(
            f"rank {processes.rank} stops: another process ended, or did not answer within "
            f"{settings.patience:g} minutes (--patience); what it said is the reason"
        ) from None
    finally:
        if processes.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main)
