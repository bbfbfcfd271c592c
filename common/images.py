"""
From a picture file to a tower's input: reading, making square or cutting into tiles, normalising.

An ImageFormat says how. Every prepared corpus and checkpoint contains one, so that preparing,
training, sampling and evaluation treat pictures alike.
Letters: N images, S image side in pixels.
"""

import io
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from common import tiles
from common.archives import ZipEntry, read_entry
from common.cores import on_all_cores
from common.devices import send
from config import UserError, regular

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of all DINO releases
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORMS = {  # mean and standard deviation of a tower's training pixels
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # SigLIP's
}
Image.MAX_IMAGE_PIXELS = None  # check_size() refuses large pictures before they are unpacked
FITS = ("squash", "pad", "crop", "centre")
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "reduced": Image.Resampling.BILINEAR,  # of JPEGs decoded smaller, see load_picture()
}


@dataclass(frozen=True)
class ImageFormat:
    """How pictures become frames of size x size pixels, and frames a tower's input.

    fit: squash changes the aspect ratio; pad centres the picture on a square of the mean colour
    (LLaVA-1.5's); crop keeps the middle square; centre does so after resizing (CLIP's) the shorter
    side to `edge` pixels, 0: to size (DINOv2 has 256 and 224).
    resample: the filter; reduced is bilinear, of JPEGs decoded at a lower resolution.
    canvases: sizes (width, height) in pixels, for pictures that are also cut into tiles (see
    tiles.py). max_tiles: interpolate larger maps of tiles down to so many; 0: never."""

    size: int
    fit: str = "squash"
    resample: str = "bilinear"
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    canvases: tuple = ()
    max_tiles: int = 0
    edge: int = 0

    def __post_init__(self):
        check_format(self, FITS, RESAMPLING)

    @property
    def reduced(self):
        return self.size if self.resample == "reduced" else 0

    def beside_others(self):
        """The format of a picture that is in one sequence with others: LLaVA-OneVision, the only
        one with max_tiles, pads it and makes no tiles."""
        return replace(self, fit="pad", canvases=()) if self.max_tiles else self

    @classmethod
    def parse(cls, fields):
        """The ImageFormat of a dict from JSON or a checkpoint."""
        fields = dict(fields)
        for name in ("mean", "std", "canvases"):
            fields[name] = tuple(fields.get(name, ()))
        fields["canvases"] = tuple(tuple(canvas) for canvas in fields["canvases"])
        return cls(**fields)


def check_format(image_format, fits, filters):
    """Raise ValueError for an ImageFormat with impossible values."""
    size, mean, std = image_format.size, image_format.mean, image_format.std
    if type(size) is not int or not 0 < size <= 1 << 14:
        raise ValueError(f"frames of {size!r} pixels")
    if image_format.fit not in fits or image_format.resample not in filters:
        raise ValueError(f"made square by {image_format.fit!r}, {image_format.resample!r}")
    if any(type(number) not in (int, float) for number in (*mean, *std)):
        raise ValueError(f"normalised by {mean!r}, {std!r}, which are no numbers")
    # a comparison with NaN is false, and so is refused here
    is_usual = all(abs(number) < 1e6 for number in mean) and all(0 < number < 1e6 for number in std)
    if len(mean) != 3 or len(std) != 3 or not is_usual:
        raise ValueError(f"normalised by {mean!r}, {std!r}")
    if image_format.canvases and image_format.resample == "reduced":
        raise ValueError("tiles of a reduced picture, which would show no more than the whole")
    for sides in image_format.canvases:
        if len(sides) != 2 or any(type(side) is not int or side < size for side in sides):
            raise ValueError(f"tiles on a canvas of {sides!r} pixels")
    if type(image_format.max_tiles) is not int or image_format.max_tiles < 0:
        raise ValueError(f"at most {image_format.max_tiles!r} tiles")
    edge = image_format.edge
    if type(edge) is not int or (edge and (image_format.fit != "centre" or edge < size)):
        raise ValueError(f"resized to {edge!r} pixels, to cut out {size}")


@dataclass
class Picture:
    """A picture as frames (1 + tiles, S, S, 3) uint8, the whole picture first; rows and columns of
    tiles (0, 0: none); and its original size in pixels."""

    frames: np.ndarray
    rows: int
    columns: int
    width: int
    height: int

    @property
    def grid(self):
        return self.rows, self.columns, self.width, self.height


def as_picture(frame):
    """The Picture of one frame (S, S, 3), without tiles."""
    height, width, _ = frame.shape
    return Picture(frame[None], rows=0, columns=0, width=width, height=height)


# ---------------------------------------------------------------------------------------------
# Reading it


def check_size(name, width, height):
    """Raise UserError for a picture that would take too much memory: padding makes a square of its
    longer side, and resizing a long strip."""
    longer, shorter = max(width, height), min(width, height)
    if longer > 1 << 14 or width * height > 10**8 or longer > 200 * shorter:
        raise UserError(
            f"{name}: {width} x {height} pixels: want at most 16,384 a side, a hundred million "
            "in all, and no side over 200 times the other"
        )


