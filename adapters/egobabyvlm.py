"""
Models of nanoBabyLLaVA inside EgoBabyVLM's evaluation launcher. `python export.py CHECKPOINT.pt DIR
--to egobabyvlm` copies this file to DIR/nano.py, beside the weights and our code, and writes the
launcher's configuration of each model:

    nano_image    NanoImage, the tower: kNN, linear probes, ABX, segmentation, depth
    nano_pairs    NanoPairs, pictures and texts: Machine-DevBench, DevBench
    nano_words    the launcher's own FastAutoCausalLM, on DIR/language: Zorro, LT-Swap

With DIR in PYTHONPATH and the three files in the launcher's evaluation/configs/model, they are
`model=nano_image` and so on. The launcher calls .eval(), .to(device) and the methods below.
Letters: N images, T texts, S image side in pixels, P patches, E vision width.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent


def open_exported(path, device="cpu"):
    """adapters/loading.py's function of that name."""
    code = FOLDER / "nanobabyllava" / "adapters" / "loading.py"
    if not code.exists():  # a clone of nanoBabyLLaVA
        code = FOLDER / "loading.py"
    spec = importlib.util.spec_from_file_location("nanobabyllava_loading", code)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.open_exported(path, device)


class NanoImage(nn.Module):
    """The vision tower. pooling: "cls", the CLS token; "mean_patch", the mean of the patches;
    "all", every patch. last_n_layers: features of so many last blocks, each after the final norm,
    side by side."""

    def __init__(self, checkpoint=str(FOLDER), pooling="cls", last_n_layers=1):
        super().__init__()
        _, self.loaded = open_exported(checkpoint)
        self.tower = self.loaded.model.tower
        self.set_pooling_strategy(pooling, last_n_layers)

    def set_pooling_strategy(self, pooling=None, last_n_layers=None):
        """Set both options; None keeps the current value. Raises ValueError."""
        self.pooling = pooling or getattr(self, "pooling", "cls")
        self.last_n_layers = last_n_layers or getattr(self, "last_n_layers", 1)
        if self.pooling not in ("cls", "mean_patch", "all"):
            raise ValueError(f"pooling {self.pooling!r}: cls, mean_patch or all")
        if self.last_n_layers > len(getattr(self.tower, "blocks", [None])):
            raise ValueError(f"last_n_layers {self.last_n_layers}: the tower has fewer blocks")

    @property
    def feature_dim(self):
        return self.tower.width * self.last_n_layers

    @property
    def input_size(self):
        return (self.loaded.image_format.size,) * 2

    @property
    def normalize_params(self):
        image_format = self.loaded.image_format
        return {"mean": list(image_format.mean), "std": list(image_format.std)}

    def extract_features(self, images):
        """images (N, 3, S, S), normalised -> (N, feature_dim), or (N, P, feature_dim) of "all"."""
        images, layers = images.to(next(self.tower.parameters()).dtype), []
        for layer in range(-self.last_n_layers, 0):
            x = self.tower(images, select_layer=layer)  # (N, 1 + P, E)
            # the tower norms its last block's output alone
            layers.append(x if layer == -1 else self.tower.norm(x))
        x = torch.cat(layers, -1)
        if self.pooling == "cls":
            return x[:, 0]
        return x[:, 1:].mean(1) if self.pooling == "mean_patch" else x[:, 1:]

    forward = extract_features


class NanoPairs(nn.Module):
    """Pictures and texts. The similarity of a text to a picture is minus its negative
    log-likelihood per token after the picture."""

    def __init__(self, checkpoint=str(FOLDER)):
        super().__init__()
        self.inference, self.loaded = open_exported(checkpoint)
        self.model = self.loaded.model
        self.pictures, self.texts = [], []

    @property
    def feature_dim(self):
        return 1

    def extract_image_features(self, images):
        """PIL images -> their numbers (N, 1): pictures are kept until the next call."""
        self.pictures = list(images)
        return torch.arange(len(self.pictures)).float()[:, None]

    def extract_text_features(self, text):
        """Strings -> their numbers (T, 1): texts are kept until the next call."""
        self.texts = list(text)
        return torch.arange(len(self.texts)).float()[:, None]

    def extract_features(self, inputs):
        """{"image": PIL images, "text": strings} -> {"image_features", "text_features"}."""
        return {
            "image_features": self.extract_image_features(inputs["image"]),
            "text_features": self.extract_text_features(inputs["text"]),
        }

    @torch.no_grad()
    def compute_similarity(self, a, b, *, normalize=None):
        """The numbers of N pictures and T texts -> (N, T). normalize is accepted and not used."""
        numbers = [[int(row[0]) for row in own] for own in (a, b)]
        image_format = self.loaded.image_format
        read = [
            self.inference.read_picture(self.pictures[number], image_format)
            for number in numbers[0]
        ]
        embeds = self.inference.embed_pictures(self.loaded, read)
        texts = [self.texts[number] for number in numbers[1]]
        prompts, of_rows, words = [], [], []
        tokenizer = self.loaded.tokenizer
        for embed in embeds:
            for text in texts:
                prompts.append(tokenizer.start + [tokenizer.image] * len(embed))
                of_rows.append([embed])
                words.append(tokenizer.encode(text))
        nll = self.inference.nll_after(self.loaded, prompts, of_rows, words)
        return -torch.tensor(nll).view(len(embeds), len(texts))
