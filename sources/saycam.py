"""
SAYCam: 600,285 frames of a head camera and 37,486 utterances, under an agreement with Databrary; or
any captioned video in the same form.

    python data.py saycam --frames frames.txt --annotations train.json val.json test.json

--frames is a folder of JPEGs or a zip of them, whatever it is called; pictures that lie beside
their JSON are found there first, and need no --frames. A JSON may be CVCL's
({"data": [{"utterance", "frame_filenames", ...}]}), BabyLLaVA's ([{"image", "conversations"}]),
BabyLLaVA-V2's (the same; of several pictures, a clip or moments in turn, which phase 2 reads), or a
list of utterances without pictures: transcripts for the language model. A word in a file's name
says whether it is for training, validation or testing (train; val, valid, validation, dev; test);
or give it by --train, --val, --test instead of --annotations. Without validation files a tenth of
the training files is held out, of five films or more whole films.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.archives import Archives, BesideFile
from common.files import read_json
from common.images import FITS, RESAMPLING, ImageFormat
from config import UserError, option
from sources import (
    Captioned,
    Dialogue,
    Recordings,
    dialogue_writer,
    hold_out,
    hold_out_films,
    images_of,
    keep_out,
    make_tokenizer,
    read_dialogue,
    report_films,
    report_fixed,
    write_split,
)
from tokenizer import TEMPLATES, check_vocabulary

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass
class Config(Recordings):
    name: str = ""  # write to data/<name>; empty: saycam
    frames: str = ""  # a folder or zip of JPEGs; empty: they lie beside their JSON
    annotations: tuple[str, ...] = ()  # JSON files, their split given by their names
    train: tuple[str, ...] = ()  # JSON files to train on, whatever their names
    val: tuple[str, ...] = ()  # JSON files to validate on
    test: tuple[str, ...] = ()  # JSON files to test on
    frames_per_utterance: int = option(0, low=0, high=10**6)  # so many, evenly spread; 0: all
    fix: bool = False  # add missing <image>s to items that have pictures
    template: str = option("bare", choices=tuple(TEMPLATES))  # how clips and moments are written
    min_similarity: float = 0.0  # only frames whose "similarity" is above this; 0: all
    size: int = option(224, low=8, high=2048)  # S: frames are S x S pixels
    fit: str = option("squash", choices=FITS)  # how a picture becomes a square
    resample: str = option("bilinear", choices=tuple(RESAMPLING))  # how it is resized
    vocab_size: int = option(6000, low=260, high=1 << 20)  # BPE tokens, specials included
    vocab: str = ""  # a {"word": id} JSON: word-level tokens of these words instead of BPE
    max_skipped: float = option(0.01, low=0.0, high=1.0)  # tolerated fraction of unreadable frames
    replay: float = option(0.0, low=0.0, high=100.0)  # utterances without picture per sample


@dataclass
class Utterance:
    words: str
    frames: list  # names of pictures; none in a transcript
    similarities: list | None = None  # of each picture to the words; optional
    turns: list | None = None  # of a clip or moments: [(question, answer)]
    path: str = ""  # of the JSON
    film: str | None = None  # where it is known


def read_item(item, fix):
    """The Utterance of an item in one of the four forms. Raises KeyError, TypeError,
    AttributeError for anything else; ValueError, with the reason, if its
    <image>s do not match its pictures."""
    if isinstance(item, str):
        return Utterance(item.strip(), [])
    if "utterance" in item:
        words, names = item["utterance"], item["frame_filenames"]
    else:
        names, texts = images_of(item), item["conversations"]
        several = len(names) > 1
        if not several and len(texts) == 2 and not texts[1]["value"].strip():
            return Utterance("", [])  # no utterance
        if several and len(texts) == 2 and texts[0]["value"].count("<image>") == 1:
            # one <image> for several pictures: BabyLLaVA's frames of an utterance, each a pair
            _, turns, _ = read_dialogue({"image": names[0], "conversations": texts})
        else:
            names, turns, _ = read_dialogue(item, fix)
            if several or len(turns) > 1:
                return Utterance(turns[0][1], names, turns=turns, film=film_of_frame(names[0]))
        words = turns[0][1]
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
    film = item.get("video_filename") or film_of_frame(names[0])
    return Utterance(words.strip(), names, similarities, film=film)


def film_of_frame(name):
    """The film of a frame by its name: SAYCam's S_20130531_0601_01_UUU_FF.jpg, or the folder of
    VIDEO/VIDEO_1.jpg; None for other names."""
    found = re.match(r"(\w_\d{8}_\d{4}_\d{2})_", os.path.basename(name))
    folder = os.path.basename(os.path.dirname(name))
    if found:
        return found[1]
    return folder if folder and os.path.basename(name).startswith(f"{folder}_") else None


def read_annotations(path, fix):
    """The Utterances of a JSON file, those without words left out. Raises UserError."""
    content = read_json(path)
    items = content.get("data") if isinstance(content, dict) else content
    utterances = []
    for i, item in enumerate(items if isinstance(items, list) else [None]):
        try:
            utterances.append(read_item(item, fix))
        except ValueError as error:
            raise UserError(f"{path}: item {i}: {error}") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: item {i} is no utterance, no CVCL entry (utterance, "
                "frame_filenames), no LLaVA entry (image, conversations), or its "
                "similarities are not as many as its frames"
            ) from None
    if fix:
        report_fixed(path, items)
    report_films(path, items or [])
    for utterance in utterances:
        utterance.path = path
    return [utterance for utterance in utterances if utterance.words]


def split_of(path):
    """The split of a file, by the words of its name; train if there is none. Raises UserError."""
    words = re.split(r"[^a-z]+", Path(path).stem.lower())
    found = [split for split, names in SPLIT_WORDS.items() if set(words) & set(names)]
    if len(found) > 1:
        raise UserError(f"{path}: its name says {' and '.join(found)}: use --train, --val, --test")
    return found[0] if found else "train"


def choose(utterance, settings, path):
    """The frames of an utterance that --min_similarity and --frames_per_utterance choose."""
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
        for utterance in read_annotations(path, settings.fix):
            if not utterance.frames:
                speech[split].append(utterance)
                continue
            if not utterance.turns:
                utterance.frames = choose(utterance, settings, path)
            shown[split].append(utterance)
    if speech["train"] and not speech["val"]:
        speech |= hold_out(speech["train"])
    return with_validation(shown, settings.val_films), speech


def with_validation(shown, val_films):
    """{split: Utterances}, with films or stretches of the training ones held out if there is no
    file for validation. Raises UserError."""
    if shown["val"] and val_films:
        raise UserError("--val_films: a file says what is held out; give the training files alone")
    if not shown["train"] or shown["val"]:
        return shown
    # stretches by first frame: utterances over one picture stay in the same part
    first_frame = lambda one: tuple(one.frames[:1])
    return shown | hold_out_films(shown["train"], lambda one: one.film, val_films, first_frame)


def lines_of(utterances):
    """All utterances as text, and all answers of dialogues."""
    turns = [utterance.turns or [("", utterance.words)] for utterance in utterances]
    return [words for said in turns for _, words in said]


def prepare(settings, writer):
    if not (settings.annotations or settings.train):
        raise UserError(
            "saycam: give --annotations FILE.json ..., and --frames ZIP_OR_FOLDER if the pictures "
            "are not beside them"
        )
    shown, speech = read_all_annotations(settings)
    files = " ".join([*settings.annotations, *settings.train])
    if not shown["train"]:
        raise UserError(f"{files}: no pairs to train on: one for training must have frames")
    if not shown["val"]:
        count = len(shown["train"])
        raise UserError(f"{files}: {count} utterances with frames; need 10, or files for --val")
    archives, beside = Archives([settings.frames] if settings.frames else []), {}

    def find(name, path):
        if path not in beside:
            beside[path] = BesideFile(path, archives)
        return beside[path].find(name) or os.path.join(settings.frames or Path(path).parent, name)

    pictures = {split: [] for split in shown if shown[split]}
    dialogues = {split: [] for split in pictures}
    for split in pictures:
        for clip, utterance in enumerate(shown[split]):
            locations = [find(name, utterance.path) for name in utterance.frames]
            if utterance.turns:
                dialogues[split].append(Dialogue(locations, utterance.turns, ""))
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
        write_split(
            writer.split(split),
            text[split],
            pictures[split],
            settings.max_skipped,
            dialogues[split],
            dialogue_writer(TEMPLATES[settings.template]),
            settings.replay,
        )
