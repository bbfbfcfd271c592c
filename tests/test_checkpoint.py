"""What a run saves and loads."""

import contextlib
import io

import pytest
import torch
from conftest import one_line, same, weights

import checkpoint
import vision
from config import UserError
from data import Data
from pretrained.towers import load_tower


def test_a_checkpoint_is_what_its_docstring_says(recipe, home):
    meta = Data("data/tiny").meta
    described = set()
    for line in checkpoint.__doc__.splitlines():
        if line.startswith("    ") and line[4] != " ":
            described |= {word.strip(",") for word in line.strip().split("  ")[0].split()}
    for phase in ("vision", "language", "phase1", "phase2"):
        found = torch.load(recipe / f"{phase}.pt", weights_only=True)
        assert set(found) <= described, set(found) - described
        assert found["format"] == 3 and found["phase"] == phase and found["done"]
        assert found["corpus"] == meta["corpus"] and found["source"] == "toy"
        assert found["images"]["size"] == 16
        assert found["digest"] == vision.weights_digest(found["weights"])
    assert found["inherited"]["patch"] == 8 and found["inherited"]["projector"] == "mlp2x_gelu"


def test_children_remember_what_they_started_from(recipe):
    read = {
        phase: checkpoint.read(recipe / f"{phase}.pt")
        for phase in ("vision", "language", "phase1", "phase2")
    }
    assert read["vision"]["parents"] == read["language"]["parents"] == {}
    assert read["phase1"]["parents"] == {p: read[p]["digest"] for p in ("vision", "language")}
    assert read["phase2"]["parents"] == {"phase1": read["phase1"]["digest"]}


def test_what_is_saved_is_what_is_built(recipe):
    loaded = checkpoint.load(recipe / "phase2.pt")
    assert same(loaded.model.state_dict(), weights(recipe / "phase2.pt"))
    assert not any(module.training for module in loaded.model.modules())
    tower = checkpoint.load(recipe / "vision.pt")
    assert tower.model.gpt is None and tower.tokenizer is None
    assert checkpoint.load(recipe / "language.pt").model.projector is None


def test_a_cut_checkpoint_is_one_clear_line(recipe, tmp_path):
    whole = (recipe / "phase2.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short") as error:
        checkpoint.read(tmp_path / "x.pt")
    assert one_line(error)


def test_formats_of_others_and_of_the_past_are_refused(tmp_path):
    for content, message in (
        ({"format": 1}, "train it again"),
        ({"a": 1}, "not a nanoBabyLLaVA"),
        ([1], "not a nanoBabyLLaVA"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=message):
            checkpoint.read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "name, message",
    [
        ("gpu", "cpu, cuda, cuda:1 ... or mps"),
        ("meta", "this machine has none"),
        ("cuda:99", "this machine has none|there are"),
        ("mps", "this machine has none"),
    ],
)
def test_a_device_that_is_not_there_is_one_clear_line(name, message):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match=message) as error:
        checkpoint.choose_device(name)
    assert one_line(error)


def test_a_numbered_gpu_is_that_gpu(monkeypatch):
    """cuda:1 once became cuda:0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checkpoint.choose_device("cuda:1") == torch.device("cuda", 1)
    import train
    from training import processes

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes.find_processes(train.Config(device="cuda:1")).device == torch.device("cuda", 1)
    with pytest.raises(UserError, match="there are 2 GPUs"):
        checkpoint.choose_device("cuda:2")


def twice(ranks):
    """tiktoken's text form with the last rank given to two tokens."""
    lines = ranks.splitlines()
    return "\n".join([*lines[:-1], lines[-1].split()[0] + " " + lines[-2].split()[1]])


def first_byte_gone(ranks):
    """The same vocabulary with two bytes that no text has, FF FE, where byte 0 stood."""
    return "\n".join(["//4= 0", *ranks.splitlines()[1:]])


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda found: found.pop("corpus"),
        lambda found: found.update(weights=[]),
        lambda found: found["images"].update(size="64"),
        lambda found: found["images"].update(mean=[0.5, 0.5]),
        lambda found: found["images"].update(std=["0.5"] * 3),
        lambda found: found["images"].update(std=[0.5, 0.0, 0.5]),
        lambda found: found["images"].update(std=[0.5, 10**400, 0.5]),
        lambda found: found["images"].update(mean=[float("nan")] * 3),
        lambda found: found["images"].update(fit="squosh"),
        lambda found: found["images"].update(canvases=[["a", 32]]),
        lambda found: found["images"].update(canvases=[[32, 1]]),
        lambda found: found["images"].update(max_tiles=-1),
        lambda found: found["tokenizer"].update(ranks="no base64"),
        lambda found: found["tokenizer"].update(ranks=twice(found["tokenizer"]["ranks"])),
        lambda found: found["tokenizer"].update(ranks=first_byte_gone(found["tokenizer"]["ranks"])),
        lambda found: found["parts"]["projector"].update(kind="mlp2x_galu"),
        lambda found: found["weights"].pop("gpt.norm.weight"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(recipe, tmp_path, corrupt):
    found = torch.load(recipe / "phase2.pt", weights_only=True)
    corrupt(found)
    torch.save(found, tmp_path / "corrupted.pt")
    for read in (checkpoint.load, load_tower):
        with pytest.raises(UserError, match="corrupted.pt") as error:
            read(tmp_path / "corrupted.pt")
        assert one_line(error)


def test_ctrl_c_while_a_checkpoint_is_written_is_told_as_such(tmp_path, monkeypatch):
    """torch's own words for it are "unexpected pos 205888 vs 205780"."""

    class Interrupted(io.BytesIO):
        def write(self, content):
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(content)

    monkeypatch.setattr(checkpoint, "writing", lambda path: contextlib.nullcontext(Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "a.pt", {"weights": torch.ones(100, 1000)})
