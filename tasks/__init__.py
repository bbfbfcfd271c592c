"""
The tests of a trained model. A new test is a rule, in a file in this folder, and an entry in TASKS
below. eval.py runs it by itself if data/<name>/eval/TEST.csv exists, or alone on a given file:

    python eval.py --checkpoint out/toy/phase2.pt --task TEST --csv FILE --images DIR

A rule is a function rule(rows, subject, ties) -> {measure: result}, with results as
tasks/scores.py's accuracy() makes them. It is called with all rows of the test, and again with the
rows of each subset; Subject remembers what it has computed.
"""

import copy
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import inference
from common.archives import Archives, BesideFile, read_bytes
from common.files import about, read_csv
from common.images import as_picture, read_picture
from config import UserError
from sources.toolbox_prompts import TESTS
from tasks import babyvlm, board, choice, devbench, recordings, toolbox, toolbox_files
from tasks.scores import names_in
from training.page import Caption

# columns of free text, which people write without quotes
SENTENCES = ("text", "phrase", "foil_phrase", "positive_phrase", "negative_phrase")


@dataclass(frozen=True)
class Task:
    """A test.

    columns: those that its CSV must have; pictures: those that name pictures. read: read(path) ->
    rows, for a file that is not such a CSV (it may add columns: devbench adds `images`); can_skip:
    read(path, skip) can leave out items that cannot be scored; suffix: of its file. published: one
    of BabyVLM's four, printed beside the paper's table. speaks: its answers go onto the contact
    sheet, beside the column `text`. example: example(rows, subject) -> (frames, question, right
    answer, answer), for a sheet of examples. board: board(rows, subject) -> the entry of a
    leaderboard's scores, see board.py."""

    columns: tuple
    pictures: tuple
    rule: object
    published: bool = False
    speaks: bool = False
    read: object = None
    can_skip: bool = False
    suffix: str = "csv"
    example: object = None
    board: object = None

    def read_rows(self, path, skip=False):
        """The rows of a file, a dict each."""
        if self.can_skip:
            return self.read(path, skip=skip)
        return self.read(path) if self.read else read_csv(path, self.columns, SENTENCES)

    def pictures_in(self, row):
        """The names of a row's pictures; a column may hold a list."""
        cells = [row[column] for column in self.pictures]
        return [name for cell in cells for name in (cell if isinstance(cell, list) else [cell])]


