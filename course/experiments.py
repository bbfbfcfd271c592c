"""
The experiments of the course. Each trains a few settings with several seeds and prints a table.

    python course/experiments.py                         # the list
    python course/experiments.py phases                  # seeds 1, 2, 3
    python course/experiments.py phases --seeds 1        # faster, without an interval
    python course/experiments.py phases --write          # the table into its chapter

A cell is the mean over seeds and half the width of its 95 % interval (Student's t). A star marks a
cell that differs from the first row's: the interval of the differences, seed by seed, does not
contain 0. Runs are written to out/course, and finished runs are not repeated. Most experiments use
the same tower and GPT for each seed, which the first experiment trains.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import config
from common.files import read_csv, read_json, read_log, writing
from config import UserError
from tasks.scores import lowest, wilson

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
RUNS = Path("out/course")
DRAWN = []  # flags for every toy world that is drawn
TALKS = {  # for data.py toy_chat: {name: flags}
    "toy_tiles": ["--canvases", "128x64", "64x128", "128x128"],
    "toy_flat": ["--fit", "squash"],
}
STUDENT = {  # t of 95 %, by the number of seeds
    2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262
}  # fmt: skip


@dataclass
class Config(config.Options):
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = config.option(600, low=1)  # of phase 2
    data: str = "data/toy"
    scenes: int = config.option(6000, low=8)  # of all data, for growth
    flags: tuple[str, ...] = ()  # for every training, without their dashes: n_layer=2
    workers: int = config.option(0, low=0, high=64)  # runs at a time; 0: one a core
    write: bool = False  # put the table into its chapter


# (heading, path in results.json)
COLUMNS = (
    ("val_loss", "val_loss"),
    ("Labeled-S, seen", "tasks.labeled_s.seen.accuracy.score"),
    ("held-out", "tasks.labeled_s.held_out.accuracy.score"),
    ("binding", "tasks.baby_winoground.binding.group.score"),
    ("position", "tasks.baby_winoground.position.group.score"),
    ("captions, seen", "tasks.caption.seen.names_thing.score"),
    ("held-out", "tasks.caption.held_out.names_thing.score"),
)


def look_up(results, path):
    """The value at a path such as "tasks.vtwt.all"; None if there is none."""
    for key in path.split("."):
        results = results.get(key) if results else None
    return results


def cell(values):
    """Mean and half the width of the 95 % interval; of a single value the value."""
    if len(values) == 1:
        return f"{float(values[0]):.3f}"
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def interval(values):
    """(mean, half the width of its 95 % interval) of several values, by Student's t."""
    values = [float(value) for value in values]
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, STUDENT[len(values)] * deviation / math.sqrt(len(values))


def differ(values, others):
    """Whether the interval of the differences, seed by seed, does not contain 0."""
    if len(values) == 1:
        return False
    mean, half = interval([a - b for a, b in zip(values, others)])
    return abs(mean) > half + 1e-9


# ---------------------------------------------------------------------------------------------
# Running

RUNNING = {"workers": 1}  # how many runs at a time; main() sets it
LOCKS = defaultdict(threading.Lock)  # {folder of a run: its lock}


