"""Probes on MNIST's idx files and CountBench's pictures: reading, both probes against slow forms,
and a known value."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from PIL import Image, ImageDraw

import eval as evaluation
from config import UserError
from tasks import probes
from tasks.probes import LEARNING_RATES, abx, linear, read_countbench, read_mnist


def drawn_digits(count, seed, size=28):
    """(pictures (count, size, size) uint8, labels): digits drawn somewhere near the middle."""
    rng, pictures = np.random.RandomState(seed), []
    labels = rng.randint(0, 10, count)
    for label in labels:
        page = Image.new("L", (size, size))
        place = (7 + rng.randint(-2, 3), 2 + rng.randint(-2, 3))
        ImageDraw.Draw(page).text(place, str(label), 255, font_size=22)
        pictures.append(np.array(page))
    return np.stack(pictures), labels.astype(np.uint8)


def write_idx(path, array, zipped=False):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    if zipped:
        path = path.with_name(f"{path.name}.gz")
    with (gzip.open if zipped else open)(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.fixture
def mnist(tmp_path):
    for name, count, zipped in (("train", 600, True), ("t10k", 200, False)):
        images, labels = drawn_digits(count, len(name))
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", images, zipped)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels, zipped)
    return tmp_path


def test_idx_files_are_read_as_they_are(mnist):
    parts = read_mnist(mnist)
    for split, name, count in (("train", "train", 600), ("test", "t10k", 200)):
        images, labels = drawn_digits(count, len(name))
        found, numbers = parts[split]
        assert np.array_equal(np.stack([np.array(image) for image in found]), images)
        assert np.array_equal(numbers, labels)


def test_a_linear_probe_on_raw_pixels_reaches_a_known_value(mnist):
    """Drawn digits are nearly separable in pixels: as least squares does."""
    parts = read_mnist(mnist)
    flat = {
        split: (
            torch.tensor(np.stack([np.array(image) for image in images])).flatten(1).float() / 255,
            torch.tensor(labels),
        )
        for split, (images, labels) in parts.items()
    }
    hits = linear(flat["train"], flat["test"], 234, 60, 256)
    x, y = flat["train"]
    weight = torch.linalg.lstsq(x, F.one_hot(y, 10).float(), driver="gelsd").solution
    reference = ((flat["test"][0] @ weight).argmax(1) == flat["test"][1]).float().mean().item()
    assert len(hits) == 200 and np.mean(hits) > 0.95 and np.mean(hits) >= reference - 0.03


def test_all_rates_at_once_equal_sgd_of_torch(monkeypatch):
    """One layer after the other by autograd, torch.optim.SGD and its cosine."""
    torch.manual_seed(0)
    centres = torch.randn(4, 6)
    y, y_test = torch.randint(0, 4, (90,)), torch.randint(0, 4, (50,))
    x, x_test = centres[y] + torch.randn(90, 6), centres[y_test] + torch.randn(50, 6)
    steps, every, batch = 12, 5, 32
    found = linear((x, y), (x_test, y_test), steps, every, batch)
    scores = []
    generator = torch.Generator().manual_seed(42)
    start = torch.randn(len(LEARNING_RATES), 6, 4, generator=generator) * 0.01
    order, batches = torch.empty(0, dtype=torch.long), []
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(90, generator=generator)])
        batches.append(order[:batch])
        order = order[batch:]
    for rate, own in zip(LEARNING_RATES, start):
        layer = torch.nn.Linear(6, 4)
        with torch.no_grad():
            layer.weight.copy_(own.T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), rate * batch / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step, rows in enumerate(batches):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % every == 0 or step == steps - 1:
                scores.append((layer(x_test).argmax(1) == y_test).float().mean().item())
    assert np.mean(found) == pytest.approx(max(scores))


def test_abx_of_separate_classes_is_one_and_of_noise_a_half():
    rng = np.random.RandomState(0)
    labels = np.repeat(np.arange(4), 50)
    separate = torch.tensor(np.eye(4)[labels] + 0.01 * rng.randn(200, 4)).float()
    hits = abx(separate, labels)
    assert len(hits) == 4 * 3 * probes.TRIPLES and np.mean(hits) == 1
    noise = torch.tensor(rng.randn(200, 16)).float()
    # X is A itself in one of 50 triples, which counts as right
    assert np.mean(abx(noise, labels)) == pytest.approx(0.51, abs=0.05)
    assert np.mean(abx(torch.ones(200, 3), labels)) == 0  # a tie is wrong


def test_from_the_command_line(recipe, mnist, tmp_path, monkeypatch):
    monkeypatch.setitem(probes.SCHEDULES, "mnist", (20, 10, 64))
    monkeypatch.setitem(probes.SCHEDULES, "countbench", (6, 3, 8))
    for number in (2, 3, 10):
        folder = tmp_path / "count" / str(number)
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 30), (25 * number, i, 0)).save(folder / f"{i}.png")
    for name in ("vision.pt", "phase2.pt"):
        flags = [f"--checkpoint={recipe / name}", f"--out={tmp_path}/{name}"]
        evaluation.main([*flags, f"--mnist={mnist}", f"--countbench={tmp_path}/count"])
    found = json.loads((tmp_path / "vision.pt" / "results_mnist_countbench.json").read_text())[
        "tasks"
    ]
    assert found["mnist"]["all"]["linear"]["n"] == 200 and found["mnist"]["all"]["abx"]["n"] == 9000
    assert found["countbench"]["all"]["linear"]["n"] == 6
    assert found["countbench"]["all"]["linear"]["chance"] == pytest.approx(1 / 3, abs=1e-4)
    assert (
        found
        == json.loads((tmp_path / "phase2.pt" / "results_mnist_countbench.json").read_text())[
            "tasks"
        ]
    )
    with pytest.raises(UserError, match="has no tower") as error:
        evaluation.main([f"--checkpoint={recipe / 'language.pt'}", f"--mnist={mnist}"])
    assert one_line(error)


def test_mistakes_are_one_line(recipe, home, mnist, tmp_path):
    """Also beside the prepared folder that a tower was trained on, which has no loss for it."""
    (tmp_path / "one" / "3").mkdir(parents=True)
    for i in range(10):
        Image.new("RGB", (20, 30)).save(tmp_path / "one" / "3" / f"{i}.png")
    tower = f"--checkpoint={recipe / 'vision.pt'}"
    for flags, why in (
        ([tower, f"--countbench={tmp_path}/one"], "two classes"),
        ([tower, f"--mnist={mnist}", "--zorro=none"], "knows no words"),
        ([f"--checkpoint={recipe / 'phase2.pt'}", f"--json={tmp_path}"], "need a --task"),
    ):
        with pytest.raises(UserError, match=why) as error:
            evaluation.main([*flags, f"--out={tmp_path}"])
        assert one_line(error)


def test_a_tower_is_probed_beside_its_data(recipe, home, mnist, tmp_path, monkeypatch):
    monkeypatch.setitem(probes.SCHEDULES, "mnist", (4, 2, 64))
    evaluation.main(
        [f"--checkpoint={recipe / 'vision.pt'}", f"--mnist={mnist}", f"--out={tmp_path}"]
    )
    results = json.loads((tmp_path / "results_mnist.json").read_text())
    assert list(results["tasks"]) == ["mnist"] and "val_loss" not in results


def test_countbench_is_split_or_comes_split(tmp_path):
    for path in (
        "3/a.png",
        "3/b.png",
        "4/c.png",
        "4/d.png",
        "5/e.png",
        "notes/x.txt",
        "3/.DS_Store",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    parts = read_countbench(tmp_path)
    assert [len(parts[split][0]) for split in ("train", "test")] == [4, 1]
    names = {path.name for paths, _ in parts.values() for path in paths}
    assert names == {"a.png", "b.png", "c.png", "d.png", "e.png"}
    (tmp_path / "test" / "7").mkdir(parents=True)
    (tmp_path / "test" / "7" / "z.png").touch()
    with pytest.raises(UserError, match="no pictures to train on") as error:
        read_countbench(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0\x08", struct.pack(">HBBI", 0, 8, 1, 5), struct.pack(">HBBI", 0, 9, 1, 0)],
)
def test_corrupted_idx_files(mnist, content):
    (mnist / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(UserError, match="no whole idx file") as error:
        read_mnist(mnist)
    assert one_line(error)
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no t10k-labels-idx1-ubyte, nor") as error:
        read_mnist(mnist)
    assert one_line(error)
