"""
A checkpoint as a submission to the BabyVLM challenge: a folder of

    model.py           babyvlm.py of this folder: the model inside lmms-eval
    submission.json    the leaderboard's fields, filled in from the checkpoint
    checkpoint.pt      the weights, without what only training needs
    nanobabyllava/     our files that model.py runs

    python export.py out/run/phase3.pt DIR --to babyvlm --repo USER/NAME

The whole folder is uploaded to a repository on the Hugging Face hub; model.py and submission.json
go into the pull request. The organizers pass the repository's name to model.py as `pretrained`.
"""

import ast
import re
import shutil
from pathlib import Path

import checkpoint
from adapters.loading import CODE
from common.files import write_json, writing
from config import UserError

ROOT = Path(__file__).resolve().parent.parent
TRAINING_ONLY = ("optimizers", "dino", "lora", "skipped")
PLACEHOLDER = "REPLACE with the name of your repository on the Hugging Face hub"


def imported_files(path):
    """Our files that a file of ours imports anywhere in it, with the packages they are in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = ROOT / f"{name.replace('.', '/')}.py"
            package = ROOT / name.replace(".", "/") / "__init__.py"
            found |= {one for one in (file, package, file.parent / "__init__.py") if one.is_file()}
    return found


def files_behind(*names):
    """All our files that importing these modules can run, sorted."""
    found, new = set(), {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    while new:
        found |= new
        new = {other for path in new for other in imported_files(path)} - found
    return sorted(found)


def describe_tower(parts):
    arguments = parts["tower"]["arguments"]
    sizes = ", ".join(
        f"{name} {arguments[name]}"
        for name in ("width", "depth", "heads", "patch")
        if name in arguments
    )
    return f"{parts['tower']['kind']} ({sizes})"


def describe_gpt(parts):
    gpt = parts["gpt"]
    return (
        f"GPT ({gpt['n_layer']} layers of width {gpt['n_embd']}, {gpt['n_head']} heads, "
        f"{gpt['vocab_size']} tokens)"
    )


def describe_corpora(saved):
    """The corpora that a checkpoint saw, as text: what decides whether it may enter a track."""
    seen = {}
    for one in checkpoint.corpora_of(saved):
        seen.setdefault((one["source"], one["corpus"][:12]), []).append(one["phase"])
    texts = [f"{source} {corpus} ({', '.join(names)})" for (source, corpus), names in seen.items()]
    return "; ".join(texts)


def saw_toy_world(saved):
    return any(one["source"].startswith("toy") for one in checkpoint.corpora_of(saved))


def describe(loaded, name, repo):
    """The content of submission.json. name: of the model on the leaderboard; repo: where its folder
    will be, or ""."""
    saved, model = loaded.checkpoint, loaded.model
    settings, phase = saved["settings"], saved["phase"]
    warning = "It saw a drawn toy world. " if saw_toy_world(saved) else ""
    return {
        "model_name": name,
        "checkpoint": repo or PLACEHOLDER,
        "registered_model": "nanobabyllava",
        "conv_template": (saved.get("template") or {}).get("name") or "bare",
        "hf_model_url": f"https://huggingface.co/{repo}" if repo else "",
        "metadata": {
            "model_type": "LLaVA-style",
            "vision_encoder": describe_tower(saved["parts"]),
            "language_model": describe_gpt(saved["parts"]),
            "training_data": describe_corpora(saved),
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "main_contributions": "",
            "model_description": f"{warning}nanoBabyLLaVA, {phase}, {saved['step']} steps.",
            "optimizer": "Muon, AdamW" if settings.get("optimizer") == "muon" else "AdamW",
            "learning_rate": settings.get(f"{phase}_lr"),
            "batch_size": settings.get(f"{phase}_batch"),
            "num_image_tokens": model.image_tokens(loaded.image_format.size),
            "max_seq_length": model.gpt.config.block_size,
        },
    }


def make_folder(folder):
    """Make a folder, or raise UserError if it is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder; give a new one")
    folder.mkdir(parents=True, exist_ok=True)


def write_code(loaded, folder):
    """Write checkpoint.pt and nanobabyllava/ to a folder."""
    package = ROOT / "adapters" / "__init__.py"
    for path in (*files_behind("inference", "adapters.loading"), package):
        copy = folder / CODE / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    contents = {k: v for k, v in loaded.checkpoint.items() if k not in TRAINING_ONLY}
    checkpoint.save(folder / "checkpoint.pt", contents)


def copy_adapter(name, path):
    with writing(path) as file:
        file.write((ROOT / "adapters" / name).read_bytes())


def write(source, folder, name="", repo=""):
    """Write the submission of a checkpoint file to a new or empty folder. name: of the model on the
    leaderboard; empty: the folder's name. repo: USER/NAME on the Hugging Face hub. Prints
    what to do next. Raises UserError."""
    loaded, folder = checkpoint.load(source), Path(folder)
    if loaded.model.projector is None:
        raise UserError(f"{source}: it cannot see; give one of phase 1 or later")
    if repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--repo {repo}: want USER/NAME, as on the Hugging Face hub")
    make_folder(folder)
    write_code(loaded, folder)
    write_json(folder / "submission.json", describe(loaded, name or folder.name, repo))
    copy_adapter("babyvlm.py", folder / "model.py")
    print(f"{folder}: {source}, as lmms-eval opens it with --model_args pretrained={folder}")
    print(f"it saw {describe_corpora(loaded.checkpoint)}")
    if saw_toy_world(loaded.checkpoint):
        print("a rehearsal: what saw the toy world is no result on SAYCam")
    print(f"to do: upload {folder} to the hub; fill main_contributions in submission.json")
    if not repo:
        print("to do: replace `checkpoint` in submission.json, or export with --repo USER/NAME")
