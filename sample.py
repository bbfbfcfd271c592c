"""
Show a picture, read what the model says.

    python sample.py --image img.jpg                          # a caption
    python sample.py --image a.jpg --image b.jpg              # several pictures in one context
    python sample.py --image img.jpg --prompt "the ball is"   # go on from these words
    python sample.py --prompt "where 's the" --temperature 0.8 --num_samples 3       # words alone
    python sample.py --image img.jpg --attention out.png      # where each word looked

Without --checkpoint it takes out/toy/phase2.pt or else assets/toy.pt, a small model of the toy
world that comes with the repository. A checkpoint is one self-contained file.
"""
import argparse
import json
import pickle
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw

import configs
from data import DataError, Tokenizer, read_image
from model import BabyLLaVA, GPT, GPTConfig, Projector
from vision import make_tower, preprocess, tower_features

FORMAT = 1  # of checkpoints; another is refused


@dataclass
class Config:
    image: str = ""  # a picture file, or several
    prompt: str = ""  # the caption begins with these words
    checkpoint: str = ""  # a .pt that train.py wrote; empty: out/toy/phase2.pt, else assets/toy.pt
    num_samples: int = 1  # how many to say
    max_new_tokens: int = 50  # a limit for a model that does not stop by itself
    temperature: float = 0.0  # 0: the likeliest word each time; 1: as likely as it was learnt
    top_k: int = 0  # choose among this many likeliest tokens; 0: all
    seed: int = 1  # of the choices
    attention: str = ""  # a PNG to draw, for each word, where in the picture the model looked
    device: str = ""  # cpu, cuda, mps; empty: cuda where there is one


# ---------------------------------------------------------------------------------------------
# Checkpoints


SAFE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of header length, JSON, then the numbers."""
    content = Path(path).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    header.pop("__metadata__", None)
    if not header or len(content) != size + max(h["data_offsets"][1] for h in header.values()):
        raise ValueError("its length is not what its header says")
    return {name: torch.frombuffer(bytearray(content[size + begin:size + end]),
                                   dtype=SAFE[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items() for begin, end in [entry["data_offsets"]]}


def read_file(path):
    """What torch.save or safetensors put there, read without running any code in it.

    Raises DataError, one line, for no file, a foreign one or one cut short."""
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        # DINO's training checkpoints hold the command line that made them, which is no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint; "
                        "python train.py configs/toy.py makes one") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a checkpoint, or cut short ({reason})") from None


def read_checkpoint(path):
    """The dict that train.py wrote. Raises DataError for another thing or format."""
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise DataError(f"{path}: not a nanoBabyLLaVA checkpoint of format {FORMAT}")
    return checkpoint


def build(checkpoint, device="cpu", **backends):
    """From a checkpoint's dict: a namespace of model, tower, tokenizer, config and the rest.

    Parts that a phase does not have yet are None. Everything is in eval mode on `device`."""
    parts = SimpleNamespace(tokenizer=None, tower=None, model=None, meta=checkpoint)
    if "vision" in checkpoint:
        parts.tower = make_tower(checkpoint["vision"])
        parts.tower.load_state_dict(checkpoint["tower"])
        parts.tower.eval().to(device)
    if "gpt" in checkpoint:
        parts.tokenizer = Tokenizer.parse(checkpoint["ranks"], checkpoint["tokenizer"])
        config = GPTConfig(**checkpoint["gpt"], **backends)
        projector = None
        if "projector" in checkpoint:
            projector = Projector(checkpoint["projector"], checkpoint["E"], config.n_embd)
        parts.model = BabyLLaVA(GPT(config), projector, parts.tokenizer.image)
        parts.model.load_state_dict(checkpoint["model"])
        parts.model.eval().to(device)
    return parts


def load(path, device="cpu"):
    return build(read_checkpoint(path), device)


def choose_device(name):
    """The torch.device of a --device knob; empty: cuda where there is one, else cpu."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise DataError(f"--device {name}: cpu, cuda or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available() or \
            device.type == "mps" and not torch.backends.mps.is_available():
        raise DataError(f"--device {name}: this machine has none that torch can use; try cpu")
    return device


def see(parts, frames):
    """Features (N, P, E) of frames (N, S, S, 3) uint8, as the tower was used in training."""
    x = preprocess(frames, next(parts.tower.parameters()).device)
    return tower_features(parts.tower, x, parts.meta["select_layer"],
                          parts.meta["keep_cls"]).float()


