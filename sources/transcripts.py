"""
Transcripts with times: subtitles (.srt, .vtt), a table (.csv) or CHILDES' form (.cha), each read
into a list of Said. A new form is a reader here and an entry in READERS.
"""

import html
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from common.files import read_csv, read_lines
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
        if "," in text and len(part) < 3:
            raise UserError(f"{where}: {text[:30]!r}: write milliseconds in three digits")
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


# ---------------------------------------------------------------------------------------------
# Subtitles

VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]+)>")  # a .vtt's name of a speaker
# <i>, </c>, a time in a line that appears word by word, and {\an8}; but not 3 < 5
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<\d[\d:.]*>|\{\\[^}]*\}")


def read_srt(path):
    """The Said of an .srt file: each cue is a line with its number, a line with --> and lines of
    words. Blank lines may be missing, or be among the words."""
    return said_of(read_cues(path))


def read_vtt(path):
    """The Said of a .vtt file. A cue ends with an empty line; after it there may be a comment, or
    the name of the next cue. <v NAME> names a speaker."""
    cues = read_cues(path)
    for *_, lines in cues:
        if "" in lines:
            del lines[lines.index("") :]
    return said_of(cues)


def read_cues(path):
    """[(start, end, line number, lines of words)] of a file of subtitles. Raises UserError."""
    cues = []
    for number, line in enumerate(read_lines(path), 1):
        first, arrow, rest = line.partition("-->")
        if arrow:
            second = (rest.split() or [""])[0]  # a .vtt may have settings after the time
            where = f"{path}:{number}"
            if cues and cues[-1][3] and re.fullmatch(r"\s*\d+\s*", cues[-1][3][-1]):
                del cues[-1][3][-1]  # it is not said: it is the number of this cue
            cues.append((seconds(first, where), seconds(second, where), number, []))
        elif cues:
            cues[-1][3].append(line)
    return cues


def said_of(cues):
    """The Said of cues, one for each speaker of a cue."""
    lines = [[line for line in cue[3] if without_tags(line).strip()] for cue in cues]
    said = []
    follows = [one[0] - before[1] < 0.05 for before, one in pairwise(cues)]  # seconds
    for (start, end, number, _), own in zip(cues, without_repeats(lines, follows)):
        before, *named = VOICE.split(" ".join(own))
        voices = [["", before]]
        for speaker, words in zip(named[::2], named[1::2]):
            if speaker.strip() == voices[-1][0]:
                voices[-1][1] += words
            else:
                voices.append([speaker.strip(), words])
        for speaker, words in voices:
            if without_tags(words).strip():
                said.append(Said(start, end, without_tags(words), speaker, number))
    return said


def without_tags(text):
    """The words of a text with tags and entities such as &amp;."""
    return html.unescape(TAG.sub("", re.sub(r"<br\s*/?>", " ", text)))


def without_repeats(cues, follows):
    """The lines of each cue without those that stand there still from the cue before.

    Automatic captions roll: a cue is the line before and a new one. People say things twice too, so
    this is done only in a file of which most cues of several lines, and two at least, begin with
    the last of the cue before, which ends where they begin. follows: for each cue but the first,
    whether it does so."""
    words = [[without_tags(line).split() for line in lines] for lines in cues]
    repeats = [0]
    for (before, after), follows_it in zip(pairwise(words), follows):
        lengths = range(min(len(before), len(after)) if follows_it else 0, 0, -1)
        repeats.append(next((n for n in lengths if before[-n:] == after[:n]), 0))
    several = [repeat > 0 for lines, repeat in zip(cues, repeats) if len(lines) > 1]
    if sum(several) < 2 or 2 * sum(several) <= len(several):
        return cues
    return [lines[repeat:] for lines, repeat in zip(cues, repeats)]


# ---------------------------------------------------------------------------------------------
# Tables, and CHILDES' transcripts


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
    milliseconds between two bell characters; tiers without one are skipped. A speaker who is not
    among @Participants is warned of."""
    tiers, participants = [], None
    for number, line in enumerate(read_lines(path), 1):
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
            print(f"warning: {path}:{number}: {speaker} is not among @Participants")
            participants.append(speaker)  # warned of once
        mark = re.search(r"\x15(\d+)_(\d+)\x15", rest)
        if mark:
            where = f"{path}:{number}"
            start, end = (within(float(ms) / 1000, f"{ms} ms", where) for ms in mark.groups())
            said.append(Said(start, end, plain_words(rest), speaker, number))
    return said


def plain_words(text):
    """The words of a CHAT tier without its codes: [...] and <...> marks, pauses such as (.) and
    (1.5), &-um, xxx, suffixes after @. Omitted parts of words, in round brackets, are restored.
    Repetitions and corrections are kept: the child heard them."""
    text = re.sub(r"\x15[^\x15]*\x15|\[[^\]]*\]|\([\d.:]+\)|[<>‡„↓↑]", " ", text)
    text = re.sub(r"\+[^\w\s]+", " ", text)  # +... +/. and other terminators
    words = []
    for word in text.split():
        if word.startswith(("&", "0")) or word in ("xxx", "yyy", "www"):
            continue
        words.append(re.sub(r"@\S*|[()]|(?<=\w):+", "", word).replace("_", " "))
    return " ".join(word for word in words if word)


READERS = {".srt": read_srt, ".vtt": read_vtt, ".csv": read_table, ".cha": read_chat}
CHILD = "CHI"  # CHILDES' code of the key child


def in_order(said, path, sort):
    """The Said by their start. Raises UserError, with file and line, if they are not in order and
    sort is False, or if one ends before it starts."""
    before = 0.0
    for one in said:
        where = f"{path}:{one.line}"
        if one.end < one.start:
            raise UserError(f"{where}: it ends at {one.end:g} s, before it starts, {one.start:g} s")
        if one.start < before and not sort:
            raise UserError(
                f"{where}: time runs backwards, from {before:g} s to {one.start:g} s; --sort puts "
                "utterances in order"
            )
        before = one.start
    return sorted(said, key=lambda one: one.start) if sort else said


def read_transcript(path, speakers=(), sort=False):
    """(the Said of a transcript in order, all its speakers, {reason: how many were left out}).

    speakers: keep only these; "-MOT": leave these out; the key child CHI is kept only if named. A
    transcript that names nobody is kept whole. sort: put it in order. Raises UserError, with file
    and line."""
    said = in_order(READERS[Path(path).suffix.lower()](path), path, sort)
    named = {one.speaker for one in said} - {""}
    left_out = [CHILD, *(name[1:] for name in speakers if name.startswith("-"))]
    kept = [name for name in speakers if not name.startswith("-")]
    if kept and said and not named:
        print(f"{path}: it names no speakers, so all of its utterances are kept")
        kept = []
    elif kept and not named & set(kept):
        print(f"{path}: none of {', '.join(kept)} speaks in it, only {', '.join(sorted(named))}")
    chosen, dropped = [], Counter()
    for one in said:
        one.words = " ".join(one.words.split()).lower()
        wanted = one.speaker in kept if kept else one.speaker not in left_out
        if not wanted:
            dropped[f"of {one.speaker or 'nobody named'}"] += 1
        elif not re.search(r"\w", one.words):
            dropped["without words"] += 1
        else:
            chosen.append(one)
    return chosen, {one.speaker for one in said}, dict(dropped)
