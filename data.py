"""
From what a child saw and heard to flat files that training maps into memory.

    python data.py toy                                        # draw the toy world -> data/toy
    python data.py toy --name photos --sprites DIR            # the same of your transparent PNGs
    python data.py pairs --csv FILE --images DIR --text FILE  # your captioned pictures and speech
    python data.py pairs --name speech --text FILE            # speech alone: enough for phase 0
    python data.py saycam --frames frames.zip --annotations train.json val.json test.json

data/<name>/ then holds meta.json (what is what, and how many), tokenizer.tiktoken, and for each
split the bins: text (uint16 tokens), frames (uint8 N, S, S, 3), clips (uint32 N: frames of one
moment share a number), captions (uint16 tokens) and pairs (uint32 M, 3: frame, first token,
tokens); features (float16 N, P, E) follow from phase 0's eye. All are opened with np.memmap, none
is ever held in memory. Nothing here knows a network.
"""
import base64
import csv
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from PIL import Image, ImageOps
from tqdm import tqdm

import configs
import toyworld

FORMAT = 1  # of data/<name>; readers refuse another


@dataclass
class Config:
    source: str = "toy"  # toy: draw the toy world; pairs: pictures and words; saycam: video frames
    name: str = ""  # write to data/<name>; empty: the source's own name
    size: int = 0  # S: frames are S x S pixels; 0: 224 for saycam, else 64
    vocab_size: int = 0  # BPE tokens, specials included; 0: 512 for the toy world, else 6000
    vocab: str = ""  # a {"word": id} JSON: word-level tokens of these words instead of BPE
    seed: int = 1  # the same seed draws the same bytes on every machine
    scenes: int = 3000  # toy: training scenes to film; validation films a tenth as many
    clip: int = 4  # toy: frames filmed of each scene
    lines: int = 20000  # toy: utterances of language alone, for phase 0
    trials: float = 1.0  # toy: 1 makes 320 Labeled-S trials, 560 VTWT, some 290 Winoground ...
    sprites: str = ""  # toy: a folder of transparent PNGs to draw instead of the drawn things
    csv: str = ""  # pairs: a CSV file with columns image and caption, one pair a row
    images: str = ""  # pairs: the folder its image names are in
    text: str = ""  # pairs: transcripts, one utterance a line; empty: the captions are all there is
    frames: str = ""  # saycam: a folder of JPEGs or a zip of them, whatever the zip is called
    annotations: str = ""  # saycam: JSON files of CVCL or BabyLLaVA; train, val, test by name
    frames_per_utterance: int = 0  # saycam: so many, evenly spread; 0: all there are
    min_similarity: float = 0.0  # saycam: only frames whose "similarity" is above this; 0: all
    max_skipped: float = 0.01  # pairs, saycam: the largest share of unreadable images to go on with


class DataError(Exception):
    """Something a user can put right; its text is one line that says how."""


# ---------------------------------------------------------------------------------------------
# Tokenizer

# Words with the space before them, numbers, punctuation, other space. Plain \w and \d, because
# Python's re (which counts) and tiktoken's regex (which encodes) both know them.
PATTERN = r" ?[^\W\d_]+| ?\d+| ?[^\s\w]+| ?_+|\s+"
SPECIALS = ("<pad>", "<eos>", "<image>")


