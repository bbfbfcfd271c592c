"""
For the EgoBabyVLM challenge: a checkpoint as a folder for its evaluation launcher, and the row of
its leaderboard.

    python export.py out/ego/phase2.pt DIR --to egobabyvlm
    python export.py out/seed1 out/seed2 out/seed3 my-model.json --row --team Me

DIR has nano.py (egobabyvlm.py of this folder), checkpoint.pt, nanobabyllava/, the language model as
a folder for transformers, language/, and configs/nano_image.yaml, nano_pairs.yaml, nano_words.yaml.

A row is made of the results of three seeds or more: folders with the results*.json that eval.py
wrote for one checkpoint each (--out). It contains the families that every seed was scored on:
Machine-DevBench; Zorro together with LT-Swap. "mean ± std" is in percent, with the sample standard
deviation.
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
    model for transformers. Raises UserError."""
    loaded, folder = checkpoint.load(source), Path(folder).resolve()
    if loaded.model.gpt is None:
        raise UserError(f"{source}: a tower alone; give phase 1 or later, or language.pt")
    submission.make_folder(folder)
    export_language(loaded, folder / "language")
    submission.write_code(loaded, folder)
    submission.copy_adapter("egobabyvlm.py", folder / "nano.py")
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
    print(f"{folder}: {source}, for EgoBabyVLM's launcher: {', '.join(names)}")
    print(f"it saw {submission.describe_corpora(loaded.checkpoint)}")
    warn_of_other_data(checkpoint.corpora_of(loaded.checkpoint))
    print(f"to do: PYTHONPATH={folder}; copy configs/ to evaluation/configs/model")


def warn_of_other_data(corpora):
    """Print a line for data that are not from `data.py babyview`, and one for foreign weights."""
    other = sorted({one["source"] for one in corpora if one["source"] != "babyview"})
    weights = [source for source in other if Path(source).suffix or "/" in source]
    data = [source for source in other if source not in weights]
    if data:
        print(f"it saw {', '.join(data)}: by the rules a run on other data than BabyView's is out")
    if weights:
        print(f"check that these weights saw BabyView alone: {', '.join(weights)}")


def read_results(folder):
    """(tasks, one of its results*.json) of the results in a folder. Raises UserError."""
    tasks, first = {}, None
    for path in sorted(Path(folder).glob("results*.json")):
        content = read_json(path)
        keys = ("digest", "phase", "tasks", "trained_on", "shuffled", "ties")
        if not isinstance(content, dict) or not all(key in content for key in keys):
            raise UserError(f"{path}: not results of eval.py")
        if content["shuffled"]:
            continue  # a check for chance
        if first and first["digest"] != content["digest"]:
            raise UserError(f"{folder}: results of two checkpoints; give each its own --out")
        if "machine_devbench" in content["tasks"] and content["ties"] != "published":
            raise UserError(f"{path}: Machine-DevBench was run without --ties published")
        first = first or content
        tasks |= content["tasks"]
    if first is None:
        raise UserError(f"{folder}: no results*.json; eval.py --out {folder} writes it")
    return tasks, first


def mean_and_std(scores):
    """ "mean ± std" in percent."""
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def make_row(folders, row_id, name, team):
    """The entry of the leaderboard from the results of several seeds. Raises UserError."""
    if len(folders) < 3:
        raise UserError(f"{len(folders)} seeds: the challenge wants three or more")
    seeds = [read_results(folder) for folder in folders]
    if len({first["digest"] for _, first in seeds}) < len(seeds):
        raise UserError(f"{folders[0]}: two of the folders have results of the same checkpoint")
    phases = {first["phase"] for _, first in seeds}
    if len(phases) > 1:
        raise UserError(f"{folders[0]}: results of different phases: {', '.join(sorted(phases))}")

    def family(task, parts):
        """{part: "mean ± std"}, or None if a seed lacks one."""
        of_seeds = [tasks.get(task, {}).get("all", {}) for tasks, _ in seeds]
        if not all(part in own for own in of_seeds for part in parts):
            return None
        return {part: mean_and_std([own[part]["score"] for own in of_seeds]) for part in parts}

    row = {
        "id": row_id,
        "model": name,
        "team": team,
        "architecture": "generative",
        "training_data": "BabyView 2025.1",
        "category": "baseline",
        "n_seeds": len(seeds),
    }
    sources = sorted({first["trained_on"] for _, first in seeds})
    if sources != ["babyview"]:
        row["training_data"] = ", ".join(sources)
    multimodal, language = family("machine_devbench", MULTIMODAL), family("language", LANGUAGE)
    if multimodal:
        row["multimodal"] = multimodal
    if language:
        is_tuned = phases.isdisjoint({"language", "phase1"})
        row["language"] = [{"encoder": "GPT", "ft": is_tuned, **language}]
    if not (multimodal or language):
        want = "--task machine_devbench --ties published, or --zorro with --swap"
        raise UserError(f"{folders[0]}: no whole family that all seeds have; run eval.py {want}")
    return row


def write_row(folders, path, name, team):
    """Write the JSON of make_row(), whose id is the name of the file."""
    row = make_row(folders, Path(path).stem, name or Path(path).stem, team)
    write_json(path, row)
    print(f"{path}: {row['n_seeds']} seeds, trained on {row['training_data']}")
    if row["training_data"] != "BabyView 2025.1":
        print("by the rules a run on other data than BabyView's is out")
    print("check category and training_data before you send it")
