"""Finding pictures, reading every kind of them, making them square."""

import multiprocessing
import os
import random
import struct
import tracemalloc
import unicodedata
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image, ImageOps

from common import images
from common.archives import Archives
from common.cores import on_all_cores
from common.images import ImageFormat, read_image
from config import UserError

SMALL = ImageFormat(8)


def picture(path, mode="RGB", size=(20, 10)):
    image = Image.new("RGB", size, (200, 30, 30))
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], 200 * 256, np.uint16))
    elif mode == "exif":
        image.paste((30, 30, 200), (0, 0, size[0] // 2, size[1]))  # left half blue
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned a quarter to the right: blue goes up
        image.save(path, exif=exif, quality=95)
        return str(path)
    else:
        image = image.convert(mode)
    image.save(path)
    return str(path)


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", "png"),
        ("L", "png"),
        ("P", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("RGBA", "png"),
        ("I;16", "png"),
    ],
)
def test_every_kind_of_picture_is_read(tmp_path, mode, suffix):
    frame = read_image(picture(tmp_path / f"x.{suffix}", mode), SMALL)
    assert frame.shape == (8, 8, 3) and frame.dtype == np.uint8
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        assert abs(frame.astype(int) - (200, 30, 30)).max() < 32
    if mode == "I;16":
        assert (frame == 200).all()


def test_a_turned_picture_is_turned_upright(tmp_path):
    frame = read_image(picture(tmp_path / "x.jpg", "exif"), SMALL).astype(int)
    assert (frame[0, :, 2] > 150).all() and (frame[-1, :, 0] > 150).all()


def test_a_picture_becomes_a_square_as_its_format_says():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (0, 0, 10, 20))
    squashed, padded, cropped, centre = (
        images.to_picture(wide, ImageFormat(8, fit, "bilinear")).frames[0] for fit in images.FITS
    )
    assert (squashed[:, 0] == (0, 0, 255)).all() and (squashed[:, -1] == (255, 0, 0)).all()
    grey = [int(255 * mean) for mean in images.IMAGENET_MEAN]
    assert (padded[0] == grey).all() and (padded[-1] == grey).all()
    assert (padded[4, -1] == (255, 0, 0)).all() and padded[4, 0, 2] > 150
    assert (cropped[:, 4:] == (255, 0, 0)).all()  # the blue quarter is mostly cut off


def test_a_reduced_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    soft = np.random.RandomState(0).randint(0, 256, (6, 8, 3), np.uint8)
    soft = Image.fromarray(soft).resize((160, 120), Image.Resampling.BICUBIC)
    reduced = ImageFormat(16, resample="reduced")
    for name, decoded in (("x.jpg", (40, 30)), ("x.png", (160, 120))):
        path = str(tmp_path / name)
        soft.save(path, quality=95)
        assert images.load_picture(path).size == (160, 120)
        assert images.load_picture(path, 16).size == decoded  # a quarter: an eighth is 20 x 15
        alike = replace(reduced, resample="bilinear")
        off = np.abs(read_image(path, reduced).astype(int) - read_image(path, alike)).max()
        assert off == 0 if name == "x.png" else off < 12
    soft.resize((31, 40)).save(tmp_path / "y.jpg")  # no side is ever made smaller than is wanted
    assert images.load_picture(str(tmp_path / "y.jpg"), 16).size == (31, 40)
    with pytest.raises(ValueError, match="tiles of a reduced picture"):
        replace(reduced, canvases=((32, 16),))


def test_a_format_survives_json():
    import json
    from dataclasses import asdict

    image_format = ImageFormat(32, "pad", "bicubic", mean=(0.1, 0.2, 0.3))
    assert ImageFormat.parse(json.loads(json.dumps(asdict(image_format)))) == image_format


def test_pixels_are_normalised_and_nothing_else():
    frames = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3), np.uint8)
    pixels = images.to_pixels(frames, SMALL)
    back = pixels * torch.tensor(SMALL.std)[:, None, None] + torch.tensor(SMALL.mean)[:, None, None]
    assert torch.allclose(back * 255, torch.tensor(frames).permute(0, 3, 1, 2).float(), atol=1e-3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: None, "no such image"),
        (lambda p: p.write_text("hello"), "not a picture"),
        (lambda p: p.write_bytes(b""), "not a picture"),
        (lambda p: p.mkdir(), "a folder"),
        (lambda p: os.mkfifo(p), "a pipe"),  # to open it would be to wait for ever
        (lambda p: picture(p, size=(20_000, 30)), "20000 x 30 pixels"),
        (lambda p: picture(p, size=(3, 1000)), "3 x 1000 pixels"),
        (lambda p: picture(p, size=(10_001, 10_000)), "10001 x 10000 pixels"),
    ],
)
def test_a_bad_picture_is_one_clear_line(tmp_path, make, message):
    path = tmp_path / "bad.jpg"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        read_image(path, SMALL)
    assert one_line(error)


