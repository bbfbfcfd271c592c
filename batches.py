"""
Batches: what step number `step` reads is a function of (seed, step) alone.

So a resumed run reads what it would have read, and validation does not disturb training. Each kind
of batches has:

    Batches(dataset, split, batch, seed, model, features, truncate)     `batch` rows a step
    .BIN                the bin that it needs
    .rows               rows of the split: one pass
    .plan(step)         a Plan: which rows make up the batch of this step
    .read(plan, part)   the rows plan.rows[part] as arrays; processes and micro-batches read a
                        part (a slice) each
    .fixed_plan(limit)  the plans of a validation pass (not for frames)
    .describe(plans)    what these plans read on average, in words

Letters: B batch, T sequence length, N images, P image tokens an image, E vision width, S image side
in pixels, K targets.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from common.devices import send
from common.files import Rows
from common.images import to_pixels
from common.tiles import arrange, count_tokens, join
from config import UserError
from data import check_clips, check_pointers, check_tokens, corrupted


@dataclass
class Plan:
    """The rows of a batch, and what read() must know of the whole batch: the length to which its
    rows are padded, and how many rows all earlier batches had (for frames)."""

    rows: np.ndarray
    length: int = 1
    start: int = 0


@dataclass
class Batch:
    """The input of a model.

    tokens (n, T). targets (K,); positions (K,): the index in tokens.flatten() of the token that
    predicts each target, None if every token predicts one. images: features (N, F, E), frames
    (N, S, S, 3) or None; arrangement: see common/tiles.py. The first `count` targets are real, the
    others padding of -100; images beyond the last one that has tokens are padding too."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None
    images: np.ndarray | None
    count: int
    arrangement: tuple | None = None
    shows: bool = True  # whether any row of the whole batch, of all processes, has an image

    def to(self, device, image_format):
        """The arguments of BabyLLaVA.forward as tensors: (tokens, targets, positions, images,
        arrangement, first); frames as pixels."""
        tokens, targets, positions, images = (
            None if part is None else send(part, device)
            for part in (self.tokens, self.targets, self.positions, self.images)
        )
        if images is not None and images.dtype == torch.uint8:
            images = to_pixels(images, image_format, device)
        arrangement = self.arrangement and tuple(send(part, device) for part in self.arrangement)
        return tokens, targets, positions, images, arrangement, self.first_target()

    def first_target(self):
        """The first position of any row that predicts a target, rounded down to a multiple of 8, so
        that few values occur. Before it the last block need not be computed: with 64 image tokens,
        the first word is predicted at position 63, and this is 56."""
        if self.positions is None or not self.count:
            return 0
        return int((self.positions[: self.count] % self.tokens.shape[1]).min()) // 8 * 8


