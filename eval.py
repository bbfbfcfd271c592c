"""
What has it learnt? The four BabyVLM tests, the ten of the Toolbox, grammar pairs, validation loss.

    python eval.py --checkpoint out/toy/phase2.pt              # all that the data folder has
    python eval.py --checkpoint out/toy/phase0.pt --zorro DIR  # grammar pairs, words alone
    python eval.py --shuffle                                   # pictures dealt to wrong captions
    python eval.py --task vtwt --csv vtwt.csv --images frames.zip   # BabyVLM's published files

A phrase's score is its mean negative log-likelihood (NLL) per token after the picture, in fp32,
lower is better; a tie counts as its fair share. (Zorro sums; captions are spoken.) Each accuracy
comes with n, chance and a 95 % Wilson interval, and apart for each `subset` that the CSV names.
Writes results.json, report.html and captions.png beside the checkpoint.

A new test is an entry in TASKS: its columns, which of them name pictures, its rule.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import babyvlm
import checkpoint
import choice
import config
import devbench
import features
import inference
import report
import toolbox
import vision
import watch
import weights
from batches import PairBatches, SampleBatches, TextBatches
from config import UserError, knob
from data import Data
from files import (
    about,
    read_csv,
    read_json,
    read_log,
    read_text,
    remove_leftovers,
    write_json,
    writing,
)
from images import read_picture
from places import Places
from scores import accuracy
from templates import TEMPLATES


@dataclass
class Config(config.Knobs):
    checkpoint: str = "out/toy/phase2.pt"  # a .pt that train.py wrote, or a LLaVA's folder
    data: str = ""  # the folder with eval/*.csv and val bins; empty: the one it was trained on
    task: str = ""  # one of TASKS alone, or toolbox, all of its; empty: all there are in data
    csv: str = ""  # the task's file, of choice a JSON; empty: eval/<task>.csv of the data folder
    template: str = knob("", choices=("", "plain", *TEMPLATES))  # of choice; empty: the model's
    json: str = ""  # of toolbox: a folder of its JSON files; empty: eval of the data folder
    images: tuple[str, ...] = ()  # folders or zips of its pictures; empty: eval/images
    parse: str = knob("strict", choices=("strict", "published"))  # of toolbox: reading an answer
    human: str = ""  # of devbench: a CSV of the shares of children who chose each answer
    ties: str = knob("fair", choices=("fair", "published"))  # published: as BabyVLM's own scorer
    zorro: str = ""  # a folder of Zorro's .txt files: odd line wrong, even line right
    batch: int = knob(256, low=1, high=1 << 20)  # phrases scored at a time
    shuffle: bool = False  # deal each test's pictures at random: all must fall to chance
    out: str = ""  # where to write; empty: the checkpoint's folder
    device: str = ""  # cpu, cuda, cuda:1, mps; empty: cuda where there is one
    dtype: str = knob("", choices=("", "float32", "bfloat16"))  # empty: as the weights are kept


# ---------------------------------------------------------------------------------------------
# Asking a model


def phrase_nll(loaded, shown, phrases, batch=256):
    """Mean NLL per token of phrases[i] after the picture shown[i]: float64 (n,).

    shown: as inference.see gives them, or None for words alone, which then follow an <eos>. No
    <eos> is scored. Raises UserError where a phrase is too long or empty, or a score no number."""
    tokenizer = loaded.tokenizer
    begins = [] if tokenizer.bos is None else [tokenizer.bos]
    befores = [begins or [tokenizer.eos]] * len(phrases)
    if shown is not None:
        befores = [begins + [tokenizer.image] * len(embed) for embed in shown]
    embeds = None if shown is None else [[embed] for embed in shown]
    words = [tokenizer.encode(phrase) for phrase in phrases]
    return inference.nll_after(loaded, befores, embeds, words, batch)


class Subject:
    """A model that is asked about the pictures of a test, by their names."""

    def __init__(self, loaded, rows, names, locations, settings):
        self.loaded, self.rows, self.settings = loaded, rows, settings  # rows: all of the test
        self.place = {name: i for i, name in enumerate(names)}
        if settings.shuffle:
            self.place = dict(zip(names, np.random.RandomState(0).permutation(len(names))))
        self.locations, self.seen = locations, []  # each picture's embeddings, (tokens, C)
        for start in tqdm(range(0, len(names), 64), "pictures", unit_scale=64, unit="image"):
            pictures = self.read(locations[start : start + 64])
            self.seen += [embed.cpu() for embed in inference.see(loaded, pictures)]
        self.forget()

    def forget(self):
        self.scores, self.answers, self.made = {}, {}, {}  # asked before: a subset asks again

    def blinded(self):
        """This model where it cannot see: shown, in the place of each picture, the mean of all (of
        those with as many tokens)."""
        means = {}
        for length in {len(embed) for embed in self.seen}:
            alike = [embed for embed in self.seen if len(embed) == length]
            means[length] = torch.stack(alike).float().mean(0).to(alike[0].dtype)
        other = copy.copy(self)
        other.seen = [means[len(embed)] for embed in self.seen]
        other.forget()
        return other

    def once(self, key, rows, make):
        """make(all rows of the test), a list with an entry for each, made once: those of rows."""
        if key not in self.made:
            self.made[key] = dict(zip(map(id, self.rows), make(self.rows), strict=True))
        return [self.made[key][id(row)] for row in rows]

    def read(self, locations):
        return [read_picture(place, self.loaded.image_format) for place in locations]

    def frames(self, images):
        """What is shown where these names are asked for, whole: (n, S, S, 3) uint8."""
        shown = self.read([self.locations[self.place[name]] for name in images])
        return np.stack([picture.frames[0] for picture in shown])

    def embeds(self, images):
        return [self.seen[self.place[name]] for name in images]

    def nll(self, images, phrases):
        """phrase_nll of each phrase after each picture."""
        asked = list(zip(images, phrases))
        new = [pair for pair in dict.fromkeys(asked) if pair not in self.scores]
        if new:
            shown, texts = self.embeds([name for name, _ in new]), [phrase for _, phrase in new]
            scores = phrase_nll(self.loaded, shown, texts, self.settings.batch)
            self.scores |= dict(zip(new, scores))
        return np.array([self.scores[pair] for pair in asked])

    def answer(self, images):
        """What the model says of each picture, greedily, 25 tokens at most."""
        new = [name for name in dict.fromkeys(images) if name not in self.answers]
        if new:
            self.answers |= dict(zip(new, inference.caption(self.loaded, self.embeds(new), 25)))
        return [self.answers[name] for name in images]


@dataclass(frozen=True)
class Task:
    """A test: the columns its CSV must have (where `read` reads it, they only tell what a row has),
    which of them name pictures, its rule, and whether it is one of BabyVLM's four, printed beside
    the paper."""

    columns: tuple
    pictures: tuple
    rule: object
    published: bool = False
    speaks: bool = False  # its answers go onto a contact sheet, beside the column `text`
    read: object = None  # read(path): the rows of a file that is not such a CSV
    suffix: str = "csv"  # of its file

    def rows(self, path):
        return self.read(path) if self.read else read_csv(path, self.columns)

    def pictures_in(self, row):
        """The names of a row's pictures; a column may hold several."""
        cells = [row[column] for column in self.pictures]
        return [name for cell in cells for name in (cell if isinstance(cell, list) else [cell])]


