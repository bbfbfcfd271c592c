"""
Folders of a LLaVA as Hugging Face's transformers keeps them, opened as models of ours.

    python sample.py --image img.jpg --checkpoint DIR --prompt "What is this?"

Taken are LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision (of single pictures, and several) with language
models of the Llama, Mistral and Qwen2 kind and towers CLIP, SigLIP, ViT and Dinov2, in safetensors,
sharded or not, under the names of transformers 4 and 5; and such language models and towers alone.
What a config.json does not say has transformers' default, here as there. Weights are mapped and used
where they lie, but for q, k, v and gate, up, which are stacked; whatever does not fit is refused.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

import torch

import checkpoint
import vision
from config import UserError
from convnets import ConvNeXt
from images import NORMS, ImageFormat
from model import GPT, BabyLLaVA, GPTConfig, Projector
from tensors import TensorFile
from tokenizer_json import JsonTokenizer
from towers import CLIP, HUGGING_FACE_CONVNEXT, HUGGING_FACE_VIT, plan

# What transformers assumes where a config.json is silent.
LLAVA = {
    "llava": {"layer": -2, "strategy": "default", "image_token": 32000, "tower": "clip"},
    "llava_next": {"layer": -2, "strategy": "default", "image_token": 32000, "tower": "clip"},
    "llava_onevision": {"layer": -1, "strategy": "full", "image_token": 151646, "tower": "siglip"},
}
ALL_TEXT = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
TEXT = {
    "llama": {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": {
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
}
ALL_TOWERS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
TOWERS = {
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "vit": {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "dinov2": {"patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "convnext": {"patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
}
NO_CONFIG_CLIP = {  # LLaVA's tower where vision_config is left out: CLIP ViT-L/14 at 336
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# transformers' names, old and new -> ours; see towers.py for what the signs mean
LLAVA_RULES = [
    (r".*rotary_emb\.inv_freq$", ""),
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector|image_newline)", ""),
    (r"^model\.(?=layers|embed_tokens|norm)", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^lm_head\.", "gpt.lm_head."),
    (r"^language_model\.", "gpt."),
    (r"^multi_modal_projector\.linear_1\.", "projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "projector.2."),
    (r"(^gpt\..*\.)q_proj\.", r"\1qkv_proj@0."),
    (r"(^gpt\..*\.)k_proj\.", r"\1qkv_proj@1."),
    (r"(^gpt\..*\.)v_proj\.", r"\1qkv_proj@2."),
    (r"(^gpt\..*\.)gate_proj\.", r"\1gate_up_proj@0."),
    (r"(^gpt\..*\.)up_proj\.", r"\1gate_up_proj@1."),
]


# ---------------------------------------------------------------------------------------------
# Configurations


def read_json(path, default=None):
    """The dict in a JSON file; `default` where there is no file and one is given."""
    if default is not None and not path.exists():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object")
    return content


def refuse(folder, what, value, why="is not taken here"):
    raise UserError(f"{folder}/config.json: {what} {value!r} {why}")


def rope_of(folder, text):
    """(theta, scaling) of a text config; see model.rotary_frequencies."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or text.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        length = rope["original_max_position_embeddings"]
        return theta, (*(rope[name] for name in names), length)
    if kind not in ("default", "linear"):
        refuse(folder, "rope_type", kind)
    return theta, (rope["factor"],) if kind == "linear" else ()


