"""
A checkpoint as a folder for others: for transformers, or for one of two challenges; or in one file.

    python export.py out/run/phase2.pt DIR                                        # transformers
    python export.py out/run/phase3.shards out/run/phase3.pt    # of a run with --shard on
    python export.py out/run/phase3.pt DIR --to babyvlm [--name NAME] [--repo USER/NAME]
    python export.py out/run/phase2.pt DIR --to egobabyvlm
    python export.py out/seed1 out/seed2 out/seed3 ROW.json --row [--name NAME] [--team TEAM]

The last three are described in adapters/submission.py and adapters/ego_submission.py. The first can
be opened here again as the same checkpoint, bit for bit. A language model alone is written for
AutoModelForCausalLM.

    AutoModelForImageTextToText.from_pretrained("DIR")     # then, with transformers

The GPT becomes a Llama (a Qwen2, if it has biases), the tower a ViT, CLIP or SigLIP. With
select_layer -1 our features are taken after the tower's final norm, those of transformers' LLaVA
before it: norm_as_layer() writes the norm as one more block. What cannot be expressed is refused.
Letters: E vision width, C model width.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import config
import vision
from adapters import ego_submission, submission
from common.files import read_json, write_json, writing
from common.images import RESAMPLING
from config import UserError, option
from pretrained import safetensors, tokenizer_json
from pretrained.exported import K  # 256: the factor of norm_as_layer(), which reading needs too
from tokenizer import end_tokens, read_template

LEFT_OUT = ("weights", "optimizers", "dino", "lora", "tokenizer")  # not in config.json
VIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
CLIP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
}
CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


# ---------------------------------------------------------------------------------------------
# The tower


def unscaled(tower):
    """The state dict of a ViT with DINOv2's layer scales merged into the linear layers before."""
    state = dict(tower.state_dict())
    for name in [name for name in state if name.endswith(".gamma")]:
        gamma = state.pop(name)
        linear = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        state[f"{linear}.weight"] = state[f"{linear}.weight"] * gamma[:, None]
        state[f"{linear}.bias"] = state[f"{linear}.bias"] * gamma
    return state


def norm_as_layer(tower, state, depth):
    """One more block, {our name: weight}, that adds K times the final norm of its input x to x.

    Its attention is 0. Its MLP is fc2(gelu(fc1(norm(x)))) with fc1 = [I; -I; 0] and fc2 = K [I, -I,
    0], and gelu(a) - gelu(-a) = a. With vision_feature_layer [-2, -1] transformers' LLaVA gives the
    projector the outputs of the last two blocks side by side, x and x + K norm(x); with the first
    matrix [-W, W] / K it then computes W norm(x)."""
    E, hidden = tower.width, tower.blocks[0].mlp.fc1.out_features
    eye, block = torch.eye(E), f"blocks.{depth}."
    more = {
        "norm1.weight": torch.ones(E),
        "norm1.bias": torch.zeros(E),
        "attn.qkv.weight": torch.zeros(3 * E, E),
        "attn.qkv.bias": torch.zeros(3 * E),
        "attn.proj.weight": torch.zeros(E, E),
        "attn.proj.bias": torch.zeros(E),
        "norm2.weight": state["norm.weight"],
        "norm2.bias": state["norm.bias"],
        "mlp.fc1.weight": torch.cat([eye, -eye, torch.zeros(hidden - 2 * E, E)]),
        "mlp.fc1.bias": torch.zeros(hidden),
        "mlp.fc2.weight": torch.cat([K * eye, -K * eye, torch.zeros(E, hidden - 2 * E)], 1),
        "mlp.fc2.bias": torch.zeros(E),
    }
    return {block + name: value for name, value in more.items()}