def caption(parts, frames, max_new_tokens=50, batch=100):
    """Greedy captions of frames (N, S, S, 3) uint8, one string each."""
    lines = []
    for start in range(0, len(frames), batch):
        features = see(parts, frames[start:start + batch])
        prompt = torch.full(features.shape[:2], parts.tokenizer.image, device=features.device)
        tokens = torch.stack([*parts.model.generate(
            prompt, features, max_new_tokens, stop=parts.tokenizer.eos)], 1)  # (n, words)
        lines += [parts.tokenizer.decode(row[row != parts.tokenizer.eos].tolist()).strip()
                  for row in tokens]
    return lines


# ---------------------------------------------------------------------------------------------
# The command


def begin(parts, images, prompt):
    """(tokens (1, T), features or None, frames) that a sample goes on from."""
    tokenizer, device = parts.tokenizer, parts.model.gpt.cos.device
    words = tokenizer.encode(prompt)
    if not images:
        return torch.tensor([[tokenizer.eos, *words]], device=device), None, None
    if parts.model.projector is None:
        raise DataError("this checkpoint cannot see: give one of phase 1 or 2, or no --image")
    frames = np.stack([read_image(path, parts.meta["S"]) for path in images])
    features = see(parts, frames)
    tokens = [tokenizer.image] * (features.shape[0] * features.shape[1]) + words
    if len(tokens) >= parts.model.gpt.config.block_size:
        raise DataError(f"{len(images)} images and the prompt make {len(tokens)} tokens; this "
                        f"model holds {parts.model.gpt.config.block_size}, its answer included")
    return torch.tensor([tokens], device=device), features, frames


def draw_attention(path, parts, tokens, features, frames, first):
    """One row an image: the picture, then for each word the picture lit where that word's query
    looked, mean over layers and heads. The query is the position that predicted the word."""
    maps = parts.model.look(tokens, features)[0]  # (T, T)
    P, side = features.shape[1], int((features.shape[1]) ** 0.5)
    scale, height = 128, 128 + 14
    said = tokens[0, first:]
    sheet = Image.new("RGB", (scale * (1 + len(said)), height * len(frames)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((scale, scale))
        sheet.paste(picture, (0, i * height))
        for j, token in enumerate(said):
            light = maps[first + j - 1, i * P:(i + 1) * P][-side * side:].view(side, side)  # no CLS
            light = (light / light.max().clamp(min=1e-9) * 255).byte().cpu().numpy()
            light = Image.fromarray(light).resize((scale, scale), Image.Resampling.BICUBIC)
            dark = picture.point(lambda value: value // 4)
            sheet.paste(Image.composite(picture, dark, light), ((j + 1) * scale, i * height))
            word = parts.tokenizer.decode([int(token)]).strip() or "<eos>"
            draw.text(((j + 1) * scale + 4, i * height + scale + 1), word, "black")
    sheet.save(path)


def main(argv):
    config = configs.load(Config, argv, __doc__, many=("image",))
    images = config.image.split("\n") if config.image else []
    fallback = Path(__file__).parent / "assets" / "toy.pt"
    default = "out/toy/phase2.pt" if Path("out/toy/phase2.pt").exists() else fallback
    device = choose_device(config.device)
    parts = load(config.checkpoint or default, device)
    if parts.model is None:
        raise DataError(f"{config.checkpoint}: an eye alone; give a checkpoint of phase 0, 1 or 2")
    tokens, features, frames = begin(parts, images, config.prompt)
    generator = torch.Generator(device).manual_seed(config.seed)
    for number in range(config.num_samples):
        before, said, prompt = "", [], parts.tokenizer.encode(config.prompt)
        for token in chain([None], parts.model.generate(
                tokens, features, config.max_new_tokens, config.temperature, config.top_k,
                parts.tokenizer.eos, generator)):
            said += [] if token is None else [int(token)]
            text = parts.tokenizer.decode(prompt + said)
            print(text[len(before):], end="", flush=True)
            before = text
        print("" if said and said[-1] == parts.tokenizer.eos else " ... (stopped at the limit)")
        if config.attention and not number:
            if features is None:
                raise DataError("--attention needs an --image to look at")
            spoken = torch.cat([tokens, torch.tensor([said], device=device)], 1)
            draw_attention(config.attention, parts, spoken, features, frames, tokens.shape[1])


if __name__ == "__main__":
    configs.run(main, DataError, ValueError)
