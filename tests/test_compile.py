"""torch.compile over whole passes: how many graphs, and whether it falls apart on the way."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from batches import SampleBatches, TextBatches
from model import GPT, BabyLLaVA, GPTConfig, make_projector
from training import phases, published
from vision import ViT


def make_model(dataset, attention, norm, image_attention="causal"):
    sizes = GPTConfig(dataset.tokenizer.vocab_size, 3072, 3, 2, 16, attention=attention, norm=norm)
    tower = ViT(dataset.image_format.size, 8, 16, 2, 2).requires_grad_(False)
    projector = make_projector("mlp2x_gelu", 16, 16)
    tiled = bool(dataset.image_format.canvases)
    image = dataset.tokenizer.image
    return BabyLLaVA(GPT(sizes), projector, tower, image, -1, False, image_attention, tiled)


def all_shapes(batches, steps):
    """A batch of each combination of shapes that occurs in so many steps of a pass, in order."""
    seen = set()
    for step in np.linspace(0, batches.rows // batches.batch - 1, steps).astype(int).tolist():
        batch = batches.read(batches.plan(step))
        parts = (batch.tokens, batch.targets, batch.images, *(batch.arrangement or ()))
        shapes = tuple(None if part is None else part.shape for part in parts)
        if (key := (shapes, batch.first_target())) not in seen:
            seen.add(key)
            yield batch


def compile_pass(model, batches, image_format, steps=30):
    """(graphs, breaks) of training on batches of all shapes. The backend runs what is captured as
    it is: how often it is captured is counted, not how fast it is."""
    torch.compiler.reset()
    counters.clear()
    compiled = phases.WithGradient(torch.compile(model, backend="eager"))
    for batch in all_shapes(batches, steps):
        compiled(*model.inputs(batch, image_format, 0, 0))
    found = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    torch.compiler.reset()
    return found


@pytest.mark.parametrize(
    "corpus, split, attention, norm",
    [
        ("toy", "train", "sdpa", "torch"),
        ("toy", "train", "reference", "reference"),
        ("toy_v2", "chat_train", "sdpa", "torch"),
        ("toy_tiles", "chat_train", "sdpa", "torch"),
    ],
)
def test_a_pass_of_samples_compiles_to_few_graphs(corpus, split, attention, norm):
    """Lengths, numbers of images and of targets change all the time."""
    dataset = published.StandIn(f"data/{corpus}")
    model = make_model(dataset, attention, norm)
    shape = (dataset.count(split, "frames"), model.num_features(dataset.image_format.size), 16)
    features = np.broadcast_to(np.zeros((1, *shape[1:]), np.float16), shape)
    batches = SampleBatches(dataset, split, 2, 1, model, features)
    graphs, breaks = compile_pass(model, batches, dataset.image_format)
    assert graphs <= 3 and breaks == 0


def test_a_pass_of_text_compiles_to_one_graph():
    dataset = published.StandIn("data/toy")
    model = make_model(dataset, "sdpa", "torch")
    batches = TextBatches(dataset, "train", 4, 1, model)
    assert compile_pass(model, batches, dataset.image_format, steps=3) == (1, 0)
