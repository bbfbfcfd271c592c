"""BabyView: which segments and frames are kept, films and ready frames alike, manifests, and
corrupted files."""

import json

import numpy as np
import pytest
from conftest import one_line
from PIL import Image
from test_video import grey, make_film, samples_of

from config import UserError
from data import Data
from sources import babyview, command

SECONDS = 24
# (start, end, text, scores of its words); the key child speaks from 10.2 to 11 s
SEGMENTS = [(i + 0.1, i + 0.9, f"Look, number {'abcdefghijklmnopqrstuvwx'[i]}!", [0.9, 0.7, 0.6])
            for i in range(SECONDS - 1)]  # fmt: skip
SEGMENTS[3] = (3.1, 3.9, "Mumble three words", [0.2, 0.9, 0.3])  # mean .467
SEGMENTS[4] = (4.1, 4.9, "Mumble four words", [0.2, 0.8, 0.5])  # mean .5: kept
SEGMENTS[5] = (5.1, 5.3, "too short for a frame", [0.9])
SEGMENTS[6] = (6.1, 6.9, "...", [0.9])
SEGMENTS[7] = (7.1, 8.9, "Two frames long", [])  # without scores it is kept
VOICE = [
    "SPEAKER one 1 10.2 0.8 <NA> <NA> KCHI <NA> <NA>",
    "SPEAKER one 1 2.0 9.0 <NA> <NA> FEM <NA> <NA>",
    "; a comment",
    "",
]


