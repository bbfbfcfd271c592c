"""
Test a trained model: BabyVLM's four tests, the ten of the DevCV Toolbox, Machine-DevBench, grammar
pairs, word swaps, probes of the tower, validation loss.

    python eval.py --checkpoint out/toy/phase2.pt              # all tests that the data folder has
    python eval.py --checkpoint out/toy/language.pt --zorro DIR     # grammar pairs, words alone
    python eval.py --shuffle                                   # random pictures, a check
    python eval.py --task vtwt --csv vtwt.csv --images frames.zip   # BabyVLM's published files
    python eval.py --task toolbox --json DIR --scores scores.json   # the Toolbox's published files
    python eval.py --compare out/toy out/linear                # runs beside each other

The score of a phrase is its mean negative log-likelihood (NLL) per token after the picture; lower
is better, and a tie counts as its fair share. (Zorro sums; captions are generated.) Each accuracy
has n, chance and a 95 % Wilson interval, also for each `subset` that a test's file names. Writes
results.json, report.html and captions.png beside the checkpoint; of one test, or of published
folders, results_NAME.json and report_NAME.html. --compare writes compare.html: differences with
paired 95 % intervals over the same items, and curves over each other.

A new test: tasks/__init__.py.
"""

import common.threads  # noqa: F401, before torch

# isort: split
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import batches
import checkpoint
import config
import inference
import vision
from common.files import read_json, remove_leftovers, write_json, writing
from config import UserError, option
from data import Data
from sources.toolbox_prompts import TESTS
from tasks import TASKS, board, compare, probes, report, run_task, sheets, toolbox
from tasks.board import BOARD
from tasks.swap import language_scores, run_swap
from tasks.toolbox_files import find_tests, known_name
from tasks.zorro import zorro
from tokenizer import TEMPLATES
from training import features, page, validation


@dataclass
class Config(config.Options):
    checkpoint: str = "out/toy/phase2.pt"  # a .pt that train.py wrote, or a LLaVA folder
    data: str = ""  # a prepared folder with eval/ and val bins; empty: the one it was trained on
    task: str = option("", listed=("toolbox", *TASKS))  # one test; empty: all whose files are there
    csv: str = ""  # the test's file (or folder, or JSON); empty: eval/<task>.csv in data
    template: str = option("", choices=("", "plain", *TEMPLATES))  # for questions; empty: its own
    json: str = ""  # of toolbox: a folder of its JSON files; empty: eval in data
    images: tuple[str, ...] = ()  # folders or zips of pictures that are not beside their file
    parse: str = option("strict", choices=("strict", "published"))  # of toolbox: reading answers
    max_new_tokens: int = option(32, low=1, high=1 << 16)  # of toolbox: the longest answer
    skip: bool = False  # of toolbox: leave out items that cannot be scored, and say how many
    scores: str = ""  # of toolbox: also write the BabyVLM leaderboard's scores to this file
    human: str = ""  # of devbench: a CSV with the fraction of children who chose each answer
    ties: str = option("fair", choices=("fair", "published"))  # published: as BabyVLM's own scorer
    zorro: str = ""  # a folder of Zorro's grammar pairs, .txt or .json
    swap: str = ""  # a folder of LongTail-Swap's and Visual-Property Swap's files
    mnist: str = ""  # a folder with MNIST's idx files: probes of the tower
    countbench: str = ""  # a folder of CountBench's pictures: the same
    batch: int = option(256, low=1, high=1 << 20)  # phrases scored at a time
    compare: tuple[str, ...] = ()  # folders of tested runs: their differences to the first one
    shuffle: bool = False  # random pictures for each test: scores fall to chance, or below
    out: str = ""  # where to write; empty: the checkpoint's folder
    device: str = ""  # cpu, cuda, cuda:1, mps; empty: cuda if there is one
    dtype: str = option("", choices=("", "float32", "bfloat16"))  # empty: that of the weights


def check_options(settings, sees):
    """Raise UserError for options that do not go together. sees: whether the model has a tower."""
    task, asked = settings.task, settings.task or "nothing"
    if task not in ("", "toolbox", *TASKS):
        raise UserError(f"--task {task}: one of toolbox, {', '.join(TASKS)}")
    if settings.human and task != "devbench":
        raise UserError(f"--human is for --task devbench; asked for is {asked}")
    for name in ("parse", "skip", "scores"):
        if name in settings.given and task not in ("", "toolbox", *TESTS):
            raise UserError(f"--{name} is for the tests of the Toolbox; asked for is {asked}")
    if (settings.csv or settings.images or settings.json) and not task:
        raise UserError(f"--csv, --json and --images need a --task: one of {', '.join(TASKS)}")
    if settings.csv and task == "toolbox":
        raise UserError("--task toolbox reads a file for each test: --json DIR, or one test's name")
    if task and not sees:
        raise UserError(f"{settings.checkpoint} cannot see: --task needs one of phase 1 or later")


