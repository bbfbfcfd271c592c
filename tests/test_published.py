"""The Toolbox's files as they are published: forms of the releases for SAYCam, BabyView, Ego4D and
NIH (in keys and shapes; the pictures are our own), the leaderboard's scores, and pictures that are
found beside their own file."""

import json

import numpy as np
import pytest
from conftest import one_line
from PIL import Image

import data
import eval as evaluation
from config import UserError
from sources import command
from tasks import board, toolbox, toolbox_files
from tasks.toolbox_files import find_tests, known_name, read_items

EIGHT = (
    "'top', 'bottom', 'left', 'right', 'top right', 'top left', 'bottom right', or 'bottom left'"
)
OF_FOUR = "(A) the first image (B) the second image (C) the third image (D) the fourth image."
LETTERS = tuple("ABCD")
FORMS = [  # test, question, pictures, answer, options
    ("object_counting", "# How many trees do you see?", 1, "12", ()),
    ("object_counting", "# How many shadows do you see?", 1, "13", ()),
    ("subitizing", "# How many of TV do you see?", 1, "4", ()),
    (
        "localization",
        "# Point at the X. Is it in the (A) top left or (B) top right or (C) bottom left or (D) "
        "bottom right of the image?",
        1,
        "D",
        LETTERS,
    ),
    (
        "left_right",
        "# Which of the following is the same as this? Answer with a number. (A) # (B) # (C) #",
        4,
        "B",
        LETTERS[:3],
    ),
    (
        "spatial_details",
        "# Which of the following contains exactly this object? (A) # (B) # (C) #. Pay attention "
        "to details and give a letter A-C.",
        4,
        "C",
        LETTERS[:3],
    ),
    (
        "spatial_details",
        "# Which of the following contains exactly this object? (A) # (B) # (C) # (D) #. Pay "
        "attention to details and give a letter A-D.",
        5,
        "D",
        LETTERS,
    ),
    ("picture_vocabulary", f"####\n Touch the image of 'comb' {OF_FOUR}", 4, "A", LETTERS),
    ("picture_vocabulary", "Touch the image of 'bag' (A)# (B)# (C)# (D)#", 4, "D", LETTERS),
    (
        "picture_vocabulary",
        "# Touch the image of 'Comb' (A) top left image (B) top right image (C) bottom left image "
        "(D) bottom right image.",
        1,
        "C",
        LETTERS,
    ),
    ("more_natural", "Which image has more of toy cup? (A) # (B) #", 2, "B", LETTERS[:2]),
    ("more_synthetic", "Which image has more rugs? Answer (A) # (B) #", 2, "A", LETTERS[:2]),
    (
        "delayed_response",
        "###### does the bag leave the frame through the bottom side of the frame or the top side "
        "of the frame? respond ONLY with 'bottom' or 'top'.",
        6,
        "top",
        ("bottom", "top"),
    ),
    (
        "delayed_response",
        "##### do the toys collectively leave the frame through the top left corner of the frame "
        "or the bottom right corner of the frame? respond ONLY with 'top left' or 'bottom right'.",
        5,
        "top left",
        ("top left", "bottom right"),
    ),
    (
        "delayed_response",
        "#" * 50 + "\nWhere does it hide? (A) left (B) right",
        50,
        "B",
        ("A", "B"),
    ),
    (
        "delayed_response_open",
        f"##### which part of the frame does the X leave from? respond ONLY with one of: {EIGHT}.",
        5,
        "bottom left",
        ("top", "bottom", "left", "right", "top right", "top left", "bottom right", "bottom left"),
    ),
]


def item(question, names, answer, **more):
    said = [
        {"from": "human", "value": question.replace("#", "<image>")},
        {"from": "gpt", "value": answer},
    ]
    return {"id": "x_1", "image": names, "conversations": said} | more


@pytest.mark.parametrize("test, question, pictures, answer, options", FORMS)
def test_every_published_form_is_read(tmp_path, test, question, pictures, answer, options):
    names = [f"images/x_0000_{i}.jpg" for i in range(pictures)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([item(question, names, answer, gif="images/x.gif", labels=None)]))
    [row] = read_items(test, path)
    [asked] = row["rounds"]
    assert asked.options == options and asked.answer == answer and row["image"] == names
    for rule in ("strict", "published"):
        assert toolbox_files.parse(answer, options, rule) == answer


