"""
Your own video with transcripts: single pictures, clips, and interleaved moments.

    python data.py video --videos DIR --transcripts DIR2

A film is any file that ffmpeg decodes. Its transcript has the same name and the ending .srt, .vtt,
.csv (start, end, text) or .cha (CHILDES; the key child's own words are left out unless --speakers
asks for them); one.en.srt belongs to one.mp4 too. Each utterance gives a pair for each frame on the
screen while it is said, and a clip if there are several. Each `window` utterances in a row give
interleaved moments: the middle frame of each utterance, and its words. Each frame is stored once a
split.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.cores import on_all_cores
from common.images import FITS, ImageFormat, to_square
from config import UserError, option, regular
from sources import Recordings, ffmpeg, hold_out_films, replay_text, transcripts
from tokenizer import TEMPLATES, Tokenizer, caption_sample, chat_sample, check_vocabulary


@dataclass
class Config(Recordings):
    name: str = ""  # write to data/<name>; empty: video
    videos: str = ""  # a folder of films
    transcripts: str = ""  # a folder of transcripts; empty: that of videos
    speakers: tuple[str, ...] = ()  # keep only these; -MOT: leave out; CHI only if named
    sort: bool = False  # put transcripts in order whose times run backwards
    fps: float = option(2.0, low=0.01, high=120.0)  # frames per second
    frames: int = option(8, low=1, high=1024)  # at most, in a clip, evenly spread; 1: no clips
    window: int = option(6, low=0, high=64)  # utterances in a sequence of moments; below 2: none
    template: str = option("bare", choices=tuple(TEMPLATES))  # how moments are written
    size: int = option(224, low=8, high=2048)  # S: frames are S x S pixels
    fit: str = option("pad", choices=FITS)  # how a picture becomes a square
    resample: str = option("bilinear", choices=("bilinear", "bicubic"))  # how it is resized
    vocab_size: int = option(6000, low=260, high=1 << 20)  # BPE tokens, specials included


@dataclass
class Film:
    """A film, its utterances, and for each utterance the numbers of the frames it is said over."""

    path: Path
    transcript: Path
    said: list
    over: list
    strict: bool = True  # an utterance past the film's end is an error; else it is left out
    dropped: dict = field(default_factory=dict)  # {reason: how many utterances were left out}

    @property
    def wanted(self):
        """The numbers of all frames that are needed."""
        return sorted({number for numbers in self.over for number in numbers})


def frames_over(one, fps):
    """The numbers of the frames on the screen while an utterance is said, at least one."""
    first, last = int(np.ceil(one.start * fps - 1e-6)), int(np.ceil(one.end * fps - 1e-6)) - 1
    if last < first:
        return [int(one.start * fps + 1e-6)]
    return list(range(first, last + 1))


def find_films(settings):
    """The Films of a folder with their transcripts. Raises UserError."""
    folder = Path(settings.videos)
    texts = Path(settings.transcripts or settings.videos)
    for path in (folder, texts):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
    passed = (*transcripts.READERS, ".txt", ".json", ".md", ".db", ".ini", "")
    films = [
        path
        for path in sorted(folder.iterdir())
        # not ._one.mp4 and .DS_Store of macOS, nor Thumbs.db of Windows
        if not (path.suffix.lower() in passed or path.name.startswith(".") or path.is_dir())
    ]
    stems = {path.stem for path in films}
    by_stem = {}
    for path in sorted(texts.iterdir()):
        if path.suffix.lower() in transcripts.READERS and not path.name.startswith("."):
            stem = path.stem
            if stem not in stems:  # one.en.srt is the transcript of one.mp4
                stem = re.sub(r"\.[a-z]{2,3}([-_]\w+)*$", "", stem, flags=re.IGNORECASE)
            if stem in by_stem:
                raise UserError(f"{path}: a second transcript beside {by_stem[stem]}")
            by_stem[stem] = path
    found, speakers = [], set()
    for path in films:
        regular(path)  # opening a pipe would wait forever
        if path.stem not in by_stem:
            raise UserError(f"{path}: no {path.stem}{{{','.join(transcripts.READERS)}}} in {texts}")
        transcript = by_stem.pop(path.stem)
        said, heard, dropped = transcripts.read_transcript(
            transcript, settings.speakers, settings.sort
        )
        speakers |= heard
        over = [frames_over(one, settings.fps) for one in said]
        found.append(Film(path, transcript, said, over, dropped=dropped))
    if not found:
        raise UserError(f"{folder}: no films")
    if by_stem:
        raise UserError(f"{next(iter(by_stem.values()))}: no film in {folder} has its name")
    named = speakers - {""}
    for name in settings.speakers if named else ():
        if name.removeprefix("-") not in speakers:
            known = ", ".join(sorted(named))
            raise UserError(f"--speakers {name}: not in {texts}, where {known} speak")
    if not any(film.said for film in found):
        raise UserError(f"{texts}: no utterance is kept")
    return found


# ---------------------------------------------------------------------------------------------
# Reading films, on all cores; after a kill, complete ones are not read again


def read_film(job):
    """Write the needed frames of a film to a file. Returns an error message, or ""."""
    film, image_format, fps, path = job
    if path.exists():
        return ""
    wanted, count = iter(film.wanted), 0
    temporary = path.with_suffix(".tmp")
    number = next(wanted, None)
    try:
        with open(temporary, "wb") as file:
            for count, frame in enumerate(ffmpeg.read_frames(film.path, fps), 1):
                if count - 1 == number:
                    square = to_square(Image.fromarray(frame), image_format)
                    file.write(np.asarray(square).tobytes())
                    number = next(wanted, None)
    except UserError as error:
        temporary.unlink(missing_ok=True)
        return str(error)
    last = count / fps
    late = [one for one in film.said if one.end > last + 1 / fps]
    if late and film.strict:
        temporary.unlink(missing_ok=True)
        return (
            f"{film.transcript}:{late[0].line}: said until {late[0].end:g} s, but {film.path} ends "
            f"at {last:g} s"
        )
    os.replace(temporary, path)
    return ""


def read_films(all_films, settings, image_format, folder):
    """The files with the frames of all films. Raises UserError."""
    jobs = []
    for film in all_films:
        state = film.path.stat()
        how = f"{film.path} {state.st_size} {state.st_mtime_ns} {film.wanted} {image_format}"
        key = hashlib.sha256(f"{how} {settings.fps}".encode()).hexdigest()[:24]
        jobs.append((film, image_format, settings.fps, folder / f"{key}.frames"))
    wanted = {job[3].name for job in jobs}
    for path in folder.glob("*"):
        if path.name not in wanted:  # of other films, or made in another way
            path.unlink()
    for fault in tqdm(on_all_cores(read_film, jobs, together=1), "films", len(jobs), unit="film"):
        if fault:
            raise UserError(fault)
    return [job[3] for job in jobs]


# ---------------------------------------------------------------------------------------------
# Writing


def rows_of(film, path, size):
    """{number of a frame: its row} in the file with the frames of a film."""
    count = path.stat().st_size // (size * size * 3)
    return {number: row for row, number in enumerate(film.wanted[:count])}


def past_the_end(film, path, size):
    """The numbers of the utterances of a film of which no frame exists."""
    rows = rows_of(film, path, size)
    return [i for i, numbers in enumerate(film.over) if not any(n in rows for n in numbers)]


def write_film(part, film, chosen, path, template, settings, clip):
    """Write the samples of a film's utterances with the numbers `chosen`; returns the next clip
    number. path: the file with its frames."""
    tokenizer, size = part.writer.tokenizer, settings.size
    shape, rows = (size, size, 3), rows_of(film, path, size)
    images, over = {}, {}
    with open(path, "rb") as file:
        for i in chosen:
            clip += 1
            over[i] = [number for number in film.over[i] if number in rows]
            for number in over[i]:
                if number not in images:
                    file.seek(rows[number] * int(np.prod(shape)))
                    frame = np.fromfile(file, np.uint8, int(np.prod(shape))).reshape(shape)
                    images[number] = part.image(frame, clip)
    for i in chosen:
        words, shown = film.said[i].words, [images[number] for number in over[i]]
        for image in shown:
            part.sample(*caption_sample(tokenizer, words), [image])
        if len(shown) > 1 and settings.frames > 1:
            spaced = spread(shown, settings.frames)
            part.sample(*caption_sample(tokenizer, words, len(spaced)), spaced)
    chosen = [i for i in chosen if over[i]]
    for stretch in stretches(chosen, settings.window):
        middles = [images[over[i][len(over[i]) // 2]] for i in stretch]
        turns = [("<image>", film.said[i].words) for i in stretch]
        part.sample(*chat_sample(tokenizer, template, turns), middles)
    return clip


def spread(items, most):
    """At most `most` of some items, evenly spread."""
    chosen = np.linspace(0, len(items) - 1, min(most, len(items)))
    return [items[i] for i in chosen.round().astype(int)]


def stretches(numbers, window):
    """Runs of `window` consecutive numbers, each starting half a window after the one before."""
    found = []
    if window < 2:
        return found
    for start in range(0, len(numbers) - window + 1, max(1, window // 2)):
        stretch = numbers[start : start + window]
        if stretch[-1] - stretch[0] == window - 1:
            found.append(stretch)
    return found


def summary(film, frames, past_the_end):
    """A line on a film: its minutes, its utterances, and those left out and why."""
    minutes = max((one.end for one in film.said), default=0.0) / 60
    dropped = film.dropped | {"said after the film's end": past_the_end}
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    left_out = f"; left out: {why}" if why else ""
    kept = len(film.said) - past_the_end
    return (
        f"  {film.path.name}: {minutes:.1f} minutes to its last utterance, {kept} utterances over "
        f"{frames} frames{left_out}"
    )


def prepare(settings, writer):
    if not settings.videos:
        raise UserError("video: give --videos DIR, and --transcripts DIR if they are elsewhere")
    write_films(settings, writer, find_films(settings))


def write_films(settings, writer, all_films, replay=0.0):
    """Read Films and write their samples, films or stretches for validation. replay: see
    sources.write_split(). Raises UserError."""
    items = [(k, i) for k, film in enumerate(all_films) for i in range(len(film.said))]
    film_of = lambda item: all_films[item[0]].path.stem
    parts = hold_out_films(items, film_of, settings.val_films)
    if not parts["val"]:
        some = " ".join(str(film.transcript) for film in all_films[:3])
        raise UserError(f"{some}: {len(items)} utterances; need 10 to hold some out")
    words = [all_films[k].said[i].words for k, i in parts["train"]]
    tokenizer, template = Tokenizer.train(words, settings.vocab_size), TEMPLATES[settings.template]
    check_vocabulary(tokenizer, template)
    writer.refuse_another_source()
    image_format = ImageFormat(settings.size, settings.fit, settings.resample)
    folder = writer.directory / "reading"
    folder.mkdir(parents=True, exist_ok=True)
    paths = read_films(all_films, settings, image_format, folder)
    writer.start(tokenizer, image_format, {"name": settings.template, "system": ""})
    for film, path in zip(all_films, paths):
        late = len(past_the_end(film, path, settings.size))
        print(summary(film, len(rows_of(film, path, settings.size)), late))
    for split, chosen in parts.items():
        part, clip = writer.split(split), -1
        part.text(all_films[k].said[i].words for k, i in chosen)
        for k, film in enumerate(all_films):
            own = [i for number, i in chosen if number == k]
            clip = write_film(part, film, own, paths[k], template, settings, clip)
        if split == "train":
            replay_text(part, [all_films[k].said[i].words for k, i in chosen], replay)
    for path in paths:
        path.unlink()
    folder.rmdir()