def load_picture(location, reduced=0):
    """A picture file or ZipEntry as an upright PIL image of any mode. Raises UserError if it cannot
    be read completely.

    reduced: a JPEG whose sides are at least 2, 4 or 8 times so many pixels is decoded at a half, a
    quarter or an eighth of its size. That is faster; resizing would drop the pixels anyway."""
    name = location.name if isinstance(location, ZipEntry) else location
    try:
        in_zip = isinstance(location, ZipEntry)
        source = io.BytesIO(read_entry(location)) if in_zip else regular(location)
        with Image.open(source) as image:
            check_size(name, *image.size)
            if reduced:
                image.draft(None, (reduced, reduced))
            depth = image.tile[0][3] if image.tile else ""
            image.load()
            if "16" in str(depth) and image.mode == "RGB":  # Pillow makes it 8 bits, not this:
                colour = image.info.get("transparency")
                if isinstance(colour, tuple):
                    image.info["transparency"] = tuple(value >> 8 for value in colour)
            return upright(image)
    except (FileNotFoundError, NotADirectoryError):  # the latter: a path through a zip
        raise UserError(f"{name}: no such image") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not a picture that Pillow can read") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name}: cannot be read whole ({error})") from None


# What turns a photograph upright, for each value of the EXIF tag 274, "orientation"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image):
    """A PIL image as its EXIF says that it was held. ImageOps.exif_transpose() does so too, but
    writes the EXIF again, and fails on some that can only be read. Raises ValueError."""
    try:
        orientation = image.getexif().get(274)
    except Exception as error:  # whatever Pillow meets in it
        raise ValueError(f"its EXIF cannot be read: {error!r}") from None
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    """A PIL image of any mode as RGB: 16 bits are scaled to 8, transparent pixels become white."""
    if image.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255, not scale
        values, transparent = np.asarray(image, np.int32), image.info.get("transparency")
        grey = (values >> 8).clip(0, 255).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        image = Image.fromarray(grey)
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy


def open_picture(location, reduced=0):
    """A picture file, ZipEntry or PIL image as an upright RGB PIL image. reduced: see
    load_picture(). Raises UserError."""
    if isinstance(location, Image.Image):
        check_size("the picture", *location.size)
        return to_rgb(upright(location))
    return to_rgb(load_picture(location, reduced))


def middle(image, width, height):
    """The middle width x height pixels of a PIL image."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_square(image, image_format):
    """A PIL image as a square of size x size pixels."""
    size, (width, height) = image_format.size, image.size
    resample, side = RESAMPLING[image_format.resample], max(width, height)
    if image_format.fit == "pad" and width != height:
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in image_format.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    elif image_format.fit == "crop" and width != height:
        image = middle(image, min(width, height), min(width, height))
    elif image_format.fit == "centre":
        edge = image_format.edge or size
        longer = int(edge * side / min(width, height))
        new = (edge, longer) if width <= height else (longer, edge)
        return middle(image.resize(new, resample), size, size)
    return image.resize((size, size), resample)


def to_picture(image, image_format):
    """A PIL image as a Picture, with tiles if the format has canvases."""
    views, rows, columns = [to_square(image, image_format)], 0, 0
    if image_format.canvases:
        canvas = tiles.choose_canvas(*image.size, image_format.canvases)
        columns, rows = canvas[0] // image_format.size, canvas[1] // image_format.size
        resample = RESAMPLING[image_format.resample]
        views += tiles.cut(image, canvas, image_format.size, resample)
    return Picture(np.stack([np.array(view) for view in views]), rows, columns, *image.size)


def read_picture(location, image_format):
    """A picture file, ZipEntry or PIL image as a Picture. Raises UserError."""
    return to_picture(open_picture(location, image_format.reduced), image_format)


def read_image(location, image_format):
    """A picture file or ZipEntry as one frame (S, S, 3) uint8. Raises UserError."""
    return np.array(to_square(open_picture(location, image_format.reduced), image_format))


@dataclass(frozen=True)
class Beside:
    """The location of a picture that is in one sequence with others, for read_all()."""

    location: object


def read_job(job):
    """The Picture of (location, image_format), or an error message."""
    location, image_format = job
    try:
        if isinstance(location, Beside):
            return read_picture(location.location, image_format.beside_others())
        return read_picture(location, image_format)
    except UserError as error:
        return str(error)


def read_all(locations, image_format, window=512):
    """Yield the Picture of each location, or an error message, in order, read on all cores. At most
    `window` pictures are in memory."""
    return on_all_cores(read_job, [(location, image_format) for location in locations], window)


# ---------------------------------------------------------------------------------------------
# A tower's input


def normalise(pixels, image_format):
    """Pixels (N, 3, S, S) in 0..1, normalised by the format's mean and standard deviation."""
    mean, std = (
        send(torch.tensor(values), pixels.device).view(3, 1, 1)
        for values in (image_format.mean, image_format.std)
    )
    return (pixels - mean) / std


def to_pixels(frames, image_format, device="cpu"):
    """Frames (N, S, S, 3) uint8 -> a tower's input (N, 3, S, S), in training, feature extraction
    and sampling alike."""
    if not isinstance(frames, torch.Tensor):
        frames = torch.as_tensor(np.array(frames))
    frames = send(frames, device)
    return normalise(frames.permute(0, 3, 1, 2) / 255, image_format)
