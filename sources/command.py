"""
The command line of data.py: run a source, or show samples.
"""

import ast
from pathlib import Path

import data
import sources
from config import UserError
from sources import own_tests


def open_filter(settings):
    """filtering.open_filter, imported, with the model that it needs, only if a filter is wanted."""
    from sources import filtering

    return filtering.open_filter(settings)


def describe_sources():
    """Lines with the name of each source and the first sentence of its docstring."""
    for name in data.known_sources():
        path = Path(__file__).parent / f"{name}.py"
        text = " ".join(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split())
        yield f"    {name:10} {text.split('. ')[0].split(': ')[0].rstrip('.')}"


def main(argv):
    if not argv or argv[0].startswith("-"):
        print(data.__doc__.strip(), "\n\nsources (python data.py NAME --help lists their options):")
        print(*describe_sources(), sep="\n")
        if not argv or argv[0] not in ("-h", "--help"):
            raise UserError("give a source: python data.py toy")
        return
    if argv[0] == "show":
        from sources import show  # it imports the model

        return show.main(argv[1:])
    directory, meta = sources.prepare(argv[0], argv[1:], open_filter, own_tests.write_tests)
    print(
        f"{directory}: {meta['vocab_size']} tokens in the vocabulary, corpus {meta['corpus'][:12]}"
    )
    for split, counts in meta["splits"].items():
        kinds = ("text", "frames", "images", "samples")
        sizes = [f"{counts[kind]:,} {kind}" for kind in kinds if counts.get(kind)]
        print(f"  {split:5}", ", ".join(sizes))