def gpt_config(folder, text, tied):
    """The GPTConfig of a text config."""
    kind = text.get("model_type", "llama")
    if kind not in TEXT:
        refuse(folder, "text model", kind)
    text = ALL_TEXT | TEXT[kind] | text
    heads, width = text["num_attention_heads"], text["hidden_size"]
    if text["hidden_act"] != "silu":
        refuse(folder, "hidden_act", text["hidden_act"])
    for name in ("attention_bias", "mlp_bias"):
        if text.get(name):
            refuse(folder, name, True)
    if (text.get("head_dim") or width // heads) * heads != width:
        refuse(folder, "head_dim", text["head_dim"])
    block_size, window = text["max_position_embeddings"], text.get("sliding_window")
    if window and text.get("use_sliding_window", kind == "mistral"):
        block_size = min(block_size, window)  # within the window it changes nothing
    theta, scaling = rope_of(folder, text)
    return GPTConfig(
        vocab_size=text["vocab_size"],
        block_size=block_size,
        n_layer=text["num_hidden_layers"],
        n_head=heads,
        n_embd=width,
        n_kv_head=text.get("num_key_value_heads") or heads,
        n_hidden=text["intermediate_size"],
        rope_theta=float(theta),
        rope_scaling=scaling,
        norm_eps=text["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        tied=tied,
    )


def tower_kind(folder, seen):
    kind = seen.get("model_type", "clip").removesuffix("_vision_model")
    if kind not in TOWERS:
        refuse(folder, "tower", kind)
    return kind


def make_tower(folder, seen, alone=False):
    """(tower with random weights, the rules for its names) of a vision config. `alone`: with its
    own output, after the final norm; a LLaVA reads what is before it."""
    kind = tower_kind(folder, seen)
    seen = ALL_TOWERS | TOWERS[kind] | seen
    if kind == "convnext":
        depths, widths = seen.get("depths", [3, 3, 9, 3]), seen.get("hidden_sizes")
        widths = widths or [96, 192, 384, 768]
        if any(b != 2 * a for a, b in pairwise(widths)):
            refuse(folder, "hidden_sizes", widths)
        tower = ConvNeXt(depths, widths[0], seen["patch_size"], seen["layer_norm_eps"])
        return tower, HUGGING_FACE_CONVNEXT
    if seen["hidden_act"] not in ACTIVATIONS:
        refuse(folder, "hidden_act", seen["hidden_act"])
    arguments = {
        "size": seen["image_size"],
        "patch": seen["patch_size"],
        "width": seen["hidden_size"],
        "depth": seen["num_hidden_layers"],
        "heads": seen["num_attention_heads"],
        "hidden": seen["intermediate_size"],
        "activation": ACTIVATIONS[seen["hidden_act"]],
        "eps": seen["layer_norm_eps"],
        "offset": 0.0,
        "final_norm": alone and kind in ("vit", "dinov2"),
    }
    if kind == "clip":
        arguments |= {"patch_bias": False, "first_norm": True}
    elif kind == "siglip":
        arguments["cls"] = False
    elif kind == "dinov2":
        if seen.get("use_swiglu_ffn"):
            refuse(folder, "use_swiglu_ffn", True)
        arguments |= {"scaled": True, "hidden": int(seen.get("mlp_ratio", 4) * seen["hidden_size"])}
    elif not seen.get("qkv_bias", True):
        refuse(folder, "qkv_bias", False)
    rules = CLIP if kind in ("clip", "siglip") else HUGGING_FACE_VIT
    if not arguments["final_norm"]:
        rules = [(r"^layernorm\..*|^embeddings\.mask_token$", ""), *rules]
    return vision.ViT(**arguments), rules


def image_format(folder, settings, size):
    """How the folder's processor makes a tower's input of a picture."""
    found = read_json(folder / "processor_config.json", {}).get("image_processor")
    found = found or read_json(folder / "preprocessor_config.json")
    sizes, kind = found.get("crop_size") or found.get("size") or {}, settings["model_type"]
    wanted = sizes if isinstance(sizes, int) else sizes.get("shortest_edge", sizes.get("height"))
    if wanted != size and found.get("do_resize", True):
        raise UserError(f"{folder}: pictures of {wanted} pixels for a tower of {size}")
    tiled = kind in ("llava_next", "llava_onevision")
    fit = "centre" if found.get("do_center_crop", "crop_size" in found) else "squash"
    if kind == "llava" and found.get("do_pad"):
        fit = "pad"
    pinpoints = settings.get("image_grid_pinpoints") or found.get("image_grid_pinpoints")
    if tiled and not pinpoints:
        pinpoints = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    most = re.search(r"\d+", settings.get("vision_aspect_ratio") or "anyres_max_9")
    resample = {2: "bilinear", 3: "bicubic"}.get(found.get("resample", 3))
    if resample is None:
        raise UserError(
            f"{folder}: pictures resized by filter {found['resample']}: 2 and 3 are taken"
        )
    mean, std = NORMS["clip"]
    return ImageFormat(
        size,
        "squash" if tiled else fit,
        resample,
        tuple(found.get("image_mean", mean)),
        tuple(found.get("image_std", std)),
        tuple((w, h) for h, w in pinpoints) if tiled else (),
        int(most[0]) if kind == "llava_onevision" and most else 0,
    )


# ---------------------------------------------------------------------------------------------
# The tokenizer


def token_id(specials, entry):
    """The id of a token as tokenizer_config.json has it: its text, or an object with its text."""
    return specials.get(entry["content"] if isinstance(entry, dict) else entry)


def adds_bos(content, settings):
    """Whether the folder's tokenizer begins each text with its first special."""
    if "add_bos_token" in settings:
        return settings["add_bos_token"]
    processor = content.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing" and step["single"]:
            return "SpecialToken" in step["single"][0]
    return False


def read_tokenizer(folder, text, image_token):
    """The JsonTokenizer of a folder."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: there is none; a tokenizer.model alone is not read here")
    content, settings = read_json(path), read_json(folder / "tokenizer_config.json", {})
    specials = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    specials = content.get("model", {}).get("vocab", {}) | specials
    stops = read_json(folder / "generation_config.json", {}).get("eos_token_id")
    stops = stops if stops is not None else text.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    eos = token_id(specials, settings.get("eos_token"))
    stops = [token for token in [*stops, eos] if token is not None]
    if not stops:
        raise UserError(
            f"{folder}: neither generation_config.json nor the others name an eos token"
        )
    bos = token_id(specials, settings.get("bos_token"))
    pad = token_id(specials, settings.get("pad_token"))
    roles = {
        "eos": stops[0],
        "stops": sorted(set(stops)),
        "bos": bos if adds_bos(content, settings) else None,
        "pad": stops[0] if pad is None else pad,
        "image": image_token,
        "vocab_size": text["vocab_size"],
    }
    return JsonTokenizer(content, roles)


def find_template(folder, kind):
    """The name of the template that the folder's own chat template writes, else what language
    models of this kind were mostly trained with."""
    written = ""
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        written += json.dumps(read_json(folder / name, {}).get("chat_template", ""))
    if (folder / "chat_template.jinja").exists():
        written += (folder / "chat_template.jinja").read_text(encoding="utf-8")
    signs = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml", "[INST]": "mistral"}
    for sign, template in (signs | {"ASSISTANT": "v1"}).items():
        if sign in written:
            return template
    return {"mistral": "mistral", "qwen2": "chatml"}.get(kind, "v1")


# ---------------------------------------------------------------------------------------------
# Weights


class Weights:
    """All tensors of a folder by name, mapped, whatever files they are in."""

    def __init__(self, folder):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
        elif single.exists():
            names = [single.name]
        else:
            raise UserError(f"{folder}: no model.safetensors, and no index of several")
        self.home = {}
        for name in names:
            if Path(name).name != name or not (folder / name).exists():
                raise UserError(f"{folder}/{name}: named in the index, but not there")
            file = TensorFile(folder / name)
            self.home |= dict.fromkeys(file.names, file)
        if index.exists():
            lost = set(read_json(index)["weight_map"]) - set(self.home)
            if lost:
                raise UserError(f"{folder}: {sorted(lost)[0]} is in the index, but in no file")

    def __iter__(self):
        return iter(self.home)

    def shape(self, names):
        """Of these tensors stacked."""
        shapes = [self.home[name].shape(name) for name in names]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def read(self, names, shape, dtype):
        """These tensors stacked, in a dtype: the map itself where there is one and nothing to
        change, else a copy, after which the map's memory is released."""
        if len(names) == 1 and self.home[names[0]][names[0]].dtype == dtype:
            return self.home[names[0]][names[0]].view(shape)
        whole, first = torch.empty(self.shape(names), dtype=dtype), 0
        for name in names:
            part = self.home[name][name]
            end = first + part.shape[0] if len(names) > 1 else len(whole)
            whole[first:end] = part
            first = end
            self.home[name].release(name)
        return whole.view(shape)


def fill(folder, model, stacks, weights, dtype):
    """Give a model on the meta device its weights: {our name: [their names]}. Raises UserError
    where a name is missing or left over or a shape another."""
    own = dict(model.named_parameters())
    missing, left = sorted(set(own) - set(stacks)), sorted(set(stacks) - set(own))
    wrong = []
    for name in own.keys() & stacks.keys():
        shape, wanted = weights.shape(stacks[name]), tuple(own[name].shape)
        without_ones = tuple(n for n in wanted if n != 1) if name.endswith(FLATTENED) else wanted
        if shape not in (wanted, without_ones):
            wrong.append(f"{stacks[name][0]} {shape} for {wanted}")
    faults = {
        "missing": missing,
        "left over": [stacks[name][0] for name in left],
        "of another shape": sorted(wrong),
    }
    complaints = [f"{len(f)} weights {what}: {', '.join(f[:3])}" for what, f in faults.items() if f]
    if complaints:
        raise UserError(f"{folder}: {'; '.join(complaints)}")
    for name, parameter in own.items():
        owner, _, last = name.rpartition(".")
        tensor = weights.read(stacks[name], parameter.shape, dtype)
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(tensor))


FLATTENED = ("cls_token", "pos_embed")  # have leading dimensions of 1 with us, not with CLIP


def stacks_of(weights, tower_rules, tied):
    """{our name: [their names]} of a LLaVA's weights."""
    seen = {
        name: re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", "", name) for name in weights
    }
    of_tower = {short: name for name, short in seen.items() if short != name}
    rest = [name for name in weights if name not in of_tower.values()]
    rules = LLAVA_RULES + ([(r"^gpt\.lm_head\..*", "")] if tied else [])
    stacks = plan(rest, rules)
    for ours, names in plan(of_tower, tower_rules).items():
        stacks[f"tower.{ours}"] = [of_tower[name] for name in names]
    return stacks


# ---------------------------------------------------------------------------------------------
# The whole


def read_config(folder):
    """The config.json of a folder, as a dict with a model_type."""
    settings = read_json(folder / "config.json")
    if "model_type" not in settings:
        raise UserError(f"{folder}/config.json: no model_type")
    return settings


def is_tied(settings, text, weights):
    says_so = settings.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    return bool(says_so) or not any("lm_head" in name for name in weights)


def choose_dtype(name, stored):
    return getattr(torch, name) if name else stored


def make_llava(folder, settings, weights):
    """(a BabyLLaVA on the meta device, {our name: [their names]}, its text config)."""
    kind = settings["model_type"]
    defaults, text = LLAVA[kind], settings.get("text_config") or {}
    seen = settings.get("vision_config") or (NO_CONFIG_CLIP if kind != "llava_onevision" else {})
    seen = {"model_type": defaults["tower"]} | seen
    layer = settings.get("vision_feature_layer", defaults["layer"])
    strategy = settings.get("vision_feature_select_strategy", defaults["strategy"])
    if not isinstance(layer, int):
        refuse(folder, "vision_feature_layer", layer, "is several layers")
    projector = (
        settings.get("projector_hidden_act", "gelu"),
        settings.get("multimodal_projector_bias", True),
    )
    if projector != ("gelu", True):
        refuse(folder, "projector (activation, bias)", projector)
    tied = is_tied(settings, text, weights)
    sizes = gpt_config(folder, text, tied)
    if sizes.fault():
        raise UserError(f"{folder}/config.json: {sizes.fault()}")
    image_token = settings.get("image_token_index", settings.get("image_token_id"))
    image_token = defaults["image_token"] if image_token is None else image_token
    with torch.device("meta"):
        tower, rules = make_tower(folder, seen)
        depth = len(getattr(tower, "blocks", ())) or 1
        layer = layer if layer < 0 else layer - depth - 1  # hidden_states counts the embeddings too
        if tower.fault(seen.get("image_size", 1 << 20), layer):
            refuse(folder, "vision_feature_layer", layer, f"and a tower of {depth} blocks")
        has_cls = tower.arguments.get("cls", False)
        if strategy == "default" and not has_cls:
            why = "would leave out a patch: this tower has no CLS"
            refuse(folder, "vision_feature_select_strategy", strategy, why)
        model = BabyLLaVA(
            GPT(sizes),
            Projector("mlp2x_gelu", tower.width, sizes.n_embd),
            tower,
            image_token,
            layer,
            keep_cls=strategy == "full" and has_cls,
            tiled=kind != "llava",
        )
    if model.tiled and model.keep_cls:
        refuse(folder, "vision_feature_select_strategy", strategy, "leaves CLS among the tiles")
    return model, stacks_of(weights, rules, tied), text | {"vocab_size": sizes.vocab_size}


def load(folder, device="cpu", dtype=""):
    """The checkpoint.Loaded of a LLaVA folder, in a dtype; empty: as it is stored."""
    folder = Path(folder)
    settings = read_config(folder)
    if settings["model_type"] not in LLAVA:
        refuse(folder, "model_type", settings["model_type"], f"is none of {', '.join(LLAVA)}")
    weights = Weights(folder)
    try:
        model, stacks, text = make_llava(folder, settings, weights)
        pictures = image_format(folder, settings, model.tower.arguments["size"])
        tokenizer = read_tokenizer(folder, text, model.image_token)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder}: a setting that is not understood ({error!r})") from None
    embedding = stacks.get("gpt.embed_tokens.weight")
    stored = weights.home[embedding[0]][embedding[0]].dtype if embedding else torch.float32
    fill(folder, model, stacks, weights, choose_dtype(dtype, stored))
    model.gpt.set_rotary()
    template = {"name": find_template(folder, text.get("model_type", "llama")), "system": ""}
    facts = checkpoint.of_folder(folder, model, tokenizer, pictures, template)
    return checkpoint.Loaded(model.eval().to(device), tokenizer, pictures, facts)