def launch(script, *arguments, before=""):
    """Run one of our scripts. before: Python that changes the code first, as a reader would in an
    editor."""
    command = [sys.executable, str(ROOT / script)]
    if before:
        head = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(COURSE)!r}]; {before}; "
        run = f"import {script.removesuffix('.py')} as script; script.main(sys.argv[1:])"
        command = [sys.executable, "-c", head + run]
    threads = str(max(1, (os.cpu_count() or 1) // RUNNING["workers"]))
    done = subprocess.run(
        [*command, *arguments], text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{script} {' '.join(arguments)}: {done.stderr[-300:].strip()}")
    return done.stdout


def side_by_side(function, items):
    """The list of function(item), several at a time."""
    if RUNNING["workers"] == 1:
        return list(map(function, items))
    with ThreadPoolExecutor(RUNNING["workers"]) as pool:
        return list(pool.map(function, items))


def train(settings, out, seed, *flags, before="", recipe="toy.py"):
    """Train by a config, unless the same is done already. flags: with their dashes."""
    done = out / "done.json"
    asked = [recipe, *flags, *settings.flags, before, settings.data]
    with LOCKS[out]:  # two rows of a table may need the same run
        if done.exists() and read_json(done) == asked:
            return
        shutil.rmtree(out, ignore_errors=True)
        fixed = [f"--data={settings.data}", f"--out={out}", f"--seed={seed}"]
        own = [f"--{flag}" for flag in settings.flags]
        print(f"{out}: training", file=sys.stderr)
        began = time.perf_counter()
        launch("train.py", str(ROOT / "configs" / recipe), *fixed, *flags, *own, before=before)
        print(f"{out}: done in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        done.write_text(json.dumps(asked))


def parents(settings, seed, vision=(), language=(), before=""):
    """A folder with the tower and the GPT of a seed. vision, language: flags for them."""
    parts = {}
    for phase, flags in (("vision", vision), ("language", language)):
        name = re.sub(r"\W+", "_", "".join(flags) + (before if phase == "vision" else ""))
        parts[phase] = RUNS / f"{phase}{name}" / str(seed)
        change = before if phase == "vision" else ""
        train(settings, parts[phase], seed, f"--phase={phase}", *flags, before=change)
    folder = RUNS / "_".join(part.parent.name for part in parts.values()) / str(seed)
    with LOCKS[folder]:
        folder.mkdir(parents=True, exist_ok=True)
        for phase, part in parts.items():
            with writing(folder / f"{phase}.pt") as file:  # whole, while others read it
                file.write((part / f"{phase}.pt").read_bytes())
    return folder


def later(settings, name, seed, *flags, init=None, before=""):
    """Train phases 1 and 2 and test. Returns the run's folder."""
    out = RUNS / name / str(seed)
    init = init or parents(settings, seed)
    steps = f"--phase2_steps={settings.steps}"  # a later flag wins
    train(settings, out, seed, f"--init={init}", steps, *flags, before=before)
    return out


def compare(settings, rows, columns=COLUMNS):
    """The table of runs of phases 1 and 2. rows: {label: how(seed), the run's folder}."""
    lines, first = [["", *(name for name, _ in columns)]], None
    pairs = [(label, seed) for label in rows for seed in settings.seeds]
    folders = side_by_side(lambda pair: rows[pair[0]](pair[1]), pairs)
    by_row = {pair: read_results(folder) for pair, folder in zip(pairs, folders)}
    for label in rows:
        found = [by_row[label, seed] for seed in settings.seeds]
        # a GPT that cannot see has the score of one test alone
        values = [[look_up(one, path) for one in found] for _, path in columns]
        first = first or values
        lines.append([label, *map(cell_beside, values, first)])
    return lines


def cell_beside(values, first):
    """The cell of values, with a star if they differ from those of the first row."""
    if None in values:
        return "-"
    return cell(values) + (" *" if differ(values, first) else "")


def read_results(folder):
    """What eval.py has written; with --shuffle or --ties the file has another name."""
    (path,) = folder.glob("results*.json")
    return read_json(path)


def as_it_is(settings):
    return lambda seed: later(settings, "as_it_is", seed)


# ---------------------------------------------------------------------------------------------
# The experiments: each gives the lines of its table


def speech(settings):
    """Chapter 0. How often speech names what is in view (10,000 sentences, 5,000 scenes)."""
    from sources import toy

    rng, named, said = np.random.RandomState(0), 0, {}
    for _ in range(5000):
        scene = toy.random_scene(rng, toy.THINGS)
        for _ in range(2):
            words = set(toy.utterance(scene, rng).split())
            here = {thing.kind for thing in scene.things}
            named += bool(words & here)
            for kind in words & set(toy.THINGS):
                said[kind] = said.get(kind, 0) + 1
    counts = sorted(said.values())
    return [
        ["share of 10,000 sentences", ""],
        ["name a thing that is in view", f"{named / 1e4:.3f}"],
        ["name the rarest thing", f"{counts[0] / 1e4:.4f}"],
        ["name the most frequent thing", f"{counts[-1] / 1e4:.4f}"],
    ]


def words(settings):
    """Chapter 1. A language model after more and fewer steps."""
    lines = [["steps", "val_loss, nats a token", "bits per character"]]

    def results(steps, seed):
        parents(settings, seed, language=(f"--language_steps={steps}",))
        out = RUNS / f"language_language_steps_{steps}" / str(seed)
        launch("eval.py", f"--checkpoint={out}/language.pt", f"--data={settings.data}")
        return read_json(out / "results.json")

    for steps in (25, 75, 300):
        values = side_by_side(lambda seed, steps=steps: results(steps, seed), settings.seeds)
        row = [cell([one[key] for one in values]) for key in ("val_loss", "bits_per_character")]
        lines.append([str(steps), *row])
    return lines


def seeing(settings):
    """Chapter 2. The tower's linear probes."""
    lines = [["tower", "kind (chance 0.06)", "colour (0.13)"]]
    no_colours = "import dino; dino.recolour = lambda pixels, numbers, grey=0.4: pixels"
    for label, flags, before in (
        ("as initialised (one step)", ("--vision_steps=1",), ""),
        ("250 steps", ("--vision_steps=250",), ""),
        ("1,000 steps", (), ""),
        ("1,000 steps, without changes of colour", (), no_colours),
    ):

        def probe(seed, flags=flags, before=before):
            folder = parents(settings, seed, vision=flags, before=before)
            name = folder.parent.name.removesuffix("_language")
            log = read_log(RUNS / name / str(seed) / "log.jsonl")
            return [line for line in log if "kind" in line][-1]

        values = side_by_side(probe, settings.seeds)
        lines.append([label, *(cell([one[key] for one in values]) for key in ("kind", "colour"))])
    return lines


def projector(settings):
    """Chapter 3. Projectors, on the same tower and GPT."""

    def of(kind, *flags, before=""):
        return lambda seed: later(
            settings, kind, seed, f"--projector={kind}", *flags, before=before
        )

    return compare(settings, {
        "linear": of("linear"),
        "mlp2x_gelu (the default)": as_it_is(settings),
        "mlp4x_gelu": of("mlp4x_gelu"),
        "16 learnt queries (course/resampler.py)": of(
            "resampler16", "--image_pool=1", before="import resampler"
        ),
    })  # fmt: skip


def phases(settings):
    """Chapter 4. What is left out."""

    def random_gpt(seed):
        init = parents(settings, seed, language=("--language_steps=1",))
        return later(settings, "random_gpt", seed, init=init)

    return compare(settings, {
        "as it is": as_it_is(settings),
        "without phase 1 (one step)": lambda seed: later(
            settings, "no_phase1", seed, "--phase1_steps=1"
        ),
        "without phase 2 (one step)": lambda seed: later(
            settings, "no_phase2", seed, "--phase2_steps=1"
        ),
        "a GPT that never read (one step)": random_gpt,
    })  # fmt: skip


def asking(settings):
    """Chapter 5. One model, and a broken one, asked in several ways."""

    def asked(name, *flags, is_broken=False):
        def run(seed):
            model, out = as_it_is(settings)(seed) / "phase2.pt", RUNS / name / str(seed)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            if is_broken:
                model = broken(model, out / "broken.pt")
            data = f"--data={settings.data}"
            launch("eval.py", f"--checkpoint={model}", data, f"--out={out}", *flags)
            return out

        return run

    vtwt = [("VTWT, seen", "tasks.vtwt.seen.accuracy.score"),
            ("held-out", "tasks.vtwt.held_out.accuracy.score")]  # fmt: skip
    return compare(settings, {
        "right pictures": as_it_is(settings),
        "random pictures": asked("asked_shuffled", "--shuffle=True"),
        "no pictures (the GPT of phase 0)": lambda seed: without_pictures(settings, seed),
        "after phase 1 only (phase 2 of one step)": lambda seed: later(
            settings, "no_phase2", seed, "--phase2_steps=1"
        ),
        "a broken model (all logits 0)": asked("asked_broken", is_broken=True),
        "the same, ties as in the published code": asked(
            "asked_published", "--ties=published", is_broken=True
        ),
    }, [*COLUMNS[1:3], *vtwt, *COLUMNS[3:6]])  # fmt: skip


def without_pictures(settings, seed):
    """Ask the GPT of phase 0 which phrase of VTWT is more likely after <eos>. Returns a folder with
    results.json."""
    import inference

    loaded = inference.open_model(parents(settings, seed) / "language.pt", dtype="float32")
    tokenizer, hits = loaded.tokenizer, {}
    names = ("positive_phrase", "negative_phrase")
    for row in read_csv(Path(settings.data) / "eval/vtwt.csv", (*names, "subset")):
        phrases = [tokenizer.encode(row[name]) for name in names]
        scores = inference.nll_after(loaded, [[tokenizer.eos]] * 2, None, phrases)
        hits.setdefault(row["subset"], []).append(lowest(scores, 0, "fair"))
    out = RUNS / "asked_without_pictures" / str(seed)
    out.mkdir(parents=True, exist_ok=True)
    found = {name: {"accuracy": {"score": sum(own) / len(own)}} for name, own in hits.items()}
    (out / "results.json").write_text(json.dumps({"tasks": {"vtwt": found}}))
    return out


def broken(model, path):
    """Write a checkpoint whose logits are all 0, so that all answers are equally likely."""
    import checkpoint

    content = checkpoint.read(model)
    content["weights"]["gpt.embed_tokens.weight"].zero_()  # also the output layer
    checkpoint.save(path, content)
    return path


def moved_by_attention(T, D):
    """How many numbers attention reads and writes: (by formula, by kernel). T positions, one head
    of D numbers. By formula each operation reads its inputs and writes its result."""
    vectors, scores = T * D, T * T
    product = 2 * vectors + scores  # q, k read; scores written
    scale = mask = softmax = 2 * scores
    mean = scores + 2 * vectors  # weights, v read; y written
    return product + scale + mask + softmax + mean, 4 * vectors  # kernel: q, k, v read, y written


def moved_by_norm(T, C):
    """The same for RMSNorm of T vectors of C numbers."""
    square, mean, epsilon, rsqrt = 2 * T * C, T * C + T, 2 * T, 2 * T
    times_rsqrt, times_weight = 2 * T * C + T, 2 * T * C + C
    formula = square + mean + epsilon + rsqrt + times_rsqrt + times_weight
    return formula, 2 * T * C + C


def kernels(settings):
    """Chapter 6. Formula and kernel, in Triton's interpreter, fp32; numbers moved, one head."""
    from importlib import util

    if not util.find_spec("triton"):
        raise UserError("this experiment needs Triton, which is for Linux only")
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, kernels\n"
        "torch.manual_seed(0)\n"
        "for T in (16, 64, 100):\n"
        "    q, k, v = torch.randn(3, 1, T, 1, 32)\n"
        "    a = kernels.attention_reference(q, k, v)\n"
        "    b = kernels.attention(q, k, v, backend='triton')\n"
        "    print('attention', T, float((a - b).abs().max()))\n"
        "    x, w = torch.randn(T, 100), torch.randn(100)\n"
        "    a = kernels.rms_norm_reference(x, w, 1e-5)\n"
        "    b = kernels.rms_norm(x, w, 1e-5, backend='triton')\n"
        "    print('RMSNorm', T, float((a - b).abs().max()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], text=True, capture_output=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    if done.returncode:
        raise UserError(done.stderr[-300:])
    lines = [["", "positions", "largest difference", "numbers moved, formula", "kernel"]]
    for line in done.stdout.splitlines():
        name, T, far = line.split()
        T = int(T)
        moved = moved_by_attention(T, 32) if name == "attention" else moved_by_norm(T, 100)
        lines.append([name, str(T), f"{float(far):.1e}", *(f"{count:,}" for count in moved)])
    return lines


def tiles(settings):
    """Chapter 7. Questions about large and small pictures, with tiles and without."""
    names = {"without tiles": "toy_flat", "with tiles": "toy_tiles"}
    lines, found = [["asked about", *names]], {}
    for label, data in names.items():
        if not Path("data", data, "meta.json").exists():
            launch("data.py", "toy_chat", "--name", data, *TALKS[data])

        def scores_of(seed, data=data):
            start, out = as_it_is(settings)(seed) / "phase2.pt", RUNS / data / str(seed)
            flags = [f"--data=data/{data}", f"--init={start}", f"--phase3_steps={settings.steps}"]
            train(settings, out, seed, *flags, recipe="toy_next.py")
            launch("eval.py", f"--checkpoint={out}/phase3.pt", "--task=choice")
            return read_json(out / "results_choice.json")["tasks"]["choice"]

        for tasks in side_by_side(scores_of, settings.seeds):
            for subset, measures in tasks.items():
                scores = found.setdefault(subset, {}).setdefault(label, [])
                scores.append(measures["likelihood"]["score"])
    for subset, values in found.items():
        first = values["without tiles"]
        lines.append([subset.replace("_", " "), *(cell_beside(values[n], first) for n in names)])
    return lines


def processes(settings):
    """Chapter 8. The language model, 30 steps: one process, two, and two micro-batches."""
    import checkpoint

    lines, first = [["", "largest difference of a weight", "seconds"]], None
    for label, before, flags in (
        ("one process", [], []),
        ("two processes", ["-m", "torch.distributed.run", "--nproc_per_node=2"], []),
        ("one process, two micro-batches", [], ["--grad_accum=2"]),
    ):
        out = RUNS / re.sub(r"\W+", "_", label)
        shutil.rmtree(out, ignore_errors=True)
        own = [f"--{flag}" for flag in settings.flags]
        command = [sys.executable, *before, str(ROOT / "train.py"), str(ROOT / "configs/toy.py")]
        command += [f"--data={settings.data}", f"--out={out}", "--phase=language"]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "--language_steps=30", *flags, *own], text=True, capture_output=True
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise UserError(done.stderr[-300:])
        weights = checkpoint.read(out / "language.pt")["weights"]
        first = first or weights
        far = max(float((weights[name] - first[name]).abs().max()) for name in weights)
        lines.append([label, f"{far:.1e}", f"{seconds:.1f}"])
    return lines


def towers(settings):
    """Chapter 9. A tower as initialised; with the time that DINO takes given to phase 2."""

    def blank(seed):
        return parents(settings, seed, vision=("--vision_steps=1",))

    # 1,000 steps of DINO take at least as long as 1,500 of phase 2: by the times in log.jsonl one
    # takes 1.6 to 1.8 times as long as the other
    more = f"--phase2_steps={settings.steps * 7 // 2}"
    return compare(settings, {
        "DINO, 1,000 steps": as_it_is(settings),
        "as initialised": lambda seed: later(settings, "blank", seed, init=blank(seed)),
        "as initialised, 3.5 times as many steps of phase 2": lambda seed: later(
            settings, "blank_longer", seed, more, init=blank(seed)
        ),
    })  # fmt: skip


def attention(settings):
    """Chapter 9. Image tokens that see one another."""
    return compare(settings, {
        "causal (the default)": as_it_is(settings),
        "full among the tokens of a picture": lambda seed: later(
            settings, "full_attention", seed, "--image_attention=full"
        ),
    })  # fmt: skip


def drawn(settings, name, *flags):
    """data/NAME, drawn if it is not there."""
    if not Path("data", name, "meta.json").exists():
        launch("data.py", "toy", "--name", name, *DRAWN, *flags)
    return f"--data=data/{name}"


def captions(settings):
    """Chapter 9. Captions per picture; the number of steps is the same. Without val_loss, because
    the data for validation differ too."""

    def of(count):
        data = drawn(settings, f"toy_captions{count}", "--captions", str(count))
        return lambda seed: later(settings, f"captions{count}", seed, data)

    return compare(settings, {
        "one caption a picture": of(1),
        "two (the default)": as_it_is(settings),
        "four": of(4),
    }, COLUMNS[1:])  # fmt: skip


def shuffled(settings):
    """Chapter 9. Training with wrong pictures: what can words alone teach?"""
    source, target = Path(settings.data), Path(f"{settings.data}_shuffled")
    parents(settings, settings.seeds[0])  # also draws data/toy if it is missing
    if not (target / "meta.json").exists():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("features", "meta.json"))
        ids = np.fromfile(target / "train_image_ids.bin", np.int32)
        np.random.RandomState(0).permutation(ids).tofile(target / "train_image_ids.bin")
        shutil.copy(source / "meta.json", target)  # last: the folder is whole
    return compare(settings, {
        "right pictures": as_it_is(settings),
        "shuffled in training": lambda seed: later(
            settings, "shuffled", seed, f"--data={target}"
        ),
    })  # fmt: skip


def growth(settings):
    """Chapter 9. Phases 1 and 2 on shares of the scenes, with the same number of passes; and the
    share at which each word is learnt: from there on its interval in Labeled-S is above
    chance."""
    columns = COLUMNS[1:]  # without val_loss, because the data for validation differ too
    shares, lines = (1, 2, 4, 8), [["", *(name for name, _ in columns)]]
    scores = {}  # {word: [(hits, items) at each share]}
    for share in shares:
        scenes = settings.scenes * share // 8
        data = drawn(settings, f"toy_scenes{scenes}", "--scenes", str(scenes))
        steps = f"--phase2_steps={max(1, settings.steps * 3 * share // 8)}"

        def run(seed, name=f"grown_{share}of8", data=data, steps=steps):
            return later(settings, name, seed, data, steps)

        runs = side_by_side(run, settings.seeds)
        results = [read_json(run / "results.json") for run in runs]
        row = [cell([look_up(one, path) for one in results]) for _, path in columns]
        steps_taken = steps.partition("=")[2]
        lines.append([f"{share}/8 of the scenes, {steps_taken} steps", *row])
        for word, counts in word_scores(Path(data.removeprefix("--data=")), runs).items():
            scores.setdefault(word, []).append(counts)
    ages = {word: age(counts, shares) for word, counts in scores.items()}
    (RUNS / "growth.json").write_text(json.dumps({"scores": scores, "ages": ages}))
    words = [["learnt at", "words"]]
    for share in (*shares, None):
        of = ", ".join(word for word in ages if ages[word] == share)
        words.append([f"{share}/8" if share else "not at all", of or "none"])
    return [lines, words]


def word_scores(data, runs):
    """{word: (hits, items)} in Labeled-S. Hits are the mean over runs, because several answers to
    one item are not several items."""
    trials = read_csv(data / "eval/labeled_s.csv", ("trial_id", "target_category"))
    targets = {row["trial_id"]: row["target_category"] for row in trials}.values()
    found = dict.fromkeys(sorted(set(targets)), (0.0, 0))
    for run in runs:
        hits = read_json(run / "hits.json")["labeled_s"]["hits"]["all"]["accuracy"]
        for hit, word in zip(hits, targets):
            found[word] = found[word][0] + hit / len(runs), found[word][1] + 1 / len(runs)
    return {word: (round(hits, 9), round(items)) for word, (hits, items) in found.items()}


def age(counts, shares):
    """The first share from which on a word's interval lies above chance, 1/4; None if none."""
    known = [wilson(*count)[0] > 0.25 for count in counts]
    return next((share for i, share in enumerate(shares) if all(known[i:])), None)


EXPERIMENTS = {  # {name: (its function, the chapter that has its table)}
    "speech": (speech, "0_world"),
    "words": (words, "1_words"),
    "seeing": (seeing, "2_seeing"),
    "projector": (projector, "3_projector"),
    "phases": (phases, "4_together"),
    "asking": (asking, "5_asking"),
    "kernels": (kernels, "6_kernels"),
    "tiles": (tiles, "7_family"),
    "processes": (processes, "8_many"),
    "towers": (towers, "9_research"),
    "attention": (attention, "9_research"),
    "captions": (captions, "9_research"),
    "shuffled": (shuffled, "9_research"),
    "growth": (growth, "9_research"),
}


WITHOUT_SEEDS = {"speech", "kernels", "processes"}
WITHOUT_STEPS = {"words", "seeing", "growth"}  # the number of steps is in the rows


def as_markdown(lines):
    """A table, or several, from lists of cells."""
    if isinstance(lines[0][0], list):
        return "\n\n".join(map(as_markdown, lines))
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rows])


