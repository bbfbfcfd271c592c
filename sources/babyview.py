"""
BabyView, for the EgoBabyVLM challenge: head-camera films of children, under an agreement with
Databrary (volume 1882); or any films with WhisperX's transcripts.

    python data.py babyview --videos DIR --transcripts DIR2 --rttm DIR3       # films
    python data.py babyview --images frames --transcripts DIR2 --rttm DIR3    # ready frames
    python data.py babyview --images frames --annotations train.json val.json # manifests

Films are decoded at --fps frames a second, from 0 s on. Ready frames are VIDEO/VIDEO_1.jpg,
VIDEO_2.jpg ... at that rate, written by ffmpeg's filter fps, whose frame n shows (n - 0.5) / fps s.
VIDEO.json is WhisperX's ({"segments": [{"start", "end", "text", "words": [{"word", "score"}]}]}),
VIDEO.rttm that of a voice type classifier. As in EgoBabyVLM, a segment is left out if it overlaps
the key child's own voice (KCHI), if its words' mean score is below --min_score, or if no frame lies
within it. Words keep their case.

--annotations reads EgoBabyVLM's manifests ([{"utterance", "frame_filenames", ...}]) and LLaVA JSON
as `data.py saycam` does. Validation data are whole stretches of films, unless files say otherwise;
EgoBabyVLM holds out single utterances, whose neighbours are trained on.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.archives import Archives
from common.files import read_json, read_lines
from common.images import FITS, ImageFormat
from config import UserError, option, regular
from sources import (
    Captioned,
    Dialogue,
    Recordings,
    dialogue_writer,
    hold_out_films,
    saycam,
    video,
    write_split,
)
from sources.transcripts import LONGEST, Said
from tokenizer import TEMPLATES, Tokenizer, check_vocabulary

CHILD = "KCHI"  # the key child, in the voice type classifier's labels
NO_FILMS = (".json", ".rttm", ".srt", ".vtt", ".csv", ".txt", ".md")
REASONS = ("the key child's voice", "a low score", "no words", "no frame")


@dataclass
class Config(Recordings):
    name: str = ""  # write to data/<name>; empty: babyview
    videos: str = ""  # a folder of films
    images: tuple[str, ...] = ()  # folders or zips of ready frames, VIDEO/VIDEO_1.jpg ...
    transcripts: str = ""  # a folder of WhisperX's VIDEO.json
    rttm: str = ""  # a folder of VIDEO.rttm; empty: the key child's voice is kept
    min_score: float = option(0.5, low=0.0, high=1.0)  # the least mean score of a segment's words
    annotations: tuple[str, ...] = ()  # manifests or LLaVA JSON, their split given by their names
    train: tuple[str, ...] = ()  # such files to train on, whatever their names
    val: tuple[str, ...] = ()  # such files to validate on
    test: tuple[str, ...] = ()  # such files to test on
    fps: float = option(1.0, low=0.01, high=120.0)  # frames per second
    frames: int = option(1, low=1, high=1024)  # at most, in a clip, evenly spread; 1: no clips
    window: int = option(0, low=0, high=64)  # utterances in a sequence of moments; below 2: none
    template: str = option("bare", choices=tuple(TEMPLATES))  # how clips and moments are written
    size: int = option(224, low=8, high=2048)  # S: frames are S x S pixels
    fit: str = option("squash", choices=FITS)  # how a picture becomes a square
    resample: str = option("bilinear", choices=("bilinear", "bicubic"))  # how it is resized
    vocab_size: int = option(52000, low=260, high=1 << 20)  # BPE tokens, specials included
    max_skipped: float = option(0.01, low=0.0, high=1.0)  # tolerated fraction of unreadable frames
    replay: float = option(0.0, low=0.0, high=100.0)  # utterances without picture per sample


# ---------------------------------------------------------------------------------------------
# Transcripts


def read_voice(path):
    """[(start, end)] in seconds of the key child's voice in an .rttm file. Raises UserError."""
    spans = []
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":
            continue
        try:
            start, length, label = float(fields[3]), float(fields[4]), fields[7]
        except (IndexError, ValueError):
            want = "want SPEAKER file channel start duration <NA> <NA> label"
            raise UserError(f"{path}:{number}: {want}") from None
        if label == CHILD:
            spans.append((start, start + length))
    return spans


