"""The tests of eval.py, against loops and counted sets; chance where there is nothing to know."""

import json
import math
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, one_line

import checkpoint
import data
import eval as evaluation
import inference
import tasks
import train
from batches import Plan, SampleBatches, TextBatches
from config import UserError
from sources import command, toy
from tasks import babyvlm
from tasks.scores import accuracy
from tasks.zorro import zorro
from training import validation

FAIR = "fair"


class Pretend:
    """A Subject whose scores are given: nll(image, phrase) and caption(image)."""

    def __init__(self, nll=None, caption=None, rows=()):
        self.score, self.say, self.rows = nll, caption, rows

    def nll(self, images, phrases):
        return np.array([float(self.score(i, p)) for i, p in zip(images, phrases)])

    def caption(self, images):
        return [self.say(image) for image in images]


TIED = Pretend(lambda image, phrase: 1.0)


def winoground_rows(instances=1):
    return [
        {
            "instance_id": i,
            "positive_phrase": "p",
            "negative_phrase": "n",
            "image": f"{tag}{i}",
            "image_tag": tag,
            "line": 2,
        }
        for i in range(instances)
        for tag in ("positive", "negative")
    ]


def labeled_rows(kinds="abcd", target="b", trials=1):
    return [
        {"trial_id": t, "target_category": target, "real_category": kind, "image": kind}
        for t in range(trials)
        for kind in kinds
    ]


PAIR = {
    "image": "x",
    "positive_phrase": "p",
    "negative_phrase": "n",
    "foil_image": "y",
    "phrase": "p",
    "foil_phrase": "n",
}


def test_scores_are_the_mean_over_phrase_tokens(recipe):
    """One pair at a time, without padding, in fp64 softmax: the slow truth."""
    loaded = checkpoint.load(recipe / "phase2.pt")
    torch.manual_seed(0)
    features = torch.randn(3, 4, loaded.model.tower.width)
    phrases = ["red ball", "a", "look , a red ball ! oh , what is that ?", "red ball"]
    rows = [0, 2, 1, 2]
    with torch.no_grad():
        shown = [loaded.model.embed_images(features[row : row + 1]) for row in rows]
    fast = tasks.phrase_nll(loaded, shown, phrases, batch=3)
    for score, row, phrase in zip(fast, rows, phrases):
        words = loaded.tokenizer.encode(phrase)
        tokens = torch.tensor([[loaded.tokenizer.image] * 4 + words])
        logits = loaded.model(tokens, images=features[row : row + 1])[0][0].double().log_softmax(-1)
        slow = -sum(logits[3 + i, word] for i, word in enumerate(words)) / len(words)
        assert abs(score - slow) < 1e-5


def test_scores_that_are_no_numbers_are_refused(recipe):
    loaded = checkpoint.load(recipe / "phase2.pt")
    loaded.model.gpt.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite numbers"):
        tasks.phrase_nll(loaded, None, ["a ball"])
    with pytest.raises(UserError, match="makes no tokens"):
        tasks.phrase_nll(loaded, None, ["a ball", ""])


# ---- the rules


def test_a_model_that_knows_nothing_scores_chance():
    """All scores tied: each rule must give exactly the chance that it prints."""
    labeled = babyvlm.labeled_s(labeled_rows(), TIED, FAIR)["accuracy"]
    assert labeled["score"] == labeled["chance"] == 0.25
    for rule in (babyvlm.vtwt, babyvlm.two_by_one):
        assert rule([PAIR], TIED, FAIR)["accuracy"]["score"] == 0.5
    for result in (
        babyvlm.baby_winoground(winoground_rows(), TIED, FAIR),
        babyvlm.two_by_two([PAIR], TIED, FAIR),
    ):
        assert set(result) == set(babyvlm.WINOGROUND)
        for measure in result.values():
            assert measure["score"] == pytest.approx(measure["chance"], abs=1e-4)


