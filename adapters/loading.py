"""
Opening an exported folder inside another program, whose modules may be called as ours are.
"""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

CODE = "nanobabyllava"  # the folder with our files, in an exported folder


@contextmanager
def our_names(folder):
    """While it lasts, files in a folder are imported under their plain names (config, model, ...).
    Modules of others that have the same names come back afterwards."""
    ours = {path.stem for path in Path(folder).iterdir() if path.suffix == ".py" or path.is_dir()}
    is_ours = lambda name: name.partition(".")[0] in ours
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in list(sys.modules):
            if is_ours(name):
                sys.modules[f"{CODE}.{name}"] = sys.modules.pop(name)
        sys.modules.update(others)


def open_exported(path, device="", dtype=""):
    """(our module inference, the checkpoint.Loaded) of an exported folder, or of a .pt in it or in
    a clone of nanoBabyLLaVA. device "": cuda if there is one."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    path = folder / "checkpoint.pt" if path.is_dir() else path
    # in a clone there is no such folder, and the names are its own
    with our_names(folder / CODE) if (folder / CODE).is_dir() else nullcontext():
        import inference

        device = inference.checkpoint.choose_device(str(device or ""))
        return inference, inference.open_model(path, device, dtype)