def train_bpe(counts, merges):
    """Byte-pair encoding learnt from {word: count}: {bytes: rank}, 256 + `merges` at most.

    Works on distinct words, each merge touching only the words it occurs in; a heap holds the
    pairs, stale entries are dropped when they surface. Ties go to the smaller ids. Stops early
    when no pair occurs twice. (Sennrich et al. 2016, arXiv 1508.07909.)"""
    vocabulary = [bytes([i]) for i in range(256)]
    words = [list(word.encode("utf-8")) for word in counts]
    weights = list(counts.values())
    pairs, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weights[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(vocabulary) < 256 + merges and heap:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue  # stale: the pair was counted anew since
        if -count < 2:
            break
        new = len(vocabulary)
        vocabulary.append(vocabulary[pair[0]] + vocabulary[pair[1]])
        changed = Counter()
        for i in where.pop(pair):
            word, merged, k = words[i], [], 0
            while k < len(word):
                both = tuple(word[k:k + 2]) == pair
                merged.append(new if both else word[k])
                k += 2 if both else 1
            for old in zip(word, word[1:]):
                changed[old] -= weights[i]
            for now in zip(merged, merged[1:]):
                changed[now] += weights[i]
                where[now].add(i)
            words[i] = merged
        for other, difference in changed.items():
            if difference:
                pairs[other] += difference
                heapq.heappush(heap, (-pairs[other], other))
        pairs.pop(pair)
    return {token: rank for rank, token in enumerate(vocabulary)}


class Tokenizer:
    """Text <-> ids. `ranks` {bytes: id}; kind "bpe" (tiktoken does the work) or "word".

    Specials come after the ranks. Text can never produce one: "<eos>" in a transcript is five
    characters. BPE gives back exactly the text it was given; words outside a word-level
    vocabulary become <unk>, which that vocabulary must hold. A space is put before the text, and
    taken off again, so that a word is the same token at the start of a line as within it: the
    tests ask for single words, which must be the ones that were learnt in sentences."""

    def __init__(self, ranks, kind="bpe"):
        self.ranks, self.kind = ranks, kind
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
        self.pad, self.eos, self.image = specials.values()
        self.vocab_size = len(ranks) + len(specials)
        if kind == "bpe":
            self.encoding = tiktoken.Encoding("nanobabyllava", pat_str=PATTERN,
                                              mergeable_ranks=ranks, special_tokens=specials)
        else:
            self.words = {token.decode("utf-8"): i for token, i in ranks.items()}
            self.spelling = {i: word for word, i in self.words.items()}

    def encode(self, text):
        if self.kind == "bpe":
            return self.encoding.encode_ordinary(" " + text) if text else []
        return [self.words.get(word, self.words["<unk>"]) for word in text.split()]

    def decode(self, tokens):
        """Text of ids; specials are left out."""
        tokens = [int(t) for t in tokens if t < len(self.ranks)]
        if self.kind == "bpe":
            return self.encoding.decode(tokens).removeprefix(" ")
        return " ".join(self.spelling[t] for t in tokens)

    @classmethod
    def train(cls, lines, vocab_size):
        """BPE of `vocab_size` ids, specials included, from an iterable of lines."""
        counts = Counter()
        for line in lines:
            counts.update(re.findall(PATTERN, " " + line))
        return cls(train_bpe(counts, vocab_size - 256 - len(SPECIALS)))

    @classmethod
    def of_words(cls, path):
        """Word-level from a {"word": id} file, ids kept; its own <pad> and <eos> go unused."""
        words = json.loads(Path(path).read_text(encoding="utf-8"))
        if sorted(words.values()) != list(range(len(words))) or "<unk>" not in words:
            raise DataError(f"{path}: want {{word: id}} with ids 0 to n - 1 and an <unk>")
        return cls({word.encode("utf-8"): i for word, i in words.items()}, "word")

    def dump(self):
        """The ranks in tiktoken's text form: a line of base64 and rank for each token."""
        return "".join(f"{base64.b64encode(token).decode()} {rank}\n"
                       for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]))

    @classmethod
    def parse(cls, text, kind):
        lines = (line.split() for line in text.splitlines())
        return cls({base64.b64decode(token): int(rank) for token, rank in lines}, kind)


# ---------------------------------------------------------------------------------------------
# Files


