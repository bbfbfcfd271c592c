"""Anybody's video: a film whose every frame and time is known, in four forms of transcript."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
from conftest import one_line

from config import UserError
from data import Data
from sources import command, ffmpeg, transcripts

FLAGS = "--size=16 --fit=squash --vocab_size=300 --fps=2".split()


def grey(number):
    """The shade of second number `number` of the film."""
    return 20 + 10 * number


def make_film(path, seconds=22, rate=10, size=(64, 36)):
    """A film that shows, each second, a shade of its own."""
    width, height = size
    frames = [np.full((height, width, 3), grey(i // rate), np.uint8) for i in range(seconds * rate)]
    command = [ffmpeg.find_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(rate), "-i", "-", "-c:v", "ffv1", str(path)]
    subprocess.run(command, input=b"".join(f.tobytes() for f in frames), check=True)


def srt(times):
    stamp = lambda t: f"00:{int(t) // 60:02d}:{int(t) % 60:02d},{round(t % 1 * 1000):03d}"
    blocks = [f"{i}\n{stamp(a)} --> {stamp(b)}\n{words}\n" for i, (a, b, words) in enumerate(times)]
    return "\n".join(blocks)


SAID = [(i, i + 1.5, f"look , number {'abcdefghijklmnopqrst'[i]} !") for i in range(20)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ffmpeg").mkdir()
    make_film(tmp_path / "ffmpeg" / "one.mkv")
    (tmp_path / "ffmpeg" / "one.srt").write_text(srt(SAID))
    return tmp_path


def samples_of(dataset, split):
    """[(words, shades of the pictures shown)]."""
    tokens, shown = dataset.open(split, "tokens"), dataset.open(split, "image_ids")
    frames, images = dataset.open(split, "frames"), dataset.open(split, "images")
    for first, length, begin, count in dataset.open(split, "samples").astype(int).tolist():
        own = [frames[images[number][0]] for number in shown[begin : begin + count]]
        words = dataset.tokenizer.decode(tokens[first : first + length])
        yield words, [round(float(frame.mean())) for frame in own]


def test_frames_are_those_on_the_screen(folder):
    """Every time and every shade: at n / fps seconds, the shade of that second."""
    found = list(ffmpeg.read_frames(folder / "ffmpeg" / "one.mkv", 4))
    assert len(found) in (88, 89) and found[0].shape == (36, 64, 3)
    for number, frame in enumerate(found[:88]):
        assert abs(int(frame.mean()) - grey(number // 4)) <= 1, number


@pytest.mark.parametrize("form", ["yuv420p", "yuv420p10le", "yuv422p12le", "gray16le", "rgb48le"])
def test_films_of_any_depth_are_read_as_ffmpeg_reads_them(tmp_path, form):
    path = f"file:{tmp_path}/12:30 bath.mkv"  # a name that looks like a protocol, too
    noise = ["-f", "lavfi", "-i", "testsrc2=size=64x36:rate=4:duration=1,noise=alls=20"]
    run = lambda *words: (
        subprocess.run(
            [ffmpeg.find_ffmpeg(), "-v", "error", *words], check=True, capture_output=True
        ).stdout
    )
    run(*noise, "-pix_fmt", form, "-c:v", "ffv1", path)
    right = run("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    found = list(ffmpeg.read_frames(tmp_path / "12:30 bath.mkv", 4))
    assert b"".join(frame.tobytes() for frame in found) == right and len(found) == 4


def test_pairs_clips_and_moments(folder):
    command.main(["video", "--videos=ffmpeg", *FLAGS, "--window=4"])
    dataset = Data("data/video")
    singles, clips, moments = [], [], []
    for split in ("train", "val"):
        for words, shades in samples_of(dataset, split):
            kind = singles if len(shades) == 1 else moments if words.count("!") > 1 else clips
            kind.append((words, shades))
    # utterance i is said from i to i + 1.5: at 2 frames a second, two in its own second, one later
    assert len(singles) == 20 * 3 and len(clips) == 20 and moments
    shade = {words: grey(i) for i, (_, _, words) in enumerate(SAID)}
    for words, shades in clips:
        text = words.replace("<image>", "").replace("<eos>", "").strip()
        wanted = [shade[text], shade[text], shade[text] + 10]
        assert np.abs(np.array(shades) - wanted).max() <= 1
    for words, shades in moments:
        assert len(shades) == 4
        assert all(abs(b - a - 10) <= 1 for a, b in zip(shades, shades[1:]))


def test_no_frame_is_kept_twice(folder):
    """60 pairs at 2 frames a second of 21 seconds: 43 frames at most, and a few at the seams."""
    command.main(["video", "--videos=ffmpeg", *FLAGS])
    counts = Data("data/video").meta["splits"]
    assert sum(counts[split]["frames"] for split in ("train", "val")) <= 43 + 2 * 3


FORMS = {
    "srt": srt([(0, 1, "hello there"), (1.5, 3, "a ball !")]),
    "vtt": "WEBVTT\n\n00:00.000 --> 00:01.000 align:start\n<v MOT>Hello <b>there</b>\n\n"
    "00:01.500 --> 00:03.000\n<v CHI>ba\n\n00:01.500 --> 00:03.000\n<v MOT>A ball !\n",
    "csv": "start,end,text,speaker\n0,1,hello there,MOT\n00:00:01.5,3,ba,CHI\n1.5,3,a ball !,MOT\n",
    "cha": "@Begin\n@Participants:\tCHI Target_Child, MOT Mother\n*MOT:\thello [!] &-um <there>\n"
    "\t[/] . \x150_1000\x15\n%mor:\tco|hello\n*CHI:\tba@b . \x151500_3000\x15\n*MOT:\txxx .\n"
    "*MOT:\ta ba(ll) ! \x151500_3000\x15\n@End\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_four_forms_say_the_same(tmp_path, form):
    path = tmp_path / f"one.{form}"
    path.write_text(FORMS[form], encoding="utf-8")
    said, *_ = transcripts.read_transcript(path)
    assert [(one.start, one.end) for one in said] == [(0, 1), (1.5, 3)]
    assert [one.words.rstrip(" .") for one in said] == ["hello there", "a ball !"]


CUES = {  # what a file says, and what it should be read as
    "no blank lines.srt": (
        "1\n00:00:00,000 --> 00:00:01,000\nhello\n2\n00:00:01,000 --> 00:00:02,000\na ball\n",
        ["hello", "a ball"],
    ),
    "a blank line in a cue.srt": (
        "1\n00:00:00,000 --> 00:00:01,000\nhello\n\nthere\n\n2\n00:00:01,000 --> 00:00:02,000\na\n",
        ["hello there", "a"],
    ),
    "a number is said.srt": ("1\n00:00:00,000 --> 00:00:01,000\n5\n", ["5"]),
    "tags.srt": ("1\n00:00:00,000 --> 00:00:01,000\n{\\an8}<i>3 < 5</i> &amp; 6 > 4<br/>yes\n",
                 ["3 < 5 & 6 > 4 yes"]),
    "lines of another kind.srt": ("1\n00:00:00,000 --> 00:00:01,000\nhello\u2028you\u0085there\n",
                                  ["hello you there"]),
    "old Macintosh.srt": ("1\r00:00:00,000 --> 00:00:01,000\rhello\r\r2\r00:00:01,000 --> "
                          "00:00:02,000\ra\r", ["hello", "a"]),
    "two voices.vtt": ("WEBVTT\n\n00:00.000 --> 00:01.000\n<v MOT>hello\n"
                       "<v MOT>there</v>\n<v.loud CHI>ba",
                       ["hello there", "ba"]),
    "names and notes.vtt": (
        "WEBVTT - a title\n\nintro\n00:00.000 --> 00:01.000 align:start\nhello\n\n"
        "NOTE\nnobody says this\n\n"
        "second\n00:01.000 --> 00:02.000\na &lt;ball&gt;\n", ["hello", "a <ball>"],
    ),
    "rolling.vtt": (
        "WEBVTT\n\n00:00.000 --> 00:01.000\n \nlook<00:00:00.500><c> a ball</c>\n\n"
        "00:01.000 --> 00:01.010\nlook a ball\n \n\n"
        "00:01.010 --> 00:02.000\nlook a ball\na<00:00:01.500><c> red one</c>\n\n"
        "00:02.000 --> 00:02.010\na red one\n \n\n"
        "00:02.010 --> 00:03.000\na red one\nyes\n", ["look a ball", "a red one", "yes"],
    ),
    "said twice.vtt": (
        "WEBVTT\n\n00:00.000 --> 00:01.000\na ball\n\n00:01.000 --> 00:02.000\na ball\n\n"
        "00:02.000 --> 00:03.000\nlook\na cup\n", ["a ball", "a ball", "look a cup"],
    ),
    "pauses.cha": (
        "@Begin\n@Participants:\tMOT Mother\n*MOT:\toh (.) look (..) a (1.5) no:: ba(ll) ! "
        "\x150_1000\x15\n@End\n", ["oh look a no ball !"],
    ),
    "commas.csv": ("start,end,text\n0,1,look, a ball !\n", ["look, a ball !"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CUES)
def test_what_is_said_in_files_as_they_are(tmp_path, name):
    text, right = CUES[name]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    said, *_ = transcripts.read_transcript(tmp_path / name, ("CHI", "MOT", ""))
    assert [one.words for one in said] == right


@pytest.mark.parametrize(
    "content, why",
    [
        ("1\n00:00:00,000 --> 00:00:01,000\nhi\n".encode("utf-16-le"), ":1: a NUL character"),
        (b"1\n00:00:00,000 --> 00:00:01,000\n\nh\0i\n", ":4: a NUL character"),
        (b"1\n00:00:00,5 --> 00:00:01,000\nhi\n", ":2: '00:00:00,5': write milliseconds"),
        (b"1\n-00:00:01,000 --> 00:00:01,000\nhi\n", ":2: '-00:00:01,000' is not a time"),
    ],
)
def test_subtitles_that_may_be_read_wrong_are_refused(tmp_path, content, why):
    (tmp_path / "a.srt").write_bytes(content)
    with pytest.raises(UserError, match=why) as error:
        transcripts.read_transcript(tmp_path / "a.srt")
    assert one_line(error)


def test_speakers_are_kept_or_dropped(tmp_path):
    path = tmp_path / "one.cha"
    path.write_text(FORMS["cha"], encoding="utf-8")
    assert [one.words for one in transcripts.read_transcript(path, ("CHI",))[0]] == ["ba ."]
    assert len(transcripts.read_transcript(path, ("CHI", "MOT"))[0]) == 3
    assert (
        transcripts.read_transcript(path, ("-MOT",))[0] == []
    )  # nor is the key child let in by it


def test_a_killed_run_reads_no_film_twice(folder, monkeypatch):
    make_film(folder / "ffmpeg" / "two.mkv")
    (folder / "ffmpeg" / "two.srt").write_text(srt(SAID))
    command.main(["video", "--videos=ffmpeg", *FLAGS, "--name=whole"])
    read, real = [], ffmpeg.read_frames

    def counted(path, fps):
        read.append(path.name)
        if len(read) == 2:
            raise KeyboardInterrupt
        return real(path, fps)

    import sources.video

    monkeypatch.setattr(ffmpeg, "read_frames", counted)
    monkeypatch.setattr(sources.video, "on_all_cores", lambda work, jobs, together: map(work, jobs))
    with pytest.raises(KeyboardInterrupt):
        command.main(["video", "--videos=ffmpeg", *FLAGS])
    command.main(["video", "--videos=ffmpeg", *FLAGS])
    assert read == ["one.mkv", "two.mkv", "two.mkv"]
    assert Data("data/video").meta["corpus"] == Data("data/whole").meta["corpus"]
    assert not (folder / "data" / "video" / "reading").exists()


def corrupt(folder, name):
    path = folder / "ffmpeg" / "one.srt"
    if name == "backwards":
        path.write_text(srt([SAID[1], SAID[0]]))
    elif name == "ends before it starts":
        path.write_text(srt([(2, 1, "a")]))
    elif name == "past the film":
        path.write_text(srt([*SAID, (50, 51, "late")]))
    elif name == "a little past, then far":
        path.write_text(srt([*SAID, (21, 22.4, "nearly in"), (50, 51, "late")]))
    elif name == "empty film":
        (folder / "ffmpeg" / "one.mkv").write_bytes(b"")
    elif name == "no film":
        (folder / "ffmpeg" / "one.mkv").write_bytes(b"words, not pictures" * 100)
    elif name == "sound alone":
        sound = ["-f", "lavfi", "-i", "sine=duration=2", str(folder / "ffmpeg" / "one.mkv")]
        subprocess.run([ffmpeg.find_ffmpeg(), "-v", "error", "-y", *sound], check=True)
    elif name == "mixed encodings":
        path.write_bytes(
            srt(SAID).encode() + "\n9\n00:00:21,000 --> 00:00:22,000\né".encode("latin1")
        )
    elif name == "no transcript":
        path.unlink()
    elif name == "no time":
        path.write_text(srt(SAID).replace("00:00:05,000 -->", "five -->"))
    elif name == "far":
        end = "--> 99999999999999999999:00:02,000"
        path.write_text(re.sub(r"--> \S+", end, srt(SAID), count=1))
    elif name == "far in a table":
        path.unlink()
        (folder / "ffmpeg" / "one.csv").write_text("start,end,text\n1,100000000,a ball\n")
    elif name == "far in a chat":
        path.unlink()
        (folder / "ffmpeg" / "one.cha").write_text("*MOT:\thi . \x150_9000000000000\x15\n")
    elif name == "a pipe":
        os.mkfifo(folder / "ffmpeg" / "two.mp4")


@pytest.mark.parametrize(
    "name, why",
    [
        ("backwards", "one.srt:6: time runs backwards"),
        ("ends before it starts", "one.srt:2: it ends"),
        ("past the film", "one.srt:82: said until 51 s"),
        ("a little past, then far", "one.srt:86: said until 51 s"),
        ("empty film", "one.mkv: not a film that ffmpeg can decode (it is empty)"),
        ("no film", "one.mkv: not a film that ffmpeg can decode"),
        ("sound alone", "one.mkv: not a film that ffmpeg can decode (it has only sound or text)"),
        ("mixed encodings", "one.srt:83: not in UTF-8"),
        ("no transcript", "one.mkv: no one{.srt"),
        ("no time", "one.srt:22: 'five' is not a time"),
        ("far", "one.srt:2: 99999999999999999999:00:02,000 is past 100 hours"),
        ("far in a table", "one.csv:2: 100000000 is past 100 hours"),
        ("far in a chat", "one.cha:1: 9000000000000 ms is past 100 hours"),
        ("a pipe", "two.mp4: not a file, but a folder, a pipe"),
    ],
)
def test_corrupted_ffmpeg_and_transcripts(folder, name, why):
    corrupt(folder, name)
    with pytest.raises(UserError) as error:
        command.main(["video", "--videos=ffmpeg", *FLAGS])
    assert one_line(error) and why in str(error.value)
    assert not (folder / "data" / "video" / "meta.json").exists()


def test_a_language_in_the_name_and_hidden_files(folder):
    """one.en.srt is the transcript of one.mkv; what systems leave in folders is no film."""
    path = folder / "ffmpeg" / "one.srt"
    path.rename(folder / "ffmpeg" / "one.en-US.srt")
    for name in ("._one.mkv", ".DS_Store", "Thumbs.db", "desktop.ini", "._one.en-US.srt"):
        (folder / "ffmpeg" / name).write_bytes(b"\0\5\x16\7")
    command.main(["video", "--videos=ffmpeg", *FLAGS])
    assert Data("data/video").count("train", "samples")
    (folder / "ffmpeg" / "one.de.srt").write_text(srt(SAID))
    with pytest.raises(UserError, match="a second transcript beside"):
        command.main(["video", "--videos=ffmpeg", *FLAGS])


def chat_of(tiers, participants="MOT Mother"):
    """A .cha of tiers [(speaker, start in seconds)], each a second long."""
    lines = [
        f"*{speaker}:\tlook at number {i} . \x15{1000 * start}_{1000 * start + 1000}\x15"
        for i, (speaker, start) in enumerate(tiers)
    ]
    return "\n".join(["@Begin", f"@Participants:\t{participants}", *lines, "@End"]) + "\n"


def test_a_speaker_whom_no_file_has_is_an_error(folder):
    (folder / "ffmpeg" / "one.srt").unlink()
    (folder / "ffmpeg" / "one.cha").write_text(chat_of([("MOT", i) for i in range(15)]))
    with pytest.raises(UserError, match="--speakers DAD: not in ffmpeg, where MOT speak"):
        command.main(["video", "--videos=ffmpeg", "--speakers=DAD", *FLAGS])


def test_a_speaker_whom_only_other_files_have_is_warned_of(folder, capsys):
    make_film(folder / "ffmpeg" / "two.mkv")
    (folder / "ffmpeg" / "one.srt").unlink()
    tiers = [("MOT", i) for i in range(15)]
    (folder / "ffmpeg" / "one.cha").write_text(chat_of(tiers))
    (folder / "ffmpeg" / "two.cha").write_text(chat_of([("FAT", i) for i in range(15)], "FAT"))
    command.main(["video", "--videos=ffmpeg", "--speakers", "FAT", *FLAGS])
    shown = capsys.readouterr().out
    assert "one.cha: none of FAT speaks in it, only MOT" in shown
    assert "0 utterances over 0 frames; left out: 15 of MOT" in shown


def test_a_stranger_among_the_participants_is_warned_of_once(tmp_path, capsys):
    (tmp_path / "one.cha").write_text(chat_of([("DAD", 0), ("DAD", 1)]))
    said, speakers, _ = transcripts.read_transcript(tmp_path / "one.cha")
    assert len(said) == 2 and speakers == {"DAD"}
    assert capsys.readouterr().out.count("DAD is not among @Participants") == 1


def test_a_transcript_without_speakers_is_kept_whole_and_says_so(folder, capsys):
    command.main(["video", "--videos=ffmpeg", "--speakers=MOT", *FLAGS])
    assert "one.srt: it names no speakers, so all of its utterances" in capsys.readouterr().out
    assert Data("data/video").count("train", "samples")


def test_sort_puts_a_transcript_in_order(folder, capsys):
    path = folder / "ffmpeg" / "one.srt"
    command.main(["video", "--videos=ffmpeg", "--name=right", *FLAGS])
    path.write_text(srt([*SAID[5:], *SAID[:5]]))
    with pytest.raises(UserError, match="--sort puts utterances in order"):
        command.main(["video", "--videos=ffmpeg", *FLAGS])
    command.main(["video", "--videos=ffmpeg", "--sort", *FLAGS])
    assert Data("data/video").meta["corpus"] == Data("data/right").meta["corpus"]


def test_each_film_has_a_line_and_tests_are_made(folder, capsys):
    command.main(["video", "--videos=ffmpeg", *FLAGS])
    shown = capsys.readouterr().out
    assert "one.mkv: 0.3 minutes to its last utterance, 20 utterances over" in shown
    assert "held out: every tenth of 20 items (films: 1" in shown and "no tests" in shown
    (folder / "ffmpeg" / "one.srt").write_text(srt([(i, i + 1, f"say {i}") for i in range(21)]))
    more = [folder / "ffmpeg" / f"film{i}" for i in range(4)]
    for path in more:
        make_film(path.with_suffix(".mkv"))
        path.with_suffix(".srt").write_text(srt(SAID))
    command.main(["video", "--videos=ffmpeg", "--val_films", "film1", *FLAGS])
    shown = capsys.readouterr().out
    assert "held out: 1 of 5 films, film1" in shown and "held-out utterances are tests" in shown
    held = {words for words, _ in samples_of(Data("data/video"), "val")}
    assert not any("say" in words for words in held)


def test_without_ffmpeg_one_line_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setattr(ffmpeg.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        ffmpeg.find_ffmpeg()


def test_pictures_come_one_at_a_time(folder):
    """No film is ever held whole: the first frame is there before the last is decoded."""
    frames = ffmpeg.read_frames(folder / "ffmpeg" / "one.mkv", 10)
    first = next(frames)
    assert first.shape == (36, 64, 3)
    frames.close()  # and the program that decodes is ended


def test_meta_tells_the_template(folder):
    command.main(["video", "--videos=ffmpeg", *FLAGS, "--template=baby_v1"])
    meta = json.load(open("data/video/meta.json"))
    assert meta["template"] == {"name": "baby_v1", "system": ""}
