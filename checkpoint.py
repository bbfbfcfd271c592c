"""
What a run saves and loads. A checkpoint is one self-contained file, a dict of torch.save:

    format      2; another is refused
    phase       "vision", "phase0", "phase1", "phase2" or "phase3"
    step, done  how many steps were taken, and whether these were all
    settings    {knob: value}: the Config it was made with
    decided     {knob: value} of these, which later phases inherit and must not contradict
    parents     {phase: digest} of the checkpoints it started from; of a tower that came from a
                file, {"vision_weights": sha256 of the file}
    digest      of its weights, once it is done: what its children keep under `parents`
    source      which source its data came from, "toy" or another
    corpus      the id of its data, as in meta.json
    images      the images.ImageFormat, a dict
    tokenizer   {"kind", "ranks"}, a Tokenizer as text; None for a tower alone
    parts       {"tower": vision.describe(), "gpt": sizes, "projector": Projector's arguments,
                "seeing": BabyLLaVA's other arguments}: those there are
    weights     the state dict of a model.BabyLLaVA of these parts
    template    {"name", "system"} of the conversations it learnt; None, or absent, before phase 3
    lora        {name: factor}, where only these learnt: `weights` has them merged
    dino        the state dict of a dino.DINO: vision alone, to go on from
    optimizer   the optimizer's, to go on from; step and seed give all else: no state of random
                numbers and no position of a loader needs saving

With it alone sample.py speaks, eval.py scores and train.py goes on.
"""

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import vision
from config import UserError, regular
from files import about, writing
from images import ImageFormat
from model import GPT, BabyLLaVA, GPTConfig, Projector
from tokenizer import Tokenizer
from tokenizer_json import parse

FORMAT = 2
# what unpickling says of a file that is damaged
DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
)
KINDS = {  # of what is in every checkpoint
    "phase": str,
    "step": int,
    "done": bool,
    "settings": dict,
    "decided": dict,
    "parents": dict,
    "source": str,
    "corpus": str,
    "images": dict,
    "parts": dict,
    "weights": dict,
}
BACKENDS = ("attention", "norm")  # of a GPTConfig: the machine's choice, not the model's


@dataclass
class Loaded:
    """A checkpoint brought to life, in eval mode. Parts that it does not have are None: `model` has
    no projector before phase 1, and no GPT in vision.pt."""

    model: BabyLLaVA
    tokenizer: Tokenizer | None
    image_format: ImageFormat
    checkpoint: dict

    @property
    def device(self):
        return next(self.model.parameters()).device

    @property
    def dtype(self):
        return next(self.model.parameters()).dtype

    def as_parent(self):
        """The dict of a model that came from a folder, as a phase's parent."""
        weights = self.model.state_dict()
        digest = vision.weights_digest(weights)
        return self.checkpoint | {"weights": weights, "digest": digest, "done": True}

    def choose_template(self, name="", system=""):
        """(name, system text) of the template to ask in: those given, else those it has learnt
        with. ("", ""): none, it knows captions alone, or "plain" was asked for."""
        if name == "plain":
            return "", ""
        learnt = self.checkpoint.get("template") or {"name": "", "system": ""}
        return name or learnt["name"], system or learnt["system"]


def choose_device(name):
    """The torch.device of a --device knob; empty: cuda where there is one, else cpu."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name}: cpu, cuda, cuda:1 ... or mps") from None
    has_none = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if has_none or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: this machine has none that torch can use; try cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, from cuda:0")
    return device


# ---------------------------------------------------------------------------------------------
# Saving


def describe_parts(model, projector_kind):
    """The `parts` of a BabyLLaVA."""
    parts = {}
    if model.tower is not None:
        parts["tower"] = vision.describe(model.tower)
    if model.gpt is not None:
        sizes = asdict(model.gpt.config)
        parts["gpt"] = {name: value for name, value in sizes.items() if name not in BACKENDS}
    if model.projector is not None:
        parts["projector"] = {
            "kind": projector_kind,
            "width_in": model.tower.width,
            "width_out": model.gpt.config.n_embd,
        }
        parts["seeing"] = {
            "select_layer": model.select_layer,
            "keep_cls": model.keep_cls,
            "image_attention": model.image_attention,
            "tiled": model.tiled,
            "image_pool": model.image_pool,
        }
    return parts


def describe(settings, name, dataset, model, step, done, parents, decided, state=None):
    """The dict of a checkpoint, beside what is needed to go on. state: its weights, where they are
    not those that the model has now."""
    state = model.state_dict() if state is None else state
    tokenizer = {"kind": dataset.tokenizer.kind, "ranks": dataset.tokenizer.dump()}
    return {
        "format": FORMAT,
        "phase": name,
        "step": step,
        "done": done,
        "settings": asdict(settings),
        "decided": decided,
        "parents": parents,
        "digest": vision.weights_digest(state) if done else None,
        "source": dataset.meta["source"],
        "corpus": dataset.meta["corpus"],
        "images": asdict(dataset.image_format),
        "tokenizer": tokenizer if model.gpt is not None else None,
        "parts": describe_parts(model, settings.projector),
        "weights": state,
    }


def of_folder(folder, model, tokenizer, image_format, template):
    """The dict of a model that came from a folder of another's."""
    return {
        "format": FORMAT,
        "phase": "folder",
        "settings": {"data": str(folder)},
        "decided": {
            "projector": "mlp2x_gelu",
            "select_layer": model.select_layer,
            "keep_cls": model.keep_cls,
            "image_attention": model.image_attention,
            "image_pool": model.image_pool,
            "block_size": model.gpt.config.block_size,
        },
        "source": str(folder),
        "corpus": "",
        "images": asdict(image_format),
        "tokenizer": {"kind": tokenizer.kind, "ranks": tokenizer.dump()},
        "template": template,
        "parts": describe_parts(model, "mlp2x_gelu"),
    }