TASKS = {
    "labeled_s": Task(
        ("trial_id", "target_category", "real_category", "image"),
        ("image",),
        babyvlm.labeled_s,
        published=True,
    ),
    "vtwt": Task(
        ("image", "positive_phrase", "negative_phrase"), ("image",), babyvlm.vtwt, published=True
    ),
    "baby_winoground": Task(
        babyvlm.WINOGROUND_COLUMNS, ("image",), babyvlm.baby_winoground, published=True
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
    "which_picture": Task(
        ("text", *recordings.PICTURES), recordings.PICTURES, recordings.which_picture
    ),
    "which_utterance": Task(("image", *recordings.TEXTS), ("image",), recordings.which_utterance),
    "machine_devbench": Task(
        ("task", "bin", "image1", "image2", "text1"),
        ("image1", "image2"),
        devbench.machine_devbench,
        read=devbench.read_machine_devbench,
    ),
    "devbench": Task(
        ("image1", "text1"), ("images",), devbench.devbench, read=devbench.read_manifest
    ),
    "choice": Task(
        ("image", "conversations", "choices", "answer"),
        ("image",),
        choice.choice,
        read=choice.read_questions,
        suffix="json",
    ),
}
for name in TESTS:
    TASKS[name] = Task(
        ("image", "conversations"),
        ("image",),
        toolbox.make_rule(name),
        read=partial(toolbox_files.read_items, name),
        can_skip=True,
        suffix="json",
        example=None if name == "looking_while_listening" else toolbox.example,
        board=partial(board.entry, name) if name in board.BOARD else None,
    )


# ---------------------------------------------------------------------------------------------
# Running a test


class Subject:
    """A model that is tested on the pictures of a test.

    Every picture is embedded once (twice, if it looks otherwise beside others); likelihoods,
    captions and answers are remembered, because each subset asks for them again. rows: all rows of
    the test; names, locations: of its pictures. shuffle: each name stands for another, random
    picture."""

    def __init__(self, loaded, rows, names, locations, settings):
        self.loaded, self.rows, self.settings = loaded, rows, settings
        self.index = {name: i for i, name in enumerate(names)}
        if settings.shuffle:
            self.index = dict(zip(names, np.random.RandomState(0).permutation(len(names))))
        self.locations, self.location_of = locations, dict(zip(names, locations))
        self.picture_embeds = self.embed_all(loaded.image_format)
        self.beside_others = None  # as picture_embeds, for together(); made when it is needed
        self.forget()

    def embed_all(self, image_format):
        """The embeddings of all pictures in a format, (tokens, C) each."""
        found, numbers = [], range(0, len(self.locations), 64)
        for start in tqdm(numbers, "pictures", unit_scale=64, unit="image"):
            pictures = [
                read_picture(location, image_format)
                for location in self.locations[start : start + 64]
            ]
            found += [embed.cpu() for embed in inference.embed_pictures(self.loaded, pictures)]
        return found

    def forget(self):
        """Drop all results: {(name, phrase): NLL}, {name: caption}, {key: [one for each row]}."""
        self.scores, self.captions, self.of_rows = {}, {}, {}

    def blinded(self):
        """The same model, which is shown the mean of all pictures (with as many tokens) instead of
        each picture."""
        other = copy.copy(self)
        other.picture_embeds = means_of(self.picture_embeds)
        if self.loaded.image_format.max_tiles:
            self.together([])
            other.beside_others = means_of(self.beside_others)
        other.forget()
        return other

    def once(self, key, rows, make):
        """The entries of `rows` in make(all rows of the test), a list that is made once."""
        if key not in self.of_rows:
            self.of_rows[key] = make(self.rows)
        return [self.of_rows[key][row["number"]] for row in rows]

    def frames(self, names):
        """The pictures of these names as whole frames: (n, S, S, 3) uint8."""
        locations = [self.locations[self.index[name]] for name in names]
        pictures = [read_picture(location, self.loaded.image_format) for location in locations]
        return np.stack([picture.frames[0] for picture in pictures])

    def digest(self, name):
        """A digest of a picture's file: equal for copies under other names."""
        return hashlib.sha256(read_bytes(self.location_of[name])).hexdigest()

    def embeds(self, names):
        """The embeddings of pictures, each of which is shown alone."""
        return [self.picture_embeds[self.index[name]] for name in names]

    def together(self, names):
        """The embeddings of pictures that are shown in one sequence."""
        image_format = self.loaded.image_format.beside_others()
        if len(names) == 1 or image_format == self.loaded.image_format:
            return self.embeds(names)
        if self.beside_others is None:
            self.beside_others = self.embed_all(image_format)
        return [self.beside_others[self.index[name]] for name in names]

    def nll(self, names, phrases):
        """Mean NLL per token of each phrase after each picture, float64 (n,)."""
        pairs = list(zip(names, phrases))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.scores]
        if new:
            embeds, texts = self.embeds([name for name, _ in new]), [phrase for _, phrase in new]
            scores = phrase_nll(self.loaded, embeds, texts, self.settings.batch)
            self.scores |= dict(zip(new, scores))
        return np.array([self.scores[pair] for pair in pairs])

    def caption(self, names):
        """A greedy caption of each picture, of 25 tokens at most."""
        new = [name for name in dict.fromkeys(names) if name not in self.captions]
        if new:
            captions = inference.caption_pictures(self.loaded, self.embeds(new), 25)
            self.captions |= dict(zip(new, captions))
        return [self.captions[name] for name in names]


def means_of(embeds):
    """The mean of all embeddings (tokens, C) with as many tokens, for each."""
    means = {}
    for length in {len(embed) for embed in embeds}:
        same = [embed for embed in embeds if len(embed) == length]
        means[length] = torch.stack(same).float().mean(0).to(same[0].dtype)
    return [means[len(embed)] for embed in embeds]


def phrase_nll(loaded, embeds, phrases, batch=256):
    """Mean NLL per token of phrases[i] after picture embeds[i]: float64 (n,). embeds None: words
    alone, after an <eos>. No <eos> is scored. Raises UserError as inference.nll_after does."""
    tokenizer = loaded.tokenizer
    prompts = [tokenizer.start or [tokenizer.eos]] * len(phrases)
    of_rows = None
    if embeds is not None:
        prompts = [tokenizer.start + [tokenizer.image] * len(embed) for embed in embeds]
        of_rows = [[embed] for embed in embeds]
    words = [tokenizer.encode(phrase) for phrase in phrases]
    return inference.nll_after(loaded, prompts, of_rows, words, batch)


