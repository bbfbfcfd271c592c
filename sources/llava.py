"""
Conversations about pictures in LLaVA's form, for phase 3; or its captions, for phases 1 and 2.

    python data.py llava --json chat.json --images DIR                         # conversations
    python data.py llava --json pretrain.json --images DIR --template plain    # captions
    python data.py llava --json chat.json --images DIR --like DIR2             # for a LLaVA folder

A JSON is a list of {"image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": "human", "value":
"<image>\\nwhat is it ?"}, {"from": "gpt", "value": "a ball ."}, ...]}: any number of turns, and as
many <image> in the human's words, anywhere, as there are pictures, which may be none. --like takes
vocabulary, template and form of pictures from a model (.pt, or a folder) or from prepared data.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import checkpoint
import config
import huggingface
from config import UserError, knob
from data import Data
from files import read_list
from images import FITS, NORMS, RESAMPLING, ImageFormat
from places import Places
from sources import Talk, hold_out, read_talk, tell_mended, write_samples
from templates import TEMPLATES, check_vocabulary
from tokenizer import Tokenizer


@dataclass
class Config(config.Knobs):
    name: str = ""  # write to data/<name>; empty: llava
    json: tuple[str, ...] = ()  # files of conversations
    val: tuple[str, ...] = ()  # files to validate on; empty: every tenth stretch of the others
    images: tuple[str, ...] = (".",)  # folders or zips that the pictures are in
    mend: bool = False  # put in the <image>s where an item shows none of its pictures
    like: str = ""  # a model or prepared data: its vocabulary, template and form of pictures
    template: str = knob("", choices=("", "plain", *TEMPLATES))  # empty: that of --like, or baby_v1
    system: str = ""  # what is said before each conversation
    size: int = knob(224, low=8, high=2048)  # S: frames are S x S pixels
    fit: str = knob("", choices=("", *FITS))  # to a square; empty: pad, or squash with canvases
    resample: str = knob("bicubic", choices=tuple(RESAMPLING))  # how it is resized
    norm: str = knob("imagenet", choices=tuple(NORMS))  # mean and deviation that the tower wants
    canvases: tuple[str, ...] = ()  # as 448x448 224x672, several: tiles (anyres); empty: none
    vocab_size: int = knob(6000, low=260, high=1 << 20)  # BPE tokens, specials included
    max_skipped: float = knob(0.01, low=0.0, high=1.0)  # the largest share of unreadable pictures


def read_item(item, places, label, mend):
    """The Talk of an item. Raises ValueError, KeyError or TypeError."""
    names, turns = read_talk(item, mend)
    locations = [places.find(name) or str(Path(places.paths[0]) / name) for name in names]
    return Talk(locations, turns, label)


def read_file(path, places, mend):
    """The Talks of a JSON file. mend: see sources.read_talk."""
    items, talks = read_list(path, "conversations"), []
    for i, item in enumerate(items):
        try:
            talks.append(read_item(item, places, f"{path}: item {i}: ", mend))
        except (KeyError, TypeError, AttributeError) as error:
            why = f'no {{"image", "conversations": [{{"from", "value"}}]}} ({error!r})'
            raise UserError(f"{path}: item {i}: {why}") from None
        except ValueError as error:
            raise UserError(f"{path}: item {i}: {error}") from None
    if mend:
        tell_mended(path, items)
    return talks


def read_like(path):
    """(tokenizer, ImageFormat or None, {"name", "system"} or None) of a model or prepared data."""
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
    """The ImageFormat that the knobs describe, or `like` with what was given of them changed."""
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
    except ValueError as error:  # what is given and what --like has do not go together
        raise UserError(f"no picture can be made so: {error}") from None


def prepare(settings, writer):
    if not settings.json:
        raise UserError("llava: give --json FILE --images DIR")
    places = Places(settings.images)
    read = lambda paths: [t for path in paths for t in read_file(path, places, settings.mend)]
    talks = read(settings.json)
    parts = {"train": talks, "val": read(settings.val)}
    if not settings.val:
        parts = hold_out(talks, key=lambda talk: tuple(talk.locations) or talk.label)
    if not parts["val"]:
        raise UserError(
            f"llava: {len(talks)} conversations about fewer than 10 pictures; want more, or --val"
        )
    template, pictures, tokenizer = {"name": "baby_v1", "system": ""}, None, None
    if settings.like:
        tokenizer, pictures, learnt = read_like(settings.like)
        template = learnt or template
    pictures = image_format(settings, pictures)
    name = settings.template or template["name"]
    system = settings.system or template["system"]
    if tokenizer is None:
        words = (text for talk in parts["train"] for turn in talk.turns for text in turn)
        tokenizer = Tokenizer.train(
            (text.replace("<image>", " ") for text in words), settings.vocab_size
        )
    is_plain = name == "plain"
    longer = [talk.label for talk in talks if len(talk.turns) > 1]
    if is_plain and longer:
        raise UserError(f"{longer[0]}--template plain is for captions: one answer each")
    if not is_plain:
        check_vocabulary(tokenizer, TEMPLATES[name])
    writer.start(tokenizer, pictures, None if is_plain else {"name": name, "system": system})
    for split, part in parts.items():
        text = [talk.turns[0][1] for talk in part] if is_plain else []
        whole = split if is_plain else f"chat_{split}"
        write_samples(writer, whole, text, [], settings.max_skipped, part, name, system)
