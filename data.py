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
import shutil
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
from config import UserError
from files import only_one, write_json, writing
from images import ImageFormat, read_all
from tokenizer import Tokenizer, caption_sample

FORMAT = 2  # of data/<name>; readers refuse another
# What a row of each bin is: type and shape. "token" is uint16, or uint32 for large vocabularies.
BINS = {
    "text": ("token", ()),  # utterances, each closed by <eos>, end to end: phase 0
    "frames": ("uint8", ("S", "S", 3)),  # pictures, or tiles of pictures
    "clips": ("uint32", ()),  # of each frame: frames of one clip share a number; numbers rise
    "images": ("uint32", (5,)),  # first frame, tile rows, columns (0: none), original width, height
    "tokens": ("token", ()),  # every sample's tokens, one <image> where an image stands
    "learn": ("uint8", ()),  # of each token: 1 where it is a target
    "shown": ("uint32", ()),  # the images a sample shows, in the order of its <image>s
    "samples": ("uint64", (4,)),  # first token, tokens, first of `shown`, images
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
        self.file.write(content)
        self.sha256.update(content)
        self.rows += len(content) // self.row_bytes

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class SplitWriter:
    """One split of a corpus: text, images and samples, in any order."""

    def __init__(self, writer, name):
        self.writer, self.name, self.bins, self.characters = writer, name, {}, 0
        self.last_clip = 0

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

    def image(self, frame, clip, original=None):
        """Add a picture that is one frame (S, S, 3) of clip number `clip`, and return its number.
        Clip numbers may not fall: their frames stand side by side. original: the picture's
        (width, height) before it became a frame."""
        if clip < self.last_clip:
            raise ValueError(f"clip {clip} after clip {self.last_clip}: their numbers must rise")
        self.last_clip = clip
        self.bin("images").put([self.bin("frames").rows, 0, 0, *(original or frame.shape[1::-1])])
        self.bin("frames").put(frame)
        self.bin("clips").put(clip)
        return self.bins["images"].rows - 1

    def sample(self, tokens, learn, images=()):
        """Add a sample: tokens, the mask of those that are learnt, and the numbers of the images
        that its <image>s show."""
        placeholders = tokens.count(self.writer.tokenizer.image)
        if placeholders != len(images) or len(learn) != len(tokens) or not any(learn[1:]):
            raise ValueError(
                f"a sample of {len(tokens)} tokens with {placeholders} <image>, "
                f"{len(images)} images, {len(learn)} in its mask, {sum(learn)} learnt"
            )
        first_token, first_shown = self.bin("tokens").rows, self.bin("shown").rows
        self.bin("samples").put([first_token, len(tokens), first_shown, len(images)])
        self.bin("tokens").put(tokens)
        self.bin("learn").put(learn)
        self.bin("shown").put(np.array(images, np.uint32))

    def read_images(self, locations, clips, labels, max_skipped):
        """Read pictures on all cores and add them; yield each one's number, None for one that
        cannot be read. What a run that was killed has read is not read again.

        locations: as images.Places finds them; labels: a line's beginning that says where a
        location was named. Raises UserError above a share of `max_skipped` unreadable ones."""
        log_path = self.path("reading.log")
        done, skipped = self.resume(log_path, locations, labels)
        with ExitStack() as stack:
            log = stack.enter_context(open(log_path, "a", encoding="utf-8", buffering=1))
            number = 0
            for row in range(done):
                self.bin("clips").put([] if row in skipped else clips[row])
                yield None if row in skipped else number
                number += row not in skipped
            answers = stack.enter_context(
                closing(read_all(locations[done:], self.writer.image_format))
            )
            bar = tqdm(answers, f"{self.name} images", len(locations), initial=done, unit="image")
            for row, answer in enumerate(bar, done):
                if not isinstance(answer, str):
                    frame, original = answer
                    number = self.image(frame, clips[row], original)
                    for kind in ("images", "frames"):  # what a kill must not take
                        self.bins[kind].file.flush()
                    yield number
                    continue
                skipped[row] = labels[row] + answer
                log.write(f"{row}\t{skipped[row]}\n")
                if len(skipped) > max_skipped * len(locations):
                    raise UserError(
                        f"{skipped[row]}; {len(skipped)} such of {len(locations)}, "
                        f"over max_skipped {max_skipped:g}"
                    )
                yield None
        self.writer.skipped += [skipped[row] for row in sorted(skipped)]

    def resume(self, log_path, locations, labels):
        """(rows done, {row: why} of those skipped) of a killed run that read the same pictures in
        the same way; else (0, {}), and a new log. The log's first line says which pictures."""
        key = hashlib.sha256(repr(self.writer.image_format).encode())
        for location, label in zip(locations, labels):
            key.update(f"{location!r} {label}\n".encode())
        lines = log_path.read_text(encoding="utf-8").splitlines() if log_path.exists() else []
        if lines[:1] != [key.hexdigest()]:
            for kind in ("frames", "images"):  # of other pictures, or made in another way
                self.path(f"{kind}.partial").unlink(missing_ok=True)
            with writing(log_path) as file:
                file.write(f"{key.hexdigest()}\n".encode())
            return 0, {}
        entries = [line.partition("\t") for line in lines[1:]]
        skipped = {int(row): why for row, tab, why in entries if tab}
        kept = min(self.rows_on_disk(kind) for kind in ("frames", "images"))
        done, left = 0, kept
        while done < len(locations) and (left or done in skipped):
            left -= done not in skipped
            done += 1
        for kind in ("frames", "images"):
            self.bin(kind, keep_rows=kept - left)
        return done, {row: why for row, why in skipped.items() if row < done}

    def rows_on_disk(self, kind):
        """Whole rows of what a killed run left of a bin."""
        path = self.path(f"{kind}.partial")
        return path.stat().st_size // row_bytes(kind, self.writer.meta) if path.exists() else 0


class Writer:
    """Writes data/<name>. A source calls start() once it knows that its input is good, then
    split() and the split's methods; prepare() below calls finish().

    meta.json goes first and comes back last: while it is not there, readers refuse the folder."""

    def __init__(self, directory, source):
        self.directory, self.source = Path(directory), source
        self.skipped, self.splits = [], {}

    def start(self, tokenizer, image_format):
        self.tokenizer, self.image_format = tokenizer, image_format
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "meta.json").unlink(missing_ok=True)
        for path in self.directory.glob("*.bin"):
            path.unlink()
        shutil.rmtree(self.directory / "eval", ignore_errors=True)
        self.meta = {
            "format": FORMAT,
            "source": self.source,
            "tokenizer": tokenizer.kind,
            "tokenizer_digest": tokenizer.digest(),
            "vocab_size": tokenizer.vocab_size,
            "images": asdict(image_format),
        }

    def split(self, name):
        self.splits[name] = SplitWriter(self, name)
        return self.splits[name]

    def finish(self):
        """Give everything its name, meta.json last. Returns meta."""
        corpus = hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode())
        self.meta["splits"] = {}
        for name, split in self.splits.items():
            counts = self.meta["splits"][name] = {"characters": split.characters}
            for kind, written in split.bins.items():
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
        writer = Writer(directory, source)
        module.prepare(settings, writer)
        return directory, writer.finish()


