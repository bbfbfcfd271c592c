"""Files that are whole or not there, CSVs, logs, locks."""

import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, one_line

from common import files
from common.files import only_one, read_csv, read_log, trim_log, write_csv, writing
from config import UserError, regular


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "x") as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); from common import files\n"
    code += "with files.writing('x') as file: os._exit(9)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, check=False)
    others = tmp_path / "x.another-machine.1.tmp"
    others.write_bytes(b"")
    mine = tmp_path / f"y.{files.HOST}.{os.getpid()}.tmp"
    mine.write_bytes(b"")
    assert len(list(tmp_path.iterdir())) == 4
    with only_one(tmp_path, "testing"):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", others.name, mine.name}
    os.utime(others, (0, 0))
    with only_one(tmp_path, "testing"):
        assert not others.exists() and mine.exists()


def test_the_system_says_which_file_it_cannot_write(tmp_path):
    """A disk that is full, or a file that may not grow: the line says which."""
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "import checkpoint, config, torch\nfrom common import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "write = {'json': lambda: files.write_json('a.json', 'x' * 20_000),\n"
        "  'pt': lambda: checkpoint.save('a.pt', {'x': torch.zeros(9999)}),\n"
        "  'log': lambda: files.append_log('a.log', {'x': 'y' * 20_000})}\n"
        "config.run(lambda argv: write[argv[1]]())"
    )
    for kind in ("json", "pt", "log"):
        (tmp_path / f"a.{kind}").write_bytes(b"old")
        command = [sys.executable, "-c", code, str(ROOT), kind]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert f"a.{kind}" in done.stderr and "File too large" in done.stderr
        assert (tmp_path / f"a.{kind}").read_bytes()[:3] == b"old"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("read", [files.read_text, files.read_json, regular])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a file, but a folder, a pipe or a device"):
        read(tmp_path / "pipe")
    with pytest.raises(UserError, match="a folder"):
        read(tmp_path)


def test_what_is_no_json_is_one_clear_line(tmp_path):
    for content, message in (
        (b"{", "not JSON"),
        (b"[" * 99999, "not JSON"),
        (b"\n\xff", ":2: not in"),
    ):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            files.read_json(tmp_path / "x.json")
        assert one_line(error)


def test_a_table_comes_back_with_its_line_numbers(tmp_path):
    write_csv(tmp_path / "t.csv", ("a", "b"), [("1", "x, y"), ("2", "two\nlines"), ("3", '"')])
    rows = read_csv(tmp_path / "t.csv", ("a", "b"))
    assert [row["b"] for row in rows] == ["x, y", "two\nlines", '"']
    assert [row["line"] for row in rows] == [2, 3, 5]


@pytest.mark.parametrize(
    "content, right",
    [
        ("image,caption\n0.png,look, a ball !\n", "look, a ball !"),  # commas without quotes
        ('image,caption\n0.png,"look, a ball !"\n', "look, a ball !"),
        ('image, caption\n0.png, "look, a ball !"\n', "look, a ball !"),  # quotes after a space
        ('image,caption\n0.png,look, it is 5" tall, and "red"\n', 'look, it is 5" tall, and "red"'),
        ('image,caption\r\n0.png,"""look"", he said"\r\n', '"look", he said'),
        (",image,caption\n0,0.png,look\n1,1.png,a ball\n", "look"),  # an index as pandas writes it
        ("image,caption,,\n0.png,look,,\n1.png,a ball,,\n", "look"),  # empty columns of a sheet
        ("image,caption,\n0.png,look, a ball\n", "look, a ball"),
        ("image,caption\n\n,\n0.png,look\n  \n", "look"),  # rows without text
        ("\ufeffimage,caption\n0.png,look\n", "look"),
    ],
)
def test_a_caption_is_read_whole(tmp_path, content, right):
    (tmp_path / "t.csv").write_bytes(content.encode())
    row = read_csv(tmp_path / "t.csv", ("image", "caption"), ("caption",))[0]
    assert (row["image"], row["caption"]) == ("0.png", right)


