"""
Filtering utterances by a trained model: keep those that are likelier with their own picture than
with other pictures of the corpus. No second model is needed.

    python data.py saycam --frames ... --name filtered --filter out/saycam/phase2.pt --min_gain 0.05
    python data.py saycam --frames ... --filter out/first/phase2.pt --most 67000

The gain of an utterance is its NLL per token with other pictures, averaged over --others of them,
minus that with its own picture. The filter runs on what a source has written, before it is
finished.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import inference
from checkpoint import choose_device
from common.files import write_json
from common.images import to_picture
from config import UserError
from sources import unfinished_bin

WINDOW = 512  # samples scored together: each is compared with pictures of the others


def gains(loaded, clips, words, others, rng):
    """The gain of each of n phrases (lists of tokens), float64 (n,). clips: the picture embeddings
    of each phrase; others: how many clips of other phrases to compare with."""
    tokenizer, n = loaded.tokenizer, len(words)

    def nll(order):
        embeds = [clips[i] for i in order]
        prompts = [tokenizer.start + [tokenizer.image] * sum(map(len, embed)) for embed in embeds]
        return inference.nll_after(loaded, prompts, embeds, words, 64)

    own, with_others = nll(range(n)), np.zeros(n)
    for _ in range(others):
        with_others += nll((np.arange(n) + rng.randint(1, n, n)) % n)
    return with_others / others - own


def find_gains(part, loaded, others, seed):
    """The gain of each sample of a split that has pictures and one utterance; NaN for the others
    (text alone, interleaved moments)."""
    samples, tokens = np.array(unfinished_bin(part, "samples")), unfinished_bin(part, "tokens")
    loss_mask, image_ids = unfinished_bin(part, "loss_mask"), unfinished_bin(part, "image_ids")
    frames, images = unfinished_bin(part, "frames"), unfinished_bin(part, "images")
    tokenizer, found = part.writer.tokenizer, np.full(len(samples), np.nan)
    rows = []
    for i, (first, length, _, pictures) in enumerate(samples.astype(np.int64).tolist()):
        changes = np.count_nonzero(np.diff(loss_mask[first : first + length]))
        if pictures and changes == 1:
            rows.append(i)
    rng = np.random.RandomState(seed)
    rows = rng.permutation(rows)
    blocks = np.array_split(rows, max(1, round(len(rows) / WINDOW)))
    for block in tqdm(blocks, f"{part.name} gains", unit_scale=WINDOW, unit="sample"):
        if len(block) < 2:
            continue
        clips, words = [], []
        for first, length, begin, count in samples[block].astype(np.int64).tolist():
            own = slice(first, first + length)
            text = tokenizer.decode(tokens[own][loss_mask[own] == 1]).strip()
            words.append(loaded.tokenizer.encode(text) or [loaded.tokenizer.eos])
            pictures = [
                Image.fromarray(frames[images[k][0]]) for k in image_ids[begin : begin + count]
            ]
            clips.append([to_picture(picture, loaded.image_format) for picture in pictures])
        embeds = inference.embed_pictures(loaded, [picture for clip in clips for picture in clip])
        clips = [[embeds.pop(0) for _ in clip] for clip in clips]
        found[block] = gains(loaded, clips, words, others, rng)
    return found


def rewrite(part, keep):
    """Write a split again with only the samples for which keep is true; pictures stay."""
    samples = np.array(unfinished_bin(part, "samples")).astype(np.int64)
    old = {
        kind: np.array(unfinished_bin(part, kind)) for kind in ("tokens", "loss_mask", "image_ids")
    }
    for kind in ("samples", *old):
        part.bins.pop(kind).close()
    for kind in ("samples", *old):
        part.path(f"{kind}.partial").unlink()
    for first, length, begin, count in samples[keep].tolist():
        own, images = slice(first, first + length), old["image_ids"][begin : begin + count]
        part.sample(old["tokens"][own].tolist(), old["loss_mask"][own].tolist(), images.tolist())


def open_filter(settings):
    """A function of a data.Writer that filters its samples with the model of --filter. The model is
    opened now: a wrong path is reported before hours of preparing. Raises UserError."""
    loaded = inference.open_model(settings.filter, choose_device(""))
    if loaded.model.projector is None:
        raise UserError(f"--filter {settings.filter}: it cannot see; give one of phase 2")
    return lambda writer: filter_samples(writer, settings, loaded)


def filter_samples(writer, settings, loaded):
    """Remove the training samples of a source whose gain is below --min_gain, or not among the
    --most highest. Validation samples stay. Raises UserError."""
    part = writer.splits.get("train")
    if part is None or "image_ids" not in part.bins:
        raise UserError("--filter: there are no pictures to compare utterances with")
    with torch.no_grad():
        found = find_gains(part, loaded, settings.others, seed=0)
    keep = ~(found < settings.min_gain)  # samples without a gain stay
    if settings.most:
        best = np.argsort(-np.nan_to_num(found, nan=-np.inf), kind="stable")[: settings.most]
        keep &= np.isnan(found) | np.isin(np.arange(len(found)), best)
    if not keep.any():
        raise UserError(f"--min_gain {settings.min_gain:g}: nothing is left, of {len(found)} pairs")
    rewrite(part, keep)
    how = {"min_gain": settings.min_gain, "most": settings.most}
    writer.meta["filtered"] = {"by": loaded.checkpoint.get("digest"), **how}
    listed = [None if np.isnan(gain) else round(float(gain), 4) for gain in found]
    write_json(Path(writer.directory) / "gains.json", listed)
    judged = found[np.isfinite(found)]
    print(
        f"{keep.sum():,} of {len(found):,} samples kept; gains {np.median(judged):.3f} in the "
        f"middle, from {judged.min():.3f} to {judged.max():.3f}: {writer.directory}/gains.json"
    )
