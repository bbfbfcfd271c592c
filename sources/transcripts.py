"""
Transcripts with times: subtitles (.srt, .vtt), a table (.csv) or CHILDES' form (.cha), each read
into a list of Said. A new form is a reader here and an entry in READERS.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from common.files import read_csv, read_text
from config import UserError


@dataclass
class Said:
    """An utterance: seconds from the start of the film, words, speaker, and its line in the
    file."""

    start: float
    end: float
    words: str
    speaker: str
    line: int


TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{2})(?:[.,](\d{1,3}))?$")
LONGEST = 100 * 3600.0  # seconds; frames are counted before the film's length is known


def seconds(text, where):
    """Seconds of 1:02:03.5, 02:03,500 or 123.5. Raises UserError."""
    text = text.strip()
    found = TIME.match(text)
    if re.fullmatch(r"\d+(\.\d+)?", text):
        time = float(text)
    elif found:
        hours, minutes, whole, part = found.groups()
        time = float(hours or 0) * 3600 + int(minutes) * 60 + int(whole) + float(f"0.{part or 0}")
    else:
        raise UserError(f"{where}: {text[:30]!r} is not a time")
    return within(time, text, where)


def within(time, text, where):
    """The time, if a film can be so long. Raises UserError."""
    if time > LONGEST:
        raise UserError(
            f"{where}: {text[:30]} is past {LONGEST / 3600:g} hours, too long for a film"
        )
    return time


def read_subtitles(path):
    """The Said of an .srt or .vtt file: blocks of a line with --> and lines of words. <v NAME> in a
    .vtt names the speaker."""
    said, current = [], None
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if "-->" in line:
            first, _, rest = line.partition("-->")
            second = (rest.split() or [""])[0]  # a .vtt may have settings after the time
            where = f"{path}:{number}"
            current = Said(seconds(first, where), seconds(second, where), "", "", number)
            said.append(current)
        elif not line.strip():
            current = None
        elif current is not None:
            voice = re.match(r"<v(?:\.\S+)?\s+([^>]+)>", line)
            if voice:
                current.speaker = voice.group(1).strip()
            current.words += " " + re.sub(r"<[^>]*>|\{\\[^}]*\}", "", line)
    return said


def read_table(path):
    """The Said of a CSV with the columns start, end, text and optionally speaker."""
    said = []
    for row in read_csv(path, ("start", "end", "text"), ("text",)):
        where = f"{path}:{row['line']}"
        times = seconds(row["start"], where), seconds(row["end"], where)
        said.append(Said(*times, row["text"], row.get("speaker") or "", row["line"]))
    return said


def read_chat(path):
    """The Said of a CHILDES transcript (CHAT): main tiers such as *MOT: that end with a time mark,
    milliseconds between two bell characters; tiers without one are skipped. Raises UserError for a
    speaker who is not among @Participants."""
    tiers, participants = [], None
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.startswith("\t") and tiers:
            tiers[-1][1] += " " + line.strip()  # the tier continues
        else:
            tiers.append([number, line])
    said = []
    for number, line in tiers:
        name, _, rest = line.partition(":")
        if name == "@Participants":
            participants = [part.split()[0] for part in rest.split(",") if part.split()]
        if not line.startswith("*"):
            continue
        speaker = name[1:].strip()
        if participants is not None and speaker not in participants:
            raise UserError(f"{path}:{number}: {speaker} is not among @Participants")
        mark = re.search(r"\x15(\d+)_(\d+)\x15", rest)
        if mark:
            where = f"{path}:{number}"
            start, end = (within(float(ms) / 1000, f"{ms} ms", where) for ms in mark.groups())
            said.append(Said(start, end, plain_words(rest), speaker, number))
    return said


def plain_words(text):
    """The words of a CHAT tier without its codes: [...] and <...> marks, &-um, xxx, suffixes after
    @. Omitted parts of words, in round brackets, are restored."""
    text = re.sub(r"\x15[^\x15]*\x15|\[[^\]]*\]|[<>‡„↓↑]", " ", text)
    text = re.sub(r"\+[^\w\s]+", " ", text)  # +... +/. and other terminators
    words = []
    for word in text.split():
        if word.startswith(("&", "0")) or word in ("xxx", "yyy", "www"):
            continue
        words.append(re.sub(r"@\S*|[()]|(?<=\w):(?=\w)", "", word).replace("_", " "))
    return " ".join(word for word in words if word)


READERS = {".srt": read_subtitles, ".vtt": read_subtitles, ".csv": read_table, ".cha": read_chat}
CHILD = "CHI"  # CHILDES' code of the key child


def read_transcript(path, speakers=()):
    """(the Said of a transcript in order, all its speakers). speakers: keep only these; "-MOT":
    leave these out; the key child CHI is kept only if named. Raises UserError, with file and
    line."""
    said = READERS[Path(path).suffix.lower()](path)
    before = 0.0
    for one in said:
        where = f"{path}:{one.line}"
        if one.end < one.start:
            raise UserError(f"{where}: it ends at {one.end:g} s, before it starts, {one.start:g} s")
        if one.start < before:
            raise UserError(f"{where}: time runs backwards, from {before:g} s to {one.start:g} s")
        before = one.start
    left_out = [CHILD, *(name[1:] for name in speakers if name.startswith("-"))]
    kept = [name for name in speakers if not name.startswith("-")]
    chosen = []
    for one in said:
        one.words = " ".join(one.words.split()).lower()
        wanted = one.speaker in kept if kept else one.speaker not in left_out
        if one.words and re.search(r"\w", one.words) and wanted:
            chosen.append(one)
    return chosen, {one.speaker for one in said}