@pytest.mark.parametrize(
    "content, message",
    [
        ("image,caption,who\n0.png,look, a ball,MOT\n", ":2: 4 cells under a header of 3"),
        ("caption,image\nlook, a ball,0.png\n", ":2: 3 cells under a header of 2"),
        ("image,caption,text\n0.png,look, a ball,yes\n", ":2: 4 cells under a header of 3"),
        ('image,caption\n0.png,look, "a ball"\n', ":2: 3 cells under a header of 2"),
        ("image,caption\n0.png,look,\n", ":2: 3 cells under a header of 2"),
        ("image,caption\n0.png\n", ":2: 1 cells under a header of 2"),
        ('image,caption\n0.png,"look\n1.png,a cup\n2.png,a dog\n', ":2: quotes that do not close"),
        ('image,caption\n0.png,a\n1.png,"look\n2.png,"a cup"\n', ":3: quotes that do not close"),
        ('image,caption\n0.png,"look\n1.png,a cup"\n', ":2: quotes that do not close"),
        ('start,end,caption\n0,1.5,"look\n2,3,a cup"\n', ":2: quotes that do not close"),
        ('image,caption\n0.png,"look" he said\n', ":2: quotes that do not close"),
        ("image,caption\n0.png,look\nimage,caption\n1.png,a\n", ":3: the header again"),
        ("image,caption,caption\n0.png,look,a\n", ":1: two columns are called caption"),
        ("image,caption\n0.png,look\n1.png,  \n", ":3: empty caption"),
        ("image,caption\n0,0.png,look\n1,1.png,a\n", ":2: each row begins with a number"),
        ("start,end,caption\n1,0,1.5,look\n2,2,3,a\n", ":2: each row begins with a number"),
    ],
)
def test_a_row_that_may_be_read_wrong_is_refused(tmp_path, content, message):
    columns = [name for name in ("image", "start", "caption") if name in content]
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_csv(tmp_path / "t.csv", columns, ("caption", "text"))
    assert one_line(error)


def test_a_csv_made_at_random_is_read_as_it_was_meant_or_refused(tmp_path):
    """300 files, some written well and some not, against the cells that they were made from."""
    rng, words = random.Random(0), "look a ball ! the red , it 's don't caf\u00e9 5\" yes".split()
    headers = [("image", "caption"), ("image", "caption", "subset"), ("caption", "image")]
    quote = lambda cell: '"' + cell.replace('"', '""') + '"'
    as_read = 0
    for _ in range(300):
        header = rng.choice(headers)
        make = {
            "image": lambda: f"{rng.randint(0, 99)}.png",
            "caption": lambda: " ".join(rng.choices(words, k=rng.randint(1, 5))),
            "subset": lambda: rng.choice("ab"),
        }
        rows = [[make[name]() for name in header] for _ in range(rng.randint(1, 6))]
        comma, how = rng.choice([",", ", "]), rng.choice(["bare", "quoted", "needed", "open"])
        lines = [",".join(header)]
        for row in rows:
            cells = [
                quote(cell) if how == "quoted" or (how == "needed" and re.search('[,"]', cell)) else
                '"' + cell if how == "open" and rng.random() < 0.2 and "." not in cell else cell
                for cell in row
            ]  # fmt: skip
            lines.append(comma.join(cells))
        if rng.random() < 0.1:
            lines.insert(rng.randint(1, len(lines)), lines[0])
        (tmp_path / "t.csv").write_text(rng.choice(["\n", "\r\n"]).join(lines), newline="")
        try:
            found = read_csv(tmp_path / "t.csv", ("image", "caption"), ("caption",))
        except UserError as error:
            assert "t.csv" in str(error) and "\n" not in str(error)
            assert how != "quoted" or lines.count(lines[0]) == 2
            continue
        assert [[row[name] for name in header] for row in found] == rows
        as_read += 1
    assert as_read > 100


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no column a, b; the header is .empty"),
        ("a,b\n", "no rows below the header"),
        ("a,c\n1,2\n", ":1: no column b"),
        ("a,b\n1,2\n3,\n", ":3: empty b"),
        ("a,b\n1\n", ":2: 1 cells under a header of 2"),
    ],
)
def test_a_bad_table_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_csv(tmp_path / "t.csv", ("a", "b"))
    assert one_line(error)


