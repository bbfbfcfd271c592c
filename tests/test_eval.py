"""The scorer, against loops and counted sets; chance where there is nothing to know."""

import itertools
import json
import math
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import sample
import toyworld
from data import DataError


def test_scores_are_the_mean_over_phrase_tokens(recipe):
    """One pair at a time, without padding, in fp64 softmax: the slow truth."""
    parts = sample.load(recipe / "phase2.pt")
    torch.manual_seed(0)
    features = torch.randn(3, 4, parts.tower.width)
    phrases = ["red ball", "a", "look , a red ball ! oh , what is that ?", "red ball"]
    rows = [0, 2, 1, 2]
    fast = evaluation.phrase_nll(parts, features, rows, phrases, batch=3)
    for score, row, phrase in zip(fast, rows, phrases):
        words = parts.tokenizer.encode(phrase)
        tokens = torch.tensor([[parts.tokenizer.image] * 4 + words])
        logits = (
            parts.model(tokens, features=features[row : row + 1])[0][0].double().log_softmax(-1)
        )
        slow = -sum(logits[3 + i, word] for i, word in enumerate(words)) / len(words)
        assert abs(score - slow) < 1e-5


def test_a_model_that_knows_nothing_scores_chance():
    """All scores tied: each rule must give exactly its chance, which the published one does not."""
    tied = lambda images, phrases: np.zeros(len(images))
    four = [dict(trial_id=0, target_category="a", real_category=c, image=c) for c in "abcd"]
    assert evaluation.labeled_s(four, tied)["accuracy"] == 0.25
    pair = [dict(image="x", positive_phrase="p", negative_phrase="n")]
    assert evaluation.vtwt(pair, tied)["accuracy"] == 0.5
    two = [
        dict(instance_id=0, positive_phrase="p", negative_phrase="n", image=t, image_tag=t)
        for t in ("positive", "negative")
    ]
    result = evaluation.baby_winoground(two, tied)
    assert result["image"]["accuracy"] == result["text"]["accuracy"] == 0.25


def test_by_the_published_rule_a_model_that_knows_nothing_is_perfect():
    tied = lambda images, phrases: np.zeros(len(images))
    four = [dict(trial_id=0, target_category="a", real_category=c, image=c) for c in "bcda"]
    pair = [
        dict(
            image="x",
            positive_phrase="p",
            negative_phrase="n",
            foil_image="y",
            phrase="p",
            foil_phrase="n",
        )
    ]
    assert evaluation.labeled_s(four, tied, "published")["accuracy"] == 1
    assert evaluation.vtwt(pair, tied, "published")["accuracy"] == 1
    assert evaluation.two_by_two(pair, tied, "published")["group"]["accuracy"] == 0
    assert evaluation.two_by_one(pair, tied)["accuracy"] == 0.5
    assert evaluation.two_by_two(pair, tied)["image"]["accuracy"] == 0.25


def test_the_generic_forms_ask_for_the_right_picture_and_phrase():
    """Scores that know which of four pictures each phrase belongs to."""
    truth = {"red": "r.png", "blue": "b.png"}
    knows = lambda images, phrases: np.array(
        [float(truth[p] != i) for i, p in zip(images, phrases)]
    )
    one = [
        dict(image="r.png", foil_image="b.png", phrase="red"),
        dict(image="r.png", foil_image="b.png", phrase="blue"),
    ]  # mislabelled: must be wrong
    assert evaluation.two_by_one(one, knows)["accuracy"] == 0.5
    two = [dict(image="r.png", foil_image="b.png", phrase="red", foil_phrase="blue")]
    assert evaluation.two_by_two(two, knows)["group"]["accuracy"] == 1
    two[0]["phrase"], two[0]["foil_phrase"] = "blue", "red"
    assert evaluation.two_by_two(two, knows)["group"]["accuracy"] == 0


