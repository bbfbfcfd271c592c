"""
What a phase starts from: the checkpoints of the phases before, in this run's folder or another's; a
model or a part of one that comes from elsewhere; or its own, where it was interrupted.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

import checkpoint
import huggingface
import weights
from config import UserError
from images import ImageFormat
from model import BabyLLaVA


def is_run(path):
    """Whether a path is a folder that train.py wrote to."""
    return bool(path) and Path(path).is_dir() and not (Path(path) / "config.json").exists()


def is_done_elsewhere(settings, name):
    """Whether a phase's checkpoint is in the run that --init names, and not in this one."""
    here, there = (Path(folder) / f"{name}.pt" for folder in (settings.out, settings.init))
    return is_run(settings.init) and there.exists() and not here.exists()


def choose_phases(settings, dataset, phases):
    """The names in train.py's table that --phase and --tower ask for; of `all`, those that the data
    has something to learn from for."""
    narrowed = {"both": ("vision", "phase0"), "vision": ("vision",), "language": ("phase0",)}
    if settings.phase == "0":
        return narrowed[settings.tower]
    if settings.tower != "both":
        raise UserError(f"--tower {settings.tower} narrows --phase 0, not --phase {settings.phase}")
    if settings.phase == "1":  # with those of its parents that come ready and need no training
        ready = {"vision": settings.vision_weights, "phase0": settings.language_weights}
        return (*(name for name, source in ready.items() if source), "phase1")
    if settings.phase != "all":
        return (f"phase{settings.phase}",)
    return tuple(
        name
        for name, phase in phases.items()
        if all(dataset.count(split, phase.batches.BIN) for split in phase.splits)
        and getattr(settings, f"{name}_steps")
        and (phase.starts_from or not is_done_elsewhere(settings, name))
    )


def find_parents(settings, name, phases, dataset, report):
    """{name: finished checkpoint} that a phase starts from, on data that fits them.

    phases: train.py's table. A parent that is left out (0 steps) is passed over for its own."""
    wanted = phases[name].starts_from
    if wanted and settings.init and not is_run(settings.init):
        found = read_init(settings.init, phases)
        check_data(settings.init, found, dataset, report, is_new_start=True)
        return {"init": found}
    while len(wanted) == 1 and not getattr(settings, f"{wanted[0]}_steps"):
        wanted = phases[wanted[0]].starts_from
    parents = {}
    for parent in wanted:
        elsewhere = is_done_elsewhere(settings, parent)
        path = Path(settings.init if elsewhere else settings.out) / f"{parent}.pt"
        how = "0 --tower vision" if parent == "vision" else parent.removeprefix("phase")
        found = checkpoint.read(path) if path.exists() else None
        if not found or not found["done"]:
            state = f"is at step {found['step']}" if found else "does not exist"
            raise UserError(f"{path} {state}: finish it first with --phase {how}")
        check_data(path, found, dataset, report, is_new_start=elsewhere or parent == "vision")
        parents[parent] = found
    return parents


def read_init(path, phases):
    """The finished checkpoint, of a model that sees and speaks, in a file or folder that --init
    names. A folder has decided all that phases hand on; what has no knob here is None."""
    if not Path(path).exists():
        raise UserError(f"--init {path}: there is none; a run's folder, a .pt or a LLaVA's folder")
    if Path(path).is_dir():
        parent = huggingface.load(path).as_parent()
        knobs = [knob for phase in phases.values() for knob in phase.inherited]
        return parent | {"decided": dict.fromkeys(knobs) | parent["decided"]}
    found = checkpoint.read(path)
    if "projector" not in found["parts"] or not found["done"]:
        state = f"{found['phase']} at step {found['step']}"
        raise UserError(f"--init {path}: {state}; give a finished phase 1 or later, or the folder")
    return found


def check_data(path, found, dataset, report, is_new_start=False):
    """Refuse data with another vocabulary or other pictures than a checkpoint was trained on. At a
    new start pictures may have become frames in another way, if they are normalised alike."""
    if checkpoint.has_other_vocabulary(found, dataset):
        raise UserError(
            f"{path} speaks another vocabulary than {dataset.directory}: train phase 0 on the "
            "data you use in later phases, or prepare that data as it was"
        )
    before, now = ImageFormat.parse(found["images"]), dataset.image_format
    if is_new_start and before != now and (before.mean, before.std) == (now.mean, now.std):
        report(f"{path} was trained on pictures of another form than {dataset.directory}'s")
    elif before != now:
        raise UserError(
            f"{path} was trained on pictures made as {found['images']}, {dataset.directory} has "
            f"{asdict(dataset.image_format)}: prepare it as it was, or train from phase 0"
        )


