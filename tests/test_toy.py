"""The drawn world: the same bytes everywhere, nothing held out is shown or said, fair trials."""

import csv
import hashlib
import multiprocessing

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import tasks
from common import cores
from common.files import read_csv
from sources import command, toy


def test_the_toy_world_is_the_same_bytes_everywhere():
    digest = hashlib.sha256()
    rng = np.random.RandomState(7)
    for _ in range(40):
        scene = toy.random_scene(rng, toy.THINGS)
        digest.update(toy.utterance(scene, rng).encode())
        digest.update(toy.film(scene, rng, 32, toy.THINGS).tobytes())
    assert digest.hexdigest()[:16] == "37a5dc627a572b17"


@pytest.mark.parametrize(
    "source, flags, wanted",
    [
        ("toy", "--scenes=20 --clip_frames=3 --lines=100 --trials=0.05", "a2ad0c32d7a1c388"),
        ("toy_chat", "--talks=30 --lines=100 --questions=1", "11d9d232c0ab9f01"),
        (
            "toy_v2",
            "--scenes=12 --clips=12 --moments=12 --lines=100 --items=48 --games=62 "
            "--replay=12 --questions=10",
            "cce7e5eeb8ecc880",
        ),
    ],
)
def test_prepared_worlds_are_the_same_bytes_everywhere(
    tmp_path, monkeypatch, source, flags, wanted
):
    """Bins, vocabulary, tests; of pictures the pixels, as compressors differ."""
    monkeypatch.chdir(tmp_path)
    command.main([source, "--name=w", "--size=16", "--vocab_size=300", *flags.split()])
    digest = hashlib.sha256()
    for path in sorted((tmp_path / "data" / "w").rglob("*.*")):
        if path.name not in ("meta.json", ".lock"):
            is_picture = path.suffix == ".png"
            content = Image.open(path).tobytes() if is_picture else path.read_bytes()
            digest.update(path.name.encode() + content)
    assert digest.hexdigest()[:16] == wanted


def held_out_pairs():
    pairs = [(colour, kind) for kind in toy.THINGS for colour in toy.COLOURS]
    return [(c, k) for c, k in pairs if toy.held_out(toy.Thing(k, c))]


def test_held_out_pairs_are_never_filmed_or_spoken_of():
    rng = np.random.RandomState(0)
    held = held_out_pairs()
    assert len(held) == 16 and len({k for _, k in held}) == 16
    said = ""
    for _ in range(4000):
        scene = toy.random_scene(rng, toy.THINGS)
        assert not any(map(toy.held_out, scene.things))
        said += toy.utterance(scene, rng) + "\n"
    for colour, kind in held:
        assert f"{colour} {kind}" not in said and f"the {kind} is {colour}" not in said
    assert all(kind in said for kind in toy.THINGS)


def trials(kinds=toy.THINGS):
    return toy.make_trials(np.random.RandomState(0), 16, kinds, 0.1)


def test_trials_have_one_answer_and_their_pictures():
    found = trials()
    labeled = found.rows["labeled_s"]
    for i in range(0, len(labeled), 4):
        kinds = [row[2] for row in labeled[i : i + 4]]
        assert len(set(kinds)) == 4 and kinds.count(labeled[i][1]) == 1
    assert all(row[1] != row[2] for row in found.rows["vtwt"])
    for name, rows in found.rows.items():
        column = toy.COLUMNS[name].index("image")
        assert rows and all(row[column] in found.images for row in rows)
        assert all(len(row) == len(toy.COLUMNS[name]) for row in rows)


def test_a_foil_differs_in_one_thing_and_is_not_held_out():
    for positive, negative in (row[1:3] for row in trials().rows["vtwt"]):
        a, b = positive.split(), negative.split()
        assert sum(x != y for x, y in zip(a, b)) == 1
        assert not toy.held_out(toy.Thing(b[1], b[0]))


