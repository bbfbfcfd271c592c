"""
Checkpoints of several processes: a folder NAME.shards, into which each process writes its part of
every tensor, with PyTorch's torch.distributed.checkpoint (DCP).

    NAME.shards/latest       the name of the last whole save, "step_250"
    NAME.shards/step_250/    facts.pt: what checkpoint.py lists, without weights and optimizers;
                             .metadata and *.distcp: the tensors, DCP's files

Tensors are named weights/NAME, and for resuming optimizer/NAME/KEY. A number of processes may read
what another number has written; one process reads tensor by tensor.
"""

import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from common.files import writing
from config import UserError

# What DCP's description of tensors may name: classes of these modules, dtypes, and these
DCP = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
SAFE = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


def lacking():
    """What this PyTorch lacks for shards, or ""."""
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        return f"needs PyTorch 2.6, and this is {torch.__version__}"
    return ""


def is_shards(path):
    """Whether a path is such a folder."""
    return Path(path).suffix == ".shards" and Path(path).is_dir()


def find_save(folder):
    """The folder of the last whole save in NAME.shards, or None."""
    pointer = Path(folder) / "latest"
    name = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
    return Path(folder) / name if re.fullmatch(r"step_\d+", name) else None


# ---------------------------------------------------------------------------------------------
# Writing


def begin(folder, step, facts, is_first):
    """Make the folder of a save. facts: what is no tensor. Returns its path."""
    path = Path(folder) / f"step_{step}"
    if is_first:
        path.mkdir(parents=True, exist_ok=True)
        with writing(path / "facts.pt") as file:
            torch.save(facts, file)
    dist.barrier()
    return path


def commit(path):
    """Make a save that all processes have written the last one, and delete the one before. Called
    by the first process."""
    with writing(path.parent / "latest") as file:
        file.write(path.name.encode())
    for other in path.parent.glob("step_*"):
        if other != path:
            shutil.rmtree(other)


# ---------------------------------------------------------------------------------------------
# Reading


class Unpickler(pickle.Unpickler):
    """Reads DCP's description of tensors and runs nothing else that a file might name."""

    def find_class(self, module, name):
        if (module, name) in SAFE:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in DCP and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def open_reader(path):
    """DCP's reader of a save. Raises UserError."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(path / ".metadata", "rb") as file:
                return Unpickler(file).load()

    return Reader(path)


class Weights(Mapping):
    """The weights of a save, each read when it is asked for. scale: LoRA's, whose factors are
    merged into the weights, as in other checkpoints."""

    def __init__(self, path, scale=0.0):
        self.path, self.reader, self.scale = path, open_reader(path), scale
        try:
            about = self.reader.read_metadata().state_dict_metadata
        except (OSError, pickle.UnpicklingError, AttributeError, EOFError) as error:
            raise UserError(f"{path}: not a checkpoint, or cut short ({error})") from None
        names = {n.removeprefix("weights/"): n for n in about if n.startswith("weights/")}
        self.about = {name: about[key] for name, key in names.items()}

    def is_merged(self, name):
        """Whether a tensor is a factor of LoRA, which is merged into another."""
        return bool(self.scale) and name.endswith((".lora_A", ".lora_B"))

    def __iter__(self):
        return (name for name in self.about if not self.is_merged(name))

    def __len__(self):
        return sum(1 for _ in self)

    def empty(self, name, device="cpu"):
        """A tensor of the shape and dtype of one that is not read."""
        about = self.about[name]
        return torch.empty(about.size, dtype=about.properties.dtype, device=device)

    def read(self, names):
        """{name: tensor} as they were saved."""
        from torch.distributed.checkpoint import CheckpointException, load

        found = {f"weights/{name}": self.empty(name) for name in names}
        with warnings.catch_warnings():  # that this is a single process
            warnings.simplefilter("ignore")
            try:
                load(found, storage_reader=self.reader, no_dist=True)
            except CheckpointException as error:
                why = str([one[0] for one in error.failures.values()])[:150]
                raise UserError(f"{self.path}: not a checkpoint, or cut short ({why})") from None
        return {name: found[f"weights/{name}"] for name in names}

    def __getitem__(self, name):
        factors = [name.removesuffix("weight") + factor for factor in ("lora_A", "lora_B")]
        if not self.scale or factors[0] not in self.about:
            return self.read([name])[name]
        weight, A, B = self.read([name, *factors]).values()
        return weight + self.scale * B @ A


def read(folder, mapped=False):
    """The dict of a checkpoint. mapped: its weights are read when they are asked for. Raises
    UserError."""
    path = find_save(folder)
    if why := lacking():
        raise UserError(f"{folder} {why}")
    if path is None:
        raise UserError(f"{folder}: no save in it is whole: train it again")
    try:
        facts = torch.load(path / "facts.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}/facts.pt: not a checkpoint, or cut short ({why})") from None
    weights = Weights(path, facts.get("lora_scale", 0.0))
    return facts | {"weights": weights if mapped else dict(weights)}
