"""
Grow a small vision-language model from what one infant saw and heard, phase by phase.

    python train.py configs/toy.py                           # the whole recipe on the toy world
    python train.py configs/toy.py --phase 1                 # one phase of it
    python train.py --phase 1                                # the same as configs/phase1.py
    torchrun --nproc_per_node=8 train.py configs/phase1.py   # on eight GPUs

Each phase writes out/<run>/<phase>.pt and starts from the one before. Run again, an interrupted
phase goes on where it was last saved, to the same bits on a CPU; a finished one is left alone.
"""
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import configs
import data
import eval as evaluation
import sample
import vision
from data import DataError
from model import BabyLLaVA, GPT, GPTConfig, Projector


@dataclass
class Config:
    phase: str = "all"  # 0, 1, 2, or all, which evaluates at the end
    tower: str = "both"  # narrows phase 0 to vision or language
    data: str = "data/toy"  # a folder that data.py wrote; data/toy is drawn if it is not there
    out: str = "out/toy"  # where checkpoints, log.jsonl and results go
    vision_weights: str = ""  # an eye to use as it is (.pth, .safetensors); empty, none: train one
    # the eye
    patch: int = 8  # pixels a side of a patch: P = (S / patch)^2
    vision_width: int = 128  # E
    vision_depth: int = 4  # blocks
    vision_heads: int = 4  # 128 / 4 = 32 wide each
    prototypes: int = 128  # K, outputs of DINO's head
    local_views: int = 0  # near views a frame, beside the two wide ones
    teacher_temperature: float = 0.04  # sharpening; higher flattens the teacher to uniform
    momentum: float = 0.99  # of the teacher, at first; it climbs to 1
    select_layer: int = -1  # -1: last block, normed; -2: the block before, not normed (LLaVA)
    keep_cls: bool = False  # hand the projector the CLS token too, before the patches
    # the mind
    n_layer: int = 4  # blocks
    n_head: int = 4  # heads
    n_kv_head: int = 0  # key and value heads; 0: as many as n_head
    n_embd: int = 128  # C
    n_hidden: int = 0  # width of the MLP; 0: 8/3 of n_embd, rounded up
    block_size: int = 128  # the longest sequence: image tokens and words
    dropout: float = 0.0  # in the GPT, while it trains
    projector: str = "mlp2x_gelu"  # linear, mlpNx_gelu, identity
    # steps, learning rate, and batch over all processes, for each thing that is trained
    vision_steps: int = 1500  # DINO
    vision_lr: float = 1e-3  # at its highest
    vision_batch: int = 32  # frames
    phase0_steps: int = 300  # GPT
    phase0_lr: float = 1e-3  # at its highest
    phase0_batch: int = 16  # rows of block_size tokens
    phase1_steps: int = 150  # projector
    phase1_lr: float = 3e-3  # at its highest
    phase1_batch: int = 32  # pairs
    phase2_steps: int = 1200  # projector and GPT
    phase2_lr: float = 2e-3  # at its highest
    phase2_batch: int = 32  # pairs
    grad_accum: int = 1  # cut each process's share of a batch into this many pieces
    warmup: float = 0.03  # share of the steps over which the rate climbs; then a cosine to 0
    weight_decay: float = 0.1  # of matrices; vectors are not decayed
    beta2: float = 0.95  # AdamW's; beta1 is 0.9
    clip: float = 1.0  # largest norm of the gradient
    # the machine
    seed: int = 1  # of weights, order and dropout
    device: str = ""  # cpu, cuda, mps; empty: cuda where there is one
    dtype: str = ""  # float32 or bfloat16 (autocast); empty: bfloat16 on cuda, float32 elsewhere
    compile: str = ""  # on or off: torch.compile; empty: on for cuda
    attention: str = "auto"  # triton, sdpa, reference, or the best that runs here
    norm: str = "auto"  # triton, torch, reference, or the best that runs here
    # how often, in steps
    log_every: int = 10  # a line in log.jsonl
    eval_every: int = 250  # validation loss, or the eye's probes
    eval_batches: int = 20  # of the validation set, always the same
    save_every: int = 100  # what an interruption can cost at most
    evaluate: bool = True  # after phase all: run eval.py on the last checkpoint


# The recipe: what trains, from which bins, starting from which phase. All else is frozen.
PHASES = {
    "vision": (("student.",), data.ClipBatches, None),
    "phase0": (("gpt.",), data.TextBatches, None),
    "phase1": (("projector.",), data.PairBatches, "phase0"),
    "phase2": (("projector.", "gpt."), data.PairBatches, "phase1"),
}
# Knobs that may change when a phase is resumed; any other must be what it was.
ANY_TIME = {"phase", "tower", "out", "device", "compile", "attention", "norm", "grad_accum",
            "log_every", "eval_every", "eval_batches", "save_every", "evaluate"}


