"""The submission to the BabyVLM challenge: its folder, and its model inside lmms-eval. Replies
must be eval.py's, string by string.

Here a stand-in with the same requests takes lmms-eval's place. With HARNESS=DIR the real one is
installed into DIR (0.3.5 and 0.7.3; needs a network and some minutes) and runs the same."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image
from test_published import FORMS, draw, item, memory_item

import checkpoint
import eval as evaluation
import export
import inference
from adapters import submission
from config import UserError
from tasks import TASKS, Subject, locate, toolbox

KINDS = {"count": "object_counting", "pv": "picture_vocabulary", "memory": "memory"}
PHRASES = ("look , a ball !", "it 's a red cup .")


def in_mode(path, mode):
    """Rewrite a picture in another mode, RGBA with transparent pixels."""
    image = Image.open(path).convert("RGB").convert("P" if mode == "P" else mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.arange(576, dtype=np.uint8).reshape(24, 24)))
    image.save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of three tests and Baby Winoground, with absolute paths as the organizers have them;
    pictures of all modes."""
    folder = tmp_path_factory.mktemp("made")
    files = {"count": [], "pv": []}
    for name, test in (("count", "object_counting"), ("pv", "picture_vocabulary")):
        for own, question, pictures, answer, _ in FORMS:
            if own == test:
                paths = [folder / name / f"{len(files[name])}_{i}.png" for i in range(pictures)]
                for path, mode in zip(paths, ("RGBA", "P", "L", "RGB")):
                    draw(path, str(path.name))
                    in_mode(path, mode)
                files[name].append(item(question, [str(path) for path in paths], answer))
    files["memory"] = [memory_item(np.random.RandomState(i), 5, folder, i, True) for i in range(2)]
    for one in files["memory"]:
        one["image"] = [str(folder / name) for name in one["image"]]
    for name, items in files.items():
        (folder / f"{name}.json").write_text(json.dumps(items))
    with open(folder / "wino.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("instance_id", "positive_phrase", "negative_phrase", "image", "image_tag"))
        for number in range(4):
            path = files["pv"][0]["image"][number]
            writer.writerow((number // 2, *PHRASES, path, ("positive", "negative")[number % 2]))
    return folder


@pytest.fixture(scope="module")
def wide(recipe, tmp_path_factory):
    """The small model with a context for 15 rounds: rotary positions have no parameters."""
    path = tmp_path_factory.mktemp("wide") / "phase2.pt"
    saved = torch.load(recipe / "phase2.pt", weights_only=True)
    saved["parts"]["gpt"]["block_size"] = 1500
    torch.save(saved, path)
    return path


@pytest.fixture(scope="module")
def exported(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("submission") / "mine"
    export.main([str(wide), str(folder), "--to=babyvlm", "--repo=me/mine"])
    return folder


def expected(path, made, name):
    """eval.py's replies to a test of `made`: a list for each item."""
    loaded, task = inference.open_model(path), TASKS[KINDS[name]]
    rows = task.read_rows(made / f"{name}.json")
    rows, found = locate(rows, task, made / f"{name}.json", [], False)
    rows = [row | {"number": number} for number, row in enumerate(rows)]
    subject = Subject(loaded, rows, list(found), list(found.values()), evaluation.Config())
    return toolbox.ask(rows, subject)


# ---------------------------------------------------------------------------------------------
# A stand-in for lmms-eval


class Instance:
    def __init__(self, *args):
        self.args = args


BOTH = pytest.mark.parametrize("adapter", ["0.3", "0.7"], indirect=True)


@pytest.fixture
def adapter(request, exported, monkeypatch):
    """model.py of the exported folder, imported beside the stand-in of a version, 0.7 unless a
    test says another."""

    class lmms:
        def __init__(self):
            self.task_dict = {}

    modules = {"api": {}, "api.model": {"lmms": lmms}, "api.instance": {"Instance": Instance},
               "api.registry": {"register_model": lambda name: lambda cls: cls}}  # fmt: skip
    if getattr(request, "param", "0.7") == "0.7":

        class GenerationResult:
            def __init__(self, text, token_counts=None):
                self.text = text

        modules["api.instance"]["GenerationResult"] = GenerationResult
    monkeypatch.setitem(sys.modules, "lmms_eval", types.ModuleType("lmms_eval"))
    for name, content in modules.items():
        module = types.ModuleType(f"lmms_eval.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", module)
    spec = importlib.util.spec_from_file_location("sub_me_mine", exported / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("nanobabyllava.")]:
        del sys.modules[name]


def visuals(doc):
    names = doc["image"] if isinstance(doc["image"], list) else [doc["image"]]
    return [Image.open(name) for name in names]


def requests(model, made, name, **gen_kwargs):
    """The requests of a test; the model gets its documents."""
    docs = json.loads((made / f"{name}.json").read_text())
    model.task_dict[name] = {"test": docs}
    if name == "memory":
        return [Instance("", gen_kwargs, visuals, None, i, name, "test") for i in range(len(docs))]
    text = lambda doc: doc["conversations"][0]["value"]
    return [Instance(text(d), gen_kwargs, visuals, i, name, "test") for i, d in enumerate(docs)]


@pytest.mark.parametrize("adapter, batch_size", [("0.3", "16"), ("0.7", 1)], indirect=["adapter"])
def test_replies_are_evals(adapter, exported, wide, made, batch_size):
    """Of pictures in all modes; modules of the same names stay what they were."""
    before = sys.modules["config"], sys.modules["inference"]
    model = adapter.NanoBabyLLaVA(
        pretrained=str(exported), batch_size=batch_size, conv_template="baby_v1", device="cpu"
    )
    assert before == (sys.modules["config"], sys.modules["inference"])
    assert model.inference is not inference and str(exported) in model.inference.__file__
    for name in ("count", "pv"):
        said = model.generate_until(requests(model, made, name))
        assert [[one] for one in said] == expected(wide, made, name)
    said = model.generate_until_multi_round(requests(model, made, "memory"))
    assert [json.loads(one) for one in said] == expected(wide, made, "memory")
    assert any(any(json.loads(one)) for one in said)


@BOTH
def test_losses_are_evals(adapter, exported, wide, made):
    model = adapter.NanoBabyLLaVA(pretrained=str(exported), device="cpu")
    with open(made / "wino.csv", newline="") as file:
        docs = list(csv.DictReader(file))
    model.task_dict["wino"] = {"test": docs}
    found = model.loglikelihood(
        [Instance("", f" {p}", visuals, i, "wino", "test") for i in range(4) for p in PHRASES]
    )
    found = [getattr(one, "text", one) for one in found]
    loaded = inference.open_model(wide)
    names = [doc["image"] for doc in docs]
    subject = Subject(loaded, [], names, names, evaluation.Config())
    losses = subject.nll([name for name in names for _ in PHRASES], [*PHRASES] * 4)
    assert np.allclose([loss for loss, _ in found], losses, rtol=0, atol=1e-5)
    assert all(isinstance(greedy, bool) for _, greedy in found)


def test_what_follows_greedily_is_greedy(adapter, exported, made, monkeypatch):
    """With a model that always says "a"."""
    model = adapter.NanoBabyLLaVA(pretrained=str(exported), device="cpu")
    gpt, tokenizer = model.loaded.model.gpt, model.loaded.tokenizer
    (a,) = tokenizer.encode("a")
    one_hot = torch.eye(gpt.config.vocab_size)[a]
    monkeypatch.setattr(gpt, "head", lambda hidden: 9 * one_hot.expand(*hidden.shape[:-1], -1))
    embeds = model.embed([json.loads((made / "pv.json").read_text())[0]["image"][0]])
    score = lambda context, text: model.inference.score_text(
        model.loaded, context, text, embeds, model.template, model.system
    )
    sure = np.log(1 + (gpt.config.vocab_size - 1) * np.exp(-9))
    assert score("", " a") == (pytest.approx(sure, abs=1e-4), True)
    assert score("", "b") == (pytest.approx(9 + sure, abs=1e-4), False)
    loss, greedy = score("what is it ?", "a ball")  # the answer of the template ends with <eos>
    assert np.isfinite(loss) and not greedy


def test_no_item_ends_a_run(adapter, recipe, made, tmp_path, capsys):
    """A context too small, a picture that is not there, wrong numbers of pictures."""
    folder = tmp_path / "small"
    export.main([str(recipe / "phase2.pt"), str(folder), "--to=babyvlm"])
    model = adapter.NanoBabyLLaVA(pretrained=str(folder), batch_size="16", device="cpu")
    asked = requests(model, made, "pv")
    capsys.readouterr()
    assert model.generate_until(asked) == [""] * len(asked)
    assert "first: no room in the context" in capsys.readouterr().out
    rounds = requests(model, made, "memory")
    model.task_dict["memory"]["test"][0]["image"][3] = "nowhere.png"
    said = [json.loads(one) for one in model.generate_until_multi_round(rounds)]
    assert [len(own) for own in said] == [15, 15]
    model.task_dict["memory"]["test"][1] = {"id": "neither pictures nor words"}
    said = [json.loads(one) for one in model.generate_until_multi_round(rounds)]
    assert len(said[0]) == 15 and said[1] == [""]
    model.task_dict["pv"]["test"][0]["image"] = model.task_dict["pv"]["test"][0]["image"][:2]
    assert len(model.generate_until(requests(model, made, "pv")[:1])) == 1
    model.task_dict["pv"] = {"test": [item("#?", ["nowhere.png"], "A")]}
    broken = Instance("<image>?", {}, visuals, 0, "pv", "test")
    assert model.generate_until([broken]) == [""]
    [lost] = model.loglikelihood([Instance("", " a", visuals, 0, "pv", "test")])
    assert getattr(lost, "text", lost) == (float("inf"), False)
    assert "FileNotFoundError" in capsys.readouterr().out


def test_gen_kwargs_and_bare_questions(adapter, exported, made):
    """max_new_tokens and until; a context without <image> gets its pictures at the front."""
    model = adapter.NanoBabyLLaVA(pretrained=str(exported), device="cpu")
    [whole] = model.generate_until(requests(model, made, "count")[:1])
    [short] = model.generate_until(requests(model, made, "count", max_new_tokens=2)[:1])
    assert whole.startswith(short) and len(short) < len(whole)
    end = whole[len(whole) // 2]
    [cut] = model.generate_until(requests(model, made, "count", until=[end])[:1])
    assert cut == whole.split(end)[0].strip()
    nothing = Instance("say a word", {}, lambda doc: [], 0, "count", "test")
    assert model.generate_until([nothing]) != [""] and not model.failed
    first = requests(model, made, "count")[0]
    bare = Instance(first.args[0].replace("<image> ", ""), *first.args[1:])
    in_front = Instance("<image>\n" + bare.args[0], *first.args[1:])
    assert model.generate_until([bare]) == model.generate_until([in_front])


# ---------------------------------------------------------------------------------------------
# The folder


def test_submission_json(exported, wide):
    described = json.loads((exported / "submission.json").read_text())
    model = inference.open_model(wide).model
    assert described["model_name"] == "mine" and described["checkpoint"] == "me/mine"
    assert described["registered_model"] == "nanobabyllava"
    meta = described["metadata"]
    assert meta["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert meta["max_seq_length"] == 1500 and meta["num_image_tokens"] == 4
    # all phases of the run, and that it is no result on SAYCam
    assert (
        meta["training_data"].startswith("toy ")
        and "vision, language, phase1" in meta["training_data"]
    )
    assert "toy world" in meta["model_description"]
    assert set(meta) >= {"model_type", "vision_encoder", "language_model", "main_contributions"}


@pytest.mark.parametrize("optimizer, said", [("adamw", "AdamW"), ("muon", "Muon, AdamW")])
def test_a_submission_names_its_optimizers(wide, optimizer, said):
    loaded = checkpoint.load(wide)
    loaded.checkpoint["settings"]["optimizer"] = optimizer
    assert submission.describe(loaded, "x", "")["metadata"]["optimizer"] == said


def test_the_folder_holds_all_code_and_no_training_state(exported, wide):
    """It runs in a process that cannot import this project."""
    code = (
        "import sys; sys.path.insert(0, 'nanobabyllava'); import inference\n"
        "loaded = inference.open_model('checkpoint.pt')\n"
        "assert 'nanobabyllava' in inference.__file__; print(loaded.model.gpt.config.n_embd)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=exported, capture_output=True, text=True
    )
    assert done.stdout.strip() == "16", done.stderr
    saved = torch.load(exported / "checkpoint.pt", weights_only=True)
    assert "optimizers" not in saved and checkpoint.read(wide)["digest"] == saved["digest"]


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--to=nowhere"], "--to"),
        (["--to=babyvlm", "--repo=me"], "want USER/NAME"),
        (["--name=mine"], "--name is not for --to transformers"),
        (["--to=babyvlm", "FULL"], "not an empty folder"),
        (["--to=babyvlm", "LANGUAGE"], "cannot see"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, flags, why):
    source = recipe / ("language.pt" if "LANGUAGE" in flags else "phase2.pt")
    if "FULL" in flags:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").touch()
    flags = [flag for flag in flags if flag.startswith("--")]
    with pytest.raises(UserError, match=why) as error:
        export.main([str(source), str(tmp_path / "out"), *flags])
    assert one_line(error)


def test_every_file_that_runs_is_copied():
    names = {
        str(path.relative_to(submission.ROOT)) for path in submission.files_behind("inference")
    }
    assert {"inference.py", "model.py", "common/__init__.py", "pretrained/convnets.py"} <= names
    assert not any(name.startswith(("sources", "tasks", "training", "train")) for name in names)


# ---------------------------------------------------------------------------------------------
# The real lmms-eval, where it is wanted

HARNESS = os.environ.get("HARNESS")
TASK = """task: nano_{name}
dataset_path: {kind}
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {output}
doc_to_visual: !function utils.visuals
doc_to_text: {text}
doc_to_target: !function utils.zero
process_results: !function utils.record
generation_kwargs:
  max_new_tokens: 32
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
import json
from PIL import Image

def visuals(doc, *more, **options):
    names = doc["image"] if isinstance(doc["image"], list) else [doc["image"]]
    return [Image.open(name) for name in names]

def question(doc, *more, **options):
    return doc["conversations"][0]["value"]

def zero(doc, *more, **options):
    return 0

def choices(doc, *more, **options):
    return [doc["positive_phrase"], doc["negative_phrase"]]

def record(doc, results):
    with open("LOG", "a") as file:
        file.write(json.dumps([doc["image"], results]) + "\\n")
    return {"acc": 0.0}
"""


def install(version):
    """The Python of a virtual environment with lmms-eval, made once."""
    folder = Path(HARNESS) / version
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        here = [
            f"torch=={torch.__version__.partition('+')[0]}",
            "transformers",
            "pillow",
            "tiktoken",
        ]
        subprocess.run([*pip, *here], check=True)
        needs = "datasets accelerate evaluate loguru tenacity sacrebleu pytz pytablewriter jinja2 "
        needs += "filelock==3.16.1 sqlitedict openai hf_transfer"
        subprocess.run([*pip, *needs.split()], check=True)
        subprocess.run([*pip, "--no-deps", f"lmms_eval=={version}"], check=True)
        (folder / "done").touch()
    return python


@pytest.mark.skipif(not HARNESS, reason="set HARNESS=DIR to install lmms-eval there")
@pytest.mark.parametrize("version", ["0.3.5", "0.7.3"])
@pytest.mark.parametrize("how", ["registered", "instance"])
def test_in_the_real_lmms_eval(exported, wide, made, tmp_path, version, how):
    """Registered as the organizers do it (0.7 by a plugin), and as an instance."""
    python, tasks = install(version), tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS.replace("LOG", str(tmp_path / "log")))
    for name in KINDS:
        output = "generate_until_multi_round" if name == "memory" else "generate_until"
        text = "!function utils.question"
        (tasks / f"{name}.yaml").write_text(
            TASK.format(
                name=name, kind="json", file=made / f"{name}.json", output=output, text=text
            )
        )
    (tasks / "wino.yaml").write_text(
        TASK.format(
            name="wino", kind="csv", file=made / "wino.csv", output="multiple_choice", text='""'
        )
        + "doc_to_choice: !function utils.choices\n"
    )
    names = ",".join(f"nano_{name}" for name in (*KINDS, "wino"))
    env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    if how == "registered":
        plugin = tmp_path / "plugin" / "plugged" / "models"
        plugin.mkdir(parents=True)
        (plugin.parent / "tasks").mkdir()
        for package in (plugin.parent, plugin.parent / "tasks"):
            (package / "__init__.py").touch()
        (plugin / "__init__.py").write_text("AVAILABLE_MODELS = {'sub_me_mine': 'NanoBabyLLaVA'}")
        (plugin / "sub_me_mine.py").write_bytes((exported / "model.py").read_bytes())
        env |= {"LMMS_EVAL_PLUGINS": "plugged", "PYTHONPATH": str(plugin.parent.parent)}
        command = [
            python,
            "-m",
            "accelerate.commands.launch",
            "--num_processes=1",
            "-m",
            "lmms_eval",
        ]
        command += [
            "--model",
            "sub_me_mine",
            "--model_args",
            f"pretrained={exported},conv_template=baby_v1",
        ]
        command += [
            "--task",
            names,
            "--include_path",
            tasks,
            "--batch_size",
            "16",
            "--trust_remote_code",
        ]
        command += ["--output_path", tmp_path / "logs"]
    else:
        script = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from model import NanoBabyLLaVA\nfrom lmms_eval.evaluator import simple_evaluate\n"
            "from lmms_eval.tasks import TaskManager\nfrom argparse import Namespace\n"
            "_, folder, include, tasks, version = sys.argv\n"
            "old = {'cli_args': Namespace(process_with_media=False)} if '0.3' in version else {}\n"
            "simple_evaluate(model=NanoBabyLLaVA(pretrained=folder), tasks=tasks.split(','),"
            " task_manager=TaskManager('INFO', include_path=include), batch_size=1, **old)\n"
        )
        command = [python, "-c", script, exported, tasks, names, version]
    done = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (tmp_path / "log").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    found = [json.loads(line) for line in open(tmp_path / "log")]
    for name in KINDS:
        docs = json.loads((made / f"{name}.json").read_text())
        for doc, replies in zip(docs, expected(wide, made, name)):
            want = [json.dumps(replies)] if name == "memory" else replies
            assert [doc["image"], want] in found, name
    losses = {(image,): results for image, results in found if isinstance(image, str)}
    assert len(losses) == 4
    for results in losses.values():
        assert all(isinstance(loss, float) and np.isfinite(loss) for loss, _ in results)
