"""
What a phase starts from: checkpoints of earlier phases, in this run's folder or another's; weights
from elsewhere; or its own checkpoint, if it was interrupted.

Where a checkpoint of phase NAME is looked for:

    out/NAME.pt exists        there
    --init is a run's folder  init/NAME.pt, if out/NAME.pt does not exist
    --init is a model         that model, a .pt or a folder of a LLaVA, replaces all earlier phases
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

import checkpoint
from common import shards
from common.images import ImageFormat
from config import UserError
from model import BabyLLaVA
from training import advice


def is_run_folder(path):
    """Whether a path is a folder that train.py wrote to."""
    is_folder = bool(path) and Path(path).is_dir() and not shards.is_shards(path)
    return is_folder and not (Path(path) / "config.json").exists()


def find_checkpoint(settings, name):
    """(path of a phase's checkpoint, whether it is in the run that --init names)."""
    here, there = (checkpoint.find(folder, name) for folder in (settings.out, settings.init))
    if is_run_folder(settings.init) and there.exists() and not here.exists():
        return there, True
    return here, False


def count_ancestors(name, phases):
    """The length of the longest chain of phases before this one."""
    return max((1 + count_ancestors(p, phases) for p in phases[name].starts_from), default=0)


def choose_phases(settings, dataset, phases):
    """The names of the phases that --phase asks for, each after those it starts from.

    "0": those that start from nothing. "1" and later: that phase, and the parents whose weights an
    option names (phase 1 with --vision_weights imports the tower first). "all": those that have
    data and steps. phases: train.py's table."""
    wanted = settings.phase
    if wanted == "0":
        return tuple(name for name, phase in phases.items() if not phase.starts_from)
    if wanted == "all":
        chosen = [
            name
            for name, phase in phases.items()
            if all(dataset.count(split, phase.batches.BIN) for split in phase.splits)
            and getattr(settings, f"{name}_steps")
            and (phase.starts_from or not find_checkpoint(settings, name)[1])
        ]
        return tuple(sorted(chosen, key=lambda name: count_ancestors(name, phases)))
    (name,) = (name for name in phases if advice.phase_flag(name) == wanted)
    if not getattr(settings, f"{name}_steps"):
        raise UserError(f"--phase {wanted}: {name}_steps is 0: give --{name}_steps")
    ready = [
        parent
        for parent in phases[name].starts_from
        if phases[parent].weights_option and getattr(settings, phases[parent].weights_option)
    ]
    return (*ready, name)


# ---------------------------------------------------------------------------------------------
# Parents


def find_parents(settings, name, phases, dataset, report, planned=None, mapped=False):
    """{phase: finished checkpoint} that a phase starts from; {"init": ...} for a model that --init
    names. A parent of 0 steps was left out, and its own parent takes its place.

    report(line): prints. planned: {phase: checkpoint} of phases that will be trained before this
    one; see rehearsal.py. mapped: see checkpoint.read_torch(). Raises UserError for a missing or
    unfinished parent, or other data."""
    wanted, mapped = phases[name].starts_from, mapped or planned is not None
    while len(wanted) == 1 and not getattr(settings, f"{wanted[0]}_steps"):
        wanted = phases[wanted[0]].starts_from
    if wanted and planned and "init" in planned:
        return {"init": planned["init"]}
    if wanted and settings.init and not is_run_folder(settings.init):
        found = read_init(settings.init, phases, mapped)
        check_data(settings.init, found, dataset, report, other_images=True)
        return {"init": found}
    parents = {}
    for parent in wanted:
        if planned and parent in planned:
            parents[parent] = planned[parent]
            continue
        path, elsewhere = find_checkpoint(settings, parent)
        found = checkpoint.read(path, mapped) if path.exists() else None
        if not found or not found["done"]:
            state = f"is at step {found['step']}" if found else "does not exist"
            how = f"finish it first with --phase {advice.phase_flag(parent)}"
            raise UserError(f"{path} {state}: {how}")
        other_images = elsewhere or not phases[parent].fixes_images
        check_data(path, found, dataset, report, other_images)
        parents[parent] = found
    return parents


def read_init(path, phases, mapped=False):
    """The finished checkpoint with a projector in a file or folder that --init names. A folder of a
    LLaVA fixes all options that phases inherit; those without a meaning for it are None. mapped:
    see checkpoint.read_torch()."""
    if not Path(path).exists():
        raise UserError(f"--init {path}: there is none; a run's folder, a .pt or a LLaVA's folder")
    if Path(path).is_dir() and not shards.is_shards(path):
        from pretrained import huggingface  # not imported without --init

        parent = huggingface.load(path).as_parent()
        options = [option for phase in phases.values() for option in phase.inherited]
        return parent | {"inherited": dict.fromkeys(options) | parent["inherited"]}
    found = checkpoint.read(path, mapped)
    if "projector" not in found["parts"] or not found["done"]:
        state = f"{found['phase']} at step {found['step']}"
        raise UserError(f"--init {path}: {state}; give a finished phase 1 or later, or the folder")
    return found


def check_data(path, found, dataset, report, other_images=False):
    """Raise UserError for data of another vocabulary or image format than a checkpoint was trained
    on. other_images: another format is allowed if it has the same normalisation."""
    if checkpoint.has_other_vocabulary(found, dataset):
        raise UserError(
            f"{path} has another vocabulary than {dataset.directory}: train --phase language on "
            "the data you use in later phases, or prepare that data as it was"
        )
    before, now = ImageFormat.parse(found["images"]), dataset.image_format
    if other_images and before != now and (before.mean, before.std) == (now.mean, now.std):
        report(f"{path} was trained on another image format than {dataset.directory} has")
    elif before != now:
        raise UserError(
            f"{path} was trained on pictures made as {found['images']}, {dataset.directory} has "
            f"{asdict(dataset.image_format)}: prepare it as it was, or train from phase 0"
        )


def inherit(settings, parents):
    """Set the options that the parents have fixed; returns them. Raises UserError if one was given
    with another value."""
    inherited = {}
    for parent, found in parents.items():
        for name, value in found["inherited"].items():
            wanted = getattr(settings, name)
            # a context may grow, because rotary positions have no parameters
            if name == "block_size" and name in settings.given and wanted > (value or 0):
                value = wanted
            if name in settings.given and wanted != value:
                path = settings.init if parent == "init" else f"{settings.out}/{parent}.pt"
                has = f"which has {value!r}" if value is not None else "which came ready"
                raise UserError(
                    f"{settings.given[name]}: {name} {wanted!r} contradicts {path}, {has}: leave "
                    "it out, or give another --out"
                )
            setattr(settings, name, value)
            inherited[name] = value
    return inherited


# ---------------------------------------------------------------------------------------------
# Its own checkpoint


def find_saved(settings, name, phase, dataset, parents, report):
    """This phase's own checkpoint, finished or to be resumed; None if there is none, or if it
    started from other parents. Raises UserError if it was made with other options or data."""
    path = checkpoint.find(settings.out, name)
    if not path.exists():
        return None
    found = checkpoint.read(path, mapped=shards.is_shards(path))
    if not found["done"] and settings.shard in ("on", "off"):
        before = "on" if shards.is_shards(path) else "off"
        if settings.shard != before:
            raise UserError(f"{path} was begun with --shard {before}: go on so, or delete it")
    defaults = type(settings)()  # for options added after this checkpoint was saved
    for own in phase.own_options(name):
        before, now = found["settings"].get(own, getattr(defaults, own)), getattr(settings, own)
        if before != now:
            raise UserError(
                f"{path} was made with {own}={before}, now it is {now}: delete the file to train "
                f"it again, or write to another folder: {advice.elsewhere(settings, phase, now)}"
            )
    if found["corpus"] != dataset.meta["corpus"]:
        raise UserError(
            f"{path} was trained on other data: {dataset.directory} was prepared again since "
            f"({found['corpus'][:12]}, now {dataset.meta['corpus'][:12]}): give another --out, or "
            "delete the file to train it again"
        )
    if found["parents"] != {parent: p["digest"] for parent, p in parents.items()}:
        report(
            f"{name}: {path} started from other checkpoints than there are now: training it again"
        )
        return None
    return found


# ---------------------------------------------------------------------------------------------
# Weights from elsewhere


def import_weights(settings, name, phase, dataset, processes):
    """Save weights from elsewhere, as the option phase.weights_option names them, as the
    checkpoint of a phase, unless it has them already. Raises UserError."""
    option, path = phase.weights_option, Path(settings.out) / f"{name}.pt"
    source = getattr(settings, option)
    found = find_imported(settings, name, phase, source)
    parents = {option: digest_of(Path(source))}
    if found and found["parents"] == parents and not checkpoint.has_other_images(found, dataset):
        processes.print(f"{name}: {source} was loaded before, {path}")
        return
    if processes.is_first:  # the others would hold as many copies of it
        model = phase.load_weights(source, dataset)
        # the other inherited options did not make this model: None contradicts every value
        inherited = dict.fromkeys(phase.inherited) | {option: str(source)}
        contents = checkpoint.describe(
            settings,
            name,
            dataset,
            model,
            step=0,
            done=True,
            parents=parents,
            inherited=inherited,
            validates_on=phase.validates_on,
        )
        (digest,) = parents.values()
        contents["corpora"] = [{"phase": name, "source": str(source), "corpus": digest}]
        checkpoint.save(path, contents)
        processes.print(f"{name}: {source} as it is")


def find_imported(settings, name, phase, source):
    """This phase's own checkpoint, if it has weights from elsewhere; None if there is none. Raises
    UserError if it was trained here."""
    path = Path(settings.out) / f"{name}.pt"
    found = checkpoint.read(path, mapped=True) if path.exists() else None
    if found and phase.weights_option not in found["parents"]:
        raise UserError(
            f"{path} was trained: give another --out, or delete the file to use {source} instead"
        )
    return found


def digest_of(path):
    """A sha256 of a file, or of all weight files in a folder."""
    whole = hashlib.sha256()
    for one in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(one, "rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def load_tower(source, dataset):
    from pretrained.towers import load_tower  # not imported without --vision_weights

    return BabyLLaVA(None, tower=load_tower(source))


def load_language_model(source, dataset):
    """The language model of a folder; the data must be in its tokens."""
    from pretrained import huggingface  # not imported without --language_weights

    model, tokenizer = huggingface.load_language(source)
    if tokenizer.dump() != dataset.tokenizer.dump():
        raise UserError(
            f"{dataset.directory} is not in the tokens of {source}: prepare it with "
            f"`python data.py llava --like {source} ...`"
        )
    return model


# ---------------------------------------------------------------------------------------------
# Without weights


def on_meta(found):
    """A checkpoint with its weights on the meta device, without what only resuming needs."""
    unused, weights = ("dino", "optimizers", "lora"), found["weights"]
    kept = {key: value for key, value in found.items() if key not in unused}
    if isinstance(weights, shards.Weights):
        return kept | {"weights": {name: weights.empty(name, "meta") for name in weights}}
    return kept | {"weights": {name: weight.to("meta") for name, weight in weights.items()}}