def test_a_table_in_another_encoding_is_one_clear_line(tmp_path):
    for content, line in ((b"a,b\n1,2\n3,\xe9\n", 3), (b"a,\xe9\n1,2\n", 1)):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(UserError, match=f"t.csv:{line}: not in UTF-8") as error:
            read_csv(tmp_path / "t.csv", ("a", "b"))
        assert one_line(error)
    (tmp_path / "t.csv").write_text('a,b\r\n"x\ny",\u00e9\r\n', "utf-16")
    row = {"a": "x\ny", "b": "\u00e9", "line": 2}
    assert read_csv(tmp_path / "t.csv", ("a", "b")) == [row]


def test_half_a_line_of_a_log_is_passed_over_and_trimmed(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = ['{"phase": "a", "step": 0}', '{"phase": "a", "step": 1}', '{"phase": "b", "step": 0}']
    log.write_text("\n".join(lines) + '\n{"phase": "b", "st')
    assert [entry["step"] for entry in read_log(log)] == [0, 1, 0]
    trim_log(log, "a", 1)
    assert log.read_text().splitlines() == [lines[0], lines[2]]
    trim_log(tmp_path / "none.jsonl", "a", 0)
    assert read_log(tmp_path / "none.jsonl") == []


def test_a_lock_refuses_a_second_run_and_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from common.files import only_one\n"
        "with only_one(sys.argv[1], 'x'): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is training here") as error:
        with only_one(tmp_path, "training"):
            pass
    assert one_line(error)
    run.kill()
    run.wait()
    with only_one(tmp_path, "training"):
        pass


def test_a_folder_that_cannot_be_written_is_not_called_another_runs(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / ".lock"))

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(PermissionError), only_one(tmp_path, "training"):
        pass


def test_rows_of_a_bin_are_those_of_its_map(tmp_path):
    whole = np.random.RandomState(0).randint(0, 1 << 16, (50, 7, 3)).astype("uint16")
    path = tmp_path / "x.bin"
    path.write_bytes(b"four" + whole.tobytes())
    array = np.memmap(path, "uint16", "r", offset=4, shape=whole.shape)
    numbers = np.array([49, 0, 7, 7, 31])
    for rows in (files.Rows(array), files.Rows(whole)):
        assert (rows[numbers] == whole[numbers]).all()
        assert rows[numbers[:0]].shape == (0, 7, 3)


def test_a_read_may_bring_less_than_a_row(tmp_path, monkeypatch):
    whole = np.arange(60, dtype="float16").reshape(5, 12)
    (tmp_path / "x.bin").write_bytes(whole.tobytes())
    rows = files.Rows(np.memmap(tmp_path / "x.bin", "float16", "r", shape=whole.shape))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:5]], at))
    assert (rows[np.array([4, 1])] == whole[[4, 1]]).all()


def test_where_the_system_cannot_read_so_the_map_is_read(tmp_path, monkeypatch):
    whole = np.arange(60, dtype="float16").reshape(5, 12)
    (tmp_path / "x.bin").write_bytes(whole.tobytes())
    monkeypatch.delattr(os, "preadv")
    rows = files.Rows(np.memmap(tmp_path / "x.bin", "float16", "r", shape=whole.shape))
    assert (rows[np.array([4, 1])] == whole[[4, 1]]).all()


def test_a_bin_that_is_cut_short_while_it_is_read_is_told(tmp_path):
    """Through the map it would be a bus error."""
    whole = np.arange(60, dtype="float16").reshape(5, 12)
    path = tmp_path / "x.bin"
    path.write_bytes(whole.tobytes())
    rows = files.Rows(np.memmap(path, "float16", "r", shape=whole.shape))
    os.truncate(path, 60)
    with pytest.raises(UserError, match="ends before row 3") as error:
        rows[np.array([0, 3])]
    assert one_line(error)


def test_a_mistake_leaves_no_empty_folder(tmp_path):
    """But one with work in it stays."""
    for name, work in (("empty", ()), ("begun", ("frames.partial",))):
        with pytest.raises(UserError, match="wrong"), files.only_one(tmp_path / name, "working"):
            for one in work:
                (tmp_path / name / one).touch()
            raise UserError("wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]
