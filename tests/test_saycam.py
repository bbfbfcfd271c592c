"""SAYCam's files as they are published: the zip, three forms of JSON, and what goes wrong."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import fake_saycam
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, one_line
from PIL import Image

import checkpoint
import data
import eval as evaluation
import sources
import train
import vision
from common import images
from common.images import ImageFormat
from config import UserError
from pretrained.convnets import ResNeXt
from sources import command, saycam

# a tower from a file has sizes of its own: these flags would contradict it
TOWER_FLAGS = ("--patch", "--vision_width", "--vision_depth", "--vision_heads")
SIZE = ["--size=32", "--vocab_size=300"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return fake_saycam.write(".")


def prepare(
    *args, frames="frames.txt", name="s", annotations=("train.json", "val.json", "test.json")
):
    command.main(
        ["saycam", "--name", name, "--frames", frames, "--annotations", *annotations, *SIZE, *args]
    )
    return data.Data(f"data/{name}")


def bins(name):
    return {path.name: path.read_bytes() for path in Path("data", name).glob("*.bin")}


def rows(dataset, split):
    """[(frame, clip, caption)] of a split's samples, read back."""
    tokens, shown = dataset.open(split, "tokens"), dataset.open(split, "image_ids")
    frames, clips = dataset.open(split, "frames"), dataset.open(split, "clips")
    first_frame = dataset.open(split, "images")[:, 0]
    found = []
    for first, length, image, _ in dataset.open(split, "samples").tolist():
        frame = first_frame[shown[image]]
        caption = dataset.tokenizer.decode(tokens[first : first + length])
        found.append((frames[frame], int(clips[frame]), caption))
    return found


def read(content, size=32):
    with Image.open(io.BytesIO(content)) as image:
        return np.array(images.to_square(image.convert("RGB"), ImageFormat(size)))


def test_each_frame_is_paired_with_what_was_said(fake):
    dataset = prepare()
    for split in ("train", "val", "test"):
        entries = json.load(open(f"{split}.json"))["data"]
        expected = [
            (name, i, entry["utterance"])
            for i, entry in enumerate(entries)
            for name in entry["frame_filenames"]
        ]
        found = rows(dataset, split)
        assert len(found) == len(expected)
        for (frame, clip, said), (name, i, utterance) in zip(found, expected):
            assert (clip, said) == (i, utterance)
            assert np.array_equal(frame, read(fake[name]))
        text = dataset.tokenizer.decode(dataset.open(split, "text"))
        assert text.count("ball") == sum("ball" in entry["utterance"] for entry in entries)
    assert dataset.meta["source"] == "saycam" and not os.path.exists("data/s/skipped.txt")
    assert not [*Path("data/s").glob("*.partial"), *Path("data/s").glob("*.log")]


def test_a_folder_and_a_packed_zip_give_the_same_bytes(fake, tmp_path):
    prepare(name="a")
    with zipfile.ZipFile("frames.txt") as archive:
        archive.extractall("unpacked")
    prepare(frames="unpacked", name="b")
    fake_saycam.write("packed", method=zipfile.ZIP_DEFLATED)
    prepare(frames="packed/frames.txt", name="c")
    assert bins("a") == bins("b") == bins("c") and len(bins("a")) == 24


def test_babyllavas_json_transcripts_and_similarity(fake):
    content = json.load(open("SAYCam_train_data.json"))
    dataset = prepare(
        "--min_similarity=0.2",
        annotations=["SAYCam_train_data.json", "Azure_transcribed_corpus_train.json"],
    )
    alike = [
        [0.1 + 0.2 * (f % 2) for f in range(len(item["image"]))]
        if isinstance(item["image"], list)
        else [0.3]
        for item in content
    ]
    kept = sum(a > 0.2 for item in alike for a in item)
    assert dataset.count("train", "frames") + dataset.count("val", "frames") == kept
    assert "hello baby" in dataset.tokenizer.decode(dataset.open("train", "text"))
    assert dataset.count("val", "frames") > 0  # every tenth stretch, as there is no val.json
    with pytest.raises(UserError, match="has no similarity"):
        prepare("--min_similarity=0.2")


