"""
Runs beside each other: the difference of each score to that of the first run, with a paired 95 %
interval over the same items, and the curves of all of them.

    python eval.py --compare out/toy out/linear

Reads what eval.py has written to the folders of the runs. Writes compare.html to the last one.
"""

from pathlib import Path

from common.files import read_json, read_log, writing
from config import UserError
from tasks.report import SUBSETS, TITLES, in_order, in_plain, shown_measure
from tasks.scores import paired_difference
from training import page
from training.figures import chart, escape, smooth

HEADER = ("test", "measure", "subset", "run", "score", "difference", "95 % interval", "n")
COLOURS = 4  # runs that have a colour of their own on the page


def read_run(folder):
    """(results, hits) that eval.py wrote to a run's folder. Raises UserError."""
    paths = [Path(folder) / name for name in ("results.json", "hits.json")]
    for path in paths:
        if not path.exists():
            checkpoint = f"{folder}/phase2.pt"
            raise UserError(f"no {path}: run `python eval.py --checkpoint {checkpoint}` first")
    return tuple(read_json(path) for path in paths)


def rows_of(folders, runs):
    """[tuple under HEADER] of the chief measure of each test that all runs have taken. Raises
    UserError if the items of a test differ."""
    rows, first = [], runs[0][0]["tasks"]
    for test, subsets in first.items():
        if not all(test in results["tasks"] for results, _ in runs):
            continue
        check_items(test, folders, runs)
        measure = shown_measure(test, subsets["all"])
        for subset in in_order(subsets):
            for folder, (results, hits) in zip(folders, runs):
                result = results["tasks"][test].get(subset, {}).get(measure)
                if result:
                    key, is_first = (test, subset, measure), folder == folders[0]
                    change = ("", "") if is_first else difference(runs[0][1], hits, key)
                    score = f"{result['score']:.3f}"
                    rows.append((test, measure, subset, folder, score, *change, str(result["n"])))
    return rows


def check_items(test, folders, runs):
    """Raise UserError if not all runs took a test on the same items."""
    items = [hits.get(test, {}).get("items") for _, hits in runs]
    for folder, own in zip(folders, items):
        if own != items[0]:
            raise UserError(f"{test}: {folder} was tested on other items than {folders[0]}")


def difference(before, after, key):
    """(difference, 95 % interval) as text of two hits.json; empty where one has no hits of a key
    (test, subset, measure)."""
    test, subset, measure = key
    both = [
        hits.get(test, {}).get("hits", {}).get(subset, {}).get(measure) for hits in (before, after)
    ]
    if not all(both):
        return "", ""
    mean, ends = paired_difference(*both)
    return f"{mean:+.3f}", "{:+.3f} to {:+.3f}".format(*ends)


def table(rows):
    """Lines of text: HEADER and rows, aligned."""
    widths = [max(len(row[i]) for row in (HEADER, *rows)) for i in range(len(HEADER))]
    for row in (HEADER, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def difference_table(rows):
    """The section of differences, of the rows of all runs but the first; clear ones are marked."""
    lines = []
    for test, _, subset, folder, score, change, interval, n in rows:
        title = TITLES.get(test, (in_plain(test), ""))[0].partition(":")[0]
        clear = interval and interval.split(" to ")[0][0] == interval.split(" to ")[1][0]
        kind = "" if not clear else ' class="good"' if change.startswith("+") else ' class="warm"'
        cells = (title, SUBSETS.get(subset, in_plain(subset)), folder)
        lines.append(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + f"<td>{score}</td><td{kind}>{change}</td><td>{interval}</td><td>{n}</td></tr>"
        )  # fmt: skip
    names = ("test", "items", "run", "score", "difference", "95 % interval", "n")
    head, body = "".join(f"<th>{name}</th>" for name in names), "".join(lines)
    return (
        "<h2>Scores</h2><p class=soft>Difference: to the first run, over the same items. Coloured: "
        "its interval leaves out 0. With many rows some do so by chance, and runs with another "
        f'--seed differ too.</p><div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    )


def curves(folders):
    """The section of curves: each phase's smoothed loss and validation, a colour for each run."""
    logs, drawn = [read_log(Path(folder) / "log.jsonl") for folder in folders], []
    phases = dict.fromkeys(
        e["phase"] for log in logs for e in log if isinstance(e.get("phase"), str)
    )
    for phase in phases:
        for name, what in (
            ("loss", "loss, smoothed"),
            ("val_loss", "validation"),
            ("kind", "probe"),
        ):
            series = []
            for number, log in enumerate(logs):
                points = page.points_of([e for e in log if e.get("phase") == phase], name)
                if points:
                    dots = name != "loss"
                    line = points if dots else smooth(points)
                    series.append((line, f"c{number % COLOURS}", dots))
            if series:
                title = page.PHASES.get(phase, phase)
                drawn.append(page.figure(title, what, chart(series, f"{title}: {what}")))
    return f'<h2>Training</h2><div class="charts">{"".join(drawn)}</div>' if drawn else ""


def main(folders, out=""):
    """Print the table and write compare.html. folders: of two runs or more. Raises UserError."""
    if len(folders) < 2:
        raise UserError("--compare takes two folders or more: out/toy out/linear")
    runs = [read_run(folder) for folder in folders]
    rows = rows_of(folders, runs)
    print(*table(rows), sep="\n")
    keys = ", ".join(
        f'<b class="key{number % COLOURS}">{escape(folder)}</b>'
        for number, folder in enumerate(folders)
    )
    sections = [difference_table(rows), curves(folders)]
    text = page.whole("Runs beside each other", keys, sections)
    path = Path(out or folders[-1]) / "compare.html"
    with writing(path) as file:
        file.write(text.encode("utf-8"))
    print(f"written: {path}")
