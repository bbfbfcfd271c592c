"""
For the EgoBabyVLM challenge: a checkpoint as a folder for its evaluation launcher, and the row of
its leaderboard.

    python export.py out/ego/phase2.pt DIR --to egobabyvlm
    python export.py out/seed1 out/seed2 out/seed3 ROW.json --row --name my-model --team Me

DIR has nano.py (egobabyvlm.py of this folder), checkpoint.pt, nanobabyllava/, the language model as
a folder for transformers, language/, and configs/nano_image.yaml, nano_pairs.yaml, nano_words.yaml.

A row is made of the results of three seeds or more: folders with the results*.json that eval.py
wrote for one checkpoint each (--out). Of Machine-DevBench, Zorro and LT-Swap, what all seeds have;
"mean ± std" in percent, the sample standard deviation.
"""

import statistics
from pathlib import Path

import checkpoint
from adapters import submission
from common.files import read_json, write_json, writing
from config import UserError

CONFIGS = {
    "nano_image": {"target": "nano.NanoImage", "pooling": "cls", "last_n_layers": "1"},
    "nano_pairs": {"target": "nano.NanoPairs"},
    "nano_words": {"target": "apps.baselines.lm_training.eval.FastAutoCausalLM"},
}
MULTIMODAL = ("lexical", "grammatical", "overall")
LANGUAGE = ("syntax", "semantics", "overall")


def write(source, folder, export_language):
    """Write the folder of a checkpoint file. export_language(loaded, folder): writes a language
    model for transformers. Yields lines to print. Raises UserError."""
    loaded, folder = checkpoint.load(source), Path(folder).resolve()
    if loaded.model.gpt is None:
        raise UserError(f"{source}: a tower alone; give phase 1 or later, or language.pt")
    submission.write_code(loaded, folder)
    submission.copy_adapter("egobabyvlm.py", folder / "nano.py")
    export_language(loaded, folder / "language")
    sees = loaded.model.projector is not None
    names = [name for name in CONFIGS if sees or name == "nano_words"]
    for name in names:
        own = dict(CONFIGS[name])
        lines = [f"_target_: {own.pop('target')}", f"name: {name}", "kwargs:"]
        key = "pretrained" if name == "nano_words" else "checkpoint"
        path = folder / "language" if name == "nano_words" else folder
        lines += [f'  {key}: "{path}"', *(f"  {option}: {value}" for option, value in own.items())]
        with writing(folder / "configs" / f"{name}.yaml") as file:
            file.write(("\n".join(lines) + "\n").encode("utf-8"))
    yield f"{folder}: {source}, for EgoBabyVLM's launcher: {', '.join(names)}"
    yield f"it saw {submission.describe_corpora(loaded.checkpoint)}"
    if any(one["source"] != "babyview" for one in checkpoint.corpora_of(loaded.checkpoint)):
        yield "not BabyView alone: by the challenge's rules such a run is disqualified"
    yield f"to do: PYTHONPATH={folder}; copy configs/ to evaluation/configs/model"


def read_results(folder):
    """(tasks, phase, digest) of the results*.json in a folder. Raises UserError."""
    tasks, digest, phase = {}, None, ""
    for path in sorted(Path(folder).glob("results*.json")):
        content = read_json(path)
        if digest not in (None, content["digest"]):
            raise UserError(
                f"{folder}: results of two checkpoints; evaluate each with its own --out"
            )
        digest, phase = content["digest"], content["phase"]
        tasks |= content["tasks"]
    if digest is None:
        raise UserError(f"{folder}: no results*.json; eval.py --out {folder} writes it")
    return tasks, phase, digest


def spread(scores):
    """ "mean ± std" in percent."""
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def make_row(folders, name, team):
    """The entry of the leaderboard from the results of several seeds. Raises UserError."""
    if len(folders) < 3:
        raise UserError(f"{len(folders)} seeds: the challenge wants three or more")
    seeds = [read_results(folder) for folder in folders]
    if len({digest for *_, digest in seeds}) < len(seeds):
        raise UserError(f"{folders[0]}: two of the folders have results of the same checkpoint")
    of_all = lambda task: all(task in tasks for tasks, *_ in seeds)
    values = lambda task, measure: spread(
        [tasks[task]["all"][measure]["score"] for tasks, *_ in seeds]
    )
    row = {
        "id": name,
        "model": name,
        "team": team,
        "architecture": "generative",
        "training_data": "BabyView 2025.1",
        "category": "baseline",
        "n_seeds": len(seeds),
    }
    if of_all("machine_devbench"):
        row["multimodal"] = {part: values("machine_devbench", part) for part in MULTIMODAL}
    if of_all("language"):
        is_tuned = seeds[0][1] not in ("language", "phase1")
        parts = {part: values("language", part) for part in LANGUAGE}
        row["language"] = [{"encoder": "GPT", "ft": is_tuned, **parts}]
    if "multimodal" not in row and "language" not in row:
        want = "--task machine_devbench, or --zorro with --swap"
        raise UserError(f"{folders[0]}: no family that all seeds have; run eval.py {want}")
    return row


def write_row(folders, path, name, team):
    """Write the JSON of make_row(). Yields lines to print."""
    row = make_row(folders, name or Path(path).stem, team)
    write_json(path, row)
    yield f"{path}: {row['n_seeds']} seeds; check id, category and training_data before you send it"
