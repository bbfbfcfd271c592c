"""What people look at: tables, contact sheets, the report page, and runs beside each other."""

import html.parser
import json
import re

import numpy as np
import pytest
from conftest import one_line

from config import UserError
from tasks import TASKS, compare, report, scores, sheets
from training import figures, page
from training.page import Caption

FRAME = np.full((16, 16, 3), 200, np.uint8)


def results(subset="all", task="vtwt"):
    result = {"score": 0.5, "n": 8, "chance": 0.5, "ci95": [0.2, 0.8]}
    return {"tasks": {task: {subset: {"accuracy": result}}}, "source": "toy", "checkpoint": "x.pt"}


def test_a_table_has_a_row_for_each_figure():
    rows = list(report.rows_of(results()["tasks"]))
    assert rows == [("vtwt", "accuracy", "all", "0.500", "0.200 - 0.800", "0.500", "8")]
    assert len(list(report.table(results()["tasks"]))) == 2


def test_our_row_stands_below_the_papers():
    lines = list(report.beside_the_paper(results()["tasks"], "ours"))
    assert lines[-1].split() == ["ours", "-", "0.500", "-", "-"] and len(lines) == 6


# ---------------------------------------------------------------------------------------------
# Contact sheets


def test_the_contact_sheet_shows_all_it_is_given():
    entries = [Caption(FRAME, "a ball", "a cat", right) for right in (True, False, None)] * 4
    sizes = [sheets.contact_sheet(entries[:n]).size for n in (6, 7, 12)]
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] == sizes[2][1] > sizes[0][1]


def test_words_are_whole_in_contact_sheets():
    font = sheets.font_of(13)
    text = "what colour is the extraordinarily long hippopotamus ? it 's a colourful one ."
    lines = sheets.wrap(text, 150, font)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(font.getlength(line) <= 150 for line in lines)
    cut = sheets.wrap("a" * 100, 150, font)
    assert "".join(cut) == "a" * 100 and all(font.getlength(line) <= 150 for line in cut)
    assert sheets.wrap("", 150, font) == [""]


def test_pictures_of_a_question_have_its_letters():
    question = "Which contains this object? (A) (B) (C)"
    assert sheets.label_pictures(4, question) == ["", "(A)", "(B)", "(C)"]
    assert sheets.label_pictures(2, "How many?") == ["1", "2"]
    assert sheets.label_pictures(1, "How many?") == [""]
    items = [("memory", [FRAME] * 12, question, "B", said) for said in ("B", "(b)", "C", "")]
    assert sheets.example_sheet(items).size[0] > 9 * 112


# ---------------------------------------------------------------------------------------------
# The page


class Checked(html.parser.HTMLParser):
    """Notes the tags that are open at the end, and those that close another than the last."""

    EMPTY = {"meta", "img", "line", "circle", "polyline", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass  # <line/>

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.wrong.append(tag)


def whole_page(folder, subset="seen", source="toy"):
    """A page with every section."""
    log = [
        {"phase": "phase2", "step": i, "loss": 3 - i / 50, "lr": 1e-3, "grad_norm": 1.0,
         "time": 1000.0 + i} for i in range(100)
    ]  # fmt: skip
    log += [{"phase": "phase2", "step": i, "val_loss": 2.5 - i / 60, "time": 0} for i in (0, 99)]
    log += [{"phase": "vision", "step": i, "kind": 0.2, "colour": 0.9} for i in (0, 9)]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "run.json").write_text(json.dumps([{"command": "python train.py", "seed": "1"}]))
    result = {"score": 0.5, "n": 8, "chance": 0.25, "ci95": [0.2, 0.8]}
    tasks = {
        "labeled_s": {"all": {"accuracy": result}, subset: {"accuracy": result}},
        "which_utterance": {
            "all": {"accuracy": result | {"ci95": [0.4, 0.6]}, "cannot_see": result}
        },
    }
    tests = page.Tests(
        tiles=report.tiles_of(tasks),
        groups=report.groups_of(tasks),
        captions=[Caption(FRAME, "a ball", "a cat", right) for right in (True, False, None)],
        attention=(FRAME, ["a", "cat"], np.ones((2, 4, 4)) / 32),
        facts={"parameters": "1,000", subset: source},
        rows=[report.HEADER, *report.rows_of(tasks)],
        notes=["a note"],
    )
    return page.render(folder, source, tests)


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    text = whole_page(tmp_path)
    checked = Checked(text)
    assert not checked.open and not checked.wrong
    assert not re.search(r"<script|<link|@import|url\(|(src|href)=\"(?!data:)|https?://", text)
    for words in ("not SAYCam", "Scores", "What the model says", "Where each word looked",
                  "Training", "This run", "All figures", "a note", "cannot see", "seen pairs",
                  "python train.py", "1 min 39 s", "seed 1"):  # fmt: skip
        assert words in text, words
    assert text.count('class="card wrong"') == 1 and "1 of these 2 are right" in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert text.count("</svg>") > 6 and "data:image/jpeg;base64," in text
    assert len(text) < 1.5e6


def test_what_is_not_above_chance_is_marked(tmp_path):
    """An interval that reaches chance; not one above it, and never a score without chance."""
    kinds = [
        figures.score_row("x", {"score": 0.5, "n": 9, "chance": chance, "ci95": interval})
        for chance, interval in ((0.25, [0.2, 0.8]), (0.25, [0.3, 0.8]), (None, [0.2, 0.8]))
    ]
    assert ["dot low" in kind for kind in kinds] == [True, False, False]
    assert "chance" in kinds[0] and 'class="chance"' not in kinds[2]