def test_seen_and_held_out_are_reported_apart():
    for image, text, thing, colour, subset in trials().rows["caption"]:
        assert toy.held_out(toy.Thing(thing, colour)) == (subset == "held_out")
        assert f"{colour} {thing}" in text and image


def test_binding_exchanges_colours_and_place_exchanges_things():
    rows = trials().rows["baby_winoground"]
    binding, place = ([r for r in rows if r[5] == subset] for subset in ("binding", "position"))
    assert binding and place and len(binding) % 2 == len(place) % 2 == 0
    for row in binding:
        assert sorted(row[1].split()) == sorted(row[2].split()) != row[1].split()
    for row in place:
        first, second = (row[i].removesuffix(" .").split(" is on the ") for i in (1, 2))
        assert first[0] == f"the {second[1]}" and second[0] == f"the {first[1]}"


def test_sprites_furnish_the_nursery(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(9):
        image = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
        image.paste((20 * i, 100, 50, 255), (5, 5, 25, 25))
        image.save(f"thing_{'abcdefghi'[i]}.png")
    (tmp_path / "thing_a.txt").write_text("A green apple.\nMore.")
    Image.new("RGB", (30, 30)).save("background.png")  # no transparency: no thing
    sprites = toy.load_kinds(tmp_path)
    assert len(sprites) == 9 and "green apple" in sprites and "thing b" in sprites
    command.main(
        [
            "toy",
            "--name=s",
            "--sprites=.",
            "--size=16",
            "--scenes=10",
            "--lines=60",
            "--trials=0.03",
        ]
    )
    rows = read_csv("data/s/eval/vtwt.csv", ("positive_phrase", "negative_phrase"))
    assert {row["positive_phrase"] for row in rows} <= set(sprites)
    assert not (tmp_path / "data/s/eval/probe.csv").exists()


def test_the_tables_columns_are_babyvlms():
    """Each table can be read by eval.py's own entry for that test."""

    for name, columns in toy.COLUMNS.items():
        if name != "probe":
            assert set(tasks.TASKS[name].columns) <= set(columns)
    assert csv and ROOT


def test_trials_are_the_same_from_a_process_that_shares_nothing(tmp_path):
    """Where processes are spawned, not forked, THINGS is another object in each: the trials were
    once of things without colours there."""
    context = multiprocessing.get_context("spawn")
    settings = toy.Config(size=16, trials=0.02)
    for folder, kind in ((tmp_path / "spawned", context), (tmp_path / "forked", multiprocessing)):
        process = kind.Process(target=toy.draw_trials, args=(settings, folder))
        process.start()
        process.join()
        assert process.exitcode == 0
    for name in ("vtwt.csv", "probe.csv"):
        spawned = (tmp_path / "spawned" / "eval" / name).read_text()
        assert spawned == (tmp_path / "forked" / "eval" / name).read_text()
        assert "red" in spawned


def test_other_trials_of_the_same_world(tmp_path):
    """To choose settings on, so that those that are reported stay unseen."""
    found = {}
    for seed in (0, 1, 7):
        toy.draw_trials(toy.Config(size=16, trials=0.02, trials_seed=seed), tmp_path / str(seed))
        folder = tmp_path / str(seed) / "eval"
        found[seed] = {path.name: path.read_bytes() for path in sorted(folder.glob("*.csv"))}
    assert found[0] == found[1]
    assert all(found[0][name] != found[7][name] for name in found[0])


def test_what_a_process_aside_fails_of_is_told_by_the_one_that_waits():
    def full():
        raise OSError(28, "No space left on device")

    def wrong():
        raise SystemExit(1)

    with pytest.raises(OSError, match="No space left on device: 'data/x/eval'"):
        cores.end(cores.begin(full), "data/x/eval")
    with pytest.raises(RuntimeError, match="ended with 1"):  # not errno 1
        cores.end(cores.begin(wrong), "data/x/eval")
    cores.end(cores.begin(int), "data/x/eval")