def choose_phases(config):
    """The names in PHASES that --phase and --tower ask for."""
    towers = {"both": ["vision", "phase0"], "vision": ["vision"], "language": ["phase0"]}
    if config.tower not in towers:
        raise DataError(f"--tower {config.tower}: vision, language or both")
    wanted = {"0": towers[config.tower], "1": ["phase1"], "2": ["phase2"], "all": list(PHASES)}
    if config.phase not in wanted:
        raise DataError(f"--phase {config.phase}: 0, 1, 2 or all")
    return wanted[config.phase]


# ---------------------------------------------------------------------------------------------
# What a phase starts with


def finished(config, name):
    """The finished checkpoint of an earlier phase, or a line that says how to get it."""
    path = Path(config.out) / f"{name}.pt"
    how = "0 --tower vision" if name == "vision" else f"{name[-1]}"
    if not path.exists() or not (checkpoint := sample.read_checkpoint(path))["done"]:
        state = f"is at step {checkpoint['step']}" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}: finish it first with --phase {how}")
    return checkpoint


def build_model(config, name, dataset, resume):
    """(module to train, tower or None) of phase `name`: fresh, continued or resumed."""
    tower_shape = dict(size=dataset.meta["S"], patch=config.patch, width=config.vision_width,
                       depth=config.vision_depth, heads=config.vision_heads)
    if name == "vision":
        model = vision.DINO(
            vision.ViT(**tower_shape), vision.ViT(**tower_shape), prototypes=config.prototypes,
            local_views=config.local_views, temperature=config.teacher_temperature,
            momentum=config.momentum)
        if resume:
            model.load_state_dict(resume["dino"])
        return model, model.teacher["backbone"]
    backends = {"attention": config.attention, "norm": config.norm}
    if resume:
        parts = sample.build(resume, **backends)
        return parts.model, parts.tower
    if name == "phase0":
        gpt = GPTConfig(dataset.meta["vocab_size"], config.block_size, config.n_layer,
                        config.n_head, config.n_kv_head, config.n_embd, config.n_hidden,
                        config.dropout, **backends)
        return BabyLLaVA(GPT(gpt), None, dataset.tokenizer.image), None
    before = finished(config, PHASES[name][2])
    if before["ranks"] != dataset.tokenizer.dump():
        raise DataError(f"{config.out}/{PHASES[name][2]}.pt speaks another vocabulary than "
                        f"{config.data}: train phase 0 on the data you use in phase 1")
    parts = sample.build(before, **backends)
    if name == "phase1":
        parts.tower = sample.build(finished(config, "vision")).tower
        parts.model.projector = Projector(config.projector, parts.tower.width,
                                          parts.model.gpt.config.n_embd)
    return parts.model, parts.tower