def test_by_the_published_rule_a_model_that_knows_nothing_is_perfect():
    four = labeled_rows("bcda")
    assert babyvlm.labeled_s(four, TIED, "published")["accuracy"]["score"] == 1
    assert babyvlm.vtwt([PAIR], TIED, "published")["accuracy"]["score"] == 1
    assert babyvlm.two_by_two([PAIR], TIED, "published")["group"]["score"] == 0


def test_the_chance_of_trials_of_unequal_size_is_their_mean():
    rows = labeled_rows("ab") + [row | {"trial_id": 9} for row in labeled_rows("abcd")]
    result = babyvlm.labeled_s(rows, TIED, FAIR)["accuracy"]
    assert result["chance"] == result["score"] == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_the_lowest_wins_wherever_it_stands():
    order = iter([3, 1, 2, 4, 1, 3, 2, 4])
    subject = Pretend(lambda image, phrase: next(order))
    assert babyvlm.labeled_s(labeled_rows(trials=2), subject, FAIR)["accuracy"]["score"] == 0.5
    rows = labeled_rows()
    rows[1]["real_category"] = "a"
    with pytest.raises(UserError, match="0 pictures of its target"):
        babyvlm.labeled_s(rows, TIED, FAIR)


def test_the_generic_forms_ask_for_the_right_picture_and_phrase():
    truth = {"red": "r.png", "blue": "b.png"}
    knows = Pretend(lambda image, phrase: truth[phrase] != image)
    one = [
        dict(image="r.png", foil_image="b.png", phrase="red"),
        dict(image="r.png", foil_image="b.png", phrase="blue"),
    ]  # mislabelled: must be wrong
    assert babyvlm.two_by_one(one, knows, FAIR)["accuracy"]["score"] == 0.5
    two = dict(image="r.png", foil_image="b.png", phrase="red", foil_phrase="blue")
    assert babyvlm.two_by_two([two], knows, FAIR)["group"]["score"] == 1
    swapped = two | {"phrase": "blue", "foil_phrase": "red"}
    assert babyvlm.two_by_two([swapped], knows, FAIR)["group"]["score"] == 0


@pytest.mark.parametrize(
    "change", [{"image_tag": "positive"}, {"image_tag": "neutral"}, {"negative_phrase": "another"}]
)
def test_an_instance_that_is_no_instance_is_refused_with_its_line(change):
    """Two positive sides, or sides whose phrases differ, once passed."""
    rows = winoground_rows()
    rows[1] |= change
    with pytest.raises(UserError, match="baby_winoground:2: instance 0 needs one row") as error:
        babyvlm.baby_winoground(rows, TIED, FAIR)
    assert one_line(error)
    with pytest.raises(UserError, match="instance 0 needs"):
        babyvlm.baby_winoground(winoground_rows() + winoground_rows()[:1], TIED, FAIR)


def test_captions_are_asked_for_the_thing_and_its_colour():
    """A fixed sentence to equal means nothing; what is named does."""
    said = {"1": "a red ball .", "2": "a ball and a cat .", "3": "it 's a cat .", "4": "hello ."}
    rows = [
        dict(image=i, text="x", thing=t, colour=c)
        for i, t, c in (
            ("1", "ball", "blue"),
            ("2", "ball", "red"),
            ("3", "cat", "red"),
            ("4", "cat", "blue"),
        )
    ]
    result = babyvlm.captions(rows, Pretend(caption=said.get, rows=rows), FAIR)
    assert result["names_thing"]["score"] == 0.5  # 2 names another, too; 4 none
    assert result["colour_if_said"]["score"] == 0 and result["colour_if_said"]["n"] == 1
    assert len(set(result) & {"meteor", "meteor_exact"}) == 1
    plain = [dict(image="1", text="a red ball .")]
    assert len(babyvlm.captions(plain, Pretend(caption=said.get, rows=plain), FAIR)) == 1


