"""
The report page of a run, report.html: one file without a script that fetches nothing. Training
writes it at each validation, with the curves so far; eval.py writes it whole, with the tests.
"""

import base64
import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import read_log, writing
from inference import brightness
from training import run_card
from training.figures import chart, escape, score_axis, score_row, smooth

PAUSE = 300  # seconds between two lines of a log that are taken for an interruption


@dataclass
class Tests:
    """What eval.py adds to a page.

    tiles: [(text of a number, what it is, note)]; groups: [(title, [(label, result, whether it is a
    control)])]; captions: [Caption]; attention: (frame, words, maps) or None, see
    inference.attention_of(); facts: {name: text} for the run card; rows: of the table, the header
    first; notes: lines that must be read with the scores."""

    tiles: list = field(default_factory=list)
    groups: list = field(default_factory=list)
    captions: list = field(default_factory=list)
    attention: tuple | None = None
    facts: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)
    notes: list = field(default_factory=list)


@dataclass
class Caption:
    """A picture (S, S, 3), the words that were said over it, the model's caption, and whether that
    is right, None if nobody can say."""

    frame: np.ndarray
    text: str
    said: str
    right: bool | None = None


def style():
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# Parts of the page


def as_jpeg(frame):
    """A picture (S, S, 3) as a data URL; a small one is enlarged, so that it is not blurred."""
    picture, buffer = Image.fromarray(frame), io.BytesIO()
    if picture.width < 128:
        picture = picture.resize((128, 128), Image.Resampling.BICUBIC)
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def tile(number, label, note=""):
    small = f"<span>{note}</span>" if note else ""
    return f'<div class="tile"><b>{escape(number)}</b><span>{escape(label)}</span>{small}</div>'


def scores(groups):
    """The section of scores."""
    if not groups:
        return ""
    lines = [
        "<h2>Scores</h2><p class=soft>Dot: score. Bar: 95 % interval. Dashed line: chance. "
        '<span class="warm">Orange: not above chance.</span> Hollow: a control, which cannot see '
        "the pictures or cannot read the words.</p>"
    ]
    for title, rows in groups:
        drawn = "".join(score_row(*row) for row in rows)
        lines.append(f'<div class="group"><h3>{escape(title)}</h3>{drawn}</div>')
    return "".join(lines) + score_axis()


def points_of(entries, name):
    """[(step, value)] of the entries of a log that have a value of this name."""
    return [(entry["step"], entry[name]) for entry in entries if is_number(entry.get(name))]


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def training(log, titles):
    """The section of curves: of each phase its loss and its validation, or probes; and folded, its
    learning rate and the norm of its gradient. titles: {phase: title}."""
    by_phase = defaultdict(list)
    for entry in log:
        if isinstance(entry.get("phase"), str) and is_number(entry.get("step")):
            by_phase[entry["phase"]].append(entry)
    shown, folded = [], []
    for phase, entries in by_phase.items():
        title, loss = titles.get(phase, phase), points_of(entries, "loss")
        last = max(entry["step"] for entry in entries)
        val, kind, colour = (points_of(entries, name) for name in ("val_loss", "kind", "colour"))
        if loss or val:
            series = [(loss, "raw", False), (smooth(loss), "loss", False)] if loss else []
            series += [(val, "val", True)] if val else []
            words = '<i class="warm">loss</i>' + (', <i class="blue">validation</i>' if val else "")
            shown.append(figure(title, words, chart(series, f"{title}: loss", last)))
        if kind:
            series = [(kind, "val", True), (colour, "loss", False)]
            words = '<i class="blue">kind of thing</i>, <i class="warm">colour</i>'
            shown.append(figure(f"{title}: linear probes", words, chart(series, title, last)))
        for name, what in (("lr", "learning rate"), ("grad_norm", "gradient norm")):
            points = points_of(entries, name)
            if points:
                drawn = chart([(points, "val", False)], f"{title}: {what}", last)
                folded.append(figure(title, what, drawn))
    if not shown:
        return ""
    more = f'<div class="charts">{"".join(folded)}</div>'
    return (
        f'<h2>Training</h2><div class="charts">{"".join(shown)}</div><details><summary>Learning '
        f"rates and gradient norms</summary>{more}</details>"
    )


def figure(title, words, drawn):
    """words: HTML."""
    caption = f"{escape(title)} <small>{words}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def captions(found):
    """The section of captions."""
    if not found:
        return ""
    judged = [one for one in found if one.right is not None]
    rights = sum(one.right for one in judged)
    words = "Grey: what was said. Below it the model's caption"
    if judged:
        words += (
            ', <span class="good">✓</span> if it names the thing that is seen, '
            f'<span class="warm">✗</span> if not: {rights} of these {len(judged)} are right'
        )
    cards = []
    for one in found:
        mark = {True: '<b class="good">✓</b> ', False: '<b class="warm">✗</b> ', None: ""}[
            one.right
        ]
        wrong = " wrong" if one.right is False else ""
        cards.append(
            f'<figure class="card{wrong}"><img alt="" src="{as_jpeg(one.frame)}"><span>'
            f"{escape(one.text)}</span>{mark}{escape(one.said)}</figure>"
        )
    shown = "".join(cards)
    return f'<h2>What the model says</h2><p class=soft>{words}.</p><div class="cards">{shown}</div>'