def ensure_features(config, dataset, tower, device, rank):
    """Compute what the frozen eye sees of every frame, once; later phases map it into memory.

    Features of another tower, or of another layer of it, are never used: they are made anew."""
    key = vision.fingerprint(tower, config.select_layer, config.keep_cls)
    shape = ((dataset.meta["S"] // tower.patch) ** 2 + config.keep_cls, tower.width)
    for split, counts in dataset.meta["splits"].items():
        if rank == 0 and (dataset.meta["tower"] != key or not counts.get("features")):
            frames = dataset.open(split, "frames")

            def blocks(start):
                bar = tqdm(total=len(frames), initial=start, desc=f"{split} features", unit="frame")
                for block in vision.extract(tower.to(device), frames[start:], config.select_layer,
                                            config.keep_cls):
                    yield block
                    bar.update(len(block))
                bar.close()

            dataset.write_features(split, blocks, key, shape)
    if dist.is_initialized():
        dist.barrier()
    return data.Data(dataset.directory)


# ---------------------------------------------------------------------------------------------
# The loop


def record(path, rank, **line):
    if rank == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def trim_log(path, rank, name, start):
    """Drop the lines of steps that an interruption lost and that are about to be logged again."""
    if rank == 0 and path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(True)
                 if (entry := json.loads(line))["phase"] != name or entry["step"] < start]
        with data.writing(path) as file:
            file.write("".join(lines).encode("utf-8"))


def contents(config, name, dataset, model, tower, optimizer, step):
    """What a checkpoint holds: with it alone, sample.py speaks and train.py goes on.

    No random state and no loader's position need saving: both follow from seed and step."""
    steps = getattr(config, f"{name}_steps")
    checkpoint = {"format": sample.FORMAT, "phase": name, "step": step, "done": step == steps,
                  "position": step * getattr(config, f"{name}_batch"), "config": asdict(config),
                  "data": dataset.meta["source"]}
    if tower is not None:
        checkpoint |= {"vision": tower.shape(), "tower": tower.state_dict(), "E": tower.width,
                       "S": dataset.meta["S"], "select_layer": config.select_layer,
                       "keep_cls": config.keep_cls}
    if name == "vision":
        checkpoint |= {"dino": model.state_dict()} if model else {}
    else:
        gpt = {k: v for k, v in asdict(model.gpt.config).items() if k not in ("attention", "norm")}
        checkpoint |= {"gpt": gpt, "model": model.state_dict(), "ranks": dataset.tokenizer.dump(),
                       "tokenizer": dataset.tokenizer.kind}
        if model.projector is not None:
            checkpoint["projector"] = config.projector
    return checkpoint | ({"optimizer": optimizer.state_dict()} if optimizer else {})


def save(path, checkpoint):
    with data.writing(path) as file:
        torch.save(checkpoint, file)


def check_finite(tensors, name, step, path):
    """A run that has gone to NaN stops before it is saved over a good one."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DataError(f"{name} step {step}: the loss or a weight is not finite; lower {name}_lr. "
                        f"{path} holds the last good step, if any")


def resumable(config, name, path):
    """The checkpoint at `path` to go on from, or None. Refuses one made with other knobs."""
    if not path.exists():
        return None
    checkpoint = sample.read_checkpoint(path)
    for knob, value in checkpoint["config"].items():
        elsewhere = any(knob.startswith(phase) and phase != name for phase in PHASES)
        now = getattr(config, knob, None)
        if knob not in ANY_TIME and not elsewhere and now != value:
            raise DataError(f"{path} was made with {knob}={value}, now it is {now}: give another "
                            "--out, or delete the file to train it again")
    return checkpoint


def run_phase(config, name, dataset, device, rank, world):
    """Train one phase to its end: from nothing, from the phase before, or from where it stopped."""
    path, log = Path(config.out) / f"{name}.pt", Path(config.out) / "log.jsonl"
    prefixes, Batches, _ = PHASES[name]
    steps, lr, batch = (getattr(config, f"{name}_{knob}") for knob in ("steps", "lr", "batch"))
    say = tqdm.write if rank == 0 else lambda line: None
    resume = resumable(config, name, path)
    if resume and resume["done"]:
        return say(f"{name}: done already, {path}")
    if name == "vision" and config.vision_weights not in ("", "none"):
        tower = load_tower(config)
        if rank == 0:
            save(path, contents(config, name, dataset, None, tower, None, steps))
        return say(f"{name}: the eye of {config.vision_weights}, as it is")
    torch.manual_seed(config.seed)
    raw_model, tower = build_model(config, name, dataset, resume)
    if name in ("phase1", "phase2"):
        dataset = ensure_features(config, dataset, tower, device, rank)

    # ---- what learns, and how
    raw_model.to(device).requires_grad_(False).eval()
    for child, module in raw_model.named_children():
        if (child + ".").startswith(prefixes):  # frozen means frozen: no dropout there either
            module.requires_grad_(True).train()
    learning = [p for p in raw_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in learning if p.ndim >= 2], "weight_decay": config.weight_decay},
         {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, config.beta2), fused=device.type == "cuda")
    start = 0
    if resume:
        optimizer.load_state_dict(resume["optimizer"])
        start = resume["step"]
        trim_log(log, rank, name, start)
    model = raw_model  # keeps its name below compile and DDP, to save and evaluate
    if config.compile == "on" or not config.compile and device.type == "cuda":
        model = torch.compile(model)
    if world > 1:
        model = DDP(model, device_ids=[device.index] if device.type == "cuda" else None)
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype not in ("float32", "bfloat16"):
        raise DataError(f"--dtype {dtype}: float32 or bfloat16")
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")

    # ---- what it sees
    length = () if name == "vision" else (raw_model.gpt.config.block_size,)
    batches = Batches(dataset, "train", *length, seed=config.seed)
    held = None if name == "vision" else Batches(dataset, "val", *length)
    share = batch // world  # rows of each batch that are this process's
    if share * world != batch or share % config.grad_accum:
        raise DataError(f"{name}_batch {batch} does not divide into {world} processes x "
                        f"grad_accum {config.grad_accum}")
    say(f"{name}: {sum(p.numel() for p in learning):,} of "
        f"{sum(p.numel() for p in raw_model.parameters()):,} parameters learn; {steps} steps x "
        f"{batch} rows = {steps * batch / len(batches):.1f} passes; {device.type}, {dtype}" +
        ("" if name == "vision" else ", attention {}, norm {}".format(
            *raw_model.gpt.backends(getattr(torch, dtype)))))

    # ---- one step more than there are steps: the last evaluation and save are no second copy
    bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=rank > 0, mininterval=1)
    clock, seen = time.perf_counter(), 0
    for step in range(start, steps + 1):
        if step % config.eval_every == 0 or step == steps:
            with autocast:
                metrics = evaluation.probe(tower, dataset) if name == "vision" else {
                    "val_loss": evaluation.val_loss(raw_model, held, batch, config.eval_batches,
                                                    rank, world)}
            record(log, rank, phase=name, step=step, **metrics)
            say(f"{name} step {step}: " + (", ".join(f"{k} {v:.3f}" for k, v in metrics.items())
                                           or "no eval/probe.csv to probe the eye with"))
            clock, seen = time.perf_counter(), 0
        if rank == 0 and (step == steps or step > start and step % config.save_every == 0):
            check_finite(learning, name, step, path)
            save(path, contents(config, name, dataset, raw_model, tower, optimizer, step))
        if step == steps:
            break

        warm = max(1, int(config.warmup * steps))  # a climb from 0, then half a cosine back to 0
        rate = (step + 1) / warm if step < warm else \
            0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        # All randomness of a step follows from its number, so a resumed run repeats none of it.
        torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + rank)
        rows = batches(step * batch + rank * share, share)
        pieces = [*zip(*(np.split(part, config.grad_accum) for part in rows))]
        if name == "vision":
            shared = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            pieces = [raw_model.views(*(torch.as_tensor(part, device=device) for part in piece),
                                      shared, rank, world) for piece in pieces]
            words = torch.ones(len(pieces), device=device)
        else:
            words = torch.tensor([(piece[1] != -100).sum() for piece in pieces], device=device)
            pieces = [[torch.as_tensor(part, device=device) for part in piece] for piece in pieces]
        total = words.sum()
        if world > 1:
            dist.all_reduce(total)
        loss_sum = 0.0
        for i, piece in enumerate(pieces):
            model.require_backward_grad_sync = i == len(pieces) - 1  # DDP: reduce once a step
            with autocast:
                _, loss = model(*piece)
            # Every word counts the same, however they fell to pieces and processes; x world
            # because DDP divides by it.
            loss = loss * words[i] / total * world
            loss.backward()
            loss_sum = loss_sum + loss.detach() / world
        torch.nn.utils.clip_grad_norm_(learning, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if name == "vision":
            raw_model.after_step(step / steps)

        seen += rows[0].size * world if name != "vision" else len(rows[0]) * world
        bar.update()
        if step % config.log_every == 0:
            if world > 1:
                dist.all_reduce(loss_sum)
            check_finite([loss_sum], name, step, path)
            speed = round(seen / (time.perf_counter() - clock))
            unit = "frames/s" if name == "vision" else "tokens/s"
            bar.set_postfix_str(f"loss {float(loss_sum):.3f}, {speed:,} {unit}")
            record(log, rank, phase=name, step=step, loss=round(float(loss_sum), 5),
                   lr=lr * rate, **{unit: speed})
    bar.close()


def load_tower(config):
    """The eye of --vision_weights: a published checkpoint (vision.py) or a vision.pt of ours."""
    if not Path(config.vision_weights).exists():
        raise DataError(f"no {config.vision_weights}: fetch that checkpoint, name another with "
                        "--vision_weights, or train a ViT with --vision_weights none")
    state = sample.read_file(config.vision_weights)
    try:
        if state.get("format") == sample.FORMAT:
            return sample.build({key: state[key] for key in ("vision", "tower")}).tower
        return vision.build_tower(state)
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{config.vision_weights}: {error}") from None


def main(argv):
    config = configs.load(Config, argv, __doc__)
    rank, world = (int(os.environ.get(name, default)) for name, default in
                   (("RANK", 0), ("WORLD_SIZE", 1)))
    device = sample.choose_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        names = choose_phases(config)
        if rank == 0 and config.data == "data/toy" and not Path("data/toy/meta.json").exists():
            data.make(data.Config())
        if world > 1:
            dist.barrier()
        Path(config.out).mkdir(parents=True, exist_ok=True)
        for name in names:
            run_phase(config, name, data.Data(config.data), device, rank, world)
            if world > 1:
                dist.barrier()  # the next phase reads what rank 0 has written
        if config.phase == "all" and config.evaluate and rank == 0:
            evaluation.main([f"--checkpoint={config.out}/phase2.pt", f"--data={config.data}",
                             f"--device={config.device}"])
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    configs.run(main, DataError, ValueError)
