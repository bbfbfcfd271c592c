"""
Captions and scores of one model on a GPU and on a CPU, in fp32: are they the same?

    python benchmarks/same.py                     # the shipped model, on data/toy
    python benchmarks/same.py --checkpoint out/toy/phase2.pt

Prints how many captions are the same, and the largest difference between two scores; exits with 1
if a caption differs, or a score by more than one item in a hundred.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import config  # noqa: E402
import eval as evaluation  # noqa: E402
from inference import open_model  # noqa: E402


@dataclass
class Config(config.Options):
    checkpoint: str = str(ROOT / "assets" / "toy.pt")  # the model
    data: str = "data/toy"  # the folder whose tests it takes
    device: str = ""  # the other device; empty: cuda if there is one


def take_tests(settings, device):
    """({(test, subset, measure): score}, captions) on a device."""
    loaded = open_model(settings.checkpoint, device)
    wanted = evaluation.Config(checkpoint=settings.checkpoint, data=settings.data, device=device)
    results, reports = evaluation.evaluate(loaded, wanted)
    scores = {
        (test, subset, measure): result["score"]
        for test, subsets in results["tasks"].items()
        for subset, measures in subsets.items()
        for measure, result in measures.items()
    }
    return scores, [one.said for report in reports.values() for one in report.captions]


def main(argv):
    settings = config.load(Config, argv, __doc__)
    device = str(checkpoint.choose_device(settings.device))
    (scores, said), (others, also) = (take_tests(settings, d) for d in ("cpu", device))
    same = sum(a == b for a, b in zip(said, also, strict=True))
    key = max(scores, key=lambda key: abs(scores[key] - others[key]))
    furthest = abs(scores[key] - others[key])
    print(f"cpu and {device}: {same} of {len(said)} captions are the same")
    print(f"{len(scores)} scores, which differ by at most {furthest:.4f} ({' '.join(key)})")
    if same < len(said) or furthest > 0.01:
        sys.exit(1)


if __name__ == "__main__":
    config.run(main)
