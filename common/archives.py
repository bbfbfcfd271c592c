"""
Archives of pictures: folders and zips. A picture is found by its path inside one of them.
"""

import os
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass

from config import UserError, regular

MOST_BYTES = 1 << 28  # the largest picture in a zip


@dataclass(frozen=True)
class ZipEntry:
    """The position of a picture in a zip: enough to read it without the zip's index."""

    archive: str
    name: str
    offset: int
    length: int  # packed
    size: int  # unpacked
    method: int
    crc: int


def clean(name):
    """A picture's name as a path with forward slashes, without a leading ./, and with composed
    accents (macOS writes them apart)."""
    path = os.path.normpath(name.replace("\\", "/")).replace("\\", "/")
    return unicodedata.normalize("NFC", path)


class Archives:
    """Several folders and zips of pictures. Raises UserError for a path that is neither."""

    def __init__(self, paths):
        self.paths = [str(path) for path in paths]
        self.by_base_name = None  # {base name: [(path inside, location)]}, made when needed
        self.zips = {path: self.read_zip(path) for path in self.paths if not os.path.isdir(path)}

    @staticmethod
    def read_zip(path):
        try:
            with zipfile.ZipFile(regular(path)) as archive:
                infos = archive.infolist()
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path}: neither a folder nor a whole zip ({error})") from None
        return {
            clean(info.filename): ZipEntry(
                path,
                info.filename,
                info.header_offset,
                info.compress_size,
                info.file_size,
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
                        inside = clean(os.path.relpath(location, path))
                        found[inside.rpartition("/")[2]].append((inside, location))
        return found

    def find(self, name):
        """The location of a picture, a path or a ZipEntry; None if there is none. `name` is its
        whole path in one of the archives, else the end of its path.

        Raises UserError if several match: "1.jpg" could be a/1.jpg or b/1.jpg."""
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
            whole = [at for path, at in candidates if path == name or path.endswith("/" + name)]
        whole = list(dict.fromkeys(whole))  # an absolute path is in every archive
        if len(whole) > 1:
            one, two = (getattr(location, "name", location) for location in whole[:2])
            raise UserError(
                f"{name}: {len(whole)} pictures could be meant, {one} and {two} among "
                "them: write more of the path, or give fewer archives"
            )
        return whole[0] if whole else None


class BesideFile:
    """The pictures that a JSON names: beside the file itself first, then in Archives. Published
    data have the same names in every split, each with its own pictures."""

    def __init__(self, path, archives):
        self.folder, self.archives = os.path.dirname(os.path.abspath(path)), archives
        self.there = set(os.listdir(self.folder))  # so that few names need a look at the disk

    def find(self, name):
        """As Archives.find()."""
        for spelling in dict.fromkeys((name, clean(name))):
            location = os.path.join(self.folder, spelling)  # an absolute path stays as it is
            may_be = os.path.isabs(spelling) or spelling.split("/")[0] in self.there
            if may_be and os.path.isfile(location):
                return location
        return self.archives.find(name)


def read_bytes(location):
    """The bytes of a picture, a path or ZipEntry. Raises UserError, OSError."""
    if isinstance(location, ZipEntry):
        return read_entry(location)
    with open(regular(location), "rb") as file:
        return file.read()


def read_entry(entry):
    """The bytes of a picture in a zip. Raises UserError if they are corrupted or too many: a few
    kilobytes may unpack to more than the memory."""
    if max(entry.size, entry.length) > MOST_BYTES:
        raise UserError(f"{entry.name}: {entry.size:,} bytes in {entry.archive}: no picture")
    with open(entry.archive, "rb") as file:
        file.seek(entry.offset + 26)  # the local header has 30 bytes and ends with two lengths
        lengths = file.read(4)  # of the name and of the extra field before the content
        name_length, extra_length = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        file.seek(name_length + extra_length, os.SEEK_CUR)
        content = file.read(entry.length)
    if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{entry.name}: an unsupported compression; zip it stored or deflated")
    try:
        if entry.method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-15).decompress(content, entry.size + 1)
    except zlib.error as error:
        raise UserError(f"{entry.name}: {error}") from None
    if zlib.crc32(content) != entry.crc:
        raise UserError(f"{entry.name}: corrupted in {entry.archive} (its checksum differs)")
    return content
