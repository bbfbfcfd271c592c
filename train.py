"""
Grow a small vision-language model from what one infant saw and heard, phase by phase.

    python train.py configs/toy.py                           # the whole recipe on the toy world
    python train.py configs/toy.py --phase 1                 # one phase of it
    python train.py --phase 1                                # the same as configs/phase1.py
    torchrun --nproc_per_node=8 train.py configs/phase1.py   # on eight GPUs

Each phase writes out/<run>/NAME.pt and starts from the phases before. The same command resumes an
interrupted phase from its last save, to the same bits on a CPU, and skips a finished one.

A new phase is a row of PHASES, with its options NAME_steps, NAME_epochs, NAME_lr, NAME_batch and
NAME_learn in Config. Other parts to train: the options phase1_learn and so on. Another optimizer:
training/optimizer.py.
"""

import common.threads  # noqa: F401, before torch

# isort: split
import copy
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import config
import data
import vision
from batches import ClipBatches, PairBatches, SampleBatches, TextBatches
from common.files import locked, only_one, trim_log
from config import UserError, option
from fast.memory import return_memory
from model import BabyLLaVA
from training import (
    advice,
    measure,
    models,
    page,
    phases,
    planning,
    published,
    rehearsal,
    resume,
    run_card,
    validation,
)
from training.phases import LATER_OPTIONS, Phase
from training.prefetch import pinned, prefetched
from training.processes import (
    Processes,
    end_with_launcher,
    find_device,
    find_processes,
    is_first_process,
    is_lost_process,
    reported_once,
)
from training.progress import Clock, Progress
from training.sharding import check_sharding


