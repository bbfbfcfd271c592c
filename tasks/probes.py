"""
Probes of the vision tower on other people's pictures, as EgoBabyVLM runs them: a linear classifier
and ABX on MNIST and on CountBench.

    python eval.py --checkpoint out/ego/vision.pt --mnist DIR --countbench DIR2

MNIST's folder has its four idx files (train-images-idx3-ubyte, t10k-labels-idx1-ubyte, ..., also as
.gz). CountBench's has train/ and test/, or pictures to be split 80 to 20, each in a folder named by
its number: DIR/3/a.jpg, DIR/test/10/b.png. (The original splits by a library's shuffle, which needs
that library.) Features are of the frozen tower, after its final norm; pictures are squashed to the
tower's size. EgoBabyVLM's other probes, such as ImageNet's, run in its launcher: see
`export.py --to egobabyvlm`.

Linear: SGD with momentum 0.9 and a cosine on a layer with 16 learning rates side by side, from
CLS. As published, the best rate and step are chosen on the test part, so the score is an upper
bound. ABX: is X nearer to A of its own class than to B of another, by cosine? 100
triples for each ordered pair of classes, a tie is wrong; X and A may be the same picture, as
published.
"""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common.images import open_picture, to_pixels
from config import UserError, regular
from tasks.scores import accuracy

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2,
                  0.3, 0.5)  # times batch / 256  # fmt: skip
SCHEDULES = {"mnist": (20 * 234, 234, 256), "countbench": (50 * 6, 6, 64)}  # steps, a pass, batch
TRIPLES = 100
BATCH = 256  # pictures that are encoded together


# ---------------------------------------------------------------------------------------------
# Reading


def read_idx(folder, name):
    """The array of an idx file, plain or .gz. Raises UserError."""
    for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if path.is_file():
            break
    else:
        raise UserError(f"{folder}: no {name}, nor {name}.gz")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(regular(path), "rb") as file:
            content = file.read()
        zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if (zeros, kind) != (0, 8):
            raise ValueError("want unsigned bytes")
        return values.reshape(shape)
    except (OSError, EOFError, struct.error, ValueError, TypeError) as error:
        raise UserError(f"{path}: no whole idx file ({error})") from None


def read_mnist(folder):
    """{"train": (pictures, labels), "test": ...} of MNIST: PIL images, and an int array."""
    parts = {}
    for split, name in (("train", "train"), ("test", "t10k")):
        images = read_idx(folder, f"{name}-images-idx3-ubyte")
        labels = read_idx(folder, f"{name}-labels-idx1-ubyte")
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise UserError(f"{folder}: {name}: {images.shape} images, {labels.shape} labels")
        parts[split] = [Image.fromarray(image) for image in images], labels.astype(np.int64)
    return parts


def read_numbered(folder):
    """([paths], [numbers]) of a folder with pictures in folders that are named by a number."""
    found = sorted(
        (path, int(path.parent.name))
        for path in Path(folder).glob("*/*")
        if path.parent.name.isdecimal() and not path.name.startswith(".")
    )
    return [path for path, _ in found], np.array([number for _, number in found], np.int64)