TASKS = {
    "labeled_s": Task(
        ("trial_id", "target_category", "real_category", "image"),
        ("image",),
        babyvlm.labeled_s,
        True,
    ),
    "vtwt": Task(("image", "positive_phrase", "negative_phrase"), ("image",), babyvlm.vtwt, True),
    "baby_winoground": Task(
        ("instance_id", "positive_phrase", "negative_phrase", "image", "image_tag"),
        ("image",),
        babyvlm.baby_winoground,
        True,
    ),
    "caption": Task(("image", "text"), ("image",), babyvlm.captions, published=True, speaks=True),
    "two_by_one": Task(
        ("image", "foil_image", "phrase"), ("image", "foil_image"), babyvlm.two_by_one
    ),
    "two_by_two": Task(
        ("image", "foil_image", "phrase", "foil_phrase"),
        ("image", "foil_image"),
        babyvlm.two_by_two,
    ),
    "machine_devbench": Task(
        ("task", "bin", "image1", "image2", "text1"),
        ("image1", "image2"),
        devbench.machine,
        read=devbench.read_machine,
    ),
    "devbench": Task(
        ("image1", "text1"), ("images",), devbench.devbench, read=devbench.read_manifest
    ),
    "choice": Task(
        ("image", "conversations", "choices", "answer"),
        ("image",),
        choice.score,
        read=choice.read,
        suffix="json",
    ),
}
for name in toolbox.TESTS:
    TASKS[name] = Task(
        ("image", "conversations"),
        ("image",),
        toolbox.rule(name),
        read=partial(toolbox.read, name),
        suffix="json",
    )