def test_a_subset_is_asked_about_all_the_names_there_are():
    """A name that only occurs outside a subset is a wrong one within it, too."""
    rows = [
        dict(image=str(i), text="x", thing=thing, colour="")
        for i, thing in enumerate(("ball", "cat"))
    ]
    subject = Pretend(caption=lambda image: "a cat and a ball", rows=rows)
    assert babyvlm.captions(rows[:1], subject, FAIR)["names_thing"]["score"] == 0


def test_dealing_the_pictures_anew_brings_chance():
    """A scorer that knows the truth is perfect, and at chance once pictures are shuffled."""
    rng = np.random.RandomState(0)
    kinds = list(toy.THINGS)
    labels = rng.randint(0, len(kinds), 600)
    foils = (labels + rng.randint(1, len(kinds), 600)) % len(kinds)
    rows = [
        dict(image=str(i), positive_phrase=kinds[a], negative_phrase=kinds[b])
        for i, (a, b) in enumerate(zip(labels, foils))
    ]
    knows = lambda deal: Pretend(lambda i, phrase: kinds[labels[deal[int(i)]]] != phrase)
    assert babyvlm.vtwt(rows, knows(np.arange(600)), FAIR)["accuracy"]["score"] == 1.0
    low, high = babyvlm.vtwt(rows, knows(rng.permutation(600)), FAIR)["accuracy"]["ci95"]
    assert low < 0.5 < high


# ---- the command


def test_a_task_alone_from_files_of_its_own(recipe, home, tmp_path, capsys):
    """The same scores as within the whole evaluation; pictures from a folder or a zip."""
    whole = json.loads((recipe / "results.json").read_text())["tasks"]
    folder = home / "data/tiny/eval"
    paths = sorted((folder / "images/vtwt").glob("*.png"))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in paths[1:]:
            archive.write(path, f"deep/vtwt/{path.name}")
    (tmp_path / "rest/vtwt").mkdir(parents=True)
    (tmp_path / "rest/vtwt" / paths[0].name).write_bytes(paths[0].read_bytes())
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
    score = lambda task: f"{whole[task]['all']['accuracy']['score']:.3f}"
    assert ours[-4:] == [score("labeled_s"), score("vtwt"), "-", "-"]


def test_pictures_of_equal_names_in_a_zip_are_told_apart(recipe, home, tmp_path):
    """By base name alone the second one's score was once the first one's."""
    folder = home / "data/tiny/eval/images/vtwt"
    one, two = sorted(folder.glob("*.png"))[:2]
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(one, "a/1.png")
        archive.write(two, "b/1.png")
    (tmp_path / "t.csv").write_text("image,foil_image,phrase\na/1.png,b/1.png,a ball\n")
    (tmp_path / "d.csv").write_text(f"image,foil_image,phrase\n{one.name},{two.name},a ball\n")
    results = []
    for csv, images in (("t.csv", tmp_path / "z.zip"), ("d.csv", folder)):
        evaluation.main(
            [
                "--checkpoint=out/full/phase2.pt",
                "--task=two_by_one",
                f"--csv={tmp_path}/{csv}",
                f"--images={images}",
                f"--out={tmp_path}",
            ]
        )
        results.append(json.loads((tmp_path / "results_two_by_one.json").read_text())["tasks"])
    assert results[0] == results[1]
    assert results[0]["two_by_one"]["all"]["accuracy"]["score"] in (0.0, 1.0)
    (tmp_path / "t.csv").write_text("image,foil_image,phrase\n1.png,b/1.png,a ball\n")
    with pytest.raises(UserError, match="2 pictures could be meant"):
        evaluation.main(
            [
                "--checkpoint=out/full/phase2.pt",
                "--task=two_by_one",
                f"--csv={tmp_path}/t.csv",
                f"--images={tmp_path}/z.zip",
            ]
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task=vtww"], "--task vtww: one of toolbox, labeled_s, vtwt"),
        (["--csv=x.csv"], "need a --task: one of labeled_s"),
        (["--ties=kind"], "one of fair, published"),
        (["--batch=-1"], "batch -1 is not allowed"),
        (["--task=vtwt", "--images=elsewhere"], "elsewhere: neither a folder nor a whole zip"),
        (["--task=vtwt", "--images=data/tiny/features"], "no vtwt/.* in "),
        (["--task=vtwt", "--checkpoint=out/full/language.pt"], "cannot see"),
        (["--checkpoint=out/full/vision.pt"], "a tower alone"),
        (["--zorro=none"], "no .txt files"),
    ],
)
def test_a_mistaken_command_is_one_clear_line(recipe, home, flags, message):
    with pytest.raises(UserError, match=message) as error:
        evaluation.main(["--checkpoint=out/full/phase2.pt", "--out=out/none", *flags])
    assert one_line(error)


