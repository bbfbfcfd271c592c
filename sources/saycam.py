"""
SAYCam: 600,285 frames of a head camera and 37,486 utterances, under an agreement of Databrary's;
or any captioned video in its form.

    python data.py saycam --frames frames.txt --annotations train.json val.json test.json

--frames is a folder of JPEGs or a zip of them, whatever it is called. A JSON may be CVCL's
({"data": [{"utterance", "frame_filenames", ...}]}), BabyLLaVA's ([{"image", "conversations"}]),
BabyLLaVA-V2's (the same; of several pictures, a clip or moments in turn, which phase 2 reads), or a
list of utterances without pictures: transcripts for phase 0. Whether a file is for training,
validation or testing is said by a word of its name (train; val, valid, validation, dev; test), else
by --train, --val, --test instead of --annotations. Without validation files every tenth stretch of
the training files is held out.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import UserError, knob
from files import read_json
from images import FITS, RESAMPLING, ImageFormat
from places import Places
from sources import (
    Captioned,
    Sifted,
    Talk,
    hold_out,
    keep_out,
    make_tokenizer,
    read_talk,
    tell_mended,
    write_samples,
)
from templates import TEMPLATES, check_vocabulary

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass
class Config(Sifted):
    name: str = ""  # write to data/<name>; empty: saycam
    frames: str = ""  # a folder of JPEGs or a zip of them, whatever the zip is called
    annotations: tuple[str, ...] = ()  # JSON files whose names say what they are for
    train: tuple[str, ...] = ()  # JSON files to train on, whatever their names
    val: tuple[str, ...] = ()  # JSON files to validate on
    test: tuple[str, ...] = ()  # JSON files to test on
    frames_per_utterance: int = knob(0, low=0, high=10**6)  # so many, spread; 0: all
    mend: bool = False  # put in the <image>s where an item shows none of its pictures
    template: str = knob("bare", choices=tuple(TEMPLATES))  # how clips and moments are written
    min_similarity: float = 0.0  # only frames whose "similarity" is above this; 0: all
    size: int = knob(224, low=8, high=2048)  # S: frames are S x S pixels
    fit: str = knob("squash", choices=FITS)  # how a picture becomes a square
    resample: str = knob("bilinear", choices=tuple(RESAMPLING))  # how it is resized
    vocab_size: int = knob(6000, low=260, high=1 << 20)  # BPE tokens, specials included
    vocab: str = ""  # a {"word": id} JSON: word-level tokens of these words instead of BPE
    max_skipped: float = knob(0.01, low=0.0, high=1.0)  # the largest share of unreadable frames


@dataclass
class Utterance:
    words: str
    frames: list  # names of pictures; none in a transcript
    similarities: list | None = None  # of each picture to the words, as some files say
    turns: list | None = None  # of a clip or moments: what each <image> stands before


def read_item(item, mend):
    """The Utterance of an item in one of the four forms. Raises KeyError, TypeError,
    AttributeError for anything else; ValueError, which says why, where its
    <image>s are not its pictures."""
    if isinstance(item, str):
        return Utterance(item.strip(), [])
    if "utterance" in item:
        words, names = item["utterance"], item["frame_filenames"]
    else:
        names, turns = item["image"], item["conversations"]
        several = not isinstance(names, str) and len(names) > 1
        if not several and len(turns) == 2 and not turns[1]["value"].strip():
            return Utterance("", [])  # nothing was said
        if several and len(turns) == 2 and turns[0]["value"].count("<image>") == 1:
            # one <image> for several pictures: BabyLLaVA's frames of an utterance, each a pair
            _, talk = read_talk(item | {"image": names[0]})
        else:
            names, talk = read_talk(item, mend)
            if several or len(talk) > 1:
                return Utterance(talk[0][1], names, turns=talk)
        words = talk[0][1]
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("it has no pictures; speech without any is a list of strings")
    if not all(isinstance(name, str) for name in names):
        raise TypeError("names")
    similarities = item.get("similarity")
    if isinstance(similarities, (int, float)):
        similarities = [similarities] * len(names)
    if similarities is not None and len(similarities) != len(names):
        raise KeyError("similarity")
    return Utterance(words.strip(), names, similarities)


def read_annotations(path, mend):
    """The Utterances of a JSON file; those without words are passed over."""
    content = read_json(path)
    items = content.get("data") if isinstance(content, dict) else content
    utterances = []
    for i, item in enumerate(items if isinstance(items, list) else [None]):
        try:
            utterances.append(read_item(item, mend))
        except ValueError as error:
            raise UserError(f"{path}: item {i}: {error}") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: item {i} is no utterance, no CVCL entry (utterance, "
                "frame_filenames), no LLaVA entry (image, conversations), or its "
                "similarities are not as many as its frames"
            ) from None
    if mend:
        tell_mended(path, items)
    return [utterance for utterance in utterances if utterance.words]


def split_of(path):
    """What a file is for, by the words of its name; train where none says."""
    words = re.split(r"[^a-z]+", Path(path).stem.lower())
    found = [split for split, names in SPLIT_WORDS.items() if set(words) & set(names)]
    if len(found) > 1:
        raise UserError(f"{path}: its name says {' and '.join(found)}: use --train, --val, --test")
    return found[0] if found else "train"


def choose(utterance, settings, path):
    """The utterance's frames that are wanted: similar enough, and so many, evenly spread."""
    names = utterance.frames
    if settings.min_similarity and names:
        if utterance.similarities is None:
            raise UserError(f"{path}: --min_similarity, but {names[0]} has no similarity")
        pairs = zip(names, utterance.similarities)
        names = [name for name, similarity in pairs if similarity > settings.min_similarity]
    if settings.frames_per_utterance and names:
        spread = np.linspace(0, len(names) - 1, settings.frames_per_utterance)
        names = [names[i] for i in sorted({round(i) for i in spread})]
    return names


