"""
What sources share: what is held out of training, and reading captioned pictures so that a killed
run goes on.

A source is a file beside this one, sources/NAME.py, with a `Config` (its knobs; `name` among them)
and a `prepare(config, writer)` that calls the writer's methods (data.Writer). `python data.py NAME`
finds it by its name.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import ExitStack, closing
from dataclasses import dataclass

from tqdm import tqdm

import config
from config import UserError, knob
from data import BINS, row_bytes
from files import named, writing
from images import read_all
from templates import TEMPLATES, chat_sample
from tokenizer import Tokenizer, caption_sample


@dataclass
class Sifted(config.Knobs):
    """The knobs of a source whose utterances can be sifted, see curate.py."""

    curate: str = ""  # a model that leaves out what its own picture makes no likelier
    min_gain: float = knob(0.0, low=-1e9, high=1e9)  # nats a token that it must gain by its own
    others: int = knob(4, low=1, high=1000)  # pictures that each is compared with


def is_sifted(settings):
    """Whether utterances of a source are to be sifted. Raises UserError for the knobs of sifting
    without a model that judges."""
    idle = [name for name in ("min_gain", "others") if name in settings.given]
    if isinstance(settings, Sifted) and idle and not settings.curate:
        raise UserError(f"--{idle[0]}: of what model? it judges nothing without --curate FILE")
    return bool(getattr(settings, "curate", ""))


@dataclass
class Captioned:
    """A picture and what is said over it: where it is (see places.Places), the clip it belongs
    to, its captions, and what to put before a complaint about it."""

    location: object
    clip: int
    captions: list
    label: str


@dataclass
class Talk:
    """A conversation: where its pictures are, in the order of its <image>s, and its turns, each a
    question and an answer."""

    locations: list
    turns: list
    label: str


def begin(work, *arguments):
    """Begin work(*arguments) in a process of its own, beside what this one does; it is killed with
    this one, or it would go on writing into what the next run writes."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(
        target=work_aside, args=(ours, theirs, work, *arguments), daemon=True
    )
    process.start()
    theirs.close()
    process.lifeline = ours  # open as long as this process lives, and has it
    return process


def work_aside(ours, theirs, work, *arguments):
    """What the system complains of is this process's exit code, and 100, for end() to tell. Of
    Ctrl-C it hears through the process that began it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours.close()
    threading.Thread(target=die_with, args=(theirs,), daemon=True).start()
    try:
        work(*arguments)
    except OSError as error:
        sys.exit(100 + error.errno if error.errno else 1)


def die_with(lifeline):
    """Nothing is ever said on it, but it closes where the process at its other end dies."""
    lifeline.poll(None)
    os._exit(1)


def end(process, path):
    """Wait for a process that writes to a path. Raises OSError where it could not, RuntimeError
    where it ended otherwise: it has shown its traceback."""
    process.join()
    if process.exitcode > 100:
        raise OSError(process.exitcode - 100, os.strerror(process.exitcode - 100), path)
    if process.exitcode:
        raise RuntimeError(f"what writes {path} ended with {process.exitcode}")


def adopt(part):
    """Go on with `part`, a data.SplitWriter, from the bins that another process has written."""
    for kind in BINS:
        path = part.path(f"{kind}.partial")
        if path.exists():
            part.bin(kind, path.stat().st_size // row_bytes(kind, part.writer.meta))


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


def read_images(part, locations, clips, labels, max_skipped):
    """Read pictures on all cores and add them to `part`, a data.SplitWriter; yield each one's
    number, None for one that cannot be read. What a run that was killed has read is not read again.

    locations: as places.Places finds them; labels: a line's beginning that says where a
    location was named. Raises UserError above a share of `max_skipped` unreadable ones."""
    log_path = part.path("reading.log")
    done, skipped, frames_of = find_resume(part, log_path, locations, labels)
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
                for kind in ("images", "frames"):  # what a kill must not take
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


def find_resume(part, log_path, locations, labels):
    """(rows done, {row: why} of those skipped, frames of each picture) of a killed run that read
    the same pictures in the same way; else (0, {}, []), and a new log. The log's first line says
    which pictures."""
    key = hashlib.sha256(repr(part.writer.image_format).encode())
    for location, label in zip(locations, labels):
        key.update(f"{location!r} {label}\n".encode())
    lines = log_path.read_text(encoding="utf-8").splitlines() if log_path.exists() else []
    if lines[:1] != [key.hexdigest()]:
        for kind in ("frames", "images"):  # of other pictures, or made in another way
            part.path(f"{kind}.partial").unlink(missing_ok=True)
        with writing(log_path) as file:
            file.write(f"{key.hexdigest()}\n".encode())
        return 0, {}, []
    entries = [line.partition("\t") for line in lines[1:]]
    skipped = {int(row): why for row, tab, why in entries if tab}
    images = part.whole_images()
    frames_of = (1 + images[:, 1] * images[:, 2]).tolist()  # the whole, and tiles
    done, kept = 0, 0
    while done < len(locations) and (kept < len(images) or done in skipped):
        if done not in skipped:
            kept += 1
        done += 1
    part.bin("images", keep_rows=kept)
    part.bin("frames", keep_rows=sum(frames_of[:kept]))
    return done, {row: why for row, why in skipped.items() if row < done}, frames_of


def write_samples(
    writer, split, text, pictures, max_skipped, talks=(), template="plain", system=""
):
    """Write a split of utterances, Captioned pictures and Talks; see read_images.

    A conversation with a picture that cannot be read is left out, and one that shows what is among
    `pictures` shows the same frame. template: a name in TEMPLATES, or "plain": of conversations
    captions, without the questions' words."""
    part, tokenizer = writer.split(split), writer.tokenizer
    part.text(text)
    fields = [[getattr(p, field) for p in pictures] for field in ("location", "clip", "label")]
    numbers = {picture.location: None for picture in pictures}
    later = {p: talk.label for talk in talks for p in talk.locations if p not in numbers}
    clip = pictures[-1].clip + 1 if pictures else 0
    for field, more in zip(fields, (later, range(clip, clip + len(later)), later.values())):
        field += more
    if not fields[0]:
        reading = iter(())
    else:
        reading = read_images(part, *fields, max_skipped)
    for picture, number in zip(pictures, reading):  # in this order: it takes no number too many
        numbers[picture.location] = number
        if number is not None:
            for caption in picture.captions:
                part.sample(*caption_sample(tokenizer, caption), [number])
    numbers |= zip(later, reading, strict=True)
    for talk in talks:
        images = [numbers[place] for place in talk.locations]
        if None in images:
            continue
        if template == "plain":
            words = talk.turns[0][1]
            part.sample(*caption_sample(tokenizer, words, len(images)), images)
        else:
            part.sample(*chat_sample(tokenizer, TEMPLATES[template], talk.turns, system), images)


