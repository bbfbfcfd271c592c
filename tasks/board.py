"""
The scores of the BabyVLM challenge's leaderboard: eleven numbers under its rules and names.

    python eval.py --checkpoint out/toy_v2/phase3.pt --task toolbox --scores scores.json

They follow the published rules whatever --parse says, from the same answers. The leaderboard's
overall is the mean of each test's first measure. The paper's mean is another one: it has Visual
Delayed Response, open, twice (exact and adjacent), and no Looking While Listening.
"""

import numpy as np

from common.files import write_json
from tasks.toolbox import CONTROLS, key_of, score

# {our test: (name on the leaderboard, {its measure: ours}, the first one being the test's score)}
BOARD = {
    "picture_vocabulary": ("baby_pv", {"acc": "accuracy"}),
    "looking_while_listening": (
        "baby_winoground",
        {"group_score": "accuracy", "image_score": "image", "text_score": "text"},
    ),
    "localization": ("baby_localize", {"acc": "accuracy"}),
    "left_right": ("baby_leftright", {"acc": "accuracy"}),
    "spatial_details": ("baby_spatialdetails", {"acc": "accuracy"}),
    "delayed_response": ("baby_vdr_binary", {"acc_exact": "accuracy", "acc_adjacent": "adjacent"}),
    "delayed_response_open": ("baby_vdr_open", {"acc_exact": "exact", "acc_adjacent": "adjacent"}),
    "more_natural": ("baby_compare_real", {"acc": "accuracy"}),
    "more_synthetic": ("baby_compare_synthetic", {"acc": "accuracy"}),
    "object_counting": ("baby_count", {"acc": "accuracy"}),
    "memory": (
        "baby_memory",
        {
            "acc_testing_adjusted": "adjusted",
            "acc_learning": "learning",
            "acc_testing_raw": "testing",
        },
    ),
}


def entry(test, rows, subject):
    """{"name", "scores": {measure of the leaderboard: score}, "chance", "cannot_see",
    "cannot_read"} of a test. Chance and controls are those of its first measure; None if that
    measure is missing."""
    results = score(test, rows, subject, "published", "published")
    name, measures = BOARD[test]
    first = next(iter(measures.values()))
    if first not in results:
        return None
    scores = {
        theirs: results[ours]["score"] for theirs, ours in measures.items() if ours in results
    }
    controls = {who: results[key_of(who, first)]["score"] for who in CONTROLS}
    return {"name": name, "scores": scores, "chance": results[first]["chance"], **controls}


def scores_json(entries):
    """The content of scores.json. entries: {our test: entry()}."""
    return {"results": {entry["name"]: entry["scores"] for entry in entries.values()}}


def table(entries):
    """Lines of text: each test's score on the leaderboard beside its controls and chance, and the
    overall, in which a missing test counts as 0."""
    line = "{:24} {:20} {:>6} {:>10} {:>11} {:>6}".format
    yield line("leaderboard", "measure", "score", "cannot_see", "cannot_read", "chance")
    columns = []
    for test, (name, measures) in BOARD.items():
        own, first = entries.get(test), next(iter(measures))
        if own is None:
            yield f"{name:24} missing: it counts as 0"
            columns.append([0.0] * 4)
            continue
        columns.append([own["scores"][first], own["cannot_see"], own["cannot_read"], own["chance"]])
        yield line(name, first, *(f"{number:.3f}" for number in columns[-1]))
    means = np.mean(columns, axis=0)
    yield line("overall", "mean of 11", *(f"{number:.3f}" for number in means))


def write(path, entries):
    """Write scores.json."""
    write_json(path, scores_json(entries))
