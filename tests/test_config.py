"""Options: where they come from, what they refuse, and what a user sees of it."""

import dataclasses
import re

import pytest
import torch
from conftest import ROOT, one_line

import config
import eval as evaluation
import sample
import train
from config import UserError
from sources import pairs, saycam, toy

SCRIPTS = (train, evaluation, sample, toy, pairs, saycam)
CONFIGS = sorted((ROOT / "configs").glob("**/*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path):
    config.load(train.Config, [str(path)])


def help_of(module, capsys, *flags, columns=90):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("COLUMNS", str(columns))
        config.load(module.Config, [*flags, "--help"], module.__doc__)
    return capsys.readouterr().out


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_help_shows_every_option_with_its_comment_in_aligned_columns(module, capsys):
    shown = help_of(module, capsys).split("\noptions", 1)[1]
    options = re.findall(r"^  --(\w+) ", shown, re.M)
    fields = dataclasses.fields(module.Config)
    assert sorted(options) == sorted(field.name for field in fields)
    words = " ".join(shown.split())
    comments = config.read_comments(module.Config)
    for field in fields:
        assert comments[field.name][1] in words and comments[field.name][1], field.name
    for line in shown.splitlines():
        assert len(line) <= 90
        if line.startswith("   "):
            assert line[:26].strip() == "" and line[26] != " ", line
    assert not re.search(r"\d{6}", shown)  # no range up to 9223372036854775807


def test_help_shows_the_values_of_the_config_in_force(capsys):
    shown = help_of(train, capsys, str(ROOT / "configs/toy_v2.py"), "--seed", "7")
    assert "toy_v2.py" in shown and re.search(r"--n_embd 96 ", shown)
    assert re.search(r"--seed 7 ", shown) and "\nthe language model:\n" in shown
    listed = " ".join(help_of(evaluation, capsys).split())
    assert "one of toolbox, labeled_s, vtwt" in listed
    assert "which_picture, which_utterance" in listed


@pytest.mark.parametrize(
    "name, advice",
    [
        ("epochs", "vision_epochs' or 'language_epochs' or 'phase1_epochs'"),
        ("lr", "phase2_lr"),
        ("learning_rate", "phase2_lr"),
        ("batch_size", "phase2_batch"),
        ("context_length", "block_size"),
        ("n_layers", "n_layer"),
        ("gradient_checkpointing", "recompute"),
        ("resume", "the same command again"),
        ("phase2_step", "phase2_steps"),
        ("zzzzz", "--help lists all"),
    ],
)
def test_a_wrong_option_suggests_by_meaning(name, advice):
    with pytest.raises(UserError) as error:
        config.load(train.Config, [f"--{name}", "1"])
    assert advice in str(error.value) and one_line(error)


def test_every_meaning_is_an_option_of_some_script_or_advice():
    from sources import video

    known = {f.name for m in (*SCRIPTS, video) for f in dataclasses.fields(m.Config)}
    for name, meaning in config.MEANINGS.items():
        assert meaning.split(" ")[0].rstrip(",") in known or " " in meaning, name


def test_arguments_without_a_name_are_pictures():
    load = lambda *argv: config.load(sample.Config, argv, plain="image")
    assert load("a.png", "b.png").image == ("a.png", "b.png")
    assert load("--chat", "a.png", "--prompt", "hi").image == ("a.png",)
    assert load("a.png", "--image", "b.png").image == ("a.png", "b.png")
    assert load("--chat", "false", "a.png").chat is False
    with pytest.raises(UserError, match="options start with --"):
        config.load(train.Config, ["toy"])


def test_the_option_given_last_is_the_last_in_given():
    loaded = config.load(train.Config, ["--seed=1", "--n_head=2", "--seed=3"])
    assert list(loaded.given) == ["n_head", "seed"]


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_every_default_is_allowed_and_every_number_has_a_range(module):
    for field in dataclasses.fields(module.Config):
        config.check_value(field, field.default, "default")
        if field.type in (int, float) and field.name != "min_similarity":
            assert config.describe_range(field.metadata), field.name


def test_files_then_flags_override_defaults(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text('"""x"""\nphase2_lr = 1e-3 * 2  # twice\nseed = 7\nout = "o"\n')
    second.write_text('seed = -(2 - 12) // 2\nphase2_learn = ("gpt", "tower=1e-4")\n')
    flags = ["--n_layer", "6", "--keep_cls", "--phase1_lr=3", "--select-layer=-2"]
    loaded = config.load(train.Config, [str(first), str(second), *flags])
    assert (loaded.phase2_lr, loaded.seed, loaded.out) == (2e-3, 5, "o")
    assert (loaded.n_layer, loaded.keep_cls, loaded.phase1_lr) == (6, True, 3.0)
    assert loaded.phase2_learn == ("gpt", "tower=1e-4") and loaded.select_layer == -2
    assert loaded.given["seed"] == f"{second}:1" and loaded.given["n_layer"] == "--n_layer"
    assert "n_head" not in loaded.given
    assert config.load(train.Config, ["--keep_cls=false"]).keep_cls is False


def test_an_option_of_several_values_takes_them_one_after_the_other():
    loaded = config.load(saycam.Config, ["--annotations", "a.json", "b.json", "--frames", "f"])
    assert loaded.annotations == ("a.json", "b.json") and loaded.frames == "f"


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("n_layers = 4", [], r"a.py:1: no option 'n_layers'; did you mean 'n_layer'\?"),
        ("\nseed = 'x'", [], r"a.py:2: seed takes int, not 'x'"),
        ("seed = 1.5", [], "takes int, not 1.5"),
        ("seed = True", [], "takes int, not True"),
        ("seed = (1, 2)", [], "takes int, not"),
        ("import os", [], "a.py:1: want `name = literal`"),
        ("seed = open('x')", [], "a.py:1: want `name = literal`"),
        ("seed = 1 / 0", [], "a.py:1: want"),
        ("seed = = 1", [], "a.py:1: not Python"),
        ("seed = 1\n  seed = 2", [], "a.py:2: not Python"),
        ('phase = "1"', ["--phase=2"], "--phase: phase '2' contradicts phase '1' of .*a.py:1"),
        ("", ["--sede=1"], "--sede: no option 'sede'; did you mean 'seed'"),
        ("", ["--seed"], "--seed: no value"),
        ("", ["--seed=many"], "--seed: seed takes int, not 'many'"),
        ("", ["seed=1"], "config files come first"),
        ("", ["--grad_clip=-1"], "--grad_clip: grad_clip -1.0 is not allowed: 1e-06 or more"),
        ("", ["--n_head=0"], "n_head 0 is not allowed: 1 to 4096"),
        ("", ["--n_layer=999999999999"], "n_layer 999999999999 is not allowed: 1 to 1000"),
        ("", ["--compile=nonsense"], "'nonsense' is not allowed: one of"),
        ("", ["--phase1_lr=1e999"], "phase1_lr inf is not a finite number"),
        ("", ["--tower=vision"], "--tower: tower has a new name: --phase vision or --phase lang"),
        ("phase0_lr = 1e-3", [], "a.py:1: phase0_lr has a new name: language_lr"),
    ],
)
def test_a_mistaken_option_is_one_line_with_its_place(tmp_path, text, flags, message):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        config.load(train.Config, [str(tmp_path / "a.py"), *flags])
    assert one_line(error)


def test_a_phase_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="--phase 9: one of vision, language, 1, 2, 3, 0, all"):
        train.load_settings(["--phase=9"])