def test_a_truncated_jpeg_is_one_clear_line(tmp_path):
    Image.effect_noise((200, 200), 90).save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read whole"):
        read_image(tmp_path / "x.jpg", SMALL)


# ---- finding


def shade(location):
    return int(read_image(location, SMALL)[0, 0, 0])


@pytest.fixture
def twins(tmp_path):
    """Pictures of equal names and different shades in two folders, and in a zip of these."""
    for i, folder in enumerate("ab"):
        (tmp_path / "d" / folder).mkdir(parents=True)
        for k in range(3):
            shade_of_this = (20 * i + 50 * k,) * 3
            Image.new("RGB", (9, 9), shade_of_this).save(tmp_path / "d" / folder / f"{k}.png")
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "d").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path))
    return tmp_path


@pytest.mark.parametrize("place", ["d", "d.zip"])
def test_equal_names_in_two_folders_are_told_apart(twins, place):
    places = Archives([twins / place])
    for i, folder in enumerate("ab"):
        for k in range(3):
            assert shade(places.find(f"{folder}/{k}.png")) == 20 * i + 50 * k
    with pytest.raises(
        UserError, match=r"1.png: 2 pictures could be meant, .*a.1.png and"
    ) as error:
        places.find("1.png")
    assert one_line(error)
    assert places.find("c/1.png") is None and places.find("7.png") is None
    assert places.find("/1.png") is None  # no part of a name: whole names of folders count


def test_a_whole_path_goes_before_one_that_ends_so(twins):
    Image.new("RGB", (9, 9), (250,) * 3).save(twins / "d" / "1.png")
    assert shade(Archives([twins / "d"]).find("1.png")) == 250
    assert shade(Archives([twins / "d"]).find("./1.png")) == 250


def test_the_same_path_in_two_places_is_refused(twins):
    with pytest.raises(UserError, match="2 pictures could be meant"):
        Archives([twins / "d" / "a", twins / "d" / "b"]).find("1.png")


