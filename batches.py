"""
Batches with a position: what step number `step` reads is a pure function of (seed, step).

So a resumed run sees what it would have seen, and validation cannot disturb training. What every
kind of batches promises:

    Batches(dataset, split, batch, seed, model, features)   `batch` rows a step
    .BIN                          without which there is nothing to read
    .rows                         how many there are in a pass
    .plan(step)                   (which rows make up this step's batch, what read() must know of
                                  the whole batch: the length that its rows are padded to)
    .read(rows, length, place)    any part of them, `place` being that of the first one in
                                  the batch, so that processes and micro-batches cut it as they like
    .fixed_plan(limit)            the plans of a validation, where there is one
Letters: B batch, T length, N images, P image tokens an image, E vision width, S side, K targets.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from checks import check_clips, check_images_lead, check_pointers, check_tokens, damaged
from config import UserError
from files import Rows
from images import to_pixels
from tiles import arrange, count_tokens, join


@dataclass
class Batch:
    """What a model is given: tokens (n, T), the positions in the flattened (n T) that have a
    target (None: all have), these targets (K,), and images: features (N, patches, E), frames
    (N, S, S, 3), or None. The first `count` targets are to be learnt, the others, -100, are
    padding, as are images at the end that no token shows. arrangement: see tiles.py."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None
    images: np.ndarray | None
    count: int
    arrangement: tuple | None = None

    def to(self, device, image_format):
        """(tokens, targets, positions, images, arrangement, first) as tensors; frames become a
        tower's input; before `first` no row has a target (a multiple of 8: few shapes)."""
        tokens, targets, positions, images = (
            None if part is None else torch.as_tensor(part).to(device, non_blocking=True)
            for part in (self.tokens, self.targets, self.positions, self.images)
        )
        if images is not None and images.dtype == torch.uint8:
            images = to_pixels(images, image_format, device)
        arrangement = self.arrangement and tuple(
            torch.as_tensor(part, device=device) for part in self.arrangement
        )
        first = 0
        if self.positions is not None and self.count:
            first = int((self.positions[: self.count] % self.tokens.shape[1]).min()) // 8 * 8
        return tokens, targets, positions, images, arrangement, first