def attention(found):
    """The section of one picture and where in it each word looked."""
    if not found:
        return ""
    frame, words, maps = found
    picture = Image.fromarray(frame).resize((128, 128), Image.Resampling.BICUBIC)
    dark = picture.point(lambda value: value // 4)
    cells = [f'<figure><img alt="" src="{as_jpeg(np.asarray(picture))}"></figure>']
    for word, own in zip(words, maps):
        light = Image.fromarray((brightness(own) * 255).astype(np.uint8))
        light = light.resize((128, 128), Image.Resampling.BICUBIC)
        drawn = as_jpeg(np.asarray(Image.composite(picture, dark, light)))
        cells.append(
            f'<figure><img alt="" src="{drawn}"><figcaption>{escape(word)} <small>'
            f"{own.sum():.0%}</small></figcaption></figure>"
        )
    return (
        "<h2>Where each word looked</h2><p class=soft>Bright: the patches that the model attended "
        "to when it said the word, averaged over layers and heads. The number is the share of its "
        "attention that was on the picture; a word that ignored it stays dark.</p>"
        '<div class="strip">'
        f"{''.join(cells)}</div>"
    )


def seconds_of(entries):
    """Seconds between the first and the last entry of a log, without interruptions."""
    times = [entry["time"] for entry in entries if is_number(entry.get("time"))]
    steps = np.diff(times) if len(times) > 1 else np.zeros(0)
    return float(steps[(steps >= 0) & (steps < PAUSE)].sum())


def in_words(seconds):
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def facts_of(run, log, facts):
    """The section of facts about a run: its last start, its phases' times, and facts of the tests.
    run: as run_card.read() returns it."""
    items = {name: f"<code>{escape(text)}</code>" if name in ("command", "config") else escape(text)
             for name, text in run.items()}  # fmt: skip
    names = list(dict.fromkeys(e["phase"] for e in log if isinstance(e.get("phase"), str)))
    times = {name: seconds_of([e for e in log if e.get("phase") == name]) for name in names}
    if any(times.values()):
        parts = ", ".join(f"{escape(name)} {in_words(t)}" for name, t in times.items() if t)
        items["time"] = f"{in_words(sum(times.values()))} ({parts})"
    items |= {name: escape(text) for name, text in facts.items()}
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in items.items())
    return f"<h2>This run</h2><dl>{lines}</dl>" if items else ""


def table(rows):
    """The folded table of all figures; rows: of text, the header first."""
    if not rows:
        return ""
    header, *rest = rows
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rest
    )
    return (
        f'<h2>All figures</h2><details><summary>{len(rest)} rows</summary><div class="wide">'
        f"<table><tr>{head}</tr>{body}</table></div></details>"
    )


# ---------------------------------------------------------------------------------------------
# The page

# Titles; a phase that is not here is shown by its name
PHASES = {
    "vision": "Tower (DINO)",
    "language": "GPT on speech",
    "phase1": "Phase 1: projector",
    "phase2": "Phase 2: projector and GPT",
    "phase3": "Phase 3: conversations",
}


def whole(title, subtitle, sections, refresh=0):
    """A page of sections (HTML). refresh: seconds until a browser reads it again; 0: never."""
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{escape(title)}</title><style>{style()}</style><body><h1>{escape(title)}</h1>"
        f"<p class=soft>{subtitle}</p>{''.join(sections)}</body></html>\n"
    )


def kind_of(source):
    """What the data is, in words."""
    if str(source).startswith("toy"):
        return "Toy world: drawn pictures, not SAYCam."
    return f"Data: {escape(source)}."


def live_tiles(log):
    """Tiles of a run that is still training: its phase, step and losses."""
    last = next((e for e in reversed(log) if is_number(e.get("loss"))), None)
    if not last:
        return []
    val = next((e for e in reversed(log) if is_number(e.get("val_loss"))), None)
    found = [
        (PHASES.get(last["phase"], last["phase"]), f"training, step {last['step']:,}"),
        (f"{last['loss']:.3f}", "loss"),
    ]
    if val and val["phase"] == last["phase"]:
        found.append((f"{val['val_loss']:.3f}", f"validation loss at step {val['step']:,}"))
    return found


def subtitle_of(run, log, source, tests):
    """A line on the run: its data, size, seed, time and machine."""
    facts = tests.facts if tests else {}
    seconds = sum(
        seconds_of([e for e in log if e.get("phase") == name])
        for name in {e["phase"] for e in log if isinstance(e.get("phase"), str)}
    )
    parts = [f"{facts['parameters']} parameters" if "parameters" in facts else ""]
    parts.append(f"seed {run['seed']}" if "seed" in run else "")
    parts.append(f"{in_words(seconds)} of training" if seconds else "")
    parts.append(run.get("machine", ""))
    line = escape(", ".join(part for part in parts if part))
    whole_line = kind_of(source) + (f" {line}." if line else "")
    if not tests:
        whole_line += " In training: this page is written again at each validation."
    return whole_line


def render(folder, source, tests=None):
    """report.html as text. folder: of the run; tests: a Tests, or None while it is training."""
    log, run = read_log(Path(folder) / "log.jsonl"), run_card.read(folder)
    shown = tests or Tests(tiles=live_tiles(log))
    tiles = "".join(tile(*one) for one in shown.tiles)
    notes = "".join(f'<p class="warm">{escape(note)}</p>' for note in shown.notes)
    sections = [
        notes,
        f'<div class="tiles">{tiles}</div>' if tiles else "",
        scores(shown.groups),
        captions(shown.captions),
        attention(shown.attention),
        training(log, PHASES),
        facts_of(run, log, shown.facts),
        table(shown.rows),
    ]
    return whole(
        str(folder), subtitle_of(run, log, source, tests), sections, refresh=0 if tests else 30
    )


def write_live(folder, source):
    """Write report.html of a run that is training."""
    with writing(Path(folder) / "report.html") as file:
        file.write(render(folder, source).encode("utf-8"))
