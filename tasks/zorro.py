"""
Grammar pairs in the form of Zorro (Huebner et al. 2021): is the right sentence likelier than the
wrong one?

    python eval.py --checkpoint out/childes/language.pt --zorro DIR

DIR holds a .txt file for each paradigm; its odd lines are wrong, its even lines right.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import read_lines
from config import UserError
from tasks import phrase_nll
from tasks.scores import accuracy


def zorro(directory, loaded, batch):
    """{"all": {"accuracy": the mean over files, and a measure for each file}}. Raises UserError.

    The log-probability of a sentence is the sum over its tokens, after an <eos>."""
    files = sorted(Path(directory).glob("*.txt"))
    if not files:
        raise UserError(f"{directory}: no .txt files of sentence pairs")
    paradigms = {}
    for path in tqdm(files, "zorro", unit="file"):
        lines = [line.lower().strip() for line in read_lines(path)]
        lines = [line for line in lines if line]
        if len(lines) % 2 or not lines:
            raise UserError(f"{path}: {len(lines)} sentences are no pairs")
        lengths = np.array([len(loaded.tokenizer.encode(line)) for line in lines])
        scores = phrase_nll(loaded, None, lines, batch) * lengths
        wrong, right = scores[::2], scores[1::2]
        paradigms[path.stem] = accuracy(np.where(right == wrong, 0.5, right < wrong), 0.5)
    macro = round(float(np.mean([result["score"] for result in paradigms.values()])), 4)
    overall = {"score": macro, "n": len(paradigms), "chance": 0.5, "ci95": None}
    return {"all": {"accuracy": overall} | paradigms}
