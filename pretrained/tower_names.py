"""
State dicts of published towers: their architecture, and their names in ours.

Supported are the backbones and full checkpoints of facebookresearch/dino and of eminorhan's SAYCam
models (ViT, ResNeXt-50), DINOv2 with and without registers, CLIP, SigLIP and ConvNeXt; and Hugging
Face's ViT, Dinov2, Dinov2WithRegisters, CLIP, SigLIP and ConvNext, with old and new names. The
architecture is read off names and shapes. What does not fit is named in the error, and nothing is
loaded in part.
"""

import argparse
import math
import re

import torch

import checkpoint
import vision
from pretrained.convnets import ConvNeXt, ResNeXt
from pretrained.safetensors import TensorFile


class DoesNotFit(Exception):
    """The reason why a state dict does not fit, in one line."""


def read_file(path):
    """The content of a torch.save or safetensors file. Raises UserError."""
    if str(path).endswith(".safetensors"):
        file = TensorFile(path)
        return {name: file[name] for name in file.names}
    # DINO's training checkpoints contain their command line, an argparse.Namespace
    return checkpoint.read_torch(path, safe=[argparse.Namespace])


# ---------------------------------------------------------------------------------------------
# Names. A rule is a pattern and its replacement. "@1" in a replacement means part 1 of a stacked
# tensor (q, k, v); an empty name means that the tensor is not needed.

HUGGING_FACE_VIT = [
    (r"^(vit|dinov2(_with_registers)?)\.", ""),
    # for other uses than features: a pooled vector, classes, masked training
    (r"^(pooler|classifier|decoder)\..*|^embeddings\.mask_token$", ""),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before", ".norm1"),
    (r"\.layernorm_after", ".norm2"),
    (r"\.attention\.(output\.dense|o_proj)", ".attn.proj"),
    (r"\.attention\.(attention\.)?q(uery|_proj)", ".attn.qkv@0"),
    (r"\.attention\.(attention\.)?k(ey|_proj)", ".attn.qkv@1"),
    (r"\.attention\.(attention\.)?v(alue|_proj)", ".attn.qkv@2"),
    (r"\.intermediate\.dense", ".mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
]
CLIP = [  # and SigLIP
    (r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias).*", ""),
    (r"^vision_model\.", ""),
    (r"^(post_layernorm|head|classifier)\..*|^embeddings\.position_ids$", ""),  # not for patches
    (r"^embeddings\.class_embedding", "cls_token"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(encoder\.)?layers\.", "blocks."),
    (r"\.layer_norm(\d)", r".norm\1"),
    (r"\.self_attn\.q_proj", ".attn.qkv@0"),
    (r"\.self_attn\.k_proj", ".attn.qkv@1"),
    (r"\.self_attn\.v_proj", ".attn.qkv@2"),
    (r"\.self_attn\.out_proj", ".attn.proj"),
]
HUGGING_FACE_CONVNEXT = [
    (r"^convnext\.", ""),
    (r"^(layernorm|classifier)\..*", ""),  # for the pooled vector
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.", ""),
    (r"\.downsampling_layer\.", ".downsample."),
    (r"\.layers\.", ".blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
]
CONVNEXT = [  # facebookresearch's and timm's; our names are timm's
    (r"^(visual\.)?(trunk\.)?", ""),
    (r"^(norm|head)\..*", ""),
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
]


def plan(names, rules):
    """{our name: [their names, stacked in this order]}."""
    stacks = {}
    for name in names:
        ours = name
        for pattern, becomes in rules:
            ours = re.sub(pattern, becomes, ours)
        part = re.search(r"@(\d)", ours)
        ours = re.sub(r"@\d", "", ours)
        if ours:
            stacks.setdefault(ours, {})[int(part[1]) if part else 0] = name
    return {ours: [parts[i] for i in sorted(parts)] for ours, parts in stacks.items()}


def renamed(state, rules):
    """A state dict under our names; q, k and v stacked into one."""
    return {
        ours: torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]]
        for ours, names in plan(state, rules).items()
    }


def find_rules(state):
    """The rules for the names of a state dict; None if they are ours already."""
    has = lambda part: any(part in key for key in state)
    if has("embeddings.patch_embedding.weight"):
        return CLIP
    if has("embeddings.patch_embeddings.projection"):
        return HUGGING_FACE_VIT
    if has("layer_scale_parameter"):
        return HUGGING_FACE_CONVNEXT
    return CONVNEXT if has("conv_dw") or has("dwconv") else None


def unwrap(state):
    """(the state dict of the backbone under our names, the rules that renamed it). Of a training
    checkpoint the teacher; prefixes of its keys are removed, and heads and the mask token of
    training are left out."""
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state, dict):
            state = state.get(key, state)
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise DoesNotFit("no state dict of tensors")
    prefixes, not_backbone = r"^((module|backbone|encoder)\.)+", r"(head|fc)\.|mask_token$"
    state = {re.sub(prefixes, "", key): value for key, value in state.items()}
    rules = find_rules(state)
    state = renamed(state, rules or [])
    if rules is CLIP and "pos_embed" in state:
        shapes = {"cls_token": (1, 1, -1), "pos_embed": (1, *state["pos_embed"].shape[-2:])}
        state |= {key: state[key].reshape(shapes[key]) for key in shapes if key in state}
    backbone = {key: value for key, value in state.items() if not re.match(not_backbone, key)}
    return backbone, rules