def read_countbench(folder):
    """As read_mnist(); pictures are paths. Without train/ and test/ a fifth is for testing."""
    folder = Path(folder)
    if (folder / "test").is_dir():
        parts = {split: read_numbered(folder / split) for split in ("train", "test")}
    else:
        paths, numbers = read_numbered(folder)
        order = np.random.RandomState(42).permutation(len(paths))
        cut = -(-len(paths) // 5)
        rows = {"train": order[cut:], "test": order[:cut]}
        parts = {split: ([paths[i] for i in own], numbers[own]) for split, own in rows.items()}
    for split, (paths, _) in parts.items():
        if not paths:
            raise UserError(f"{folder}: no pictures to {split} on; want DIR/NUMBER/picture.jpg")
    return parts


# ---------------------------------------------------------------------------------------------
# Features


@torch.no_grad()
def encode(loaded, pictures, name):
    """The CLS features of pictures, PIL images or paths, after the final norm: (n, E) float."""
    image_format, tower, features = loaded.image_format, loaded.model.tower, []
    side = (image_format.size, image_format.size)
    for start in tqdm(range(0, len(pictures), BATCH), name, unit_scale=BATCH, unit="image"):
        images = [open_picture(picture) for picture in pictures[start : start + BATCH]]
        frames = [np.array(image.resize(side, Image.Resampling.BILINEAR)) for image in images]
        pixels = to_pixels(np.stack(frames), image_format, loaded.device).to(loaded.dtype)
        features.append(tower(pixels)[:, 0].float().cpu())
    return torch.cat(features)


# ---------------------------------------------------------------------------------------------
# The two probes


def linear(train, test, steps, every, batch, seed=42):
    """The best test accuracy of 16 linear layers over all evaluations, one each `every` steps, as
    a list of hits. train, test: (features (n, E), labels (n,)), labels from 0."""
    (x, y), (x_test, y_test) = train, test
    classes, count = int(max(y.max(), y_test.max())) + 1, len(LEARNING_RATES)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, x.shape[1], classes, generator=generator) * 0.01
    bias = torch.zeros(count, 1, classes)
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    rates = torch.tensor(LEARNING_RATES).view(-1, 1, 1) * batch / 256
    best, order = torch.zeros(len(x_test), dtype=torch.bool), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        rows, order = order[:batch], order[batch:]
        own, target = x[rows], F.one_hot(y[rows], classes).float()
        # the gradient of the mean cross-entropy of a linear layer, for all layers at once
        error = (own @ weight + bias).softmax(-1) - target
        gradients = own.T @ error / len(rows), error.mean(1, keepdim=True)
        rate = rates * 0.5 * (1 + np.cos(np.pi * step / steps))
        for value, speed, gradient in zip((weight, bias), momentum, gradients):
            speed.mul_(0.9).add_(gradient)
            value.sub_(rate * speed)
        if (step + 1) % every == 0 or step == steps - 1:
            hits = (x_test @ weight + bias).argmax(-1) == y_test
            leader = hits[hits.float().mean(1).argmax()]
            best = leader if leader.float().mean() > best.float().mean() else best
    return best.tolist()


def abx(features, labels, seed=42):
    """Hits of TRIPLES random triples for each ordered pair of classes. features (n, E)."""
    unit, rng, hits = F.normalize(features, dim=-1), np.random.RandomState(seed), []
    members = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    for own, rows in members.items():
        if len(rows) < 2:
            continue
        for other, others in members.items():
            if own != other:
                x, a = (unit[rng.choice(rows, TRIPLES)] for _ in range(2))
                b = unit[rng.choice(others, TRIPLES)]
                hits += ((x * a).sum(1) > (x * b).sum(1)).tolist()
    return hits


def probe(name, folder, loaded):
    """{"all": {"linear", "abx"}} of a tower on a folder. name: mnist or countbench."""
    parts = (read_mnist if name == "mnist" else read_countbench)(folder)
    numbers = np.unique(np.concatenate([labels for _, labels in parts.values()]))
    # ABX is on MNIST's test part, and on CountBench's training part
    of_abx = "test" if name == "mnist" else "train"
    counts = np.unique(parts[of_abx][1], return_counts=True)[1]
    if len(counts) < 2 or max(counts) < 2:
        raise UserError(f"{folder}: want pictures of two classes, and two of one")
    encoded = {}
    for split, (pictures, labels) in parts.items():
        encoded[split] = encode(loaded, pictures, f"{name} {split}"), labels
    place = {number: i for i, number in enumerate(numbers.tolist())}
    as_class = lambda labels: torch.tensor([place[label] for label in labels.tolist()])
    train, test = ((x, as_class(labels)) for x, labels in (encoded["train"], encoded["test"]))
    return {
        "all": {
            "linear": accuracy(linear(train, test, *SCHEDULES[name]), round(1 / len(place), 4)),
            "abx": accuracy(abx(*encoded[of_abx]), 0.5),
        }
    }
