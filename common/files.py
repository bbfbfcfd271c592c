"""
Files: written completely or not at all; text, JSON and CSV tables; logs; locks.
"""

import csv
import io
import json
import os
import platform
import re
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from config import UserError, regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOST = re.sub(r"[^\w-]", "-", platform.node())  # in names of temporary files on shared disks


@contextmanager
def named(path):
    """Add the file name to an OSError that has none, of a full disk for example."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextmanager
def about(path):
    """Add the file name to a UserError that does not contain it."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from None


@contextmanager
def writing(path):
    """A binary file that appears at `path` complete or not at all, even if the power fails."""
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
    """Write a value as a JSON file."""
    with writing(path) as file:
        file.write(json.dumps(value, indent=1).encode("utf-8"))


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, its lines ended by \\n.
    Raises OSError, and UserError with the line for another encoding."""
    content = Path(regular(path)).read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not in UTF-8 ({error.reason}): convert it, for example with iconv"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{path}:{line}: a NUL character, as in UTF-16 without a byte order mark: convert it "
            "to UTF-8, for example with iconv"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path):
    """The lines of a text file. str.splitlines() would also split at U+2028, U+0085 and others,
    which occur inside of lines. Raises as read_text()."""
    return read_text(path).split("\n")


def read_json(path):
    """The content of a JSON file; of a .jsonl, which has a value in each line, the list of them.
    Raises OSError, UserError."""
    text = read_text(path)
    if str(path).lower().endswith(".jsonl"):
        content = []
        for number, line in enumerate(text.split("\n"), 1):
            content += [parse_json(line, f"{path}:{number}")] if line.strip() else []
        return content
    return parse_json(text, path)


def parse_json(text, where):
    """The value of a text in JSON. Raises UserError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if r"\ud" in text.lower():  # half of a surrogate pair is no character
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: not in Unicode ({error.reason})") from None
    return content


def read_list(path, of):
    """The list in a JSON file, which must not be empty. of: the name of its items for the error.
    Raises UserError."""
    items = read_json(path)
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: want a list of {of}")
    return items


def write_csv(path, header, rows):
    """Write a table as a CSV file."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    with writing(path) as file:
        file.write(text.getvalue().encode("utf-8"))


def read_csv(path, columns, free_text=()):
    """[{column: text}] of a CSV file, with the line number of each row's start under "line". Cells
    lose the space around them; rows without any text are skipped.

    free_text: columns of sentences, which people write without quotes. If the last column is one
    and no other is, a row with more cells than the header is read as a sentence with commas.

    Raises OSError for a missing file; UserError for another encoding, a missing column, a column
    named twice, an empty cell in `columns`, a row that does not fit the header, quotes that do not
    close, or no rows."""
    rows = cells_of(path)
    _, header, _ = next(rows, (1, [], ""))
    rows, unnamed = list(rows), 0
    while header and not header[-1]:  # spreadsheets write commas under which there is nothing
        header, unnamed = header[:-1], unnamed + 1
    lacking = [column for column in columns if column not in header]
    if lacking:
        found = ",".join(header) or "(empty)"
        raise UserError(f"{path}:1: no column {', '.join(lacking)}; the header is {found}")
    twice = [column for column in header if column and header.count(column) > 1]
    if twice:
        raise UserError(f"{path}:1: two columns are called {twice[0]}")
    if is_numbered(rows, len(header)):
        raise UserError(
            f"{path}:{rows[0][0]}: each row begins with a number that has no name in the header: "
            "name that column, or remove it"
        )
    is_free = header[-1] in free_text and not set(header[:-1]) & set(free_text)
    table = []
    for line, cells, raw in rows:
        if all(cell == name for cell, name in zip(cells, header) if name):
            raise UserError(f"{path}:{line}: the header again, as if two files were joined")
        if not any(cells[len(header) :]) and len(cells) <= len(header) + unnamed:
            cells = cells[: len(header)]
        if len(cells) > len(header) and is_free:
            cells = join_last(cells, raw, len(header))
        if len(cells) != len(header):
            raise UserError(
                f"{path}:{line}: {len(cells)} cells under a header of {len(header)}: "
                "put quotes around a text with commas"
            )
        row = dict(zip(header, cells))
        empty = [column for column in columns if not row[column]]
        if empty:
            raise UserError(f"{path}:{line}: empty {empty[0]}")
        table.append(row | {"line": line})
    if not table:
        raise UserError(f"{path}: no rows below the header")
    return table


def cells_of(path):
    """Yield (line number, cells, text) of each row of a CSV that is not blank. Raises UserError for
    quotes that are wrong, or that take in rows which follow."""
    lines = io.StringIO(read_text(path), newline="").readlines()
    reader, first = csv.reader(lines, skipinitialspace=True, strict=True), 0
    while first < len(lines):
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}:{first + 1}: quotes that do not close, or text after them ({error})"
            ) from None
        text = lines[first : reader.line_num]
        if len(text) > 1 and any(looks_like(line, text[0]) for line in text[1:]):
            raise UserError(
                f"{path}:{first + 1}: quotes that do not close: the cell takes in the row of line "
                f"{first + 2}"
            )
        cells = [cell.strip() for cell in cells or []]
        if any(cells):
            yield first + 1, cells, "".join(text)
        first = reader.line_num


def looks_like(line, row):
    """Whether two lines of text begin with a number or time, or have a file name with the same
    suffix: then the first, inside of quotes, is a row of its own."""
    kinds = []
    for text in (line, row):
        cells = [cell.strip().strip('"') for cell in text.strip().split(",")]
        names = [re.fullmatch(r"\S+(\.[A-Za-z]\w{1,4})", cell) for cell in cells]
        is_number = len(cells) > 1 and re.fullmatch(r"[\d:.]+", cells[0])
        kinds.append({name[1] for name in names if name} | ({"number"} if is_number else set()))
    return bool(kinds[0] & kinds[1])


def is_numbered(rows, width):
    """Whether each row has one more cell than the header, and they begin with 0, 1, 2 ... or
    1, 2, 3 ...: an index that some programs write without a name. A table of times, whose first
    cells are numbers too, has more numbers than names then."""
    longer = [cells for _, cells, _ in rows if len(cells) > width]
    if not rows or len(longer) < len(rows):
        return False
    numbers = [cells[0] for cells in longer]
    counts = [[str(i + start) for i in range(len(rows))] for start in (0, 1)]
    number = re.compile(r"[\d:.]+")
    shifted = all(number.fullmatch(cells[width - 1]) for cells in longer)
    return numbers in counts and (shifted or not any(number.fullmatch(c[1]) for c in longer))


def join_last(cells, raw, width):
    """The cells of a row with unquoted commas in its last column, that column as it is written. The
    row is left as it is if it has quotes or is empty after a comma."""
    parts = raw.strip().split(",", width - 1)
    if '"' in "".join(parts[:-1]) or re.search(r'(^|,)\s*("|$)', parts[-1]):
        return cells
    return [part.strip() for part in parts]


@contextmanager
def locked(path, wait=True):
    """Hold the lock of a file, which ends with this process. Without `wait`, raises BlockingIOError
    if another process holds it. Workers of this process do not inherit it (lockf). On Windows
    nothing is locked."""
    if fcntl is None:
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except PermissionError:  # some systems raise this instead of BlockingIOError
            raise BlockingIOError(f"{path}: locked by another process") from None
        yield


def open_or_create(path):
    """A file that several processes read and write at the same time."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