def test_phase_0_may_be_narrowed_and_nothing_else(tmp_path):
    (tmp_path / "a.py").write_text('phase = "0"')
    assert train.load_settings([str(tmp_path / "a.py"), "--phase=vision"]).phase == "vision"
    with pytest.raises(UserError, match="phase '1' contradicts phase '0'"):
        train.load_settings([str(tmp_path / "a.py"), "--phase=1"])


def test_users_mistakes_are_one_line_and_ours_keep_their_traceback(capsys):
    def users(argv):
        raise UserError("no such thing: make it")

    def files(argv):
        open("/nowhere/at/all")

    def ours(argv):
        a, b = torch.zeros(3).shape

    for main in (users, files):
        with pytest.raises(SystemExit) as stop:
            config.run(main)
        assert str(stop.value.code).startswith("error: ")
    with pytest.raises(ValueError, match="not enough values to unpack"):
        config.run(ours)


def test_defaults_live_once():
    """What model.py gives a default to and train.py too is the same in both."""
    from model import GPTConfig

    defaults = {field.name: field.default for field in dataclasses.fields(train.Config)}
    for field in dataclasses.fields(GPTConfig):
        if field.name in defaults and field.default is not dataclasses.MISSING:
            assert field.default == defaults[field.name], field.name


def test_an_option_of_several_values_given_twice_takes_all(tmp_path):
    """--image a --image b, as sample.py's first lines have it, once showed b alone."""
    flags = ["--image", "a.jpg", "--seed=2", "--image=b.jpg", "--image", "c.jpg", "d.jpg"]
    settings = config.load(sample.Config, flags)
    assert settings.image == ("a.jpg", "b.jpg", "c.jpg", "d.jpg") and settings.seed == 2


def test_only_a_want_of_memory_is_called_so(monkeypatch):
    """torch speaks of memory in errors of ours too, and these keep their traceback."""

    def fails(error):
        def main(argv):
            raise error

        return main

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")):
        with pytest.raises(SystemExit, match="error: out of memory"):
            config.run(fails(error))
    with pytest.raises(RuntimeError, match="layout"):
        config.run(fails(RuntimeError("view is not compatible with the tensor's memory layout")))
