"""
The format on disk: writing it, and mapping it into memory.

    python data.py toy                                        # draw the toy world -> data/toy
    python data.py pairs --csv FILE --images DIR --text FILE  # your captioned pictures and speech
    python data.py pairs --name speech --text FILE            # speech alone: enough for phase 0
    python data.py saycam --frames frames.zip --annotations train.json val.json test.json
    python data.py saycam --help                              # the knobs of a source

A source is a file sources/NAME.py with a `Config` and a `prepare(config, writer)`; adding one is
adding that file. It writes data/<name>/: meta.json, tokenizer.tiktoken and, for each split, bins
(BINS below says what each holds), all mapped with np.memmap, none ever held in memory.

There is one kind of sample: tokens, in which <image> stands once for each picture that is shown
there, and a mask of which tokens are learnt. A caption, a conversation of many turns and a text
without a picture are all of that kind. Knows no network.
Letters: S image side in pixels; K images; M samples.
"""

import hashlib
import importlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np

import config
from checks import check_meta
from config import UserError
from files import named, only_one, read_json, read_text, write_json, writing
from images import ImageFormat, Picture
from tokenizer_json import parse

FORMAT = 2  # of data/<name>; readers refuse another
# What a row of each bin is: type and shape. "token" is uint16, or uint32 for large vocabularies.
BINS = {
    "text": ("token", ()),  # utterances, each closed by <eos>, end to end: phase 0
    "images": ("uint32", (5,)),  # first frame, tile rows, columns (0: none), original width, height
    "frames": ("uint8", ("S", "S", 3)),  # pictures, or tiles of pictures
    "clips": ("uint32", ()),  # of each frame: frames of one clip share a number; numbers rise
    "tokens": ("token", ()),  # every sample's tokens, one <image> where an image stands
    "shown": ("uint32", ()),  # the images a sample shows, in the order of its <image>s
    "samples": ("uint64", (4,)),  # first token, tokens, first of `shown`, images
    "learn": ("uint8", ()),  # of each token: 1 where it is a target
}


# ---------------------------------------------------------------------------------------------
# Writing


