"""
The figures of README.md, as SVG files for light and dark pages.

    python train.py configs/toy.py
    python benchmarks/figures.py        # writes assets/recipe-*.svg and assets/training-*.svg

recipe: the phases and what each trains. training: losses and the probe of a run, read from its
log.jsonl (--run).
"""

import dataclasses
import html
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
from common.files import read_log, writing

ROOT = Path(__file__).resolve().parent.parent
THEMES = {  # ink, soft ink, frozen box, trained box, line
    "light": ("#1f2328", "#59636e", "#eef1f4", "#dbe9ff", "#2f6feb"),
    "dark": ("#e6edf3", "#9198a1", "#21262d", "#16325c", "#6ea8fe"),
}
FONT = "font-family='system-ui,-apple-system,Segoe UI,sans-serif'"


@dataclasses.dataclass
class Config(config.Options):
    run: str = "out/toy"  # the folder of a run, for its log.jsonl
    out: str = str(ROOT / "assets")  # where to write


def svg(width, height, title, parts):
    """An SVG file as text."""
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img'"
    return f"{head} {FONT}><title>{html.escape(title)}</title>{''.join(parts)}</svg>\n"


def text(x, y, words, colour, size=14, anchor="middle", weight="normal"):
    style = f"font-size='{size}' text-anchor='{anchor}' font-weight='{weight}' fill='{colour}'"
    return f"<text x='{x}' y='{y}' {style}>{html.escape(words)}</text>"


def box(x, y, width, words, fill, ink, line):
    shape = f"<rect x='{x}' y='{y}' width='{width}' height='34' rx='6' fill='{fill}'"
    return f"{shape} stroke='{line}'/>" + text(x + width / 2, y + 22, words, ink)


def arrow(x0, x1, y, line):
    tip = f"M{x0} {y}H{x1}M{x1 - 6} {y - 4}L{x1} {y}L{x1 - 6} {y + 4}"
    return f"<path d='{tip}' stroke='{line}' fill='none' stroke-width='1.5'/>"


def recipe(theme):
    """The phases, a column each: what is trained is blue, what is frozen grey."""
    ink, soft, frozen, trained, line = THEMES[theme]
    columns = (
        ("vision", "frames, no labels", "DINO", (("tower", True),)),
        ("language", "speech", "next word", (("GPT", True),)),
        ("phase 1", "frames + captions", "captions", (("tower", 0), ("projector", 1), ("GPT", 0))),
        ("phase 2", "frames + captions", "captions", (("tower", 0), ("projector", 1), ("GPT", 1))),
    )
    parts = []
    for number, (name, data, loss, boxes) in enumerate(columns):
        x = 10 + 178 * number
        parts.append(text(x + 75, 24, name, ink, 16, weight="600"))
        parts.append(text(x + 75, 46, data, soft, 12))
        for row, (part, is_trained) in enumerate(boxes):
            fill, edge = (trained, line) if is_trained else (frozen, soft)
            parts.append(box(x + 15, 58 + 44 * row, 120, part, fill, ink, edge))
        parts.append(text(x + 75, 206, f"loss: {loss}", soft, 12))
        if number:
            parts.append(arrow(x - 20, x, 24 - 5, soft))
    x = 10 + 178 * 4
    parts.append(arrow(x - 20, x, 24 - 5, soft))
    parts.append(text(x + 75, 24, "tests", ink, 16, weight="600"))
    for row, words in enumerate(("which picture is 'ball'?", "'red ball' or 'blue ball'?")):
        parts.append(text(x + 82, 78 + 24 * row, words, soft, 12))
    parts.append(box(24, 226, 80, "trained", trained, ink, line))
    parts.append(box(114, 226, 80, "frozen", frozen, ink, soft))
    return svg(890, 270, "The recipe: four phases, then tests", parts)


def curve(points, left, top, width, height, low, high, last, line):
    """A polyline of [(step, value)]."""
    place = lambda step, value: (
        left + width * step / last,
        top + height * (1 - (value - low) / (high - low)),
    )
    path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
    return f"<polyline points='{path}' fill='none' stroke='{line}' stroke-width='1.8'/>"


def chart(left, name, label, points, theme, low=None, high=None):
    """A small chart with its axes' ends labelled."""
    ink, soft, _, _, line = THEMES[theme]
    values, last = [value for _, value in points], points[-1][0]
    low = min(values) if low is None else low
    high = max(values) if high is None else high
    top, width, height = 46, 170, 120
    frame = f"M{left} {top}V{top + height}H{left + width}"
    return [
        text(left + width / 2, 20, name, ink, 14, weight="600"),
        text(left + width / 2, 38, label, soft, 12),
        f"<path d='{frame}' stroke='{soft}' fill='none'/>",
        text(left - 5, top + 8, f"{high:.2f}", soft, 11, "end"),
        text(left - 5, top + height, f"{low:.2f}", soft, 11, "end"),
        text(left, top + height + 16, "0", soft, 11),
        text(left + width, top + height + 16, f"{last:,} steps", soft, 11, "end"),
        curve(points, left, top, width, height, low, high, last, line),
    ]


def training(log, theme):
    """Four charts: the tower's probe, and losses of the later phases."""
    series = (
        ("vision", "kind", "probe: kind of thing (of 16)"),
        ("language", "loss", "training loss"),
        ("phase1", "loss", "training loss"),
        ("phase2", "val_loss", "validation loss"),
    )
    parts = []
    for number, (phase, measure, label) in enumerate(series):
        points = [(e["step"], e[measure]) for e in log if e["phase"] == phase and measure in e]
        limits = (0.0, 1.0) if measure == "kind" else (None, None)
        name = phase.replace("phase", "phase ")
        parts += chart(40 + 220 * number, name, label, points, theme, *limits)
    return svg(890, 190, "Training on the toy world", parts)


def main(argv):
    settings = config.load(Config, argv, __doc__)
    log = read_log(Path(settings.run) / "log.jsonl")
    for theme in THEMES:
        drawn = {"recipe": recipe(theme), "training": training(log, theme)}
        for name, content in drawn.items():
            path = Path(settings.out) / f"{name}-{theme}.svg"
            with writing(path) as file:
                file.write(content.encode("utf-8"))
            print(path)


if __name__ == "__main__":
    config.run(main)
