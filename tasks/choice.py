"""
Multiple-choice questions about pictures: which answer is likeliest, and which is generated?

    python eval.py --checkpoint out/toy_llava15/phase3.pt --task choice
    python eval.py --checkpoint DIR --task choice --csv mine.json --images DIR2

A JSON is a list of {"image": [...], "conversations": [{"from": "human", "value": "<image> ..."},
...], "choices": ["a ball .", "a cup ."], "answer": 0, "subset": "what"}: a conversation that ends
with a question, the answers to choose from, and the number of the right one. Two measures:
`likelihood` takes the answer with the lowest mean NLL per token; for `generation` the model answers
freely, and its answer must contain the right choice and no other.
"""

import numpy as np

import inference
from common.files import read_list
from config import UserError
from tasks.scores import accuracy, lowest, names_in
from tokenizer import chat_sample, end_tokens, expand


def fault_of(item):
    """Why an item is not a valid question, or ""."""
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


def read_questions(path):
    """The questions of a JSON file, a dict each. Raises UserError, with file and item."""
    items = read_list(path, "questions")
    for i, item in enumerate(items):
        if isinstance(item, dict):
            names = item.get("image") or []
            item["image"] = names if isinstance(names, list) else [names]
        fault = fault_of(item)
        if fault:
            raise UserError(f"{path}: item {i}: {fault}")
    return items


def prompt_of(item, loaded, template, system, counts):
    """The tokens before an answer; without a template the pictures, then the last question."""
    texts = [turn["value"] for turn in item["conversations"]]
    turns = [*zip(texts[:-1:2], texts[1::2]), (texts[-1], None)]
    if template is None:
        words = loaded.tokenizer.encode(texts[-1].replace("<image>", " ").strip())
        tokens = loaded.tokenizer.start + [loaded.tokenizer.image] * len(counts) + words
    else:
        tokens, _ = chat_sample(loaded.tokenizer, template, turns, system)
    return expand(tokens, loaded.tokenizer.image, counts)


def choice(rows, subject, ties):
    """{"likelihood", "generation"} of questions, asked of a tasks.Subject."""
    loaded = subject.loaded
    template, system = loaded.choose_template(subject.settings.template)
    embeds = [subject.together(row["image"]) for row in rows]
    counts = [[len(embed) for embed in own] for own in embeds]
    prompts = [prompt_of(r, loaded, template, system, c) for r, c in zip(rows, counts)]
    all_prompts, all_embeds, words = [], [], []  # one for each choice
    for row, prompt, own in zip(rows, prompts, embeds):
        for text in row["choices"]:
            answer = template.answer.replace("{}", text) if template else " " + text
            all_prompts.append(prompt)
            all_embeds.append(own)
            words.append(loaded.tokenizer.encode_segment(answer, after="text"))
    nll = inference.nll_after(loaded, all_prompts, all_embeds, words, subject.settings.batch)
    stop = end_tokens(loaded.tokenizer, template)
    answers = inference.answer_prompts(loaded, prompts, embeds, stop, max_new_tokens=40)
    likeliest, generated, chances, first = [], [], [], 0
    for row, answer in zip(rows, answers):
        own = nll[first : first + len(row["choices"])]
        first += len(row["choices"])
        likeliest.append(lowest(own, row["answer"], ties))
        choices = [text.lower() for text in row["choices"]]
        generated.append(names_in(answer.lower(), set(choices)) == {choices[row["answer"]]})
        chances.append(1 / len(row["choices"]))
    chance = round(float(np.mean(chances)), 4)
    return {"likelihood": accuracy(likeliest, chance), "generation": accuracy(generated, None)}