class Bin:
    """A bin while it is written, under the name of .partial: how many rows, and their digest."""

    def __init__(self, path, kind, meta, keep_rows=0):
        self.path, self.dtype = path, np.dtype(bin_shape(kind, meta)[0])
        self.row_bytes = row_bytes(kind, meta)
        self.rows, self.sha256 = keep_rows, hashlib.sha256()
        self.file = open(path, "r+b" if keep_rows else "w+b")  # noqa: SIM115
        self.file.truncate(keep_rows * self.row_bytes)
        for block in iter(lambda: self.file.read(1 << 20), b""):
            self.sha256.update(block)  # what is kept counts towards the digest

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
    """One split of a corpus: text, images and samples, in any order."""

    def __init__(self, writer, name):
        self.writer, self.name, self.bins, self.characters = writer, name, {}, 0
        self.last_clip = 0
        self.lead = 0  # so many samples, the first ones, are learnt from before all others

    def path(self, suffix):
        return self.writer.directory / f"{self.name}_{suffix}"

    def bin(self, kind, keep_rows=0):
        if kind not in self.bins:
            path = self.path(f"{kind}.partial")
            self.bins[kind] = Bin(path, kind, self.writer.meta, keep_rows)
        return self.bins[kind]

    def text(self, utterances):
        """Add utterances for phase 0, each closed by <eos>."""
        tokenizer = self.writer.tokenizer
        for utterance in utterances:
            self.bin("text").put([*tokenizer.encode(utterance), tokenizer.eos])
            self.characters += len(utterance) + 1  # and the line's end

    def image(self, picture, clip):
        """Add a picture of clip number `clip`, an images.Picture or one frame (S, S, 3), and return
        its number. Clip numbers may not fall: their frames stand side by side."""
        if isinstance(picture, np.ndarray):
            picture = Picture(picture[None], 0, 0, *picture.shape[1::-1])
        if clip < self.last_clip:
            raise ValueError(f"clip {clip} after clip {self.last_clip}: their numbers must rise")
        self.last_clip = clip
        self.bin("images").put([self.bin("frames").rows, *picture.grid])
        self.bin("frames").put(picture.frames)
        self.bin("clips").put([clip] * len(picture.frames))
        return self.bins["images"].rows - 1

    def sample(self, tokens, learn, images=()):
        """Add a sample: tokens, the mask of those that are learnt, and the numbers of the images
        that its <image>s show.

        Raises ValueError where these do not fit each other, nothing is learnt, an <image> is, or
        an <image> stands last: the last token is only ever a target."""
        image = self.writer.tokenizer.image
        placeholders = tokens.count(image)
        learns_an_image = any(flag for token, flag in zip(tokens, learn) if token == image)
        fits = placeholders == len(images) and len(learn) == len(tokens)
        if not fits or not any(learn[1:]) or learns_an_image or tokens[-1] == image:
            raise ValueError(
                f"a sample of {len(tokens)} tokens with {placeholders} <image>, "
                f"{len(images)} images, {len(learn)} in its mask, {sum(learn)} learnt"
            )
        first_token, first_shown = self.bin("tokens").rows, self.bin("shown").rows
        self.bin("samples").put([first_token, len(tokens), first_shown, len(images)])
        self.bin("tokens").put(tokens)
        self.bin("learn").put(learn)
        self.bin("shown").put(np.array(images, np.uint32))

    def whole_images(self):
        """The rows of the images that a killed run left together with all their frames, (n, 5)."""
        paths = {kind: self.path(f"{kind}.partial") for kind in ("images", "frames")}
        if not all(path.exists() for path in paths.values()):
            return np.zeros((0, 5), np.int64)
        written = np.fromfile(paths["images"], "uint32")
        images = written[: written.size // 5 * 5].reshape(-1, 5).astype(np.int64)
        frames = paths["frames"].stat().st_size // row_bytes("frames", self.writer.meta)
        return images[images[:, 0] + 1 + images[:, 1] * images[:, 2] <= frames]


class Writer:
    """Writes data/<name>. A source calls start() once it knows that its input is good, then
    split() and the split's methods; prepare() below calls finish().

    meta.json goes first and comes back last: while it is not there, readers refuse the folder."""

    def __init__(self, directory, source):
        self.directory, self.source = Path(directory), source
        self.skipped, self.splits = [], {}

    def start(self, tokenizer, image_format, template=None):
        """Forget what was prepared before. template: {"name", "system"} of conversations."""
        self.tokenizer, self.image_format = tokenizer, image_format
        self.directory.mkdir(parents=True, exist_ok=True)
        self.refuse_another_source()
        for name in ("meta.json", "gains.json"):
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
        """Raise UserError where the folder holds what another source made: its eval/ and all."""
        path = self.directory / "meta.json"
        if path.exists():
            found = read_json(path).get("source")
            if found != self.source:
                raise UserError(
                    f"{self.directory} was made by `data.py {found}`: give another --name, or "
                    "delete the folder"
                )

    def split(self, name):
        """The SplitWriter of a split, begun where it is not there yet."""
        if name not in self.splits:
            self.splits[name] = SplitWriter(self, name)
        return self.splits[name]

    def finish(self):
        """Give everything its name, meta.json last. Returns meta."""
        corpus = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode())
        self.meta["splits"] = {}
        for name, split in self.splits.items():
            counts = {"characters": split.characters, "lead": split.lead}
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
        self.forget_the_past()
        if self.skipped:
            with writing(self.directory / "skipped.txt") as file:
                file.write("\n".join(self.skipped).encode("utf-8"))
            print(f"{len(self.skipped)} images could not be read: {self.directory}/skipped.txt")
        self.meta["corpus"] = corpus.hexdigest()
        write_json(self.directory / "meta.json", self.meta)
        return self.meta

    def forget_the_past(self):
        """Remove what earlier preparations left: their logs, and features of other frames."""
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


def known_sources():
    return sorted(path.stem for path in (Path(__file__).parent / "sources").glob("[!_]*.py"))