def run_task(task, path, images, loaded, settings):
    """({subset: {measure: result}} of a test on the CSV at `path`, entries of a contact sheet, and
    of the Toolbox an item for another)."""
    test = TASKS[task]
    rows = test.rows(path)
    places = Places(images)
    names = sorted({name for row in rows for name in test.pictures_in(row)})
    locations = [places.find(name) for name in names]
    if None in locations:
        missing = names[locations.index(None)]
        raise UserError(
            f"{' and '.join(places.paths)}: no {missing}, which {task} asks for in "
            f"{path}; --images takes several folders or zips"
        )
    subject = Subject(loaded, rows, names, locations, settings)
    with about(path):
        results = {"all": test.rule(rows, subject, settings.ties)}
    subsets = sorted({row["subset"] for row in rows if row.get("subset")})
    if len(subsets) > 1:
        for subset in subsets:
            chosen = [row for row in rows if row["subset"] == subset]
            results[subset] = test.rule(chosen, subject, settings.ties)
    entries, items = [], []
    if "seeing" in subject.made:
        row = rows[0]
        question, right = toolbox.turns_of(row)[-1]
        said = subject.made["seeing"][id(row)][-1]
        items = [(task, subject.frames(row["image"]), question, right, said)]
    if test.speaks:
        spread = np.linspace(0, len(rows) - 1, min(36, len(rows))).round().astype(int)
        chosen = [rows[i] for i in spread]
        names = [row["image"] for row in chosen]
        texts = [row["text"] for row in chosen]
        entries = list(zip(subject.frames(names), texts, subject.answer(names)))
    return results, entries, items


def zorro(directory, loaded, batch):
    """Grammar pairs: is the right sentence likelier as a whole? {"all": {"accuracy", and one
    measure a file}}; the accuracy is the mean over files.

    A sentence's log-probability is the sum over its tokens, after an <eos>."""
    files = sorted(Path(directory).glob("*.txt"))
    if not files:
        raise UserError(f"{directory}: no .txt files of sentence pairs")
    paradigms = {}
    for path in tqdm(files, "zorro", unit="file"):
        lines = [line.lower().strip() for line in read_text(path).splitlines()]
        lines = [line for line in lines if line]
        if len(lines) % 2 or not lines:
            raise UserError(f"{path}: {len(lines)} sentences are no pairs")
        lengths = np.array([len(loaded.tokenizer.encode(line)) for line in lines])
        scores = phrase_nll(loaded, None, lines, batch) * lengths
        wrong, right = scores[::2], scores[1::2]
        paradigms[path.stem] = accuracy(np.where(right == wrong, 0.5, right < wrong), 0.5)
    macro = round(float(np.mean([result["score"] for result in paradigms.values()])), 4)
    overall = {"score": macro, "n": len(paradigms), "chance": 0.5, "ci95": None}
    return {"all": {"accuracy": overall} | paradigms}


# ---------------------------------------------------------------------------------------------
# All of it


def losses(loaded, dataset):
    """{"val_loss"} and, of a GPT alone, {"bits_per_character"}, of a prepared folder; {} and a
    line where its vocabulary or its pictures are not the checkpoint's."""
    model, saved = loaded.model, loaded.checkpoint
    blind = model.projector is None
    split = "chat_val" if saved["phase"] == "phase3" else "val"
    if not dataset.count(split, "text" if blind else "samples"):
        print(f"no validation loss: {dataset.directory} has nothing to validate this model on")
        return {}
    other_pictures = not blind and checkpoint.has_other_images(saved, dataset)
    if checkpoint.has_other_vocabulary(saved, dataset) or other_pictures:
        print(
            f"no validation loss: {dataset.directory} has another vocabulary or other pictures "
            "than the data this checkpoint was trained on"
        )
        return {}
    if blind:
        batches = TextBatches(dataset, "val", 16, 0, model)
        loss = watch.val_loss(model, batches, dataset.image_format)
        counts = dataset.meta["splits"]["val"]
        tokens_a_character = counts["text"] / counts["characters"]
        # nats a token, times tokens a character, are nats a character; over ln 2, bits
        return {"val_loss": loss, "bits_per_character": loss * tokens_a_character / math.log(2)}
    stored = features.open_stored(dataset, split, model)
    kind = PairBatches if saved["phase"] == "phase1" else SampleBatches
    batches = kind(dataset, split, 64, 0, model, stored)
    return {"val_loss": watch.val_loss(model, batches, dataset.image_format)}