def whisperx(segments):
    return {
        "segments": [
            {
                "start": start,
                "end": end,
                "text": f" {text}",
                "words": [{"word": "w", "start": 0, "end": 1, "score": score} for score in scores]
                + [{"word": "2"}],
            }  # fmt: skip
            for start, end, text, scores in segments
        ]
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """One film as ready frames, whose shade is their number, and its transcript."""
    monkeypatch.chdir(tmp_path)
    for name in ("frames/one", "transcripts", "rttm"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(SECONDS):
        shade = np.full((32, 32, 3), grey(number), np.uint8)
        Image.fromarray(shade).save(tmp_path / "frames" / "one" / f"one_{number + 1}.jpg")
    (tmp_path / "transcripts" / "one.json").write_text(json.dumps(whisperx(SEGMENTS)))
    (tmp_path / "rttm" / "one.rttm").write_text("\n".join(VOICE))
    return tmp_path


SIZES = ["--size=16", "--fit=squash", "--vocab_size=300"]
OF_FRAMES = ["--images=frames", "--transcripts=transcripts", "--rttm=rttm"]


def all_samples(dataset):
    found = [pair for split in ("train", "val") for pair in samples_of(dataset, split)]
    return sorted(
        (shades, words.replace("<eos>", "").replace("<image>", "")) for words, shades in found
    )


def expected():
    """By hand: frame n of 1, 2, ... is shown at n - 0.5 s."""
    pairs = []
    for i, (start, end, text, _) in enumerate(SEGMENTS):
        if i in (3, 5, 6, 10):
            continue
        for number in range(1, SECONDS + 1):
            if start <= number - 0.5 <= end:
                pairs.append(([grey(number - 1)], text))
    return sorted(pairs)


def test_ready_frames(folder, capsys):
    command.main(["babyview", *OF_FRAMES, *SIZES])
    found = all_samples(Data("data/babyview"))
    assert found == expected()
    printed = capsys.readouterr().out
    kept = SECONDS - 1 - 4
    assert (
        f"1 transcripts, {kept} utterances kept; 1 left out: the key child's voice; 1 left"
        in printed
    )
    assert "1 left out: no words; 1 left out: no frame" in printed


def test_without_rttm_the_child_is_kept_and_the_score_is_an_option(folder):
    command.main(["babyview", *OF_FRAMES[:2], *SIZES, "--min_score=0.4"])
    words = [text for _, text in all_samples(Data("data/babyview"))]
    assert SEGMENTS[10][2] in words and SEGMENTS[3][2] in words


def test_films_give_what_is_on_the_screen(folder):
    """A film's own frames are exact: number n shows n / fps seconds."""
    (folder / "films").mkdir()
    make_film(folder / "films" / "one.mkv", seconds=SECONDS)
    segments = [(i + 0.5, i + 1.2, text, scores) for i, (_, _, text, scores) in enumerate(SEGMENTS)]
    (folder / "transcripts" / "one.json").write_text(json.dumps(whisperx(segments)))
    command.main(
        ["babyview", "--videos=films", "--transcripts=transcripts", *SIZES, "--name=films"]
    )
    found = all_samples(Data("data/films"))
    kept = [i for i in range(SECONDS - 1) if i not in (3, 6)]
    assert [words for _, words in found] == [SEGMENTS[i][2] for i in kept]
    assert all(abs(shades[0] - grey(i + 1)) <= 1 for (shades, _), i in zip(found, kept))


def test_clips_and_moments(folder):
    command.main(["babyview", *OF_FRAMES, *SIZES, "--frames=2", "--window=3", "--name=all"])
    found = all_samples(Data("data/all"))
    clips = [(shades, words) for shades, words in found if len(shades) == 2]
    assert clips == [([grey(7), grey(8)], SEGMENTS[7][2])]
    assert any(len(shades) == 3 for shades, _ in found)
    assert [one for one in found if len(one[0]) == 1] == expected()


def test_moments_stay_in_one_film_and_have_no_gaps(folder):
    """Two films, of which stretches are held out."""
    for name in ("frames", "transcripts"):
        for path in sorted((folder / name).glob("one*")):
            (path.parent / path.name.replace("one", "two")).symlink_to(path)
    for path in sorted((folder / "frames" / "one").iterdir()):
        (path.parent / path.name.replace("one", "two")).symlink_to(path)
    segments = [(s, e, text.replace("Look", "See"), scores) for s, e, text, scores in SEGMENTS]
    (folder / "transcripts" / "two.json").unlink()
    (folder / "transcripts" / "two.json").write_text(json.dumps(whisperx(segments)))
    command.main(["babyview", *OF_FRAMES[:2], *SIZES, "--window=3"])
    moments = [(shades, words) for shades, words in all_samples(Data("data/babyview"))
               if len(shades) == 3]  # fmt: skip
    assert moments
    kept = [i for i in range(SECONDS - 1) if i not in (3, 5, 6)]
    for _, words in moments:
        assert not ("Look" in words and "See" in words)
        words = words.replace("See", "Look")
        numbers = [n for n, i in enumerate(kept) if SEGMENTS[i][2] in words]
        assert numbers == list(range(numbers[0], numbers[0] + 3))


def test_films_that_end_early_and_replay(folder, capsys):
    (folder / "films").mkdir()
    make_film(folder / "films" / "one.mkv", seconds=15)
    flags = ["babyview", "--videos=films", "--transcripts=transcripts", *SIZES]
    segments = [(i + 0.5, i + 1.2, text, scores) for i, (_, _, text, scores) in enumerate(SEGMENTS)]
    (folder / "transcripts" / "one.json").write_text(json.dumps(whisperx(segments)))
    command.main([*flags, "--replay=1"])
    assert "said after the film's end" in capsys.readouterr().out
    samples = Data("data/babyview").open("train", "samples")[:, 3].tolist()
    assert samples.count(0) == samples.count(1) > 0
    make_film(folder / "films" / "one.avi", seconds=3)
    with pytest.raises(UserError, match="a second film beside") as error:
        command.main([*flags, "--name=two"])
    assert one_line(error)


def test_manifests_and_llava_json_as_published(folder):
    entry = lambda i: {
        "utterance": f"Look, it's {i}!", "frame_filenames": [f"one/one_{i + 1}.jpg"],
        "num_frames": 1,
        "timestamps": [i + 0.5], "utterance_num": i, "video_filename": "one.mp4",
        "transcript_filename": "one.json"}  # fmt: skip
    (folder / "train.json").write_text(json.dumps([entry(i) for i in range(12)]))
    (folder / "val.json").write_text(json.dumps([entry(i) for i in range(12, 15)]))
    files = ["--annotations", "train.json", "val.json"]
    command.main(["babyview", "--images=frames", *files, *SIZES, "--name=manifests"])
    assert all_samples(Data("data/manifests")) == sorted(
        ([grey(i)], f"Look, it's {i}!") for i in range(15)
    )
    said = lambda text: [{"from": "human", "value": "<image>\nDescribe this image."},
                         {"from": "gpt", "value": text}]  # fmt: skip
    items = [
        {"image": f"one/one_{i + 1}.jpg", "conversations": said(f"It's {i}.")} for i in range(15)
    ]
    (folder / "pairs.json").write_text(json.dumps(items))
    command.main(
        ["babyview", "--images=frames", "--annotations=pairs.json", *SIZES, "--name=pairs"]
    )
    assert all_samples(Data("data/pairs")) == sorted(([grey(i)], f"It's {i}.") for i in range(15))


def test_frames_past_the_end_are_reported(folder, capsys):
    for number in range(20, SECONDS):
        (folder / "frames" / "one" / f"one_{number + 1}.jpg").unlink()
    command.main(["babyview", *OF_FRAMES, *SIZES])
    assert "3 utterances left out: their frames are not in frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda f: (f / "transcripts/one.json").write_text("[]"), "want WhisperX's"),
        (
            lambda f: (f / "transcripts/one.json").write_text('{"segments": [{"start": 1}]}'),
            "segment 0",
        ),
        (
            lambda f: (f / "transcripts/one.json").write_text(
                json.dumps(whisperx([(3, 2, "a", [])]))
            ),
            "3 to 2 s",
        ),
        (lambda f: (f / "rttm/one.rttm").write_text("SPEAKER one 1 x"), "one.rttm:1: want SPEAKER"),
        (lambda f: (f / "rttm/one.rttm").unlink(), "none for transcripts/one.json"),
        (lambda f: (f / "transcripts/one.json").unlink(), "no utterance in its .json"),
        (
            lambda f: (f / "frames").rename(f / "other") and (f / "frames").mkdir(),
            "no frame such as one/",
        ),
    ],
)
def test_corrupted_files_are_one_line(folder, change, why):
    change(folder)
    with pytest.raises(UserError, match=why) as error:
        command.main(["babyview", *OF_FRAMES, *SIZES])
    assert one_line(error)