def prepare(source, argv):
    """Run sources/<source>.py on its flags. Returns (folder, its meta). Raises UserError."""
    known = known_sources()
    if source not in known:
        raise UserError(f"{source or '(none)'}: no such source; python data.py {' | '.join(known)}")
    module = importlib.import_module(f"sources.{source}")
    settings = config.load(module.Config, argv, module.__doc__)
    if settings.name and (Path(settings.name).name != settings.name or settings.name == ".."):
        raise UserError(f"--name {settings.name}: want a plain name, to be a folder in data/")
    directory = Path("data") / (settings.name or source)
    with only_one(directory, "preparing data"):
        judge = None
        if importlib.import_module("sources").is_sifted(settings):
            judge = importlib.import_module("curate").open_judge(settings.curate)
        writer = Writer(directory, source)
        module.prepare(settings, writer)
        if judge:
            importlib.import_module("curate").sift(writer, settings, judge)
        return directory, writer.finish()


# ---------------------------------------------------------------------------------------------
# Reading what was prepared


class Data:
    """A prepared folder: `meta`, `tokenizer`, `image_format`, and the bins as memory maps.

    Raises UserError, with the command that makes it, for what is missing or does not fit."""

    def __init__(self, directory):
        self.directory = Path(directory)
        name = self.directory.name
        source = name if name in known_sources() else f"SOURCE --name {name}"
        path = self.directory / "meta.json"
        if not path.exists():
            half = any(self.directory.glob("*.partial")) or any(self.directory.glob("*.bin"))
            why = f"{self.directory} is half prepared" if half else f"no {path}"
            raise UserError(f"{why}: run `python data.py {source} ...` first")
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
            check_meta(self.meta, BINS)
            self.image_format = ImageFormat.parse(self.meta["images"])
            vocabulary = read_text(self.directory / "tokenizer.tiktoken")
            self.tokenizer = parse(vocabulary, self.meta["tokenizer"])
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path}: damaged, or tokenizer.tiktoken beside it ({error!r}): prepare it again"
            ) from None
        if self.tokenizer.digest() != self.meta["tokenizer_digest"]:
            raise UserError(
                f"{self.directory}: its tokenizer is not the one that made its bins: "
                f"remake it with `python data.py {self.meta['source']} --name {name}`"
            )

    def count(self, split, kind):
        """Rows of a bin, 0 where there is none; of "lead" the samples that are read first."""
        return self.meta["splits"].get(split, {}).get(kind, 0)

    def path(self, split, kind):
        return self.directory / f"{split}_{kind}.bin"

    def open(self, split, kind):
        """The bin as an np.memmap of its shape, read-only."""
        path = self.path(split, kind)
        if not self.count(split, kind):
            raise UserError(
                f"no {path}: {self.directory} was prepared without; see "
                f"`python data.py {self.meta['source']} --help`"
            )
        dtype, row_shape = bin_shape(kind, self.meta)
        return open_bin(path, dtype, (self.count(split, kind), *row_shape))

    def features_path(self, split, fingerprint):
        """Where the features are that a tower with this features.fingerprint makes of a split's
        frames: a name that follows from the frames and from all that is done to them."""
        frames = self.meta["splits"][split]["frames_digest"]
        how = hashlib.sha256(f"{self.image_format} {fingerprint}".encode()).hexdigest()
        return self.directory / "features" / f"{frames[:16]}_{how[:24]}.bin"


def open_bin(path, dtype, shape, remedy="prepare its folder again"):
    """An np.memmap of a file, read-only. Raises UserError, with the remedy, for another size."""
    expected = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize  # no overflow
    found = path.stat().st_size if path.exists() else 0
    if found != expected:
        raise UserError(f"{path}: {found:,} bytes, want {expected:,}: {remedy}")
    return np.memmap(path, dtype, "r", shape=shape)


def main(argv):
    if not argv or argv[0].startswith("-"):
        print(__doc__.strip())
        if not argv or argv[0] not in ("-h", "--help"):
            raise UserError("give a source: python data.py toy")
        return
    directory, meta = prepare(argv[0], argv[1:])
    print(
        f"{directory}: {meta['vocab_size']} tokens in the vocabulary, corpus {meta['corpus'][:12]}"
    )
    for split, counts in meta["splits"].items():
        kinds = ("text", "frames", "images", "samples")
        shown = [f"{counts[kind]:,} {kind}" for kind in kinds if counts.get(kind)]
        print(f"  {split:5}", ", ".join(shown))


if __name__ == "__main__":
    config.run(main)
