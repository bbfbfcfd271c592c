"""
Results for people: tables, the contact sheet, report.html.
"""

import base64
import html
import io
from collections import defaultdict

import numpy as np
from PIL import Image, ImageDraw

# As the BabyVLM paper reports them: Labeled-S, VTWT, Baby Winoground (group), METEOR.
PAPER = {
    "LLaVA-1.5-7B, web scale (paper)": (0.740, 0.785, 0.427, 0.166),
    "CVCL (paper)": (0.609, 0.649, 0.093, None),
    "BabyLLaVA (paper)": (0.420, 0.625, 0.066, 0.138),
    "BabyLLaVA + transferred captions (paper)": (0.536, 0.693, 0.082, None),
}
HEADER = ("test", "measure", "subset", "score", "95 % interval", "chance", "n")


def rows_of(tasks):
    """Tuples of text under HEADER, one for each figure of eval.py's results.

    tasks: {test: {subset: {measure: {"score", "n", "chance", "ci95"}}}}; chance and ci95 may be
    None, and "all" is a subset too."""
    for task, subsets in tasks.items():
        for subset, measures in subsets.items():
            for measure, result in measures.items():
                interval = "{:.3f} - {:.3f}".format(*result["ci95"]) if result["ci95"] else ""
                chance = f"{result['chance']:.3f}" if result["chance"] is not None else ""
                score = f"{result['score']:.3f}"
                yield (task, measure, subset, score, interval, chance, str(result["n"]))


def table(tasks):
    """Lines of text: HEADER and rows_of, aligned."""
    for row in (HEADER, *rows_of(tasks)):
        yield "{:23} {:20} {:9} {:6} {:14} {:7} {:>5}".format(*row)
    yield from marks(tasks)


def marks(tasks):
    """Lines that name the tests which a control solves."""
    for task, subsets in tasks.items():
        for measure, result in subsets.get("all", {}).items():
            if "solved_by" in result:
                who = result["solved_by"].replace("_", " ")
                yield f"{task} {measure}: the control {who!r} solves it; distrust its name"


def beside_the_paper(tasks, name):
    """Lines: the results of BabyVLM's authors, and those of this checkpoint on their files."""

    def score(task, measure):
        return tasks.get(task, {}).get("all", {}).get(measure, {}).get("score")

    ours = (
        score("labeled_s", "accuracy"),
        score("vtwt", "accuracy"),
        score("baby_winoground", "group"),
        score("caption", "meteor"),
    )
    line = "{:42} {:>9} {:>6} {:>10} {:>7}".format
    yield line("", "Labeled-S", "VTWT", "Winoground", "METEOR")
    for model, scores in (PAPER | {name: ours}).items():
        yield line(model, *("-" if score is None else f"{score:.3f}" for score in scores))


def contact_sheet(entries, columns=6):
    """A PIL image of entries (frame, text, caption): each frame above its text (black) and the
    model's caption (blue)."""
    page = Image.new("RGB", (190 * columns, 190 * -(-len(entries) // columns)), "white")
    draw = ImageDraw.Draw(page)
    for i, (frame, caption, answer) in enumerate(entries):
        x, y = 190 * (i % columns) + 8, 190 * (i // columns) + 6
        page.paste(Image.fromarray(frame).resize((128, 128), Image.Resampling.BICUBIC), (x, y))
        for k, (text, ink) in enumerate(((caption, "black"), (answer, "blue"))):
            lines = text[:30] + "\n" + text[30:60]
            draw.text((x, y + 132 + 22 * k), lines, ink, font_size=9, spacing=0)
    return page


def example_sheet(items):
    """A PIL image with a row for each item (test, frames, question, right answer, model's answer):
    its last nine pictures, the question (black), the answer (blue)."""
    page = Image.new("RGB", (9 * 104 + 8, 148 * len(items)), "white")
    draw = ImageDraw.Draw(page)
    for row, (test, frames, question, right, said) in enumerate(items):
        y = 148 * row + 4
        for i, frame in enumerate(frames[-9:]):
            page.paste(Image.fromarray(frame).resize((100, 100)), (104 * i + 4, y))
        words = question.replace("<image>", "#")
        draw.text((4, y + 102), f"{test}: {words[:165]}", "black", font_size=10)
        draw.text((4, y + 116), words[165:], "black", font_size=10)
        answer = f"it says: {said}" if said else "nothing is said"
        draw.text((4, y + 128), f"right: {right}    {answer}", "blue", font_size=10)
    return page


def loss_curve(phase, points):
    """An SVG figure of [(step, loss)]."""
    steps, losses = np.array(points, float).T
    x = 300 * steps / max(steps.max(), 1)
    y = 100 - 96 * (losses - losses.min()) / max(np.ptp(losses), 1e-9)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    label = f"{html.escape(phase)}: loss {losses[0]:.3f} to {losses[-1]:.3f}"
    return (
        f"<figure><svg width=300 height=104><polyline fill=none stroke=navy points='{line}'/></svg>"
        f"<figcaption>{label} in {int(steps[-1])} steps</figcaption></figure>"
    )


STYLE = (
    "body{font:15px sans-serif;margin:2em}td,th{padding:2px 12px;text-align:left}"
    "figure{display:inline-block}"
)


def page(results, sheet, log):
    """report.html as text: one file, no script, nothing fetched.

    results: as eval.py writes them; sheet: a PIL picture or None; log: files.read_log's entries."""
    cells = [
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row)
        for row in rows_of(results["tasks"])
    ]
    losses = defaultdict(list)
    for entry in log:
        if "loss" in entry:
            losses[entry["phase"]].append((entry["step"], entry["loss"]))
    curves = [loss_curve(phase, points) for phase, points in losses.items()]
    cells += [f"<tr><td colspan=7>{html.escape(line)}" for line in marks(results["tasks"])]
    picture = ""
    if sheet:
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
        picture = (
            "<h2>Reference caption (black), caption of the model (blue)</h2>"
            f"<img src='data:image/png;base64,{encoded}'>"
        )
    kind = f"Data: {html.escape(results['source'])}."
    if results["source"] == "toy":
        kind = "Toy world: drawn pictures, not SAYCam."
    if results.get("shuffled"):
        kind += " <b>Pictures were shuffled: these are no results, but a check for chance.</b>"
    loss = f", validation loss {results['val_loss']:.3f}" if "val_loss" in results else ""
    header = "".join(f"<th>{name}" for name in HEADER)
    return (
        f"<!doctype html><meta charset=utf-8><title>nanoBabyLLaVA</title><style>{STYLE}</style>"
        f"<h1>nanoBabyLLaVA</h1><p>{kind} {html.escape(results['checkpoint'])}{loss}."
        f"<table><tr>{header}{''.join(cells)}</table>"
        f"<h2>Training</h2>{''.join(curves)}{picture}"
    )
