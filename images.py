"""
From a picture file to a tower's input: finding it, reading it, making it square, normalising it.

A picture is named by a path inside one of several places, each a folder or a zip. What becomes of
it is said by an ImageFormat, which a prepared corpus and every checkpoint carry, so that a picture
means the same in preparing, training, sampling and evaluation.
Letters: N images, S image side in pixels.
"""

import concurrent.futures
import io
import multiprocessing
import os
import signal
import threading
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from config import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # every DINO release's
FITS = ("squash", "pad", "crop")
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class ImageFormat:
    """How pictures become frames of size x size pixels, and frames a tower's input.

    fit: squash changes the aspect; pad puts the picture in the middle of a square of the mean
    colour (LLaVA-1.5's); crop keeps the middle square."""

    size: int
    fit: str = "squash"
    resample: str = "bilinear"
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD

    @classmethod
    def parse(cls, fields):
        """The ImageFormat of a dict that went through JSON or a checkpoint."""
        return cls(**fields | {name: tuple(fields[name]) for name in ("mean", "std")})


# ---------------------------------------------------------------------------------------------
# Finding a picture


@dataclass(frozen=True)
class ZipEntry:
    """Where a picture lies in a zip: enough to read it without opening the zip's index again."""

    archive: str
    name: str
    offset: int
    length: int
    method: int
    crc: int


def clean(name):
    """A picture's name as a path with forward slashes and without a leading ./"""
    return os.path.normpath(name.replace("\\", "/")).replace("\\", "/")


class Places:
    """Folders and zips that pictures lie in. Raises UserError for a path that is neither."""

    def __init__(self, paths):
        self.paths = [str(path) for path in paths]
        self.by_base_name = None  # {base name: [(path in its place, location)]}, when first needed
        self.zips = {path: self.read_zip(path) for path in self.paths if not os.path.isdir(path)}

    @staticmethod
    def read_zip(path):
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: neither a folder nor a whole zip ({error})") from None
        return {
            clean(info.filename): ZipEntry(
                path,
                info.filename,
                info.header_offset,
                info.compress_size,
                info.compress_type,
                info.CRC,
            )
            for info in infos
            if not info.is_dir()
        }

    def index(self):
        found = defaultdict(list)
        for path in self.paths:
            for name, entry in self.zips.get(path, {}).items():
                found[name.rpartition("/")[2]].append((name, entry))
            if path not in self.zips:
                for folder, _, names in sorted(os.walk(path)):
                    for name in names:
                        location = os.path.join(folder, name)
                        found[name].append((clean(os.path.relpath(location, path)), location))
        return found

    def find(self, name):
        """Where a picture is, a path or a ZipEntry: by its whole path in one of the places, else
        by a path that ends with it. None where there is none.

        Raises UserError where several match: base names alone are not enough to tell apart
        a/1.jpg and b/1.jpg."""
        name = clean(name)
        whole = [entries[name] for entries in self.zips.values() if name in entries]
        for path in self.paths:
            location = os.path.join(path, name)
            if path not in self.zips and os.path.isfile(location):
                whole.append(location)
        if not whole:
            if self.by_base_name is None:
                self.by_base_name = self.index()
            candidates = self.by_base_name.get(name.rpartition("/")[2], [])
            whole = [place for path, place in candidates if path.endswith("/" + name)]
        whole = list(dict.fromkeys(whole))  # an absolute path is in every place
        if len(whole) > 1:
            one, two = (getattr(place, "name", place) for place in whole[:2])
            raise UserError(
                f"{name}: {len(whole)} pictures could be meant, {one} and {two} among "
                "them: write more of the path, or give fewer places"
            )
        return whole[0] if whole else None


# ---------------------------------------------------------------------------------------------
# Reading it


def read_entry(entry):
    """The bytes of a picture in a zip. Raises UserError when they are damaged."""
    with open(entry.archive, "rb") as file:
        file.seek(entry.offset + 26)  # the local header: 30 bytes, of which the last are lengths
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
        file.seek(name_length + extra_length, os.SEEK_CUR)
        content = file.read(entry.length)
    if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{entry.name}: packed in a way not read here; zip it stored or deflated")
    try:
        if entry.method == zipfile.ZIP_DEFLATED:
            content = zlib.decompress(content, -15)
    except zlib.error as error:
        raise UserError(f"{entry.name}: {error}") from None
    if zlib.crc32(content) != entry.crc:
        raise UserError(f"{entry.name}: damaged in {entry.archive} (its checksum differs)")
    return content


def open_picture(location):
    """A picture file or ZipEntry as an upright RGB PIL image.

    16-bit, grey, palette and CMYK all become RGB, and transparency white. Raises UserError when
    there is no whole picture to read."""
    name = location.name if isinstance(location, ZipEntry) else location
    try:
        in_zip = isinstance(location, ZipEntry)
        with Image.open(io.BytesIO(read_entry(location)) if in_zip else location) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except (FileNotFoundError, NotADirectoryError):  # the latter: a name within a zip
        raise UserError(f"{name}: no such image") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not a picture that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: cannot be read whole ({error})") from None
    if image.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255, not scale
        high_byte = np.asarray(image, np.int64) >> 8
        image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_frame(image, image_format):
    """A PIL image as a frame (S, S, 3) uint8."""
    size, (width, height) = image_format.size, image.size
    if image_format.fit == "pad" and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in image_format.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    elif image_format.fit == "crop" and width != height:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.array(image.resize((size, size), RESAMPLING[image_format.resample]))


def read_image(location, image_format):
    """A picture file or ZipEntry as a frame (S, S, 3) uint8. Raises UserError."""
    return to_frame(open_picture(location), image_format)


def read_job(job):
    """(frame, (width, height) of the picture), or a line that says why there is none."""
    location, image_format = job
    try:
        image = open_picture(location)
    except UserError as error:
        return str(error)
    return to_frame(image, image_format), image.size


def begin_worker():
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def read_all(locations, image_format, window=512):
    """Yield read_job's result for each location, in order, read on all cores.

    At most `window` frames are in memory at a time."""
    workers = concurrent.futures.ProcessPoolExecutor(
        os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        initializer=begin_worker,
    )
    with workers:
        for start in range(0, len(locations), window):
            jobs = [(location, image_format) for location in locations[start : start + window]]
            yield from workers.map(read_job, jobs, chunksize=8)


# ---------------------------------------------------------------------------------------------
# A tower's input


def normalise(pixels, image_format):
    """(N, 3, S, S) in 0..1 -> the format's zero mean and unit variance."""
    mean, std = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1)
        for values in (image_format.mean, image_format.std)
    )
    return (pixels - mean) / std


def to_pixels(frames, image_format, device="cpu"):
    """Frames (N, S, S, 3) uint8 -> a tower's input (N, 3, S, S): the one way in, in training,
    feature extraction and sampling alike."""
    frames = torch.as_tensor(np.array(frames), device=device)
    return normalise(frames.permute(0, 3, 1, 2) / 255, image_format)
