"""
Sources of data: raw recordings in, a prepared folder data/<name>/ out.

A new source is a file sources/NAME.py with a `Config` (its options, among them `name`) and a
`prepare(config, writer)` that calls the methods of a data.Writer. `python data.py NAME` finds it by
its name. Here is what sources share: holding out validation data, and reading pictures so that a
killed run can continue.
"""

import hashlib
import importlib
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
from common.files import about, named, only_one, writing
from common.images import Beside, read_all
from config import UserError, option
from data import BINS, Writer, bin_shape, known_sources, row_bytes
from tokenizer import Tokenizer, caption_sample, chat_sample


@dataclass
class Recordings(config.Options):
    """The options of sources of one's own recordings: how they are held out, and how utterances are
    filtered by a model, see filtering.py."""

    # what is held out for validation and for the tests
    val_films: tuple[str, ...] = ()  # names of whole films; empty: a tenth of the films

    # filtering by a model
    filter: str = ""  # a trained model: keep utterances that their own picture makes likelier
    min_gain: float = option(0.0, low=-1e9, high=1e9)  # by at least so many nats per token
    most: int = option(0, low=0, high=10**9)  # keep so many pairs, of the highest gain; 0: all
    others: int = option(4, low=1, high=1000)  # other pictures to compare with


def wants_filter(settings):
    """Whether a source's utterances are to be filtered. Raises UserError for options of the filter
    without --filter."""
    unused = [name for name in ("min_gain", "most", "others") if name in settings.given]
    if isinstance(settings, Recordings) and unused and not settings.filter:
        raise UserError(f"--{unused[0]} is for --filter FILE, which is missing")
    return bool(getattr(settings, "filter", ""))


def prepare(source, argv, open_filter=None, make_tests=None):
    """Run sources/<source>.py with its options. Returns (folder, its meta). Raises UserError.

    open_filter(settings) -> apply(writer): see filtering.py; needed if settings want a filter.
    make_tests(writer): makes tests of recordings, see own_tests.py."""
    known = known_sources()
    if source not in known:
        raise UserError(f"{source or '(none)'}: no such source; python data.py {' | '.join(known)}")
    module = importlib.import_module(f"sources.{source}")
    settings = config.load(module.Config, argv, module.__doc__)
    if settings.name and (Path(settings.name).name != settings.name or settings.name == ".."):
        raise UserError(f"--name {settings.name}: want a plain name, to be a folder in data/")
    directory = Path("data") / (settings.name or source)
    with only_one(directory, "preparing data"):
        apply_filter = open_filter(settings) if wants_filter(settings) else None
        writer = Writer(directory, source)
        module.prepare(settings, writer)
        if apply_filter:
            apply_filter(writer)
        if make_tests and isinstance(settings, Recordings):
            make_tests(writer)
        return directory, writer.finish()


# ---------------------------------------------------------------------------------------------
# Splits and vocabulary


