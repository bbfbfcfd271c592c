"""
The format on disk: writing it, and mapping it into memory.

    python data.py toy                                        # draw the toy world -> data/toy
    python data.py pairs --csv FILE --images DIR --text FILE  # your captioned pictures and speech
    python data.py pairs --name speech --text FILE            # speech alone: for --phase language
    python data.py saycam --frames frames.zip --annotations train.json val.json test.json
    python data.py saycam --help                              # the options of a source
    python data.py show data/toy 17                           # a sample as a person sees it

A prepared folder data/<name>/ holds meta.json, tokenizer.tiktoken and, for each split, one file
per bin (see BINS). All bins are read through np.memmap; none is ever loaded whole. A new source of
data is a new file in sources/, see sources/__init__.py.

There is one kind of sample: tokens with one <image> for each picture, and a loss mask. A caption, a
conversation of many turns and a text without pictures are all of that kind.
Letters: F frames, S image side in pixels, K images, M samples.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

import config
from common.files import named, read_json, read_text, write_json, writing
from common.images import ImageFormat, as_picture
from config import UserError
from pretrained.tokenizer_json import parse_tokenizer

FORMAT = 3  # of data/<name>; another is refused
# {bin: (type, shape) of a row}. "token" is uint16, or uint32 for more than 65,536 tokens.
BINS = {
    "text": ("token", ()),  # utterances end to end, each closed by <eos>: for the language model
    "images": ("uint32", (5,)),  # first frame, tile rows, tile columns (0: none), width, height
    "frames": ("uint8", ("S", "S", 3)),  # pictures, or tiles of pictures
    "clips": ("uint32", ()),  # a number for each frame, rising; frames of one clip share it
    "tokens": ("token", ()),  # the tokens of all samples, with one <image> for each image
    "image_ids": ("uint32", ()),  # the images of all samples, in the order of their <image>s
    "samples": ("uint64", (4,)),  # first token, number of tokens, first image id, number of images
    "loss_mask": ("uint8", ()),  # for each token: 1 if it is in the loss
}


# ---------------------------------------------------------------------------------------------
# Writing


class Bin:
    """A bin while it is written, as NAME.partial: its number of rows and their digest."""

    def __init__(self, path, kind, meta, keep_rows=0):
        self.path, self.dtype = path, np.dtype(bin_shape(kind, meta)[0])
        self.row_bytes = row_bytes(kind, meta)
        self.rows, self.sha256 = keep_rows, hashlib.sha256()
        self.file = open(path, "r+b" if keep_rows else "w+b")  # noqa: SIM115
        self.file.truncate(keep_rows * self.row_bytes)
        # Hash the rows that are kept; this leaves the file at their end, where put() appends.
        for block in iter(lambda: self.file.read(1 << 20), b""):
            self.sha256.update(block)

    def put(self, values):
        """Append rows."""
        content = np.ascontiguousarray(values, self.dtype).tobytes()
        with named(self.path):
            self.file.write(content)
        self.sha256.update(content)
        self.rows += len(content) // self.row_bytes

    def close(self):
        with named(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


class SplitWriter:
    """Writes one split of a corpus: text, images and samples, in any order."""

    def __init__(self, writer, name):
        self.writer, self.name, self.bins, self.characters = writer, name, {}, 0
        self.last_clip = 0
        self.curriculum = 0  # how many samples come first, once and in order: batches.Order

    def path(self, suffix):
        return self.writer.directory / f"{self.name}_{suffix}"

    def bin(self, kind, keep_rows=0):
        """The Bin of a kind, created when it is first needed."""
        if kind not in self.bins:
            path = self.path(f"{kind}.partial")
            self.bins[kind] = Bin(path, kind, self.writer.meta, keep_rows)
        return self.bins[kind]

    def text(self, utterances):
        """Add utterances for the language model, each closed by <eos>."""
        tokenizer = self.writer.tokenizer
        for utterance in utterances:
            self.bin("text").put([*tokenizer.encode(utterance), tokenizer.eos])
            self.characters += len(utterance) + 1  # 1 for the newline

    def image(self, picture, clip):
        """Add a picture of clip number `clip` and return its image id. picture: an images.Picture,
        or one frame (S, S, 3). Raises ValueError for a clip number below the last: the frames of a
        clip must be side by side."""
        if isinstance(picture, np.ndarray):
            picture = as_picture(picture)
        if clip < self.last_clip:
            raise ValueError(f"clip {clip} after clip {self.last_clip}: their numbers must rise")
        self.last_clip = clip
        self.bin("images").put([self.bin("frames").rows, *picture.grid])
        self.bin("frames").put(picture.frames)
        self.bin("clips").put([clip] * len(picture.frames))
        return self.bins["images"].rows - 1

    def sample(self, tokens, loss_mask, images=()):
        """Add a sample: tokens, their loss mask, and the image id of each <image>.

        Raises ValueError if these do not match, if no token or an <image> is in the loss, or if
        <image> is the last token: the last token is only a target, the first is never one."""
        image = self.writer.tokenizer.image
        placeholders = tokens.count(image)
        image_in_loss = any(flag for token, flag in zip(tokens, loss_mask) if token == image)
        fits = placeholders == len(images) and len(loss_mask) == len(tokens)
        if not fits or not any(loss_mask[1:]) or image_in_loss or tokens[-1] == image:
            raise ValueError(
                f"a sample of {len(tokens)} tokens with {placeholders} <image>, "
                f"{len(images)} images, a loss mask of {len(loss_mask)} with {sum(loss_mask)} ones"
            )
        first_token, first_image = self.bin("tokens").rows, self.bin("image_ids").rows
        self.bin("samples").put([first_token, len(tokens), first_image, len(images)])
        self.bin("tokens").put(tokens)
        self.bin("loss_mask").put(loss_mask)
        self.bin("image_ids").put(np.array(images, np.uint32))

    def complete_images(self):
        """Rows (n, 5) of the images whose frames a killed run has written completely."""
        paths = {kind: self.path(f"{kind}.partial") for kind in ("images", "frames")}
        if not all(path.exists() for path in paths.values()):
            return np.zeros((0, 5), np.int64)
        written = np.fromfile(paths["images"], "uint32")
        images = written[: written.size // 5 * 5].reshape(-1, 5).astype(np.int64)
        frames = paths["frames"].stat().st_size // row_bytes("frames", self.writer.meta)
        return images[last_frame(images) < frames]


class Writer:
    """Writes data/<name>. A source calls start() after it has checked its input, then split() and
    the methods of the split; sources.prepare() calls finish().

    meta.json is deleted first and written last, so a half-made folder is never read."""

    def __init__(self, directory, source):
        self.directory, self.source = Path(directory), source
        self.skipped, self.splits = [], {}

    def start(self, tokenizer, image_format, template=None):
        """Delete what was prepared before. template: {"name", "system"} of conversations."""
        self.tokenizer, self.image_format = tokenizer, image_format
        self.directory.mkdir(parents=True, exist_ok=True)
        self.refuse_another_source()
        for name in ("meta.json", "gains.json"):  # the latter: of sources/filtering.py
            (self.directory / name).unlink(missing_ok=True)
        for path in self.directory.glob("*.bin"):
            path.unlink()
        self.meta = {
            "format": FORMAT,
            "source": self.source,
            "tokenizer": tokenizer.kind,
            "tokenizer_digest": tokenizer.digest(),
            "vocab_size": tokenizer.vocab_size,
            "images": asdict(image_format),
            "template": template,
        }

    def refuse_another_source(self):
        """Raise UserError if another source wrote this folder: its tests in eval/ would be left
        beside the new data."""
        path = self.directory / "meta.json"
        if path.exists():
            found = read_json(path).get("source")
            if found != self.source:
                raise UserError(
                    f"{self.directory} was made by `data.py {found}`: give another --name, or "
                    "delete the folder"
                )

    def split(self, name):
        """The SplitWriter of a split, created when it is first needed."""
        if name not in self.splits:
            self.splits[name] = SplitWriter(self, name)
        return self.splits[name]

    def finish(self):
        """Give all files their final names, meta.json last. Returns meta."""
        corpus = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode())
        self.meta["splits"] = {}
        for name, split in self.splits.items():
            counts = {"characters": split.characters, "curriculum": split.curriculum}
            self.meta["splits"][name] = counts
            for kind, written in sorted(split.bins.items(), key=lambda b: [*BINS].index(b[0])):
                written.close()
                counts[kind] = written.rows
                corpus.update(f"{name} {kind} {written.sha256.hexdigest()}".encode())
            if "frames" in split.bins:
                counts["frames_digest"] = split.bins["frames"].sha256.hexdigest()
        for split in self.splits.values():
            for kind, written in split.bins.items():
                os.replace(written.path, split.path(f"{kind}.bin"))
        with writing(self.directory / "tokenizer.tiktoken") as file:
            file.write(self.tokenizer.dump().encode())
        self.delete_leftovers()
        if self.skipped:
            with writing(self.directory / "skipped.txt") as file:
                file.write("\n".join(self.skipped).encode("utf-8"))
            print(f"{len(self.skipped)} images could not be read: {self.directory}/skipped.txt")
        self.meta["corpus"] = corpus.hexdigest()
        write_json(self.directory / "meta.json", self.meta)
        return self.meta

    def delete_leftovers(self):
        """Delete the logs of earlier preparations, and stored features of frames that are gone."""
        (self.directory / "skipped.txt").unlink(missing_ok=True)
        leftover = [*self.directory.glob("*.partial"), *self.directory.glob("*_reading.log")]
        frames = [counts.get("frames_digest", "-")[:16] for counts in self.meta["splits"].values()]
        for path in (self.directory / "features").glob("*"):
            if path.name.partition("_")[0] not in frames:
                leftover.append(path)
        for path in leftover:
            path.unlink()


def row_bytes(kind, meta):
    """Bytes of a row of a bin."""
    dtype, shape = bin_shape(kind, meta)
    return np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))


def bin_shape(kind, meta):
    """(dtype, shape of a row) of a bin in the corpus that meta describes."""
    dtype, shape = BINS[kind]
    if dtype == "token":
        dtype = "uint16" if meta["vocab_size"] <= 1 << 16 else "uint32"
    return dtype, tuple(meta["images"]["size"] if n == "S" else n for n in shape)


# ---------------------------------------------------------------------------------------------
# Reading


def known_sources():
    """The names of the sources: the files in sources/ that define prepare()."""
    files = (Path(__file__).parent / "sources").glob("*.py")
    return sorted(
        path.stem
        for path in files
        if path.stem != "__init__" and "\ndef prepare(" in path.read_text(encoding="utf-8")
    )


NEEDS = {  # what else to say about a folder that is missing
    name: f"; {corpus} needs an agreement with Databrary ({page}); to try the code without it, run "
    "`python train.py configs/toy.py`"
    for name, corpus, page in (
        ("saycam", "SAYCam", "volume 564, see docs/saycam.md"),
        ("babyview", "BabyView", "volume 1882, see docs/challenges.md"),
    )
}


class Data:
    """A prepared folder: `meta`, `tokenizer`, `image_format`, and the bins as memory maps.

    Raises UserError, with the command that makes it, if something is missing or does not match."""

    def __init__(self, directory):
        self.directory = Path(directory)
        name = self.directory.name
        source = name if name in known_sources() else f"SOURCE --name {name}"
        which = "" if name in known_sources() else f" (SOURCE: {', '.join(known_sources())})"
        path = self.directory / "meta.json"
        if not path.exists():
            half = any(self.directory.glob("*.partial")) or any(self.directory.glob("*.bin"))
            why = f"{self.directory} is half prepared" if half else f"no {path}"
            needs = next((NEEDS[one] for one in NEEDS if name.startswith(one)), "")
            raise UserError(f"{why}: run `python data.py {source} ...` first{which}{needs}")
        found = read_json(path)
        self.meta = found if isinstance(found, dict) else {}
        version = self.meta.get("format")
        if version != FORMAT:
            command = f"python data.py {self.meta.get('source', source)} --name {name}"
            raise UserError(
                f"{self.directory}: format {version}, this version reads {FORMAT}: remake it with "
                f"`{command} ...`"
            )
        try:
            check_meta(self.meta)
            self.image_format = ImageFormat.parse(self.meta["images"])
            vocabulary = read_text(self.directory / "tokenizer.tiktoken")
            self.tokenizer = parse_tokenizer(vocabulary, self.meta["tokenizer"])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path}: corrupted, or tokenizer.tiktoken beside it ({error!r}): prepare it again"
            ) from None
        if self.tokenizer.digest() != self.meta["tokenizer_digest"]:
            raise UserError(
                f"{self.directory}: its tokenizer is not the one that made its bins: "
                f"remake it with `python data.py {self.meta['source']} --name {name}`"
            )

    def count(self, split, kind):
        """Rows of a bin, 0 if there is none; or "characters" of the text, or the samples of the
        "curriculum"."""
        return self.meta["splits"].get(split, {}).get(kind, 0)

    def path(self, split, kind):
        return self.directory / f"{split}_{kind}.bin"

    def open(self, split, kind):
        """The bin as a read-only np.memmap. Raises UserError."""
        path = self.path(split, kind)
        if not self.count(split, kind):
            raise UserError(
                f"no {path}: {self.directory} was prepared without; see "
                f"`python data.py {self.meta['source']} --help`"
            )
        dtype, row_shape = bin_shape(kind, self.meta)
        return open_bin(path, dtype, (self.count(split, kind), *row_shape))

    def features_path(self, split, fingerprint):
        """Where the features of a split's frames are stored. The name depends on the frames, on
        their image format and on the tower (fingerprint: features.fingerprint)."""
        frames = self.meta["splits"][split]["frames_digest"]
        how = hashlib.sha256(f"{self.image_format} {fingerprint}".encode()).hexdigest()
        return self.directory / "features" / f"{frames[:16]}_{how[:24]}.bin"


def open_bin(path, dtype, shape, remedy="prepare its folder again"):
    """A file as a read-only np.memmap. Raises UserError, with the remedy, for a wrong size."""
    expected = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize  # no overflow
    found = path.stat().st_size if path.exists() else 0
    if found != expected:
        raise UserError(f"{path}: {found:,} bytes, want {expected:,}: {remedy}")
    return np.memmap(path, dtype, "r", shape=shape)


# ---------------------------------------------------------------------------------------------
# Checking: a fault of the disk, or bins of two preparations, must end in one line with the file


def corrupted(path):
    return UserError(f"{path}: corrupted, its numbers cannot be right: prepare it again")


def check_meta(meta):
    """Raise KeyError, TypeError or ValueError if meta.json is not what Writer.finish wrote."""
    for key in ("source", "corpus", "tokenizer", "tokenizer_digest"):
        if not isinstance(meta[key], str):
            raise TypeError(key)
    if type(meta["vocab_size"]) is not int:
        raise TypeError("vocab_size")
    for split, counts in meta["splits"].items():
        for kind in (*BINS, "characters", "curriculum"):
            count = counts.get(kind, 0)
            if type(count) is not int or count < 0:
                raise ValueError(f"{split} {kind} {count}")
        curriculum = counts.get("curriculum", 0)
        if curriculum and curriculum >= counts.get("samples", 0):  # no other samples follow it
            raise ValueError(f"{split} curriculum {curriculum}")
        if counts.get("frames") and not isinstance(counts["frames_digest"], str):
            raise TypeError("frames_digest")


def check_tokens(tokens, tokenizer, path):
    """Raise UserError if a token is outside the vocabulary."""
    if tokens.max(initial=0) >= tokenizer.vocab_size:
        raise corrupted(path)


def last_frame(images):
    """The number of the last frame of each row (n, 5) of the bin `images`: the whole picture, then
    its tiles."""
    first, rows, columns = images[:, 0], images[:, 1], images[:, 2]
    return first + rows * columns


def check_pointers(dataset, split, block=1 << 16):
    """Raise UserError if a sample points past the end of another bin."""
    samples = dataset.open(split, "samples")
    tokens, image_ids, images, frames = (
        dataset.count(split, kind) for kind in ("tokens", "image_ids", "images", "frames")
    )
    for start in range(0, len(samples), block):
        first, count, first_image, own_images = (
            samples[start : start + block].astype(np.float64).T  # floats do not overflow
        )
        points_past = (first + count > tokens) | (first_image + own_images > image_ids)
        if points_past.any() or not count.all():
            raise corrupted(dataset.path(split, "samples"))
    if image_ids:
        if dataset.open(split, "image_ids").max() >= images:
            raise corrupted(dataset.path(split, "image_ids"))
        rows = dataset.open(split, "images")[:].astype(np.float64)
        if (last_frame(rows) >= frames).any():
            raise corrupted(dataset.path(split, "images"))


def check_clips(clips, path):
    """Raise UserError if clip numbers fall: the frames of a clip are found by bisection."""
    if (clips[1:] < clips[:-1]).any():
        raise corrupted(path)


if __name__ == "__main__":
    # As a command this file finds a source by its name; as a module it imports none.
    from sources.command import main

    config.run(main)