def memory_item(rng, things, folder, number, labelled):
    """A Memory dialogue in the published form: a picture shown again is another file with the same
    bytes, and its label says so."""
    names, labels, said = [], [], []

    def show(thing):
        names.append(f"images/memory_{number:04d}_{len(names)}.png")
        draw(folder / names[-1], f"{number} {thing}")

    rounds = [(None, 0), *((i, i + 1) for i in range(things - 1))]
    rounds += [(old, things + k) for k, old in enumerate(rng.permutation([*range(things)] * 2))]
    for old, new in rounds:
        pair = [new] if old is None else [new, old] if rng.randint(2) else [old, new]
        labels.append([f"thing {thing}" for thing in pair])
        for thing in pair:
            show(thing)
        options = " ".join(f"({letter}) <image>" for letter, _ in zip("AB", pair))
        before = "Let's try more. " if said else ""
        said += [
            {"from": "human", "value": f"{before}Touch the new image. {options}"},
            {"from": "gpt", "value": "AB"[pair.index(new)]},
        ]
    one = {"id": f"memory_{number}", "image": names, "conversations": said}
    return one | ({"labels": labels} if labelled else {})


def draw(path, seed):
    """A picture that depends on the seed, a text, alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(list(seed.encode()))
    Image.fromarray(rng.randint(0, 256, (24, 24, 3), np.uint8)).save(path)


TASKS = {  # the folder of each test in the release for SAYCam, its items as made by FORMS
    "count": "object_counting",
    "localize": "localization",
    "leftright": "left_right",
    "spatialdetails": "spatial_details",
    "picture_vocabulary": "picture_vocabulary",
    "compare_real": "more_natural",
    "compare_synthetic": "more_synthetic",
    "vdr-binary": "delayed_response",
    "vdr-open": "delayed_response_open",
}


def release(folder, copies=3):
    """A release in the layout TASK/data.json. Both tests of delayed response have the same names
    for other pictures, as published."""
    for name, test in TASKS.items():
        items = []
        for _ in range(copies):
            for own, question, pictures, answer, _ in FORMS:
                if own == test:
                    stem = name.partition("-")[0]
                    names = [f"images/{stem}_{len(items):04d}_{i}.jpg" for i in range(pictures)]
                    for picture in names:
                        draw(folder / name / picture, f"{name} {picture}")
                    items.append(item(question, names, answer))
        (folder / name / "data.json").write_text(json.dumps(items))
    rng = np.random.RandomState(0)
    items = [memory_item(rng, 5, folder / "memory", i, i != 1) for i in range(3)]
    items.append(memory_item(rng, 10, folder / "memory", 3, True))  # NIH's has 30 rounds
    (folder / "memory" / "data.json").write_text(json.dumps(items))
    rows = ["instance_id,positive_phrase,negative_phrase,image,image_tag"]
    for i in range(4):
        for tag in ("positive", "negative"):
            draw(folder / "baby_winoground" / "images" / f"{i}_{tag}.png", f"{i} {tag}")
            rows.append(f"{i},a ball,a cup,images/{i}_{tag}.png,{tag}")
    (folder / "baby_winoground" / "baby_winoground.csv").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    release(folder / "test")
    (folder / "test" / "gaze").mkdir()
    (folder / "test" / "gaze" / "data.json").write_text("[]")
    return folder


@pytest.fixture
def tiny_checkpoint(recipe, monkeypatch):
    """A small model, which answers with the right answers here: what it says is not the point."""
    monkeypatch.setattr(toolbox, "ask", oracle)
    return recipe / "phase2.pt"


def run(released, checkpoint, out, *more):
    flags = [f"--checkpoint={checkpoint}", f"--out={out}", "--task=toolbox"]
    evaluation.main([*flags, f"--json={released}/test", *more])
    [path] = out.glob("results_toolbox*.json")
    return json.loads(path.read_text())


def oracle(rows, subject):
    return [[round_.answer for round_ in row["rounds"]] for row in rows]


def always_a(rows, subject):
    return [["A" for _ in row["rounds"]] for row in rows]


def test_a_release_as_it_is(released, tiny_checkpoint, tmp_path, capsys):
    """Each test has as many items as its file, and an oracle scores 1."""
    results = run(released, tiny_checkpoint, tmp_path, f"--scores={tmp_path}/s.json")
    printed = capsys.readouterr().out
    assert "gaze/data.json: not a test of the Toolbox" in printed
    assert "no adjusted score" not in printed  # without labels equal files say it
    tasks = results["tasks"]
    for name, test in TASKS.items():
        items = json.loads((released / "test" / name / "data.json").read_text())
        for measure in ("accuracy", "exact", "adjacent"):
            if measure in tasks[test]["all"]:
                assert tasks[test]["all"][measure]["n"] == len(items)
                assert tasks[test]["all"][measure]["score"] == 1
    memory = tasks["memory"]["all"]
    assert memory["adjusted"]["n"] == 5 + 5 + 5 + 10 and memory["adjusted"]["score"] == 1
    assert memory["learning"]["n"] == 25 and memory["testing"]["n"] == 50
    scores = json.loads((tmp_path / "s.json").read_text())["results"]
    assert set(scores) == {name for name, _ in board.BOARD.values()} and len(scores) == 11
    assert scores["baby_memory"] == {
        "acc_testing_adjusted": 1.0, "acc_learning": 1.0, "acc_testing_raw": 1.0}  # fmt: skip
    assert scores["baby_vdr_binary"] == {"acc_exact": 1.0, "acc_adjacent": 1.0}
    assert set(scores["baby_winoground"]) == {"group_score", "image_score", "text_score"}
    assert json.loads((tmp_path / "scores.json").read_text())["results"] == scores
    assert "overall" in printed and "mean of 11" in printed


def test_always_a_scores_the_share_of_a(released, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(toolbox, "ask", always_a)
    tasks = run(released, tiny_checkpoint, tmp_path, "--parse=published")["tasks"]
    for name, test in TASKS.items():
        items = json.loads((released / "test" / name / "data.json").read_text())
        share = np.mean([one["conversations"][-1]["value"] == "A" for one in items])
        measure = "exact" if test == "delayed_response_open" else "accuracy"
        assert tasks[test]["all"][measure]["score"] == pytest.approx(share, abs=1e-4), test
    items = json.loads((released / "test" / "memory" / "data.json").read_text())
    right = [[turn["value"] == "A" for turn in one["conversations"][1::2]] for one in items]
    raw = np.mean([np.mean(own[(len(own) + 1) // 3 :]) for own in right])
    assert tasks["memory"]["all"]["testing"]["score"] == pytest.approx(raw, abs=1e-4)


# ---------------------------------------------------------------------------------------------
# Layouts, and what cannot be scored


def test_the_published_names_are_known():
    names = {
        "pv": "picture_vocabulary", "baby_pv": "picture_vocabulary", "vdr-open":
        "delayed_response_open", "vdr_binary": "delayed_response", "who_has_more": "more_natural",
        "Count": "object_counting", "baby_spatialdetails": "spatial_details", "gaze": "",
        "whohasmore_synthetic": "more_synthetic", "memory": "memory", "subitize": "subitizing",
    }  # fmt: skip
    assert {name: known_name(name) for name in names} == names


def test_layouts(tmp_path):
    """NAME.json, TASK_test.json before TASK_train.json, TASK/data.json; two files of one test."""
    for path in ("memory.json", "pv_test.json", "pv_train.json", "count/data.json",
                 "picture_vocab_selected/data.json", "vdr_open_val.json",
                 "choice.json"):  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("[]")
    assert [
        (key, test, str(path.relative_to(tmp_path))) for key, test, path in find_tests(tmp_path)
    ] == [
        ("picture_vocabulary", "picture_vocabulary", "picture_vocab_selected/data.json"),
        ("pv", "picture_vocabulary", "pv_test.json"),
        ("delayed_response_open", "delayed_response_open", "vdr_open_val.json"),
        ("memory", "memory", "memory.json"),
        ("object_counting", "object_counting", "count/data.json"),
    ]


def test_our_own_names_come_first_and_no_key_twice(tmp_path):
    """Two files of one test; and the toy world, whose baby_winoground.csv is another test."""
    for name in ("count", "object_counting", "compare_real", "more_natural"):
        (tmp_path / f"{name}.json").write_text("[]")
    found = [(key, path.name) for key, _, path in find_tests(tmp_path)]
    assert found == [
        ("more_natural", "more_natural.json"),
        ("compare_real", "compare_real.json"),
        ("object_counting", "object_counting.json"),
        ("count", "count.json"),
    ]
    (tmp_path / "baby_winoground.csv").write_text("")
    (tmp_path / "looking_while_listening.json").write_text("[]")
    listening = [path.name for _, t, path in find_tests(tmp_path) if t.startswith("looking")]
    assert listening == ["looking_while_listening.json"]


def test_a_folder_without_tests_is_one_line(tmp_path):
    (tmp_path / "test").mkdir()
    for folder, why in ((tmp_path, "give .*test"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=why) as error:
            find_tests(folder)
        assert one_line(error)


def test_what_cannot_be_scored_is_left_out_by_a_switch_alone(
    released, tiny_checkpoint, tmp_path, capsys
):
    items = json.loads((released / "test" / "count" / "data.json").read_text())
    items[1]["conversations"][1]["value"] = "many"
    items[2]["image"] = ["images/nowhere.jpg"]
    path = released / "test" / "count" / "faulty.json"
    path.write_text(json.dumps(items))
    flags = [
        f"--checkpoint={tiny_checkpoint}",
        f"--out={tmp_path}",
        "--task=count",
        f"--csv={path}",
    ]
    with pytest.raises(UserError, match="item 1: 'many' is no answer.*--skip") as error:
        evaluation.main(flags)
    assert one_line(error)
    items[1]["conversations"][1]["value"] = "1"
    path.write_text(json.dumps(items))
    with pytest.raises(UserError, match="no images/nowhere.jpg in .*--skip") as error:
        evaluation.main(flags)
    assert one_line(error)
    items[1]["conversations"][1]["value"] = "many"
    path.write_text(json.dumps(items))
    evaluation.main([*flags, "--skip"])
    printed = capsys.readouterr().out
    assert "1 items left out, which cannot be scored; item 1" in printed
    assert "1 items left out, whose pictures are missing, images/nowhere.jpg first" in printed
    results = json.loads((tmp_path / "results_object_counting.json").read_text())
    assert results["tasks"]["object_counting"]["all"]["accuracy"]["n"] == len(items) - 2


def test_a_question_without_image_gets_its_pictures_first(tmp_path, capsys):
    """As the published harness does, and reported."""
    path = tmp_path / "count.json"
    path.write_text(json.dumps([item("How many bottle do you see?", ["a.jpg"], "3")]))
    [row] = read_items("object_counting", path)
    assert row["rounds"][0].question == "<image>\nHow many bottle do you see?"
    assert "1 items have pictures and no <image>" in capsys.readouterr().out


def test_items_that_nobody_can_answer_are_counted(tmp_path, capsys):
    path = tmp_path / "leftright.json"
    question = next(q for test, q, *_ in FORMS if test == "left_right")
    path.write_text(
        json.dumps([item(question, ["a.jpg"] * 4, "A"), item(question, [*"abcd"], "A")])
    )
    assert len(read_items("left_right", path)) == 2
    assert "1 items offer one file as every option, item 0 first" in capsys.readouterr().out


def test_memory_without_any_repetition_is_reported(released, tiny_checkpoint, tmp_path, capsys):
    """No label and no equal bytes: the other measures count, and nothing is silent."""
    rng = np.random.RandomState(0)
    one = memory_item(rng, 5, tmp_path, 0, False)
    for number, name in enumerate(one["image"]):
        draw(tmp_path / name, f"new {number}")
    (tmp_path / "memory.json").write_text(json.dumps([one]))
    evaluation.main(
        [
            f"--checkpoint={tiny_checkpoint}",
            f"--out={tmp_path}",
            f"--csv={tmp_path}/memory.json",
            "--task=memory",
        ]  # fmt: skip
    )
    assert "1 of 1 dialogues have no adjusted score" in capsys.readouterr().out
    results = json.loads((tmp_path / "results_memory.json").read_text())["tasks"]["memory"]["all"]
    assert "adjusted" not in results and results["testing"]["n"] == 10


def test_each_split_takes_its_own_pictures(tmp_path, monkeypatch):
    """The same names stand in every split: validation never sees a picture of training's."""
    for number, split in enumerate(("train", "val")):
        for task in ("count", "vdr-open"):
            folder = tmp_path / split / task
            items = []
            for i in range(3):
                name = f"images/x_{i:04d}_0.png"
                draw(folder / name, "unused")
                shade = 50 * number + 100 * (task == "count") + 10 * i
                Image.new("RGB", (32, 32), (shade, shade, shade)).save(folder / name)
                items.append(item("# How many cups do you see?", [name], str(i + 1)))
            (folder / "data.json").write_text(json.dumps(items))
    files = lambda split: [f"{tmp_path}/{split}/{task}/data.json" for task in ("count", "vdr-open")]
    monkeypatch.chdir(tmp_path)
    flags = ["--size=32", "--vocab_size=300", "--name=tuning", f"--images={tmp_path}/train"]
    command.main(["llava", "--json", *files("train"), "--val", *files("val"), *flags])
    made = data.Data(tmp_path / "data" / "tuning")
    shades = {
        split: made.open(split, "frames")[:, 0, 0, 0].tolist()
        for split in ("chat_train", "chat_val")
    }
    assert shades == {
        "chat_train": [100, 110, 120, 0, 10, 20],
        "chat_val": [150, 160, 170, 50, 60, 70],
    }


