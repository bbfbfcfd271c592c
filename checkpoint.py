"""
Checkpoints: what a run saves and loads. One self-contained file, a dict of torch.save (or, of a
model that is sharded, a folder with the same contents, see common/shards.py):

    format        3; format 2 is converted on reading, others are refused
    phase         "vision", "language", "phase1", "phase2" or "phase3"; "folder" if it was opened
                  from a Hugging Face folder
    step, done    how many steps were taken, and whether these are all
    settings      {option: value}: the Config of train.py
    inherited     {option: value} of those that fix the model; later phases must not contradict them
    parents       {phase: digest} of the checkpoints it started from; for weights from elsewhere
                  {option: sha256 of the file}
    digest        of its weights, if done: stored in the `parents` of its children
    source        the source of its data, "toy" or another
    corpus        the id of its data, as in meta.json
    corpora       [{"phase", "source", "corpus"}] of all data that its phases saw, its own last; of
                  weights from elsewhere the file and its digest; missing in older checkpoints
    images        the ImageFormat, a dict
    tokenizer     {"kind", "ranks"}, a Tokenizer as text; None for a tower alone
    parts         those that exist of {"tower": vision.describe_tower(), "gpt": sizes, "projector":
                  make_projector's arguments, "seeing": BabyLLaVA's other arguments}
    weights       the state dict of a model.BabyLLaVA of these parts
    validates_on  {"split", "batches"} of the validation loss; None for a tower
    template      {"name", "system"} of the conversations of phase 3, also kept by later phases;
                  None, or missing, before it
    skipped       how many steps were skipped because their gradient was not finite; optional
    best          {"step", "val_loss"} of its weights, with --keep best; optional
    lora          {name: factor} with LoRA; `weights` has them merged
    dino          the state dict of a dino.DINO, for resuming
    optimizers    the state dicts of the optimizers, for resuming. No random state and no position
                  of a loader is needed: they follow from step and seed

sample.py, eval.py and train.py need nothing else.
"""

import pickle
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import vision
from common import shards
from common.devices import Unfilled
from common.files import about, writing
from common.images import ImageFormat
from config import UserError, regular
from model import GPT, BabyLLaVA, GPTConfig, make_projector
from pretrained.tokenizer_json import parse_tokenizer
from tokenizer import TEMPLATES, Tokenizer, read_template

FORMAT = 3
# the exceptions of unpickling a corrupted file
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
KINDS = {  # the types of what every checkpoint has
    "phase": str,
    "step": int,
    "done": bool,
    "settings": dict,
    "inherited": dict,
    "parents": dict,
    "source": str,
    "corpus": str,
    "images": dict,
    "parts": dict,
    "weights": Mapping,
}
BACKENDS = ("attention", "norm")  # in a GPTConfig, but chosen for each machine


@dataclass
class Loaded:
    """A checkpoint with its model in eval mode. Parts that it lacks are None: the model has no
    projector before phase 1, and no GPT in vision.pt."""

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
        """The checkpoint of a model from a Hugging Face folder, as the parent of a phase."""
        weights = self.model.state_dict()
        digest = vision.weights_digest(weights)
        return self.checkpoint | {"weights": weights, "digest": digest, "done": True}

    def choose_template(self, name="", system=""):
        """(Template, system text) for questions: those given, else those it was trained with;
        (None, "") for "plain", or if it was trained on captions alone.

        Raises UserError if no template is given and that of its folder could not be read."""
        trained = self.checkpoint.get("template")
        if name == "plain" or not (name or trained):
            return None, ""
        if name:
            return TEMPLATES[name], system or (trained or {}).get("system", "")
        if trained.get("why"):
            raise UserError(f"{trained['why']}; give --template, one of {', '.join(TEMPLATES)}")
        return read_template(trained), system or trained["system"]


def choose_device(name):
    """The torch.device of a --device option; "": cuda if there is one. Raises UserError."""
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
        parts["tower"] = vision.describe_tower(model.tower)
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


def describe(
    settings, name, dataset, model, step, done, parents, inherited, validates_on, state=None
):
    """The dict of a checkpoint, without what only resuming needs. state: its weights, if they are
    not the model's own."""
    state = model.state_dict() if state is None else state
    tokenizer = {"kind": dataset.tokenizer.kind, "ranks": dataset.tokenizer.dump()}
    return {
        "format": FORMAT,
        "phase": name,
        "step": step,
        "done": done,
        "settings": asdict(settings),
        "inherited": inherited,
        "parents": parents,
        "digest": vision.weights_digest(state) if done else None,
        "source": dataset.meta["source"],
        "corpus": dataset.meta["corpus"],
        "images": asdict(dataset.image_format),
        "tokenizer": tokenizer if model.gpt is not None else None,
        "parts": describe_parts(model, settings.projector),
        "validates_on": validates_on,
        "weights": state,
    }