def write_table(name, chapter, text):
    """Put a table between its marks in a chapter."""
    path = COURSE / f"{chapter}.md"
    page = path.read_text(encoding="utf-8")
    marks = f"<!-- table: {name} -->\n", "<!-- end -->"
    begin = page.index(marks[0]) + len(marks[0])
    page = page[:begin] + text + "\n" + page[page.index(marks[1], begin) :]
    path.write_text(page, encoding="utf-8")


def main(argv):
    if not argv:
        for name, (function, _) in EXPERIMENTS.items():
            print(f"{name:<11} {' '.join(function.__doc__.split())}")
        return
    name, *flags = argv
    if name in ("-h", "--help"):
        name, flags = "speech", ["--help"]
    settings = config.load(Config, flags, __doc__)
    if name not in EXPERIMENTS:
        raise UserError(f"{name}: no such experiment; one of {', '.join(EXPERIMENTS)}")
    if not 1 <= len(settings.seeds) <= max(STUDENT):
        raise UserError(f"--seeds: {len(settings.seeds)} of them; 1 to {max(STUDENT)}")
    RUNNING["workers"] = settings.workers or os.cpu_count() or 1
    function, chapter = EXPERIMENTS[name]
    began = time.perf_counter()
    text = as_markdown(function(settings))
    version, day = torch.__version__.partition("+")[0], time.strftime("%Y-%m-%d")
    how = f"Seeds {', '.join(map(str, settings.seeds))}; " if name not in WITHOUT_SEEDS else ""
    if name not in WITHOUT_SEEDS | WITHOUT_STEPS:
        how += f"{settings.steps:,} steps of phase {3 if name == 'tiles' else 2}; "
    minutes = (time.perf_counter() - began) / 60
    text += f"\n\n{how}torch {version}, {day}."
    print(text)
    print(f"({minutes:.0f} minutes)")
    if settings.write:
        write_table(name, chapter, text)


if __name__ == "__main__":
    config.run(main)