def tower_files(model, image_format):
    """(vision_config, {their name: weight}, whether the final norm became a layer)."""
    tower = model.tower
    if type(tower).__name__ != "ViT":
        raise UserError(
            f"transformers' LLaVA has no {type(tower).__name__} tower: only a model with a ViT is "
            "exported"
        )
    arguments, state, depth = tower.arguments, unscaled(tower), len(tower.blocks)
    if arguments["registers"]:
        raise UserError("transformers' ViT has no registers")
    side = image_format.size // tower.patch
    with torch.no_grad():
        state["pos_embed"] = tower.position_embeddings(side, side).clone()
    after_norm = model.select_layer == -1 and arguments["final_norm"]
    is_clip = arguments["first_norm"] or not arguments["cls"]
    if after_norm and is_clip:
        raise UserError("transformers' CLIP has no final norm for patches")
    if after_norm:
        state |= norm_as_layer(tower, state, depth)
        depth += 1
    names, block = (CLIP, CLIP_BLOCK) if is_clip else (VIT, VIT_BLOCK)
    layer = "encoder.layers" if is_clip else "encoder.layer"
    prefix = "vision_tower.vision_model." if is_clip else "vision_tower."
    written = {}
    for name, value in with_qkv_apart(state):
        kind, _, last = name.rpartition(".")
        if name.startswith("blocks."):
            _, number, rest = kind.split(".", 2)
            theirs = f"{layer}.{number}.{block[rest]}.{last}"
        else:
            theirs = names.get(name)
            if kind in names:
                theirs = f"{names[kind]}.{last}"
        if theirs:
            written[prefix + theirs] = value
    if is_clip:
        written |= clip_shapes(written, prefix, tower)
    else:
        written[prefix + "pooler.dense.weight"] = torch.zeros(tower.width, tower.width)
        written[prefix + "pooler.dense.bias"] = torch.zeros(tower.width)
    return vision_config(tower, image_format, depth), written, after_norm


def vision_config(tower, image_format, depth):
    """The config of a ViT of `depth` blocks, for transformers."""
    arguments, kind = tower.arguments, "vit"
    if arguments["first_norm"] or not arguments["cls"]:
        kind = "clip_vision_model" if arguments["cls"] else "siglip_vision_model"
    names = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    return {
        "model_type": kind,
        "hidden_size": tower.width,
        "intermediate_size": tower.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": depth,
        "num_attention_heads": arguments["heads"],
        "image_size": image_format.size // tower.patch * tower.patch,
        "patch_size": tower.patch,
        "hidden_act": names[arguments["activation"]],
        "layer_norm_eps": arguments["eps"],
        "qkv_bias": True,
    }


def with_qkv_apart(state):
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, third in zip("qkv", value.chunk(3)):
                yield name.replace("qkv", part), third
        else:
            yield name, value


def clip_shapes(written, prefix, tower):
    """Weights that CLIP and SigLIP have in another shape, and their unused pooling norm."""
    E = tower.width
    more = {
        f"{prefix}embeddings.position_embedding.weight": written[
            f"{prefix}embeddings.position_embedding.weight"
        ][0],
        f"{prefix}post_layernorm.weight": torch.ones(E),
        f"{prefix}post_layernorm.bias": torch.zeros(E),
    }
    if tower.arguments["cls"]:
        name = f"{prefix}embeddings.class_embedding"
        more[name] = written[name].flatten()
    return more


# ---------------------------------------------------------------------------------------------
# The rest of the model