def pretraining(folder, kinds):
    """Pretraining samples in the published forms, in folders of their own: single pictures, clips
    of 8, a film with its poster, moments; the names are the same in each."""
    for number, kind in enumerate(kinds):
        count = {"single_image": 1, "video_clip": 8, "multi_turn": 4, "film": 1}[kind]
        items = []
        for i in range(4):
            names = [f"media/{kind}_{i:04d}_{k}.jpg" for k in range(count)]
            for name in names:
                (folder / kind / "media").mkdir(parents=True, exist_ok=True)
                shade = 40 * number + 10 * i
                Image.new("RGB", (32, 32), (shade, shade, shade)).save(folder / kind / name)
            human = ["<image>"] * 4 if kind == "multi_turn" else ["<image>" * count]
            said = [
                {"from": who, "value": value}
                for text in human
                for who, value in (("human", text), ("gpt", f"That's {kind} {i}."))
            ]
            one = {"id": str(i), "image": names, "conversations": said, "meta": {"subject": "S"}}
            items.append(one | ({"video": f"media/{i}.mp4"} if kind == "film" else {}))
        (folder / kind / "data.json").write_text(json.dumps(items))


def test_the_pretraining_parts_need_no_folder_of_pictures(tmp_path, monkeypatch, capsys):
    kinds = ("single_image", "video_clip", "multi_turn", "film")
    pretraining(tmp_path / "train", kinds)
    pretraining(tmp_path / "val", kinds[:2][::-1])  # the same names, other shades
    monkeypatch.chdir(tmp_path)
    files = lambda split, names: [f"{split}/{name}/data.json" for name in names]
    command.main(
        [
            "saycam",
            "--train",
            *files("train", kinds),
            "--val",
            *files("val", kinds[:2]),
            "--size=32",
            "--vocab_size=300",
            "--template=baby_v1",
        ]  # fmt: skip
    )
    assert "4 items have a film" in capsys.readouterr().out
    made = data.Data("data/saycam")
    counts = {s: sorted(made.open(s, "samples")[:, 3].tolist()) for s in ("train", "val")}
    assert counts == {"train": [1] * 8 + [4] * 4 + [8] * 4, "val": [1] * 4 + [8] * 4}
    shades = sorted({int(frame[0, 0, 0]) for frame in made.open("val", "frames")})
    assert shades == [0, 10, 20, 30, 40, 50, 60, 70]
    single = [int(f[0, 0, 0]) for f in made.open("val", "frames")[:4]]
    assert single == [40, 50, 60, 70]  # those of val's single pictures, not of train's
