"""
The settings of a Hugging Face folder: sizes, tower, image format, tokenizer, template. A missing
setting has transformers' default; an unsupported one is refused.
"""

import math
import re
import sys
from itertools import pairwise

import vision
from common import files
from common.images import NORMS, ImageFormat
from config import UserError
from model import GPTConfig
from pretrained import chat_templates
from pretrained.convnets import ConvNeXt
from pretrained.tokenizer_json import JsonTokenizer
from pretrained.tower_names import CLIP, HUGGING_FACE_CONVNEXT, HUGGING_FACE_VIT
from tokenizer import TEMPLATES

# The defaults of transformers for settings that a config.json leaves out.
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
TOWER_DEFAULTS = {
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "vit": {"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "dinov2": {"patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "dinov2_with_registers": {
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_register_tokens": 4,
    },
    "convnext": {"patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
}
NO_CONFIG_CLIP = {  # LLaVA's tower without a vision_config: CLIP ViT-L/14 at 336
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# The image processors of transformers, by the names of their classes without "ImageProcessor".
ALL_PROCESSORS = {
    "do_resize": True,
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": False,
}
CROPPED = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True}
OF_CLIP, OF_HALF = (
    {"image_mean": mean, "image_std": std} for mean, std in (NORMS["clip"], NORMS["half"])
)
PROCESSORS = {
    "CLIP": CROPPED | OF_CLIP,
    "Bit": CROPPED | OF_CLIP,
    "Llava": CROPPED | OF_CLIP,
    "LlavaNext": CROPPED | OF_CLIP,
    "LlavaOnevision": {"size": {"height": 384, "width": 384}} | OF_CLIP,
    "Siglip": {"size": {"height": 224, "width": 224}} | OF_HALF,
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2} | OF_HALF,
}
SQUARE = ("ViT",)  # a size that is a number is that of a square, else of the shorter side
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# ---------------------------------------------------------------------------------------------
# Configurations


def read_json(path, default=None):
    """The dict in a JSON file; `default`, if given, for a missing file. Raises UserError."""
    if default is not None and not path.exists():
        return default
    try:
        content = files.read_json(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an object")
    return content


def refuse(folder, what, value, why="is not supported"):
    raise UserError(f"{folder}/config.json: {what} {value!r} {why}")


def positive(folder, config, name):
    """A number above 0 in a config. Raises UserError."""
    value = config[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        refuse(folder, name, value, "is not a number above 0")
    return value


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
        block_size = min(block_size, window)  # within the window it has no effect
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
        norm_eps=positive(folder, text, "rms_norm_eps"),
        qkv_bias=kind == "qwen2",
        tied=tied,
    )


def tower_kind(folder, seen):
    kind = seen.get("model_type", "clip").removesuffix("_vision_model")
    if kind not in TOWER_DEFAULTS:
        refuse(folder, "tower", kind)
    return kind


def make_tower(folder, seen, alone=False):
    """(tower with random weights, the rules for its names) of a vision config. alone: with the
    final norm; a LLaVA reads the features before it."""
    kind = tower_kind(folder, seen)
    seen = ALL_TOWERS | TOWER_DEFAULTS[kind] | seen
    if kind == "convnext":
        depths, widths = seen.get("depths", [3, 3, 9, 3]), seen.get("hidden_sizes")
        widths = widths or [96, 192, 384, 768]
        if any(b != 2 * a for a, b in pairwise(widths)):
            refuse(folder, "hidden_sizes", widths)
        if seen["hidden_act"] != "gelu":
            refuse(folder, "hidden_act", seen["hidden_act"])
        tower = ConvNeXt(depths, widths[0], seen["patch_size"])
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
        "eps": positive(folder, seen, "layer_norm_eps"),
        "offset": 0.0,
        "final_norm": alone and kind not in ("clip", "siglip"),
    }
    if kind == "clip":
        arguments |= {"patch_bias": False, "first_norm": True}
    elif kind == "siglip":
        arguments["cls"] = False
    elif kind in ("dinov2", "dinov2_with_registers"):
        if seen.get("use_swiglu_ffn"):
            refuse(folder, "use_swiglu_ffn", True)
        arguments |= {"scaled": True, "hidden": int(seen.get("mlp_ratio", 4) * seen["hidden_size"])}
        registers = seen.get("num_register_tokens", 0)
        arguments |= {"registers": registers, "antialias": kind == "dinov2_with_registers"}
    elif not seen.get("qkv_bias", True):
        refuse(folder, "qkv_bias", False)
    rules = CLIP if kind in ("clip", "siglip") else HUGGING_FACE_VIT
    if not arguments["final_norm"]:
        rules = [*rules, (r"^norm\..*", "")]
    return vision.ViT(**arguments), rules


def processor_settings(folder, kind):
    """(name of the image processor's class without its ending, its settings with defaults) of the
    folder of a LLaVA of this kind."""
    found = read_json(folder / "processor_config.json", {}).get("image_processor")
    found = found or read_json(folder / "preprocessor_config.json")
    usual = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[kind]
    name = found.get("image_processor_type") or found.get("feature_extractor_type") or usual
    name = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    if name not in PROCESSORS:
        raise UserError(
            f"{folder}: the image processor {name} is not supported: one of {', '.join(PROCESSORS)}"
        )
    return name, ALL_PROCESSORS | PROCESSORS[name] | found  # a null is false, and no default


def sides_of(folder, size, is_square):
    """(shorter side, None) or (width, height) of an image processor's size, a number or a dict."""
    if isinstance(size, int):
        return (size, size) if is_square else (size, None)
    if not isinstance(size, dict):
        raise UserError(f"{folder}: an image processor without a size to cut to")
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"], None
    if set(size) == {"height", "width"}:
        return size["width"], size["height"]
    raise UserError(f"{folder}: pictures resized to {size} are not supported")


def image_format(folder, settings, size):
    """The ImageFormat of a folder's image processor, for a tower of `size` pixels. Raises
    UserError for settings that an ImageFormat does not have."""
    kind = settings["model_type"]
    name, found = processor_settings(folder, kind)
    tiled = kind in ("llava_next", "llava_onevision")
    side, height = sides_of(folder, found["size"], name in SQUARE)
    crop = sides_of(folder, found.get("crop_size"), True) if found["do_center_crop"] else None
    if not found["do_resize"] or side != (height or side) or (height is None and not crop):
        raise UserError(f"{folder}: an image processor whose pictures are not squares")
    final, fit, edge = side, "squash", 0
    if crop and crop != (side, side):
        if crop[0] != crop[1] or crop[0] > side or height is not None or tiled:
            raise UserError(f"{folder}: pictures resized to {found['size']}, then cut to {crop}")
        final, edge = crop[0], side
    if height is None and not tiled:
        fit = "centre"
    if name == "Llava" and found["do_pad"]:
        if edge:
            raise UserError(f"{folder}: padded pictures resized to {side}, then cut to {final}")
        fit = "pad"
    if final != size:
        raise UserError(f"{folder}: pictures of {final} pixels for a tower of {size}")
    mean, std = norm_of(folder, found, fit)
    pinpoints = settings.get("image_grid_pinpoints") or found.get("image_grid_pinpoints")
    if tiled and not pinpoints:
        pinpoints = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    most = re.search(r"\d+", settings.get("vision_aspect_ratio") or "anyres_max_9")
    resample = {2: "bilinear", 3: "bicubic"}.get(found["resample"])
    if resample is None:
        raise UserError(
            f"{folder}: pictures resized by filter {found['resample']}: 2 and 3 are taken"
        )
    return ImageFormat(
        size,
        fit,
        resample,
        mean,
        std,
        tuple((w, h) for h, w in pinpoints) if tiled else (),
        int(most[0]) if kind == "llava_onevision" and most else 0,
        edge,
    )


def norm_of(folder, found, fit):
    """(mean, std) of pixels in 0..1 that do what an image processor does to pixels in 0..255:
    multiply by rescale_factor, subtract image_mean, divide by image_std; each may be left out."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if found["do_normalize"]:
        mean, std = (
            (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
            for value in (found["image_mean"], found["image_std"])
        )
    factor = found["rescale_factor"] if found["do_rescale"] else 1.0
    scale = 1.0 if abs(factor * 255 - 1) < 1e-6 else 1 / (255 * factor)
    if fit == "pad" and (scale != 1.0 or not found["do_normalize"]):
        raise UserError(f"{folder}: padded pictures that are not normalised as usual")
    return tuple(m * scale for m in mean), tuple(s * scale for s in std)


# ---------------------------------------------------------------------------------------------
# The tokenizer


def token_id(specials, entry):
    """The id of a token in tokenizer_config.json, which is a text or an object with a text."""
    return specials.get(entry["content"] if isinstance(entry, dict) else entry)


def adds_bos(content, settings):
    """Whether the folder's tokenizer puts bos before each text."""
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
        raise UserError(f"{path}: missing; a tokenizer.model alone is not supported")
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
    size = text["vocab_size"]
    needed = {"<image>": image_token, "eos": stops[0], "bos": bos}
    for name, token in needed.items():
        if token is not None and not 0 <= token < size:
            raise UserError(
                f"{folder}: the token {name} has the id {token}, and there are {size} embeddings"
            )
    if pad is None or not 0 <= pad < size:  # any id does: what is padding is in no loss
        pad = stops[0]
    roles = {
        "eos": stops[0],
        "stops": sorted(set(stops)),
        "bos": bos if adds_bos(content, settings) else None,
        "pad": pad,
        "image": image_token,
        "vocab_size": size,
    }
    return JsonTokenizer(content, roles)


def find_template(folder, kind, tokenizer):
    """The description of a folder's chat template for checkpoint.Loaded, with "why" if it has one
    that cannot be read; without one, that of most language models of this kind."""
    source = chat_templates.find_program(folder, read_json)
    if not source:
        name = next(name for name, template in TEMPLATES.items() if kind in template.models)
        print(f"{folder}: no chat template; --template {name} is taken", file=sys.stderr)
        return {"name": name, "system": ""}
    settings = read_json(folder / "tokenizer_config.json", {})
    names = {
        name: text["content"] if isinstance(text, dict) else text
        for name, text in settings.items()
        if name in ("bos_token", "eos_token", "pad_token", "unk_token") and text
    }
    try:
        return chat_templates.read(source, tokenizer, names)
    except chat_templates.Unlike as error:
        return {"name": "", "system": "", "why": f"{folder}: its chat template: {error}"}
