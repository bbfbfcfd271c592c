"""Batches: a pure function of (seed, step), each sample once a pass, targets where they belong."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_corpus, one_line

import checkpoint
import inference
from batches import Batch, ClipBatches, Order, SampleBatches, TextBatches, round_up
from common.images import ImageFormat
from config import UserError
from data import Data, check_meta
from model import GPT, BabyLLaVA, GPTConfig, make_projector
from training import features, models
from vision import ViT


def make_model(dataset, block_size=64, **how):
    torch.manual_seed(0)
    sizes = GPTConfig(dataset.tokenizer.vocab_size, block_size, 2, 2, 16)
    tower = ViT(16, 8, 16, 2, 2)
    image = dataset.tokenizer.image
    return BabyLLaVA(GPT(sizes), make_projector("mlp2x_gelu", 16, 16), tower, image, **how)


SAMPLES = [("a ball", 1), ("look , a red ball !", 1), ("a", 0), ("a ball . a bear .", 2)] * 30


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A corpus of captions, texts without a picture, and samples of two pictures."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.RandomState(0)
    words = ["a", "red", "ball", ".", "bear", "look"]
    samples = [(" ".join(rng.choice(words, rng.randint(1, 14))), images) for _, images in SAMPLES]
    make_corpus(folder, {"train": samples, "val": samples[:7]})
    return Data(folder)


def test_lengths_are_few_and_little_is_padding():
    assert all(n <= round_up(n) <= max(n + 7, n * 1.25) for n in range(1, 5000))
    assert len({round_up(n) for n in range(64, 1025)}) <= 4 * 8 + 1
    assert len({round_up(n, parts=4) for n in range(256, 1025)}) <= 2 * 4 + 1
    assert [round_up(n) for n in (1, 8, 9, 64, 65, 76, 228)] == [8, 8, 16, 64, 72, 80, 240]


def test_every_row_once_a_pass_and_any_start_the_same():
    whole = Order(10, seed=3)(0, 45)
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in (0, 10, 20, 30))
    assert not np.array_equal(whole[:10], whole[10:20])
    for start in (0, 7, 33, 12):
        assert np.array_equal(Order(10, seed=3)(start, 9), whole[start : start + 9])


def test_what_leads_comes_once_in_its_order_and_the_others_in_passes():
    whole = Order(13, seed=3, curriculum=3)(0, 43)
    assert whole[:3].tolist() == [0, 1, 2]
    assert all(sorted(whole[i : i + 10]) == list(range(3, 13)) for i in (3, 13, 23, 33))
    for start in (0, 2, 3, 17):
        assert np.array_equal(Order(13, seed=3, curriculum=3)(start, 9), whole[start : start + 9])


def test_a_lead_that_leaves_no_sample_is_damage(mixed):
    meta = json.loads(json.dumps(mixed.meta))
    for curriculum, fits in ((0, True), (119, True), (120, False), (-1, False), ("1", False)):
        meta["splits"]["train"]["curriculum"] = curriculum
        with nullcontext() if fits else pytest.raises(ValueError):
            check_meta(meta)


def test_leading_samples_are_read_before_all_others(mixed, monkeypatch):
    monkeypatch.setitem(mixed.meta["splits"]["train"], "curriculum", 70)
    found = SampleBatches(mixed, "train", 2, 1, make_model(mixed))
    steps = [found.plan(step).rows for step in range(3 * SampleBatches.WINDOW)]
    rows = np.concatenate(steps)
    assert sorted(rows[:64]) == list(range(64))  # a window; within it batches are of like length
    assert sorted(rows[64:70]) == list(range(64, 70)) and rows[70:].min() >= 70
    for limit, count in ((0, 50), (20, 20)):
        validated = np.concatenate([plan.rows for plan in found.fixed_plan(limit)])
        assert len(validated) == count and validated.min() >= 70


@pytest.mark.parametrize("curriculum", [0, 7, 70])
@pytest.mark.parametrize("batch", [1, 3, 4, 7, 8, 16, 32, 50, 119, 120, 121, 500])
def test_every_sample_once_a_pass(mixed, batch, curriculum, monkeypatch):
    """At the end of each pass, whatever the sizes, each sample was read exactly as often as there
    were passes, and no batch has one twice, if there are enough."""
    monkeypatch.setitem(mixed.meta["splits"]["train"], "curriculum", curriculum)
    found = SampleBatches(mixed, "train", batch, 1, make_model(mixed))
    n = 120 - curriculum
    steps = (curriculum + 4 * n) // batch + 1
    rows = [found.plan(step).rows for step in range(steps)]
    assert all(len(row) == batch for row in rows)
    if n >= batch:
        assert all(len(set(row)) == batch for row in rows)
    for passes in range(5):
        whole = (curriculum + passes * n) // batch  # batches that ended with this pass
        rest = curriculum + passes * n - whole * batch  # cards of it in the next batch
        expected = np.repeat([1, passes], [curriculum, n])
        missing = expected - np.bincount(
            np.concatenate([[], *rows[:whole]]).astype(int), minlength=120
        )
        assert missing.min() >= 0 and missing.sum() == rest
        next_batch = np.bincount(rows[whole] if rest else [0], minlength=120)
        assert (missing <= next_batch).all()


def test_a_sample_that_is_too_long_is_named_or_cut_after_an_answer(tmp_path):
    """Three turns of 8, 8 and 8 tokens, an image of 4 tokens in the first and in the last."""
    make_corpus(tmp_path, {"train": [("a ball", 1)], "val": [("a ball", 1)]})
    dataset = Data(tmp_path)
    image, words = dataset.tokenizer.image, [[9, 9, 9, 9, 1, 2, 3, 4]] * 3
    tokens = sum(words, [])
    tokens[0] = tokens[16] = image
    loss_mask = [0, 0, 0, 0, 1, 1, 1, 1] * 3
    for kind, values in (
        ("tokens", tokens),
        ("loss_mask", loss_mask),
        ("image_ids", [0, 0]),
        ("samples", [0, 24, 0, 2]),
    ):
        np.array(values, dataset.open("train", kind).dtype).tofile(dataset.path("train", kind))
        rows = len(values) // (4 if kind == "samples" else 1)
        dataset.meta["splits"]["train"][kind] = rows
    read = lambda size: SampleBatches(
        dataset, "train", 1, 1, make_model(dataset, block_size=size), truncate=True
    )
    with pytest.raises(UserError, match="train sample 0 makes 29 tokens.*--truncate") as error:
        SampleBatches(dataset, "train", 1, 1, make_model(dataset, block_size=28))
    assert one_line(error)
    with pytest.raises(UserError, match="sample 0: not even its first answer") as error:
        read(9)
    assert one_line(error)
    for size, kept in ((29, 24), (28, 16), (18, 16), (17, 8), (10, 8)):
        batch = read(size).read(read(size).plan(0))
        whole = sum(([i] * (4 if i == image else 1) for i in tokens[:kept]), [])
        assert batch.tokens[0, : len(whole) - 1].tolist() == whole[:-1]
        assert batch.count == sum(loss_mask[:kept])
        assert batch.targets[: batch.count].tolist() == [1, 2, 3, 4] * (kept // 8)
        assert len(batch.images) == (2 if kept == 24 else 1)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 100])
def test_no_batch_has_a_number_twice(n):
    for batch in (1, 2, 7, 16):
        order = Order(n, seed=3, batch=batch)
        for start in range(0, 6 * n, batch):
            assert len(set(order(start, batch))) == min(n, batch)
        whole = Order(n, seed=3, batch=batch)(0, 5 * n)
        assert all(sorted(whole[i : i + n]) == list(range(n)) for i in range(0, 5 * n, n))


@pytest.mark.parametrize("length", [9, 10, 16, 17, 24, 25, 100])
def test_every_token_of_a_text_is_a_target_once_a_pass(tmp_path, length):
    make_corpus(tmp_path, {"train": [("a ball", 1)], "val": [("a ball", 1)]})
    dataset = Data(tmp_path)
    text = np.random.RandomState(0).randint(0, dataset.tokenizer.vocab_size - 3, length)
    text.astype(dataset.open("train", "text").dtype).tofile(dataset.path("train", "text"))
    dataset.meta["splits"]["train"]["text"] = length
    found = TextBatches(dataset, "train", 2, 1, make_model(dataset, block_size=8))
    assert found.rows == -(-(length - 1) // 8)
    seen = []
    for plan in found.fixed_plan():
        batch = found.read(plan)
        targets = batch.targets.reshape(batch.tokens.shape)
        assert batch.count == (targets != -100).sum()
        assert ((targets == -100) | (targets == np.roll(batch.tokens, -1, 1)))[:, :-1].all()
        seen += targets[targets != -100].tolist()
    assert seen == text[1:].tolist()


def test_a_step_is_a_pure_function_of_seed_and_step(mixed):
    model = make_model(mixed)
    whole = [SampleBatches(mixed, "train", 8, 5, model).plan(step) for step in range(70)]
    for step in (69, 0, 33, 31, 32):
        plan = SampleBatches(mixed, "train", 8, 5, model).plan(step)
        assert np.array_equal(plan.rows, whole[step].rows) and plan.length == whole[step].length
    other = SampleBatches(mixed, "train", 8, 6, model)
    assert any(not np.array_equal(other.plan(s).rows, whole[s].rows) for s in range(5))


def test_batches_group_alike_lengths_and_keep_texts_apart(mixed):
    found = SampleBatches(mixed, "train", 8, 1, make_model(mixed))
    mixtures, waste, by_chance = 0, [], []
    for step in range(SampleBatches.WINDOW):
        plan = found.plan(step)
        rows, length = plan.rows, plan.length
        with_images = found.samples[rows][:, 3] > 0
        mixtures += with_images.any() and not with_images.all()
        waste.append(length - found.lengths(rows).mean())
        assert (found.lengths(rows) <= length).all()
        others = found.lengths(found.order(step * 8, 8))
        by_chance.append(round_up(int(others.max())) - others.mean())
    # only where the one kind ends and the other begins: once a window, here a pass of 15 batches
    assert mixtures <= 3
    assert np.mean(waste) < 0.75 * np.mean(by_chance)


def test_a_batch_is_what_the_bins_say(mixed):
    """Against one sample at a time, expanded by hand."""
    model = make_model(mixed)
    found = SampleBatches(mixed, "train", 8, 1, model)
    P, frames = 4, mixed.open("train", "frames")
    for step in range(12):
        plan = found.plan(step)
        rows, length, batch = plan.rows, plan.length, found.read(plan)
        stream, wanted, images = [], [], []
        for row in rows:
            first, count, shown, number = found.samples[row].tolist()
            ids = mixed.open("train", "tokens")[first : first + count].tolist()
            expanded = sum(([i] * (P if i == mixed.tokenizer.image else 1) for i in ids), [])
            stream.append((expanded + [mixed.tokenizer.pad] * length)[: length + 1])
            start = number * P
            wanted += [
                (len(stream) - 1) * length + position - 1
                for position in range(start, len(expanded))
                if position > 0 and (number or position > 0)
            ]
            images += [frames[shown + i] for i in range(number)]
        assert np.array_equal(batch.tokens, np.array(stream)[:, :-1])
        assert batch.positions[: batch.count].tolist() == wanted
        flat = np.array(stream)[:, 1:].reshape(-1)
        assert np.array_equal(batch.targets[: batch.count], flat[wanted])
        assert (batch.targets[batch.count :] == -100).all()
        assert len(batch.targets) == len(batch.positions) == round_up(batch.count, 4)
        if images:
            assert np.array_equal(batch.images[: len(images)], np.stack(images))
            assert len(images) <= len(batch.images) <= 9 / 8 * len(images)
        else:
            assert batch.images is None


def test_any_cut_of_a_batch_gives_the_same_rows(mixed):
    found = SampleBatches(mixed, "train", 8, 1, make_model(mixed))
    plan = found.plan(3)
    whole = found.read(plan)
    parts = [found.read(plan, slice(i, i + 2)) for i in range(0, 8, 2)]
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
    assert sum(part.count for part in parts) == whole.count


def test_logits_at_positions_are_the_head_on_all_of_them(mixed):
    """The loss over the handed positions is that of the plain way, all positions and -100s; however
    many positions before the first target are left out."""
    model = make_model(mixed)
    found = SampleBatches(mixed, "train", 8, 1, model)
    for step in range(4):
        batch = found.read(found.plan(step))
        tokens, targets, positions, images, _, first = batch.to("cpu", mixed.image_format)
        everywhere = torch.full((tokens.numel(),), -100)
        everywhere[positions[: batch.count]] = targets[: batch.count]
        all_logits = model(tokens, None, None, images)[0].flatten(0, 1)
        slow = F.cross_entropy(all_logits.double(), everywhere, ignore_index=-100)
        most = int(min(positions % tokens.shape[1]))
        assert first <= most and (step or most)
        for first in (first, most):
            logits = model(tokens, None, positions, images, None, first)[0]
            loss = model(tokens, targets, positions, images, None, first)[1]
            assert abs(loss - slow) < 1e-5 and logits.shape[0] == len(positions)
            assert torch.allclose(logits, all_logits[positions], atol=1e-5)


@pytest.mark.parametrize("least, first", [(7, 0), (8, 8), (19, 16)])
def test_shapes_are_few(mixed, least, first):
    tokens, targets = np.zeros((2, 40), np.int64), np.array([1, 1, -100])
    batch = Batch(tokens, targets, np.array([39, 40 + least, 0]), None, count=2)
    assert batch.to("cpu", mixed.image_format)[-1] == first


def test_the_validation_is_fixed_whole_and_spread(mixed):
    model = make_model(mixed)
    found = SampleBatches(mixed, "val", 4, 1, model)
    rows = np.concatenate([plan.rows for plan in found.fixed_plan()])
    assert sorted(rows) == list(range(7))  # the last batch has three rows, and is not dropped
    some = SampleBatches(mixed, "train", 4, 1, model)
    chosen = [plan.rows for plan in some.fixed_plan(limit=24)]
    assert sum(map(len, chosen)) == 24 and max(np.concatenate(chosen)) > 60  # not the first 24
    other = SampleBatches(mixed, "train", 4, 9, model)
    again = [plan.rows for plan in other.fixed_plan(limit=24)]
    assert all(np.array_equal(a, b) for a, b in zip(chosen, again))


def test_an_overlong_sample_is_one_clear_line(mixed):
    with pytest.raises(UserError, match="over block_size 9: raise block_size"):
        SampleBatches(mixed, "train", 8, 1, make_model(mixed, block_size=9))


def test_full_image_attention_wants_leading_images_alike(mixed, tmp_path):
    with pytest.raises(UserError, match="the same number of images; use causal"):
        SampleBatches(mixed, "train", 8, 1, make_model(mixed, image_attention="full"))
    make_corpus(tmp_path / "uneven", {"train": [("a ball", 3)] * 9 + [("a", 1)]})
    uneven = Data(tmp_path / "uneven")
    with pytest.raises(UserError, match="the same number of images; use causal"):
        SampleBatches(uneven, "train", 8, 1, make_model(uneven, image_attention="full"))
    make_corpus(tmp_path, {"train": [("a ball", 1)] * 20})
    dataset = Data(tmp_path)
    model = make_model(dataset, image_attention="full")
    found = SampleBatches(dataset, "train", 17, 1, model)
    tokens, _, _, images, _, _ = found.read(found.plan(0)).to("cpu", dataset.image_format)
    assert model.prefix(tokens, model.embed_images(images)) == 4 and len(images) == 17


def test_text_rows_predict_the_next_token(world):
    dataset = Data(world / "data/tiny")
    model = make_model(dataset, block_size=16)
    found, stream = TextBatches(dataset, "train", 5, 0, model), dataset.open("train", "text")
    plan = found.plan(0)
    rows, batch = plan.rows, found.read(plan)
    assert plan.length == 16 and batch.count == 80 and batch.positions is None
    for i, row in enumerate(rows):
        assert np.array_equal(batch.tokens[i], stream[row * 16 : row * 16 + 16])
        targets = batch.targets.reshape(5, 16)[i]
        assert np.array_equal(targets, stream[row * 16 + 1 : row * 16 + 17])


def test_the_other_frame_is_of_the_same_clip(world):
    dataset = Data(world / "data/tiny")
    found, stored = ClipBatches(dataset, "train", 24, 0), dataset.open("train", "frames")
    plan = found.plan(0)
    pairs = found.read(plan)
    for card, a, b in zip(plan.rows, pairs.frames, pairs.others):
        assert np.array_equal(a, stored[card]) and np.array_equal(b, stored[card ^ 1])  # two a clip
    half = found.read(plan, slice(12, 24))
    assert np.array_equal(half.others, pairs.others[12:])


@pytest.mark.parametrize(
    "kind, place, value",
    [
        ("text", 3, 65535),  # no token of this vocabulary
        ("tokens", 3, 65535),
        ("tokens", 0, "image"),  # an <image> more than the sample has
        ("samples", (2, 0), 10**9),  # points past the tokens
        ("samples", (2, 1), 0),
        ("samples", (2, 2), 2**63),
        ("image_ids", 2, 10**6),
        ("images", (2, 0), 10**6),
        ("images", (2, slice(1, 3)), 100),
        ("clips", 2, 10**6),  # numbers that do not rise
    ],
)
def test_a_corrupted_bin_is_one_clear_line(recipe, home, tmp_path, kind, place, value):
    shutil.copytree("data/tiny", tmp_path / "d")
    dataset = Data(tmp_path / "d")
    model = checkpoint.load("out/full/phase2.pt").model
    found = dataset.open("train", kind)
    whole = np.memmap(dataset.path("train", kind), found.dtype, "r+", shape=found.shape)
    if value == "image":
        place, value = int(dataset.open("train", "samples")[0, 0]) + 2, dataset.tokenizer.image
    whole[place] = value
    whole.flush()
    with pytest.raises(UserError, match=f"train_{kind}.bin: corrupted") as error:
        made_of = {"text": TextBatches, "clips": ClipBatches}.get(kind, SampleBatches)
        batches = made_of(dataset, "train", 8, 1, model)
        for step in range(2 * batches.rows // 8):
            batches.read(batches.plan(step))
    assert one_line(error)


# ---- features


def test_features_are_the_towers_own_and_read_in_their_place(recipe, home):
    dataset = Data("data/tiny")
    model = checkpoint.load("out/full/phase2.pt").model
    stored = features.open_stored(dataset, "train", model)
    assert stored.shape == (24, 4, 16) and stored.dtype == np.float16
    found = SampleBatches(dataset, "train", 8, 1, model, stored)
    live = SampleBatches(dataset, "train", 8, 1, model)
    plan = found.plan(0)
    a, b = (x.read(plan).to("cpu", dataset.image_format) for x in (found, live))
    with torch.no_grad():
        assert (a[3].float() - model.encode_images(b[3])).abs().max() < 1e-2
        assert a[3].ndim == 3 and b[3].ndim == 4


@pytest.fixture
def own_copy(recipe, home, tmp_path):
    import shutil

    shutil.copytree("data/tiny", tmp_path / "d")
    shutil.rmtree(tmp_path / "d/features", ignore_errors=True)
    return Data(tmp_path / "d"), checkpoint.load("out/full/phase2.pt").model


def test_towers_that_differ_in_anything_have_files_of_their_own(own_copy):
    """Weights, heads, the way of interpolating, layer, CLS: each was once mistaken for another."""
    dataset, _ = own_copy
    paths = set()
    for arguments, how in (
        (dict(heads=1), {}),
        (dict(heads=2), {}),
        (dict(heads=2, offset=0.0), {}),
        (dict(heads=2, antialias=True), {}),
        (dict(heads=2), dict(select_layer=-2)),
        (dict(heads=2), dict(keep_cls=True)),
    ):
        torch.manual_seed(0)  # the same weights in all
        tower = ViT(16, 8, 16, 2, **arguments)
        how = {"select_layer": -1} | how
        paths.add(features.find_path(dataset, "train", BabyLLaVA(None, None, tower, **how)))
    with torch.no_grad():
        tower.norm.bias[0] += 1e-6
    paths.add(features.find_path(dataset, "train", BabyLLaVA(None, None, tower, select_layer=-1)))
    assert len(paths) == 7


def test_features_go_on_where_they_stopped(own_copy, monkeypatch):
    """Stopped within the third of six blocks: two are not computed again, and all bytes are the
    same as if nothing had happened."""
    dataset, model = own_copy
    monkeypatch.setattr(features, "BLOCK", 4)
    features.store(dataset, "train", model, "cpu")
    path = features.find_path(dataset, "train", model)
    whole = path.read_bytes()
    path.unlink()
    extract, asked = features.extract, []

    def counted(model, frames, *rest):
        asked.append(len(frames))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return extract(model, frames, *rest)

    monkeypatch.setattr(features, "extract", counted)
    with pytest.raises(KeyboardInterrupt):
        features.store(dataset, "train", model, "cpu")
    assert not path.exists()
    for _ in range(2):  # the second time there is nothing to do
        features.store(dataset, "train", model, "cpu")
        assert asked == [4] * 7 and path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_partial_features_of_another_world_are_not_gone_on_with(own_copy, monkeypatch, tmp_path):
    """Killed halfway; the frames are drawn anew; the features are those of the new frames."""
    dataset, model = own_copy
    partial = features.find_path(dataset, "train", model).with_suffix(".partial")
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(b"\x00" * (10 * 4 * 16 * 2))
    (dataset.directory / "meta.json").unlink()  # as another source may only where this is gone
    make_corpus(dataset.directory, {"train": [("a ball", 1)] * 24, "val": [("a", 1)] * 2})
    again = Data(dataset.directory)
    assert not partial.exists()  # preparing removes what belongs to no frame
    features.store(again, "train", model, "cpu")
    stored = features.open_stored(again, "train", model)
    frames = again.open("train", "frames")
    live = next(features.extract(model, frames, again.image_format, "cpu"))
    assert np.abs(stored - live).max() < 1e-2 and np.abs(stored[:10]).min() < np.inf
    assert np.abs(stored[:10]).sum() > 0


def test_processes_share_the_work_and_make_one_file(own_copy):
    """Three at once, of which one is killed at its first block: the others do that one too."""
    dataset, model = own_copy
    code = (
        "import os, sys, time, checkpoint, data\nfrom training import features\n"
        "model, extract = checkpoint.load(sys.argv[1]).model, features.extract\n"
        "def slow(*arguments):\n"
        "    print('block', flush=True)\n"
        "    time.sleep(60 if sys.argv[3] == 'hangs' else 0.2)\n"
        "    yield from extract(*arguments)\n"
        "features.extract, features.BLOCK = slow, 2\n"
        "features.store(data.Data(sys.argv[2]), 'train', model, 'cpu')"
    )
    where = [str(Path("out/full/phase2.pt").resolve()), str(dataset.directory)]
    start = lambda how: subprocess.Popen(
        [sys.executable, "-c", code, *where, how], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    hung = start("hangs")
    assert hung.stdout.readline() == "block\n"  # it has claimed one
    runs = [start("works") for _ in range(2)]
    assert runs[0].stdout.readline() == "block\n"
    hung.kill()
    blocks = [1 + runs[0].communicate()[0].count("block"), runs[1].communicate()[0].count("block")]
    assert [run.returncode for run in runs] == [0, 0] and sum(blocks) == 12 and min(blocks) > 0
    stored, frames = features.open_stored(dataset, "train", model), dataset.open("train", "frames")
    live = next(features.extract(model, frames, dataset.image_format, "cpu"))
    assert np.abs(stored - live).max() < 1e-2


@pytest.mark.parametrize("value, why", [(7e4, "reach 7e\\+04"), (float("nan"), "are not finite")])
def test_features_that_float16_does_not_hold_are_refused(mixed, tmp_path, value, why):
    """They were stored as inf, and training ended later with other advice."""
    model = make_model(mixed, select_layer=-1)
    model.tower.norm.bias.data[3] = value
    with pytest.raises(UserError, match=f"this vit at select_layer -1 {why}.*--features live") as e:
        list(features.extract(model, mixed.open("val", "frames"), mixed.image_format, "cpu"))
    assert one_line(e)
    model.tower.norm.bias.data[3] = 6e4
    (found,) = features.extract(model, mixed.open("val", "frames"), mixed.image_format, "cpu")
    assert np.isfinite(found).all() and found.dtype == np.float16


def test_full_attention_of_unlike_rows_is_scored_a_row_at_a_time(mixed):
    """One, two and no images in one call: the prefix of each row is its own."""
    model = make_model(mixed, image_attention="full")
    loaded = checkpoint.Loaded(model.eval(), mixed.tokenizer, mixed.image_format, {})
    image, rows = mixed.tokenizer.image, (1, 2, 0, 2, 1)
    embeds = [[torch.randn(4, 16) for _ in range(count)] for count in rows]
    prompts = [[image] * 4 * count + [5] for count in rows]
    words = [[7, 8, 9], [9, 8], [7], [8, 7], [9, 9, 9]]
    together = inference.nll_after(loaded, prompts, embeds, words)
    alone = [
        inference.nll_after(loaded, [p], [e], [w])[0] for p, e, w in zip(prompts, embeds, words)
    ]
    assert np.allclose(together, alone, atol=1e-6)
    prompts[1] = [5] + prompts[1]
    with pytest.raises(UserError, match="images before all words") as error:
        inference.nll_after(loaded, prompts, embeds, words)
    assert one_line(error)
    with pytest.raises(ValueError, match="all their images"):
        list(model.generate(torch.tensor([prompts[1]]), torch.cat(embeds[1]), 2))


def test_full_attention_and_tiles_are_refused(mixed):
    with pytest.raises(ValueError, match="images in tiles"):
        make_model(mixed, image_attention="full", tiled=True)
    tiled = SimpleNamespace(
        image_format=ImageFormat(16, canvases=((32, 16),)), directory="data/tiled"
    )
    with pytest.raises(UserError, match="data/tiled has pictures in tiles.*use causal") as error:
        models.new_projector(SimpleNamespace(image_attention="full"), tiled, {})
    assert one_line(error)