def describe_folder(folder, model, tokenizer, image_format, template):
    """The dict of a model that came from a Hugging Face folder, without its weights."""
    return {
        "format": FORMAT,
        "phase": "folder",
        "settings": {"data": str(folder)},
        "inherited": {
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
        "validates_on": {"split": "val", "batches": "SampleBatches"},
        "template": template,
        "parts": describe_parts(model, "mlp2x_gelu"),
    }


def has_other_vocabulary(checkpoint, dataset):
    """Whether prepared data has another vocabulary than a checkpoint."""
    tokenizer = checkpoint["tokenizer"]
    return bool(tokenizer) and tokenizer["ranks"] != dataset.tokenizer.dump()


def has_other_images(checkpoint, dataset):
    """Whether prepared data has another image format than a checkpoint."""
    return ImageFormat.parse(checkpoint["images"]) != dataset.image_format


def corpora_of(checkpoint):
    """The corpora that a checkpoint saw, see the table above; of an older one its own."""
    own = {name: checkpoint[name] for name in ("phase", "source", "corpus")}
    return checkpoint.get("corpora") or [own]


def find(folder, name):
    """Where the checkpoint of a phase is or would be: NAME.shards if there is one, else NAME.pt."""
    sharded = Path(folder) / f"{name}.shards"
    return sharded if shards.find_save(sharded) else Path(folder) / f"{name}.pt"


def save(path, checkpoint):
    """Write a checkpoint, completely or not at all."""
    with writing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch wraps an error of the disk, or Ctrl-C
            first = error.__context__
            raise first if isinstance(first, (OSError, KeyboardInterrupt)) else error from None


# ---------------------------------------------------------------------------------------------
# Loading


def read_torch(path, safe=(), mapped=False):
    """The contents of a torch.save file, on the CPU. No code in it is run; only classes in `safe`
    may occur. mapped: tensors are read from the file when they are needed, for those who want
    shapes alone. Raises UserError for a missing, foreign or incomplete file."""
    # safe_globals() is in PyTorch from 2.5 on
    allowed = torch.serialization.safe_globals(list(safe)) if safe else nullcontext()
    try:
        with allowed:
            return torch.load(regular(path), map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{path}: {why_missing(path)}") from None
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a checkpoint, or cut short ({reason})") from None


def why_missing(path):
    """What to do about a checkpoint that does not exist."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and Path(path).suffix != ".pt":
        return "no such folder; if it is a model on the Hugging Face hub, download it first"
    return "no such checkpoint; python train.py configs/toy.py makes out/toy/phase2.pt"


def convert(checkpoint):
    """A checkpoint of format 2 in format 3: "decided" became "inherited", phase 0's language model
    became the phase "language", and the phase's validation data are in the checkpoint."""
    new_name = lambda name: re.sub("^phase0", "language", name)
    settings = {new_name(name): value for name, value in checkpoint["settings"].items()}
    validation = {
        "vision": None,
        "phase0": {"split": "val", "batches": "TextBatches"},
        "phase1": {"split": "val", "batches": "PairBatches"},
        "phase2": {"split": "val", "batches": "SampleBatches"},
        "phase3": {"split": "chat_val", "batches": "SampleBatches"},
    }
    converted = checkpoint | {
        "format": FORMAT,
        "phase": new_name(checkpoint["phase"]),
        "settings": settings,
        "inherited": checkpoint["decided"],
        "parents": {new_name(name): digest for name, digest in checkpoint["parents"].items()},
        "validates_on": validation[checkpoint["phase"]],
    }
    del converted["decided"]
    if "optimizer" in converted:
        converted["optimizers"] = [converted.pop("optimizer")]
    return converted


def read(path, mapped=False):
    """The dict that train.py wrote; mapped: see read_torch(). Raises UserError for another file or
    format."""
    if shards.is_shards(path):
        checkpoint = shards.read(path, mapped)
    else:
        checkpoint = read_torch(path, mapped=mapped)
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found == 1:
        raise UserError(f"{path}: of an earlier version (format 1, now {FORMAT}): train it again")
    if found == 2:
        try:
            checkpoint, found = convert(checkpoint), FORMAT
        except DAMAGE as error:
            raise UserError(f"{path}: a corrupted checkpoint ({error!r})") from None
    if found != FORMAT:
        raise UserError(f"{path}: not a nanoBabyLLaVA checkpoint of format {FORMAT}")
    for key, kind in KINDS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path}: a corrupted checkpoint: its {key} is no {kind.__name__}")
    try:
        ImageFormat.parse(checkpoint["images"])
        if checkpoint["tokenizer"]:
            parse_tokenizer(checkpoint["tokenizer"]["ranks"], checkpoint["tokenizer"]["kind"])
    except DAMAGE as error:
        raise UserError(f"{path}: a corrupted checkpoint ({error!r})") from None
    return checkpoint


def build(checkpoint, device=None, **backends):
    """The Loaded of a checkpoint's dict, on a device; None: that of its weights. backends:
    `attention` and `norm`, see kernels.py. Raises UserError if its parts do not fit each other."""
    parts = checkpoint["parts"]
    tokenizer = gpt = projector = None
    if checkpoint["tokenizer"]:
        tokenizer = parse_tokenizer(
            checkpoint["tokenizer"]["ranks"], checkpoint["tokenizer"]["kind"]
        )
    image_token = tokenizer.image if tokenizer else None
    try:
        where = next(iter(checkpoint["weights"].values())).device
        with where, Unfilled():
            tower = vision.build_tower(parts["tower"]) if "tower" in parts else None
            if "gpt" in parts:
                gpt = GPT(GPTConfig(**parts["gpt"], **backends))
            if "projector" in parts:
                projector = make_projector(**parts["projector"])
            model = BabyLLaVA(gpt, projector, tower, image_token, **parts.get("seeing", {}))
        model.load_state_dict(checkpoint["weights"])
    except DAMAGE as error:
        reason = str(error).split("\n")[-1].strip()[:200]  # the last of many lines says which
        raise UserError(
            f"a {checkpoint['phase']} whose sizes or weights do not fit each other ({reason})"
        ) from None
    image_format = ImageFormat.parse(checkpoint["images"])
    model = model.eval() if device is None else model.eval().to(device)
    return Loaded(model, tokenizer, image_format, checkpoint)


def load(path, device="cpu"):
    """The Loaded of a file that train.py wrote. Raises UserError."""
    with about(path):
        return build(read(Path(path)), device)
