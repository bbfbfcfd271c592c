"""
The command line of data.py: run a source, or show samples.
"""

import data
import sources
from config import UserError


def open_filter(settings):
    """filtering.open_filter, imported, with the model that it needs, only if a filter is wanted."""
    from sources import filtering

    return filtering.open_filter(settings)


def main(argv):
    if not argv or argv[0].startswith("-"):
        print(data.__doc__.strip())
        if not argv or argv[0] not in ("-h", "--help"):
            raise UserError("give a source: python data.py toy")
        return
    if argv[0] == "show":
        from sources import show  # it imports the model

        return show.main(argv[1:])
    directory, meta = sources.prepare(argv[0], argv[1:], open_filter)
    print(
        f"{directory}: {meta['vocab_size']} tokens in the vocabulary, corpus {meta['corpus'][:12]}"
    )
    for split, counts in meta["splits"].items():
        kinds = ("text", "frames", "images", "samples")
        sizes = [f"{counts[kind]:,} {kind}" for kind in kinds if counts.get(kind)]
        print(f"  {split:5}", ", ".join(sizes))
