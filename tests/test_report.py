"""What people look at."""

import re

import numpy as np

from tasks import report


def results(subset="all", task="vtwt"):
    result = {"score": 0.5, "n": 8, "chance": 0.5, "ci95": [0.2, 0.8]}
    return {"tasks": {task: {subset: {"accuracy": result}}}, "source": "toy", "checkpoint": "x.pt"}


def test_a_table_has_a_row_for_each_figure():
    rows = list(report.rows_of(results()["tasks"]))
    assert rows == [("vtwt", "accuracy", "all", "0.500", "0.200 - 0.800", "0.500", "8")]
    assert len(list(report.table(results()["tasks"]))) == 2


def test_names_from_a_csv_cannot_write_into_the_page():
    evil = "<script>alert(1)</script>"
    found = results(subset=evil, task=evil) | {"source": evil, "checkpoint": evil}
    page = report.page(found, None, [{"phase": evil, "step": i, "loss": 1.0} for i in range(3)])
    assert "<script" not in page and "&lt;script" in page


def test_the_page_is_whole_and_fetches_nothing():
    frame = np.zeros((8, 8, 3), np.uint8)
    sheet = report.contact_sheet([(frame, "a ball", "a cat")] * 36)
    log = [{"phase": "vision", "step": i, "loss": 3.0 - i} for i in range(3)]
    page = report.page(results() | {"val_loss": 1.5}, sheet, log)
    assert (
        "not SAYCam" in page and "validation loss 1.500" in page and "loss 3.000 to 1.000" in page
    )
    assert not re.search(r"https?://|<script", page) and "data:image/png;base64," in page
    assert sheet.size == (6 * 190, 6 * 190)


def test_our_row_stands_below_the_papers():
    lines = list(report.beside_the_paper(results()["tasks"], "ours"))
    assert lines[-1].split() == ["ours", "-", "0.500", "-", "-"] and len(lines) == 6


def test_the_contact_sheet_shows_all_it_is_given():
    frame = np.full((16, 16, 3), 200, np.uint8)
    sheets = [report.contact_sheet([(frame, "a ball", "a cat")] * n) for n in (6, 7, 36)]
    assert [sheet.size for sheet in sheets] == [(1140, 190), (1140, 380), (1140, 1140)]
