"""
Tests made from recordings of your own: of what is held out for validation.

    which_picture     which of four pictures was this said over?
    which_utterance   which of these four utterances was said over this picture?
    caption           pictures with what was said over them, for a sheet of captions

They are written to data/<name>/eval/ in the forms of tasks/recordings.py, with the pictures as PNGs
of the frames that the model is validated on. An utterance is asked about once, with the middle one
of its frames; the other three are from anywhere in what is held out, with other words.
"""

import csv
import io

import numpy as np
from PIL import Image

from common.files import writing
from sources import unfinished_bin

MOST = 300  # items of each test
OPTIONS = 4


def find_utterances(part):
    """[(words, number of the middle frame)] of the utterances of a split with one picture each, in
    order. part: a data.SplitWriter that is not finished yet."""
    if not {"samples", "frames"} <= set(part.bins):
        return []
    samples, tokens = np.array(unfinished_bin(part, "samples")), unfinished_bin(part, "tokens")
    loss_mask, image_ids = unfinished_bin(part, "loss_mask"), unfinished_bin(part, "image_ids")
    images, clips = unfinished_bin(part, "images"), unfinished_bin(part, "clips")
    frames_of = {}  # {(clip, words): its frames}
    for first, length, begin, count in samples.astype(np.int64).tolist():
        if count != 1:
            continue
        own = slice(first, first + length)
        words = part.writer.tokenizer.decode(tokens[own][loss_mask[own] == 1]).strip()
        frame = int(images[image_ids[begin]][0])
        if words:
            frames_of.setdefault((int(clips[frame]), words), []).append(frame)
    return [(words, own[len(own) // 2]) for (_, words), own in frames_of.items()]


def choose_others(utterances, number, rng):
    """The numbers of three utterances with other words and other pictures than number `number` and
    than each other; [] if there are not so many."""
    chosen, words, frames = [], {utterances[number][0]}, {utterances[number][1]}
    for other in rng.permutation(len(utterances)).tolist():
        if utterances[other][0] not in words and utterances[other][1] not in frames:
            chosen.append(other)
            words.add(utterances[other][0])
            frames.add(utterances[other][1])
        if len(chosen) == OPTIONS - 1:
            return chosen
    return []


def make_items(utterances, seed=0):
    """[numbers of four utterances, the one that is asked about first], evenly spread."""
    rng = np.random.RandomState(seed)
    count = min(MOST, len(utterances))
    asked = np.linspace(0, len(utterances) - 1, count).round().astype(int).tolist()
    items = [[number, *choose_others(utterances, number, rng)] for number in asked]
    return [item for item in items if len(item) == OPTIONS]


def is_ours(path):
    """Whether a test's file may be replaced: a user's own, such as a published caption.csv, may
    not."""
    return not path.exists() or "held_out_" in path.read_text(encoding="utf-8", errors="replace")


def write_csv(path, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    with writing(path) as file:
        file.write(text.getvalue().encode("utf-8"))


def write_tests(writer):
    """Write the tests of a corpus that is not finished yet, and print how many items they have.
    writer: a data.Writer."""
    part = writer.splits.get("test") or writer.splits.get("val")
    utterances = find_utterances(part) if part else []
    items, folder = make_items(utterances), writer.directory / "eval"
    tests = [folder / f"{name}.csv" for name in ("which_picture", "which_utterance", "caption")]
    tests = [path for path in tests if is_ours(path)]
    for path in [*tests, *(folder / "images").glob("held_out_*.png")]:
        path.unlink(missing_ok=True)  # of an earlier preparation
    if not items:
        print(
            f"no tests were made: {len(utterances)} of the held-out utterances have a picture, and "
            "a test needs four with different words: prepare forty or more"
        )
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    frames = unfinished_bin(part, "frames")
    names = {}
    for number in sorted({number for item in items for number in item}):
        names[number] = f"held_out_{number}.png"
        picture = io.BytesIO()
        Image.fromarray(frames[utterances[number][1]]).save(picture, "PNG")
        with writing(folder / "images" / names[number]) as file:
            file.write(picture.getvalue())
    text_of = lambda number: utterances[number][0]
    numbered = lambda word: [f"{word}{i}" for i in range(1, OPTIONS + 1)]
    which_picture = [[text_of(item[0]), *(names[n] for n in item)] for item in items]
    which_utterance = [[names[item[0]], *(text_of(n) for n in item)] for item in items]
    captions = [[names[item[0]], text_of(item[0])] for item in items]
    contents = {
        "which_picture": [["text", *numbered("image")], *which_picture],
        "which_utterance": [["image", *numbered("text")], *which_utterance],
        "caption": [["image", "text"], *captions],
    }
    for path in tests:
        write_csv(path, contents[path.stem])
    print(f"{len(items)} held-out utterances are tests: {folder}/which_picture.csv and two others")