@dataclass
class Report:
    """The outcome of a test. results: {subset: {measure: result}}; items: a digest of its items,
    which is the same for another model on the same file; captions: page.Captions; attention: of one
    of them, or None; examples: of the sheet of examples; board: its entry of a leaderboard's
    scores, or None."""

    results: dict
    items: str
    captions: list
    attention: tuple | None
    examples: list
    board: dict | None


def locate(rows, task, path, images, skip):
    """(rows, {name: location}) of a test's pictures. skip: leave out rows with a missing picture,
    and print how many. Raises UserError."""
    archives = BesideFile(path, Archives(images))
    names = sorted({picture for row in rows for picture in task.pictures_in(row)})
    found = {name: archives.find(name) for name in names}
    missing = [name for name in names if found[name] is None]
    if missing and not skip:
        hint = "; --skip leaves such items out" if task.can_skip else ""
        searched = " and ".join([str(Path(path).parent), *archives.archives.paths])
        raise UserError(
            f"{path}: no {missing[0]} in {searched}; --images takes several folders or zips{hint}"
        )
    whole = [row for row in rows if all(found[name] for name in task.pictures_in(row))]
    if missing:
        count = len(rows) - len(whole)
        print(f"{path}: {count} items left out, whose pictures are missing, {missing[0]} first")
    if not whole:
        raise UserError(f"{path}: of no item all pictures are there")
    return whole, {name: location for name, location in found.items() if location}


def run_task(name, path, images, loaded, settings):
    """The Report of the test `name` on the file at `path`; images: folders and zips of its
    pictures. Raises UserError."""
    task = TASKS[name]
    rows = task.read_rows(path, settings.skip)
    rows, found = locate(rows, task, path, images, settings.skip)
    rows = [row | {"number": number} for number, row in enumerate(rows)]
    subject = Subject(loaded, rows, list(found), list(found.values()), settings)
    with about(path):
        results = {"all": task.rule(rows, subject, settings.ties)}
    subsets = sorted({row["subset"] for row in rows if row.get("subset")})
    if len(subsets) > 1:
        for subset in subsets:
            chosen = [row for row in rows if row["subset"] == subset]
            results[subset] = task.rule(chosen, subject, settings.ties)
    captions = choose_captions(rows, subject) if task.speaks else []
    return Report(
        results,
        hashlib.sha256(repr(rows).encode()).hexdigest(),
        captions,
        find_attention(captions, subject),
        [(name, *task.example(rows, subject))] if task.example else [],
        task.board(rows, subject) if task.board else None,
    )


def choose_captions(rows, subject, most=36):
    """Captions of some rows, evenly spread. Whether one is right is known of rows with a `thing`:
    it must be named, and no other."""
    spread = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    chosen = [rows[i] for i in spread]
    names = [row["image"] for row in chosen]
    things = {row["thing"] for row in rows if row.get("thing")}
    found = []
    for row, frame, said in zip(chosen, subject.frames(names), subject.caption(names)):
        right = names_in(said, things) == {row["thing"]} if row.get("thing") else None
        found.append(Caption(frame, row["text"], said, right))
    return found


def find_attention(captions, subject):
    """(frame, words, maps) of where each word of a caption looked, of the longest that is not
    wrong; None if there is none, or if image tokens are not a grid."""
    fit = [one for one in captions if one.right is not False and one.said]
    model = subject.loaded.model
    if not fit or model.tiled or not model.projector.keeps_grid:
        return None
    shown = max(fit, key=lambda one: len(one.said.split()))
    tokenizer, picture = subject.loaded.tokenizer, as_picture(shown.frame)
    (embeds,) = inference.embed_pictures(subject.loaded, [picture])
    prompt = tokenizer.start + [tokenizer.image] * len(embeds)
    answer = tokenizer.encode(shown.said)[:12]
    maps = inference.attention_of(subject.loaded, prompt, answer, [embeds])
    words = [tokenizer.decode([token]).strip() for token in answer]
    return shown.frame, words, maps[:, 0]
