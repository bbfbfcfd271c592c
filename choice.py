"""
Questions with a choice of answers, about pictures: which answer is likeliest, and which is said?

    python eval.py --checkpoint out/toy_llava15/phase3.pt --task choice
    python eval.py --checkpoint DIR --task choice --csv mine.json --images DIR2

A JSON is a list of {"image": [...], "conversations": [{"from": "human", "value": "<image> ..."},
...], "choices": ["a ball .", "a cup ."], "answer": 0, "subset": "what"}: a conversation that ends
with a question, the answers to choose from, and the number of the right one. Two measures:
`likelihood`, under which the answer counts with the lowest mean NLL per token; `generation`, where
the model speaks and its words must name the right answer and no other.
"""

import numpy as np

import inference
from config import UserError
from files import read_list
from scores import accuracy, lowest, names_in
from templates import TEMPLATES, chat_sample, end_tokens, expand


def check(item):
    """Why an item is no question, or ""."""
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
        return 'want {"image", "conversations", "choices", "answer"}'
    turns = item["conversations"]
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        return 'each turn wants {"from", "value"}'
    if not all(isinstance(name, str) for name in item["image"]):
        return "its image must be a name or several"
    speakers = [turn.get("from") for turn in turns]
    if speakers != (["human", "gpt"] * len(speakers))[: len(speakers)] or len(speakers) % 2 == 0:
        return "its conversation must go human, gpt, ..., human"
    choices, answer = item.get("choices"), item.get("answer")
    whole = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not whole or len(set(choices)) != len(choices) or len(choices) < 2:
        return "want two different choices or more"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"answer {answer!r} is none of the numbers of its choices"
    asked = sum(turn["value"].count("<image>") for turn in turns)
    if asked != len(item["image"]):
        return f"{asked} <image> for {len(item['image'])} pictures"
    return ""


def read(path):
    """The questions of a JSON file, one dict each. Raises UserError, with file and item."""
    items = read_list(path, "questions")
    for i, item in enumerate(items):
        if isinstance(item, dict):
            names = item.get("image") or []
            item["image"] = names if isinstance(names, list) else [names]
        fault = check(item)
        if fault:
            raise UserError(f"{path}: item {i}: {fault}")
    return items


def prompt_of(item, loaded, template, system, counts):
    """The tokens that an answer follows; without a template: the pictures, then the last words."""
    said = [turn["value"] for turn in item["conversations"]]
    turns = [*zip(said[:-1:2], said[1::2]), (said[-1], None)]
    if not template:
        words = loaded.tokenizer.encode(said[-1].replace("<image>", " ").strip())
        tokens = [loaded.tokenizer.image] * len(counts) + words
    else:
        tokens, _ = chat_sample(loaded.tokenizer, TEMPLATES[template], turns, system)
    return expand(tokens, loaded.tokenizer.image, counts)


def answers_to(loaded, prompts, shown, stop, max_new_tokens=40, batch=32):
    """What is said after each prompt, greedily; prompts of one length together."""
    answers = [""] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(alike), batch):
            rows = alike[start : start + batch]
            said = inference.say(
                loaded, [prompts[i] for i in rows], [shown[i] for i in rows], stop, max_new_tokens
            )
            for i, words in zip(rows, said):
                answers[i] = words
    return answers


def score(rows, subject, ties):
    """{"likelihood", "generation"} of the questions `rows`, asked of an eval.Subject."""
    loaded = subject.loaded
    template, system = loaded.choose_template(subject.settings.template)
    form = TEMPLATES.get(template)
    shown = [subject.embeds(row["image"]) for row in rows]
    counts = [[len(embed) for embed in embeds] for embeds in shown]
    prompts = [prompt_of(r, loaded, template, system, c) for r, c in zip(rows, counts)]
    befores, embeds, words = [], [], []
    for row, prompt, own in zip(rows, prompts, shown):
        for choice in row["choices"]:
            answer = form.answer.format(choice) if form else " " + choice
            befores.append(prompt)
            embeds.append(own)
            words.append(loaded.tokenizer.encode_exactly(answer, begins=False))
    nll = inference.nll_after(loaded, befores, embeds, words, subject.settings.batch)
    said = answers_to(loaded, prompts, shown, end_tokens(loaded.tokenizer, form))
    likeliest, spoken, chances, first = [], [], [], 0
    for row, answer in zip(rows, said):
        own = nll[first : first + len(row["choices"])]
        first += len(row["choices"])
        likeliest.append(lowest(own, row["answer"], ties))
        choices = [choice.lower() for choice in row["choices"]]
        spoken.append(names_in(answer.lower(), set(choices)) == {choices[row["answer"]]})
        chances.append(1 / len(row["choices"]))
    chance = round(float(np.mean(chances)), 4)
    return {"likelihood": accuracy(likeliest, chance), "generation": accuracy(spoken, None)}