@dataclass
class Config(config.Options):
    # the run
    phase: str = option(
        "all",
        once={"0": ("vision", "language")},
        listed=("vision", "language", "0 (both)", "1", "2", "3", "all (and then eval.py)"),
    )  # which phase to train
    data: str = "data/toy"  # a folder that data.py wrote; data/toy, toy_chat and toy_v2 are drawn
    out: str = "out/toy"  # the run's folder: checkpoints, log.jsonl and results
    init: str = ""  # where to start from instead of `out`: a run's folder, a .pt or a LLaVA folder
    vision_weights: str = ""  # a published tower, a file or folder; empty or none: train one
    language_weights: str = ""  # a published language model, a folder; empty: train one
    # the vision tower
    vision_tower: str = option("vit", choices=tuple(vision.TOWERS))  # its kind, if it is trained
    patch: int = option(8, low=1, high=1024)  # side of a patch in pixels: P = (S / patch)^2
    vision_width: int = option(128, low=1, high=1 << 16)  # width of its features, E
    vision_depth: int = option(4, low=1, high=1000)  # blocks
    vision_heads: int = option(4, low=1, high=1 << 12)  # attention heads
    conv_stages: tuple[int, ...] = ()  # blocks in each stage of a convnext
    extra_stage: int = option(0, low=0, high=100)  # blocks of one more stage on a trained convnext
    prototypes: int = option(128, low=1, high=1 << 20)  # outputs of DINO's head, K
    head_hidden: int = option(256, low=1, high=1 << 16)  # width of DINO's head inside
    head_bottleneck: int = option(64, low=1, high=1 << 16)  # its width before the prototypes
    local_views: int = option(0, low=0, high=100)  # small crops, besides the two large ones
    student_mask: float = option(
        0.0, low=0.0, high=0.95
    )  # share of patches that DINO's student does not see
    teacher_temperature: float = option(
        0.04, low=1e-4, high=10.0
    )  # of DINO's teacher; lower is sharper
    momentum: float = option(
        0.99, low=0.0, high=1.0
    )  # of DINO's teacher at the start; it rises to 1
    # features and projector
    select_layer: int = option(-2, high=-1)  # -1: the tower's last block; -2: the one before
    keep_cls: bool = False  # the CLS token is an image token too, before the patches
    image_pool: int = option(1, low=1, high=64)  # 2: average 2 x 2 image tokens into one
    projector: str = "mlp2x_gelu"  # linear, mlp2x_gelu (N layers: mlpNx_gelu), identity
    image_attention: str = option(
        "causal", choices=("causal", "full")
    )  # full: image tokens see one another
    features: str = option(
        "stored", choices=("stored", "live")
    )  # of a frozen tower; live: computed in every step
    # the language model
    n_layer: int = option(4, low=1, high=1000)  # blocks
    n_head: int = option(4, low=1, high=1 << 12)  # attention heads
    n_kv_head: int = option(0, low=0, high=1 << 12)  # key and value heads; 0: as many as n_head
    n_embd: int = option(128, low=2, high=1 << 16)  # width, C
    n_hidden: int = option(0, low=0, high=1 << 18)  # width of the MLP; 0: 8/3 of n_embd, rounded up
    block_size: int = option(128, low=2, high=1 << 20)  # the longest sequence, images included
    truncate: bool = False  # cut samples over block_size after an answer that fits; else refuse
    dropout: float = option(0.0, low=0.0, high=0.99)  # in the GPT, while it is trained
    # each phase (batches are of all processes together)
    vision_steps: int = option(1500, low=1)  # of DINO
    vision_epochs: float = option(0.0, low=0.0, high=1e6)  # passes; 0: vision_steps count
    vision_lr: float = option(1e-3, low=0.0)  # highest learning rate
    vision_batch: int = option(32, low=1, high=1 << 20)  # frames
    language_steps: int = option(150, low=1)  # of the GPT
    language_epochs: float = option(0.0, low=0.0, high=1e6)  # passes; 0: language_steps count
    language_lr: float = option(1e-3, low=0.0)  # highest learning rate
    language_batch: int = option(16, low=1, high=1 << 20)  # rows of block_size tokens
    phase1_steps: int = option(100, low=1)  # of the projector
    phase1_epochs: float = option(0.0, low=0.0, high=1e6)  # passes; 0: phase1_steps count
    phase1_lr: float = option(3e-3, low=0.0)  # highest learning rate
    phase1_batch: int = option(32, low=1, high=1 << 20)  # samples
    phase1_learn: tuple[str, ...] = ()  # parts: projector gpt tower=2e-4; empty: see PHASES
    phase2_steps: int = option(2300, low=0)  # of projector and GPT; 0: skip this phase
    phase2_epochs: float = option(0.0, low=0.0, high=1e6)  # passes; 0: phase2_steps count
    phase2_lr: float = option(2e-3, low=0.0)  # highest learning rate
    phase2_batch: int = option(16, low=1, high=1 << 20)  # samples
    phase2_learn: tuple[str, ...] = ()  # as phase1_learn
    phase3_steps: int = option(600, low=1)  # of the same, on conversations
    phase3_epochs: float = option(0.0, low=0.0, high=1e6)  # passes; 0: phase3_steps count
    phase3_lr: float = option(1e-3, low=0.0)  # highest learning rate
    phase3_batch: int = option(32, low=1, high=1 << 20)  # samples
    phase3_learn: tuple[str, ...] = ()  # as phase1_learn
    # how all phases train
    lora_rank: int = option(
        0, low=0, high=1 << 14
    )  # phases 2, 3: train low-rank factors of the GPT; 0: its weights
    lora_alpha: float = option(16.0, low=0.0)  # their product is scaled by alpha / rank
    recompute: bool = False  # gradient checkpointing of the GPT: less memory, a third more time
    grad_accum: int = option(1, low=1, high=1 << 20)  # micro-batches per step and process
    warmup: float = option(0.03, low=0.0, high=1.0)  # share of the steps; then a cosine down to 0
    optimizer: str = option("adamw", choices=("adamw", "muon"))  # muon: for matrices
    muon_rate: float = option(1.0, low=0.0, high=1e3)  # its learning rate, in the phase's
    weight_decay: float = option(0.1, low=0.0, high=10.0)  # of matrices; vectors are not decayed
    beta2: float = option(0.95, low=0.0, high=0.99999)  # AdamW's; beta1 is 0.9
    grad_clip: float = option(1.0, low=1e-6)  # largest norm of the gradient
    # the machine
    seed: int = option(1, low=0, high=2**32 - 1)  # of weights, order and dropout
    device: str = ""  # cpu, cuda, cuda:1, mps; empty: cuda if there is one
    dtype: str = option("", choices=("", "float32", "bfloat16"))  # empty: bfloat16 on cuda
    compile: str = option("", choices=("", "on", "off"))  # torch.compile; empty: on for cuda
    attention: str = option("auto", choices=("auto", "triton", "sdpa", "reference"))  # backend
    norm: str = option("auto", choices=("auto", "triton", "torch", "reference"))  # backend
    shard: str = option(
        "auto", choices=("auto", "on", "off")
    )  # parameters over all processes; auto: where no GPU holds the model
    batches_ahead: int = option(2, low=0, high=1000)  # prepared by a thread; 0: none
    patience: float = option(10.0, low=0.01, high=1e6)  # minutes that processes wait for each other
    # how often, in steps
    log_every: int = option(10, low=1)  # a line in log.jsonl
    eval_every: int = option(500, low=1)  # validation loss, or the tower's linear probes
    eval_batches: int = option(20, low=1)  # of the validation set, always the same samples
    save_every: int = option(250, low=1)  # an interruption loses at most this much
    keep: str = option("last", choices=("last", "best"))  # best: lowest val_loss (no tower has one)
    skip_bad_steps: int = option(0, low=0)  # tolerate so many steps whose gradient is not finite
    evaluate: bool = True  # after --phase all, run eval.py on the last checkpoint
    # what a run will take
    plan: bool = False  # print parameters, FLOP, memory and time of each phase, and end
    gpu: str = option("", choices=("", *planning.GPUS))  # with --plan: its time on such GPUs
    gpus: int = option(0, low=0, high=1 << 16)  # with --gpu: how many; 0: torchrun's processes
    mfu: float = option(0.35, low=0.01, high=1.0)  # with --gpu: the share of its peak that is used