def test_a_task_alone_from_files_of_its_own(recipe, home, tmp_path, capsys):
    """The same scores as within the whole evaluation; pictures from a folder or a zip."""
    whole = json.loads((recipe / "results.json").read_text())["tasks"]
    folder = home / "data/tiny/eval"
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((folder / "images").rglob("vtwt/*.png"))[1:]:
            archive.write(path, f"deep/{path.name}")
    one = sorted((folder / "images").rglob("vtwt/*.png"))[0]
    (tmp_path / "rest/vtwt").mkdir(parents=True)
    (tmp_path / "rest/vtwt" / one.name).write_bytes(one.read_bytes())
    flags = ["--checkpoint=out/full/phase2.pt", f"--out={tmp_path}"]
    for task, images in (
        ("labeled_s", [str(folder / "images")]),
        ("vtwt", [str(tmp_path / "images.zip"), str(tmp_path / "rest")]),
    ):
        evaluation.main(
            [
                *flags,
                f"--task={task}",
                f"--csv={folder}/{task}.csv",
                "--batch=7",
                "--images",
                *images,
            ]
        )
        got = json.loads((tmp_path / f"results_{task}.json").read_text())["tasks"]
        assert got == {task: whole[task]}
    table = capsys.readouterr().out.splitlines()
    assert any(
        line.split()[-4:] == ["0.420", "0.625", "0.066", "0.138"] for line in table
    )  # the paper's row, and ours, of both files
    ours = [line for line in table if line.startswith("this one, trained on data/tiny")][-1].split()
    assert ours[-4:] == [
        f"{whole['labeled_s']['accuracy']:.3f}",
        f"{whole['vtwt']['accuracy']:.3f}",
        "-",
        "-",
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task=vwtw"], "--task vwtw: one of labeled_s, vtwt"),
        (["--csv=x.csv"], "one of labeled_s"),
        (["--ties=kind"], "fair or published"),
        (["--task=vtwt", "--csv=no.csv"], "no.csv: No such file"),
        (["--task=two_by_one"], "two_by_one.csv: No such file"),
        (["--task=vtwt", "--images=elsewhere"], "elsewhere: neither a folder nor a whole zip"),
        (["--task=vtwt", "--images=."], "no vtwt/.*, which vtwt asks for"),
        (["--task=vtwt", "--checkpoint=out/full/phase0.pt"], "cannot see"),
    ],
)
def test_a_mistaken_task_is_one_clear_line(recipe, home, flags, message):
    with pytest.raises(DataError, match=message) as error:
        evaluation.main(["--checkpoint=out/full/phase2.pt", "--out=out/none", *flags])
    assert "\n" not in str(error.value)


def test_winogrounds_rules_and_chances_over_every_order():
    """All 24 orders of four distinct scores, written out from the paper's inequalities."""
    rows = [
        dict(instance_id=0, positive_phrase="p", negative_phrase="n", image=t, image_tag=t)
        for t in ("positive", "negative")
    ]
    totals = {}
    for scores in itertools.permutations(range(4)):
        L00, L01, L10, L11 = scores
        got = evaluation.baby_winoground(rows, lambda images, phrases: np.array(scores, float))
        want = {
            "image": L00 < L10 and L11 < L01,
            "text": L00 < L01 and L11 < L10,
            "positive_context": L00 < L10 and L00 < L01,
            "negative_context": L11 < L01 and L11 < L10,
        }
        want["group"] = want["image"] and want["text"]
        for rule, value in want.items():
            assert got[rule]["accuracy"] == value
            totals[rule] = totals.get(rule, 0) + value
    for rule, total in totals.items():
        assert total / 24 == pytest.approx(got[rule]["chance"])


def test_the_lowest_wins_wherever_it_stands():
    rows = [
        dict(trial_id=t, target_category="b", real_category=c, image=c)
        for t in range(2)
        for c in "abcd"
    ]
    nll = lambda images, phrases: np.array([3, 1, 2, 4, 1, 3, 2, 4.0])
    assert evaluation.labeled_s(rows, nll)["accuracy"] == 0.5
    rows[1]["real_category"] = "a"
    with pytest.raises(DataError, match="0 pictures of its target"):
        evaluation.labeled_s(rows, nll)


def test_the_interval_is_wilsons():
    assert evaluation.wilson(8, 10) == [0.4902, 0.9433]  # Brown, Cai and DasGupta 2001's formula
    low, high = evaluation.wilson(0, 20)
    assert low == 0 and 0.15 < high < 0.17


