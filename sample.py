"""
Caption a picture, ask about it, or continue some words.

    python sample.py img.jpg                          # a caption; --image img.jpg does the same
    python sample.py a.jpg b.jpg                      # several pictures, if the context holds them
    python sample.py img.jpg --prompt "the ball is"   # continue these words
    python sample.py --prompt "where 's the" --temperature 0.8 --num_samples 3   # words alone
    python sample.py img.jpg --attention out.png      # where each word looked
    python sample.py img.jpg --checkpoint out/toy_llava15/phase3.pt --chat
    python sample.py img.jpg --checkpoint DIR --prompt "What is this?"           # a LLaVA

--checkpoint is a file that train.py wrote or a Hugging Face folder of a LLaVA. Its default is
out/toy/phase2.pt (with --chat out/toy_llava15/phase3.pt) if that exists, else assets/toy.pt, a
small model of the toy world that comes with the repository; the first line, on stderr, names it.
For chat models the prompt is a question and is wrapped in the model's template.

    > what is this ?
    a red cup .
    > /image b.png
    > is it the same ?
    no , it 's a blue cup .

In a conversation /image FILE shows another picture, /reset starts again, Ctrl-D ends it.
"""

import common.threads  # noqa: F401, before torch

# isort: split
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import checkpoint
import config
from config import UserError, option
from inference import (
    attention_of,
    brightness,
    check_leading,
    embed_pictures,
    make_prompt,
    open_model,
    read_pictures,
)
from model import KVCache
from tokenizer import TEMPLATES, chat_sample, end_tokens, expand, with_pictures


@dataclass
class Config(config.Options):
    image: tuple[str, ...] = ()  # a picture file, or several
    prompt: str = ""  # the first words of the caption; for chat models the question
    chat: bool = False  # hold a conversation: /image FILE, /reset, Ctrl-D
    checkpoint: str = ""  # a .pt or a folder; empty: what configs/toy.py made, else assets/toy.pt
    template: str = option("", choices=("", "plain", *TEMPLATES))  # for questions; empty: its own
    system: str = ""  # text before the conversation; empty: the one it was trained with
    num_samples: int = option(1, low=1, high=10**6)  # how many captions or answers
    max_new_tokens: int = option(50, low=1, high=10**6)  # the longest answer
    temperature: float = option(0.0, low=0.0, high=100.0)  # 0: greedy; 1: as trained
    top_k: int = option(0, low=0)  # sample among so many likeliest tokens; 0: all
    seed: int = option(1, low=0, high=2**63 - 1)  # for sampling
    attention: str = ""  # a PNG to draw: where in the picture each word looked
    device: str = ""  # cpu, cuda, cuda:1, mps; empty: cuda if there is one
    dtype: str = option("", choices=("", "float32", "bfloat16"))  # empty: that of the weights


def print_answer(loaded, tokens, embeds, settings, generator, first=(), stop=()):
    """Print an answer while it is generated, after the tokens `first`. Returns its tokens."""
    answer = []
    generated = loaded.model.generate(
        torch.tensor([tokens], device=loaded.device),
        torch.cat(embeds) if embeds else None,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        stop,
        generator,
    )

    def stream():
        yield from first
        for token in generated:
            answer.append(int(token))
            yield int(token)

    for piece in loaded.tokenizer.pieces(stream()):
        print(piece, end="", flush=True)
    ended = answer and answer[-1] in stop
    print("" if ended else " ... (stopped at the limit)")
    return answer


# ---------------------------------------------------------------------------------------------
# A conversation