# ---------------------------------------------------------------------------------------------
# The phases


# Fields of a row (training/phases.py has all): `learns`, the parts that are trained; `splits` to
# train and validate on, read as `batches`; `make`, its model; `starts_from`, the phases before it;
# `inherited`, options that fix the model for later phases; `options`, others that are its own.
PHASES = {
    # the vision tower, by DINO
    "vision": Phase(
        learns=("student",),
        batches=ClipBatches,
        splits=("train",),
        make=models.new_dino,
        validate=validation.validate_tower,
        inherited=(
            "vision_tower",
            "patch",
            "vision_width",
            "vision_depth",
            "vision_heads",
            "conv_stages",
            "vision_weights",
        ),
        options=(
            "prototypes",
            "head_hidden",
            "head_bottleneck",
            "local_views",
            "student_mask",
            "teacher_temperature",
            "momentum",
        ),
        weights_option="vision_weights",
        load_weights=resume.load_tower,
        fixes_images=False,
        can_shard=False,
        unit="frames/s",
    ),
    # the language model, on speech
    "language": Phase(
        learns=("gpt",),
        batches=TextBatches,
        splits=("train", "val"),
        make=models.new_language_model,
        validate=validation.validate_loss,
        inherited=(*models.GPT_SIZES, "language_weights"),
        options=("dropout",),
        weights_option="language_weights",
        load_weights=resume.load_language_model,
    ),
    # the projector, with both frozen
    "phase1": Phase(
        learns=("projector",),
        batches=PairBatches,
        splits=("train", "val"),
        make=models.new_projector,
        validate=validation.validate_loss,
        starts_from=("vision", "language"),
        inherited=(
            "select_layer",
            "keep_cls",
            "image_pool",
            "projector",
            "image_attention",
            "extra_stage",
        ),
        options=("init",),
    ),
    # projector and language model together
    "phase2": Phase(
        learns=("projector", "gpt"),
        batches=SampleBatches,
        splits=("train", "val"),
        make=models.from_phase_before,
        validate=validation.validate_loss,
        starts_from=("phase1",),
        options=LATER_OPTIONS,
    ),
    # the same on conversations, which are in splits of their own
    "phase3": Phase(
        learns=("projector", "gpt"),
        batches=SampleBatches,
        splits=("chat_train", "chat_val"),
        make=models.from_phase_before,
        validate=validation.validate_loss,
        starts_from=("phase2",),
        options=LATER_OPTIONS,
        saves_template=True,
    ),
}