def hold_out(items, key=None):
    """{"train", "val"}: every tenth of a hundred stretches of the items is for validation; none of
    fewer than ten items.

    So neighbours in a video are in the same part, and both parts have all ages of a child. Items
    with the same key(item) are in the same part."""
    key_of = [i if key is None else key(item) for i, item in enumerate(items)]
    keys = list(dict.fromkeys(key_of))
    stretches = min(100, len(keys))
    in_val = {k for i, k in enumerate(keys) if i * stretches // len(keys) % 10 == 9}
    parts = {"train": [], "val": []}
    for item, k in zip(items, key_of):
        parts["val" if k in in_val else "train"].append(item)
    return parts


FEW = 5  # films; of fewer, stretches are held out


def hold_out_films(items, film_of, val_films=(), key=None):
    """{"train", "val"}: whole films are for validation, those named or every tenth, at least one;
    of fewer than five films every tenth of a hundred stretches. What is held out is printed.

    film_of(item): the name of its film, or None; key: of stretches, as in hold_out(). Raises
    UserError for an unknown name."""
    films = [name for name in dict.fromkeys(map(film_of, items)) if name]
    unknown = [name for name in val_films if name not in films]
    if unknown:
        known = ", ".join(films[:8]) + (" ..." if len(films) > 8 else "") or "none has a name"
        raise UserError(
            f"--val_films {unknown[0]}: no such film with utterances; there are {known}"
        )
    if val_films and len(set(val_films)) == len(films):
        raise UserError(f"--val_films names all {len(films)} films: nothing is left to train on")
    if not val_films and len(films) < FEW:
        parts = hold_out(items, key)
        if parts["val"]:
            few = f" (films: {len(films)}; --val_films names whole ones)" if films else ""
            of = f"{len(items)} items" if len(items) <= 100 else "100 stretches of items"
            print(f"held out: every tenth of {of}{few}")
        return parts
    chosen = set(val_films or hold_out(films)["val"] or films[len(films) // 2 :][:1])
    shown = ", ".join(sorted(chosen)[:8]) + (" ..." if len(chosen) > 8 else "")
    print(f"held out: {len(chosen)} of {len(films)} films, {shown}")
    parts = {"train": [], "val": []}
    for item in items:
        parts["val" if film_of(item) in chosen else "train"].append(item)
    return parts


def keep_out(validation, lines):
    """The lines that are not, word for word, validation captions: the language model must not
    memorise what phase 2 is validated on."""
    validation = set(validation)
    kept = [line for line in lines if line not in validation]
    if len(kept) < len(lines):
        print(f"{len(lines) - len(kept)} lines are validation captions, and left out of the text")
    return kept


def make_tokenizer(config, lines):
    """A source's tokenizer: the words in --vocab, else BPE learnt from the training lines."""
    if config.vocab:
        return Tokenizer.of_words(config.vocab)
    return Tokenizer.train(lines, config.vocab_size)


# ---------------------------------------------------------------------------------------------
# Pictures


@dataclass
class Captioned:
    """A picture and its captions. location: as common/archives.py finds it; clip: the number of its
    clip; label: what an error about it starts with."""

    location: object
    clip: int
    captions: list
    label: str


@dataclass
class Dialogue:
    """A conversation: the locations of its pictures, in the order of its <image>s, and its turns
    [(question, answer)]. label: what an error about it starts with; system: a text of its own
    before the turns."""

    locations: list
    turns: list
    label: str
    system: str = ""


def read_images(part, locations, clips, labels, max_skipped):
    """Read pictures on all cores and add them to `part`, a data.SplitWriter. Yields the image id of
    each, None for one that cannot be read. Pictures that a killed run has read are not read again.

    Raises UserError if more than the fraction max_skipped cannot be read."""
    log_path = part.path("reading.log")
    done, skipped, frames_of = find_done(part, log_path, locations, labels)
    with ExitStack() as stack:
        log = stack.enter_context(open(log_path, "a", encoding="utf-8", buffering=1))
        number = 0
        for row in range(done):
            yield None if row in skipped else number
            if row not in skipped:
                part.bin("clips").put([clips[row]] * frames_of[number])
                number += 1
        results = stack.enter_context(closing(read_all(locations[done:], part.writer.image_format)))
        bar = tqdm(results, f"{part.name} images", len(locations), initial=done, unit="image")
        for row, result in enumerate(bar, done):
            if not isinstance(result, str):
                number = part.image(result, clips[row])
                for kind in ("images", "frames"):  # a kill must not lose these
                    with named(part.bins[kind].path):
                        part.bins[kind].file.flush()
                yield number
                continue
            skipped[row] = labels[row] + result
            with named(log_path):
                log.write(f"{row}\t{skipped[row]}\n")
            if len(skipped) > max_skipped * len(locations):
                raise UserError(
                    f"{skipped[row]}; {len(skipped)} such of {len(locations)}, "
                    f"over max_skipped {max_skipped:g}"
                )
            yield None
    part.writer.skipped += [skipped[row] for row in sorted(skipped)]


def find_done(part, log_path, locations, labels):
    """What a killed run has read of the same pictures in the same format: (rows done, {row: error}
    of those skipped, frames of each picture); else (0, {}, []), and a new log. The first line of
    the log is a digest of the pictures."""
    key = hashlib.sha256(repr(part.writer.image_format).encode())
    for location, label in zip(locations, labels):
        key.update(f"{location!r} {label}\n".encode())
    lines = log_path.read_text(encoding="utf-8").split("\n")[:-1] if log_path.exists() else []
    if lines[:1] != [key.hexdigest()]:
        for kind in ("frames", "images"):  # of other pictures, or in another format
            part.path(f"{kind}.partial").unlink(missing_ok=True)
        with writing(log_path) as file:
            file.write(f"{key.hexdigest()}\n".encode())
        return 0, {}, []
    entries = [line.partition("\t") for line in lines[1:]]
    skipped = {int(row): error for row, tab, error in entries if tab}
    images = part.complete_images()
    frames_of = (1 + images[:, 1] * images[:, 2]).tolist()  # the whole picture, and its tiles
    done, kept = 0, 0
    while done < len(locations) and (kept < len(images) or done in skipped):
        if done not in skipped:
            kept += 1
        done += 1
    part.bin("images", keep_rows=kept)
    part.bin("frames", keep_rows=sum(frames_of[:kept]))
    return done, {row: error for row, error in skipped.items() if row < done}, frames_of


def adopt(part):
    """Continue `part`, a data.SplitWriter, from the bins that another process has written."""
    for kind in BINS:
        path = part.path(f"{kind}.partial")
        if path.exists():
            part.bin(kind, path.stat().st_size // row_bytes(kind, part.writer.meta))


def unfinished_bin(part, kind):
    """A bin of a data.SplitWriter that is not finished yet, as an array."""
    part.bins[kind].file.flush()
    dtype, row = bin_shape(kind, part.writer.meta)
    return np.memmap(part.path(f"{kind}.partial"), dtype, "r").reshape(-1, *row)


# ---------------------------------------------------------------------------------------------
# Samples


def write_split(part, text, pictures, max_skipped, dialogues=(), write_dialogue=None, replay=0.0):
    """Write utterances, Captioned pictures and Dialogues to `part`, a data.SplitWriter.

    replay: in the training part, write so many utterances for each sample once more as samples
    without a picture, evenly spread, so that phase 2 does not forget them.
    write_dialogue(part, dialogue, image ids): see dialogue_writer(). A dialogue with a picture that
    cannot be read is left out; a picture that it shares with `pictures` is stored once."""
    part.text(text)
    if part.writer.image_format.max_tiles:  # such pictures may be tiled alone, and not together
        for dialogue in dialogues:
            if len(dialogue.locations) > 1:
                dialogue.locations = [Beside(location) for location in dialogue.locations]
    locations, clips, labels = (
        [getattr(picture, field) for picture in pictures] for field in ("location", "clip", "label")
    )
    next_clip = clips[-1] + 1 if clips else 0
    known = set(locations)
    more = {at: d.label for d in dialogues for at in d.locations if at not in known}  # each once
    locations += more
    labels += more.values()
    clips += range(next_clip, next_clip + len(more))
    image_ids = list(read_images(part, locations, clips, labels, max_skipped)) if locations else []
    for picture, image_id in zip(pictures, image_ids):
        if image_id is not None:
            for caption in picture.captions:
                part.sample(*caption_sample(part.writer.tokenizer, caption), [image_id])
    id_of = dict(zip(locations, image_ids))
    for dialogue in dialogues:
        own = [id_of[location] for location in dialogue.locations]
        if None not in own:
            write_dialogue(part, dialogue, own)
    if part.name == "train":
        replay_text(part, text, replay)


def replay_text(part, text, replay):
    """Write `replay` utterances for each sample as samples without a picture, evenly spread."""
    count = round(replay * part.bin("samples").rows) if text else 0
    for number in np.linspace(0, len(text), count, endpoint=False).astype(int):
        part.sample(*text_sample(part.writer.tokenizer, text[number]))


def text_sample(tokenizer, text):
    """(tokens, loss_mask) of an utterance without a picture, after an <eos> as in phase 0."""
    tokens, loss_mask = caption_sample(tokenizer, text, images=0)
    if not tokenizer.start:
        tokens, loss_mask = [tokenizer.eos, *tokens], [0, *loss_mask]
    return tokens, loss_mask


def dialogue_writer(template, system=""):
    """write_dialogue() of write_split() for a Template, or for None: the first answer alone, as a
    caption."""

    def write(part, dialogue, image_ids):
        tokenizer, turns = part.writer.tokenizer, dialogue.turns
        if template is None:
            part.sample(*caption_sample(tokenizer, turns[0][1], len(image_ids)), image_ids)
            return
        with about(dialogue.label.rstrip(": ")):
            sample = chat_sample(tokenizer, template, turns, dialogue.system or system)
        part.sample(*sample, image_ids)

    return write


# ---------------------------------------------------------------------------------------------
# Conversations in LLaVA's JSON form


FILMS = ("video", "videos", "audio")  # keys of what is no picture


def read_turns(conversations):
    """(system text, [(question, answer)]) of a list of {"from", "value"}. A first turn of gpt is
    dropped, as LLaVA's code does. Raises ValueError."""
    texts, system = [(turn["from"], turn["value"]) for turn in conversations], ""
    if not all(isinstance(words, str) for _, words in texts):
        raise ValueError("the value of a turn must be a text")
    if texts and texts[0][0] == "system":
        system, texts = texts[0][1].strip(), texts[1:]
    unknown = [speaker for speaker, _ in texts if speaker not in ("human", "gpt")]
    if unknown:
        raise ValueError(f"nobody is called {unknown[0]!r}: want human and gpt, or system at first")
    media = [mark for mark in ("<video>", "<audio>") if any(mark in words for _, words in texts)]
    if media:
        raise ValueError(f"it contains {media[0]}: pictures alone are supported, one <image> each")
    if texts and texts[0][0] == "gpt":
        texts = texts[1:]
    if [speaker for speaker, _ in texts] != ["human", "gpt"] * (len(texts) // 2):
        raise ValueError("want human and gpt in turn, the human first and gpt last")
    turns = [
        (question, answer.strip()) for (_, question), (_, answer) in zip(texts[::2], texts[1::2])
    ]
    if not turns:
        raise ValueError("a conversation without turns")
    if not all(answer for _, answer in turns):
        raise ValueError("an answer is empty: nothing to learn")
    return system, turns


def images_of(item):
    """The names of an item's pictures, under "image" or "images"; of a film the picture beside it,
    which report_films() counts. Raises ValueError, TypeError."""
    given = [key for key in ("image", "images") if item.get(key)]
    other = [key for key in FILMS if item.get(key)]
    if other and not given:
        raise ValueError(f"it has a {other[0]!r} and no image: pictures alone are supported")
    if len(given) > 1:
        raise ValueError("it has both image and images")
    names = item[given[0]] if given else []
    names = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("its image must be a name, or a list of names")
    return names


def report_films(path, items):
    """Print how many items of a file have a film of which only the picture beside it is used."""
    films = [
        i for i, item in enumerate(items)
        if isinstance(item, dict) and any(item.get(key) for key in FILMS)
    ]  # fmt: skip
    if films:
        what = f"{len(films)} items have a film, item {films[0]} first"
        print(f"{path}: {what}; its image alone is used")


def lacks_placeholders(item):
    """Whether an item has pictures, but no <image> in its conversation."""
    if not (isinstance(item, dict) and "conversations" in item and images_of(item)):
        return False
    return not any("<image>" in turn["value"] for turn in item["conversations"])


def report_fixed(path, items):
    """Print to how many items of a file --fix added their <image>s, if any."""
    fixed = [i for i, item in enumerate(items) if lacks_placeholders(item)]
    if fixed:
        print(f"{path}: --fix put <image> into {len(fixed)} items, item {fixed[0]} first")


def read_dialogue(item, fix=False):
    """(names of its pictures, turns, system text) of an item. Raises ValueError, KeyError or
    TypeError.

    fix: add missing <image>s: one before each question if there are as many pictures, else all
    before the first question."""
    names, (system, turns) = images_of(item), read_turns(item["conversations"])
    if any("<image>" in answer for _, answer in turns):
        raise ValueError("an <image> in an answer")
    placeholders = sum(question.count("<image>") for question, _ in turns)
    if placeholders == 0 and names and fix:
        if len(names) == len(turns):
            return names, [("<image>" + question, answer) for question, answer in turns], system
        (question, answer), *rest = turns
        return names, [("<image>" * len(names) + question, answer), *rest], system
    if placeholders != len(names):
        more = "; --fix adds them" if not placeholders else ""
        raise ValueError(f"{placeholders} <image> for {len(names)} pictures{more}")
    return names, turns, system


def image_first(question):
    """A question whose only <image> stands before its words, as LLaVA's code moves it there."""
    if question.count("<image>") != 1:
        return question
    return "<image>\n" + question.replace("<image>", "").strip()
