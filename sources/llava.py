"""
Conversations about pictures in LLaVA's JSON form, for phase 3; or captions, for phases 1 and 2.

    python data.py llava --json chat.json --images DIR                         # conversations
    python data.py llava --json pretrain.json --images DIR --template plain    # captions
    python data.py llava --json chat.json --images DIR --like DIR2             # for a LLaVA folder

A JSON is a list of {"image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": "human", "value":
"<image>\\nwhat is it ?"}, {"from": "gpt", "value": "a ball ."}, ...]}, or a .jsonl of them: any
number of turns, with one <image> in the questions for each picture; pictures are optional, and so
is a first turn from "system". A first turn from gpt is dropped, as in LLaVA's code. --like takes
vocabulary, template and image format from a model (a .pt or a folder) or from prepared data.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import checkpoint
import config
from common.archives import Archives, BesideFile
from common.files import read_list
from common.images import FITS, NORMS, RESAMPLING, ImageFormat
from config import UserError, option
from data import Data
from pretrained import huggingface
from sources import (
    Dialogue,
    dialogue_writer,
    hold_out,
    image_first,
    read_dialogue,
    report_films,
    report_fixed,
    write_split,
)
from tokenizer import TEMPLATES, Tokenizer, check_vocabulary, read_template


@dataclass
class Config(config.Options):
    name: str = ""  # write to data/<name>; empty: llava
    json: tuple[str, ...] = ()  # files of conversations
    val: tuple[str, ...] = ()  # files to validate on; empty: hold out a tenth
    images: tuple[str, ...] = (".",)  # folders or zips of pictures that are not beside their JSON
    fix: bool = False  # add missing <image>s to items that have pictures
    image_first: bool = False  # move an <image> to the front of its question, as LLaVA does
    like: str = ""  # a model or prepared data: take its vocabulary, template, image format
    template: str = option("", choices=("", "plain", *TEMPLATES))  # empty: of --like, or baby_v1
    system: str = ""  # text before each conversation
    size: int = option(224, low=8, high=2048)  # S: frames are S x S pixels
    fit: str = option("", choices=("", *FITS))  # to a square; empty: pad, or squash with canvases
    resample: str = option("bicubic", choices=tuple(RESAMPLING))  # how it is resized
    norm: str = option("imagenet", choices=tuple(NORMS))  # mean and deviation of the tower's pixels
    canvases: tuple[str, ...] = ()  # as 448x448 224x672, several: tiles (anyres); empty: none
    vocab_size: int = option(6000, low=260, high=1 << 20)  # BPE tokens, specials included
    max_skipped: float = option(
        0.01, low=0.0, high=1.0
    )  # tolerated fraction of unreadable pictures


def read_item(item, pictures, label, settings):
    """The Dialogue of an item. Raises ValueError, KeyError or TypeError."""
    names, turns, system = read_dialogue(item, settings.fix)
    if settings.image_first:
        turns = [(image_first(question), answer) for question, answer in turns]
    first = Path(pictures.archives.paths[0])  # where one that is missing is said to be
    locations = [pictures.find(name) or str(first / name) for name in names]
    return Dialogue(locations, turns, label, system)


def read_file(path, archives, settings):
    """The Dialogues of a JSON file. Raises UserError."""
    pictures = BesideFile(path, archives)
    items, dialogues = read_list(path, "conversations"), []
    for i, item in enumerate(items):
        try:
            dialogues.append(read_item(item, pictures, f"{path}: item {i}: ", settings))
        except (KeyError, TypeError, AttributeError) as error:
            why = f'no {{"image", "conversations": [{{"from", "value"}}]}} ({error!r})'
            raise UserError(f"{path}: item {i}: {why}") from None
        except ValueError as error:
            raise UserError(f"{path}: item {i}: {error}") from None
    if settings.fix:
        report_fixed(path, items)
    report_films(path, items)
    return dialogues


def read_like(path):
    """(tokenizer, ImageFormat or None, description of a template or None) of a model or prepared
    data."""
    folder = Path(path)
    if (folder / "meta.json").exists():
        dataset = Data(folder)
        return dataset.tokenizer, dataset.image_format, dataset.meta.get("template")
    if (folder / "config.json").exists():
        if huggingface.read_config(folder)["model_type"] in huggingface.LLAVA:
            loaded = huggingface.load(folder)
            return loaded.tokenizer, loaded.image_format, loaded.checkpoint["template"]
        return huggingface.language_tokenizer(folder), None, None
    loaded = checkpoint.load(path)
    if loaded.tokenizer is None:
        raise UserError(f"--like {path}: a tower alone, it knows no words")
    return loaded.tokenizer, loaded.image_format, loaded.checkpoint.get("template")


def read_canvas(canvas, size):
    """(width, height) of "672x336". Raises UserError where it is not of whole tiles."""
    width, _, height = canvas.partition("x")
    whole = width.isdigit() and height.isdigit()
    if not whole or any(int(n) % size or not int(n) for n in (width, height)):
        raise UserError(f"--canvases {canvas}: want WIDTHxHEIGHT in whole tiles of {size} pixels")
    return int(width), int(height)


def image_format(settings, like=None):
    """The ImageFormat of the options, or `like` changed by the options that were given."""
    fit = settings.fit or ("squash" if settings.canvases else "pad")
    mean, std = NORMS[settings.norm]
    form = like or ImageFormat(settings.size, fit, settings.resample, mean, std)
    changes = {
        name: getattr(settings, name) for name in ("size", "resample") if name in settings.given
    }
    if "norm" in settings.given:
        changes |= {"mean": mean, "std": std}
    if settings.fit or settings.canvases:
        changes["fit"] = fit
    size = changes.get("size", form.size)
    canvases = tuple(read_canvas(canvas, size) for canvas in settings.canvases)
    try:
        return replace(form, **changes, canvases=canvases or form.canvases)
    except ValueError as error:  # the options and --like's format contradict each other
        raise UserError(f"no such image format: {error}") from None


def choose_template(settings, described):
    """The description of the template to write: that of the options, else `described`. Raises
    UserError."""
    if settings.template not in ("", "plain"):
        described = {"name": settings.template, "system": described["system"]}
    if described.get("why") and settings.template != "plain":
        raise UserError(f"{described['why']}; give --template, one of {', '.join(TEMPLATES)}")
    return described | {"system": settings.system or described["system"]}


def prepare(settings, writer):
    if not settings.json:
        raise UserError("llava: give --json FILE --images DIR")
    archives = Archives(settings.images)
    read = lambda paths: [d for path in paths for d in read_file(path, archives, settings)]
    dialogues = read(settings.json)
    parts = {"train": dialogues, "val": read(settings.val)}
    if not settings.val:
        parts = hold_out(dialogues, key=lambda d: tuple(d.locations) or d.label)
    if not parts["val"]:
        raise UserError(
            f"llava: {len(dialogues)} conversations about fewer than 10 pictures; want more, "
            "or --val"
        )
    described, like, tokenizer = {"name": "baby_v1", "system": ""}, None, None
    if settings.like:
        tokenizer, like, trained = read_like(settings.like)
        described = trained or described
    frames = image_format(settings, like)
    described = choose_template(settings, described)
    if tokenizer is None:
        words = (text for d in parts["train"] for turn in d.turns for text in turn)
        tokenizer = Tokenizer.train(
            (text.replace("<image>", " ") for text in words), settings.vocab_size
        )
    is_plain = settings.template == "plain"
    template = None if is_plain else read_template(described)
    longer = [d.label for d in dialogues if len(d.turns) > 1]
    if is_plain and longer:
        raise UserError(f"{longer[0]}--template plain is for captions: one answer each")
    if not is_plain:
        check_vocabulary(tokenizer, template)
    writer.start(tokenizer, frames, None if is_plain else described)
    for split, part in parts.items():
        text = [d.turns[0][1] for d in part] if is_plain else []
        whole = writer.split(split if is_plain else f"chat_{split}")
        write = dialogue_writer(template, described["system"])
        write_split(whole, text, [], settings.max_skipped, part, write)