@pytest.mark.parametrize(
    "flags, suffix", [(["--shuffle"], "_shuffled"), (["--ties=published"], "_published_ties")]
)
def test_results_asked_in_another_way_do_not_overwrite_the_others(
    flags, suffix, recipe, home, tmp_path
):
    evaluation.main(["--checkpoint=out/full/phase2.pt", f"--out={tmp_path}", *flags])
    assert {path.name for path in tmp_path.iterdir()} == {
        f"results{suffix}.json",
        f"hits{suffix}.json",
        f"report{suffix}.html",
        f"captions{suffix}.png",
    }
    report = (tmp_path / f"report{suffix}.html").read_text()
    assert ("Pictures were shuffled" in report) == ("--shuffle" in flags)


def test_results_name_chance_interval_and_subsets(recipe):
    results = json.loads((recipe / "results.json").read_text())
    tasks = results["tasks"]
    assert set(tasks) == {"labeled_s", "vtwt", "baby_winoground", "caption"}
    for name in ("labeled_s", "vtwt"):
        assert set(tasks[name]) == {"all", "seen", "held_out"}
        for subset in tasks[name].values():
            result = subset["accuracy"]
            assert 0 <= result["ci95"][0] <= result["score"] <= result["ci95"][1] <= 1
            assert result["chance"] and result["n"]
    assert set(tasks["baby_winoground"]["all"]) == set(babyvlm.WINOGROUND)
    assert "names_thing" in tasks["caption"]["seen"]
    assert math.isfinite(results["val_loss"]) and len(results["corpus"]) == 64


def test_a_new_test_is_an_entry_in_one_table(recipe, home, tmp_path, monkeypatch):
    def longer_is_better(rows, subject, ties):
        hits = [
            len(said) >= len(row["short"])
            for row, said in zip(rows, subject.caption([row["picture"] for row in rows]))
        ]
        return {"accuracy": accuracy(hits, 0.5)}

    entry = tasks.Task(("picture", "short"), ("picture",), longer_is_better)
    monkeypatch.setitem(tasks.TASKS, "longer", entry)
    image = sorted((home / "data/tiny/eval/images/vtwt").glob("*.png"))[0]
    (tmp_path / "l.csv").write_text(f"picture,short\n{image.name},\n".replace(",\n", ",a\n"))
    evaluation.main(
        [
            "--checkpoint=out/full/phase2.pt",
            "--task=longer",
            f"--csv={tmp_path}/l.csv",
            f"--images={image.parent}",
            f"--out={tmp_path}",
        ]
    )
    assert json.loads((tmp_path / "results_longer.json").read_text())["tasks"]["longer"]["all"]


# ---- losses


