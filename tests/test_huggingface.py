"""LLaVA folders in and out, against transformers' own code with random weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, logits_after, one_line, same, shell
from PIL import Image

import checkpoint
import export
import inference
import sample
import tasks
import train
from batches import Plan, SampleBatches
from common.images import ImageFormat, to_picture, to_pixels
from config import UserError
from data import Data
from pretrained import hf_config, huggingface, tokenizer_json
from sources import command
from tokenizer import TEMPLATES, chat_sample, expand

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
import fake_llava  # noqa: E402
import safetensors.torch  # noqa: E402

SIZES = [(28, 28), (50, 33), (33, 50), (100, 20), (20, 90), (61, 60), (300, 301)]
LLAVAS = [
    {},
    {"text": "mistral", "layer": -1, "strategy": "full"},
    {"tower": "siglip", "text": "qwen2", "layer": -1, "strategy": "full"},
    {"tower": "siglip", "strategy": "full"},
    {"tower": "vit"},
    {"tower": "vit", "text": "qwen2", "layer": -1},
    {"tower": "dinov2", "layer": -1, "strategy": "full"},
]
TILED = [
    {"kind": "llava_next"},
    {"kind": "llava_next", "text": "mistral"},
    {
        "kind": "llava_onevision",
        "tower": "siglip",
        "text": "qwen2",
        "layer": -1,
        "strategy": "full",
    },
]
name_of = lambda how: "-".join(map(str, how.values())) or "plain"


def noise(width, height, seed=0):
    shape = (height, width, 3)
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape, np.uint8))


def ask_both(model, processor, loaded, pictures):
    """(their logits, ours) of a text with these pictures in it."""
    inputs = processor(pictures, return_tensors="pt")
    embeds = inference.embed_pictures(
        loaded, [to_picture(p, loaded.image_format) for p in pictures]
    )
    tokens = [5, 6]
    for embed in embeds:
        tokens += [loaded.tokenizer.image] * len(embed) + [7, 8]
    tokens = torch.tensor([tokens])
    with torch.no_grad():
        theirs = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **inputs).logits
        ours = logits_after(loaded.model, tokens, torch.cat(embeds))
        other = logits_after(loaded.model, tokens, torch.cat(embeds).flip(0))
    assert (ours - other).abs().max() > 0.1  # pictures matter
    return theirs, ours


# ---- in


@pytest.mark.parametrize("how", LLAVAS + TILED, ids=name_of)
def test_logits_are_transformers_own(tmp_path, how):
    model, processor = fake_llava.make(tmp_path, **how)
    loaded = huggingface.load(tmp_path)
    for size in SIZES:
        theirs, ours = ask_both(model, processor, loaded, [noise(*size)])
        assert (theirs - ours).abs().max() < 1e-4
    if how.get("kind") != "llava_onevision":
        theirs, ours = ask_both(model, processor, loaded, [noise(40, 30), noise(28, 99, 1)])
        assert (theirs - ours).abs().max() < 1e-4


def test_onevision_shrinks_what_is_of_more_than_nine_tiles(tmp_path, monkeypatch):
    many = [[28 * rows, 28 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    monkeypatch.setattr(fake_llava, "PINPOINTS", many)
    model, processor = fake_llava.make(tmp_path, **TILED[2])
    loaded = huggingface.load(tmp_path)
    for size in [(168, 168), (168, 90), (60, 168), (150, 140), (99, 130)]:
        theirs, ours = ask_both(model, processor, loaded, [noise(*size)])
        assert (theirs - ours).abs().max() < 1e-4


def test_several_pictures_of_onevision_have_no_tiles(tmp_path):
    model, processor = fake_llava.make(tmp_path, **TILED[2])
    loaded = huggingface.load(tmp_path)
    paths = []
    for i, size in enumerate([(40, 30), (28, 99)]):
        paths.append(str(tmp_path / f"{i}.png"))
        noise(*size, i).save(paths[-1])
    pictures = [[Image.open(path) for path in paths]]
    inputs = processor(pictures, return_tensors="pt")
    embeds = inference.embed_pictures(loaded, inference.read_pictures(loaded, paths))
    tokens = torch.tensor([[5] + [699] * len(embeds[0]) + [6] + [699] * len(embeds[1]) + [7]])
    with torch.no_grad():
        theirs = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **inputs).logits
        ours = logits_after(loaded.model, tokens, torch.cat(embeds))
    assert (theirs - ours).abs().max() < 1e-4


def test_pictures_of_onevision_are_alike_in_data_prompts_tests_and_talk(tmp_path, monkeypatch):
    """A picture has tiles alone, and none beside others, everywhere."""
    monkeypatch.chdir(tmp_path)
    fake_llava.make(tmp_path / "ov", **TILED[2])
    loaded = huggingface.load(tmp_path / "ov")
    for i in range(12):
        noise(40 + i, 30, i).save(f"{i}.png")
    turn = lambda images: [
        {"from": "human", "value": "<image>" * images + "?"},
        {"from": "gpt", "value": "a"},
    ]
    alone = [{"image": f"{i}.png", "conversations": turn(1)} for i in range(12)]
    both = [{"image": ["0.png", f"{i}.png"], "conversations": turn(2)} for i in range(1, 12)]
    Path("chat.json").write_text(json.dumps(alone + both))
    Path("val.json").write_text(json.dumps(alone[:1]))
    flags = ["--json=chat.json", "--val=val.json", "--images=.", "--like=ov", "--template=v1"]
    command.main(["llava", "--name=ov", *flags])
    dataset = Data("data/ov")
    samples = SampleBatches(dataset, "chat_train", 1, 1, loaded.model)
    show = lambda *paths: torch.cat(
        inference.embed_pictures(loaded, inference.read_pictures(loaded, paths))
    )
    read = lambda row: samples.read(Plan(np.array([row]), 400)).to("cpu", loaded.image_format)
    for row, item in enumerate(alone + both):
        names = [item["image"]] if isinstance(item["image"], str) else item["image"]
        _, _, _, images, arrangement, _ = read(row)
        with torch.no_grad():
            found = loaded.model.embed_images(images, arrangement)
        assert torch.equal(found, show(*names)), row
    settings = SimpleNamespace(shuffle=False)
    subject = tasks.Subject(loaded, [], ["0.png", "1.png"], ["0.png", "1.png"], settings)
    assert torch.equal(torch.cat(subject.together(["0.png"])), show("0.png"))
    assert torch.equal(torch.cat(subject.together(["0.png", "1.png"])), show("0.png", "1.png"))
    blind = subject.blinded().together(["0.png", "1.png"])
    assert torch.equal(blind[0], blind[1]) and len(torch.cat(blind)) == len(show("0.png", "1.png"))
    talk = sample.Conversation(loaded, TEMPLATES["v1"])
    list(talk.ask("?", talk.show([], "0.png", []), max_new_tokens=2))
    assert torch.equal(talk.embeds[0], show("0.png"))
    first = talk.turns[0][1]
    answer = list(talk.ask("?", talk.show(["0.png"], "1.png", []), max_new_tokens=2))
    assert torch.equal(torch.cat(talk.embeds), show("0.png", "1.png"))
    turns = [("<image>\n?", first), ("<image>\n?", None)]
    tokens, _ = chat_sample(loaded.tokenizer, TEMPLATES["v1"], turns)
    tokens = expand(tokens, loaded.tokenizer.image, [17, 17])
    again = loaded.model.generate(torch.tensor([tokens]), show("0.png", "1.png"), 2, stop=talk.stop)
    assert [int(token) for token in again] == answer


def test_padding_on_the_left_or_right_changes_nothing(tmp_path):
    """Their batch of two lengths, padded on the left, against ours one by one, and on the right."""
    model, processor = fake_llava.make(tmp_path)
    loaded = huggingface.load(tmp_path)
    inputs = processor([noise(28, 28), noise(60, 30)], return_tensors="pt")
    embeds = torch.cat(
        inference.embed_pictures(
            loaded, [to_picture(noise(*s), loaded.image_format) for s in [(28, 28), (60, 30)]]
        )
    )
    rows = [[1] + [699] * 16 + [5, 6, 7, 8], [1] + [699] * 16 + [9]]
    left = torch.tensor([rows[0], [0] * 3 + rows[1]])
    right = torch.tensor([rows[0], rows[1] + [0] * 3])
    with torch.no_grad():
        theirs = model(input_ids=left, attention_mask=(left != 0).long(), **inputs).logits
        ours = logits_after(loaded.model, right, embeds)
    assert (theirs[0] - ours[0]).abs().max() < 1e-4
    assert (theirs[1, 3:] - ours[1, :-3]).abs().max() < 1e-4


CUT = {"height": 28, "width": 28}
PROCESSORS = [
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "crop_size": CUT},
    {"image_processor_type": "CLIPImageProcessor", "size": CUT, "crop_size": CUT},
    {"image_processor_type": "CLIPImageProcessorFast", "size": 28, "crop_size": 28},
    {"image_processor_type": "ViTImageProcessor", "size": CUT},
    {"image_processor_type": "ViTImageProcessor", "size": 28, "resample": 3},
    {"image_processor_type": "SiglipImageProcessor", "size": CUT, "do_center_crop": None},
    {"image_processor_type": "ViTImageProcessor", "size": CUT, "do_normalize": False},
    {"image_processor_type": "ViTImageProcessor", "size": CUT, "rescale_factor": 1 / 127.5},
    {"image_processor_type": "ViTImageProcessor", "size": CUT, "do_rescale": False},
    {"size": {"shortest_edge": 28}, "crop_size": CUT, "image_mean": [0.1, 0.2, 0.3]},
    {"image_processor_type": "LlavaImageProcessor", "size": 28, "crop_size": 28, "do_pad": True},
    {"image_processor_type": "CLIPImageProcessor", "size": 28, "crop_size": 28, "do_pad": True},
]


@pytest.mark.parametrize("settings", PROCESSORS, ids=range(len(PROCESSORS)))
def test_pixels_are_those_of_the_image_processor(tmp_path, settings):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    form = hf_config.image_format(tmp_path, {"model_type": "llava"}, 28)
    name = settings.get("image_processor_type", "CLIPImageProcessor").removesuffix("Fast")
    processor = getattr(transformers, name).from_pretrained(tmp_path)
    for size in SIZES:
        theirs = processor(noise(*size), return_tensors="np")["pixel_values"][0]
        ours = to_pixels(to_picture(noise(*size), form).frames, form)[0].numpy()
        assert ours.shape == theirs.shape == (3, 28, 28)
        assert np.abs(ours - theirs).max() <= 2e-5 * max(1, np.abs(theirs).max()), size


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"do_resize": False}, "pictures are not squares"),
        ({"size": {"height": 28, "width": 30}}, "pictures are not squares"),
        ({"do_center_crop": False}, "pictures are not squares"),
        ({"size": {"longest_edge": 28}}, "pictures resized to"),
        ({"size": {"height": 32, "width": 32}}, "pictures resized to .* then cut"),
        ({"size": 24}, "pictures resized to 24, then cut"),
        ({"size": 32, "crop_size": 32}, "pictures of 32 pixels for a tower of 28"),
        ({"resample": 1}, "filter 1: 2 and 3"),
        ({"image_processor_type": "Idefics3ImageProcessor"}, "processor Idefics3 is not supported"),
        (
            {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": 32},
            "padded pictures resized",
        ),
        (
            {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_normalize": False},
            "padded pictures that are not normalised",
        ),
    ],
)
def test_an_image_processor_that_makes_other_pixels_is_refused(tmp_path, settings, why):
    settings = {"size": 28, "crop_size": 28} | settings
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=why) as error:
        hf_config.image_format(tmp_path, {"model_type": "llava"}, 28)
    assert one_line(error)


@pytest.mark.parametrize("head", ["its own", "none", "the embedding's"])
@pytest.mark.parametrize("of_text", [None, True, False])
@pytest.mark.parametrize("of_all", [None, True, False])
def test_the_head_is_the_one_that_transformers_takes(tmp_path, of_all, of_text, head):
    fake_llava.make(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    (own,) = [name for name in weights if "lm_head" in name]
    (embedding,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    if head == "none":
        del weights[own]
    elif head != "its own":
        weights[own] = weights[embedding].clone()
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for level, says in ((config, of_all), (config["text_config"], of_text)):
        level.pop("tie_word_embeddings", None)
        level |= {} if says is None else {"tie_word_embeddings": says}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if head == "none" and not of_all and not of_text:  # transformers makes a random one
        with pytest.raises(UserError, match="no lm_head.weight, and tie_word") as error:
            huggingface.load(tmp_path)
        assert one_line(error)
        return
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    gpt = huggingface.load(tmp_path).model.gpt
    assert torch.equal(gpt.head_weight, theirs.get_output_embeddings().weight)
    assert torch.equal(gpt.embed_tokens.weight, theirs.get_input_embeddings().weight)
    assert gpt.config.tied == (head != "its own" and bool(of_all or of_text))


@pytest.mark.parametrize("how", [LLAVAS[0], LLAVAS[2], TILED[0]], ids=name_of)
def test_greedy_words_are_transformers_own(tmp_path, how):
    model, processor = fake_llava.make(tmp_path, **how)
    loaded = huggingface.load(tmp_path)
    picture = noise(50, 33)
    embeds = inference.embed_pictures(loaded, [to_picture(picture, loaded.image_format)])
    tokens = torch.tensor([[5] + [699] * len(embeds[0]) + [7]])
    inputs = processor(picture, return_tensors="pt")
    theirs = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ours = [int(token) for token in loaded.model.generate(tokens, embeds[0], 20)]
    assert ours == theirs[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("scaling", ["linear", "llama3"])
def test_rotary_scaling_is_transformers_own(tmp_path, scaling):
    rope = {"rope_type": scaling, "factor": 4.0, "rope_theta": 5e5}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 64
    model, processor = fake_llava.make(tmp_path, rope_parameters=rope)
    loaded = huggingface.load(tmp_path)
    theirs, ours = ask_both(model, processor, loaded, [noise(28, 28, i) for i in range(6)])
    assert (theirs - ours).abs().max() < 1e-4


def rename_as_before(name):
    """The names that transformers 4 wrote."""
    old = [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ]
    for new, before in old:
        if name.startswith(new):
            return before + name.removeprefix(new)
    return name


def test_old_names_and_shards_are_the_same_model(tmp_path):
    import safetensors.torch

    fake_llava.make(tmp_path)
    new = huggingface.load(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    state = {rename_as_before(name): value for name, value in state.items()}
    names = sorted(state)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        safetensors.torch.save_file({n: state[n].contiguous() for n in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    old = huggingface.load(tmp_path)
    assert same(old.model.state_dict(), new.model.state_dict())


def test_weights_are_used_where_they_lie(tmp_path):
    """What need not be stacked is the file itself, not a copy; and writing does not change it."""
    fake_llava.make(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = huggingface.load(tmp_path).model
    mapped = [p for p in model.parameters() if not p.untyped_storage().resizable()]
    assert sum(p.numel() for p in mapped) > 0.5 * sum(p.numel() for p in model.parameters())
    model.gpt.embed_tokens.weight.data.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_bfloat16_is_that_everywhere_but_in_the_positions(tmp_path):
    fake_llava.make(tmp_path)
    loaded = huggingface.load(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.gpt.cos.dtype == torch.float32
    embeds = inference.embed_pictures(loaded, [to_picture(noise(40, 30), loaded.image_format)])
    assert inference.caption_pictures(loaded, embeds, 5)


# ---- a folder from the command line


@pytest.fixture
def folder(tmp_path):
    fake_llava.make(tmp_path / "llava")
    noise(40, 30).save(tmp_path / "a.png")
    noise(30, 50, 1).save(tmp_path / "b.png")
    return tmp_path


def test_a_folder_is_asked_in_its_own_template(folder, capsys):
    flags = [f"--checkpoint={folder}/llava", f"--image={folder}/a.png", "--max_new_tokens=5"]
    sample.main([*flags, "--prompt=what is this ?"])
    asked = capsys.readouterr().out
    loaded = huggingface.load(folder / "llava")
    assert loaded.choose_template() == (TEMPLATES["v1"], "")
    embeds = inference.embed_pictures(
        loaded, inference.read_pictures(loaded, [str(folder / "a.png")])
    )
    tokens = inference.make_prompt(loaded, embeds, "what is this ?", TEMPLATES["v1"])
    said = loaded.model.generate(torch.tensor([tokens]), embeds[0], 5, stop=loaded.tokenizer.stops)
    words = loaded.tokenizer.decode([int(token) for token in said])
    assert words in asked
    sample.main([*flags, "--prompt=what is this ?", "--template=mistral"])
    assert inference.make_prompt(loaded, embeds, "what is this ?", TEMPLATES["mistral"]) != tokens
    sample.main([*flags, "--template=plain"])
    capsys.readouterr()
    sample.main([*flags, "--prompt=<image>\nwhat is this ?"])  # as LLaVA's users write it
    assert words in capsys.readouterr().out
    with pytest.raises(UserError, match="2 <image> in the question, for 1"):
        sample.main([*flags, "--prompt=<image><image> ?"])


CORRUPTED = [
    ("config.json", None, "config.json: No such file"),
    ("config.json", "{", "not JSON"),
    ("config.json", "[]", "not an object"),
    ("config.json", {"model_type": None}, "model_type None"),
    ("config.json", {"model_type": ["llava"]}, "model_type \\['llava'\\]"),
    ("config.json", {"text_config": {"num_hidden_layers": "2"}}, "an unknown setting"),
    ("config.json", {"model_type": "blip"}, "model_type 'blip' is none of llava"),
    ("config.json", {"vision_feature_layer": [-2, -5]}, "several layers"),
    ("config.json", {"vision_feature_layer": -9}, "and a tower of 3 blocks"),
    (
        "config.json",
        {"text_config": {"num_attention_heads": 0, "head_dim": None}},
        "an unknown setting",
    ),
    ("config.json", {"vision_config": {"num_attention_heads": 0}}, "an unknown setting"),
    ("config.json", {"projector_hidden_act": "relu"}, "projector"),
    ("config.json", {"text_config": {"model_type": "gemma"}}, "text model 'gemma'"),
    (
        "config.json",
        {"text_config": {"rope_parameters": {"rope_type": "yarn"}}},
        "rope_type 'yarn'",
    ),
    ("config.json", {"text_config": {"attention_bias": True}}, "attention_bias True"),
    ("config.json", {"text_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu'"),
    ("config.json", {"text_config": {"num_hidden_layers": 3}}, "weights missing"),
    ("config.json", {"text_config": {"num_hidden_layers": 1}}, "weights left over"),
    ("config.json", {"text_config": {"vocab_size": 32000}}, "of another shape"),
    (
        "config.json",
        {"text_config": {"rms_norm_eps": "1e-5"}},
        "rms_norm_eps '1e-5' is not a number",
    ),
    ("config.json", {"vision_config": {"layer_norm_eps": ""}}, "layer_norm_eps '' is not a number"),
    ("config.json", {"vision_config": {"model_type": "dinov3"}}, "tower 'dinov3'"),
    ("config.json", {"mm_vision_tower": "openai/clip"}, "a folder of LLaVA's own code"),
    ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq"),
    ("config.json", {"image_token_index": 700}, "the token <image> has the id 700, and there are"),
    ("config.json", {"text_config": {"model_type": "qwen3"}}, "text model 'qwen3'"),
    ("config.json", {"text_config": {"head_dim": 64}}, "head_dim 64"),
    ("model.safetensors", None, "no model.safetensors"),
    ("model.safetensors", "xxxxxxxxxx", "not a checkpoint, or cut short"),
    ("model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}, "not there"),
    ("model.safetensors.index.json", "{}", "want {'weight_map'"),
    ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "want {'weight_map'"),
    ("tokenizer.json", None, "missing; a tokenizer.model alone"),
    ("tokenizer.json", {"model": {"type": "Unigram"}}, "the model"),
    ("tokenizer_config.json", "{}", "name an eos token"),
    ("preprocessor_config.json", None, "preprocessor_config.json: No such file"),
]


@pytest.mark.parametrize("name, content, message", CORRUPTED, ids=lambda x: str(x)[:30])
def test_a_corrupted_folder_is_one_clear_line(folder, name, content, message):
    path = folder / "llava" / name
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    else:
        found = json.loads(path.read_text()) if path.exists() else {}
        for key, value in content.items():
            found[key] = found[key] | value if isinstance(found.get(key), dict) else value
        path.write_text(json.dumps(found))
    if name == "tokenizer_config.json":
        (folder / "llava/generation_config.json").unlink()
        found = json.loads((folder / "llava/config.json").read_text())
        found["text_config"].pop("eos_token_id", None)
        (folder / "llava/config.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=message) as error:
        try:
            sample.main([f"--checkpoint={folder}/llava", f"--image={folder}/a.png"])
        except OSError as error:
            raise UserError(str(error)) from None
    assert one_line(error)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "F4"])
def test_weights_of_eight_bits_are_named_as_such(folder, dtype):
    path = folder / "llava" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"F32"', f'"{dtype}"'.encode(), 1)
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(UserError, match=f"weights stored as {dtype} are not supported") as error:
        huggingface.load(folder / "llava")
    assert one_line(error) and "cut short" not in str(error.value)


def test_padding_outside_of_the_embedding_is_another_token(folder):
    path = folder / "llava" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(tokenizer_json.special_token("<pad>", 705))
    path.write_text(json.dumps(content))
    settings = json.loads((folder / "llava/tokenizer_config.json").read_text())
    (folder / "llava/tokenizer_config.json").write_text(
        json.dumps(settings | {"pad_token": "<pad>"})
    )
    loaded = huggingface.load(folder / "llava")
    assert loaded.tokenizer.pad == loaded.tokenizer.eos
    words = inference.nll_after(loaded, [[5], [5, 6]], None, [[7, 8], [9]])
    alone = [
        inference.nll_after(loaded, [p], None, [w])[0] for p, w in (([5], [7, 8]), ([5, 6], [9]))
    ]
    assert np.allclose(words, alone, atol=1e-5)


@pytest.mark.parametrize("image", [699, 325, 340])
def test_an_image_token_that_is_added_has_one_id_in_all_files(folder, tmp_path, image):
    """The vocabulary has ids up to 324, and config.json another one for <image>."""
    path = folder / "llava" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_index": image}))
    loaded = huggingface.load(folder / "llava")
    export.write_tokenizer(loaded, tmp_path, None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids("<image>") == image == loaded.tokenizer.image
    assert theirs("a <image>")["input_ids"][-1] == image
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    again = tokenizer_json.JsonTokenizer(content, loaded.tokenizer.roles)
    assert again.dump() == loaded.tokenizer.dump()
    assert again.encode("look at <image>") == loaded.tokenizer.encode("look at <image>")


# ---- out


def opened_by_transformers(path):
    return (
        transformers.AutoModelForImageTextToText.from_pretrained(path).eval(),
        transformers.AutoProcessor.from_pretrained(path),
    )


def agree(source, folder, picture):
    """transformers opens the folder and says what we say; back here it is the same to the bit."""
    model, processor = opened_by_transformers(folder)
    loaded = checkpoint.load(source)
    embeds = inference.embed_pictures(loaded, inference.read_pictures(loaded, [str(picture)]))
    inputs = processor(
        images=Image.open(picture).convert("RGB"), text="<image>", return_tensors="pt"
    )
    tokens = torch.tensor([[loaded.tokenizer.image] * len(embeds[0])])
    assert inputs["input_ids"].tolist() == tokens.tolist()
    with torch.no_grad():
        theirs, ours = model(**inputs).logits, logits_after(loaded.model, tokens, embeds[0])
    assert (theirs - ours).abs().max() < 1e-4
    said = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, tokens.shape[1] :]
    stop = loaded.tokenizer.stops
    ours = [int(t) for t in loaded.model.generate(tokens, embeds[0], 12, stop=stop)]
    assert said.tolist() == ours
    back = inference.open_model(folder)
    assert same(back.model.state_dict(), loaded.model.state_dict())
    assert back.tokenizer.dump() == loaded.tokenizer.dump()
    assert back.image_format == loaded.image_format
    return loaded, ours


@pytest.fixture
def shipped(tmp_path):
    """The model of the repository, with the 64 patches of the last block as tokens, not averaged:
    a LLaVA averages none."""
    saved = checkpoint.read(ROOT / "assets/toy.pt")
    for settings in (saved["parts"]["seeing"], saved["inherited"]):
        settings.update(image_pool=1, select_layer=-1)
    checkpoint.save(tmp_path / "shipped.pt", saved)
    return tmp_path / "shipped.pt"


def test_an_exported_folder_that_was_trained_elsewhere_is_not_taken_for_ours(tmp_path, shipped):
    import safetensors.torch

    export.main([str(shipped), str(tmp_path / "toy")])
    half = inference.open_model(tmp_path / "toy", dtype="bfloat16").model
    assert half.gpt.norm.weight.dtype == torch.bfloat16 and half.gpt.cos.dtype == torch.float32
    path = tmp_path / "toy/model.safetensors"
    state = safetensors.torch.load_file(path)
    state["vision_tower.encoder.layer.4.output.dense.bias"] += 1  # of the block that is the norm
    safetensors.torch.save_file(state, path, {"format": "pt"})
    with pytest.raises(UserError, match="no longer those that were exported") as error:
        inference.open_model(tmp_path / "toy")
    assert one_line(error)


def test_the_shipped_model_goes_there_and_back(tmp_path, shipped):
    with pytest.raises(UserError, match="image_pool"):
        export.main([str(ROOT / "assets/toy.pt"), str(tmp_path / "pooled")])
    export.main([str(shipped), str(tmp_path / "toy")])
    loaded, said = agree(shipped, tmp_path / "toy", ROOT / "assets/scene.png")
    assert said[-1] == loaded.tokenizer.eos and len(said) > 3  # it stops by itself
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "toy")
    for text in ("look , a red ball !", "it 's an Ünknown\nword", "  two  spaces"):
        ids = loaded.tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == loaded.tokenizer.decode(ids)
    card = (tmp_path / "toy/README.md").read_text()
    assert "toy world" in card and "nothing of SAYCam" in card


@pytest.mark.parametrize(
    "flags",
    [["--select_layer=-2"], ["--projector=linear", "--keep_cls"], ["--projector=identity"]],
    ids=lambda flags: flags[0],
)
def test_other_shapes_go_there_and_back(recipe, home, tmp_path, flags):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("vision", "language"):
        shutil.copy(recipe / f"{name}.pt", out)
    train.main(["--data=data/tiny", f"--out={out}", *SMALL, "--phase=1", *flags])
    export.main([str(out / "phase1.pt"), str(tmp_path / "there")])
    Image.open("data/tiny/eval/images/" + first_picture(home)).save(tmp_path / "x.png")
    agree(out / "phase1.pt", tmp_path / "there", tmp_path / "x.png")


def first_picture(home):
    images = home / "data/tiny/eval/images"
    return str(sorted(images.rglob("*.png"))[0].relative_to(images))


def test_what_cannot_be_written_is_refused(recipe, tmp_path):
    loaded = checkpoint.load(recipe / "phase2.pt")
    for change, message in [
        (lambda: setattr(loaded.model, "image_attention", "full"), "causal attention alone"),
        (lambda: setattr(loaded.model, "projector", None), "phase 1 or later"),
    ]:
        change()
        with pytest.raises(UserError, match=message) as error:
            export.export(loaded, tmp_path / "no")
        assert one_line(error) and not (tmp_path / "no").exists()
        loaded = checkpoint.load(recipe / "phase2.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    with pytest.raises(UserError, match="new or empty"):
        export.export(loaded, tmp_path / "full")
    with pytest.raises(UserError, match="want: python export.py"):
        export.main(["import"])


# ---- conversations


def test_a_conversation_is_what_one_long_prompt_says(folder):
    """With its cache, turn by turn, the same answers as from the whole text at once."""
    loaded = huggingface.load(folder / "llava")
    talk = sample.Conversation(loaded, TEMPLATES["v1"])
    paths = [str(folder / name) for name in ("a.png", "b.png")]
    one, two = (
        inference.embed_pictures(loaded, inference.read_pictures(loaded, [path]))[0]
        for path in paths
    )
    shown, turns = [], []
    for words, new in [("what ?", [one]), ("where ?", []), ("and now ?", [two]), ("why ?", [])]:
        shown += new
        question = TEMPLATES["v1"].picture * len(new) + words
        tokens, _ = chat_sample(loaded.tokenizer, TEMPLATES["v1"], [*turns, (question, None)])
        counts = [len(embed) for embed in shown]
        from tokenizer import expand

        tokens = expand(tokens, loaded.tokenizer.image, counts)
        whole = loaded.model.generate(torch.tensor([tokens]), torch.cat(shown), 6, stop=talk.stop)
        whole = [int(token) for token in whole]
        answer = list(talk.ask(words, new, max_new_tokens=6))
        assert answer == whole
        turns.append((question, loaded.tokenizer.decode(answer).strip()))


def test_chat_from_the_command_line(folder):
    lines = "what is this ?\n/image b.png\nand this ?\n/image none.png\n/what\n/reset\nhello\n"
    done = shell(
        ROOT / "sample.py",
        *["--checkpoint", "llava", "--image", "a.png", "--chat", "--max_new_tokens=4"],
        cwd=folder,
        input=lines,
    )
    assert done.returncode == 0
    assert done.stderr == "llava: no chat template; --template v1 is taken\n"
    assert "none.png: no such image" in done.stdout and "/reset starts again" in done.stdout
    assert done.stdout.count("stopped at the limit") + done.stdout.count("\n") > 6


def test_a_long_conversation_stays_within_the_context_or_says_so(folder):
    """20 turns with 3 pictures; then many more."""
    loaded = huggingface.load(folder / "llava")
    talk, full = sample.Conversation(loaded, TEMPLATES["v1"]), None
    picture = inference.embed_pictures(
        loaded, inference.read_pictures(loaded, [str(folder / "a.png")])
    )[0]
    for turn in range(60):
        try:
            list(talk.ask("what ?", [picture] if turn < 3 else [], max_new_tokens=5))
        except UserError as error:
            full = str(error)
            break
        assert len(talk.cached) <= 512
    assert turn > 5 and "the context is full" in full and "/reset" in full
    talk.reset()
    assert list(talk.ask("what ?", max_new_tokens=5))


def test_a_model_without_conversations_says_so(recipe):
    with pytest.raises(UserError, match="learnt captions and no conversations"):
        sample.main([f"--checkpoint={recipe}/phase2.pt", "--chat"])


def test_pictures_that_transformers_cannot_make_are_refused():
    for fault, form in (
        ("decoded at a part", ImageFormat(16, resample="reduced")),
        ("cropped before", ImageFormat(16, "crop")),
    ):
        loaded = SimpleNamespace(image_format=form, model=SimpleNamespace(tower=None))
        with pytest.raises(UserError, match=fault):
            export.processor_settings(loaded, "llava", "default")
