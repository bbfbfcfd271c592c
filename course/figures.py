"""
The figures of the chapters, for light and dark pages, written to course/figures.

    python course/figures.py                 # those that need data/toy alone
    python course/figures.py language dino growth   # of runs in out/course

language, dino and growth need the experiments words, seeing and growth.

Pictures are PNG files with a transparent ground, charts and diagrams are SVG files.
"""

import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import experiments
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import config
from benchmarks.figures import THEMES, svg, text
from common import tiles as tiling
from common.files import read_json, read_log, writing
from config import UserError
from data import Data
from sources import toy
from tasks.scores import wilson
from tokenizer import caption_sample
from training.figures import nice_ticks

DATA = "data/toy"
COLOURS = {  # of a chart's curves, in order
    "light": ("#2f6feb", "#c2410c", "#0f7b6c"),
    "dark": ("#6ea8fe", "#fb923c", "#4fd1b5"),
}


@dataclasses.dataclass
class Config(config.Options):
    out: str = str(experiments.COURSE / "figures")  # where to write


# ---------------------------------------------------------------------------------------------
# A chart with axes


class Axes:
    """The frame of a chart, and where its points are. x and y: (low, high); log: both axes are
    logarithmic, and their ticks are powers of ten."""

    def __init__(self, theme, left, x, y, titles, size=(330, 190), log=False):
        self.ink, self.soft, *_ = THEMES[theme]
        self.left, self.top, (self.width, self.height) = left, 34, size
        self.log, self.x, self.y = log, x, y
        self.parts = [text(left + self.width / 2, 18, titles[0], self.ink, 14, weight="600")]
        bottom = self.top + self.height
        for tick in self.ticks(*x):
            at, label = self.at(tick, y[0])[0], self.number(tick)
            self.parts.append(text(f"{at:.1f}", bottom + 16, label, self.soft, 11))
        for tick in self.ticks(*y):
            at = self.at(x[0], tick)[1]
            line = f"M{left} {at:.1f}h{self.width}"
            self.parts.append(f"<path d='{line}' stroke='{self.soft}' stroke-opacity='.3'/>")
            label = text(left - 6, f"{at + 4:.1f}", self.number(tick), self.soft, 11, "end")
            self.parts.append(label)
        self.parts.append(text(left + self.width / 2, bottom + 34, titles[1], self.soft, 12))

    def ticks(self, low, high):
        if not self.log:
            return nice_ticks(low, high)
        return [10.0**n for n in range(round(math.log10(low)), round(math.log10(high)) + 1)]

    def number(self, tick):
        return f"{tick:,.0f}" if tick >= 10 or tick == int(tick) else f"{tick:g}"

    def at(self, x, y):
        """Where a point is, in the units of the SVG."""
        scale = math.log10 if self.log else float
        (x, left, right), (y, low, high) = (map(scale, v) for v in ((x, *self.x), (y, *self.y)))
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return self.left + self.width * across, self.top + self.height * (1 - up)

    def curve(self, points, colour, dots=False):
        places = [self.at(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        style = f"fill='none' stroke='{colour}' stroke-width='1.8'"
        self.parts.append(f"<polyline points='{line}' {style}/>")
        for x, y in places if dots else ():
            self.parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>")

    def level(self, value, words):
        """A dashed line across, with words above its right end."""
        x, y = self.at(self.x[0], value)
        style = f"stroke='{self.soft}' stroke-dasharray='4 4'"
        self.parts.append(f"<path d='M{x:.1f} {y:.1f}h{self.width}' {style}/>")
        self.parts.append(text(x + self.width, f"{y - 5:.1f}", words, self.soft, 11, "end"))

    def label(self, x, y, words, colour):
        """Words beside a point."""
        x, y = self.at(x, y)
        self.parts.append(text(f"{x:.1f}", f"{y:.1f}", words, colour, 12, "start"))


# ---------------------------------------------------------------------------------------------
# Pictures


def lettering():
    return ImageFont.load_default(13)


def scenes(theme):
    """Chapter 0. Two frames of each of three scenes, and what is said."""
    ink, soft, *_ = THEMES[theme]
    sheet = Image.new("RGBA", (890, 200), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sheet)
    rng = np.random.RandomState(5)
    for i, count in enumerate((1, 2, 3)):
        scene = toy.random_scene(rng, toy.THINGS, count)
        for j in range(2):
            frame = Image.fromarray(toy.film(scene, rng, 64, toy.THINGS))
            sheet.paste(frame.resize((138, 138), Image.Resampling.LANCZOS), (300 * i + 146 * j, 0))
            said = toy.utterance(scene, rng, routine=0)
            draw.text((300 * i, 150 + 22 * j), said, ink if j == 0 else soft, lettering())
    return sheet


def pairs(theme):
    """Chapter 0. All pairs of colour and thing; a frame around those that are held out."""
    ink, *_ = THEMES[theme]
    side = 46
    sheet = Image.new("RGBA", (side * len(toy.THINGS), side * len(toy.COLOURS)), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sheet)
    for column, kind in enumerate(toy.THINGS):
        for row, colour in enumerate(toy.COLOURS):
            thing, x, y = toy.Thing(kind, colour), side * column, side * row
            cell = Image.new("RGB", (2 * side, 2 * side), toy.ROOMS[0][0])
            toy.draw_thing(cell, thing, toy.THINGS, (side, side), 1.5 * side, 0.0, False)
            out = toy.held_out(thing)
            small = cell.resize((side - 4, side - 4), Image.Resampling.LANCZOS)
            sheet.paste(small, (x + 2, y + 2))
            if out:
                draw.rectangle((x, y, x + side - 1, y + side - 1), outline=ink, width=3)
    return sheet


def tiles(theme):
    """Chapter 7. A picture of 128 x 64 pixels: shrunk to the tower's square, and in two tiles."""
    ink, *_ = THEMES[theme]
    rng = np.random.RandomState(8)
    frames = [toy.film(toy.random_scene(rng, toy.THINGS, n), rng, 64, toy.THINGS) for n in (1, 3)]
    picture = Image.fromarray(np.concatenate(frames, 1))
    sheet = Image.new("RGBA", (890, 190), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sheet)
    whole = picture.resize((64, 64), Image.Resampling.BICUBIC)
    cut = tiling.cut(picture, (128, 64), 64, Image.Resampling.BICUBIC)
    columns = ((0, picture, 320, "the picture"), (370, whole, 160, "the whole, shrunk"),
               (560, cut[0], 160, "tile 1"), (730, cut[1], 160, "tile 2"))  # fmt: skip
    for x, image, width, words in columns:
        size = (width, width * image.height // image.width)
        sheet.paste(image.resize(size, Image.Resampling.NEAREST), (x, 0))
        draw.text((x, 166), words, ink, lettering())
    return sheet


# ---------------------------------------------------------------------------------------------
# Charts of runs


def log_of(name, seed=1):
    path = experiments.RUNS / name / str(seed) / "log.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such run; python course/experiments.py makes it")
    return read_log(path)


def entropies(data):
    """Nats a token of validation text: guessing among all tokens, by how frequent each is, and by
    which follows which (both counted in training text, one added to each count)."""
    V = data.tokenizer.vocab_size
    train, val = (
        np.asarray(tokens, np.int64)
        for tokens in (data.open("train", "text"), data.open("val", "text"))
    )
    single = np.bincount(train, minlength=V) + 1.0
    double = np.bincount(train[:-1] * V + train[1:], minlength=V * V).reshape(V, V) + 1.0
    double /= double.sum(1, keepdims=True)
    single /= single.sum()
    return (
        math.log(V),
        float(-np.log(single[val[1:]]).mean()),
        float(-np.log(double[val[:-1], val[1:]]).mean()),
    )


def language(theme):
    """Chapter 1. The loss of a language model, beside what counting gives."""
    log = log_of("language_language_steps_300")
    points = [(line["step"], line["loss"]) for line in log if "loss" in line]
    axes = Axes(theme, 60, (0, points[-1][0]), (0, 7), ("loss, nats a token", "step"), (760, 220))
    levels = entropies(Data(DATA))
    names = ("every token alike", "how frequent a token is", "which token follows which")
    for value, words in zip(levels, names):
        axes.level(value, f"{words}: {value:.2f}")
    axes.curve(points, COLOURS[theme][0])
    return svg(890, 300, "The training loss of a GPT, and losses of counting", axes.parts)


def dino(theme):
    """Chapter 2. DINO's loss, and the probe of the same runs."""
    parts = []
    for left, key, title, ends in (
        (50, "loss", "DINO's loss", (3.0, 5.0)),
        (500, "kind", "probe: kind of thing", (0.0, 1.0)),
    ):
        logs = [log_of("vision", seed) for seed in (1, 2, 3)]
        last = logs[0][-1]["step"]
        axes = Axes(theme, left, (0, last), ends, (title, "step"))
        dots = key == "kind"  # few points
        for log, colour in zip(logs, COLOURS[theme]):
            axes.curve([(line["step"], line[key]) for line in log if key in line], colour, dots)
        if key == "loss":
            axes.level(math.log(128), "ln 128")
        else:
            axes.level(1 / 16, "chance")
        parts += axes.parts
    return svg(890, 270, "DINO's loss and its linear probe over the steps, three seeds", parts)


# ---------------------------------------------------------------------------------------------
# Diagrams


def block(x, y, width, height, fill, line="none"):
    size = f"x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}'"
    return f"<rect {size} fill='{fill}' stroke='{line}' rx='2'/>"


def stream(theme):
    """Chapter 3. 64 patches, 16 image tokens, and their places before the words."""
    ink, soft, _, blue, line = THEMES[theme]
    scene = toy.Scene(0, (toy.Thing("cup", "red"),))
    frame = toy.film(scene, np.random.RandomState(5), 64, toy.THINGS)
    parts = []
    for x, patches, title in ((20, 8, "64 features, projected"), (260, 4, "means of 2 x 2: 16")):
        side, step = 64 // patches, 128 / patches
        means = frame.reshape(patches, side, patches, side, 3).mean((1, 3)).astype(int)
        for row in range(patches):
            for column in range(patches):
                place = (x + step * column, 30 + step * row, step - 1, step - 1)
                parts.append(block(*place, "rgb({},{},{})".format(*means[row, column])))
        parts.append(text(x + 64, 18, title, ink, 13))
    parts.append(text(204, 98, "→", soft, 24))
    parts.append(text(444, 98, "→", soft, 24))
    words = ("a", "red", "cup", "<eos>")
    for n, mean in enumerate(means.reshape(-1, 3)):
        parts.append(block(20 + 34 * n, 190, 31, 34, "rgb({},{},{})".format(*mean)))
    for n, word in enumerate(words):
        x = 20 + 34 * 16 + 76 * n
        parts += [block(x, 190, 73, 34, blue, line), text(x + 36, 212, word, ink, 13)]
    for x, y, what in ((490, 80, "a picture is 16 vectors of 128 numbers,"),
                       (490, 100, "each as wide as a word's embedding:"),
                       (490, 120, "the GPT reads them before the words")):  # fmt: skip
        parts.append(text(x, y, what, soft, 13, "start"))
    return svg(890, 240, "Features of a picture become tokens before the words", parts)


def mask(theme):
    """Chapter 4. Inputs, targets and the loss mask of a caption."""
    ink, soft, grey, blue, line = THEMES[theme]
    tokenizer = Data(DATA).tokenizer
    tokens, loss_mask = caption_sample(tokenizer, "a red cup .")
    names = []
    for token in tokens:
        if token == tokenizer.image:
            names.append("image")
        else:
            names.append("<eos>" if token == tokenizer.eos else tokenizer.decode([token]))
    names, loss_mask = ["image", "image", *names], [0, 0, *loss_mask]
    parts = [text(20, 40 + 62 * row, words, soft, 13, "start")
             for row, words in enumerate(("input", "predicts", "loss"))]  # fmt: skip
    width = 740 / (len(names) - 1)
    for n, (now, after, counts) in enumerate(zip(names, names[1:], loss_mask[1:])):
        x = 110 + width * n
        fill, edge = (blue, line) if counts else (grey, soft)
        parts += [block(x, 18, width - 6, 34, grey, soft), text(x + width / 2 - 3, 40, now, ink)]
        parts.append(text(x + width / 2 - 3, 70, "↓", soft))
        parts += [block(x, 80, width - 6, 34, fill, edge), text(x + width / 2 - 3, 102, after, ink)]
        answer = ("yes", ink) if counts else ("no", soft)
        parts.append(text(x + width / 2 - 3, 164, *answer))
    return svg(890, 180, "Which predictions of a caption have a loss", parts)


# ---------------------------------------------------------------------------------------------
# Charts of formulas


def intervals(theme):
    """Chapter 5. Wilson's interval around a score, for more and more items."""
    axes = Axes(theme, 60, (10, 1000), (0, 1), ("score and its 95 % interval", "items"), (760, 200))
    for score, colour in zip((0.5, 0.75, 0.95), COLOURS[theme]):
        bounds = [(n, wilson(score * n, n)) for n in range(10, 1001, 10)]
        for side in (0, 1):
            axes.curve([(n, both[side]) for n, both in bounds], colour)
        axes.level(score, "")
        axes.label(1000, score, f" {score:g}", colour)
    return svg(890, 280, "The interval of a score is narrow only with many items", axes.parts)


def moved(theme):
    """Chapter 6. Numbers that attention moves, by formula and by kernel, D = 64, one head."""
    title = ("numbers moved by attention (one head, D = 64)", "positions")
    axes = Axes(theme, 90, (10, 10000), (1e3, 1e9), title, (600, 220), log=True)
    lengths = [2**n for n in range(4, 14)]
    for name, which, colour in zip(("formula", "kernel"), (0, 1), COLOURS[theme]):
        points = [(T, experiments.moved_by_attention(T, 64)[which]) for T in lengths]
        axes.curve(points, colour, dots=True)
        axes.label(11000, points[-1][1], name, colour)
    return svg(890, 310, "Attention by formula grows with the square of the positions", axes.parts)


def memory(theme):
    """Chapter 8. Memory of a GPU for training 7 billion parameters, in copies and in pieces."""
    ink, soft, *_ = THEMES[theme]
    kinds = (("weights", 4), ("gradients", 4), ("AdamW's two moments", 8))  # bytes a parameter
    parts = []
    for n, (name, _) in enumerate(kinds):
        parts += [block(150 + 190 * n, 8, 14, 14, COLOURS[theme][n]),
                  text(170 + 190 * n, 20, name, ink, 12, "start")]  # fmt: skip
    rows = [("DDP, any number", 1), *((f"sharded over {n}", n) for n in (2, 4, 8))]
    for row, (words, pieces) in enumerate(rows):
        y, x = 36 + 40 * row, 150.0
        parts.append(text(140, y + 20, words, ink, 13, "end"))
        for (_, size), colour in zip(kinds, COLOURS[theme]):
            width = 5.5 * 7 * size / pieces
            parts.append(block(x, y, width - 1, 28, colour))
            x += width
        parts.append(text(x + 8, y + 20, f"{7 * 16 / pieces:.0f} GB", soft, 13, "start"))
    return svg(890, 205, "Gigabytes of each GPU for 7 billion parameters", parts)


def growth(theme):
    """Chapter 9. The Labeled-S score of each word at each share of the data; a frame at its age."""
    path = experiments.RUNS / "growth.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; python course/experiments.py growth makes it")
    found = read_json(path)
    scores, ages = found["scores"], found["ages"]
    ink, soft, _, _, line = THEMES[theme]
    words = sorted(scores, key=lambda word: (ages[word] or 16, -sum(n for n, _ in scores[word])))
    parts = []
    for row, (share, name) in enumerate(((8, "all"), (4, "1/2"), (2, "1/4"), (1, "1/8"))):
        parts.append(text(70, 32 + 38 * row, name, soft, 13, "end"))
        for column, word in enumerate(words):
            hits, items = scores[word][3 - row]
            x, y, score = 80 + 50 * column, 10 + 38 * row, hits / items
            strength = max(0.0, (score - 0.25) / 0.75)  # 0 at chance
            frame = f"stroke='{ink}' stroke-width='2'" if ages[word] == share else ""
            size = f"x='{x}' y='{y}' width='46' height='34' rx='3'"
            parts.append(
                f"<rect {size} fill='{line}' fill-opacity='{0.6 * strength:.2f}' {frame}/>"
            )
            parts.append(text(x + 23, y + 22, f"{score:.2f}", ink, 12))
    for column, word in enumerate(words):
        parts.append(text(103 + 50 * column, 178, word, ink, 12))
    return svg(890, 190, "Score of each word with more and more of the data", parts)


FIGURES = {  # {name: (its function, the chapter)}
    "scenes": (scenes, "0_world"),
    "pairs": (pairs, "0_world"),
    "language": (language, "1_words"),
    "dino": (dino, "2_seeing"),
    "stream": (stream, "3_projector"),
    "mask": (mask, "4_together"),
    "intervals": (intervals, "5_asking"),
    "moved": (moved, "6_kernels"),
    "tiles": (tiles, "7_family"),
    "memory": (memory, "8_many"),
    "growth": (growth, "9_research"),
}


NEED_A_RUN = {"language", "dino", "growth"}


def draw(name, out):
    """Write a figure, light and dark. Returns the paths."""
    paths = []
    for theme in THEMES:
        figure = FIGURES[name][0](theme)
        suffix = "svg" if isinstance(figure, str) else "png"
        path = Path(out) / f"{name}-{theme}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as file:
            if suffix == "svg":
                file.write(figure.encode("utf-8"))
            else:
                figure.save(file, "PNG")
        paths.append(path)
    return paths


def main(argv):
    names = [word for word in argv if word in FIGURES]
    settings = config.load(Config, [word for word in argv if word not in FIGURES], __doc__)
    for name in names or [name for name in FIGURES if name not in NEED_A_RUN]:
        print(*draw(name, settings.out))


if __name__ == "__main__":
    config.run(main)