def has_other_vocabulary(checkpoint, dataset):
    """Whether prepared data has another vocabulary than a checkpoint."""
    tokenizer = checkpoint["tokenizer"]
    return bool(tokenizer) and tokenizer["ranks"] != dataset.tokenizer.dump()


def has_other_images(checkpoint, dataset):
    """Whether pictures became frames in another way in prepared data than for a checkpoint."""
    return ImageFormat.parse(checkpoint["images"]) != dataset.image_format


def save(path, checkpoint):
    """Write a checkpoint, whole or not at all."""
    with writing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's words for what the disk, or the user, said
            first = error.__context__
            raise first if isinstance(first, (OSError, KeyboardInterrupt)) else error from None


# ---------------------------------------------------------------------------------------------
# Loading


def read_torch(path, safe=()):
    """What torch.save wrote, on the CPU, read without running any code in it; classes in `safe`
    may occur. Raises UserError for no file, a foreign one or one cut short."""
    try:
        with torch.serialization.safe_globals(list(safe)):
            return torch.load(regular(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such checkpoint; python train.py configs/toy.py makes one"
        ) from None
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a checkpoint, or cut short ({reason})") from None


def read(path):
    """The dict that train.py wrote. Raises UserError for another thing or format."""
    checkpoint = read_torch(path)
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found == 1:
        raise UserError(f"{path}: of an earlier version (format 1, now {FORMAT}): train it again")
    if found != FORMAT:
        raise UserError(f"{path}: not a nanoBabyLLaVA checkpoint of format {FORMAT}")
    for key, kind in KINDS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path}: a damaged checkpoint: its {key} is no {kind.__name__}")
    try:
        ImageFormat.parse(checkpoint["images"])
        if checkpoint["tokenizer"]:
            parse(checkpoint["tokenizer"]["ranks"], checkpoint["tokenizer"]["kind"])
    except DAMAGE as error:
        raise UserError(f"{path}: a damaged checkpoint ({error!r})") from None
    return checkpoint


def build(checkpoint, device="cpu", **backends):
    """A Loaded of a checkpoint's dict. backends: `attention` and `norm`, see kernels.py."""
    parts = checkpoint["parts"]
    tokenizer = gpt = projector = None
    if checkpoint["tokenizer"]:
        tokenizer = parse(checkpoint["tokenizer"]["ranks"], checkpoint["tokenizer"]["kind"])
    image_token = tokenizer.image if tokenizer else None
    try:
        tower = vision.build(parts["tower"]) if "tower" in parts else None
        if "gpt" in parts:
            gpt = GPT(GPTConfig(**parts["gpt"], **backends))
        if "projector" in parts:
            projector = Projector(**parts["projector"])
        model = BabyLLaVA(gpt, projector, tower, image_token, **parts.get("seeing", {}))
        model.load_state_dict(checkpoint["weights"])
    except DAMAGE as error:
        reason = str(error).split("\n")[-1].strip()[:200]  # of many lines the last says which
        raise UserError(
            f"a {checkpoint['phase']} whose sizes or weights do not fit each other ({reason})"
        ) from None
    image_format = ImageFormat.parse(checkpoint["images"])
    return Loaded(model.eval().to(device), tokenizer, image_format, checkpoint)


def load(path, device="cpu"):
    """The Loaded of a file that train.py wrote. Raises UserError, as read() does."""
    with about(path):
        return build(read(Path(path)), device)
