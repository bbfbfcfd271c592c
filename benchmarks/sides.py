"""
Who steps in peers.py: our model of a shape and transformers' of the same one, with the same data.
"""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import train
from batches import Batch
from common.images import ImageFormat
from fast.memory import keep_memory
from model import GPT, BabyLLaVA, GPTConfig, make_projector
from training import phases
from training.optimizer import make_optimizers, set_trainable
from training.processes import Processes
from vision import ViT

VOCABULARY, WORDS, ANSWER = 6000, 32, 64
IMAGE, PAD = 5999, 5998


@dataclasses.dataclass(frozen=True)
class Shape:
    side: int  # of an image, in pixels
    tower: tuple  # width, layers, heads
    layers: int  # of the GPT
    batch: int
    words: int = WORDS
    pictures: int = 1  # of a sample
    width: int = 256  # of the GPT
    heads: int = 4

    @property
    def image_tokens(self):
        """Of all pictures of a sample."""
        return self.pictures * (self.side // 16) ** 2


SHAPES = {
    "S": Shape(96, (192, 4, 3), 4, 8),
    "B": Shape(224, (384, 12, 6), 8, 4),
    "L": Shape(0, (), 8, 8, 256),
    "G": Shape(224, (384, 12, 6), 12, 64, 64, width=768, heads=12),
}


def make_data(shape):
    """(tokens (B, T) with placeholders first, targets (B, T) aligned with them, -100 where there is
    none)."""
    rng, P = np.random.RandomState(0), shape.image_tokens
    tokens = rng.randint(0, 5000, (shape.batch, P + shape.words))
    tokens[:, :P] = IMAGE
    targets = np.full_like(tokens, -100)
    targets[:, P:] = tokens[:, P:]
    return tokens, targets


# ---------------------------------------------------------------------------------------------
# Ours and theirs


def make_run(model, name, parts, device, image_format, **options):
    """A phases.Run that trains parts of a model, for train.take_step() alone."""
    settings = train.Config(**{"compile": "off", **options})
    processes = Processes(0, 1, device)
    return phases.Run(
        settings=settings,
        name=name,
        phase=train.PHASES.get(name),
        dataset=SimpleNamespace(image_format=image_format),
        processes=processes,
        parents={},
        inherited={},
        raw_model=model,
        optimizers=make_optimizers(settings, set_trainable(model, parts, 1e-4), device),
        model=phases.wrap(model, settings, processes, None),
        train_batches=None,
        val_batches=None,
        start=0,
        steps=10**6,
        batch=1,
    )


class Ours:
    """Our model of a shape and train.py's step on it."""

    def __init__(self, shape, work, device):
        torch.manual_seed(0)
        P = shape.image_tokens
        longest = P + shape.words + ANSWER
        sizes = GPTConfig(VOCABULARY, longest, shape.layers, shape.heads, shape.width)
        if P:
            tower = ViT(shape.side, 16, *shape.tower).requires_grad_(False)
            projector = make_projector("mlp2x_gelu", tower.width, shape.width)
            self.model = BabyLLaVA(GPT(sizes), projector, tower, IMAGE).to(device)
        else:
            self.model = BabyLLaVA(GPT(sizes)).to(device)
        tokens, targets = make_data(shape)
        features, x, y = None, tokens[:, :-1], targets[:, 1:]
        if not P:  # a row of the stream is followed by another, so its last token has a target too
            x, y = tokens, np.roll(targets, -1, 1)
        if P:
            images = shape.batch * shape.pictures
            self.pixels = torch.zeros(images, 3, shape.side, shape.side, device=device)
            features = self.model.encode_images(self.pixels).detach().half().cpu().numpy()
        places = np.flatnonzero(y.flatten() != -100) if P else None
        wanted = y.flatten()[places] if P else y.flatten()
        self.batch = Batch(np.ascontiguousarray(x), wanted, places, features, len(wanted))
        self.prompt = torch.tensor(tokens[:, : P + 1], device=device)
        self.device, self.work, self.shape = device, work, shape

    def prepare(self, mode, dtype=""):
        """Make ready for steps in this mode; dtype as of train.py: on a GPU bf16 autocast."""
        compiled = "on" if mode == "compiled" else "off"
        parts = () if self.work == "generation" else train.PHASES[self.work].learns
        image_format = ImageFormat(self.shape.side or 16)
        self.run = make_run(
            self.model, self.work, parts, self.device, image_format, compile=compiled, dtype=dtype
        )

    def step(self):
        return float(train.take_step(self.run, 10**5, [self.batch])[0])

    @torch.no_grad()
    def look(self, rows):
        return self.model.encode_images(self.pixels[:1].expand(rows, -1, -1, -1))

    def say(self, rows):
        """ANSWER greedy tokens after a picture and a word, from pixels on."""
        features = self.look(rows)
        embeds = self.model.embed_images(features)
        said = self.model.generate(self.prompt[:1].expand(rows, -1), embeds, ANSWER)
        return torch.stack(list(said), 1)


def llava(shape):
    """LlavaForConditionalGeneration of a shape, with weights that are random."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    width, layers, heads = shape.tower
    seen = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=shape.side,
        patch_size=16,
        projection_dim=width,
    )
    settings = LlavaConfig(
        vision_config=seen,
        text_config=LlamaConfig(**llama_sizes(shape)),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=shape.image_tokens,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(settings)


def llama_sizes(shape):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.width,
        "intermediate_size": GPTConfig(1, 1, 1, shape.heads, shape.width).n_hidden,  # as ours
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": shape.image_tokens + shape.words + ANSWER,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def language_model(kind, shape):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "Llama":
        return LlamaForCausalLM(LlamaConfig(**llama_sizes(shape)))
    sizes = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=shape.words,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(sizes)


class Peer:
    """A model of transformers and what its Trainer does in a step: loss, clipping, fused AdamW; on
    a GPU with bf16=True."""

    def __init__(self, kind, shape, work, device):
        torch.manual_seed(0)
        made = llava(shape) if kind == "LLaVA" else language_model(kind, shape)
        self.model = made.to(device).train()
        if kind == "LLaVA":
            self.model.model.vision_tower.requires_grad_(False)
            if work == "phase1":
                self.model.model.language_model.requires_grad_(False)
        tokens, labels = make_data(shape)
        tokens, labels = torch.tensor(tokens, device=device), torch.tensor(labels, device=device)
        self.inputs = {"input_ids": tokens, "labels": labels}
        self.prompt = tokens[:, : shape.image_tokens + 1]
        if kind == "LLaVA":
            self.pixels = torch.zeros(shape.batch, 3, shape.side, shape.side, device=device)
            self.inputs["pixel_values"] = self.pixels

    def prepare(self, mode):
        self.learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, 1e-4, weight_decay=0.1, fused=True)
        self.called = torch.compile(self.model) if mode == "compiled" else self.model
        if hasattr(self, "pixels"):
            tower = self.model.model.vision_tower
            self.tower = torch.compile(tower) if mode == "compiled" else tower

    def step(self):
        kind = self.model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            loss = self.called(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def look(self, rows):
        """The tower alone, as a step runs it."""
        kind = self.model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            self.tower(self.pixels[:1].expand(rows, -1, -1, -1))

    @torch.no_grad()
    def say(self, rows):
        said = self.model.generate(
            input_ids=self.prompt[:1].expand(rows, -1),
            attention_mask=torch.ones_like(self.prompt[:1].expand(rows, -1)),
            pixel_values=self.pixels[:1].expand(rows, -1, -1, -1),
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
        )
        return said[:, self.prompt.shape[1] :]


def make_side(kind, shape, work, mode, device):
    if kind == "ours" and device.type == "cpu":
        keep_memory()  # as train.py does
    side = Ours(shape, work, device) if kind == "ours" else Peer(kind, shape, work, device)
    side.prepare(mode)
    return side