def test_validation_loss_is_the_mean_over_all_words(recipe, home):
    """Against one sample at a time; four samples in batches of three: the last has one."""
    loaded, dataset = checkpoint.load(recipe / "phase2.pt"), data.Data("data/tiny")
    total, count = 0.0, 0
    one = SampleBatches(dataset, "val", 1, 1, loaded.model)
    for row in range(4):
        batch = one.read(Plan(np.array([row]), 40))
        tokens, targets, positions, images, *_ = batch.to("cpu", dataset.image_format)
        logits = loaded.model(tokens, None, positions, images)[0].double().log_softmax(-1)
        chosen = logits.gather(1, targets.clamp(min=0)[:, None])[: batch.count]
        total, count = total - chosen.sum().item(), count + batch.count
    batches = SampleBatches(dataset, "val", 3, 1, loaded.model)
    found = validation.val_loss(loaded.model, batches, dataset.image_format)
    assert found == pytest.approx(total / count, abs=1e-5)


def test_the_last_rows_of_a_text_count_too(recipe, home):
    loaded, dataset = checkpoint.load(recipe / "language.pt"), data.Data("data/tiny")
    losses = [
        validation.val_loss(
            loaded.model, TextBatches(dataset, "val", batch, 0, loaded.model), dataset.image_format
        )
        for batch in (1, 5, 1000)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) == pytest.approx(losses[2], abs=1e-5)


def test_another_vocabulary_gets_no_loss_and_says_so(recipe, home, capsys):
    command.main(
        [
            "toy",
            "--name=other",
            "--size=16",
            "--scenes=4",
            "--lines=90",
            "--trials=0.03",
            "--vocab_size=280",
        ]
    )
    loaded = checkpoint.load(recipe / "language.pt")
    assert evaluation.losses(loaded, data.Data("data/other")) == {}
    assert "has another vocabulary" in capsys.readouterr().out
    assert evaluation.losses(loaded, data.Data("data/tiny"))["bits_per_character"] > 0