class Conversation:
    """The turns so far, and the embeddings of their pictures, (tokens, C) each.

    Keys and values are cached, so that a turn costs only its new tokens."""

    def __init__(self, loaded, template, system=""):
        if template is None:
            raise UserError(
                "this model has learnt captions and no conversations: leave out --chat, or train "
                "one with `python train.py configs/toy_llava15.py`, or give a LLaVA's folder as "
                f"--checkpoint, or a --template: {', '.join(TEMPLATES)}"
            )
        self.loaded, self.template, self.system = loaded, template, system
        self.stop = end_tokens(loaded.tokenizer, self.template)
        self.reset()

    def reset(self):
        self.turns, self.embeds = [], []
        self.cached, self.cache = [], None  # the tokens in the cache, if they are still the same

    @property
    def block_size(self):
        return self.loaded.model.gpt.config.block_size

    def show(self, paths, path, new):
        """The embeddings of the pictures that are still to be asked about, `new` and the one at
        `path`. paths: of all pictures before it. LLaVA-OneVision makes no tiles of a picture as
        soon as there are two, so when the second arrives, the first is embedded again."""
        loaded, image_format = self.loaded, self.loaded.image_format
        changes_the_first = len(paths) == 1 and image_format.beside_others() != image_format
        if changes_the_first:
            both = embed_pictures(loaded, read_pictures(loaded, [*paths, path]))
            asked = len(self.embeds)  # 1 if there was a question about the first already
            self.embeds, self.cached, self.cache = both[:asked], [], None
            return both[asked:]
        pictures = read_pictures(loaded, [path], others=len(paths))
        return [*new, *embed_pictures(loaded, pictures)]

    def make_tokens(self, question, embeds):
        """All tokens up to where the answer to a question starts."""
        turns = [*self.turns, (question, None)]
        tokens, _ = chat_sample(self.loaded.tokenizer, self.template, turns, self.system)
        counts = [len(embed) for embed in embeds]
        return expand(tokens, self.loaded.tokenizer.image, counts)

    def ask(self, words, embeds=(), max_new_tokens=50, temperature=0.0, top_k=0, generator=None):
        """Yield the tokens of the answer to a question about new pictures.

        Raises UserError, and drops the question, if it does not fit into the context."""
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        question = with_pictures(self.template, words, len(embeds))
        all_embeds = [*self.embeds, *embeds]
        tokens = self.make_tokens(question, all_embeds)
        check_leading(model, tokens)
        if len(tokens) >= self.block_size:
            raise UserError(
                f"the context is full: with this question {len(tokens)} tokens, the model holds "
                f"{self.block_size}, its answer included; /reset starts again"
            )
        capacity = min(self.block_size, len(tokens) + max_new_tokens)
        if self.cache is None:
            self.cache = KVCache(model.gpt.config, model.gpt.embed_tokens.weight, 1, capacity)
        self.cache.grow(capacity)
        # An answer may be tokenized differently than it was generated: keep what is the same.
        # At least one token is left to run: its output predicts the answer. For example, after
        # "<bos> Q a b", of which b was never run, the cache holds 3, and of "<bos> Q a b R" these 3
        # are kept and "b R" is run.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.cached, tokens[:-1]))
        self.cache.length = min(self.cache.length, len(list(same)))
        old, new = tokens[: self.cache.length], tokens[self.cache.length :]
        new_embeds = None
        if new.count(tokenizer.image):
            new_embeds = torch.cat(all_embeds)[old.count(tokenizer.image) :]
        generated = model.generate(
            torch.tensor([new], device=self.loaded.device),
            new_embeds,
            max_new_tokens,
            temperature,
            top_k,
            self.stop,
            generator,
            self.cache,
        )
        answer = []
        for token in generated:
            answer.append(int(token))
            yield int(token)
        self.cached, self.embeds = tokens + answer, all_embeds
        self.turns.append((question, tokenizer.decode(answer).strip()))
        self.ended = bool(answer) and answer[-1] in self.stop


def converse(conversation, embeds, settings, generator):
    """Read questions from the keyboard or a file and answer them until there are no more. embeds:
    those of the first pictures."""
    how = settings.max_new_tokens, settings.temperature, settings.top_k, generator
    embeds, words, paths = list(embeds), settings.prompt, list(settings.image)
    while True:
        try:
            words = words or input("> ").strip()
        except EOFError:
            print()
            return
        command, _, argument = words.partition(" ")
        try:
            if command == "/reset":
                conversation.reset()
                embeds, paths = [], []
            elif command == "/image":
                embeds = conversation.show(paths, argument.strip(), embeds)
                paths = [*paths, argument.strip()]
            elif command.startswith("/"):
                print("/image FILE shows a picture, /reset starts again, Ctrl-D ends")
            elif words:
                answer = conversation.ask(words, embeds, *how)
                for piece in conversation.loaded.tokenizer.pieces(answer):
                    print(piece, end="", flush=True)
                print("" if conversation.ended else " ... (stopped at the limit)")
                embeds = []
        except (UserError, OSError) as error:
            print(error)
        words = ""