def evaluate(loaded, settings):
    """({"tasks": {...}, "val_loss": ..., ...} of a checkpoint, run_task's entries and items)."""
    sees, saved = loaded.model.projector is not None, loaded.checkpoint
    if settings.task not in ("", "toolbox", *TASKS):
        raise UserError(f"--task {settings.task}: one of toolbox, {', '.join(TASKS)}")
    asked = settings.task or "nothing"
    if settings.human and settings.task != "devbench":
        raise UserError(f"--human is for --task devbench; asked for is {asked}")
    if settings.parse != "strict" and settings.task not in ("", "toolbox", *toolbox.TESTS):
        raise UserError(f"--parse is for the tests of the Toolbox; asked for is {asked}")
    if (settings.csv or settings.images) and not settings.task:
        raise UserError(f"--csv and --images need a --task: one of {', '.join(TASKS)}")
    if settings.csv and settings.task == "toolbox":
        raise UserError("--task toolbox reads a file for each test: --json DIR, or one test's name")
    if settings.task and not sees:
        raise UserError(f"{settings.checkpoint} cannot see: --task needs one of phase 1 or later")
    folder = Path(settings.data or saved["settings"]["data"])
    # grammar pairs, and a CSV of its own, need no prepared folder
    no_folder = settings.zorro and not settings.data and not (folder / "meta.json").exists()
    dataset = None if settings.csv or settings.json or no_folder else Data(folder)
    results = {
        "checkpoint": str(settings.checkpoint),
        "digest": vision.weights_digest(loaded.model.state_dict()),
        "phase": saved["phase"],
        "trained_on": saved["source"],
        "corpus": saved["corpus"],
        "data": settings.csv or settings.zorro or str(folder),
        "source": settings.csv or settings.zorro,
        "csv": settings.csv,
        "shuffled": settings.shuffle,
        "ties": settings.ties,
        "parse": settings.parse,
        "tasks": {},
    }
    entries, items = [], []
    if settings.zorro:
        results["tasks"]["zorro"] = zorro(settings.zorro, loaded, settings.batch)
    elif dataset and not settings.task and (folder / "eval" / "grammar").is_dir():
        pairs = folder / "eval" / "grammar"  # of the world's own grammar
        results["tasks"]["grammar"] = zorro(pairs, loaded, settings.batch)
    if dataset:
        results |= {"source": dataset.meta["source"], **losses(loaded, dataset)}
    tasks = list(TASKS) if sees else []
    if settings.task:
        tasks = [settings.task]
    if settings.task == "toolbox":
        tasks = list(toolbox.TESTS)
    tests = Path(settings.json or folder / "eval")
    for task in tasks:
        path = Path(settings.csv or tests / f"{task}.{TASKS[task].suffix}")
        if path.exists() or settings.task not in ("", "toolbox"):
            images = settings.images or [path.parent / "images"]
            results["tasks"][task], more, shown = run_task(task, path, images, loaded, settings)
            entries, items = more or entries, items + shown
    if settings.task == "toolbox" and not results["tasks"]:
        raise UserError(f"{tests}: none of {', '.join(f'{name}.json' for name in toolbox.TESTS)}")
    results["tasks"] |= toolbox.overall(results["tasks"])
    return results, entries, items


def write(results, entries, items, out, task):
    """results.json, report.html, captions.png and toolbox.png in the folder `out`, under names that
    say so if one task was run alone, pictures were shuffled, or answers read as published; returns
    their names."""
    how = "_shuffled" if results["shuffled"] else ""
    how += "_published" if results["parse"] == "published" else ""
    suffix = (f"_{task}" if task else "") + how
    sheet = report.contact_sheet(entries) if entries else None
    names = [f"results{suffix}.json", f"report{suffix}.html"]
    remove_leftovers(out)
    write_json(out / names[0], results)
    with writing(out / names[1]) as file:
        file.write(report.page(results, sheet, read_log(out / "log.jsonl")).encode("utf-8"))
    sheets = {"captions": sheet, "toolbox": report.item_sheet(items) if items else None}
    for name, drawn in sheets.items():
        if drawn:
            names.append(f"{name}{how}.png")
            with writing(out / names[-1]) as file:
                drawn.save(file, "PNG")
    return names


def main(argv):
    settings = config.load(Config, argv, __doc__)
    device = checkpoint.choose_device(settings.device)
    torch.set_float32_matmul_precision("highest")  # after training on a GPU it may be lower
    loaded = weights.open_model(settings.checkpoint, device, settings.dtype)
    if loaded.model.gpt is None:
        raise UserError(f"{settings.checkpoint}: a tower alone; train.py logs its probes")
    results, entries, items = evaluate(loaded, settings)
    out = Path(settings.out or Path(settings.checkpoint).parent)
    names = write(results, entries, items, out, settings.task)
    print(*report.table(results["tasks"]), sep="\n")
    if settings.csv and TASKS[settings.task].published:
        tasks, files = {}, []  # with what this checkpoint scored on other files given by --csv
        for path in sorted(out.glob("results_*.json")):
            other = read_json(path)
            alike = all(other.get(key) == results[key] for key in ("digest", "shuffled", "ties"))
            if alike and other.get("csv"):
                tasks |= other["tasks"]
                files.append(other["csv"])
        name = f"this one, trained on {loaded.checkpoint['settings']['data']}"
        print(*report.beside_the_paper(tasks, name), sep="\n")
        print(f"this one's on {', '.join(files)}")
    for name in ("val_loss", "bits_per_character"):
        if name in results:
            print(f"{name} {results[name]:.4f}")
    print(f"written: {out}/{', '.join(names)}")


if __name__ == "__main__":
    config.run(main)
