"""
Grammar pairs in the form of Zorro (Huebner et al. 2021): is the right sentence likelier than the
wrong one?

    python eval.py --checkpoint out/childes/language.pt --zorro DIR

DIR holds a .txt file for each of 23 paradigms, with wrong sentences in odd lines and right ones in
even lines; or EgoBabyVLM's .json of 13 tasks, lines of {"sentence_good", "sentence_bad"}.
`accuracy` is the mean over files; `thirteen`, if all are there, the mean over EgoBabyVLM's 13
tasks. Each paradigm belongs to one.

A vocabulary with upper-case words gets the sentences as EgoBabyVLM writes them, in their case and
without a space before . and ?; for others they are lower-cased.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import read_lines
from config import UserError
from tasks import phrase_nll
from tasks.scores import accuracy

SUFFIXES = (".txt", ".json", ".jsonl")
TASKS = {  # the start of a paradigm's name: EgoBabyVLM's task
    "agreement_subject_verb": "subject_verb_agreement",
    "agreement_determiner_noun": "determiner_noun_agreement",
    "anaphor_agreement": "anaphor_agreement",
    "argument_structure": "argument_structure",
    "binding": "binding",
    "case": "case_subjective_pronoun",
    "ellipsis": "ellipsis",
    "filler-gap": "filler_gap",
    "irregular": "irregular_forms",
    "island-effects": "island_effects",
    "local_attractor": "local_attractor",
    "npi_licensing": "npi_licensing",
    "quantifiers": "quantifiers",
}


def task_of(name):
    """The task of a file of this name, or ""."""
    if name in TASKS.values():
        return name
    return next((task for start, task in TASKS.items() if name.startswith(f"{start}-")), "")


def keeps_case(tokenizer):
    """Whether a vocabulary has tokens of two letters or more with an upper-case one."""
    texts = (tokenizer.decode([number]).strip() for number in range(tokenizer.vocab_size))
    return any(len(text) > 1 and text.isalpha() and text != text.lower() for text in texts)


def read_pairs(path):
    """[(wrong, right)] of a file. Raises UserError."""
    lines = [line.strip() for line in read_lines(path)]
    lines = [line for line in lines if line]
    if path.suffix == ".txt":
        if len(lines) % 2 or not lines:
            raise UserError(f"{path}: {len(lines)} sentences are no pairs")
        return list(zip(lines[::2], lines[1::2]))
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            pairs.append((item["sentence_bad"], item["sentence_good"]))
        except (ValueError, KeyError, TypeError):
            want = 'want {"sentence_good", "sentence_bad"} in each line'
            raise UserError(f"{path}:{number}: {want}") from None
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise UserError(f"{path}: no pairs of sentences")
    return pairs


def zorro(directory, loaded, batch):
    """{"all": {"accuracy": the mean over files, "thirteen" if the files are Zorro's, and a measure
    for each file}}. Raises UserError.

    The log-probability of a sentence is the sum over its tokens, after an <eos>."""
    files = [path for path in sorted(Path(directory).glob("*")) if path.suffix in SUFFIXES]
    if not files:
        raise UserError(f"{directory}: no .txt files of sentence pairs, nor .json or .jsonl")
    cased = keeps_case(loaded.tokenizer)
    if cased:
        write = lambda text: text.replace(" .", ".").replace(" ?", "?")
    else:
        write = str.lower
    paradigms, by_task = {}, defaultdict(list)
    for path in tqdm(files, "zorro", unit="file"):
        sentences = [write(text) for pair in read_pairs(path) for text in pair]
        lengths = np.array([len(loaded.tokenizer.encode(text)) for text in sentences])
        scores = phrase_nll(loaded, None, sentences, batch) * lengths
        wrong, right = scores[::2], scores[1::2]
        hits = np.where(right == wrong, 0.5, right < wrong)
        paradigms[path.stem] = accuracy(hits, 0.5)
        by_task[task_of(path.stem)] += hits.tolist()
    means = {"accuracy": [result["score"] for result in paradigms.values()]}
    if set(by_task) == set(TASKS.values()):
        means["thirteen"] = [np.mean(hits) for hits in by_task.values()]
    for name, scores in means.items():
        score = round(float(np.mean(scores)), 4)
        means[name] = {"score": score, "n": len(scores), "chance": 0.5, "ci95": None}
    return {"all": means | paradigms}