# ---------------------------------------------------------------------------------------------
# Architectures


# {width: heads} of the ViTs of DINO, DINOv2, CLIP and SigLIP: 64 wide each, except in the largest
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}


def vit_like(state, heads, rules):
    """A ViT with random weights and the shapes in `state`.

    No weight shows the number of heads. heads 0: that of the published ViTs of this width (HEADS);
    for any other width it would be a guess, and DoesNotFit is raised."""
    width, patch = state["pos_embed"].shape[2], state["patch_embed.proj.weight"].shape[2]
    heads = heads or HEADS.get(width)
    if not heads or (width > 1024 and rules is HUGGING_FACE_VIT and width != 1536):
        raise DoesNotFit(
            f"a ViT {width} wide, unlike the published ones: its weights do not show how many "
            "heads it has; give a folder with its config.json, or a vision.pt of ours"
        )
    has_cls = "cls_token" in state
    blocks = [re.match(r"blocks\.(\d+)\.", key) for key in state]
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    arguments = {
        "size": math.isqrt(state["pos_embed"].shape[1] - has_cls) * patch,
        "patch": patch,
        "width": width,
        "depth": 1 + max((int(match[1]) for match in blocks if match), default=0),
        "heads": heads,
        "hidden": hidden if hidden != 4 * width else 0,
        "scaled": "blocks.0.ls1.gamma" in state,
        "registers": registers,
        "offset": 0.0 if rules or registers else 0.1,
        "antialias": registers > 0,
    }
    if rules is CLIP:
        arguments |= {
            "activation": "quick_gelu" if has_cls else "gelu_tanh",
            "eps": 1e-5 if has_cls else 1e-6,
            "patch_bias": "patch_embed.proj.bias" in state,
            "cls": has_cls,
            "first_norm": "norm_pre.weight" in state,
            "final_norm": False,
        }
    return vision.ViT(**arguments)


def resnext_like(state):
    """A ResNeXt with random weights and the shapes in `state`."""
    depths = []
    for i in range(1, 5):
        convolution = re.compile(rf"layer{i}\.\d+\.conv2\.weight")
        depths.append(len([key for key in state if convolution.fullmatch(key)]))
    middle, group = state["layer1.0.conv2.weight"].shape[:2]
    return ResNeXt(depths, middle, middle // group)


def convnext_like(state):
    """A ConvNeXt with random weights and the shapes in `state`."""
    depths = []
    while any(key.startswith(f"stages.{len(depths)}.") for key in state):
        block = re.compile(rf"stages\.{len(depths)}\.blocks\.\d+\.gamma")
        depths.append(len([key for key in state if block.fullmatch(key)]))
    width, _, stem, _ = state["stem.0.weight"].shape
    return ConvNeXt(depths, width, stem)


def load_strictly(tower, state):
    """Load `state` into a tower, strictly. Raises DoesNotFit with the keys that are missing, left
    over or of another shape."""
    counter = "num_batches_tracked"  # BatchNorm's, not a weight; some files have it
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
    """The tower of a published state dict, in eval mode. Raises DoesNotFit."""
    state, rules = unwrap(state)
    try:
        if "pos_embed" in state and "patch_embed.proj.weight" in state:
            tower = vit_like(state, heads, rules)
        elif "layer1.0.conv2.weight" in state:
            tower = resnext_like(state)
        elif "stem.0.weight" in state:
            tower = convnext_like(state)
        else:
            keys = ", ".join(list(state)[:5])
            raise DoesNotFit(f"no ViT, ResNeXt or ConvNeXt: its keys are {keys} ...")
    except (IndexError, ValueError, KeyError) as error:  # shapes that no such network has
        raise DoesNotFit(str(error)) from None
    load_strictly(tower, state)
    return tower.eval()