@contextmanager
def continuing(path):
    """Like writing(), but what an interrupted run wrote stays beside it, to be added to. While
    there is a log of what was skipped, the run has not ended, even if this file had."""
    partial = path.with_suffix(".partial")
    if path.exists() and path.with_suffix(".skipped").exists():
        os.replace(path, partial)
    with open(partial, "ab") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def writing(path):
    """A binary file that appears at `path` whole or not at all, also when the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with writing(path) as file:
        file.write(json.dumps(value, indent=1).encode("utf-8"))


def write_csv(path, header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    with writing(path) as file:
        file.write(text.getvalue().encode("utf-8"))


def read_csv(path, columns):
    """(line number, row) for each row. One-line errors for a missing file, column, or no rows."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lacking = [c for c in columns if c not in (reader.fieldnames or [])]
            if lacking:
                raise DataError(f"{path}:1: no column {', '.join(lacking)}; the header is "
                                f"{','.join(reader.fieldnames or ['(empty)'])}")
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    for line, row in rows:
        if any(not row[c] for c in columns):
            raise DataError(f"{path}:{line}: empty {next(c for c in columns if not row[c])}")
    if not rows:
        raise DataError(f"{path}: no rows below the header")
    return rows


def read_image(path, size, file=None):
    """A picture file as (size, size, 3) uint8: what the eye is shown, in preparing as in sampling.

    `file`: the opened picture, where `path` is only its name. Turned as its EXIF says; 16-bit,
    grey, palette, CMYK all become RGB and transparency white; resized bilinearly, not cropped.
    Raises DataError when there is no whole picture to read."""
    try:
        with Image.open(file or path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except (FileNotFoundError, NotADirectoryError):  # the latter: not in the zip
        raise DataError(f"{path}: no such image") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not a picture that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read whole ({error})") from None
    if image.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255, not scale
        image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


# ---------------------------------------------------------------------------------------------
# Reading what was prepared

BINS = {"text": ("uint16", ()), "frames": ("uint8", ("S", "S", 3)), "clips": ("uint32", ()),
        "captions": ("uint16", ()), "pairs": ("uint32", (3,)), "features": ("float16", ("P", "E"))}


class Data:
    """A prepared folder: `meta`, `tokenizer`, and the bins as memory maps.

    Raises DataError, with the command that makes it, for what is missing or of another size."""

    def __init__(self, directory):
        self.directory = Path(directory)
        try:
            self.meta = json.loads((self.directory / "meta.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            name = self.directory.name
            source = "toy" if name == "toy" else f"pairs --name {name} --csv FILE --images DIR"
            if name == "saycam":
                source = "saycam --frames ZIP --annotations train.json val.json test.json"
            raise DataError(f"no {self.directory}/meta.json: run `python data.py {source}` "
                            "first") from None
        if self.meta["format"] != FORMAT:
            raise DataError(f"{self.directory}: format {self.meta['format']}, this version reads "
                            f"{FORMAT}: prepare it again with data.py")
        ranks = (self.directory / "tokenizer.tiktoken").read_text()
        self.tokenizer = Tokenizer.parse(ranks, self.meta["tokenizer"])

    def count(self, split, kind):
        return self.meta["splits"][split].get(kind, 0)

    def path(self, split, kind):
        return self.directory / f"{split}_{kind}.bin"

    def open(self, split, kind):
        """The bin as an np.memmap of its shape, read-only."""
        path, (dtype, shape) = self.path(split, kind), BINS[kind]
        if not self.count(split, kind):
            how = "--text FILE" if kind == "text" else "--csv FILE --images DIR"
            raise DataError(f"no {path}: prepare {self.directory} with data.py and {how}")
        shape = (self.count(split, kind), *(self.meta.get(n, n) for n in shape))
        expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != expected:
            found = f"{path.stat().st_size} bytes" if path.exists() else "no file"
            raise DataError(f"{path}: {found}, but meta.json says {expected} bytes "
                            f"{shape}: prepare {self.directory} again")
        return np.memmap(path, dtype, "r", shape=shape)

    def write_features(self, split, blocks, tower, shape):
        """Append float16 blocks (n, P, E) until all frames have theirs, then enter them in meta.

        What an interrupted run wrote for this same `tower` (a sha256) is kept: `blocks(start)`
        is asked for the rest from frame `start` on. shape is (P, E)."""
        row = int(np.prod(shape)) * 2
        partial = self.path(split, "features").with_suffix(f".{tower[:12]}.partial")
        start = partial.stat().st_size // row if partial.exists() else 0
        with open(partial, "r+b" if start else "wb") as file:
            file.truncate(start * row)  # a row that was cut short is written again
            file.seek(0, os.SEEK_END)
            for block in blocks(start):
                file.write(np.ascontiguousarray(block, np.float16))
            file.flush()
            os.fsync(file.fileno())
        self.meta["splits"][split].pop("features", None)
        if self.meta.get("tower") != tower:  # the other split's features, if any, are stale now
            for counts in self.meta["splits"].values():
                counts.pop("features", None)
        self.meta |= {"P": shape[0], "E": shape[1], "tower": tower}
        os.replace(partial, self.path(split, "features"))
        self.meta["splits"][split]["features"] = self.count(split, "frames")
        write_json(self.directory / "meta.json", self.meta)


# ---------------------------------------------------------------------------------------------
# Batches with a position: what batch number `step` holds is a pure function of (seed, step), so a
# resumed run sees what it would have seen, and validation cannot disturb training.


class Order:
    """An endless shuffled deck of 0 .. n - 1: each pass is a fresh permutation of all of them."""

    def __init__(self, n, seed):
        self.n, self.seed, self.decks = n, seed, {}

    def __call__(self, start, count):
        """Cards number start .. start + count - 1 of the endless deck."""
        positions = np.arange(start, start + count)
        wanted = {int(p) // self.n for p in positions}
        self.decks = {deck: self.decks[deck] if deck in self.decks else
                      np.random.RandomState([self.seed, deck]).permutation(self.n)
                      for deck in wanted}  # one deck, or two where a batch spans the passes
        return np.array([self.decks[int(p) // self.n][int(p) % self.n] for p in positions])


class TextBatches:
    """(tokens, targets), each (n, T) int64, from one long stream of utterances."""

    def __init__(self, data, split, T, seed=0):
        self.bin, self.T = data.open(split, "text"), min(T, data.count(split, "text") - 2)
        if self.T < 1:
            raise DataError(f"{data.path(split, 'text')}: {len(self.bin)} tokens are too few")
        self.order = Order((len(self.bin) - 1) // self.T, seed)
        self.tokens = self.order.n * self.T  # in one pass

    def __len__(self):
        return self.order.n

    def __call__(self, start, count, shuffle=True):
        rows = self.order(start, count) if shuffle else np.arange(start, start + count)
        x = np.stack([self.bin[r * self.T:r * self.T + self.T + 1] for r in rows]).astype(np.int64)
        return x[:, :-1], x[:, 1:]


class PairBatches:
    """(tokens, targets, features): image placeholders, then the caption and <eos>.

    tokens and targets (n, T) int64, targets -100 wherever no caption token is to be said: the
    last image position is the first that says one. features (n, P, E) float16. Every row has
    exactly P placeholders and T is the same for all batches, so shapes are static."""

    def __init__(self, data, split, block_size, seed=0):
        self.pairs, self.captions = data.open(split, "pairs"), data.open(split, "captions")
        self.features, self.tokenizer = data.open(split, "features"), data.tokenizer
        self.P, longest = data.meta["P"], data.meta["longest_caption"]
        self.T = self.P + longest
        if self.T > block_size:
            raise DataError(f"{data.directory}: {self.P} image tokens and a caption of {longest} "
                            f"make {self.T}, over block_size {block_size}: raise block_size or "
                            "shorten the captions")
        self.order = Order(len(self.pairs), seed)

    def __len__(self):
        return self.order.n

    def __call__(self, start, count, shuffle=True):
        rows = self.order(start, count) if shuffle else np.arange(start, start + count)
        frames, firsts, lengths = self.pairs[rows].astype(np.int64).T
        stream = np.full((count, self.T + 1), self.tokenizer.pad, np.int64)
        stream[:, :self.P] = self.tokenizer.image
        targets = np.full((count, self.T + 1), -100, np.int64)
        for row, (first, length) in enumerate(zip(firsts, lengths)):
            words = slice(self.P, self.P + length)
            stream[row, words] = targets[row, words] = self.captions[first:first + length]
        return stream[:, :-1], targets[:, 1:], self.features[frames]


class ClipBatches:
    """(frames, others), each (n, S, S, 3) uint8: two different moments of one clip, or the same
    frame twice where a clip has only one."""

    def __init__(self, data, split, seed=0):
        self.frames, self.clips = data.open(split, "frames"), data.open(split, "clips")
        self.order = Order(len(self.frames), seed)

    def __len__(self):
        return self.order.n

    def __call__(self, start, count):
        rows = self.order(start, count)
        first = np.searchsorted(self.clips, self.clips[rows], "left")
        length = np.searchsorted(self.clips, self.clips[rows], "right") - first
        chance = np.arange(start, start + count) * 2654435761 >> 8  # Knuth's multiplicative hash
        others = first + (rows - first + 1 + chance % np.maximum(length - 1, 1)) % length
        return self.frames[rows], self.frames[others]


# ---------------------------------------------------------------------------------------------
# Preparing


def prepare(directory, config, splits):
    """Write data/<name>, all but evaluation trials. Returns meta.

    splits {"train" | "val": (text, frames, total)}: text() yields utterances; frames() yields
    (frame (S, S, 3) uint8, clip number, list of captions), about `total` of them; total 0 is
    speech alone. A frame None is in the bin already, from a run that was stopped. The tokenizer
    learns from the training text only."""
    if config.vocab:
        tokenizer = Tokenizer.of_words(config.vocab)
    else:
        tokenizer = Tokenizer.train(splits["train"][0](), config.vocab_size or 6000)
    directory.mkdir(parents=True, exist_ok=True)
    with writing(directory / "tokenizer.tiktoken") as file:
        file.write(tokenizer.dump().encode())
    meta = {"format": FORMAT, "source": config.source, "S": config.size, "P": 0, "E": 0,
            "dtype": "float16", "tower": None, "tokenizer": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size, "longest_caption": 0, "splits": {},
            "specials": dict(zip(SPECIALS, (tokenizer.pad, tokenizer.eos, tokenizer.image)))}
    for split, (text, frames, total) in splits.items():
        kinds = ("text", "frames", "clips", "captions", "pairs")[:5 if total else 1]
        counts = meta["splits"][split] = {kind: 0 for kind in (*kinds, "characters")}
        with ExitStack() as stack:
            files = {kind: stack.enter_context(
                (continuing if kind == "frames" and config.source != "toy" else writing)(
                    directory / f"{split}_{kind}.bin")) for kind in kinds}

            def put(kind, values):  # values: one row, but for the token bins, where one is a row
                values = np.ascontiguousarray(values, BINS[kind][0])
                files[kind].write(values.tobytes())
                counts[kind] += values.size if kind in ("text", "captions") else 1

            for line in text():
                put("text", tokenizer.encode(line) + [tokenizer.eos])
                counts["characters"] += len(line) + 1  # and the line's end
            for frame, clip, captions in tqdm(frames() if total else (), f"{split} frames",
                                              total, unit="frame", disable=not total):
                for caption in captions:
                    tokens = tokenizer.encode(caption) + [tokenizer.eos]
                    put("pairs", (counts["frames"], counts["captions"], len(tokens)))
                    put("captions", tokens)
                    meta["longest_caption"] = max(meta["longest_caption"], len(tokens))
                if frame is not None:
                    files["frames"].write(frame.tobytes())
                counts["frames"] += 1
                put("clips", clip)
    write_json(directory / "meta.json", meta)
    return meta


def prepare_toy(config, directory):
    """Film the toy world: `scenes` clips to train on, a tenth to validate on, and the trials."""
    kinds = load_sprites(Path(config.sprites)) if config.sprites else toyworld.THINGS
    config.vocab_size = config.vocab_size or 512
    splits = {}
    for split, seed, share in (("train", 0, 1), ("val", 1, 10)):
        def text(seed=seed, lines=max(1, config.lines // share)):
            rng = np.random.RandomState([config.seed, seed, 0])
            for _ in range(lines):
                yield toyworld.utterance(toyworld.random_scene(rng, kinds), rng, routine=30)

        def frames(seed=seed, scenes=max(1, config.scenes // share)):
            rng = np.random.RandomState([config.seed, seed, 1])
            for clip in range(scenes):
                scene = toyworld.random_scene(rng, kinds)
                for _ in range(config.clip):
                    frame = toyworld.film(scene, rng, config.size, kinds)
                    yield frame, clip, [toyworld.utterance(scene, rng) for _ in range(2)]

        splits[split] = text, frames, max(1, config.scenes // share) * config.clip
    rng = np.random.RandomState([config.seed, 2])
    tables, images = toyworld.evaluation(rng, config.size, kinds, config.trials)
    for name, frame in tqdm(images.items(), "trials", unit="image", mininterval=1):
        path = directory / "eval" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(path)
    for name, (header, rows) in tables.items():
        write_csv(directory / "eval" / f"{name}.csv", header, rows)
    return prepare(directory, config, splits)


def load_sprites(directory):
    """{name: RGBA image} from transparent PNGs; the name is the first sentence of the .txt beside
    the PNG ("A green apple." -> "green apple"), else the file's. Pictures with no transparency
    (backgrounds, not things) and names of over three words are passed over."""
    sprites = {}
    for path in sorted(directory.rglob("*.png")):
        text = path.with_suffix(".txt")
        title = re.sub("[_-]", " ", path.stem) if not text.exists() else \
            text.read_text(encoding="utf-8", errors="replace")
        words = re.split(r"[.!?(\n]", title.lower())[0].split()
        name = " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words)
        with Image.open(path) as image:
            image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getbbox() and alpha.getextrema()[0] == 0 and 0 < len(name.split()) <= 3:
            image = image.crop(alpha.getbbox())
            image.thumbnail((160, 160))
            sprites.setdefault(name, image)
    if len(sprites) < 8:
        raise DataError(f"{directory}: {len(sprites)} transparent PNGs with a short name; the "
                        "trials need at least 8 things to tell apart")
    return sprites


def part(items, split):
    """Of each hundred stretches of items in order, every tenth is for validation: neighbours in a
    video stay together, and all ages of a child are in both parts."""
    stretches = min(100, len(items))
    return [item for i, item in enumerate(items)
            if (i * stretches // len(items) % 10 == 9) == (split == "val")]


def resume_point(path, key, rows, row_bytes):
    """(rows done, {row: why} of those skipped) of an interrupted run with the same `key`, else
    (0, {}). The log names each skipped row; the rest are in the partial bin, in order."""
    partial, log, bad = path.with_suffix(".partial"), path.with_suffix(".skipped"), {}
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if lines[:1] == [key]:
        bad = {int(row): why for row, tab, why in (line.partition("\t") for line in lines) if tab}
    else:
        os.truncate(partial, 0)
    whole, done = partial.stat().st_size // row_bytes, 0
    os.truncate(partial, whole * row_bytes)  # a row cut short is read again
    while done < rows and (whole or done in bad):
        whole -= done not in bad
        done += 1  # a kill may have lost the last rows: skips after those are found again
    return done, {row: why for row, why in bad.items() if row < done}


def read_frame(job):
    """A frame (S, S, 3), or a line that says why there is none. Runs in a process of its own."""
    where, size = job
    try:
        if not isinstance(where, tuple):
            return read_image(where, size)
        archive, name, offset, length, method = where
        with open(archive, "rb") as file:
            file.seek(offset + 26)  # the local header: 30 bytes, of which the last are the lengths
            name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
            file.seek(name_length + extra_length, os.SEEK_CUR)
            content = file.read(length)
        content = zlib.decompress(content, -15) if method == zipfile.ZIP_DEFLATED else content
        return read_image(name, size, io.BytesIO(content))
    except (DataError, zlib.error) as error:
        return str(error) if isinstance(error, DataError) else f"{where[1]}: {error}"


def read_frames(directory, split, rows, config):
    """Yield what prepare() takes, for rows (label, where, clip, caption), on all cores.

    Those that an interrupted run wrote are not read again. Those that cannot be read are logged
    with their label; above max_skipped of them that is a DataError."""
    path, key = directory / f"{split}_frames.bin", hashlib.sha256(str(config.size).encode())
    for row in rows:
        key.update(repr(row).encode())
    done, bad = resume_point(path, key.hexdigest(), len(rows), 3 * config.size ** 2)
    with writing(path.with_suffix(".skipped")) as log:
        lines = [key.hexdigest(), *(f"{i}\t{why}" for i, why in bad.items()), ""]
        log.write("\n".join(lines).encode("utf-8"))
    yield from ((None, clip, [said]) for i, (_, _, clip, said) in enumerate(rows[:done])
                if i not in bad)
    with open(path.with_suffix(".skipped"), "a", encoding="utf-8", buffering=1) as log, \
            multiprocessing.Pool() as pool:
        for start in range(done, len(rows), 512):  # so many frames in memory at most
            jobs = [(where, config.size) for _, where, _, _ in rows[start:start + 512]]
            for i, frame in enumerate(pool.imap(read_frame, jobs, 8), start):
                label, _, clip, said = rows[i]
                if not isinstance(frame, str):
                    yield frame, clip, [said]
                    continue
                bad[i] = label + frame
                log.write(f"{i}\t{bad[i]}\n")
                if len(bad) > config.max_skipped * len(rows):
                    raise DataError(f"{bad[i]}; {len(bad)} such of {len(rows)}, over max_skipped "
                                    f"{config.max_skipped:g}")


def prepare_rows(directory, config, text, rows):
    """prepare() for text {split: utterances} and rows {split: [(label, where, clip, caption)]}."""
    directory.mkdir(parents=True, exist_ok=True)
    meta = prepare(directory, config, {
        split: (lambda split=split: text[split],
                lambda split=split: read_frames(directory, split, rows[split], config),
                len(rows[split])) for split in text})
    logs = [log for split in text if (log := directory / f"{split}_frames.skipped").exists()]
    skipped = [line.partition("\t")[2] for log in logs
               for line in log.read_text(encoding="utf-8").splitlines()[1:]]
    (directory / "skipped.txt").unlink(missing_ok=True)
    if skipped:
        with writing(directory / "skipped.txt") as file:
            file.write("\n".join(skipped).encode("utf-8"))
        print(f"{len(skipped)} images could not be read: {directory}/skipped.txt")
    for log in logs:  # the last thing: now the run has ended
        log.unlink()
    return meta


def prepare_pairs(config, directory):
    """Anybody's captioned pictures (--csv, --images) and transcripts (--text), either or both."""
    if not (config.csv or config.text):
        raise DataError("pairs: give --csv FILE --images DIR, or --text FILE, or both")
    rows = read_csv(config.csv, ("image", "caption")) if config.csv else []
    if config.text:
        try:
            lines = Path(config.text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{config.text}: not a text file in UTF-8 ({error})") from None
        lines = [line.strip() for line in lines if line.strip()]
    else:
        lines = [row["caption"] for _, row in rows]
    if len(lines) < 10:
        raise DataError(f"{config.text or config.csv}: {len(lines)} utterances; need at least 10")
    rows = [(f"{config.csv}:{line}: ", os.path.join(config.images, row["image"]), clip,
             row["caption"]) for clip, (line, row) in enumerate(rows)]
    text, rows = ({split: part(items, split) for split in ("train", "val")}
                  for items in (lines, rows))
    return prepare_rows(directory, config, text, rows)


# ---- SAYCam: 600,285 frames of a head camera, 37,486 utterances, under an agreement of Databrary's


def read_annotations(path):
    """[(utterance, frame names, their similarities or None)] of a JSON in one of three forms:

    CVCL's {"data": [{"utterance", "frame_filenames", ...}]}; LLaVA's [{"image": name or names,
    "conversations"}]; or a list of utterances without pictures, BabyLLaVA's transcripts."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    rows = content.get("data") if isinstance(content, dict) else content
    found = []
    for i, row in enumerate(rows if isinstance(rows, list) else [None]):
        try:
            if isinstance(row, str):
                found.append((row.strip(), [], None))
                continue
            names = row["frame_filenames" if "utterance" in row else "image"]
            names = [names] if isinstance(names, str) else names
            said = row["utterance"] if "utterance" in row else next(
                turn["value"] for turn in row["conversations"] if turn["from"] == "gpt")
            alike = row.get("similarity")
            alike = [alike] * len(names) if isinstance(alike, (int, float)) else alike
            if alike is not None and len(alike) != len(names):
                raise KeyError
            found.append((said.strip(), names, alike))
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise DataError(f"{path}: item {i} is no utterance, no CVCL entry (utterance, "
                            "frame_filenames), no LLaVA entry (image, conversations), or its "
                            "similarities are not as many as its frames") from None
    return [row for row in found if row[0]]


def index_frames(path):
    """{file name: where it is} of a folder or a zip: its path, or what read_frame needs."""
    if os.path.isdir(path):
        return {name: os.path.join(folder, name) for folder, _, names in os.walk(path)
                for name in names}
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.rpartition("/")[2]:
                    (path, info.filename, info.header_offset, info.compress_size,
                     info.compress_type) for info in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: neither a folder nor a whole zip ({error})") from None


def prepare_saycam(config, directory):
    """SAYCam, or any captioned video in its form."""
    if not (config.frames and config.annotations):
        raise DataError("saycam: give --frames ZIP_OR_FOLDER and --annotations FILE.json ...")
    pairs, speech = defaultdict(list), defaultdict(list)
    for path in config.annotations.split("\n"):
        stem = Path(path).stem.lower()
        split = "test" if "test" in stem else "val" if re.search("val|dev", stem) else "train"
        for said, names, alike in read_annotations(path):
            if not names:
                speech[split].append(said)
                continue
            if config.min_similarity:
                if alike is None:
                    raise DataError(f"{path}: --min_similarity, but {names[0]} has no similarity")
                names = [n for n, a in zip(names, alike) if a > config.min_similarity]
            if config.frames_per_utterance and names:
                spread = np.linspace(0, len(names) - 1, config.frames_per_utterance)
                names = [names[i] for i in sorted({round(i) for i in spread})]
            pairs[split].append((said, names))
    for held in (pairs, speech):
        if held["train"] and not held["val"]:
            held["train"], held["val"] = part(held["train"], "train"), part(held["train"], "val")
    if not pairs["train"] or not pairs["val"]:
        raise DataError("saycam: no pairs to train on: one JSON with 'train' in its name must "
                        "have frames")
    index = index_frames(config.frames)
    rows = {split: [("", index.get(name.rpartition("/")[2], os.path.join(config.frames, name)),
                     clip, said) for clip, (said, names) in enumerate(pairs[split])
                    for name in names] for split in ("train", "val", "test") if pairs[split]}
    text = {split: speech[split] or [said for said, _ in pairs[split]] for split in rows}
    return prepare_rows(directory, config, text, rows)


SOURCES = {"toy": prepare_toy, "pairs": prepare_pairs, "saycam": prepare_saycam}


def make(config):
    """Prepare data/<name> as `config` says; returns its meta. Raises DataError."""
    if config.source not in SOURCES:
        raise DataError(f"no source {config.source!r}: {', '.join(SOURCES)}")
    config.size = config.size or (224 if config.source == "saycam" else 64)
    return SOURCES[config.source](config, Path("data") / (config.name or config.source))


def main(argv):
    source = [f"--source={argv[0]}", *argv[1:]] if argv and argv[0] in SOURCES else argv
    config = configs.load(Config, source, __doc__, many=("annotations",))
    meta = make(config)
    print(f"data/{config.name or config.source}: {meta['vocab_size']} tokens in the vocabulary")
    for split, counts in meta["splits"].items():
        print(f"  {split:5}", ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))


if __name__ == "__main__":
    configs.run(main, DataError)
