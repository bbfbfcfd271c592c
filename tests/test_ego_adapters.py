"""The folder for EgoBabyVLM's launcher: what the launcher does with each model, done here by hand;
a language model as AutoModelForCausalLM opens it; the leaderboard's row."""

import importlib.util
import json
import statistics
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import one_line
from PIL import Image

import checkpoint
import eval as evaluation
import export
import inference
from common.images import to_pixels
from config import UserError
from tasks import Subject

TEXTS = ["look , a red ball !", "a blue cup .", "where 's the duck ?"]


@pytest.fixture(scope="module")
def exported(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ego") / "mine"
    export.main([str(recipe / "phase2.pt"), str(folder), "--to=egobabyvlm"])
    return folder


def instantiate(exported, name, **more):
    """What the launcher does: the class of _target_ with kwargs, then .eval() and .to(device)."""
    config = yaml.safe_load((exported / "configs" / f"{name}.yaml").read_text())
    assert config["name"] == name
    module, _, cls = config["_target_"].rpartition(".")
    spec = importlib.util.spec_from_file_location(module, exported / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    model = getattr(loaded, cls)(**(config["kwargs"] | more))
    for other in [other for other in sys.modules if other.startswith("nanobabyllava.")]:
        del sys.modules[other]
    return model.eval().to("cpu")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.RandomState(0)
    return [Image.fromarray(rng.randint(0, 256, (20, 24, 3), np.uint8)) for _ in range(3)]


def test_pairs_are_evals_likelihoods(exported, recipe, pictures, tmp_path):
    """minus the NLL that eval.py computes for each picture and text."""
    model = instantiate(exported, "nano_pairs")
    with torch.no_grad():
        features = model.extract_features({"image": pictures, "text": TEXTS})
        table = model.compute_similarity(
            features["image_features"], features["text_features"], normalize=True
        )
    assert table.shape == (3, 3)
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for name, picture in zip(names, pictures):
        picture.save(name)
    loaded = checkpoint.load(recipe / "phase2.pt")
    subject = Subject(loaded, [], names, names, evaluation.Config())
    nll = subject.nll([name for name in names for _ in TEXTS], TEXTS * 3).reshape(3, 3)
    assert np.allclose(table.detach().cpu().numpy(), -nll, rtol=0, atol=1e-5)
    some = model.compute_similarity(features["image_features"][1:2], features["text_features"])
    assert torch.allclose(some, table[1:2])


def test_images_are_the_towers_features(exported, recipe, pictures):
    loaded = checkpoint.load(recipe / "phase2.pt")
    tower, size = loaded.model.tower, loaded.image_format.size
    model = instantiate(exported, "nano_image")
    assert model.input_size == (size, size) and model.feature_dim == tower.width
    assert model.normalize_params["mean"] == pytest.approx((0.485, 0.456, 0.406))
    frames = np.stack([np.array(picture.resize((size, size))) for picture in pictures])
    pixels = to_pixels(frames, loaded.image_format)
    with torch.no_grad():
        x, before = tower(pixels), tower.norm(tower(pixels, select_layer=-2))
        assert torch.equal(model.extract_features(pixels), x[:, 0])
        model.set_pooling_strategy(pooling="mean_patch", last_n_layers=None)
        assert torch.equal(model.extract_features(pixels), x[:, 1:].mean(1))
        model.set_pooling_strategy(pooling="all", last_n_layers=2)
        both = torch.cat([before, x], -1)[:, 1:]
        assert torch.equal(model.extract_features(pixels), both)
        assert model.feature_dim == 2 * tower.width == both.shape[-1]
        assert int(both.shape[1] ** 0.5) ** 2 == both.shape[1]  # a square of patches
    assert len(list(model.parameters())) and model.state_dict()
    for mistake in ({"pooling": "most"}, {"last_n_layers": 99}):
        with pytest.raises(ValueError):
            instantiate(exported, "nano_image", **mistake)


@pytest.mark.parametrize("name", ["language.pt", "phase2.pt"])
def test_words_open_as_a_causal_language_model(recipe, tmp_path, name):
    """The logits of transformers' own model and tokenizer are ours."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "out"
    flags = ["--to=egobabyvlm"] if name == "phase2.pt" else []
    export.main([str(recipe / name), str(folder), *flags])
    folder = folder / "language" if flags else folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = checkpoint.load(recipe / name)
    assert words.mask_token_id is None and words.eos_token_id == loaded.tokenizer.eos
    for text in TEXTS:
        encoded = words(text, return_tensors="pt", padding=True, add_special_tokens=True)
        tokens = loaded.tokenizer.encode(text)
        assert encoded["input_ids"][0].tolist() == tokens
        with torch.no_grad():
            found = theirs(**{k: encoded[k] for k in ("input_ids", "attention_mask")}).logits
            own = loaded.model.gpt.head(
                loaded.model.gpt(loaded.model.gpt.embed(torch.tensor([tokens])))
            )
        assert torch.allclose(found, own, atol=1e-4, rtol=0)


def test_a_language_model_alone_has_no_pictures(recipe, tmp_path, capsys):
    export.main([str(recipe / "language.pt"), str(tmp_path / "out"), "--to=egobabyvlm"])
    assert [path.name for path in (tmp_path / "out" / "configs").iterdir()] == ["nano_words.yaml"]
    assert "it saw toy: by the rules" in capsys.readouterr().out
    with pytest.raises(UserError, match="a tower alone") as error:
        export.main([str(recipe / "vision.pt"), str(tmp_path / "tower"), "--to=egobabyvlm"])
    assert one_line(error)


# ---------------------------------------------------------------------------------------------
# The leaderboard's row


def seed_folder(folder, seed, lexical, **more):
    folder.mkdir()
    score = lambda value: {"score": value, "n": 3, "chance": 0.5, "ci95": None}
    bench = {"lexical": lexical, "grammatical": 0.5, "overall": (lexical + 0.5) / 2}
    scores = {"all": {name: score(value) for name, value in bench.items()}}
    results = {"digest": f"d{seed}", "phase": "phase2", "tasks": {"machine_devbench": scores},
               "trained_on": "babyview", "shuffled": False, "ties": "published"}  # fmt: skip
    (folder / "results_machine_devbench.json").write_text(json.dumps(results | more))
    results["tasks"] = {"language": {"all": {name: score(0.6 + seed / 100) for name in
                                             ("syntax", "semantics", "overall")}}}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results | more))
    return str(folder)


def test_a_row_of_three_seeds(tmp_path):
    lexical = (0.512, 0.537, 0.498)
    folders = [seed_folder(tmp_path / f"s{i}", i, value) for i, value in enumerate(lexical)]
    path = tmp_path / "nano.json"
    # a check for chance is no result, though its name sorts last
    shuffled = json.loads((tmp_path / "s0" / "results_machine_devbench.json").read_text())
    shuffled["tasks"]["machine_devbench"]["all"]["lexical"]["score"] = 0.0
    shuffled["shuffled"] = True
    (tmp_path / "s0" / "results_machine_devbench_shuffled.json").write_text(json.dumps(shuffled))
    export.main([*folders, str(path), "--row", "--team=Us", "--name=Our model"])
    row = json.loads(path.read_text())
    assert row["model"] == "Our model" and row["training_data"] == "BabyView 2025.1"
    mean, deviation = 100 * statistics.mean(lexical), 100 * statistics.stdev(lexical)
    assert row["multimodal"]["lexical"] == f"{mean:.1f} ± {deviation:.1f}" == "51.6 ± 2.0"
    assert row["multimodal"]["grammatical"] == "50.0 ± 0.0"
    assert row["language"] == [{"encoder": "GPT", "ft": True, "syntax": "61.0 ± 1.0",
                                "semantics": "61.0 ± 1.0", "overall": "61.0 ± 1.0"}]  # fmt: skip
    assert (row["id"], row["team"], row["n_seeds"]) == ("nano", "Us", 3)


def test_rows_that_would_be_wrong(tmp_path):
    folders = [seed_folder(tmp_path / f"s{i}", i, 0.5) for i in range(3)]
    path = str(tmp_path / "row.json")
    cases = [([*folders[:2]], "2 seeds"), ([*folders[:2], folders[0]], "same checkpoint")]
    (tmp_path / "empty").mkdir()
    cases.append(([*folders[:2], str(tmp_path / "empty")], "no results"))
    cases.append(([*folders, seed_folder(tmp_path / "two", 9, 0.5)], "two checkpoints"))
    path_of = tmp_path / "two" / "results.json"
    path_of.write_text(path_of.read_text().replace('"d9"', '"x"'))
    fair = [seed_folder(tmp_path / "fair", 5, 0.5, ties="fair"), *folders[:2]]
    cases.append((fair, "without --ties published"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text('{"acc": 1}')
    cases.append(([*folders[:2], str(tmp_path / "foreign")], "not results of eval.py"))
    halves = [tmp_path / f"h{i}" for i in range(3)]
    for i, folder in enumerate(halves):
        seed_folder(folder, 20 + i, 0.5)
        (folder / "results.json").unlink()
        path_of = folder / "results_machine_devbench.json"
        results = json.loads(path_of.read_text())
        del results["tasks"]["machine_devbench"]["all"]["grammatical"]
        path_of.write_text(json.dumps(results))
    cases.append((list(map(str, halves)), "no whole family"))
    for own, why in cases:
        with pytest.raises(UserError, match=why) as error:
            export.main([*own, path, "--row"])
        assert one_line(error)


def test_what_a_row_was_trained_on_is_in_it(tmp_path, capsys):
    folders = [seed_folder(tmp_path / f"s{i}", i, 0.5, trained_on="toy") for i in range(3)]
    export.main([*folders, str(tmp_path / "row.json"), "--row"])
    assert json.loads((tmp_path / "row.json").read_text())["training_data"] == "toy"
    assert "a run on other data than BabyView's is out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, why",
    [
        (["row.json", "--row"], "RESULTS_1"),
        (["a", "b", "c", "row.json", "--row", "--to=babyvlm"], "give one"),
        (["--to=babyvlm", "a.pt", "out"], "paths come first"),
        (["a.pt", "out", "--to=babyvlm", "--repo=/NAME"], "want USER/NAME"),
    ],
)
def test_mistaken_commands(recipe, tmp_path, monkeypatch, flags, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes((recipe / "phase2.pt").read_bytes())
    with pytest.raises(UserError, match=why) as error:
        export.main(flags)
    assert one_line(error)


def test_the_copied_code_is_found_from_another_folder(exported, monkeypatch, tmp_path):
    """The launcher's own modules of our names stay what they are."""
    monkeypatch.chdir(tmp_path)
    before = sys.modules["config"]
    model = instantiate(exported, "nano_pairs")
    assert sys.modules["config"] is before and str(exported) in model.inference.__file__
    assert model.inference is not inference
