"""
Films of the toy world with subtitles, prepared, trained on and tested as one's own recordings are.

    python benchmarks/own_film.py                 # ten films of ten minutes, the whole recipe
    python benchmarks/own_film.py --films DIR     # other films, with their transcripts beside them

Prints the scores of the tests that `data.py video` makes of the held-out film: above chance, the
model has learnt what is said over which picture.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from common.files import read_json  # noqa: E402
from config import option  # noqa: E402
from data import Data  # noqa: E402
from sources import ffmpeg  # noqa: E402

FPS = 2


@dataclass
class Config(config.Options):
    films: str = ""  # a folder of films with transcripts; empty: of the toy world
    out: str = "out/own_film"  # where the run goes
    count: int = option(10, low=1, high=100)  # films of the toy world
    scenes: int = option(600, low=4, high=6000)  # in each of them, one a second
    flags: tuple[str, ...] = ()  # for train.py, without their dashes: phase2_steps=100


def run(*words):
    """Run a command of this repository."""
    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], check=True)


def utterances(dataset):
    """[(numbers of its two frames, words)] of each scene of the toy world."""
    tokens, shown = dataset.open("train", "tokens"), dataset.open("train", "image_ids")
    clips, found = dataset.open("train", "clips"), {}
    for first, length, begin, _ in dataset.open("train", "samples").astype(int).tolist():
        clip = int(clips[shown[begin]])
        words = dataset.tokenizer.decode(tokens[first : first + length])
        found.setdefault(clip, (np.flatnonzero(clips == clip), words))
    return [found[clip] for clip in sorted(found)]


def make_films(folder, settings):
    """Write films of the toy world, one scene a second, and what is said as .srt files."""
    dataset = Data("data/toy")
    frames, scenes = dataset.open("train", "frames"), utterances(dataset)
    size = dataset.image_format.size
    stamp = lambda t: f"{t // 3600:02d}:{t // 60 % 60:02d}:{t % 60:02d},000"
    for number in range(settings.count):
        own = scenes[number * settings.scenes : (number + 1) * settings.scenes]
        command = [ffmpeg.find_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{size}x{size}", "-r", str(FPS), "-i", "-", "-crf", "12"]
        command += ["-pix_fmt", "yuv420p", str(folder / f"nursery{number}.mp4")]
        shown = np.concatenate([frames[numbers] for numbers, _ in own])
        subprocess.run(command, input=shown.tobytes(), check=True)
        cues = [
            f"{i + 1}\n{stamp(i)} --> {stamp(i + 1)}\n{words}\n" for i, (_, words) in enumerate(own)
        ]
        (folder / f"nursery{number}.srt").write_text("\n".join(cues), encoding="utf-8")


def main(argv):
    settings = config.load(Config, argv, __doc__)
    films, began = Path(settings.films or "films"), time.perf_counter()
    if not settings.films:
        if not Path("data/toy/meta.json").exists():
            run(ROOT / "data.py", "toy")
        films.mkdir(exist_ok=True)
        make_films(films, settings)
    prepare = ["--fps", FPS, "--size", 64, "--fit", "squash", "--frames", 1, "--window", 0]
    run(ROOT / "data.py", "video", "--name", "own_film", "--videos", films, *prepare)
    flags = [f"--{flag}" for flag in settings.flags]
    where = ["--data", "data/own_film", "--out", settings.out]
    run(ROOT / "train.py", ROOT / "configs/toy.py", *where, *flags)
    tasks = read_json(Path(settings.out) / "results.json")["tasks"]
    print("\n| test | score | 95 % interval | cannot see | chance | n |\n|---|---|---|---|---|---|")
    for name in ("which_picture", "which_utterance"):
        own, blind = tasks[name]["all"]["accuracy"], tasks[name]["all"]["cannot_see"]
        interval = "{:.3f} - {:.3f}".format(*own["ci95"])
        row = (name, f"{own['score']:.3f}", interval, f"{blind['score']:.3f}", "0.250", own["n"])
        print("|", " | ".join(map(str, row)), "|")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes in all")


if __name__ == "__main__":
    config.run(main)