def test_names_from_a_csv_cannot_write_into_the_page(tmp_path):
    evil = "<script>alert(1)</script>"
    text = whole_page(tmp_path, subset=evil, source=evil)
    assert "<script" not in text and "&lt;script" in text


def test_a_page_in_training_has_no_scores_and_is_read_again(tmp_path):
    whole_page(tmp_path)
    page.write_live(tmp_path, "toy")
    text = (tmp_path / "report.html").read_text()
    checked = Checked(text)
    assert not checked.open and not checked.wrong and "<h2>Scores" not in text
    assert 'http-equiv="refresh"' in text and "training, step 99" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    page.write_live(empty, "toy")  # before the first step
    assert "In training" in (empty / "report.html").read_text()


def test_interruptions_do_not_count_as_time():
    times = [0, 10, 20, 20 + 10 * page.PAUSE, 30 + 10 * page.PAUSE]
    assert page.seconds_of([{"time": t} for t in times]) == 30
    assert page.in_words(3661) == "1 h 1 min" and page.in_words(59.6) == "1 min 0 s"


def test_axes_have_round_numbers_that_cover_the_curve():
    for low, high in ((0, 1), (0.21, 0.58), (2.81, 4.85), (-3, 12345), (5, 5)):
        ticks = figures.nice_ticks(low, high)
        assert 1 <= len(ticks) <= 7
        assert all(len(f"{tick:.4g}") <= 6 for tick in ticks)
        if high > low:
            assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert figures.chart([([], "loss", False)], "nothing") == ""
    assert "nan" not in figures.chart([([(0, float("nan")), (1, 2.0)], "loss", True)], "x")


def test_smoothing_is_the_mean_of_neighbours():
    rng = np.random.RandomState(0)
    points = [(step, float(rng.rand())) for step in range(200)]
    values = [value for _, value in points]
    found = figures.smooth(points)
    for i, (step, value) in enumerate(found):
        assert step == i and abs(value - np.mean(values[max(0, i - 5) : i + 6])) < 1e-9


def test_every_title_is_of_a_test_or_a_sum_of_tests():
    assert set(report.TITLES) <= set(TASKS) | {"grammar", "toolbox"}


# ---------------------------------------------------------------------------------------------
# Runs beside each other


def write_run(folder, hits, items="same"):
    folder.mkdir()
    result = scores.accuracy(hits, 0.25)
    tasks = {"labeled_s": {"all": {"accuracy": result}, "seen": {"accuracy": result}}}
    (folder / "results.json").write_text(json.dumps({"tasks": tasks}))
    of_items = {subset: {"accuracy": result.hits} for subset in ("all", "seen")}
    found = {"labeled_s": {"items": items, "hits": of_items}}
    (folder / "hits.json").write_text(json.dumps(found))
    return str(folder)


def test_differences_are_paired(tmp_path, capsys):
    """The second run is right where the first is and on 20 items more: its interval leaves out 0,
    though the intervals of the two scores overlap."""
    first = [1.0] * 100 + [0.0] * 100
    second = [1.0] * 120 + [0.0] * 80
    runs = [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second)]
    mean, (low, high) = scores.paired_difference(first, second)
    # the normal interval of the mean difference, by hand
    differences = np.subtract(second, first)
    half = 1.96 * differences.std() / 200**0.5
    assert abs(mean - 0.1) < 1e-12 and low > 0
    assert abs(low - (0.1 - half)) < 0.01 and abs(high - (0.1 + half)) < 0.01
    assert scores.wilson(100, 200)[1] > scores.wilson(120, 200)[0]
    compare.main(runs)
    shown = capsys.readouterr().out
    assert "+0.100" in shown and "compare.html" in shown
    text = (tmp_path / "b" / "compare.html").read_text()
    assert '<td class="good">+0.100' in text and not Checked(text).wrong


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    runs = [write_run(tmp_path / "a", [1.0]), write_run(tmp_path / "b", [1.0], items="other")]
    for folders, why in (
        (runs, "other items"),
        (runs[:1], "two folders"),
        ([runs[0], str(tmp_path / "none")], "run `python eval.py"),
    ):
        with pytest.raises(UserError, match=why) as error:
            compare.main(folders)
        assert one_line(error)


def test_a_run_has_hits_for_each_item(recipe):
    found = json.loads((recipe / "hits.json").read_text())
    tasks = json.loads((recipe / "results.json").read_text())["tasks"]
    for test, own in found.items():
        for subset, measures in own["hits"].items():
            for measure, hits in measures.items():
                result = tasks[test][subset][measure]
                assert len(hits) == result["n"]
                assert abs(np.mean(hits) - result["score"]) < 1e-3
    assert set(found) == set(tasks)


def test_a_word_that_ignored_the_picture_stays_dark():
    """As bright as the share of its attention that is on the picture, brightest where it looked."""
    from inference import brightness

    looked = np.zeros((4, 4))
    looked[1, 2], looked[3, 3] = 0.6, 0.3
    ignored = looked / 30  # 3 % on the picture
    assert brightness(looked)[1, 2] == pytest.approx(0.9)
    assert brightness(looked)[3, 3] == pytest.approx(0.45)
    assert brightness(ignored).max() == pytest.approx(0.03)
    assert not brightness(np.zeros((4, 4))).any()
