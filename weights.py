"""
Other people's weights: towers from .pth and .safetensors files, under the names of those who
published them.

    python train.py configs/phase0.py --vision_weights dino_deitsmall16_pretrain.pth

Taken are the backbones and full checkpoints of facebookresearch/dino and of eminorhan's SAYCam
models (ViT, ResNeXt-50), DINOv2 with and without registers, and Hugging Face's ViT, Dinov2 and
Dinov2WithRegisters, old names and new. The architecture is read off names and shapes; whatever does
not fit is named, and nothing is half loaded.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch

import checkpoint
import vision
from config import UserError

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class DoesNotFit(Exception):
    """Why a state dict is no tower of ours, in one line."""


# ---------------------------------------------------------------------------------------------
# Files


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of header length, JSON, then the numbers.
    Raises UserError."""
    content = Path(path).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:size])
        header.pop("__metadata__", None)
        length = size + max(entry["data_offsets"][1] for entry in header.values())
        if len(content) != length:
            raise ValueError(f"{len(content)} bytes, but its header says {length}")
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            numbers = bytearray(content[size + begin : size + end])
            flat = torch.frombuffer(numbers, dtype=SAFETENSORS_TYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a checkpoint, or cut short ({reason})") from None
    return tensors


def read_file(path):
    """What torch.save or safetensors put there. Raises UserError."""
    if str(path).endswith(".safetensors"):
        return read_safetensors(path)
    # DINO's training checkpoints hold the command line that made them, which is no code
    return checkpoint.read_torch(path, safe=[argparse.Namespace])


# ---------------------------------------------------------------------------------------------
# Names

# Hugging Face's names (old and new) for the parameters of ViT, Dinov2 -> facebookresearch's.
RENAMES = [
    (r"^(vit|dinov2(_with_registers)?)\.", ""),
    (r"^pooler\..*", ""),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before", ".norm1"),
    (r"\.layernorm_after", ".norm2"),
    (r"\.attention\.(output\.dense|o_proj)", ".attn.proj"),
    (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)", r".attn.\2"),
    (r"\.intermediate\.dense", ".mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
]


def dino_names(state):
    """A Hugging Face ViT's state dict under DINO's names; q, k, v stacked into one."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    renamed.pop("", None)  # the pooler, which DINO has not
    for key in [key for key in renamed if ".attn.q." in key]:
        stacked = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in stacked):
            whole = torch.cat([renamed.pop(part) for part in stacked])
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = whole
    return renamed


def unwrap(state):
    """(the backbone's own state dict under DINO's names, whether it had Hugging Face's): a training
    checkpoint's teacher, prefixes off the start of its keys; heads, and the mask token that only
    training uses, left out."""
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state, dict):
            state = state.get(key, state)
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise DoesNotFit("no state dict of tensors")
    hugging_face = any("embeddings.cls_token" in key for key in state)
    if hugging_face:
        state = dino_names(state)
    prefixes, not_backbone = r"^((module|backbone|encoder)\.)+", r"(head|fc)\.|mask_token$"
    state = {re.sub(prefixes, "", key): value for key, value in state.items()}
    backbone = {key: value for key, value in state.items() if not re.match(not_backbone, key)}
    return backbone, hugging_face


# ---------------------------------------------------------------------------------------------
# Architectures


def vit_like(state, heads, hugging_face):
    """A ViT with random weights, of the shapes in `state`.

    Nothing in a state dict tells the number of heads. heads 0: width / 64, as all published ViTs
    have, whose widths are multiples of 192 or 256; for any other width that would be a guess."""
    width, patch = state["pos_embed"].shape[2], state["patch_embed.proj.weight"].shape[2]
    if not heads and (width < 192 or (width % 192 and width % 256)):
        raise DoesNotFit(
            f"a ViT {width} wide, which none that was published is: its weights do "
            "not say how many heads it has; give a vision.pt of ours, which does"
        )
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    blocks = [re.match(r"blocks\.(\d+)\.", key) for key in state]
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    return vision.ViT(
        side * patch,
        patch,
        width,
        depth=1 + max((int(match[1]) for match in blocks if match), default=0),
        heads=heads or width // 64,
        scaled="blocks.0.ls1.gamma" in state,
        registers=registers,
        offset=0.0 if hugging_face or registers else 0.1,
        antialias=registers > 0,
    )


def resnext_like(state):
    """A ResNeXt with random weights, of the shapes in `state`."""
    depths = []
    for i in range(1, 5):
        convolution = re.compile(rf"layer{i}\.\d+\.conv2\.weight")
        depths.append(len([key for key in state if convolution.fullmatch(key)]))
    middle, group = state["layer1.0.conv2.weight"].shape[:2]
    return vision.ResNeXt(depths, middle, middle // group)


def fill(tower, state):
    """Load `state` into a tower, strictly. Raises DoesNotFit, naming the keys that are missing,
    left over or misshapen."""
    counter = "num_batches_tracked"  # BatchNorm's, no weight; some files have it, some do not
    own = {key: value for key, value in tower.state_dict().items() if not key.endswith(counter)}
    state = {key: value for key, value in state.items() if not key.endswith(counter)}
    misshapen = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    faults = {
        "missing": [key for key in own if key not in state],
        "left over": [key for key in state if key not in own],
        "of another shape": misshapen,
    }
    complaints = [
        f"{len(keys)} keys {fault}: {', '.join(keys[:4])}" for fault, keys in faults.items() if keys
    ]
    if complaints:
        raise DoesNotFit("; ".join(complaints))
    tower.load_state_dict(tower.state_dict() | state)


def tower_of(state, heads=0):
    """A ViT or ResNeXt in eval mode, strictly filled from a dict. Raises DoesNotFit."""
    state, hugging_face = unwrap(state)
    try:
        if "pos_embed" in state and "patch_embed.proj.weight" in state:
            tower = vit_like(state, heads, hugging_face)
        elif "layer1.0.conv2.weight" in state:
            tower = resnext_like(state)
        else:
            keys = ", ".join(list(state)[:5])
            raise DoesNotFit(f"neither a DINO ViT nor a ResNeXt: its keys are {keys} ...")
    except (IndexError, ValueError) as error:  # shapes of no such network
        raise DoesNotFit(str(error)) from None
    fill(tower, state)
    return tower.eval()


def load_tower(path):
    """The tower of a published file, or of any checkpoint of ours. Raises UserError."""
    if not Path(path).exists():
        raise UserError(
            f"no {path}: fetch that checkpoint, name another with --vision_weights, or train a "
            "ViT with --vision_weights none"
        )
    state = read_file(path)
    if isinstance(state, dict) and "format" in state:
        tower = checkpoint.build(checkpoint.read(path)).model.tower
        if tower is None:
            raise UserError(f"{path}: a checkpoint without a tower")
        return tower
    try:
        return tower_of(state)
    except DoesNotFit as error:
        raise UserError(f"{path}: {error}") from None
