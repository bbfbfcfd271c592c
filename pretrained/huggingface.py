"""
Hugging Face folders of a LLaVA, a language model or a tower, opened as models of ours.

    python sample.py --image img.jpg --checkpoint DIR --prompt "What is this?"

Supported are LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision with language models of the Llama, Mistral
and Qwen2 kind and towers CLIP, SigLIP, ViT and Dinov2, in safetensors, sharded or not, under the
names of transformers 4 and 5; and such language models and towers alone, with a classifier or
not. Weights are memory-mapped and used in place, except q, k, v and gate, up, which are stacked.
What does not fit is refused.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import torch

import checkpoint
import vision
from common.files import about
from config import UserError
from model import GPT, BabyLLaVA, make_projector
from pretrained import exported
from pretrained.hf_config import (
    LLAVA,
    NO_CONFIG_CLIP,
    find_template,
    gpt_config,
    image_format,
    make_tower,
    read_json,
    read_tokenizer,
    refuse,
)
from pretrained.safetensors import TensorFile
from pretrained.tower_names import plan

# transformers' names, old and new -> ours; the signs are those of tower_names.py
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
# Weights


class Weights:
    """All tensors of a folder by name, memory-mapped, in one file or several."""

    def __init__(self, folder):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
                raise UserError(f"{index}: want {{'weight_map': {{tensor: file}}}}")
            names = sorted(set(names.values()))
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

    def all(self):
        """{name: tensor}, memory-mapped."""
        return {name: file[name] for name, file in self.home.items()}

    def shape(self, names):
        """The shape of these tensors stacked."""
        shapes = [self.home[name].shape(name) for name in names]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def read(self, names, shape, dtype):
        """These tensors stacked, in a dtype: a view of the map for one tensor of this dtype, else a
        copy, after which the map's memory is released."""
        dtype = dtype or self.home[names[0]][names[0]].dtype
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


def load_weights(folder, model, stacks, weights, dtype):
    """Give a model on the meta device its weights. stacks: {our name: [their names]}. Raises
    UserError with the names that are missing, left over or of another shape."""
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
    found = [f"{len(f)} weights {what}: {', '.join(f[:3])}" for what, f in faults.items() if f]
    if found:
        raise UserError(f"{folder}: {'; '.join(found)}")
    for name, parameter in own.items():
        owner, _, last = name.rpartition(".")
        tensor = weights.read(stacks[name], parameter.shape, dtype)
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(tensor))


FLATTENED = ("cls_token", "pos_embed")  # with leading dimensions of 1 here, without in CLIP


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
    own = {"mm_vision_tower", "mm_projector_type", "mm_hidden_size"} & set(settings)
    if own:
        raise UserError(
            f"{folder}: a folder of LLaVA's own code, not of transformers: take the converted one, "
            "such as llava-hf/llava-1.5-7b-hf"
        )
    if settings.get("quantization_config"):
        kind = settings["quantization_config"].get("quant_method", "some method")
        raise UserError(
            f"{folder}: weights quantized by {kind} are not supported: take the original"
        )
    if not isinstance(settings.get("model_type"), str):
        raise UserError(f"{folder}/config.json: model_type {settings.get('model_type')!r}")
    return settings