def test_some_frames_of_each_utterance_evenly_spread(fake):
    dataset = prepare("--frames_per_utterance=3")
    entries = json.load(open("train.json"))["data"]
    assert dataset.count("train", "frames") == sum(min(3, e["num_frames"]) for e in entries)
    long = next(i for i, e in enumerate(entries) if e["num_frames"] > 8)
    names = entries[long]["frame_filenames"]
    frames = [frame for frame, clip, _ in rows(dataset, "train") if clip == long]
    for frame, name in zip(frames, (names[0], names[round((len(names) - 1) / 2)], names[-1])):
        assert np.array_equal(frame, read(fake[name]))


def test_the_papers_vocabulary_keeps_its_ids(fake):
    words = ["<pad>", "<unk>", "<sos>", "<eos>", "that", "'s", "a", "ball", "."]
    json.dump({word: i for i, word in enumerate(words)}, open("vocab.json", "w"))
    dataset = prepare("--vocab=vocab.json")
    first = dataset.open("train", "tokens")[:7].tolist()
    assert (
        first == [dataset.tokenizer.image, 4, 5, 6, 7, 8, dataset.tokenizer.eos]
        and dataset.meta["tokenizer"] == "word"
    )


def damage(fake, missing, broken):
    names = (
        json.load(open("train.json"))["data"][3]["frame_filenames"]
        + json.load(open("train.json"))["data"][4]["frame_filenames"]
    )
    with zipfile.ZipFile("frames.txt", "w") as archive:
        for name, content in fake.items():
            if name not in names[:missing]:
                cut = name in names[missing : missing + broken]
                archive.writestr(name, content[:300] if cut else content)
    return names[: missing + broken]


def test_missing_and_damaged_frames_are_listed_never_silent(fake, capsys):
    lost = damage(fake, 2, 2)
    with pytest.raises(UserError, match="over max_skipped 0.01") as error:
        prepare()
    assert one_line(error)
    dataset = prepare("--max_skipped=0.2")  # goes on, and counts those it knew of
    listed = open("data/s/skipped.txt").read().splitlines()
    assert len(listed) == 4 and all(name in line for name, line in zip(lost, listed))
    assert "4 images could not be read" in capsys.readouterr().out
    assert sum(dataset.count(s, "frames") for s in ("train", "val", "test")) == len(fake) - 4
    for frame, clip, said in rows(dataset, "train"):
        assert said == fake_saycam.SAID[clip % 4]


def test_killed_and_run_again_it_goes_on_to_the_same_bytes(fake, monkeypatch):
    fake = fake_saycam.write(".", (100, 6, 2), size=300)
    damage(fake, 3, 1)
    typed = [
        sys.executable,
        str(ROOT / "data.py"),
        "saycam",
        "--frames=frames.txt",
        *SIZE,
        "--max_skipped=0.2",
        "--annotations",
        "train.json",
        "val.json",
        "test.json",
    ]
    partial = Path("data/killed/train_frames.partial")
    run = subprocess.Popen([*typed, "--name=killed"], stderr=subprocess.DEVNULL)
    while run.poll() is None and not (partial.exists() and partial.stat().st_size > 200 * 3072):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(1)  # for its workers to notice
    assert partial.exists() and not os.path.exists("data/killed/meta.json")
    with open(partial, "ab") as file:
        file.write(b"half a row")
    kept = partial.stat().st_size // 3072
    jobs = []

    def counting(locations, image_format):
        jobs.extend(locations)
        return images.read_all(locations, image_format)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_all", counting)
        command.main([*typed[2:], "--name=killed"])
    assert len(jobs) <= len(fake) - kept + 4
    command.main([*typed[2:], "--name=whole"])
    assert bins("killed") == bins("whole")
    assert open("data/killed/skipped.txt").read() == open("data/whole/skipped.txt").read()