def round_up(n, parts=8):
    """n, or a little more: between 2^k and 2^(k + 1) a multiple of 2^k / parts, but of 8 at least.
    With 8 parts there are 8 lengths a doubling, and from 64 on at most an eighth is padding."""
    grain = max(8, (1 << max(n - 1, 1).bit_length() - 1) // parts)
    return -(-n // grain) * grain


class Order:
    """The first `lead` of 0 .. n - 1 as they stand, once; then the others, an endless shuffled
    deck: each pass is a fresh permutation of all of them."""

    def __init__(self, n, seed, lead=0):
        self.n, self.seed, self.lead, self.decks = n - lead, seed, lead, {}

    def __call__(self, start, count):
        """Cards number start .. start + count - 1 of the endless deck."""
        positions = np.arange(start, start + count) - self.lead
        decks, cards = positions // self.n, positions % self.n
        chosen, used = positions.copy(), {}
        for deck in np.unique(decks[positions >= 0]).tolist():
            used[deck] = self.decks.get(deck)
            if used[deck] is None:
                used[deck] = np.random.RandomState([self.seed, deck]).permutation(self.n)
            chosen[decks == deck] = used[deck][cards[decks == deck]]
        self.decks = used  # the next call will want one of these again
        return chosen + self.lead


def some_rows(n, limit):
    """All of 0 .. n - 1, or `limit` of them chosen once for all, in order."""
    if not limit or limit >= n:
        return np.arange(n)
    return np.sort(np.random.RandomState(0).permutation(n)[:limit])


class TextBatches:
    """Rows of T tokens from one long stream of utterances; every position has a target."""

    BIN = "text"

    def __init__(self, dataset, split, batch, seed, model=None, features=None):
        self.text, self.tokenizer = dataset.open(split, "text"), dataset.tokenizer
        self.path = dataset.path(split, "text")
        self.T = min(model.gpt.config.block_size, len(self.text) - 1)
        if self.T < 1:
            raise UserError(f"{self.path}: {len(self.text)} tokens are too few")
        self.rows = (len(self.text) - 1) // self.T
        self.batch, self.order = batch, Order(self.rows, seed)

    def plan(self, step):
        return self.order(step * self.batch, self.batch), self.T

    def fixed_plan(self, limit=0):
        """The plans of a validation over `limit` rows (0: all), always the same."""
        rows = some_rows(self.rows, limit)
        return [(rows[i : i + self.batch], self.T) for i in range(0, len(rows), self.batch)]

    def read(self, rows, length, place=0):
        begins = rows * length
        stream = np.stack([self.text[b : b + length + 1] for b in begins]).astype(np.int64)
        check_tokens(stream, self.tokenizer, self.path)
        return Batch(stream[:, :-1], stream[:, 1:].reshape(-1), None, None, len(rows) * length)


class SampleBatches:
    """Samples of alike length, with and without pictures apart (but for one batch a window, which
    takes the rest of both).

    Of each 32 batches' worth of shuffled samples those of like length are put together, and the
    batches shuffled again. All rows of a batch are padded to one of few lengths (round_up)."""

    BIN, WINDOW, ONE_PICTURE = "samples", 32, False

    def __init__(self, dataset, split, batch, seed, model, features=None):
        self.samples, self.tokens = dataset.open(split, "samples"), dataset.open(split, "tokens")
        if self.ONE_PICTURE:
            of_one = self.samples[:, 3] == 1
            self.samples = self.samples[of_one] if of_one.any() else self.samples
        self.learn, self.tokenizer = dataset.open(split, "learn"), dataset.tokenizer
        self.path = dataset.path(split, "tokens")
        self.batch, self.seed, self.rows = batch, seed, len(self.samples)
        self.shown = None
        if dataset.count(split, "shown"):
            self.shown, self.images = (dataset.open(split, kind) for kind in ("shown", "images"))
            self.pictures = Rows(dataset.open(split, "frames") if features is None else features)
        check_pointers(self, dataset, split)
        if self.shown is not None:
            self.count_image_tokens(model, dataset.image_format)
        self.block_size = model.gpt.config.block_size
        longest = int(max(self.lengths(part).max() for part in self.parts()))
        if longest > self.block_size:
            raise UserError(
                f"{dataset.directory}: the longest {split} sample makes {longest} tokens, those of "
                f"its images included, over block_size {self.block_size}: "
                "raise block_size, or shorten the samples"
            )
        self.ragged = model.image_attention != "full"
        if not self.ragged:
            check_images_lead(self, dataset.directory)
        lead = 0 if self.ONE_PICTURE else dataset.count(split, "lead")
        self.order, self.window, self.plans = Order(self.rows, seed, lead), None, None

    def count_image_tokens(self, model, image_format):
        """P; of each image its number of tokens; and of the images shown, their running total."""
        self.P, self.tiled = model.image_tokens(image_format.size), model.tiled
        self.side, self.max_tiles = math.isqrt(self.P), image_format.max_tiles
        self.image_tokens = np.full(len(self.images), self.P)
        if self.tiled:
            self.image_tokens = count_tokens(self.images[:, 1:], self.side, self.max_tiles)
        self.totals = np.append(0, self.image_tokens[self.shown].cumsum())

    def parts(self, size=1 << 16):
        return (np.arange(i, min(i + size, self.rows)) for i in range(0, self.rows, size))

    def lengths(self, rows):
        """Positions that each sample takes: its last token is only ever a target."""
        samples = self.samples[rows].astype(np.int64)
        lengths = samples[:, 1] - 1
        if self.shown is not None:
            first, count = samples[:, 2], samples[:, 3]
            lengths += self.totals[first + count] - self.totals[first] - count
        return lengths

    def group(self, rows):
        """Plans for rows: those with images and those without, each with its like in length.

        Like means within the same half of a doubling. Finer groups would pad less and learn less:
        length goes with content, and a batch of all the two-word captions is a biased sample."""
        lengths = self.lengths(rows)
        alike = np.array([round_up(int(n), parts=2) for n in lengths])
        with_images = self.samples[rows][:, 3] > 0
        order = np.lexsort((alike, with_images))
        groups = [order[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        longest = [min(round_up(int(lengths[group].max())), self.block_size) for group in groups]
        return [(rows[group], length) for group, length in zip(groups, longest)]

    def plan(self, step):
        window = step // self.WINDOW
        if window != self.window:
            size = self.WINDOW * self.batch
            plans = self.group(self.order(window * size, size))
            shuffled = np.random.RandomState([self.seed, window, 1]).permutation(len(plans))
            self.window, self.plans = window, [plans[i] for i in shuffled]
        return self.plans[step % self.WINDOW]

    def fixed_plan(self, limit=0):
        """The plans of a validation over `limit` samples (0: all) but those that lead."""
        return self.group(self.order.lead + some_rows(self.order.n, limit))

    def read(self, rows, length, place=0):
        stream = np.full((len(rows), length + 1), self.tokenizer.pad, np.int64)
        learn = np.zeros((len(rows), length + 1), bool)
        shown = []
        for i, sample in enumerate(self.samples[rows].tolist()):
            first_token, n_tokens, first_shown, n_images = sample
            tokens = slice(first_token, first_token + n_tokens)
            ids = self.tokens[tokens]
            repeats = np.ones(len(ids), np.int64)
            if (ids == self.tokenizer.image).sum() != n_images:
                raise damaged(self.path)
            if n_images:  # each <image> becomes as many placeholders as it has tokens
                shown.append(self.shown[first_shown : first_shown + n_images])
                repeats[ids == self.tokenizer.image] = self.image_tokens[shown[-1]]
            end = int(repeats.sum())
            stream[i, :end] = np.repeat(ids, repeats)
            learn[i, :end] = np.repeat(self.learn[tokens], repeats)
        check_tokens(stream, self.tokenizer, self.path)
        positions = np.flatnonzero(learn[:, 1:])
        targets = stream[:, 1:].reshape(-1)[positions]
        padding = round_up(max(len(positions), 1), parts=4) - len(positions)  # not before `first`
        batch = Batch(
            tokens=stream[:, :-1],
            targets=np.pad(targets, (0, padding), constant_values=-100),
            positions=np.pad(positions, (0, padding), "edge" if len(positions) else "constant"),
            images=None,
            count=len(positions),
        )
        if shown:
            self.add_images(batch, self.images[np.concatenate(shown)].astype(np.int64).tolist())
        return batch

    def add_images(self, batch, images):
        """Give a batch the frames, or features of frames, of images: rows of the bin."""
        frames, arrangements = [], []
        for first, *grid in images:
            if self.tiled:
                arrangements.append(arrange(*grid, self.side, len(frames), self.max_tiles))
            frames += range(first, first + 1 + grid[0] * grid[1])
        if self.ragged:  # fill up to one of few numbers: for each, kernels are made and kept
            frames += frames[-1:] * (round_up(8 * len(frames)) // 8 - len(frames))
        batch.images = self.pictures[np.array(frames)]
        if self.tiled:
            batch.arrangement = join(arrangements)


class PairBatches(SampleBatches):
    """The samples of one picture alone, where there are any: the simplest are for the projector."""

    ONE_PICTURE = True


class ClipBatches:
    """Pairs of frames for DINO: two of one clip, or the same frame twice where it has only one."""

    BIN = "frames"

    def __init__(self, dataset, split, batch, seed, model=None, features=None):
        self.frames, self.clips = Rows(dataset.open(split, "frames")), dataset.open(split, "clips")
        self.rows, self.batch = len(self.clips), batch
        check_clips(self.clips, dataset.path(split, "clips"))
        self.order = Order(self.rows, seed)

    def plan(self, step):
        """The rows, and the position in the endless deck at which the batch begins."""
        return self.order(step * self.batch, self.batch), step * self.batch

    def read(self, rows, start, place=0):
        """(frames, others), each (n, S, S, 3) uint8; these rows are number `place` and on of the
        batch that begins at position `start` of the endless deck."""
        begin = np.searchsorted(self.clips, self.clips[rows], "left")
        length = np.searchsorted(self.clips, self.clips[rows], "right") - begin
        position = np.arange(start + place, start + place + len(rows))
        chance = position * 2654435761 >> 8  # Knuth's multiplicative hash
        others = begin + (rows - begin + 1 + chance % np.maximum(length - 1, 1)) % length
        return FramePairs(self.frames[rows], self.frames[others], place, len(rows))


@dataclass
class FramePairs:
    """frames, others (n, S, S, 3) uint8, row by row of one clip; from number `first` of a batch."""

    frames: np.ndarray
    others: np.ndarray
    first: int
    count: int