@pytest.mark.parametrize(
    "flags, why",
    [
        ([], "give --transcripts DIR"),
        (["--transcripts=transcripts"], "either --videos DIR or --images"),
        (["--transcripts=transcripts", "--images=frames", "--videos=frames"], "either --videos"),
        (["--annotations=a.json"], "by one --images DIR"),
        (["--annotations=a.json", "--images=frames", "--rttm=rttm"], "--rttm is not for --annot"),
        (["--transcripts=transcripts", "--videos=frames", "--val=a"], "--val is not for --videos"),
        (["--transcripts=none", "--images=frames"], "--transcripts none: no such folder"),
        (["--transcripts=transcripts", "--videos=none"], "--videos none: no such folder"),
        (["--transcripts=transcripts", "--videos=frames"], "no film in frames has its name"),
    ],
)
def test_mistaken_commands_are_one_line(folder, flags, why):
    with pytest.raises(UserError, match=why) as error:
        command.main(["babyview", *flags, *SIZES])
    assert one_line(error)


def test_the_times_of_a_segment_are_those_of_the_published_rule():
    """By a loop over frames, for random times and rates."""
    rng = np.random.RandomState(0)
    for _ in range(500):
        start, fps = rng.uniform(0, 20), float(rng.choice([0.5, 1, 2, 5]))
        said = babyview.Said(start, start + rng.uniform(0, 4), "a", "", 0)
        settings = babyview.Config(images=("frames",), fps=fps)
        slow = [n - 1 for n in range(1, 200) if said.start <= (n - 0.5) / fps <= said.end]
        assert babyview.frames_within(said, settings) == slow
