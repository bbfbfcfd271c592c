"""
Folders of a LLaVA with random weights, written by transformers itself: for the tests, and

    python tests/fake_llava.py DIR      # one of half a billion parameters in bfloat16
"""

import json
import sys
from pathlib import Path

import jinja_templates
import torch

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # (height, width)
# Llama 3's pattern, which Qwen2's is but for digits
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = ["what is this ? a red ball .", "where 's the blue cup ? it 's on the table .", "Don't !"]


def byte_level(lines=LINES, vocab_size=290, nfc=False, specials=("</s>",)):
    """A byte-level tokenizer of the `tokenizers` package, trained on lines."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=not nfc))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def sentence_piece(first_only, lines=LINES, vocab_size=600):
    """A tokenizer of Llama 2's kind, or of Mistral's: BPE with byte fallback."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for line in lines for word in line.split()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    content = json.loads(tokenizer.to_str())
    marks = ("<unk>", "<s>", "</s>")  # bytes are no special tokens in the published files
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in marks]
    return Tokenizer.from_str(json.dumps(content))


def randomise(model, spread=0.25):
    for name, parameter in model.named_parameters():
        is_gain = parameter.ndim == 1 and "bias" not in name
        parameter.data.normal_(1.0 if is_gain else 0.0, spread)
    return model.eval()


def towers(transformers):
    return {
        "clip": transformers.CLIPVisionConfig,
        "siglip": transformers.SiglipVisionConfig,
        "vit": transformers.ViTConfig,
        "dinov2": transformers.Dinov2Config,
    }


def make(folder, kind="llava", tower="clip", text="llama", layer=-2, strategy="default", **more):
    """Write a folder of a small model; returns (transformers' model, its image processor)."""
    import transformers

    torch.manual_seed(0)
    seen = towers(transformers)[tower](
        hidden_size=32,
        intermediate_size=128 if tower == "dinov2" else 48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    languages = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
    }
    said = languages[text](
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=700,
        max_position_embeddings=512,
        **more,
    )
    name = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[kind]
    settings = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    settings["image_token_id" if kind == "llava_onevision" else "image_token_index"] = 699
    if kind != "llava":
        settings["image_grid_pinpoints"] = PINPOINTS
    config = getattr(transformers, f"{name}Config")(
        vision_config=seen, text_config=said, **settings
    )
    model = randomise(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    model.save_pretrained(folder)
    folder = Path(folder)
    sentence_piece(text == "mistral").save(str(folder / "tokenizer.json"))
    words = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": text != "qwen2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    processor = make_processor(transformers, kind, tower)
    processor.save_pretrained(folder)
    return model, processor


def make_processor(transformers, kind, tower):
    side = {"height": 28, "width": 28}
    if kind == "llava_next":
        return transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size=side, image_grid_pinpoints=PINPOINTS
        )
    if kind == "llava_onevision":
        return transformers.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=PINPOINTS)
    if tower == "clip":
        return transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side)
    if tower == "siglip":
        return transformers.SiglipImageProcessor(size=side)
    return transformers.ViTImageProcessor(size=side)


def write_large(folder):
    """A LLaVA with Qwen2-0.5B's shape and CLIP ViT-B/16, random, in bfloat16, in two shards."""
    import transformers

    torch.manual_seed(0)
    seen = transformers.CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    )
    said = transformers.Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151680,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    config = transformers.LlavaConfig(
        vision_config=seen, text_config=said, image_token_index=151646, tie_word_embeddings=True
    )
    model = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    model.save_pretrained(folder, max_shard_size="800MB")
    folder = Path(folder)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    byte_level(LINES * 50, 2000, nfc=True, specials=specials).save(str(folder / "tokenizer.json"))
    words = {"eos_token": "<|im_end|>", "chat_template": jinja_templates.CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
    )
    processor.save_pretrained(folder)


if __name__ == "__main__":
    write_large(sys.argv[1])
