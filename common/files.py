"""
Files that appear whole or not at all, tables, logs, and a lock on a folder.
"""

import csv
import io
import json
import os
import platform
import re
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from config import UserError, regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOST = re.sub(r"[^\w-]", "-", platform.node())  # which of the machines that share a disk


@contextmanager
def named(path):
    """Say which file, where the system complains of one that is open: of a full disk, say."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def about(path):
    """Say which file, where a UserError does not."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from None


@contextmanager
def writing(path):
    """A binary file that appears at `path` whole or not at all, also when the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{HOST}.{os.getpid()}.tmp")
    try:
        with named(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """The value as a JSON file, whole or not at all."""
    with writing(path) as file:
        file.write(json.dumps(value, indent=1).encode("utf-8"))


def read_text(path):
    """The text in a file in UTF-8, or UTF-16 where it says so. Raises OSError, and UserError with
    the line where it is not."""
    content = Path(regular(path)).read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not in UTF-8 ({error.reason}): convert it, for example with iconv"
        ) from None


def read_json(path):
    """What a JSON file holds. Raises OSError, UserError."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if r"\ud" in text.lower():  # half of a pair that stands alone is no character
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: not in Unicode ({error.reason})") from None
    return content


def read_list(path, of):
    """The list in a JSON file, of at least one. of: what it is a list of, to say where there is
    none. Raises UserError."""
    items = read_json(path)
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: want a list of {of}")
    return items


def write_csv(path, header, rows):
    """A table as a CSV file, whole or not at all."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    with writing(path) as file:
        file.write(text.getvalue().encode("utf-8"))


def read_csv(path, columns):
    """[{column: text}] of a CSV file, with each row's line number under "line".

    Raises OSError for a missing file, UserError for another encoding (read_text), a missing column,
    an empty cell in `columns`, or no rows."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        header = reader.fieldnames or []
        rows = [row | {"line": reader.line_num} for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a CSV ({error})") from None
    lacking = [column for column in columns if column not in header]
    if lacking:
        found = ",".join(header) or "(empty)"
        raise UserError(f"{path}:1: no column {', '.join(lacking)}; the header is {found}")
    for row in rows:
        empty = [column for column in columns if not row[column]]
        if empty:
            raise UserError(f"{path}:{row['line']}: empty {empty[0]}")
    if not rows:
        raise UserError(f"{path}: no rows below the header")
    return rows


@contextmanager
def locked(path, wait=True):
    """Hold the lock of a file, which ends with the process however it ends. Without `wait`,
    raises BlockingIOError where another process holds it. A lock of lockf is not inherited by the
    workers that this process starts. (Where the system has none, Windows, there is no lock.)"""
    if fcntl is None:
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except PermissionError:  # what some systems say where others say BlockingIOError
            raise BlockingIOError(f"{path}: locked by another process") from None
        yield


def open_or_create(path):
    """A file to read and write anywhere in it, by several processes at a time."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


@contextmanager
def claimed(file, number, wait):
    """Hold the lock of one byte of a file, which ends with the process however it ends; yields
    whether it is held. With `wait`, only once it is. (No locks on Windows: all claim all.)"""
    if fcntl is None:
        yield True
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
    except (BlockingIOError, PermissionError):
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, number)


def remove_leftovers(folder):
    """Remove what writing() left in a folder when a run was killed: files of processes that are no
    more, and on a disk that machines share other machines' of yesterday."""
    for path in (path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}*.*.*.tmp")):
        host, process = path.name.split(".")[-3:-1]
        is_old = time.time() - path.stat().st_mtime > 24 * 3600
        if process.isdigit() and (is_old if host != HOST else not is_running(int(process))):
            path.unlink(missing_ok=True)


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def only_one(folder, doing):
    """Be the only process that is `doing` this in a folder, else raise UserError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", wait=False))
        except BlockingIOError:
            message = f"{folder}: another run is {doing} here; wait for it, or choose another"
            raise UserError(message + " folder") from None
        remove_leftovers(folder)
        yield


class Rows:
    """The rows of a memory-mapped bin: Rows(bin)[numbers] is bin[numbers], but read from the file,
    a row at a time. Through the map the system would be asked for each of its pages by itself.
    Of another array, and where the system cannot read so (Windows), it is bin[numbers]."""

    def __init__(self, array):
        self.array, self.file = array, None
        if isinstance(array, np.memmap) and hasattr(os, "preadv"):
            self.file = open(array.filename, "rb", buffering=0)  # noqa: SIM115 - as long as this

    def __getitem__(self, numbers):
        if self.file is None:
            return self.array[numbers]
        rows = np.empty((len(numbers), *self.array.shape[1:]), self.array.dtype)
        for number, row in zip(numbers.tolist(), rows):
            at = self.array.offset + number * row.nbytes
            left = memoryview(row.reshape(-1)).cast("B")
            while left:  # a read may bring less than it is asked for
                count = os.preadv(self.file.fileno(), [left], at)
                if not count:
                    raise UserError(f"{self.array.filename}: ends before row {number}")
                at, left = at + count, left[count:]
        return rows


def read_log(path):
    """The entries of a log.jsonl, a dict each; nothing where there is no file. A line that was
    cut short, by a full disk say, is passed over."""
    entries = []
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)]


def append_log(path, entry):
    """Add an entry, a dict, to a log.jsonl."""
    with named(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def trim_log(path, name, start):
    """Drop the entries of steps that were lost, or are trained again, and are about to be logged
    again; and lines that were cut short."""
    kept = [
        entry for entry in read_log(path) if entry.get("phase") != name or entry["step"] < start
    ]
    with writing(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode("utf-8"))