def read_all_annotations(settings):
    """({split: Utterances with frames}, {split: Utterances without})."""
    files = [(split_of(path), path) for path in settings.annotations]
    for split in SPLIT_WORDS:
        files += [(split, path) for path in getattr(settings, split)]
    shown, speech = ({split: [] for split in SPLIT_WORDS} for _ in range(2))
    for split, path in files:
        print(f"{split:5} {path}")
        for utterance in read_annotations(path, settings.mend):
            if not utterance.frames:
                speech[split].append(utterance)
                continue
            if not utterance.turns:
                utterance.frames = choose(utterance, settings, path)
            shown[split].append(utterance)
    # by first frame: utterances over the same picture are not torn apart
    shown = with_validation(shown, key=lambda utterance: tuple(utterance.frames[:1]))
    speech = with_validation(speech)
    return shown, speech


def with_validation(utterances, key=None):
    """{split: Utterances}, some of the training ones held out where none is for validation."""
    if utterances["train"] and not utterances["val"]:
        return utterances | hold_out(utterances["train"], key)
    return utterances


def lines_of(utterances):
    """All that is said in them."""
    turns = [utterance.turns or [("", utterance.words)] for utterance in utterances]
    return [words for said in turns for _, words in said]


def prepare(settings, writer):
    if not settings.frames or not (settings.annotations or settings.train):
        raise UserError("saycam: give --frames ZIP_OR_FOLDER and --annotations FILE.json ...")
    shown, speech = read_all_annotations(settings)
    files = " ".join([*settings.annotations, *settings.train])
    if not shown["train"]:
        raise UserError(f"{files}: no pairs to train on: one for training must have frames")
    if not shown["val"]:
        count = len(shown["train"])
        raise UserError(f"{files}: {count} utterances with frames; need 10, or files for --val")
    places = Places([settings.frames])
    find = lambda name: places.find(name) or os.path.join(settings.frames, name)
    pictures = {split: [] for split in shown if shown[split]}
    talks = {split: [] for split in pictures}
    for split in pictures:
        for clip, utterance in enumerate(shown[split]):
            locations = [find(name) for name in utterance.frames]
            if utterance.turns:
                talks[split].append(Talk(locations, utterance.turns, ""))
                continue
            for location in locations:
                pictures[split].append(Captioned(location, clip, [utterance.words], ""))
    validation = lines_of(shown["val"])
    text = {split: lines_of(speech[split] or shown[split]) for split in pictures}
    if speech["train"]:
        text["train"] = keep_out(validation, text["train"])
    tokenizer = make_tokenizer(settings, text["train"])
    check_vocabulary(tokenizer, TEMPLATES[settings.template])
    writer.start(tokenizer, ImageFormat(settings.size, settings.fit, settings.resample))
    for split in pictures:
        own = pictures[split], settings.max_skipped, talks[split], settings.template
        write_samples(writer, split, text[split], *own)