def read_segments(path):
    """[(Said, mean score of its words or None)] of a WhisperX JSON. A Said's line is the number of
    its segment, from 0. Raises UserError."""
    content, found = read_json(path), []
    segments = content.get("segments") if isinstance(content, dict) else None
    if not isinstance(segments, list):
        raise UserError(f'{path}: want WhisperX\'s {{"segments": [{{"start", "end", "text"}}]}}')
    for number, one in enumerate(segments):
        where = f"{path}: segment {number}"
        try:
            start, end, text = float(one["start"]), float(one["end"]), one["text"]
            words = one.get("words") or []
            scores = [float(word["score"]) for word in words if word.get("score") is not None]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{where}: want start, end, text, and words with scores") from None
        if not isinstance(text, str) or not 0 <= start <= end < LONGEST:
            raise UserError(f"{where}: {start:g} to {end:g} s: no time within a film, or no text")
        said = Said(start, end, " ".join(text.split()), "", number)
        found.append((said, float(np.mean(scores)) if scores else None))
    return found


def frames_within(said, settings):
    """The numbers of the frames, from 0, that are shown during an utterance: number n of a film is
    shown at n / fps seconds, that of ready frames at (n + 0.5) / fps."""
    shift = 0.0 if settings.videos else 0.5
    first = int(np.ceil(said.start * settings.fps - shift - 1e-9))
    last = int(np.floor(said.end * settings.fps - shift + 1e-9))
    return list(range(max(first, 0), last + 1))


def keep_segments(path, voice, settings, dropped):
    """[(Said, its frames)] of a transcript. voice: spans of the key child; dropped: a Counter of
    REASONS, which is added to."""
    chosen = []
    for said, score in read_segments(path):
        over = frames_within(said, settings)
        if any(start < said.end and said.start < end for start, end in voice):
            dropped[REASONS[0]] += 1
        elif score is not None and score < settings.min_score:
            dropped[REASONS[1]] += 1
        elif not re.search(r"\w", said.words):
            dropped[REASONS[2]] += 1
        elif not over:
            dropped[REASONS[3]] += 1
        else:
            chosen.append((said, over))
    return sorted(chosen, key=lambda pair: pair[0].start)


def read_transcripts(settings):
    """{stem: (path, [(Said, frames)])} of the transcripts. Raises UserError."""
    for option_name in ("transcripts", "rttm"):
        folder = getattr(settings, option_name)
        if folder and not Path(folder).is_dir():
            raise UserError(f"--{option_name} {folder}: no such folder")
    found, dropped = {}, Counter()
    for path in sorted(Path(settings.transcripts).glob("*.json")):
        voice = []
        if settings.rttm:
            rttm = Path(settings.rttm) / f"{path.stem}.rttm"
            if not rttm.is_file():
                raise UserError(f"{rttm}: none for {path}; without --rttm no voice is left out")
            voice = read_voice(rttm)
        own = Counter()
        found[path.stem] = path, keep_segments(path, voice, settings, own)
        dropped += own
        lost = ", ".join(f"{count} {reason}" for reason, count in own.items())
        kept = len(found[path.stem][1])
        print(f"  {path.name}: {kept} utterances kept" + (f"; left out: {lost}" if lost else ""))
    kept = sum(len(chosen) for _, chosen in found.values())
    if not kept:
        raise UserError(f"{settings.transcripts}: no utterance in its .json files is kept")
    left_out = "; ".join(f"{dropped[reason]:,} left out: {reason}" for reason in REASONS)
    print(f"{len(found)} transcripts, {kept:,} utterances kept; {left_out}")
    return found


# ---------------------------------------------------------------------------------------------
# Films, ready frames, manifests


def find_films(settings):
    """The video.Films of --videos. Raises UserError."""
    if not Path(settings.videos).is_dir():
        raise UserError(f"--videos {settings.videos}: no such folder")
    paths = sorted(Path(settings.videos).iterdir())
    files = {}
    for path in paths:
        if path.suffix in NO_FILMS or path.is_dir() or path.name.startswith("."):
            continue
        if path.stem in files:
            raise UserError(f"{path}: a second film beside {files[path.stem]}")
        files[path.stem] = path
    films = []
    for stem, (transcript, chosen) in read_transcripts(settings).items():
        if stem not in files:
            raise UserError(f"{transcript}: no film in {settings.videos} has its name")
        said, over = [one for one, _ in chosen], [frames for _, frames in chosen]
        regular(files[stem])  # opening a pipe would wait forever
        films.append(video.Film(files[stem], transcript, said, over, strict=False))
    return films


