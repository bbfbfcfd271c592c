"""
Does filtering help? 40 % of the utterances of the toy world are assigned to wrong pictures; a model
trained on all of it judges which (sources/filtering.py). How many does it find, and what is a model
worth that is trained on all, on what it kept, and on the true pairs alone?

    python train.py configs/toy.py                # its tower is taken, and its tests
    python benchmarks/curation.py                 # about 10 minutes on 2 cores
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.archives import Archives  # noqa: E402
from sources import hold_out, pairs, toy  # noqa: E402

PICTURES, WRONG, MIN_GAIN = 4000, 0.4, 0.05
FOLDER, TOWER = Path("data/curation"), Path("out/curation_tower")


def call(script, *flags):
    subprocess.run([sys.executable, str(ROOT / script), *flags], check=True)


def draw():
    """Pictures and three tables, of all pairs and of the true ones; returns {picture: is true}."""
    rng, rows = np.random.RandomState(8), []
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        scene = toy.random_scene(rng, toy.THINGS)
        frame = toy.film(scene, rng, 64, toy.THINGS)
        Image.fromarray(frame).save(FOLDER / "images" / f"{number}.png")
        rows.append((f"{number}.png", toy.utterance(scene, rng)))
    dealt = rng.permutation(PICTURES)[: int(WRONG * PICTURES)]
    words = [words for _, words in rows]
    for here, there in zip(dealt, np.roll(dealt, 1)):
        words[here] = rows[there][1]
    true = {name: said == own for (name, own), said in zip(rows, words)}
    tables = {
        "all": [(name, said) for (name, _), said in zip(rows, words)],
        "true": [row for row in rows if true[row[0]]],
    }
    for name, table in tables.items():
        with open(FOLDER / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *table])
    return true


def prepare(name, table, *flags):
    archives = [f"--csv={FOLDER}/{table}.csv", f"--images={FOLDER}/images"]
    form = ["--size=64", "--fit=squash", "--vocab_size=512"]
    call("data.py", "pairs", f"--name=curation_{name}", *archives, *form, *flags)


def train(name):
    """Train on data/curation_<name>; returns {test: score}, on the toy world's own tests."""
    out = f"out/curation_{name}"
    flags = [f"--data=data/curation_{name}", f"--out={out}", f"--init={TOWER}", "--evaluate=False"]
    call("train.py", *flags, "--phase2_steps=1200")
    scores = {}
    for task in ("labeled_s", "vtwt", "baby_winoground"):
        tests = Path("data/toy/eval")
        where = [f"--csv={tests}/{task}.csv", f"--images={tests}/images", f"--task={task}"]
        call("eval.py", f"--checkpoint={out}/phase2.pt", *where)
        found = json.loads(Path(f"{out}/results_{task}.json").read_text())["tasks"][task]
        measure = "group" if task == "baby_winoground" else "accuracy"
        scores[task] = found["seen"][measure]["score"]
    return scores


def main():
    TOWER.mkdir(parents=True, exist_ok=True)
    shutil.copy("out/toy/vision.pt", TOWER)  # alone: the words are learnt anew
    true = draw()
    prepare("all", "all")
    scores = {"all": train("all")}
    flags = ["--filter=out/curation_all/phase2.pt", f"--min_gain={MIN_GAIN}"]
    prepare("kept", "all", *flags)
    gains = np.array(json.loads(Path("data/curation_kept/gains.json").read_text()))
    pictures = pairs.read_pictures(FOLDER / "all.csv", Archives([FOLDER / "images"]))
    is_true = np.array([true[Path(p.location).name] for p in hold_out(pictures)["train"]])
    print("threshold  kept  precision  recall")
    for threshold in (0.0, MIN_GAIN, 0.1, 0.2, 0.4):
        kept = gains >= threshold
        precision, recall = is_true[kept].mean(), kept[is_true].mean()
        print(f"{threshold:9.2f} {kept.mean():5.2f} {precision:10.3f} {recall:7.3f}")
    prepare("true", "true")
    scores |= {name: train(name) for name in ("kept", "true")}
    for name, own in scores.items():
        print(f"{name:5}", ", ".join(f"{task} {score:.3f}" for task, score in own.items()))


if __name__ == "__main__":
    main()