# ---------------------------------------------------------------------------------------------
# Where each word looked


def draw_attention(path, loaded, tokens, answer, embeds, pictures):
    """Draw where in the pictures each word of the answer looked: the attention of the position that
    predicted the word. Raises UserError."""
    words = [loaded.tokenizer.decode([token]).strip() or "<eos>" for token in answer]
    maps = attention_of(loaded, tokens, answer, embeds)
    try:
        attention_sheet([picture.frames[0] for picture in pictures], words, maps).save(path)
    except ValueError as error:  # a file name without a known suffix
        raise UserError(f"--attention {path}: {error}") from None


def attention_sheet(frames, words, maps):
    """A PIL image with a row for each of frames (N, S, S, 3): the frame, then for each word the
    frame, brighter where that word looked, and the share of its attention that is on the picture.
    maps: as inference.attention_of() returns them."""
    scale, height = 128, 128 + 16
    sheet = Image.new("RGB", (scale * (1 + len(words)), height * len(frames)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((scale, scale))
        dark = picture.point(lambda value: value // 4)
        sheet.paste(picture, (0, i * height))
        for j, word in enumerate(words):
            light = Image.fromarray((brightness(maps[j][i]) * 255).astype(np.uint8))
            light = light.resize((scale, scale), Image.Resampling.BICUBIC)
            x, y = (j + 1) * scale, i * height
            sheet.paste(Image.composite(picture, dark, light), (x, y))
            draw.text((x + 4, y + scale + 2), f"{word}  {maps[j][i].sum():.0%}", "black")
    return sheet


# ---------------------------------------------------------------------------------------------
# The command


def choose_checkpoint(settings):
    """(path of the model that answers, a line that names it, "" for one that the user named)."""
    usual = Path("out/toy_llava15/phase3.pt" if settings.chat else "out/toy/phase2.pt")
    if settings.checkpoint:
        return settings.checkpoint, ""
    if usual.exists():
        return usual, f"model: {usual}, trained here by configs/{usual.parts[1]}.py"
    return Path(__file__).parent / "assets" / "toy.pt", (
        "model: assets/toy.pt, which comes with the code. It knows sixteen drawn things in eight "
        "colours and nothing else: a photograph too is a drawn thing to it"
    )


def main(argv):
    if not argv:
        return print(__doc__.strip())
    settings = config.load(Config, argv, __doc__, plain="image")
    if settings.attention and not settings.image:
        raise UserError("--attention needs an --image to look at")
    if settings.attention and not Path(settings.attention).absolute().parent.is_dir():
        raise UserError(f"--attention {settings.attention}: there is no such folder: make it first")
    device = checkpoint.choose_device(settings.device)
    path, about = choose_checkpoint(settings)
    loaded = open_model(path, device, settings.dtype)
    if loaded.model.gpt is None:
        raise UserError(f"{settings.checkpoint}: a tower alone; give a later phase's checkpoint")
    template, system = loaded.choose_template(settings.template, settings.system)
    pictures = read_pictures(loaded, settings.image)
    if about:
        print(about, file=sys.stderr)
    embeds = embed_pictures(loaded, pictures) if pictures else []
    generator = torch.Generator(loaded.device).manual_seed(settings.seed)
    if settings.chat:
        return converse(Conversation(loaded, template, system), embeds, settings, generator)
    tokens = make_prompt(loaded, embeds, settings.prompt, template, system)
    first = [] if template is not None else loaded.tokenizer.encode(settings.prompt)
    stop = end_tokens(loaded.tokenizer, template)
    for number in range(settings.num_samples):
        answer = print_answer(loaded, tokens, embeds, settings, generator, first, stop)
        if settings.attention and number == 0:
            draw_attention(settings.attention, loaded, tokens, answer, embeds, pictures)


if __name__ == "__main__":
    config.run(main)