def test_meteor_is_nltks_without_its_thesaurus():
    nltk = pytest.importorskip("nltk.translate.meteor_score")
    empty = SimpleNamespace(synsets=lambda word: [])
    plain = SimpleNamespace(stem=lambda word: word)
    rng = np.random.RandomState(0)
    for _ in range(300):
        a, b = ([str(w) for w in rng.randint(0, 6, rng.randint(1, 10))] for _ in range(2))
        theirs = nltk.single_meteor_score(a, b, stemmer=plain, wordnet=empty)
        assert evaluation.meteor_exact(a, b) == pytest.approx(theirs)


def test_captions_without_a_word_score_nothing():
    assert evaluation.meteor_exact(["a"], []) == 0.0


def test_dealing_the_pictures_anew_brings_chance():
    """A scorer that knows the truth is perfect, and at chance once pictures are shuffled."""
    rng = np.random.RandomState(0)
    kinds = list(toyworld.THINGS)
    labels = rng.randint(0, len(kinds), 600)
    rows = []
    for i, label in enumerate(labels):
        foil = (label + rng.randint(1, len(kinds))) % len(kinds)
        rows.append(dict(image=str(i), positive_phrase=kinds[label], negative_phrase=kinds[foil]))
    knows = lambda deal: (
        lambda images, phrases: np.array(
            [float(kinds[labels[deal[int(i)]]] != p) for i, p in zip(images, phrases)]
        )
    )
    assert evaluation.vtwt(rows, knows(np.arange(600)))["accuracy"] == 1.0
    shuffled = evaluation.vtwt(rows, knows(rng.permutation(600)))
    assert shuffled["ci95"][0] < 0.5 < shuffled["ci95"][1]


def test_results_name_chance_interval_and_subsets(recipe):
    results = json.loads((recipe / "results.json").read_text())
    tasks = results["tasks"]
    assert set(tasks) == {"labeled_s", "vtwt", "baby_winoground", "caption"}
    for name in ("labeled_s", "vtwt"):
        assert {"accuracy", "chance", "n", "ci95", "subsets"} <= set(tasks[name])
        assert set(tasks[name]["subsets"]) == {"seen", "held_out"}
        low, high = tasks[name]["ci95"]
        assert 0 <= low <= tasks[name]["accuracy"] <= high <= 1
    assert {"image", "text", "group", "positive_context", "negative_context"} <= set(
        tasks["baby_winoground"]
    )
    assert ("meteor" in tasks["caption"]) != ("meteor_exact" in tasks["caption"])
    assert math.isfinite(results["val_loss"])


def test_validation_loss_is_the_mean_over_all_words(recipe, home):
    parts = sample.load(recipe / "phase2.pt")
    batches = data.PairBatches(data.Data("data/tiny"), "val", 48)
    n = len(batches)
    tokens, targets, features = map(torch.as_tensor, batches(0, n, shuffle=False))
    logits = parts.model(tokens, features=features)[0].double().log_softmax(-1)
    asked = targets != -100
    slow = -logits[asked].gather(1, targets[asked][:, None]).mean().item()
    assert evaluation.val_loss(parts.model, batches, n) == pytest.approx(slow, abs=1e-5)


def test_grammar_pairs_prefer_the_likelier_sentence(recipe, home, tmp_path):
    parts = sample.load(recipe / "phase0.pt")
    (tmp_path / "a.txt").write_text("red ball a .\nlook , a red ball !\nx\nx\n")
    result = evaluation.zorro(tmp_path, parts, 2)["paradigms"]["a"]
    scores = []
    for line in ("red ball a .", "look , a red ball !"):
        tokens = torch.tensor([[parts.tokenizer.eos] + parts.tokenizer.encode(line)])
        logits = parts.model(tokens)[0][0, :-1].double().log_softmax(-1)
        scores.append(logits.gather(1, tokens[0, 1:, None]).sum().item())
    assert result["accuracy"] == ((scores[1] > scores[0]) + 0.5) / 2 and result["n"] == 2
    with pytest.raises(DataError, match="no .txt files"):
        evaluation.zorro(tmp_path / "none", parts, 2)