def test_what_is_neither_folder_nor_zip_is_one_clear_line(tmp_path):
    (tmp_path / "x.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "later.zip", "w") as archive:
        archive.writestr("a", "a")
    corrupted = bytearray((tmp_path / "later.zip").read_bytes())
    corrupted[corrupted.index(b"PK\x01\x02") + 6] = 148  # made for a later version of zip
    (tmp_path / "later.zip").write_bytes(corrupted)
    for path in ("x.zip", "none", "later.zip"):
        with pytest.raises(UserError, match="neither a folder nor a whole zip"):
            Archives([tmp_path / path])


def test_a_flipped_bit_inside_a_zip_is_noticed(tmp_path):
    picture(tmp_path / "x.jpg", size=(64, 64))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(tmp_path / "x.jpg", "x.jpg")
    content = bytearray((tmp_path / "z.zip").read_bytes())
    content[400] ^= 1
    (tmp_path / "z.zip").write_bytes(content)
    with pytest.raises(UserError, match="corrupted in"):
        read_image(Archives([tmp_path / "z.zip"]).find("x.jpg"), SMALL)


def test_what_no_picture_is_stays_packed(tmp_path, monkeypatch):
    """A zip bomb, by what its index says and by what it says wrongly."""
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("large.png", bytes(300 << 20))
        archive.writestr("lies.png", bytes(100 << 20))
    place = Archives([tmp_path / "z.zip"])
    tracemalloc.start()
    with pytest.raises(UserError, match="314,572,800 bytes in .*z.zip: no picture"):
        read_image(place.find("large.png"), SMALL)
    lies = replace(place.find("lies.png"), size=1000)
    with pytest.raises(UserError, match="corrupted in .*z.zip"):
        read_image(lies, SMALL)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_all_are_read_in_order_and_failures_are_lines(tmp_path):
    locations = [picture(tmp_path / f"{i}.png", size=(10 + i, 10)) for i in range(20)]
    locations[7] = str(tmp_path / "none.png")
    answers = list(images.read_all(locations, SMALL, window=8))
    assert "no such image" in answers[7]
    assert [(a.width, a.height) for i, a in enumerate(answers) if i != 7] == [
        (10 + i, 10) for i in range(20) if i != 7
    ]


@pytest.mark.parametrize("window, together", [(512, 16), (6, 3), (1, 1), (2, 8)])
def test_all_cores_keep_the_order_and_may_be_left(window, together):
    jobs = list(range(-50, 51))
    assert list(on_all_cores(abs, jobs, window, together)) == [abs(job) for job in jobs]
    working = on_all_cores(abs, jobs, window, together)
    assert next(working) == 50
    working.close()
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


def test_no_more_is_worked_on_than_the_window_holds(tmp_path):
    jobs = [tmp_path / str(i) for i in range(40)]
    working = on_all_cores(Path.touch, jobs, window=2)
    next(working)
    working.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_given_twice_is_one_place(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    other = tmp_path / "other"
    other.mkdir()
    whole = str(tmp_path / "1.png")
    assert Archives([tmp_path, other]).find(whole) == whole
    assert Archives([tmp_path, tmp_path]).find("1.png") == whole


def png(path, bits, pixels, transparent):
    """Write a PNG of 16 bits by hand: pixels (h, w) grey or (h, w, 3), a transparent colour."""
    pixels = np.asarray(pixels, ">u2").reshape(len(pixels), len(pixels[0]), -1)
    height, width, channels = pixels.shape

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if channels == 3 else 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(f">{channels}H", *transparent))
    content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_a_transparent_colour_of_16_bits_is_white(tmp_path):
    png(tmp_path / "grey.png", 16, [[1000, 51200], [51201, 65535]], [51200])
    frame = np.asarray(images.open_picture(tmp_path / "grey.png"))
    assert frame[..., 0].tolist() == [[3, 255], [200, 255]]
    colours = [[(51200, 0, 256), (51200, 0, 512)], [(0, 0, 0), (65535, 1, 2)]]
    png(tmp_path / "colour.png", 16, colours, [51200, 0, 256])
    frame = np.asarray(images.open_picture(tmp_path / "colour.png"))
    assert frame.tolist() == [[[255, 255, 255], [200, 0, 2]], [[0, 0, 0], [255, 0, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_upright(tmp_path, orientation):
    """As ImageOps.exif_transpose turns it, and also where that cannot write the EXIF again."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as saved:
        right = np.asarray(ImageOps.exif_transpose(saved))
    assert (np.asarray(images.open_picture(tmp_path / "a.png")) == right).all()
    exif[282] = 72.5  # a fraction, whose type is then overwritten by one of whole numbers
    content = exif.tobytes().replace(struct.pack("<HH", 282, 5), struct.pack("<HH", 282, 4))
    content = content.replace(struct.pack(">HH", 282, 5), struct.pack(">HH", 282, 4))
    for damaged in (content, content[:-6]):
        image.save(tmp_path / "b.png", exif=damaged)
        assert (np.asarray(images.open_picture(tmp_path / "b.png")) == right).all()


def test_exif_made_at_random_ends_in_a_picture_or_one_line(tmp_path):
    rng, read = random.Random(0), 0
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (4, 6, 3), np.uint8))
    for _ in range(300):
        exif = Image.Exif()
        exif[274], exif[282], exif[0x8825] = rng.randint(1, 8), 72.5, {2: (1.0, 2.0, 3.0)}
        content = bytearray(exif.tobytes())
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(6, len(content))] = rng.randrange(256)
        image.save(tmp_path / "a.png", exif=bytes(content))
        try:
            images.open_picture(tmp_path / "a.png")
            read += 1
        except UserError as error:
            assert "EXIF" in str(error) and "\n" not in str(error)
    assert read > 200


@pytest.mark.parametrize("archive", ["folder", "zip"])
@pytest.mark.parametrize("stored, asked", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_are_the_same_in_both_forms(tmp_path, archive, stored, asked):
    """macOS writes \u00e9 as e and an accent, in folders and in zips."""
    name = unicodedata.normalize(stored, "caf\u00e9/b\u00e9b\u00e9.png")
    (tmp_path / "folder" / name).parent.mkdir(parents=True)
    path = picture(tmp_path / "folder" / name)
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.write(path, name)
    for wanted in ("caf\u00e9/b\u00e9b\u00e9.png", "b\u00e9b\u00e9.png"):
        location = Archives([tmp_path / archive]).find(unicodedata.normalize(asked, wanted))
        assert read_image(location, SMALL).shape == (8, 8, 3)