def read_turns(conversations):
    """[(question, answer)] of a list of {"from", "value"}. Raises ValueError."""
    said = [(turn["from"], turn["value"]) for turn in conversations]
    unknown = [who for who, _ in said if who not in ("human", "gpt")]
    if unknown:
        raise ValueError(f"nobody is called {unknown[0]!r}: want human and gpt")
    if [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2):
        raise ValueError("want human and gpt in turn, the human first and gpt last")
    turns = [
        (question, answer.strip()) for (_, question), (_, answer) in zip(said[::2], said[1::2])
    ]
    if not turns:
        raise ValueError("a conversation in which nothing is said")
    if not all(answer for _, answer in turns):
        raise ValueError("an answer is empty: nothing to learn")
    return turns


def shows_none(item):
    """Whether an item in LLaVA's form has pictures, and no words of it show one."""
    talks = isinstance(item, dict) and item.get("image") and "conversations" in item
    return bool(talks) and not any("<image>" in turn["value"] for turn in item["conversations"])


def tell_mended(path, items):
    """Say which items of a file --mend gave their <image>s, if any."""
    mended = [i for i, item in enumerate(items) if shows_none(item)]
    if mended:
        print(f"{path}: --mend put <image> into {len(mended)} items, item {mended[0]} first")


def read_talk(item, mend=False):
    """(names of its pictures, turns) of an item in LLaVA's form. mend: where a conversation shows
    none of its pictures, they are put in: one before each question where there are as many, else
    all before the first. Raises ValueError, KeyError or TypeError."""
    names, turns = item.get("image") or [], read_turns(item["conversations"])
    names = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("its image must be a name, or a list of names")
    if any("<image>" in answer for _, answer in turns):
        raise ValueError("an <image> in an answer")
    asked = sum(question.count("<image>") for question, _ in turns)
    if asked == 0 and len(names) == len(turns) and mend:
        return names, [("<image>" + question, answer) for question, answer in turns]
    if asked == 0 and names and mend:
        (question, answer), *rest = turns
        return names, [("<image>" * len(names) + question, answer), *rest]
    if asked != len(names):
        more = "; --mend puts them in" if not asked else ""
        raise ValueError(f"{asked} <image> for {len(names)} pictures{more}")
    return names, turns