def test_another_size_starts_anew(fake):
    damage(fake, 9, 0)
    with pytest.raises(UserError):
        prepare()
    dataset = prepare("--size=16", "--max_skipped=0.5")
    assert dataset.open("train", "frames").shape[1:] == (16, 16, 3)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "train.json: not JSON"),
        ("{}", "item 0 is no utterance"),
        ("[1]", "item 0 is no utterance"),
        ('[{"image": "a.jpg", "conversations": []}]', "item 0: a conversation without turns"),
        ('[{"utterance": "a", "frame_filenames": ["x", "y"], "similarity": [1]}]', "not as many"),
        ('[{"utterance": "a", "frame_filenames": []}]', "item 0: it has no pictures"),
        ('["hello", "baby"]', "one for training must have frames"),
    ],
)
def test_a_bad_json_is_one_clear_line(fake, content, message):
    open("train.json", "w").write(content)
    with pytest.raises(UserError, match=message) as error:
        prepare()
    assert one_line(error)


def test_what_is_not_there_is_one_clear_line(fake):
    with pytest.raises(UserError, match="neither a folder nor a whole zip"):
        prepare(frames="train.json")
    with pytest.raises(UserError, match="neither a folder nor a whole zip"):
        prepare(frames="none.zip")
    with pytest.raises(UserError, match="give --annotations FILE.json"):
        command.main(["saycam", "--frames", "frames.txt"])
    with pytest.raises(UserError, match="run `python data.py saycam"):
        train.main(["--phase=1"])


def test_from_the_zip_to_words_with_a_published_kind_of_eye(fake):
    """A ResNeXt checkpoint, the three phases and the published tests' commands, end to end."""
    prepare("--size=64", "--frames_per_utterance=2")
    torch.manual_seed(0)
    eye = ResNeXt((1, 1, 1, 1))
    state = {f"module.backbone.{key}": value for key, value in eye.state_dict().items()}
    torch.save({"teacher": state}, "eye.pth")
    for phase in (1, 0, 1, 2):
        command = [
            str(ROOT / f"configs/phase{phase}.py"),
            "--data=data/s",
            "--out=out/s",
            *[flag for flag in SMALL if not flag.startswith(TOWER_FLAGS)],
            "--block_size=64",
        ]
        if phase == 1 and not os.path.exists("out/s/language.pt"):
            with pytest.raises(UserError, match="vision.pt does not exist: finish it first with"):
                train.main(command)
            continue
        train.main([*command, "--vision_weights=eye.pth"] if phase == 0 else command)
    loaded = checkpoint.load("out/s/phase2.pt")
    assert vision.describe_tower(loaded.model.tower) == vision.describe_tower(eye)
    assert loaded.model.tower.width == 2048 and loaded.checkpoint["source"] == "saycam"
    names = [*fake][:4]
    open("v.csv", "w").write(
        "image,positive_phrase,negative_phrase\n"
        + "".join(f"{name},see ball,see cat\n" for name in names)
    )
    evaluation.main(
        ["--checkpoint=out/s/phase2.pt", "--task=vtwt", "--csv=v.csv", "--images", "frames.txt"]
    )
    result = json.load(open("out/s/results_vtwt.json"))
    assert result["tasks"]["vtwt"]["all"]["accuracy"]["n"] == 4 and result["trained_on"] == "saycam"


# ---- which file is for what


@pytest.mark.parametrize(
    "name, split",
    [
        ("train.json", "train"),
        ("latest_pairs.json", "train"),
        ("interval_train.json", "train"),
        ("SAYCam_train_data.json", "train"),
        ("Azure_transcribed_corpus_val.json", "val"),
        ("my-dev-set.json", "val"),
        ("validation.json", "val"),
        ("test.json", "test"),
        ("device.json", "train"),
    ],
)
def test_a_split_is_a_whole_word_of_a_files_name(name, split):
    """latest_pairs.json was once taken for a test, interval_train.json for validation."""
    assert saycam.split_of(name) == split


def test_a_name_that_says_two_things_is_asked_about(fake, capsys):
    os.rename("val.json", "train_val.json")
    with pytest.raises(UserError, match="says train and val: use --train") as error:
        prepare(annotations=["train.json", "train_val.json"])
    assert one_line(error)
    flags = ["saycam", "--name=s", "--frames=frames.txt", *SIZE]
    command.main([*flags, "--train=train.json", "--val", "train_val.json"])
    shown = capsys.readouterr().out
    assert "train train.json" in shown and "val   train_val.json" in shown
    assert "test" not in data.Data("data/s").meta["splits"]