# ---------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, steps, warmup):
    """The factor of the highest rate at a step: a linear warmup, then half a cosine down to 0."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))


def read_batch(run, step):
    """(the Plan of a step, this process's part of the batch, in grad_accum micro-batches)."""
    plan, count = run.train_batches.plan(step), run.settings.grad_accum
    size = len(plan.rows) // (run.processes.world * count)
    first = run.processes.rank * size * count
    starts = range(first, first + size * count, size)
    batches = [run.train_batches.read(plan, slice(i, i + size)) for i in starts]
    if run.processes.device.type == "cuda":
        batches = [pinned(batch) for batch in batches]
    return plan, batches


def take_step(run, step, batches):
    """Forward, backward, update. Returns this process's share of the loss, and the norm of the
    gradient. The loss is the sum over processes and micro-batches of loss * count / total."""
    world, settings = run.processes.world, run.settings
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * learning_rate(step, run.steps, settings.warmup)
    # The random numbers of a step depend on its number alone, so a resumed run repeats none.
    # Dropout masks differ between ranks, so results depend on their number if dropout is on.
    torch.manual_seed((settings.seed * 1_000_003 + step) * 1009 + run.processes.rank)
    count = float(sum(batch.count for batch in batches))
    # filled on the GPU: a copy would make the host wait for it
    total = torch.full((), count, device=run.processes.device)
    if world > 1:
        dist.all_reduce(total)
    loss_sum = torch.zeros((), device=run.processes.device)
    for i, batch in enumerate(batches):
        run.reduce_gradients(i == len(batches) - 1)
        inputs = run.raw_model.inputs(batch, run.dataset.image_format, settings.seed, step)
        with run.autocast():
            _, loss = run.model(*inputs)
        # Every target has the same weight, in whichever micro-batch and process it is; times
        # world, because DDP divides by it.
        loss = loss * (batch.count / total) * world
        loss.backward()
        loss_sum += loss.detach() / world
    run.drop_padding(batches)
    norm = torch.nn.utils.clip_grad_norm_(run.trained_parameters, settings.grad_clip)
    norm = norm.full_tensor() if run.is_sharded else norm
    # With skip_bad_steps 0 a bad step is taken too; Progress.check() then ends the run. The norm is
    # the same on all ranks.
    taken = not settings.skip_bad_steps or bool(norm.isfinite())
    for optimizer in run.optimizers:
        if taken:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.raw_model.after_step(step / run.steps, taken)
    return loss_sum, norm


def validate_and_save(run, step):
    """Validate and save, if they are due before this step."""
    settings, is_last = run.settings, step == run.steps
    if step % settings.eval_every == 0 or is_last:
        return_memory()  # else validation's own tensors come on top of what steps have left free
        with run.autocast():
            metrics = run.phase.validate(run)
        log = Path(settings.out) / "log.jsonl"
        when = {"time": round(time.time(), 1)}
        run.processes.record(log, phase=run.name, step=step, **metrics, **when)
        values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        if is_last and not values:
            values = "done"
        if values:  # a tower has none on data without things to probe it with
            run.processes.print(f"{run.name} step {step}: {values}")
        if settings.keep == "best" and "val_loss" in metrics:
            phases.keep_best(run, step, metrics["val_loss"])
        if run.processes.is_first:
            page.write_live(settings.out, run.dataset.meta["source"])
    if is_last or (step > run.start and step % settings.save_every == 0):
        phases.save(run, step)
        return_memory()


def loop(run, clock=None):
    """Train from run.start to run.steps. clock: see progress.py."""
    steps, ahead = range(run.start, run.steps), run.settings.batches_ahead
    coming = prefetched(partial(read_batch, run), steps, ahead)
    with coming as coming, Progress(run, clock) as progress:
        for step, (plan, batches) in zip(steps, coming):
            with progress.paused():
                validate_and_save(run, step)
            loss, norm = take_step(run, step, batches)
            progress.add(step, plan, loss, norm)
        progress.check()
    validate_and_save(run, run.steps)


# ---------------------------------------------------------------------------------------------
# All phases


def train_phase(settings, name, dataset, processes, clock):
    """Train one phase to its end. clock: see progress.py."""
    run = phases.set_up(settings, name, PHASES, dataset, processes)
    if run is None:
        return
    count = sum(p.numel() for p in run.trained_parameters)
    whole = sum(p.numel() for p in run.raw_model.parameters())
    passes = run.steps * run.batch / run.train_batches.rows
    dtype = phases.compute_dtype(settings, processes.device)
    line = f"{name}: {count:,} of {whole:,} parameters trained; "
    line += f"{run.steps} steps x {run.batch} rows = {passes:.{2 if passes < 1 else 1}f} passes; "
    line += f"{processes.device}, {str(dtype)[6:]}"
    if isinstance(run.raw_model, BabyLLaVA):
        line += ", attention {}, norm {}".format(*run.raw_model.gpt.backends(dtype))
    processes.print(line)
    why = phases.compiler_lacking()
    if processes.device.type == "cuda" and not settings.compile and why:
        processes.print(f"{name}: not compiled, because this machine lacks {why}")
    if run.val_batches:
        few = min(settings.eval_batches * run.batch, run.val_batches.rows)
        processes.print(f"{name}: val_loss is of {few:,} of {run.val_batches.rows:,} held-out rows")
    if processes.is_first:
        trim_log(Path(settings.out) / "log.jsonl", name, run.start)
    loop(run, clock)
    if phases.compiles(settings, processes.device):
        processes.print(f"{name}: {phases.compiled()}")
        torch.compiler.reset()  # a phase may not use up what the next one may keep compiled


def load_settings(argv):
    """The Config of the command line; `--phase 1` without a file means configs/phase1.py."""
    files, flags = config.split_arguments(argv)
    settings = config.load(Config, argv, __doc__)
    known = (*(advice.phase_flag(name) for name in PHASES), "0", "all")
    if settings.phase not in known:
        raise UserError(f"--phase {settings.phase}: one of {', '.join(known)}")
    number = "0" if settings.phase in ("vision", "language") else settings.phase
    path = Path(__file__).parent / "configs" / f"phase{number}.py"
    if not files and "phase" in settings.given and path.exists():
        print(f"no config file given: taking configs/{path.name}")
        settings = config.load(Config, [str(path), *flags], __doc__)
        settings.arguments, settings.file = list(argv), ""  # as they were given
    if settings.vision_weights == "none":  # overrides a config file that names a tower
        settings.vision_weights = ""
    for name in PHASES:
        steps_or_epochs(settings, f"{name}_steps", f"{name}_epochs")
    return settings


def steps_or_epochs(settings, steps, epochs):
    """Of two options that say how long a phase is, drop the one that was given first."""
    given = [name for name in settings.given if name in (steps, epochs)]
    if len(given) == 2:
        setattr(settings, given[0], getattr(Config(), given[0]))


def draw_if_missing(directory):
    """Draw a toy world that does not exist yet. The first of several processes draws it, and the
    others wait for its lock on the file system, where nothing times out."""
    source, meta = str(directory).removeprefix("data/"), Path(directory) / "meta.json"
    if source in published.TOY_WORLDS and not meta.exists():
        import sources  # not imported for other data

        Path("data").mkdir(exist_ok=True)
        with locked(f"data/.{source}.lock"):
            if not meta.exists():
                sources.prepare(source, [])


def warn_of_passes(rehearsals, processes):
    """Print a warning for phases that read their data many times."""
    for one in rehearsals:
        passes = one.steps * one.batch / one.batches[0].rows
        if passes > 50:
            processes.print(
                f"warning: {one.name} reads its data {passes:,.0f} times and will learn it by "
                f"heart; give --{one.name}_epochs 5, or more data"
            )


def train(settings, processes):
    """Train all phases that are asked for, then evaluate."""
    draw_if_missing(settings.data)
    dataset = data.Data(settings.data)
    names = resume.choose_phases(settings, dataset, PHASES)
    rehearsals = rehearsal.rehearse(settings, names, PHASES, dataset, processes)
    warn_of_passes(rehearsals, processes)
    if rehearsals and processes.is_first:
        run_card.add(settings, dataset, processes)
    sharding_of = processes.agree(planning.choose_sharding(rehearsals))
    clock = Clock({one.name: one.work for one in rehearsals})
    for name in names:
        # resume.inherit() writes what a phase inherits into its settings, so each gets a copy.
        own = copy.copy(settings)
        own.shard = sharding_of.get(name, "off")
        option_name = PHASES[name].weights_option
        if option_name and getattr(settings, option_name):
            resume.import_weights(own, name, PHASES[name], dataset, processes)
        else:
            train_phase(own, name, dataset, processes, clock)
        processes.wait()  # the next phase reads what the first process has written
    processes.end_group()  # what follows is the first process's alone
    last = checkpoint.find(settings.out, names[-1])
    is_tower = not PHASES[names[-1]].validates_on
    if settings.phase == "all" and settings.evaluate and processes.is_first and not is_tower:
        import eval as evaluation  # no test is imported before this point

        where = [f"--data={settings.data}", f"--device={settings.device}"]
        evaluation.main([f"--checkpoint={last}", *where])
    commands = advice.next_commands(settings, names[-1], last, PHASES)
    if commands:
        processes.print(commands)


def measured(arguments, name):
    """Memory and time of a phase, see measure.measure(); called in a process of its own."""
    settings, processes = load_settings(arguments), Processes(0, 1, torch.device("cpu"))
    missing = planning.Missing()
    found, _ = planning.rehearse_all(settings, PHASES, load_settings, processes, missing)
    (one,) = (one for one in found if one.name == name)
    return measure.measure(one, read_batch, take_step)


def show_plan(settings):
    """Print what a run will take. torchrun's processes count as GPUs."""
    world = settings.gpus or int(os.environ.get("WORLD_SIZE", 1))
    if is_first_process():
        processes = Processes(0, world, torch.device("cpu"))
        run = partial(measure.in_a_process, measured, settings.arguments)
        planning.show(settings, PHASES, load_settings, processes, run)


def rehearse_early(settings):
    """Check a run before its processes meet and before a toy world is drawn. Raises UserError."""
    missing = planning.Missing(published.TOY_WORLDS)
    dataset = missing.open_data(settings.data)
    processes = Processes(
        0, int(os.environ.get("WORLD_SIZE", 1)), checkpoint.choose_device(settings.device)
    )
    names = resume.choose_phases(settings, dataset, PHASES)
    check_sharding(settings)
    if not names:
        raise UserError(f"{settings.data}: nothing to train on; prepare it with more")
    found = rehearsal.rehearse(copy.copy(settings), names, PHASES, dataset, processes)
    planning.check_memory(found)


def main(argv):
    end_with_launcher()
    with reported_once():
        settings = load_settings(argv)
        if settings.plan:
            return show_plan(settings)
        find_device(settings)  # too few GPUs for the processes: told before they wait
        if is_first_process():
            rehearse_early(settings)
    processes = find_processes(settings)
    try:
        with only_one(settings.out, "training") if processes.is_first else nullcontext():
            train(settings, processes)
    except RuntimeError as error:
        if processes.world == 1 or not is_lost_process(error):
            raise
        raise UserError(
            f"rank {processes.rank} stops: another process ended, or did not answer within "
            f"{settings.patience:g} minutes (--patience); its own message says why"
        ) from None


if __name__ == "__main__":
    config.run(main)