def is_tied(folder, settings, text, weights):
    """Whether the head shares the weights of the embedding, as transformers 5 decides it: a head of
    its own in the weights goes before tie_word_embeddings, at whichever level that stands. Raises
    UserError if there is neither."""
    says_so = bool(settings.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    heads = [name for name in weights if re.search(r"(^|\.)lm_head\.weight$", name)]
    if not heads and not says_so:
        raise UserError(f"{folder}: no lm_head.weight, and tie_word_embeddings is false")
    if not (heads and says_so):
        return says_so
    embedding = next(name for name in weights if name.endswith("embed_tokens.weight"))
    return torch.equal(weights.home[heads[0]][heads[0]], weights.home[embedding][embedding])


def choose_dtype(name, stored):
    return getattr(torch, name) if name else stored


def make_llava(folder, settings, weights):
    """(a BabyLLaVA on the meta device, {our name: [their names]}, its text config)."""
    kind = settings["model_type"]
    defaults, text = LLAVA[kind], settings.get("text_config") or {}
    seen = settings.get("vision_config") or (NO_CONFIG_CLIP if kind != "llava_onevision" else {})
    seen = {"model_type": defaults["tower"]} | seen
    if seen["model_type"].startswith(("convnext", "dinov2_with_registers")):
        refuse(folder, "tower", seen["model_type"], "is none of a LLaVA of transformers")
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
    tied = is_tied(folder, settings, text, weights)
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
            make_projector("mlp2x_gelu", tower.width, sizes.n_embd),
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
    if "nanobabyllava" in settings:  # written by export.py: open the checkpoint that it was
        return restore(folder, settings, weights, device, dtype)
    with understood(folder):
        model, stacks, text = make_llava(folder, settings, weights)
        pictures = image_format(folder, settings, model.tower.arguments["size"])
        tokenizer = read_tokenizer(folder, text, model.image_token)
    embedding = stacks.get("gpt.embed_tokens.weight")
    stored = weights.home[embedding[0]][embedding[0]].dtype if embedding else torch.float32
    load_weights(folder, model, stacks, weights, choose_dtype(dtype, stored))
    model.gpt.set_rotary()
    template = find_template(folder, text.get("model_type", "llama"), tokenizer)
    facts = checkpoint.describe_folder(folder, model, tokenizer, pictures, template)
    return checkpoint.Loaded(model.eval().to(device), tokenizer, pictures, facts)


def restore(folder, settings, weights, device, dtype):
    """The Loaded that export.py exported, to the same bits. Raises UserError if the weights have
    changed since."""
    ours = settings["nanobabyllava"]
    with understood(folder):
        _, rules = make_tower(folder, settings["vision_config"], alone=True)
        tied = is_tied(folder, settings, settings["text_config"], weights)
        stacks = stacks_of(weights, rules, tied)
        state = {n: weights.read(names, weights.shape(names), None) for n, names in stacks.items()}
        if vision.weights_digest(weights.all()) != ours["written"]:
            raise UserError(
                f"{folder}: its weights are no longer those that were exported: take "
                '"nanobabyllava" out of its config.json to open it as any other folder'
            )
        saved = exported.undo(ours, state, read_json(folder / "tokenizer.json"))
        with about(folder):
            loaded = checkpoint.build(saved, device)
        if dtype:
            loaded.model.to(getattr(torch, dtype)).gpt.set_rotary()
        return loaded


@contextmanager
def understood(folder):
    """Turn an exception about missing or mistyped settings of a folder into a UserError."""
    faults = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)
    try:
        yield
    except faults as error:
        raise UserError(f"{folder}: an unknown setting ({error!r})") from None


def load_tower(folder):
    """The tower of a tower's folder or of a LLaVA's."""
    folder = Path(folder)
    with understood(folder):
        return read_tower(folder, read_config(folder), Weights(folder))


def read_tower(folder, settings, weights):
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
    stacks = {ours: [names[n] for n in theirs] for ours, theirs in plan(names, rules).items()}
    load_weights(folder, tower, stacks, weights, torch.float32)
    return tower.eval()


def load_language(folder):
    """(BabyLLaVA of a GPT alone, its tokenizer) of a language model's folder. The first id after
    its vocabulary becomes the image token."""
    folder, tokenizer = Path(folder), language_tokenizer(folder)
    settings, weights = read_config(folder), Weights(folder)
    with understood(folder):
        tied = is_tied(folder, settings, settings, weights)
        sizes = gpt_config(folder, settings, tied)
        with torch.device("meta"):
            model = BabyLLaVA(GPT(sizes))
    load_weights(folder, model, stacks_of(weights, [], tied), weights, torch.float32)
    model.gpt.set_rotary()
    model.image_token = tokenizer.image
    enlarge(model.gpt, tokenizer.vocab_size)
    return model, tokenizer


def language_tokenizer(folder):
    """The tokenizer that load_language() returns, without its weights. If all ids are taken, the
    vocabulary grows to a multiple of 64."""
    folder = Path(folder)
    with understood(folder):
        settings = read_config(folder)
        size = gpt_config(folder, settings, True).vocab_size
        content = read_json(folder / "tokenizer.json")
        taken = {entry["id"] for entry in content["added_tokens"]}
        image = 1 + max(taken | set(content["model"]["vocab"].values()))
        if image >= size:
            size = image // 64 * 64 + 64
        return read_tokenizer(folder, settings | {"vocab_size": size}, image)


@torch.no_grad()
def enlarge(gpt, vocab_size):
    """Add embeddings for new tokens to a GPT: the mean of the old ones."""
    if vocab_size <= gpt.config.vocab_size:
        return
    layers = [gpt.embed_tokens] + ([] if gpt.config.tied else [gpt.lm_head])
    for layer in layers:
        mean = layer.weight.mean(0, keepdim=True)
        more = mean.expand(vocab_size - len(layer.weight), -1)
        layer.weight = torch.nn.Parameter(torch.cat([layer.weight, more]))
    gpt.config.vocab_size = vocab_size