def test_frames_of_equal_names_in_two_folders_are_told_apart(fake):
    """By base name alone, half of them were once taken from the wrong folder, and exit code 0."""
    for i, child in enumerate(("A", "S")):
        os.makedirs(f"frames/{child}")
        for k in range(30):
            shade = Image.new("RGB", (32, 32), (120 * i + k,) * 3)
            shade.save(f"frames/{child}/{k}.png")
    for split, numbers in (("train", range(25)), ("val", range(25, 30))):
        entries = [
            {"utterance": f"number {120 * i + k}", "frame_filenames": [f"{child}/{k}.png"]}
            for i, child in enumerate(("A", "S"))
            for k in numbers
        ]
        json.dump({"data": entries}, open(f"{split}.json", "w"))
    dataset = prepare(frames="frames", annotations=["train.json", "val.json"])
    found = rows(dataset, "train") + rows(dataset, "val")
    assert len(found) == 60
    assert all(said == f"number {frame[0, 0, 0]}" for frame, _, said in found)
    entries = [{"utterance": "x", "frame_filenames": ["7.png"]}] * 3
    json.dump({"data": entries}, open("train.json", "w"))
    with pytest.raises(UserError, match="2 pictures could be meant"):
        prepare(frames="frames", annotations=["train.json", "val.json"])


def test_what_is_said_in_validation_is_kept_out_of_the_transcripts(fake, capsys):
    json.dump([fake_saycam.SAID[0], "hello baby ."] * 30, open("Azure_train.json", "w"))
    dataset = prepare(annotations=["train.json", "val.json", "Azure_train.json"])
    assert fake_saycam.SAID[0] not in dataset.tokenizer.decode(dataset.open("train", "text"))
    assert "hello baby ." in dataset.tokenizer.decode(dataset.open("train", "text"))
    assert "30 lines are validation captions" in capsys.readouterr().out