@contextmanager
def claimed(file, number, wait):
    """Try to hold the lock of one byte of a file, which ends with this process; yields whether it
    is held. With `wait`, waits for it. On Windows everything counts as held."""
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
    """Delete temporary files that killed runs left in a folder: those of processes that have ended,
    and, from other machines on a shared disk, those older than a day."""
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
    """Hold the lock of a folder while `doing` something there; after a user's mistake a folder with
    nothing in it is removed. Raises UserError if another process holds it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", wait=False))
        except BlockingIOError:
            message = f"{folder}: another run is {doing} here; wait for it, or choose another"
            raise UserError(message + " folder") from None
        remove_leftovers(folder)
        try:
            yield
        except UserError:
            if [path.name for path in folder.iterdir()] == [".lock"]:
                with suppress(OSError):
                    (folder / ".lock").unlink()
                    folder.rmdir()
            raise


class Rows:
    """Rows(bin)[numbers] is bin[numbers], read from the file of the memory-mapped bin, a row at a
    time: through the map each page would be a separate read. For other arrays, and on Windows, it
    is bin[numbers] itself."""

    def __init__(self, array):
        self.array, self.file = array, None
        if isinstance(array, np.memmap) and hasattr(os, "preadv"):
            self.file = open(array.filename, "rb", buffering=0)  # noqa: SIM115

    def __getitem__(self, numbers):
        if self.file is None:
            return self.array[numbers]
        rows = np.empty((len(numbers), *self.array.shape[1:]), self.array.dtype)
        for number, row in zip(numbers.tolist(), rows):
            at = self.array.offset + number * row.nbytes
            left = memoryview(row.reshape(-1)).cast("B")
            while left:  # a read may return less than was asked for
                count = os.preadv(self.file.fileno(), [left], at)
                if not count:
                    raise UserError(f"{self.array.filename}: ends before row {number}")
                at, left = at + count, left[count:]
        return rows


def read_log(path):
    """The entries of a log.jsonl, a dict each; [] if there is no file. Incomplete lines, of a full
    disk for example, are skipped."""
    entries = []
    lines = Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)]


def append_log(path, entry):
    """Append an entry, a dict, to a log.jsonl."""
    with named(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def trim_log(path, name, start):
    """Delete a phase's entries from step `start` on, which will be logged again, and incomplete
    lines."""
    kept = [
        entry for entry in read_log(path) if entry.get("phase") != name or entry["step"] < start
    ]
    with writing(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode("utf-8"))