def find_utterances(settings):
    """[(words, locations of its frames, label, film, number in it)] of --images, in order. Frames
    past the end of a film are left out. Raises UserError."""
    archives, found, missing = Archives(settings.images), [], 0
    for stem, (transcript, chosen) in read_transcripts(settings).items():
        for number, (said, over) in enumerate(chosen):
            names = [f"{stem}/{stem}_{frame + 1}.jpg" for frame in over]
            locations = [archives.find(name) for name in names]
            locations = [location for location in locations if location]
            missing += not locations
            if locations:
                label = f"{transcript}: segment {said.line}: "
                found.append((said.words, locations, label, stem, number))
    if not found:
        raise UserError(f"{' '.join(settings.images)}: no frame such as {names[0]}")
    if missing:
        print(f"{missing:,} utterances left out: their frames are not in {settings.images[0]}")
    return found


def write_frames(settings, writer):
    """Write the samples of ready frames."""
    parts = hold_out_films(find_utterances(settings), lambda one: one[3], settings.val_films)
    if not parts["val"]:
        raise UserError(f"{settings.transcripts}: fewer than 10 utterances with frames")
    words = {split: [text for text, *_ in part] for split, part in parts.items()}
    tokenizer, template = make_tokenizer(settings, words["train"])
    writer.start(
        tokenizer,
        ImageFormat(settings.size, settings.fit, settings.resample),
        {"name": settings.template, "system": ""},
    )
    as_clip, as_moments = dialogue_writer(None), dialogue_writer(template)
    write = lambda part, one, ids: (as_moments if len(one.turns) > 1 else as_clip)(part, one, ids)
    for split, part in parts.items():
        pictures, dialogues = [], []
        for clip, (text, locations, label, *_) in enumerate(part):
            pictures += [Captioned(location, clip, [text], label) for location in locations]
            if len(locations) > 1 and settings.frames > 1:
                spaced = video.spread(locations, settings.frames)
                dialogues.append(Dialogue(spaced, [("<image>" * len(spaced), text)], label))
        dialogues += moments_of(part, settings.window)
        own, most = words[split], settings.max_skipped
        whole = writer.split(split)
        write_split(whole, own, pictures, most, dialogues, write, settings.replay)


def moments_of(part, window):
    """The Dialogues of `window` utterances that follow each other in one film; the middle frame of
    each."""
    by_film = defaultdict(dict)
    for text, locations, label, film, number in part:
        by_film[film][number] = text, locations[len(locations) // 2], label
    found = []
    for own in by_film.values():
        for stretch in video.stretches(list(own), window):
            texts, middles, labels = zip(*(own[number] for number in stretch))
            turns = [("<image>", text) for text in texts]
            found.append(Dialogue(list(middles), turns, labels[0]))
    return found


def make_tokenizer(settings, lines):
    """(the Tokenizer learnt from lines, the template of moments)."""
    tokenizer, template = Tokenizer.train(lines, settings.vocab_size), TEMPLATES[settings.template]
    check_vocabulary(tokenizer, template)
    return tokenizer, template


def as_saycam(settings):
    """The options of `data.py saycam` for manifests."""
    same = (
        "val_films",
        "name",
        "annotations",
        "train",
        "val",
        "test",
        "template",
        "size",
        "fit",
        "resample",
    )
    options = {
        name: getattr(settings, name) for name in (*same, "vocab_size", "max_skipped", "replay")
    }
    return saycam.Config(frames=settings.images[0], **options)


def refuse_others(settings, names, kind):
    """Raise UserError for options that do not belong to a kind of input."""
    given = [name for name in names if name in settings.given]
    if given:
        raise UserError(f"babyview: --{given[0]} is not for {kind}")


def prepare(settings, writer):
    if settings.annotations or settings.train:
        others = ("videos", "transcripts", "rttm", "min_score", "fps", "frames", "window")
        refuse_others(settings, others, "--annotations")
        if len(settings.images) != 1:
            raise UserError("babyview: give the pictures of --annotations by one --images DIR")
        saycam.prepare(as_saycam(settings), writer)
    elif not settings.transcripts or bool(settings.videos) == bool(settings.images):
        raise UserError(
            "babyview: give --transcripts DIR and either --videos DIR or --images DIR; or "
            "--images DIR and --annotations FILE.json ..."
        )
    elif settings.videos:
        refuse_others(settings, ("val", "test", "max_skipped"), "--videos")
        video.write_films(settings, writer, find_films(settings), settings.replay)
    else:
        refuse_others(settings, ("val", "test"), "--transcripts")
        write_frames(settings, writer)
