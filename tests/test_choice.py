"""Questions with a choice of answers: scored against a slow reference, corrupted files refused."""

import json

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image

import checkpoint
import eval as evaluation
import inference
from config import UserError
from tasks import choice
from tokenizer import TEMPLATES, chat_sample, expand


def question(**changes):
    item = {
        "image": ["0.png"],
        "conversations": [{"from": "human", "value": "<image>what ?"}],
        "choices": ["a ball .", "a red cup ."],
        "answer": 0,
        "subset": "what",
    }
    return item | changes


@pytest.fixture
def folder(tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        noise = np.random.RandomState(i).randint(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    return tmp_path


def ask(items, *flags, model):
    with open("asked.json", "w") as file:
        json.dump(items, file)
    flags = ["--task=choice", "--csv=asked.json", "--images=.", "--out=out", *flags]
    evaluation.main([f"--checkpoint={model}", "--template=baby_v1", *flags])
    return json.load(open("out/results_choice.json"))["tasks"]["choice"]


def test_the_likeliest_answer_by_a_slow_reference(folder, recipe):
    """One answer at a time, no padding, fp64."""
    loaded = checkpoint.load(recipe / "phase2.pt")
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "a"}]
    items = [question(image=[f"{i}.png"], answer=i % 2) for i in range(3)]
    items.append(question(image=[], conversations=[*said, {"from": "human", "value": "a"}]))
    hits = []
    for item in items:
        turns = [(item["conversations"][-1]["value"], None)]
        if len(item["conversations"]) == 3:
            turns = [("a", "a"), *turns]
        tokens, _ = chat_sample(loaded.tokenizer, TEMPLATES["baby_v1"], turns)
        embeds = (
            inference.embed_pictures(loaded, inference.read_pictures(loaded, item["image"]))
            if item["image"]
            else []
        )
        tokens = expand(tokens, loaded.tokenizer.image, [len(embed) for embed in embeds])
        nll = []
        for words in item["choices"]:
            answer = loaded.tokenizer.encode(words)
            seen = torch.cat(embeds) if embeds else None
            with torch.no_grad():
                hidden = loaded.model.hidden_states(torch.tensor([tokens + answer]), seen)
                logits = loaded.model.gpt.head(hidden)[0]
            logs = logits.double().log_softmax(-1)[len(tokens) - 1 : -1]
            nll.append(-float(logs.gather(1, torch.tensor(answer)[:, None]).mean()))
        hits.append(int(np.argmin(nll) == item["answer"]))
    results = ask(items, model=recipe / "phase2.pt")
    assert results["all"]["likelihood"]["score"] == pytest.approx(np.mean(hits), abs=1e-4)
    assert results["all"]["likelihood"]["chance"] == 0.5 and results["all"]["likelihood"]["n"] == 4


def test_subsets_are_counted_apart(folder, recipe):
    items = [question(subset="one"), question(subset="two", choices=["a", "b", "c", "d"])]
    results = ask(items, model=recipe / "phase2.pt")
    assert results["two"]["likelihood"]["chance"] == 0.25
    assert results["all"]["likelihood"]["chance"] == 0.375


def test_what_is_said_must_name_the_right_answer_alone(folder, recipe, monkeypatch):
    items = [question(answer=0), question(answer=0), question(answer=0), question(answer=1)]
    said = ["a ball .", "It is A ball, yes", "a ball . a red cup", "a red cup"]
    monkeypatch.setattr(choice.inference, "answer_prompts", lambda *args, **more: said)
    results = ask(items, model=recipe / "phase2.pt")
    assert results["all"]["generation"]["score"] == 0.75  # the third named both


@pytest.mark.parametrize(
    "item, message",
    [
        ("x", "item 1: want {"),
        ({}, "item 1: want {"),
        (question(conversations=[]), "must go human, gpt, ..., human"),
        (question(conversations=["what ?"]), "each turn wants"),
        (question(conversations=[{"from": "human"}]), "each turn wants"),
        (question(image=3), "a name or several"),
        (question(choices=["a"]), "two different choices"),
        (question(choices=["a", "a"]), "two different choices"),
        (question(answer=2), "answer 2 is none"),
        (question(answer=True), "answer True is none"),
        (question(image=[]), "1 <image> for 0 pictures"),
        (question(image="9.png"), "no 9.png in "),
    ],
    ids=str,
)
def test_a_corrupted_file_is_one_clear_line(folder, recipe, item, message):
    with pytest.raises(UserError, match=message) as error:
        ask([question(), item], model=recipe / "phase2.pt")
    assert one_line(error)


def test_a_file_that_is_no_list_is_refused(folder, recipe):
    for content, message in [("{", "not JSON"), ("{}", "a list of questions")]:
        with open("asked.json", "w") as file:
            file.write(content)
        with pytest.raises(UserError, match=message):
            choice.read_questions("asked.json")