def round_up(n, parts=8, least=8):
    """n rounded up to one of few values: between two powers of two there are `parts` of them, and
    all are multiples of `least`. round_up(65) is 72, round_up(200) is 208.

    With 8 parts at most an eighth of a long row is padding, and few different lengths occur: for
    each, memory is kept and torch.compile makes kernels."""
    power = 2 ** (max(n - 1, 1).bit_length() - 1)  # the largest power of two below n
    multiple = max(least, power // parts)
    return math.ceil(n / multiple) * multiple


class Order:
    """The numbers 0 .. n - 1 as an endless deck of cards: first the `curriculum` numbers, once and
    in order, then passes over all others, each a fresh permutation.

    A batch at the end of a pass takes its last cards and the first ones of the next pass. No number
    is in it twice: the first cards of a pass are exchanged for later ones if the pass before ended
    with them. With fewer than two batches of cards all passes have the same order instead.

    Of 5 cards in batches of 2, the third batch has the last card of the first pass and the first
    card of the second, so window() is (0, 2) for the steps 0 and 1, and (2, 3) for step 2."""

    def __init__(self, n, seed, curriculum=0, batch=1):
        self.seed, self.curriculum, self.shuffled = seed, curriculum, n - curriculum
        self.batch = batch
        self.passes = {}  # {number of the pass: its permutation}, those of the last call

    def shuffle(self, number):
        number = number if self.shuffled >= 2 * self.batch else 0
        return np.random.RandomState([self.seed, number]).permutation(self.shuffled)

    def permutation(self, number):
        """The cards of a pass, in order."""
        cards = self.shuffle(number)
        # How many cards of the pass before are in a batch with the first cards of this one: with 5
        # cards in batches of 2 one, 5 % 2. If it is the first card here too, that is exchanged for
        # the next; two batches of cards are enough to find others.
        before = self.first_position(number) % self.batch
        if number and before and self.shuffled >= 2 * self.batch:
            is_there = np.isin(cards, self.shuffle(number - 1)[-before:])
            first = self.batch - before  # so many cards of this pass are in that batch
            twice = np.flatnonzero(is_there[:first])
            later = first + np.flatnonzero(~is_there[first:])[: len(twice)]
            cards[twice], cards[later] = cards[later], cards[twice]
        return cards

    def first_position(self, number):
        """The position of the first card of a pass in the deck."""
        return self.curriculum + number * self.shuffled

    def __call__(self, start, count):
        """The cards at the positions start .. start + count - 1 of the deck."""
        positions = np.arange(start, start + count)
        chosen, used = positions.copy(), {}  # a position in the curriculum is its own card
        later = positions >= self.curriculum
        numbers, cards = np.divmod(positions - self.curriculum, self.shuffled)
        for number in np.unique(numbers[later]).tolist():
            used[number] = self.passes.get(number)
            if used[number] is None:
                used[number] = self.permutation(number)
            own = later & (numbers == number)
            chosen[own] = self.curriculum + used[number][cards[own]]
        self.passes = used  # the next call will need one of these again
        return chosen

    def window(self, step, most):
        """(first, end) of the batches that may be mixed with batch number `step`: at most so many
        that lie in one pass. A batch with cards of two passes is alone."""
        number = max((step * self.batch - self.curriculum) // self.shuffled, -1)
        start = self.first_position(number) if number >= 0 else 0  # -1 is the curriculum
        end = self.first_position(number + 1) // self.batch  # batches that end in this pass
        if step >= end:
            return step, step + 1
        first = math.ceil(start / self.batch)
        first += (step - first) // most * most
        return first, min(first + most, end)


def fixed_rows(n, limit):
    """All of 0 .. n - 1, or a fixed random choice of `limit` of them, in order."""
    if not limit or limit >= n:
        return np.arange(n)
    return np.sort(np.random.RandomState(0).permutation(n)[:limit])


# ---------------------------------------------------------------------------------------------
# Text, for the language model


class TextBatches:
    """Rows of T tokens, cut from one long stream of utterances. Every token of the stream but the
    first is a target, once a pass: the last row ends with the stream, and the tokens that it shares
    with the row before are in the loss there alone."""

    BIN = "text"

    def __init__(self, dataset, split, batch, seed, model=None, features=None, truncate=False):
        self.text, self.tokenizer = dataset.open(split, "text"), dataset.tokenizer
        self.path = dataset.path(split, "text")
        self.T = min(model.gpt.config.block_size, len(self.text) - 1)
        if self.T < 1:
            raise UserError(f"{self.path}: {len(self.text)} tokens are too few")
        self.rows = math.ceil((len(self.text) - 1) / self.T)
        self.batch, self.order = batch, Order(self.rows, seed, batch=batch)

    def plan(self, step):
        return Plan(self.order(step * self.batch, self.batch), self.T)

    def fixed_plan(self, limit=0):
        """The plans of a validation pass over `limit` rows (0: all), always the same."""
        rows = fixed_rows(self.rows, limit)
        parts = range(0, len(rows), self.batch)
        return [Plan(rows[i : i + self.batch], self.T) for i in parts]

    def describe(self, plans):
        return f"{self.batch} x {self.T} tokens"

    def read(self, plan, part=slice(None)):
        wanted = plan.rows[part] * self.T
        starts = np.minimum(wanted, len(self.text) - 1 - self.T)
        stream = np.stack([self.text[i : i + self.T + 1] for i in starts]).astype(np.int64)
        check_tokens(stream, self.tokenizer, self.path)
        targets = stream[:, 1:].copy()
        for row, shared in zip(targets, wanted - starts):
            row[:shared] = -100
        return Batch(stream[:, :-1], targets.reshape(-1), None, None, int((targets >= 0).sum()))


# ---------------------------------------------------------------------------------------------
# Samples, with and without pictures


class SampleBatches:
    """Samples of similar length. Samples with and without images are in different batches. Two
    kinds of batches mix them: one a window, at the border of the sort, and one that spans two
    passes.

    A window is up to 32 batches of one pass. Its samples are grouped by length, and the groups are
    shuffled again. All rows of a batch are padded to one length (see round_up).

    truncate: of a sample that is longer than block_size, only the turns that fit are used; else
    such a sample is refused."""

    BIN, WINDOW, ONE_PICTURE = "samples", 32, False

    def __init__(self, dataset, split, batch, seed, model, features=None, truncate=False):
        check_pointers(dataset, split)
        self.samples, self.tokens = dataset.open(split, "samples"), dataset.open(split, "tokens")
        self.loss_mask = dataset.open(split, "loss_mask")
        if self.ONE_PICTURE:
            with_one = self.samples[:, 3] == 1
            self.samples = self.samples[with_one] if with_one.any() else self.samples
        self.tokenizer, self.path = dataset.tokenizer, dataset.path(split, "tokens")
        self.batch, self.seed, self.rows = batch, seed, len(self.samples)
        self.image_ids = None
        if dataset.count(split, "image_ids"):
            self.image_ids, self.images = (
                dataset.open(split, kind) for kind in ("image_ids", "images")
            )
            self.pictures = Rows(dataset.open(split, "frames") if features is None else features)
            self.count_image_tokens(model, dataset.image_format)
        self.block_size, self.truncate = model.gpt.config.block_size, truncate
        self.check_lengths(dataset.directory, split)
        self.always_images = False  # a batch of texts reads an image too, as padding
        # "full" needs equally many image tokens in every row, so no image may be padding.
        self.pads_images = model.image_attention != "full"
        if not self.pads_images:
            self.check_images_first(dataset.directory)
        curriculum = 0 if self.ONE_PICTURE else dataset.count(split, "curriculum")
        self.order = Order(self.rows, seed, curriculum, batch)
        self.window, self.plans = (0, 0), []  # the plans of the last window

    def count_image_tokens(self, model, image_format):
        """The number of tokens of each image, and the running total over image_ids."""
        self.P, self.tiled = model.image_tokens(image_format.size), model.tiled
        self.side, self.max_tiles = math.isqrt(self.P), image_format.max_tiles
        self.image_tokens = np.full(len(self.images), self.P)
        if self.tiled:
            self.image_tokens = count_tokens(self.images[:, 1:], self.side, self.max_tiles)
        self.totals = np.append(0, self.image_tokens[self.image_ids].cumsum())

    def blocks(self, size=1 << 16):
        """The numbers of all rows, a block at a time."""
        return (np.arange(i, min(i + size, self.rows)) for i in range(0, self.rows, size))

    def check_lengths(self, directory, split):
        """Raise UserError if a sample does not fit into block_size."""
        for rows in self.blocks():
            lengths = self.full_lengths(rows)
            for row in rows[lengths > self.block_size] if self.truncate else ():
                if not len(self.read_sample(*self.samples[row].tolist())[0]):
                    raise UserError(
                        f"{directory}: {split} sample {row}: not even its first answer fits into "
                        f"block_size {self.block_size}: raise it"
                    )
            longest = int(lengths.argmax())
            if not self.truncate and lengths[longest] > self.block_size:
                raise UserError(
                    f"{directory}: {split} sample {rows[longest]} makes {lengths[longest]} tokens, "
                    f"those of its images included, over block_size {self.block_size}: raise "
                    "block_size, shorten the samples, or give --truncate"
                )

    def check_images_first(self, directory):
        """Raise UserError unless all samples start with the same number of images: these are the
        `prefix` that every position may attend to."""
        number = int(self.samples[0, 3])
        for rows in self.blocks():
            samples = self.samples[rows].astype(np.int64)
            same = number > 0 and (samples[:, 3] == number).all()
            if same:  # so each sample has at least this many tokens
                leading = [self.tokens[samples[:, 0] + i] for i in range(number)]
                same = all((tokens == self.tokenizer.image).all() for tokens in leading)
            if not same:
                raise UserError(
                    f"{directory}: image_attention=full needs samples that all begin "
                    "with the same number of images; use causal"
                )

    def lengths(self, rows):
        """The positions that each sample takes in a batch, at most; see full_lengths()."""
        return np.minimum(self.full_lengths(rows), self.block_size)

    def full_lengths(self, rows):
        """The positions that each whole sample takes. Its last token is only a target."""
        samples = self.samples[rows].astype(np.int64)
        lengths = samples[:, 1] - 1
        if self.image_ids is not None:
            first, count = samples[:, 2], samples[:, 3]
            lengths += self.totals[first + count] - self.totals[first] - count
        return lengths

    def group(self, rows):
        """Plans for these rows, each of rows of similar length.

        Each stretch between two powers of two is halved (65 to 96, 97 to 128); lengths in the same
        half are similar. Finer groups would pad less and train worse: length goes with content, and
        a batch of all the two-word captions is a biased sample."""
        lengths = self.lengths(rows)
        similar = np.array([round_up(int(n), parts=2) for n in lengths])
        has_images = self.samples[rows][:, 3] > 0
        order = np.lexsort((similar, has_images))
        groups = [order[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        longest = [min(round_up(int(lengths[group].max())), self.block_size) for group in groups]
        return [Plan(rows[group], length) for group, length in zip(groups, longest)]

    def plan(self, step):
        first, end = self.order.window(step, self.WINDOW)
        if (first, end) != self.window:
            plans = self.group(self.order(first * self.batch, (end - first) * self.batch))
            shuffled = np.random.RandomState([self.seed, first, 1]).permutation(len(plans))
            self.window, self.plans = (first, end), [plans[i] for i in shuffled]
        return self.plans[step - first]

    def fixed_plan(self, limit=0):
        """The plans of a validation pass over `limit` samples (0: all), the curriculum left out."""
        return self.group(self.order.curriculum + fixed_rows(self.order.shuffled, limit))

    def describe(self, plans):
        length, image_tokens = np.mean([plan.length for plan in plans]), 0
        if self.image_ids is not None:
            samples = self.samples[np.concatenate([plan.rows for plan in plans])].astype(np.int64)
            first, count = samples[:, 2], samples[:, 3]
            image_tokens = float((self.totals[first + count] - self.totals[first]).mean())
        return f"{self.batch} x {length:,.0f} tokens, {image_tokens:,.0f} of them of images"

    def read(self, plan, part=slice(None)):
        rows = plan.rows[part]
        stream = np.full((len(rows), plan.length + 1), self.tokenizer.pad, np.int64)
        in_loss = np.zeros((len(rows), plan.length + 1), bool)
        images = []
        for i, sample in enumerate(self.samples[rows].tolist()):
            tokens, loss_mask, own_images = self.read_sample(*sample)
            stream[i, : len(tokens)] = tokens
            in_loss[i, : len(tokens)] = loss_mask
            images += own_images
        check_tokens(stream, self.tokenizer, self.path)
        positions = np.flatnonzero(in_loss[:, 1:])
        targets = stream[:, 1:].reshape(-1)[positions]
        padding = round_up(max(len(positions), 1), parts=4) - len(positions)
        batch = Batch(
            tokens=stream[:, :-1],
            targets=np.pad(targets, (0, padding), constant_values=-100),
            # edge, not 0: no position may be before first_target()
            positions=np.pad(positions, (0, padding), "edge" if len(positions) else "constant"),
            images=None,
            count=len(positions),
            shows=bool((self.samples[plan.rows, 3] > 0).any()),
        )
        if self.always_images and self.image_ids is not None:
            images = images or [0]
        if images:
            self.add_images(batch, self.images[np.array(images)].astype(np.int64).tolist())
        return batch

    def read_sample(self, first_token, n_tokens, first_image, n_images):
        """(tokens, loss_mask, image ids) of a row of the bin `samples`, with each <image> repeated
        for each of its image tokens, truncated to block_size."""
        tokens = self.tokens[first_token : first_token + n_tokens]
        loss_mask = self.loss_mask[first_token : first_token + n_tokens]
        is_image = tokens == self.tokenizer.image
        if is_image.sum() != n_images:
            raise corrupted(self.path)
        if not n_images and n_tokens - 1 <= self.block_size:
            return tokens, loss_mask, []
        images, repeats = [], np.ones(len(tokens), np.int64)
        if n_images:
            images = self.image_ids[first_image : first_image + n_images].tolist()
            repeats[is_image] = self.image_tokens[images]
        if repeats.sum() - 1 > self.block_size:  # keep what ends with the last answer that fits
            is_end = (loss_mask == 1) & (np.append(loss_mask[1:], 0) == 0)
            ends = np.flatnonzero(is_end & (repeats.cumsum() - 1 <= self.block_size))
            kept = ends[-1] + 1 if len(ends) else 0
            tokens, loss_mask, repeats = tokens[:kept], loss_mask[:kept], repeats[:kept]
            images = images[: is_image[:kept].sum()]
        return np.repeat(tokens, repeats), np.repeat(loss_mask, repeats), images

    def add_images(self, batch, images):
        """Add the frames, or their features, of images (rows of the bin) to a batch."""
        frames, arrangements = [], []
        for first, *grid in images:
            if self.tiled:
                arrangements.append(arrange(*grid, self.side, len(frames), self.max_tiles))
            frames += range(first, first + 1 + grid[0] * grid[1])
        if self.pads_images:  # to one of few numbers, see round_up
            frames += frames[-1:] * (round_up(len(frames), least=1) - len(frames))
        batch.images = self.pictures[np.array(frames)]
        if self.tiled:
            batch.arrangement = join(arrangements)


class PairBatches(SampleBatches):
    """The samples of exactly one picture, if there are any: the simplest, for the projector."""

    ONE_PICTURE = True


# ---------------------------------------------------------------------------------------------
# Frames, for DINO


@dataclass
class FramePairs:
    """frames, others (n, S, S, 3) uint8: two frames of one clip in each row. `first` is the number
    of the first row in its batch, `count` is n."""

    frames: np.ndarray
    others: np.ndarray
    first: int
    count: int


class ClipBatches:
    """Pairs of frames: two of one clip, or the same frame twice if its clip has only one."""

    BIN = "frames"

    def __init__(self, dataset, split, batch, seed, model=None, features=None, truncate=False):
        self.frames, self.clips = Rows(dataset.open(split, "frames")), dataset.open(split, "clips")
        self.rows, self.batch = len(self.clips), batch
        check_clips(self.clips, dataset.path(split, "clips"))
        self.order = Order(self.rows, seed, batch=batch)

    def plan(self, step):
        return Plan(self.order(step * self.batch, self.batch), start=step * self.batch)

    def describe(self, plans):
        return f"{self.batch} pairs of frames"

    def read(self, plan, part=slice(None)):
        rows, first = plan.rows[part], part.start or 0
        clip_start = np.searchsorted(self.clips, self.clips[rows], "left")
        clip_length = np.searchsorted(self.clips, self.clips[rows], "right") - clip_start
        # which of the clip's other frames: a hash of the position in the deck (Knuth's), so that
        # it does not depend on how the batch is cut
        position = np.arange(plan.start + first, plan.start + first + len(rows))
        hashed = (position * 2654435761) >> 8
        offset = 1 + hashed % np.maximum(clip_length - 1, 1)
        others = clip_start + (rows - clip_start + offset) % clip_length
        return FramePairs(self.frames[rows], self.frames[others], first, len(rows))
