"""
What numbers in files may say, so that damage ends in a line that names the file: in a prepared
folder, after a fault of the disk or where bins of two preparations met; in a vocabulary and the
form of pictures, which checkpoints and other people's folders carry too; in a picture's header.
"""

import numpy as np

from config import UserError


def check_meta(meta, bins):
    """Raise KeyError, TypeError or ValueError where meta.json is not as Writer.finish left it."""
    for key in ("source", "corpus", "tokenizer", "tokenizer_digest"):
        if not isinstance(meta[key], str):
            raise TypeError(key)
    if type(meta["vocab_size"]) is not int:
        raise TypeError("vocab_size")
    for split, counts in meta["splits"].items():
        for kind in (*bins, "characters", "lead"):
            count = counts.get(kind, 0)
            if type(count) is not int or count < 0:
                raise ValueError(f"{split} {kind} {count}")
        lead = counts.get("lead", 0)
        if lead and lead >= counts.get("samples", 0):  # none is left to go on with
            raise ValueError(f"{split} lead {lead}")
        if counts.get("frames") and not isinstance(counts["frames_digest"], str):
            raise TypeError("frames_digest")


def damaged(path):
    return UserError(f"{path}: damaged, its numbers cannot be right: prepare it again")


def check_tokens(stream, tokenizer, path):
    """Raise UserError where a token is none of the vocabulary's."""
    if stream.max(initial=0) >= tokenizer.vocab_size:
        raise damaged(path)


def check_pointers(batches, dataset, split):
    """Raise UserError where a row of a bin points past the end of another: a damaged disk, or
    bins of two preparations."""
    tokens, shown = len(batches.tokens), dataset.count(split, "shown")
    for rows in batches.parts():
        first, count, first_shown, images = batches.samples[rows].astype(np.float64).T
        points_past = (first + count > tokens) | (first_shown + images > shown)
        if points_past.any() or not count.all():
            raise damaged(dataset.path(split, "samples"))
    if batches.shown is not None:
        if batches.shown.max() >= len(batches.images):
            raise damaged(dataset.path(split, "shown"))
        images = batches.images[:].astype(np.float64)
        if (images[:, 0] + images[:, 1] * images[:, 2] >= dataset.count(split, "frames")).any():
            raise damaged(dataset.path(split, "images"))


def check_images_lead(batches, directory):
    """Raise UserError unless all samples begin with the same number of images: then these are the
    `prefix` that every position may see."""
    for rows in batches.parts():
        samples = batches.samples[rows].astype(np.int64)
        number = int(batches.samples[0, 3])
        alike = number > 0 and (samples[:, 3] == number).all()
        if alike:  # then each sample has as many tokens at least
            leading = [batches.tokens[samples[:, 0] + i] for i in range(number)]
            alike = all((tokens == batches.tokenizer.image).all() for tokens in leading)
        if not alike:
            raise UserError(
                f"{directory}: image_attention=full needs samples that all begin "
                "with the same number of images; use causal"
            )


def check_clips(clips, path):
    """Raise UserError where the clips' numbers fall: a clip's frames are found by their order."""
    if (clips[1:] < clips[:-1]).any():
        raise damaged(path)


def check_format(image_format, fits, filters):
    """Raise ValueError where no picture can be made in an images.ImageFormat."""
    size, mean, std = image_format.size, image_format.mean, image_format.std
    if type(size) is not int or not 0 < size <= 1 << 14:
        raise ValueError(f"frames of {size!r} pixels")
    if image_format.fit not in fits or image_format.resample not in filters:
        raise ValueError(f"made square by {image_format.fit!r}, {image_format.resample!r}")
    if any(type(number) not in (int, float) for number in (*mean, *std)):
        raise ValueError(f"normalised by {mean!r}, {std!r}, which are no numbers")
    # a comparison with NaN is false, and so is refused here
    is_usual = all(abs(number) < 1e6 for number in mean) and all(0 < number < 1e6 for number in std)
    if len(mean) != 3 or len(std) != 3 or not is_usual:
        raise ValueError(f"normalised by {mean!r}, {std!r}")
    if image_format.canvases and image_format.resample == "reduced":
        raise ValueError("tiles of a reduced picture, which would show no more than the whole")
    for sides in image_format.canvases:
        if len(sides) != 2 or any(type(side) is not int or side < size for side in sides):
            raise ValueError(f"tiles on a canvas of {sides!r} pixels")
    if type(image_format.max_tiles) is not int or image_format.max_tiles < 0:
        raise ValueError(f"at most {image_format.max_tiles!r} tiles")


def check_ranks(ranks, kind):
    """Raise ValueError where a vocabulary {bytes: id} is not whole: ids are 0 to n - 1, each once,
    and where text is split into bytes each byte has one."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("a vocabulary whose ids are not 0 to n - 1, each once")
    if kind == "bpe" and any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("a vocabulary without a token for each byte")


def check_size(name, width, height):
    """Refuse a picture that would take more memory than pictures do: what makes it square may
    make a square of its longer side, or a strip as long as its sides differ."""
    longer, shorter = max(width, height), min(width, height)
    if longer > 1 << 14 or width * height > 10**8 or longer > 200 * shorter:
        raise UserError(
            f"{name}: {width} x {height} pixels: want at most 16,384 a side, a hundred million "
            "in all, and no side over 200 times the other"
        )