def load_tower(folder):
    """The tower of a folder, of its own or in a LLaVA."""
    folder = Path(folder)
    settings, weights = read_config(folder), Weights(folder)
    seen, prefix = settings.get("vision_config"), r"^(model\.)?vision_tower\."
    if settings["model_type"] not in LLAVA:
        seen = seen or settings
        seen = seen | {"model_type": seen.get("model_type", settings["model_type"])}
        prefix = r"^$"
    with torch.device("meta"):
        tower, rules = make_tower(folder, seen or NO_CONFIG_CLIP, alone=prefix == r"^$")
    names = {re.sub(prefix, "", name): name for name in weights}
    if prefix != r"^$":
        names = {short: name for short, name in names.items() if short != name}
    names = {re.sub(r"^(vit|dinov2|convnext|vision_model)\.", "", k): v for k, v in names.items()}
    stacks = {ours: [names[n] for n in theirs] for ours, theirs in plan(names, rules).items()}
    fill(folder, tower, stacks, weights, torch.float32)
    return tower.eval()


def load_language(folder):
    """(GPT, tokenizer, template's name) of a language model's folder, or of a LLaVA's."""
    folder = Path(folder)
    settings, weights = read_config(folder), Weights(folder)
    text = settings.get("text_config") or settings
    kind = text.get("model_type", "llama")
    tied = is_tied(settings, text, weights)
    sizes = gpt_config(folder, text, tied)
    with torch.device("meta"):
        model = BabyLLaVA(GPT(sizes))
    stacks = {k: v for k, v in stacks_of(weights, [], tied).items() if k.startswith("gpt.")}
    fill(folder, model, stacks, weights, torch.float32)
    model.gpt.set_rotary()
    # a language model has no id for images yet: one is added behind its vocabulary
    return model, text | {"vocab_size": sizes.vocab_size}, kind