def test_unknown_words_are_no_guessed_characters(home, tmp_path, monkeypatch, capsys):
    """With a vocabulary of words, an <unk> stands for words of any length."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a red ball .\n" * 200)
    for name, words in (("all", "a red ball ."), ("some", "a red .")):
        vocab = {word: i for i, word in enumerate(["<unk>", *words.split()])}
        (tmp_path / f"{name}.json").write_text(json.dumps(vocab))
        flags = [f"--name={name}", "--text=text.txt", f"--vocab={name}.json"]
        command.main(["pairs", *flags])
        train.main([f"--data=data/{name}", f"--out=out/{name}", "--phase=language", *SMALL])
        loaded = checkpoint.load(f"out/{name}/language.pt")
        found = evaluation.losses(loaded, data.Data(f"data/{name}"))
        assert ("bits_per_character" in found) == (name == "all") and found["val_loss"] > 0
    assert "no bits per character: 20 words of val are not" in capsys.readouterr().out


def test_grammar_pairs_prefer_the_likelier_sentence(recipe, home, tmp_path):
    """A blank line once turned 1.000 into 0.000."""
    loaded = checkpoint.load(recipe / "language.pt")
    (tmp_path / "a.txt").write_text("red ball a .\n\nlook , a red ball !\nx\nx\n\n")
    result = zorro(tmp_path, loaded, 2)["all"]
    scores = []
    for line in ("red ball a .", "look , a red ball !"):
        tokens = torch.tensor([[loaded.tokenizer.eos] + loaded.tokenizer.encode(line)])
        logits = loaded.model(tokens)[0][0, :-1].double().log_softmax(-1)
        scores.append(logits.gather(1, tokens[0, 1:, None]).sum().item())
    assert result["a"]["score"] == ((scores[1] > scores[0]) + 0.5) / 2 and result["a"]["n"] == 2
    assert result["accuracy"]["score"] == result["a"]["score"]
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(UserError, match="3 sentences are no pairs"):
        zorro(tmp_path, loaded, 2)


def test_pictures_matter_to_the_shipped_model(tmp_path, monkeypatch):
    """On a fresh toy world it answers well; its pictures dealt to other captions, it guesses."""
    monkeypatch.chdir(tmp_path)
    command.main(["toy", "--scenes=2", "--lines=50", "--trials=0.15", "--seed=99"])
    loaded = checkpoint.load(ROOT / "assets/toy.pt")
    settings = evaluation.Config(checkpoint="assets/toy.pt", data="data/toy")
    seen = evaluation.evaluate(loaded, settings)[0]["tasks"]
    assert seen["labeled_s"]["seen"]["accuracy"]["score"] > 0.7
    assert seen["vtwt"]["seen"]["accuracy"]["score"] > 0.8
    settings.shuffle = True
    blind = evaluation.evaluate(loaded, settings)[0]["tasks"]
    for task in ("labeled_s", "vtwt"):
        result = blind[task]["all"]["accuracy"]
        low, high = result["ci95"]
        assert low - 0.05 < result["chance"] < high + 0.05, task


def test_grammar_pairs_need_no_prepared_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zorro").mkdir()
    (tmp_path / "zorro" / "one.txt").write_text("ball a .\na ball .\n")
    evaluation.main([f"--checkpoint={ROOT}/assets/toy.pt", "--zorro=zorro", "--out=here"])
    results = json.loads((tmp_path / "here/results_zorro.json").read_text())
    assert list(results["tasks"]) == ["zorro"] and "val_loss" not in results


def test_data_with_nothing_to_validate_on_gets_no_loss_and_says_so(recipe, home, capsys):
    loaded, dataset = checkpoint.load(recipe / "phase2.pt"), data.Data("data/tiny")
    val = dataset.meta["splits"]["val"]
    dataset.meta["splits"]["val"] = {name: val[name] for name in ("text", "characters")}
    assert list(evaluation.losses(loaded, dataset)) == ["bits_per_character"]
    assert "nothing to validate this model on" in capsys.readouterr().out
    dataset.meta["splits"]["val"] = {}
    assert evaluation.losses(loaded, dataset) == {}
    assert "has no text to validate on" in capsys.readouterr().out


def test_what_later_phases_forget_is_measured_on_the_same_text(recipe, home):
    """The bits per character of a model that sees: its own language model's, to the digit."""
    loaded, dataset = checkpoint.load(recipe / "phase2.pt"), data.Data("data/tiny")
    found = evaluation.losses(loaded, dataset)["bits_per_character"]
    loaded.model.projector = loaded.model.tower = None
    assert evaluation.losses(loaded, dataset)["bits_per_character"] == found


def test_only_files_of_ones_own_stand_beside_the_paper(recipe, home, capsys):
    """The toy world's own trials, scored without --csv, once did."""
    here = f"--out={home}/beside"
    start = [f"--checkpoint={recipe}/phase2.pt", here]
    evaluation.main([*start, "--task=vtwt"])
    evaluation.main([*start, "--task=caption", "--csv=data/tiny/eval/caption.csv"])
    said = capsys.readouterr().out.splitlines()
    row = next(line for line in said if line.startswith("this one, trained on"))
    assert row.split()[-4:-1] == ["-", "-", "-"]
    assert "this one's on data/tiny/eval/caption.csv" in said


@pytest.mark.parametrize("phase", ["language", "phase2"])
def test_weights_in_bfloat16_keep_fp32_positions_and_give_a_loss(recipe, home, tmp_path, phase):
    """Rotary tables in bfloat16 would be wrong from some position on."""
    loaded = inference.open_model(recipe / f"{phase}.pt", dtype="bfloat16")
    assert loaded.model.gpt.cos.dtype == torch.float32 and loaded.dtype == torch.bfloat16
    flags = [f"--checkpoint={recipe}/{phase}.pt", "--dtype=bfloat16", f"--out={tmp_path}"]
    evaluation.main(flags)
    exact = json.loads((recipe / "results.json").read_text())
    found = json.loads((tmp_path / "results.json").read_text())
    if phase == "phase2":
        assert found["val_loss"] == pytest.approx(exact["val_loss"], rel=0.05)