# ---------------------------------------------------------------------------------------------
# What sources share


@dataclass
class Captioned:
    """A picture and what is said over it: where it is (see images.Places), the clip it belongs
    to, its captions, and what to put before a complaint about it."""

    location: object
    clip: int
    captions: list
    label: str


def hold_out(items, key=None):
    """{"train", "val"} of items in order: of each hundred stretches every tenth is for validation;
    of fewer than ten items, none.

    Neighbours in a video stay together, and all ages of a child are in both parts. Items with
    the same key(item), where one is given, are in the same part."""
    key_of = [i if key is None else key(item) for i, item in enumerate(items)]
    keys = list(dict.fromkeys(key_of))
    stretches = min(100, len(keys))
    in_val = {k for i, k in enumerate(keys) if i * stretches // len(keys) % 10 == 9}
    parts = {"train": [], "val": []}
    for item, k in zip(items, key_of):
        parts["val" if k in in_val else "train"].append(item)
    return parts


def keep_out(validation, lines):
    """Lines without those that are said, word for word, over a validation picture: phase 0 must
    not learn by heart what phase 2 is asked."""
    validation = set(validation)
    kept = [line for line in lines if line not in validation]
    if len(kept) < len(lines):
        print(f"{len(lines) - len(kept)} lines are validation captions, and left out of the text")
    return kept


def make_tokenizer(config, lines):
    """A source's tokenizer: of the words in --vocab, else BPE learnt from the training lines."""
    if config.vocab:
        return Tokenizer.of_words(config.vocab)
    return Tokenizer.train(lines, config.vocab_size)


def write_captioned(writer, split, text, pictures, max_skipped):
    """Write a split of utterances and Captioned pictures; see SplitWriter.read_images."""
    part = writer.split(split)
    part.text(text)
    if not pictures:
        return
    fields = [[getattr(p, field) for p in pictures] for field in ("location", "clip", "label")]
    numbers = part.read_images(*fields, max_skipped)
    for number, picture in zip(numbers, pictures):
        if number is not None:
            for caption in picture.captions:
                part.sample(*caption_sample(writer.tokenizer, caption), [number])


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
        self.meta = json.loads(path.read_text(encoding="utf-8"))
        if self.meta["format"] != FORMAT:
            command = f"python data.py {self.meta['source']} --name {name}"
            raise UserError(
                f"{self.directory}: format {self.meta['format']}, this version reads "
                f"{FORMAT}: remake it with `{command} ...`"
            )
        ranks = (self.directory / "tokenizer.tiktoken").read_text()
        self.tokenizer = Tokenizer.parse(ranks, self.meta["tokenizer"])
        if self.tokenizer.digest() != self.meta["tokenizer_digest"]:
            raise UserError(
                f"{self.directory}: its tokenizer is not the one that made its bins: "
                f"remake it with `python data.py {self.meta['source']} --name {name}`"
            )
        self.image_format = ImageFormat.parse(self.meta["images"])

    def count(self, split, kind):
        """Rows of a bin; 0 where there is none."""
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
        """Where the features are that a tower with this vision.fingerprint makes of a split's
        frames: a name that follows from the frames and from all that is done to them."""
        frames = self.meta["splits"][split]["frames_digest"]
        how = hashlib.sha256(f"{self.image_format} {fingerprint}".encode()).hexdigest()
        return self.directory / "features" / f"{frames[:16]}_{how[:24]}.bin"


def open_bin(path, dtype, shape):
    """An np.memmap of a file, read-only. Raises UserError where its size is another."""
    expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.exists() else 0
    if found != expected:
        raise UserError(f"{path}: {found:,} bytes, want {expected:,}: prepare it again")
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