def inherit(settings, parents):
    """Set the knobs that earlier phases have decided; returns all that is decided now but for this
    phase's own. Raises UserError where one was given here and says something else."""
    decided = {}
    for parent, found in parents.items():
        for name, value in found["decided"].items():
            wanted = getattr(settings, name)
            if name == "block_size" and name in settings.given and wanted > (value or 0):
                value = wanted  # rotary positions have nothing to learn: a context may grow
            if name in settings.given and wanted != value:
                path = settings.init if parent == "init" else f"{settings.out}/{parent}.pt"
                has = f"which has {value!r}" if value is not None else "a part of which came ready"
                raise UserError(
                    f"{settings.given[name]}: {name} {wanted!r} contradicts {path}, {has}: leave "
                    "it out, or give another --out"
                )
            setattr(settings, name, value)
            decided[name] = value
    return decided


def find_resume(settings, name, phase, dataset, parents, report):
    """This phase's own checkpoint, to go on from or to leave alone; None where there is none, or
    where it started from others than there are now.

    Raises UserError where it was made with other knobs or on other data."""
    path = Path(settings.out) / f"{name}.pt"
    if not path.exists():
        return None
    found = checkpoint.read(path)
    defaults = type(settings)()  # what a knob said that there was not yet
    for own in phase.own_knobs(name):
        before, now = found["settings"].get(own, getattr(defaults, own)), getattr(settings, own)
        if before != now:
            raise UserError(
                f"{path} was made with {own}={before}, now it is {now}: give another --out, or "
                "delete the file to train it again"
            )
    if found["corpus"] != dataset.meta["corpus"]:
        raise UserError(
            f"{path} was trained on other data: {dataset.directory} was prepared anew since "
            f"({found['corpus'][:12]}, now {dataset.meta['corpus'][:12]}): give another --out, or "
            "delete the file to train it again"
        )
    if found["parents"] != {parent: p["digest"] for parent, p in parents.items()}:
        report(
            f"{name}: {path} started from other checkpoints than there are now: training it again"
        )
        return None
    return found


def import_part(settings, name, phase, dataset, processes, source, make):
    """A phase whose model comes from a file or folder: save it as it is, unless it is there.

    source: the path; make(): a BabyLLaVA of that part alone."""
    path, key = Path(settings.out) / f"{name}.pt", f"{name.replace('phase0', 'language')}_weights"
    model = make()  # complains if there is none
    parents = {key: digest_of(Path(source))}
    found = checkpoint.read(path) if path.exists() else None
    if found and key not in found["parents"]:
        raise UserError(
            f"{path} was trained: give another --out, or delete the file to use {source} instead"
        )
    if found and found["parents"] == parents and not checkpoint.has_other_images(found, dataset):
        processes.print(f"{name}: that of {source}, as it was, {path}")
        return
    if processes.is_first:
        # the other knobs of shape did not make this part: None contradicts them all
        decided = dict.fromkeys(phase.inherited) | {key: str(source)}
        contents = checkpoint.describe(
            settings, name, dataset, model, step=0, done=True, parents=parents, decided=decided
        )
        checkpoint.save(path, contents)
        processes.print(f"{name}: that of {source}, as it is")


def digest_of(path):
    """A sha256 of a file, or of all the weights in a folder."""
    whole = hashlib.sha256()
    for one in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(one, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def import_tower(settings, phase, dataset, processes):
    """Phase 0 for a tower that comes from a file or folder."""
    source = settings.vision_weights
    make = lambda: BabyLLaVA(None, tower=weights.load_tower(source))
    import_part(settings, "vision", phase, dataset, processes, source, make)


def import_language(settings, phase, dataset, processes):
    """Phase 0 for a language model that comes from a folder; the data must be in its tokens."""
    source = settings.language_weights

    def make():
        model, tokenizer = huggingface.load_language(source)
        if tokenizer.dump() != dataset.tokenizer.dump():
            raise UserError(
                f"{dataset.directory} is not in the tokens of {source}: prepare it with "
                f"`python data.py llava --like {source} ...`"
            )
        return model

    import_part(settings, "phase0", phase, dataset, processes, source, make)
