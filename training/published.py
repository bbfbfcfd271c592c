"""
The sizes of corpora and weights that are not on this machine: so that `train.py CONFIG --plan`
computes what a run will take before anything is fetched, and so that a wrong option is found before
a toy world is drawn.

Counts are those of the publications, or of the toy worlds as they are drawn. Lengths that nobody
has published are estimates, marked so.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import vision
from common.images import ImageFormat
from config import UserError
from data import Data
from model import GPT, BabyLLaVA, GPTConfig
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Samples:
    """`count` samples of so many tokens, `learnt` of them in the loss, with so many pictures.
    tiles: (rows, columns) of each picture."""

    count: int
    tokens: int
    learnt: int
    pictures: int = 1
    tiles: tuple = (0, 0)


@dataclass(frozen=True)
class Corpus:
    """The shape of a prepared folder. text: tokens; frames: that are stored; samples, chats: of
    train and chat_train, a tenth of them again for validation."""

    size: int
    vocabulary: int
    text: int
    samples: tuple
    chats: tuple = ()
    frames: int = 0
    template: str = ""
    canvases: tuple = ()


def one_of_each(*samples):
    """The Samples, each with one of the greatest length that occurs: (Samples, longest)."""
    return tuple(
        part
        for some, longest in samples
        for part in (some, Samples(1, longest, some.learnt, some.pictures, some.tiles))
    )


TOY_WORLDS = ("toy", "toy_chat", "toy_v2")  # that train.py draws if they are missing
CANVASES = ((128, 64), (64, 128), (128, 128))
LLAVA_CANVASES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TOY_CHATS = Corpus(
    64,
    500,
    164420,
    one_of_each((Samples(10011, 9, 8), 16)),
    one_of_each((Samples(10011, 69, 32), 115), (Samples(1989, 69, 32, 2), 70)),
    frames=10011,
    template="bare",
)
CORPORA = {
    # the toy worlds, as data.py draws them
    "toy": Corpus(64, 500, 164420, one_of_each((Samples(24000, 10, 9), 16)), frames=12000),
    "toy_hour": Corpus(64, 500, 164420, one_of_each((Samples(64000, 10, 9), 16)), frames=32000),
    "toy_chat": TOY_CHATS,
    "toy_conv": replace(TOY_CHATS, size=128),
    "toy_tiles": Corpus(
        64,
        500,
        164420,
        one_of_each((Samples(10011, 9, 8, 1, (1, 2)), 16)),
        one_of_each(
            (Samples(7698, 69, 32, 1, (1, 2)), 105),
            (Samples(2302, 69, 32, 1, (2, 2)), 115),
            (Samples(1989, 69, 32, 2, (1, 2)), 70),
        ),
        frames=37219,
        template="bare",
        canvases=CANVASES,
    ),
    "toy_v2": Corpus(
        64,
        667,
        281242,
        one_of_each(
            (Samples(16000, 10, 9), 16),
            (Samples(1629, 18, 13, 5), 80),
            (Samples(571, 75, 68, 6), 118),
        ),
        one_of_each(
            (Samples(25000, 18, 4), 40),
            (Samples(81400, 37, 3, 4), 62),
            (Samples(8371, 60, 3, 5), 63),
            (Samples(5328, 80, 4, 8), 124),
            (Samples(7801, 200, 60, 15), 363),
            (Samples(429, 363, 120, 29), 363),
        ),
        frames=19764,
        template="bare",
    ),
    # SAYCam as BabyLLaVA has it: 37,486 utterances of some 10 tokens, about 67,000 pairs
    "saycam": Corpus(224, 6000, 374860, (Samples(67000, 12, 11),), frames=67000),
    "saycam_words": Corpus(224, 2353, 374860, (Samples(67000, 12, 11),), frames=67000),
    # BabyLLaVA-V2: 768K pictures, 181K clips of 8 frames, 63K sequences of 4 to 8 moments; the
    # number of words is an estimate, and so is all but the count of its 113,211 tuning items
    "saycam_v2": Corpus(
        224,
        6000,
        374860,
        (Samples(768000, 12, 11), Samples(181000, 19, 11, 8), Samples(63000, 78, 72, 6)),
        frames=768000,
        template="baby_v1",
    ),
    "toolbox": Corpus(
        224, 6000, 374860, (), (Samples(113211, 60, 3, 3),), frames=339633, template="baby_v1"
    ),
    # EgoBabyVLM: 85 % of 1.43 million utterances of some 10 tokens
    "babyview": Corpus(224, 52000, 12155000, (Samples(1215500, 12, 11),), frames=1215500),
    # LLaVA-1.5's 558,128 captions and 665,298 conversations, of which 40,688 have no picture; the
    # lengths are estimates
    "llava15_captions": Corpus(336, 32064, 0, (Samples(558128, 18, 16),), frames=558128),
    "llava15_chat": Corpus(
        336,
        32064,
        0,
        (),
        (Samples(624610, 300, 150), Samples(40688, 1000, 600, 0)),
        frames=624610,
        template="v1",
    ),
    "llava_next_captions": Corpus(336, 128320, 0, (Samples(558128, 18, 16),), frames=558128),
    "llava_next": Corpus(
        336,
        128320,
        0,
        (Samples(558128, 18, 16, 1, (2, 2)),),
        (Samples(760000, 350, 180, 1, (2, 2)),),
        frames=3800000,
        template="llama3",
        canvases=LLAVA_CANVASES,
    ),
    # ConvLLaVA: about two million long captions, then LLaVA-1.5's conversations
    "convllava_captions": Corpus(768, 32064, 0, (Samples(2000000, 200, 190),), frames=2000000),
    "convllava_chat": Corpus(
        768,
        32064,
        0,
        (),
        (Samples(624610, 300, 150), Samples(40688, 1000, 600, 0)),
        frames=624610,
        template="v1",
    ),
}
CLIP = {
    "hidden": 4096,
    "activation": "quick_gelu",
    "eps": 1e-5,
    "patch_bias": False,
    "first_norm": True,
    "final_norm": False,
}
VIT_L = {"width": 1024, "depth": 24, "heads": 16}
TOWERS = {
    "dino_sfp_resnext50.pth": ("resnext", {}),
    "dino_vitl16_saycam.pth": ("vit", {"size": 224, "patch": 16, **VIT_L}),
    "dinov2_vitb14_babyview.pth": (
        "vit",
        {"size": 518, "patch": 14, "width": 768, "depth": 12, "heads": 12, "scaled": True},
    ),
    "clip-vit-large-patch14-336": ("vit", {"size": 336, "patch": 14, **VIT_L, **CLIP}),
    "convnext_large_clip.safetensors": ("convnext", {"depths": (3, 3, 27, 3), "width": 192}),
}
LANGUAGE_MODELS = {  # the vocabulary is enlarged for <image>, to a multiple of 64
    "vicuna-7b-v1.5": GPTConfig(
        32064, 4096, 32, 32, 4096, n_hidden=11008, norm_eps=1e-5, tied=False
    ),
    "Meta-Llama-3-8B-Instruct": GPTConfig(
        128320, 8192, 32, 32, 4096, n_kv_head=8, n_hidden=14336, rope_theta=5e5, tied=False
    ),
}


def load_weights(option, source):
    """A BabyLLaVA on the meta device with the sizes of the published weights that an option names.
    Raises UserError if they are not in the tables above."""
    known = {"vision_weights": TOWERS, "language_weights": LANGUAGE_MODELS}[option]
    name = Path(source).name
    if name not in known:
        raise UserError(
            f"--{option} {source}: there is none, and its size is not known; known are "
            f"{', '.join(known)}"
        )
    with torch.device("meta"):
        if option == "vision_weights":
            kind, arguments = known[name]
            tower = vision.build_tower({"kind": kind, "arguments": arguments})
            return BabyLLaVA(None, tower=tower)
        return BabyLLaVA(GPT(known[name]), image_token=known[name].vocab_size - 1)


class StandIn(Data):
    """A data.Data of a corpus that is not here: it has the shape of a published one, and all its
    samples of one kind are the same."""

    def __init__(self, directory):
        name = Path(directory).name
        self.directory, corpus = Path(directory), CORPORA[name]
        words = [b"<unk>"] + [b"w%d" % i for i in range(1, corpus.vocabulary - 3)]
        self.tokenizer = Tokenizer({word: i for i, word in enumerate(words)}, "word")
        self.image_format = ImageFormat(corpus.size, canvases=corpus.canvases)
        self.arrays, splits = {}, {}
        parts = {"": (corpus.text, corpus.frames, corpus.samples), "chat_": (0, 0, corpus.chats)}
        for prefix, (text, frames, samples) in parts.items():
            for split, share in (("train", 1), ("val", 10)):
                own = self.make_split(text // share, frames // share, samples, share)
                self.arrays |= {(prefix + split, kind): array for kind, array in own.items()}
                splits[prefix + split] = {kind: len(array) for kind, array in own.items()}
        template = {"name": corpus.template, "system": ""} if corpus.template else None
        self.meta = {
            "source": name,
            "corpus": "",
            "vocab_size": corpus.vocabulary,
            "splits": splits,
            "template": template,
        }

    def make_split(self, text, frames, samples, share):
        """{bin: array} of a split, without bins that would be empty."""
        size, rows, tokens, loss_mask, images, shown = self.image_format.size, [], [], [], [], []
        for some in samples:
            first, first_image = len(tokens), len(shown)
            words = some.tokens - some.pictures
            tokens += [self.tokenizer.image] * some.pictures + [0] * words
            loss_mask += [0] * (some.tokens - some.learnt) + [1] * some.learnt
            for _ in range(some.pictures):
                shown.append(len(images))
                images.append((0, *some.tiles, size, size))
            row = (first, some.tokens, first_image, some.pictures)
            rows.append(np.tile(np.array(row, np.uint64), (max(1, some.count // share), 1)))
        frames = max(frames, 32 if images else 0)
        made = {
            "text": np.broadcast_to(np.uint16(0), text),
            "frames": np.broadcast_to(np.uint8(0), (frames, size, size, 3)),
            "clips": np.arange(frames, dtype=np.uint32) // 2,
            "images": np.array(images, np.uint32).reshape(-1, 5),
            "image_ids": np.array(shown, np.uint32),
            "samples": np.concatenate(rows) if rows else np.zeros((0, 4), np.uint64),
            "tokens": np.array(tokens, np.uint32),
            "loss_mask": np.array(loss_mask, np.uint8),
        }
        return {kind: array for kind, array in made.items() if len(array)}

    def open(self, split, kind):
        if (split, kind) not in self.arrays:
            raise UserError(f"{self.directory} has no {kind} in {split}")
        return self.arrays[split, kind]