def losses(loaded, dataset):
    """{"val_loss", "val_rows", "bits_per_character"} on a prepared folder: the loss that the phase
    is validated on, over so many rows, all there are (train.py logs it over some of them); and that
    of its held-out text, which tells how much later phases forget. A loss without data is left out.
    With another vocabulary or image format it prints why and returns {}."""
    model, saved = loaded.model, loaded.checkpoint
    words_alone = model.projector is None
    if model.gpt is None:  # a tower
        return {}
    split = saved["validates_on"]["split"]
    kind = getattr(batches, saved["validates_on"]["batches"])
    other_images = not words_alone and checkpoint.has_other_images(saved, dataset)
    if checkpoint.has_other_vocabulary(saved, dataset) or other_images:
        print(
            f"no validation loss: {dataset.directory} has another vocabulary or other pictures "
            "than the data this checkpoint was trained on"
        )
        return {}
    found = text_losses(model, dataset)
    if words_alone:
        return found
    bits = {name: value for name, value in found.items() if name == "bits_per_character"}
    if not dataset.count(split, kind.BIN):
        print(f"no validation loss: {dataset.directory} has nothing to validate this model on")
        return bits
    stored = features.open_stored(dataset, split, model)
    truncate = saved["settings"].get("truncate", False)
    samples = kind(dataset, split, 64, 0, model, stored, truncate)
    loss = validation.val_loss(model, samples, dataset.image_format)
    return {"val_loss": loss, "val_rows": samples.rows} | bits


def text_losses(model, dataset):
    """{"val_loss", "val_rows", "bits_per_character"} of a model on held-out text; without bits, and
    a
    printed reason, for words that are not in the vocabulary; {} without text."""
    if not dataset.count("val", "text"):
        print(f"no bits per character: {dataset.directory} has no text to validate on")
        return {}
    text = batches.TextBatches(dataset, "val", 16, 0, model)
    loss = validation.val_loss(model, text, dataset.image_format)
    if dataset.tokenizer.kind == "word":
        unknown = dataset.tokenizer.words["<unk>"]
        count = int((dataset.open("val", "text") == unknown).sum())
        if count:  # a guessed <unk> would count as a guessed word
            print(f"no bits per character: {count:,} words of val are not in the vocabulary")
            return {"val_loss": loss, "val_rows": text.rows}
    counts = dataset.meta["splits"]["val"]
    tokens_per_character = counts["text"] / counts["characters"]
    # nats per token x tokens per character = nats per character; / ln 2 = bits
    bits = loss * tokens_per_character / math.log(2)
    return {"val_loss": loss, "val_rows": text.rows, "bits_per_character": bits}


def choose_files(settings, folder, sees):
    """[(key of its results, test, path of its file)] of the tests that were asked for. Raises
    UserError."""
    tests = Path(settings.json or folder / "eval")
    if settings.task == "toolbox":
        return find_tests(tests)
    if settings.task:
        suffix = TASKS[settings.task].suffix
        path = Path(settings.csv or tests / f"{settings.task}.{suffix}")
        if settings.json and settings.task in TESTS:
            path = next((p for _, test, p in find_tests(tests) if test == settings.task), path)
        return [(settings.task, settings.task, path)]
    if published_folders(settings):  # they alone were asked for
        return []
    paths = {name: tests / f"{name}.{task.suffix}" for name, task in TASKS.items()}
    return [(name, name, path) for name, path in paths.items() if sees and path.exists()]


PUBLISHED_FOLDERS = ("zorro", "swap", "mnist", "countbench")  # options that name published files


def published_folders(settings):
    """[(option, folder)] of the options that name a folder of published test files."""
    found = [(name, getattr(settings, name)) for name in PUBLISHED_FOLDERS]
    return [(name, folder) for name, folder in found if folder]


def needs_folder(settings, folder):
    """Whether a prepared folder is opened: not for the file of one test, nor for other people's
    folders if the checkpoint's own is not here."""
    if settings.csv or settings.json:
        return False
    alone = published_folders(settings)
    return not alone or bool(settings.data) or (folder / "meta.json").exists()


