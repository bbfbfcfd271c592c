"""The house rules: budgets, the README's table, the floor plan, configs and their errors."""

import ast
import io
import re
import tokenize

import pytest

import configs
import train
from configs import ConfigError
from conftest import ROOT

# Lines that are not blank; the sum of what is neither comment nor docstring has a budget too.
BUDGET = {
    "kernels.py": 440,
    "model.py": 230,
    "vision.py": 375,
    "toyworld.py": 265,
    "data.py": 660,
    "configs/__init__.py": 120,
    "sample.py": 190,
    "eval.py": 430,
    "train.py": 385,
}
README = (ROOT / "README.md").read_text()
IMPORTS = {
    "kernels": set(),
    "model": {"kernels"},
    "vision": set(),
    "toyworld": set(),
    "data": {"toyworld", "configs"},
    "sample": {"model", "vision", "data", "configs"},
    "eval": {"sample", "data", "vision", "configs"},
    "train": {"eval", "sample", "data", "vision", "model", "configs"},
    "configs": set(),
}


def count(name):
    """Lines to read: all that are not blank."""
    return sum(bool(line.strip()) for line in (ROOT / name).read_text().splitlines())


def code(name):
    """Lines with code on them: no blank ones, comments and docstrings."""
    source, lines = (ROOT / name).read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        ):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_every_file_keeps_its_budget_and_its_columns():
    for name, budget in BUDGET.items():
        assert count(name) <= budget, f"{name}: {count(name)} lines, budget {budget}"
    assert sum(map(code, BUDGET)) <= 2610
    for path in (ROOT / "configs").glob("[!_]*.py"):
        assert count(path) <= 30, path
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("configs/*.py"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]:
        assert max(map(len, path.read_text().splitlines())) <= 100, path


def test_the_readmes_table_counts_the_lines_there_are():
    table = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \| (\d+) \|", README, re.M)
    assert [(name, int(a), int(b)) for name, a, b in table] == [
        (name, count(name), code(name)) for name in BUDGET
    ]
    total = re.search(r"([\d,]+)\s+lines,\s+([\d,]+)\s+of\s+them\s+code", README)
    assert [int(n.replace(",", "")) for n in total.groups()] == [
        sum(map(count, BUDGET)),
        sum(map(code, BUDGET)),
    ]


def test_the_readme_names_only_files_that_exist():
    made = {"captions.png", "skipped.txt", "transcripts.txt", "frames.txt"}
    for name in re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|txt|pt|png|md))`", README):
        assert (ROOT / name).exists() or name in made, name


def test_imports_follow_the_floor_plan():
    for name, allowed in IMPORTS.items():
        path = ROOT / ("configs/__init__.py" if name == "configs" else f"{name}.py")
        tree = ast.parse(path.read_text())
        found = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert found & set(IMPORTS) <= allowed, name
        if name in ("model", "vision", "kernels", "toyworld"):
            calls = {
                node.func.id
                for node in ast.walk(tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not calls & {"open", "print"} and "sys" not in found, name


def test_only_the_named_packages_are_imported():
    """torch, numpy, tiktoken, pillow, triton, tqdm; nltk is optional and tried in one place."""
    import sys

    known = (
        set(sys.stdlib_module_names)
        | set(IMPORTS)
        | {"torch", "numpy", "tiktoken", "PIL", "triton", "tqdm", "nltk"}
    )
    for name in BUDGET:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert all(module.split(".")[0] in known for module in modules), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda p: p.name)
def test_every_config_loads(path):
    configs.load(train.Config, [str(path)])


def test_every_knob_has_its_comment_in_help(capsys):
    import dataclasses
    import data
    import eval as evaluation
    import sample

    for module in (train, data, evaluation, sample):
        with pytest.raises(SystemExit):
            configs.load(module.Config, ["--help"], module.__doc__)
        listed = re.findall(r"^  --(\w+)=", capsys.readouterr().out, re.M)
        assert listed == [field.name for field in dataclasses.fields(module.Config)]


def test_files_then_flags_override_defaults(tmp_path):
    (tmp_path / "a.py").write_text('"""x"""\nphase2_lr = 1e-3 * 2  # twice\nseed = 7\nout = "o"\n')
    (tmp_path / "b.py").write_text("seed = -(2 + 3) // 2\n")
    config = configs.load(
        train.Config,
        [
            str(tmp_path / "a.py"),
            str(tmp_path / "b.py"),
            "--n_layer",
            "6",
            "--keep_cls",
            "--phase1_lr=3",
        ],
    )
    assert (config.phase2_lr, config.seed, config.out) == (2e-3, -3, "o")
    assert (config.n_layer, config.keep_cls, config.phase1_lr) == (6, True, 3.0)
    assert configs.load(train.Config, ["--keep_cls=false"]).keep_cls is False


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("n_layers = 4", [], r"a.py:1: no knob 'n_layers'; did you mean 'n_layer'\?"),
        ("\nseed = 'x'", [], r"a.py:2: seed takes int, not 'x'"),
        ("seed = 1.5", [], "takes int, not 1.5"),
        ("import os", [], "a.py:1: want `name = literal`"),
        ("seed = open('x')", [], "a.py:1: want `name = literal`"),
        ("seed = 1 / 0", [], "a.py:1: want"),
        ("seed = = 1", [], "a.py:1: not Python"),
        ('phase = "1"', ["--phase=2"], "phase '2' contradicts phase '1' of"),
        ("", ["--sede=1"], "--sede: no knob 'sede'; did you mean 'seed'"),
        ("", ["--seed"], "--seed: no value"),
        ("", ["--seed=many"], "--seed: seed takes int, not 'many'"),
        ("", ["seed=1"], "config files come first"),
    ],
)
def test_a_config_typo_is_one_line_with_its_place(tmp_path, text, flags, message):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        configs.load(train.Config, [str(tmp_path / "a.py"), *flags])
    assert "\n" not in str(error.value)


def test_the_project_speaks_of_itself_only():
    for path in [ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob("configs/*.py")]:
        for foreign in ("/work" + "/", "../" + "shared", "/tmp/", "issue #"):
            assert foreign not in path.read_text(), path