def v2_items(frames):
    """BabyLLaVA-V2's three forms: a picture, a clip, moments in turn."""
    said = lambda human, gpt: [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    items = []
    for i in range(0, len(frames) - 8, 4):
        items.append(
            {"id": f"i{i}", "image": [frames[i]], "conversations": said("<image>", "hi .")}
        )
        clip = said("<image>" * 4, f"a clip {i} .")
        items.append({"id": f"v{i}", "image": frames[i : i + 4], "conversations": clip})
        turns = said("<image>", "look !") + said("<image>", f"a ball {i} .")
        items.append({"id": f"m{i}", "image": frames[i + 4 : i + 6], "conversations": turns})
    return items


def test_v2s_three_forms(fake):
    """All in one split; a picture that is shown twice is kept once; phase 1 reads single ones."""
    with zipfile.ZipFile("frames.txt") as archive:
        frames = [name for name in archive.namelist() if name.endswith(".jpg")][:48]
    Path("v2_train.json").write_text(json.dumps(v2_items(frames)))
    dataset = prepare(annotations=("v2_train.json",))
    kinds = []
    for split in ("train", "val"):
        shown = dataset.open(split, "samples")[:, 3].tolist()
        kinds += shown
        assert dataset.count(split, "frames") <= sum(shown)
    assert dataset.count("train", "frames") < sum(dataset.open("train", "samples")[:, 3].tolist())
    assert sorted(set(kinds)) == [1, 2, 4] and kinds.count(4) == kinds.count(2) == kinds.count(1)
    from batches import PairBatches, SampleBatches
    from model import GPT, BabyLLaVA, GPTConfig, make_projector

    tower = vision.ViT(32, 16, 16, 1, 2)
    gpt = GPT(GPTConfig(dataset.tokenizer.vocab_size, 128, 1, 2, 16))
    projector = make_projector("identity", tower.width, tower.width)
    model = BabyLLaVA(gpt, projector, tower, dataset.tokenizer.image)
    model.tiled = False
    every = SampleBatches(dataset, "train", 4, 0, model)
    single = PairBatches(dataset, "train", 4, 0, model)
    assert every.rows == dataset.count("train", "samples")
    assert single.rows == (dataset.open("train", "samples")[:, 3] == 1).sum() < every.rows
    words = [dataset.tokenizer.decode(dataset.open("train", "text"))]
    assert "look !" in words[0] and "a ball" in words[0] and "a clip" in words[0]


@pytest.mark.parametrize(
    "image, human, gpt, why",
    [
        (["F"], "what ?", "hi .", "item 3: 0 <image> for 1 pictures; --fix"),
        ("F", "what ?", "hi .", "item 3: 0 <image> for 1 pictures; --fix"),
        (["F"], "<image><image>", "hi .", "item 3: 2 <image> for 1 pictures"),
        (["F"], "<image>", "a <image> .", "item 3: an <image> in an answer"),
        (["F", "F"], "<image>", "a <image> .", "item 3: an <image> in an answer"),
        ([], "<image>", "hi .", "item 3: 1 <image> for 0 pictures"),
    ],
)
def test_pictures_that_are_not_shown_are_never_silent(fake, image, human, gpt, why):
    """BabyLLaVA-V2's trap with one picture, too: the original trains without it."""
    with zipfile.ZipFile("frames.txt") as archive:
        frames = [name for name in archive.namelist() if name.endswith(".jpg")][:48]
    items = v2_items(frames)
    names = frames[0] if image == "F" else [frames[0]] * len(image)
    said = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    items[3] = {"image": names, "conversations": said}
    Path("v2_train.json").write_text(json.dumps(items))
    with pytest.raises(UserError) as error:
        prepare(annotations=("v2_train.json",))
    assert one_line(error) and f"v2_train.json: {why}" in str(error.value)


def test_forgotten_images_of_moments_are_mended_in_turn():
    turns = [{"from": who, "value": "a"} for who in ("human", "gpt") * 2]
    item = {"image": ["0", "1"], "conversations": turns}
    names, said, _ = sources.read_dialogue(item, fix=True)
    assert names == ["0", "1"] and said == [("<image>a", "a")] * 2
    item = {"image": ["0"] * 3, "conversations": turns}
    names, said, _ = sources.read_dialogue(item, fix=True)
    assert said == [("<image><image><image>a", "a"), ("a", "a")]


def test_a_clip_without_its_images_is_an_error_or_mended(fake):
    with zipfile.ZipFile("frames.txt") as archive:
        frames = [name for name in archive.namelist() if name.endswith(".jpg")][:48]
    items = v2_items(frames)
    items[4]["conversations"][0]["value"] = ""
    Path("v2_train.json").write_text(json.dumps(items))
    with pytest.raises(UserError, match="v2_train.json: item 4: 0 <image> for 4 pictures; --fix"):
        prepare(annotations=("v2_train.json",))
    dataset = prepare("--fix", annotations=("v2_train.json",))
    counts = [dataset.open(split, "samples")[:, 3].tolist() for split in ("train", "val")]
    assert sum(counts, []).count(4) == len(items) // 3


def test_a_preparation_gone_on_with_has_the_same_id(tmp_path, monkeypatch):
    """The order in which bins were opened once went into the corpus's id: checkpoints of the one
    refused the other."""
    monkeypatch.chdir(tmp_path)
    fake_saycam.write("s", utterances=(12, 4, 4), size=32)
    flags = "--frames s/frames.txt --annotations s/train.json s/val.json --size 16".split()
    whole = sources.prepare("saycam", ["--name=whole", *flags, "--vocab_size=300"])[1]

    def full(self, values, put=data.Bin.put):
        if self.path.name == "train_frames.partial" and self.rows == 20:
            raise OSError(28, "No space left on device", str(self.path))
        put(self, values)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="train_frames"):
        patch.setattr(data.Bin, "put", full)
        sources.prepare("saycam", ["--name=again", *flags, "--vocab_size=300"])
    again = sources.prepare("saycam", ["--name=again", *flags, "--vocab_size=300"])[1]
    assert again == whole