def run_published(loaded, settings):
    """{test: {"all": {measure: result}}} of the folders that --zorro, --swap, --mnist and
    --countbench name; of the first two together also "language", EgoBabyVLM's means."""
    tasks = {}
    if settings.zorro:
        tasks["zorro"] = zorro(settings.zorro, loaded, settings.batch)
    if settings.swap:
        tasks["swap"] = run_swap(settings.swap, loaded, settings.batch)
    if settings.zorro and settings.swap:
        means = language_scores(tasks["zorro"]["all"], tasks["swap"]["all"])
        tasks |= {"language": {"all": means}} if means else {}
    for name in ("mnist", "countbench"):
        if getattr(settings, name):
            tasks[name] = probes.probe(name, getattr(settings, name), loaded)
    return tasks


def evaluate(loaded, settings):
    """(results, a dict {"tasks": {...}, "val_loss": ..., ...}; {test: tasks.Report}).
    Raises UserError."""
    sees, saved = loaded.model.projector is not None, loaded.checkpoint
    check_options(settings, sees)
    folder = Path(settings.data or saved["settings"]["data"])
    dataset = Data(folder) if needs_folder(settings, folder) else None
    published = published_folders(settings)
    given = [settings.csv, settings.json, *(folder for _, folder in published)]
    given = ", ".join(path for path in given if path)
    results = {
        "checkpoint": str(settings.checkpoint),
        "digest": vision.weights_digest(loaded.model.state_dict()),
        "phase": saved["phase"],
        "trained_on": saved["source"],
        "corpus": saved["corpus"],
        "data": given or str(folder),
        "source": given,
        "csv": settings.csv,
        "shuffled": settings.shuffle,
        "ties": settings.ties,
        "parse": settings.parse,
        "tasks": {},
    }
    results["tasks"] |= run_published(loaded, settings)
    pairs = folder / "eval" / "grammar"  # of the toy world's own grammar
    if dataset and not settings.task and not published and pairs.is_dir():
        results["tasks"]["grammar"] = zorro(pairs, loaded, settings.batch)
    if dataset:
        results["source"] = dataset.meta["source"]
    if dataset and not settings.shuffle:  # only the tests' pictures are shuffled
        results |= losses(loaded, dataset)
    reports = {}
    for key, name, path in choose_files(settings, folder, sees):
        images = settings.images or [path.parent / "images"]
        images = [directory for directory in images if settings.images or directory.exists()]
        if key != name or settings.task == "toolbox":
            print(f"{key}: {path}")
        reports[key] = run_task(name, path, images, loaded, settings)
        results["tasks"][key] = reports[key].results
    results["tasks"] |= toolbox.overall(results["tasks"])
    entries = {key: report.board for key, report in reports.items() if report.board}
    results["board"] = {name: own for name, own in entries.items() if name in BOARD}
    return results, reports


def hits_of(results, reports):
    """{test: {"items": digest, "hits": {subset: {measure: of each item}}}}, for comparing runs."""
    found = {}
    for test, one in reports.items():
        measures = {
            subset: {name: result.hits for name, result in own.items() if hasattr(result, "hits")}
            for subset, own in results["tasks"][test].items()
        }
        found[test] = {"items": one.items, "hits": measures}
    return found


def page_tests(results, reports, loaded):
    """The page.Tests of results."""
    tasks = results["tasks"]
    facts = {
        "checkpoint": f"{results['checkpoint']} ({results['phase']})",
        "parameters": f"{sum(p.numel() for p in loaded.model.parameters()):,}",
        "tested on": results["data"],
        "tested": time.strftime("%Y-%m-%d %H:%M"),
    }
    if "val_loss" in results:
        rows = f"of all {results['val_rows']:,} held-out rows"
        facts["validation loss"] = f"{results['val_loss']:.3f}, {rows} (the curve: of fewer)"
    if "bits_per_character" in results:
        facts["held-out text"] = f"{results['bits_per_character']:.3f} bits per character"
    notes = list(report.marks(tasks))
    if not tasks:
        notes.append(f"No tests: there are none in {results['data']}/eval.")
    if results["shuffled"]:
        notes.append(
            "Pictures were shuffled: these are no results, but a check that nothing is above "
            "chance. Winoground falls below it: its chance is that of scores in random order, and "
            "here one caption, or one picture, is preferred in both comparisons."
        )
    return page.Tests(
        tiles=report.tiles_of(tasks),
        groups=report.groups_of(tasks),
        captions=[one for found in reports.values() for one in found.captions],
        attention=next((found.attention for found in reports.values() if found.attention), None),
        facts=facts,
        rows=[report.HEADER, *report.rows_of(tasks)],
        notes=notes,
    )