def language_files(gpt, tokenizer):
    """(text_config, {their name: weight})."""
    config, state = gpt.config, {}
    kv = config.n_kv_head * config.head_width
    sizes = [config.n_head * config.head_width, kv, kv]
    for name, value in gpt.state_dict().items():
        if name == "lm_head.weight":
            state["language_model.lm_head.weight"] = value
        elif ".qkv_proj." in name:
            for part, rows in zip("qkv", value.split(sizes)):
                state["language_model.model." + name.replace("qkv_proj", f"{part}_proj")] = rows
        elif ".gate_up_proj." in name:
            for part, rows in zip(("gate", "up"), value.chunk(2)):
                theirs = name.replace("gate_up_proj", f"{part}_proj")
                state[f"language_model.model.{theirs}"] = rows
        else:
            state[f"language_model.model.{name}"] = value
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if len(config.rope_scaling) == 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling[0]}
    elif config.rope_scaling:
        names = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
        rope |= {"rope_type": "llama3"} | dict(zip(names, config.rope_scaling))
    text = {
        "model_type": "qwen2" if config.qkv_bias else "llama",
        "architectures": ["Qwen2ForCausalLM" if config.qkv_bias else "LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_width,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": rope if config.rope_scaling else None,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    if config.qkv_bias:
        text["use_sliding_window"] = False
        del text["head_dim"]
    return text, state


def projector_files(model, kind, after_norm):
    """(activation's name, {their name: weight}) of a projector of two linears."""
    state, C = model.projector.state_dict(), model.gpt.config.n_embd
    if kind == "mlp2x_gelu":
        first, act = (state["0.weight"], state["0.bias"]), "gelu"
        second = state["2.weight"], state["2.bias"]
    elif kind in ("linear", "identity"):
        eye, act = (torch.eye(C), torch.zeros(C)), "linear"
        first = (state["weight"], state["bias"]) if kind == "linear" else eye
        second = eye
    else:
        raise UserError(f"a projector {kind}: transformers' LLaVA has two linears, not more")
    W = first[0]
    if after_norm:
        W = torch.cat([-W, W], 1) / K
    names = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    values = (W, first[1], *second)
    return act, {f"multi_modal_projector.{name}": value for name, value in zip(names, values)}


def write_tokenizer(loaded, folder, template):
    tokenizer = loaded.tokenizer
    content = tokenizer.content if tokenizer.kind == "json" else tokenizer_json.export(tokenizer)
    name_of = {i: name for name, i in tokenizer.specials.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": loaded.model.gpt.config.block_size,
        "padding_side": "left",
        "eos_token": name_of.get(tokenizer.eos),
        "pad_token": name_of.get(tokenizer.pad),
        "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"},
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.bos is not None:
        settings["bos_token"] = name_of[tokenizer.bos]
    if tokenizer.kind == "word":
        settings["unk_token"] = "<unk>"
    if template:
        form = read_template(template)
        settings["chat_template"] = chat_template(form, template["system"], settings)
        with writing(folder / "chat_template.jinja") as file:
            file.write(settings["chat_template"].encode("utf-8"))
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", settings)


def chat_template(template, default_system, settings):
    """A Template as a Jinja chat template. default_system: the system text of a conversation that
    has none."""
    marks = {"{bos}": settings.get("bos_token", ""), "{eos}": settings["eos_token"]}

    def quoted(text):
        for mark, token in marks.items():
            text = text.replace(mark, token or "")
        return "{{ " + json.dumps(text) + " }}" if text else ""

    picture, lead = json.dumps(template.picture), json.dumps(template.lead)
    (user, after), (system, system_end), (answer, answer_end) = (
        part.split("{}") if part else ("", "")
        for part in (template.user, template.system, template.answer)
    )
    lead = (
        "{% if message['role'] == 'user' %}{{ " + lead + " }}{% endif %}" if template.lead else ""
    )
    parts = "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ " + picture
    parts += " }}{% else %}" + lead + "{{ part['text'] }}{% endif %}{% endfor %}"
    words = "{% if message['content'] is string %}" + lead + "{{ message['content'] }}{% else %}"
    words += parts + "{% endif %}"
    default = ""
    if default_system:
        own = quoted(template.system.replace("{}", default_system))
        default = "{% if messages[0]['role'] != 'system' %}" + own + "{% endif %}"
    end = answer_end + template.end + template.between
    turn = [(user, after), (answer, end)]
    past = turn
    if template.past:  # an earlier turn of a prompt
        before, middle, closing = re.split(r"\{question\}|\{answer\}", template.past)
        past = [(before, middle), ("", closing)]

    def said(number, is_past):
        """A question (number 0) or an answer (1), with what is around it."""
        plain, earlier = (
            quoted(one[number][0]) + words + quoted(one[number][1]) for one in (turn, past)
        )
        if plain == earlier:
            return plain
        return "{% if " + is_past + " %}" + earlier + "{% else %}" + plain + "{% endif %}"

    return (
        quoted(template.begin)
        + default
        + "{% for message in messages %}{% if message['role'] == 'system' %}"
        + quoted(system)
        + words
        + quoted(system_end)
        + "{% elif message['role'] == 'user' %}"
        + said(0, "add_generation_prompt and not loop.last")
        + "{% else %}"
        + said(1, "add_generation_prompt")
        + "{% endif %}{% endfor %}"
    )


def processor_settings(loaded, kind, strategy):
    """(preprocessor_config.json, processor_config.json)."""
    form, tower = loaded.image_format, loaded.model.tower
    if form.resample == "reduced":
        raise UserError("JPEGs decoded at a part of their size: transformers decodes them whole")
    side = {"height": form.size, "width": form.size}
    pictures = {
        "image_processor_type": "ViTImageProcessor",
        "size": side,
        "do_resize": True,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(form.mean),
        "image_std": list(form.std),
        "resample": int(RESAMPLING[form.resample]),
    }
    if form.fit == "pad":
        pictures |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    elif form.fit == "centre":
        edge = {"shortest_edge": form.edge or form.size}
        more = {"do_center_crop": True, "crop_size": side, "size": edge}
        pictures |= {"image_processor_type": "CLIPImageProcessor"} | more
    elif form.fit == "crop":
        raise UserError("pictures cropped before they are resized: transformers crops after")
    if kind == "llava_next":
        pinpoints = [[height, width] for width, height in form.canvases]
        more = {"image_grid_pinpoints": pinpoints, "size": {"shortest_edge": form.size}}
        pictures |= {"image_processor_type": "LlavaNextImageProcessor", "crop_size": side} | more
    processor = {
        "processor_class": "LlavaNextProcessor" if kind == "llava_next" else "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": tower.patch,
        "num_additional_image_tokens": int(tower.arguments["cls"]),
        "vision_feature_select_strategy": strategy,
    }
    return pictures | {"processor_class": processor["processor_class"]}, processor


# ---------------------------------------------------------------------------------------------
# All of it


def parts_as_written(parts, image_format):
    """The parts of a checkpoint, with the tower's scales merged and positions interpolated."""
    tower = parts["tower"]
    arguments = tower["arguments"] | {"scaled": False, "size": image_format.size}
    return parts | {"tower": tower | {"arguments": arguments}}


def check_exportable(loaded):
    """Raise UserError for a model that transformers cannot express."""
    model, saved = loaded.model, loaded.checkpoint
    if model.projector is None:
        raise UserError("only a model with a projector is exported: give one of phase 1 or later")
    if model.keep_cls and not model.tower.arguments.get("cls"):
        raise UserError(
            "keep_cls: this tower has no CLS token, and transformers has no mean instead"
        )
    if model.image_pool > 1:
        raise UserError(
            "image_pool: transformers' LLaVA takes each patch as a token; train phases 1 and 2 "
            "with --image_pool 1"
        )
    if type(model.gpt.norm).__name__ != "RMSNorm":
        raise UserError("transformers' Llama has RMSNorm, and no other norm")
    if model.image_attention != "causal":
        raise UserError("image_attention=full: transformers' LLaVA has causal attention alone")
    after_norm = model.select_layer == -1 and model.tower.arguments.get("final_norm")
    if model.tiled and (after_norm or loaded.image_format.fit != "squash"):
        raise UserError(
            "transformers' LLaVA-NeXT squashes a picture in tiles to a square, and reads a layer "
            "before the tower's final norm: give fit squash and select_layer -2 or before"
        )
    if loaded.image_format.max_tiles or (saved.get("phase") == "folder"):
        raise UserError("only checkpoints of train.py are exported")


def export(loaded, folder, scores=None):
    """Write the folder of a checkpoint.Loaded. scores: eval.py's results, for the model card."""
    check_exportable(loaded)
    folder, model, saved = Path(folder), loaded.model, loaded.checkpoint
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty; give a new or empty folder")
    kind = "llava_next" if model.tiled else "llava"
    seen, weights, after_norm = tower_files(model, loaded.image_format)
    text, language = language_files(model.gpt, loaded.tokenizer)
    act, projector = projector_files(model, saved["parts"]["projector"]["kind"], after_norm)
    weights |= language | projector
    if model.tiled:
        weights["image_newline"] = model.image_newline
    template = saved.get("template")
    has_cls = model.tower.arguments["cls"]
    strategy = "default" if has_cls and not model.keep_cls else "full"
    config = {
        "model_type": kind,
        "architectures": [
            "LlavaNextForConditionalGeneration" if model.tiled else "LlavaForConditionalGeneration"
        ],
        "text_config": text,
        "vision_config": seen,
        "image_token_index": loaded.tokenizer.image,
        "image_seq_length": model.image_tokens(loaded.image_format.size),
        "vision_feature_layer": [-2, -1] if after_norm else model.select_layer,
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": act,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": model.gpt.config.tied,
        "dtype": "float32",
        "torch_dtype": "float32",
        "nanobabyllava": {name: value for name, value in saved.items() if name not in LEFT_OUT}
        | {
            "written": vision.weights_digest(weights),
            "parts": parts_as_written(saved["parts"], loaded.image_format),
            "tokenizer": getattr(loaded.tokenizer, "roles", None),
        },
    }
    if model.tiled:
        config["image_grid_pinpoints"] = [[h, w] for w, h in loaded.image_format.canvases]
    pictures, processor = processor_settings(loaded, kind, strategy)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(loaded, folder, template)
    write_json(folder / "preprocessor_config.json", pictures)
    write_json(folder / "processor_config.json", processor)
    ends = list(end_tokens(loaded.tokenizer, read_template(template) if template else None))
    ids = {"eos_token_id": ends, "pad_token_id": loaded.tokenizer.pad}
    write_json(folder / "generation_config.json", ids)
    with writing(folder / "README.md") as file:
        count = sum(p.numel() for p in model.parameters())
        file.write(model_card(saved, count, scores).encode("utf-8"))
    safetensors.write(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config)


def export_language(loaded, folder):
    """Write the language model of a checkpoint.Loaded alone, as AutoModelForCausalLM opens it."""
    folder, gpt = Path(folder), loaded.model.gpt
    if type(gpt.norm).__name__ != "RMSNorm":
        raise UserError("transformers' Llama has RMSNorm, and no other norm")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty; give a new or empty folder")
    config, weights = language_files(gpt, loaded.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(loaded, folder, None)
    ids = {"eos_token_id": loaded.tokenizer.eos, "pad_token_id": loaded.tokenizer.pad}
    write_json(folder / "generation_config.json", ids)
    named = {name.removeprefix("language_model."): value for name, value in weights.items()}
    safetensors.write(folder / "model.safetensors", named)
    write_json(folder / "config.json", config | {"dtype": "float32", "torch_dtype": "float32"})


def model_card(saved, count, scores):
    """The README.md of an exported model of `count` parameters as text. saved: its checkpoint's
    dict; scores: eval.py's results, or None."""
    world = "the toy world, drawn pictures and a grammar: nothing of SAYCam"
    source = world if saved["source"].startswith("toy") else f"data of the kind `{saved['source']}`"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        "# A nanoBabyLLaVA",
        "",
        f"{count:,} parameters, {saved['phase']}, {saved['step']} steps, trained on {source}",
        f"(corpus {saved['corpus'][:12]}, seed {saved['settings']['seed']}).",
        "",
    ]
    if not scores:
        lines.append("It was not scored.")
    else:
        lines += [
            f"Scores on {scores['source']}:",
            "",
            "| test | measure | subset | score | chance | n |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for task, subsets in scores["tasks"].items():
            for subset, measures in subsets.items():
                for measure, one in measures.items():
                    chance = "" if one["chance"] is None else f"{one['chance']:.3f}"
                    cells = (task, measure, subset, f"{one['score']:.3f}", chance, str(one["n"]))
                    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass
class Config(config.Options):
    to: str = option("transformers", choices=("transformers", "babyvlm", "egobabyvlm"))
    row: bool = False  # write a row of EgoBabyVLM's leaderboard, from folders of results
    name: str = ""  # of babyvlm and of a row: the model's name on the leaderboard
    repo: str = ""  # of babyvlm: USER/NAME of the repository that the folder is uploaded to
    team: str = ""  # of a row


OPTIONS_OF = {"babyvlm": ("name", "repo"), "row": ("name", "team")}


def main(argv):
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__.strip())
        return
    count = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    if count == 0:
        raise UserError("paths come first: python export.py CHECKPOINT.pt DIR [--to babyvlm]")
    paths, settings = argv[:count], config.load(Config, argv[count:], __doc__)
    if settings.row and "to" in settings.given:
        raise UserError("--row and --to are two things: give one")
    kind = "row" if settings.row else settings.to
    for name in ("name", "repo", "team"):
        if name in settings.given and name not in OPTIONS_OF.get(kind, ()):
            raise UserError(f"--{name} is not for {'--row' if settings.row else f'--to {kind}'}")
    if settings.row and len(paths) < 2:
        raise UserError("want: python export.py RESULTS_1 RESULTS_2 RESULTS_3 ROW.json --row")
    if settings.row:
        ego_submission.write_row(paths[:-1], paths[-1], settings.name, settings.team)
    elif len(paths) != 2:
        raise UserError("want: python export.py CHECKPOINT.pt DIR [--to babyvlm]")
    elif Path(paths[1]).suffix == ".pt":
        write_one_file(Path(paths[0]), Path(paths[1]))
    elif settings.to == "babyvlm":
        submission.write(*paths, settings.name, settings.repo)
    elif settings.to == "egobabyvlm":
        ego_submission.write(*paths, export_language)
    else:
        export_to_transformers(Path(paths[0]), paths[1])


def write_one_file(source, path):
    """Write a finished checkpoint that is in shards as one file."""
    found = checkpoint.read(source)
    if not found["done"]:
        raise UserError(f"{source} is at step {found['step']}: finish it first")
    if path.exists():
        raise UserError(f"{path} exists: give a new name")
    checkpoint.save(path, found)
    print(f"{path}: {source} in one file")


def export_to_transformers(source, folder):
    """Write a checkpoint file as a folder for transformers."""
    loaded, results = checkpoint.load(source), source.parent / "results.json"
    if loaded.model.gpt is not None and loaded.model.projector is None:
        export_language(loaded, folder)
        print(f"{folder}: {source}, as AutoModelForCausalLM opens it")
        return
    scores = read_json(results) if results.exists() else None
    if scores and scores.get("digest") != loaded.checkpoint["digest"]:
        scores = None  # of another checkpoint
    export(loaded, folder, scores)
    print(f"{folder}: {source}, as AutoModelForImageTextToText opens it")


if __name__ == "__main__":
    config.run(main)
