"""
Your captioned pictures, and speech to learn language from: either or both.

    python data.py pairs --name mine --csv pairs.csv --images DIR --text transcripts.txt
    python data.py pairs --name speech --text transcripts.txt   # speech alone: enough for phase 0

The CSV has the columns image and caption, one pair a row; a picture may have several rows. The text
file has one utterance a line. A tenth of the pictures, and of the lines, is held out for
validation. No picture is in both parts, and lines that are captions of a validation picture are
left out of the training text.
"""

import os
from dataclasses import dataclass

from common import files
from common.archives import Archives
from common.files import read_csv
from common.images import FITS, RESAMPLING, ImageFormat
from config import UserError, option
from sources import (
    Captioned,
    Recordings,
    hold_out,
    hold_out_films,
    keep_out,
    make_tokenizer,
    write_split,
)


@dataclass
class Config(Recordings):
    name: str = ""  # write to data/<name>; empty: pairs
    csv: str = ""  # a CSV file with columns image and caption, and optionally film
    images: str = "."  # the folder or zip its image names are in
    text: str = ""  # transcripts, one utterance a line; empty: the captions
    size: int = option(64, low=8, high=2048)  # S: frames are S x S pixels
    fit: str = option("squash", choices=FITS)  # how a picture becomes a square
    resample: str = option("bilinear", choices=tuple(RESAMPLING))  # how it is resized
    vocab_size: int = option(6000, low=260, high=1 << 20)  # BPE tokens, specials included
    vocab: str = ""  # a {"word": id} JSON: word-level tokens of these words instead of BPE
    max_skipped: float = option(0.01, low=0.0, high=1.0)  # tolerated fraction of unreadable ones
    replay: float = option(0.0, low=0.0, high=100.0)  # utterances without picture per sample


def read_lines(path):
    """The lines of a text file that are not blank."""
    return [line.strip() for line in files.read_lines(path) if line.strip()]


def read_pictures(path, archives):
    """The pictures of a CSV in the order of their first rows, each with all its captions; and the
    film of each, if there is such a column."""
    pictures, films = {}, {}
    for row in read_csv(path, ("image", "caption"), ("caption",)):
        location = archives.find(row["image"])
        if location is None:  # it will be counted as unreadable
            location = os.path.join(archives.paths[0], row["image"])
        if location not in pictures:
            label = f"{path}:{row['line']}: "
            pictures[location] = Captioned(location, len(pictures), [], label)
            films[location] = row.get("film") or None
        pictures[location].captions.append(row["caption"])
    return list(pictures.values()), films


def prepare(settings, writer):
    if not (settings.csv or settings.text):
        raise UserError("pairs: give --csv FILE --images DIR, or --text FILE, or both")
    pictures = {"train": [], "val": []}
    if settings.csv:
        found, films = read_pictures(settings.csv, Archives([settings.images]))
        film_of = lambda picture: films[picture.location]
        pictures = hold_out_films(found, film_of, settings.val_films)
        if not pictures["val"]:
            raise UserError(f"{settings.csv}: {len(pictures['train'])} pictures; need at least 10")
    text = {
        split: [caption for picture in pictures[split] for caption in picture.captions]
        for split in pictures
    }
    if settings.text:
        captions = text["val"]
        text = hold_out(read_lines(settings.text))
        text["train"] = keep_out(captions, text["train"])
    if not text["val"]:
        raise UserError(f"{settings.text}: {len(text['train'])} utterances; need at least 10")
    tokenizer = make_tokenizer(settings, text["train"])
    writer.start(tokenizer, ImageFormat(settings.size, settings.fit, settings.resample))
    for split in ("train", "val"):
        part = writer.split(split)
        write_split(
            part, text[split], pictures[split], settings.max_skipped, replay=settings.replay
        )