def write(results, reports, loaded, out, task):
    """Write results.json, hits.json, report.html, captions.png, toolbox.png, and scores.json if all
    tests of the leaderboard were run, to the folder `out`; returns their names, which say if one
    task was run alone, pictures were shuffled, ties were counted or answers were read as
    published."""
    how = "_shuffled" if results["shuffled"] else ""
    how += "_published_ties" if results["ties"] == "published" else ""
    board_suffix = how  # scores.json has its own rules of reading
    how += "_published" if results["parse"] == "published" else ""
    suffix = (f"_{task}" if task else "") + how
    names = [f"results{suffix}.json", f"hits{suffix}.json", f"report{suffix}.html"]
    remove_leftovers(out)
    write_json(out / names[0], results)
    write_json(out / names[1], hits_of(results, reports))
    tests = page_tests(results, reports, loaded)
    with writing(out / names[2]) as file:
        file.write(page.render(out, results["source"], tests).encode("utf-8"))
    examples = [example for one in reports.values() for example in one.examples]
    drawn = {
        "captions": sheets.contact_sheet(tests.captions) if tests.captions else None,
        "toolbox": sheets.example_sheet(examples) if examples else None,
    }
    for name, sheet in drawn.items():
        if sheet:
            names.append(f"{name}{how}.png")
            with writing(out / names[-1]) as file:
                sheet.save(file, "PNG")
    if len(results["board"]) == len(BOARD):
        names.append(f"scores{board_suffix}.json")
        board.write(out / names[-1], results["board"])
    return names


def print_beside_the_paper(results, loaded, out):
    """Print the paper's table with this checkpoint's row: its scores on the files given by --csv,
    now and in earlier calls."""
    tasks, files = {}, []
    for path in sorted(out.glob("results_*.json")):
        other = read_json(path)
        same = all(other.get(key) == results[key] for key in ("digest", "shuffled", "ties"))
        if same and other.get("csv"):
            tasks |= other["tasks"]
            files.append(other["csv"])
    name = f"this one, trained on {loaded.checkpoint['settings']['data']}"
    print(*report.beside_the_paper(tasks, name), sep="\n")
    print(f"this one's on {', '.join(files)}")


def main(argv):
    settings = config.load(Config, argv, __doc__)
    if settings.compare:
        return compare.main(settings.compare, settings.out)
    if settings.task not in TASKS:  # a test of the Toolbox under its published name
        settings.task = known_name(settings.task) or settings.task
    device = checkpoint.choose_device(settings.device)
    torch.set_float32_matmul_precision("highest")  # training on a GPU may have lowered it
    loaded = inference.open_model(settings.checkpoint, device, settings.dtype)
    if loaded.model.gpt is None and not (settings.mnist or settings.countbench):
        raise UserError(
            f"{settings.checkpoint}: a tower alone; train.py logs its linear probes, and --mnist "
            "and --countbench run others"
        )
    if loaded.model.gpt is None and (settings.zorro or settings.swap):
        raise UserError(
            f"{settings.checkpoint}: a tower alone knows no words for --zorro or --swap"
        )
    if loaded.model.tower is None and (settings.mnist or settings.countbench):
        raise UserError(f"{settings.checkpoint} has no tower: --mnist and --countbench probe one")
    results, reports = evaluate(loaded, settings)
    out = Path(settings.out or Path(settings.checkpoint).parent)
    tests = [settings.task] if settings.task else [name for name, _ in published_folders(settings)]
    names = write(results, reports, loaded, out, "_".join(tests))
    if results["tasks"]:
        print(*report.table(results["tasks"]), sep="\n")
    else:
        why = f"there are none in {results['data']}/eval"
        if loaded.model.tower is None:
            why = f"{settings.checkpoint} cannot see; bits_per_character compares language models"
        print(f"no tests: {why}")
    if results["board"] and (settings.scores or len(results["board"]) == len(BOARD)):
        print("", *board.table(results["board"]), "", sep="\n")
    if settings.scores:
        board.write(settings.scores, results["board"])
        print(f"written: {settings.scores}, of {len(results['board'])} of {len(BOARD)} tests")
    if settings.csv and TASKS[settings.task].published:
        print_beside_the_paper(results, loaded, out)
    if "val_loss" in results:
        print(f"val_loss {results['val_loss']:.4f} (of all {results['val_rows']:,} held-out rows)")
    if "bits_per_character" in results:
        print(f"bits_per_character {results['bits_per_character']:.4f}")
    print(f"written: {out}/{', '.join(names)}")


if __name__ == "__main__":
    config.run(main)
