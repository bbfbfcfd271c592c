"""LongTail-Swap and Visual-Property Swap: rows, swapped sentences and tables against the published
rules, written here a second time as a loop over dictionaries; Zorro's two forms of files."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import one_line

import checkpoint
import eval as evaluation
from config import UserError
from tasks import swap
from tasks.swap import mean_of, read_row, run_swap, score_sentences, table_of
from tasks.zorro import TASKS, task_of, zorro


def test_rows():
    words = read_row("3|VERB_a_b|run|s|1|You run.|4|eat|t|2|We eat.|3\n", "wordswap")
    assert words == (3, "VERB", [("run", "You run.", 4), ("eat", "We eat.", 3)])
    visual = "0|VISUAL_colour|red|a red cup|2|blue|a blue ball|2"
    assert read_row(visual, "visual") == (
        0, "VISUAL", [("red", "a red cup", 2), ("blue", "a blue ball", 2)])  # fmt: skip
    assert read_row(visual.replace("a red", "a big"), "visual") is None
    for rule, name in (("SHORT_x", "SHORT"), ("DET_LONG", "SHORT"), ("LONG_x", "LONG"), ("Q", "Q")):
        assert read_row(f"1|{rule}|is|it is|3|are|they are|5", "agrswap")[1] == name
    assert read_row("1|NOUN_x|is|it is|3|are|they are|5", "inflswap")[1] == "NOUN_x"
    for line in ("", "1|a|b", "x|NOUN|is|it is|3|are|they are|5", visual + "|more"):
        assert read_row(line, "inflswap") is None


@pytest.mark.parametrize(
    "pair, swapped",
    [
        ([("run", "you run .", 4), ("eat", "we eat .", 3)], ["You eat .", "We run ."]),
        ([("run", "Run away", 0), ("eat", "we eat", 3)], ["Eat away", "We run"]),
        # positions that count words, in both sentences
        ([("run", "you run .", 1), ("eat", "we all eat .", 2)], ["You eat .", "We all run ."]),
        # one character position that does not fit makes both count words
        ([("run", "you run .", 1), ("a", "a b", 0)], ["You a .", "Run b"]),
    ],
)
def test_swapped_sentences(pair, swapped):
    assert swap.swap(pair) == swapped


def published_mean(rows, hits):
    """The score of a kind by the published loop: dictionaries first, then a matrix."""
    won, tried = {}, {}
    for number in range(11):
        won[number] = dict.fromkeys(("VERB", "NOUN", "LONG", "SHORT", "VISUAL"), 0)
        tried[number] = dict.fromkeys(won[number], 0)
    for (number, rule, _), own in zip(rows, hits):
        for _ in range(own):
            won[number][rule] = won[number].get(rule, 0) + 1
        tried[number][rule] = tried[number].get(rule, 0) + 2
    matrix = {}
    for number in won:
        for rule in won[number]:
            if tried[number].get(rule, 0) > 0:
                matrix.setdefault(number, {})
                if won[number][rule] > 0:
                    matrix[number][rule] = np.around(won[number][rule] / tried[number][rule], 4)
    if not matrix:
        return 0.0
    columns = sorted(matrix[min(matrix)])
    cells = np.array([[matrix[n].get(c, 0) for c in columns] for n in sorted(matrix)], float)
    cells[cells == 0] = np.nan
    return float(np.around(np.nanmean(np.around(np.nanmean(cells, axis=1), 3)), 3))


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_tables_equal_the_published_loop():
    rng = np.random.RandomState(0)
    for trial in range(300):
        rules = ("VERB", "NOUN", "odd") if trial % 2 else ("SHORT", "LONG")
        rows = [
            (int(rng.randint(1 + trial % 11)), str(rng.choice(rules)), [])
            for _ in range(rng.randint(1, 60))
        ]
        hits = [int(rng.choice([0, 1, 2], p=(0.6, 0.2, 0.2))) for _ in rows]
        table, _, _ = table_of(rows, hits)
        expected, found = published_mean(rows, hits), mean_of(table)
        assert found == expected or (math.isnan(found) and math.isnan(expected)), trial


def test_sentences_are_scored_from_their_second_token_to_an_eos(recipe):
    loaded = checkpoint.load(recipe / "language.pt")
    tokenizer = loaded.tokenizer
    found = score_sentences(loaded, ["look , a red ball !", "a", "a red ball ."], 2)
    assert found["a"] == 0.0  # one token
    for text in ("look , a red ball !", "a red ball ."):
        tokens = tokenizer.encode(text)
        logits = loaded.model(torch.tensor([tokens]))[0][0].double().log_softmax(-1)
        targets = torch.tensor([*tokens[1:], tokenizer.eos])
        expected = logits.gather(1, targets[:, None]).sum().item()
        assert found[text] == pytest.approx(expected, abs=1e-4)


def write_files(folder):
    folder.mkdir()
    rows = ["0|VISUAL_c|red|a red ball .|2|blue|a blue cup .|2", "broken"]
    (folder / "vp_swap_colour_pairs.txt").write_text("\n".join(rows))
    (folder / "vp_swap_size_pairs.txt").write_text(
        "2|VISUAL_s|big|a big cup .|2|red|a red ball .|2"
    )
    for kind in ("inflswap", "agrswap"):
        rows = "1|SHORT|is|it is red .|3|are|they are red .|5"
        (folder / f"{kind}_pairs.txt").write_text(rows)
    rows = "1|NOUN_x|cup|s|0|a red cup .|6|ball|t|0|look , a ball !|9"
    (folder / "wordswap_pairs.txt").write_text(rows)


def test_from_the_command_line(recipe, tmp_path, capsys):
    write_files(tmp_path / "swaps")
    (tmp_path / "zorro").mkdir()
    for task in TASKS.values():
        item = {"sentence_good": "a red ball .", "sentence_bad": "ball red a .", "phenomena": task}
        (tmp_path / "zorro" / f"{task}.json").write_text(json.dumps(item) + "\n")
    flags = [f"--checkpoint={recipe}/language.pt", f"--out={tmp_path}/out"]
    evaluation.main([*flags, f"--swap={tmp_path}/swaps", f"--zorro={tmp_path}/zorro"])
    assert "visual: 1 of 3 rows skipped" in capsys.readouterr().out
    tasks = json.loads((tmp_path / "out" / "results_zorro_swap.json").read_text())["tasks"]
    scores = {name: result["score"] for name, result in tasks["swap"]["all"].items()}
    assert list(scores) == ["wordswap", "inflswap", "agrswap", "visual"]
    assert tasks["swap"]["all"]["visual"]["n"] == 4
    thirteen = tasks["zorro"]["all"]["thirteen"]
    assert thirteen["n"] == 13 and thirteen["score"] == tasks["zorro"]["all"]["accuracy"]["score"]
    syntax = np.mean([thirteen["score"], scores["inflswap"], scores["agrswap"]])
    semantics = np.mean([scores["wordswap"], scores["visual"]])
    language = {name: result["score"] for name, result in tasks["language"]["all"].items()}
    assert language["syntax"] == pytest.approx(syntax, abs=1e-4)
    assert language["overall"] == pytest.approx((syntax + semantics) / 2, abs=1e-4)


def test_corrupted_folders(recipe, tmp_path):
    loaded = checkpoint.load(recipe / "language.pt")
    for content, why in ((None, "none of wordswap"), ("junk", "none of its rows"),
                         ("99|NOUN|is|it is|3|are|they are|5", "bin 99")):  # fmt: skip
        if content:
            (tmp_path / "inflswap_pairs.txt").write_text(content)
        with pytest.raises(UserError, match=why) as error:
            run_swap(tmp_path, loaded, 8)
        assert one_line(error)


def test_paradigms_of_zorro_belong_to_thirteen_tasks():
    names = [
        "agreement_determiner_noun-across_1_adjective", "agreement_subject_verb-in_simple_question",
        "anaphor_agreement-pronoun_gender", "argument_structure-transitive", "binding-principle_a",
        "case-subjective_pronoun", "ellipsis-n_bar", "filler-gap-wh_question_object",
        "irregular-verb", "island-effects-adjunct_island", "npi_licensing-matrix_question",
        "local_attractor-in_question_with_aux", "quantifiers-superlative",
    ]  # fmt: skip
    assert sorted(map(task_of, names)) == sorted(TASKS.values()) and task_of("article") == ""


def test_thirteen_tasks_pool_their_paradigms(recipe, tmp_path):
    """Two paradigms of one task count as one, by their pairs."""
    loaded = checkpoint.load(recipe / "language.pt")
    pairs = {"binding-principle_a": 1, "filler-gap-wh_question_object": 3, "filler-gap-wh_x": 1}
    for name, count in pairs.items():
        lines = ["ball red a .", "a red ball ."] * count
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    (tmp_path / "filler-gap-wh_x.txt").write_text("a red ball .\nball red a .")
    result = zorro(tmp_path, loaded, 4)["all"]
    assert "thirteen" not in result  # of two tasks alone
    hit = result["binding-principle_a"]["score"]
    assert hit in (0, 1) and result["filler-gap-wh_x"]["score"] == 1 - hit
    assert result["accuracy"]["score"] == pytest.approx((hit + hit + 1 - hit) / 3, abs=1e-4)
    others = set(TASKS.values()) - {"binding", "filler_gap"}
    for task in others:
        (tmp_path / f"{task}.txt").write_text("ball red a .\na red ball .")
    result = zorro(tmp_path, loaded, 4)["all"]
    pooled = (3 * hit + (1 - hit)) / 4
    assert result["thirteen"]["n"] == 13
    assert result["thirteen"]["score"] == pytest.approx((12 * hit + pooled) / 13, abs=1e-4)


def test_case_is_kept_if_the_vocabulary_keeps_it(recipe, tmp_path, monkeypatch):
    """Upper-case words, and no space before . and ?, as EgoBabyVLM writes them."""
    loaded, seen = checkpoint.load(recipe / "language.pt"), []
    import tasks.zorro as module

    keep = module.phrase_nll
    monkeypatch.setattr(module, "phrase_nll", lambda l, e, s, b: seen.extend(s) or keep(l, e, s, b))
    (tmp_path / "binding-x.txt").write_text("is Mark here ?\nMark is here .")
    zorro(tmp_path, loaded, 4)
    monkeypatch.setattr(module, "keeps_case", lambda tokenizer: True)
    zorro(tmp_path, loaded, 4)
    assert seen == ["is mark here ?", "mark is here .", "is Mark here?", "Mark is here."]
    monkeypatch.undo()
    assert not module.keeps_case(loaded.tokenizer)
    from tokenizer import Tokenizer

    assert module.keeps_case(Tokenizer.train(["Mark is here"] * 9, 280))


@pytest.mark.parametrize(
    "content", ["{", '{"sentence_good": "a"}', "[]", '{"sentence_good": 1, "sentence_bad": 2}']
)
def test_corrupted_pairs(recipe, tmp_path, content):
    (tmp_path / "binding.json").write_text(content)
    with pytest.raises(UserError, match="binding.json") as error:
        zorro(tmp_path, checkpoint.load(recipe / "language.pt"), 4)
    assert one_line(error)
