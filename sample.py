"""
Show a picture, read what the model says.

    python sample.py --image img.jpg                          # a caption
    python sample.py --image a.jpg --image b.jpg              # several pictures in one context
    python sample.py --image img.jpg --prompt "the ball is"   # go on from these words
    python sample.py --prompt "where 's the" --temperature 0.8 --num_samples 3       # words alone
    python sample.py --image img.jpg --attention out.png      # where each word looked

Without --checkpoint it takes out/toy/phase2.pt or else assets/toy.pt, a small model of the toy
world that comes with the repository.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import checkpoint
import config
from config import UserError, knob
from images import read_image, to_pixels


@dataclass
class Config(config.Knobs):
    image: tuple[str, ...] = ()  # a picture file, or several
    prompt: str = ""  # the caption begins with these words
    checkpoint: str = ""  # a .pt that train.py wrote; empty: out/toy/phase2.pt, else assets/toy.pt
    num_samples: int = knob(1, low=1, high=10**6)  # how many to say
    max_new_tokens: int = knob(50, low=1, high=10**6)  # for a model that does not stop by itself
    temperature: float = knob(0.0, low=0.0, high=100.0)  # 0: the likeliest; 1: as it was learnt
    top_k: int = knob(0, low=0)  # choose among this many likeliest tokens; 0: all
    seed: int = knob(1, low=0, high=2**63 - 1)  # of the choices
    attention: str = ""  # a PNG to draw, for each word, where in the picture the model looked
    device: str = ""  # cpu, cuda, cuda:1, mps; empty: cuda where there is one


@torch.no_grad()
def encode_frames(loaded, frames):
    """Features (N, P, E) of frames (N, S, S, 3) uint8. (In training they are stored in fp16.)"""
    pixels = to_pixels(frames, loaded.image_format, loaded.device)
    return loaded.model.encode_images(pixels).float()


def caption(loaded, frames, max_new_tokens=50, batch=100):
    """Greedy captions of frames (N, S, S, 3) uint8, one string each."""
    captions, eos = [], loaded.tokenizer.eos
    for start in range(0, len(frames), batch):
        features = encode_frames(loaded, frames[start : start + batch])
        image = torch.full(features.shape[:2], loaded.tokenizer.image, device=features.device)
        answers = loaded.model.generate(image, features, max_new_tokens, stop=eos)
        for row in torch.stack(list(answers), 1).tolist():  # (n, new tokens)
            words = [token for token in row if token != eos]
            captions.append(loaded.tokenizer.decode(words).strip())
    return captions


def begin(loaded, images, prompt):
    """(tokens (1, T), features or None, frames or None) that an answer goes on from."""
    tokenizer, model = loaded.tokenizer, loaded.model
    words = tokenizer.encode(prompt)
    features = frames = None
    tokens = [tokenizer.eos, *words]
    if images:
        if model.projector is None:
            raise UserError(
                "this checkpoint cannot see: give one of phase 1 or later, or no --image"
            )
        frames = np.stack([read_image(path, loaded.image_format) for path in images])
        features = encode_frames(loaded, frames)
        tokens = [tokenizer.image] * (features.shape[0] * features.shape[1]) + words
    if len(tokens) >= model.gpt.config.block_size:
        raise UserError(
            f"{len(images)} images and the prompt make {len(tokens)} tokens; this "
            f"model holds {model.gpt.config.block_size}, its answer included"
        )
    return torch.tensor([tokens], device=loaded.device), features, frames


def stream_answer(loaded, tokens, features, settings, generator):
    """Print an answer as it comes, the prompt first. Returns its tokens."""
    tokenizer, answer = loaded.tokenizer, []
    generated = loaded.model.generate(
        tokens,
        features,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        tokenizer.eos,
        generator,
    )

    def stream():
        yield from tokenizer.encode(settings.prompt)
        for token in generated:
            answer.append(int(token))
            yield int(token)

    for piece in tokenizer.pieces(stream()):
        print(piece, end="", flush=True)
    ended = answer and answer[-1] == tokenizer.eos
    print("" if ended else " ... (stopped at the limit)")
    return answer


def draw_attention(path, loaded, tokens, features, frames, first):
    """One row an image: the picture, then for each word the picture lit where that word's query
    looked, mean over layers and heads. The query is the position that predicted the word; the
    first word is token number `first`."""
    maps = loaded.model.attention_maps(tokens, features)[0]  # (T, T)
    P = features.shape[1]
    side = int(P**0.5)
    scale, height = 128, 128 + 14
    answer = tokens[0, first:]
    sheet = Image.new("RGB", (scale * (1 + len(answer)), height * len(frames)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((scale, scale))
        dark = picture.point(lambda value: value // 4)
        sheet.paste(picture, (0, i * height))
        for j, token in enumerate(answer):
            places = maps[first + j - 1, i * P : (i + 1) * P][-side * side :]  # without CLS
            light = places.view(side, side) / places.max().clamp(min=1e-9)
            light = Image.fromarray((light * 255).byte().cpu().numpy())
            light = light.resize((scale, scale), Image.Resampling.BICUBIC)
            x, y = (j + 1) * scale, i * height
            sheet.paste(Image.composite(picture, dark, light), (x, y))
            word = loaded.tokenizer.decode([int(token)]).strip() or "<eos>"
            draw.text((x + 4, y + scale + 1), word, "black")
    try:
        sheet.save(path)
    except ValueError as error:  # a file name without a known suffix
        raise UserError(f"--attention {path}: {error}") from None


def main(argv):
    settings = config.load(Config, argv, __doc__)
    if settings.attention and not settings.image:
        raise UserError("--attention needs an --image to look at")
    shipped = Path(__file__).parent / "assets" / "toy.pt"
    default = "out/toy/phase2.pt" if Path("out/toy/phase2.pt").exists() else shipped
    loaded = checkpoint.load(
        settings.checkpoint or default, checkpoint.choose_device(settings.device)
    )
    if loaded.model.gpt is None:
        raise UserError(f"{settings.checkpoint}: a tower alone; give one of phase 0 or later")
    tokens, features, frames = begin(loaded, settings.image, settings.prompt)
    generator = torch.Generator(loaded.device).manual_seed(settings.seed)
    for number in range(settings.num_samples):
        answer = stream_answer(loaded, tokens, features, settings, generator)
        if settings.attention and number == 0:
            whole = torch.cat([tokens, torch.tensor([answer], device=loaded.device)], 1)
            draw_attention(
                settings.attention, loaded, whole, features, frames, first=tokens.shape[1]
            )


if __name__ == "__main__":
    config.run(main)
