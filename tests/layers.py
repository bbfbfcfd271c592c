"""
The layers of imports: `python tests/layers.py` draws them.

A file may import from lower layers, and from its own as long as no circle arises. What stands under
`if __name__ == "__main__"` belongs to the command: data.py is a module of the sixth layer, which as
a command calls sources/command.py.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    ("config",),
    (
        "common",
        "fast",
        "kernels",
        "tokenizer",
        "pretrained.split_patterns",
        "pretrained.tokenizer_json",
    ),
    ("model", "vision", "dino", "pretrained.convnets"),
    ("checkpoint",),
    ("pretrained",),
    ("data", "batches", "inference"),
    ("sources",),
    ("training", "tasks"),
    ("train", "sample", "eval", "export", "adapters"),
)


def module_name(path):
    """The dotted name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def find_modules():
    """{dotted name: path} of all files that run, tests and benchmarks left out."""
    packages = {name.partition(".")[0] for layer in LAYERS for name in layer}
    paths = [*ROOT.glob("*.py")]
    paths += [path for name in packages for path in ROOT.glob(f"{name}/*.py")]
    return {module_name(path): path for path in sorted(paths)}


def imported_names(tree):
    """The dotted names that a syntax tree imports, `from a import b` as a and as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports_of(name, path, modules):
    """Our modules that a file imports at any time, the parts that are a command's left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.If) or is_not_main(node)]
    found = {other for other in imported_names(tree) if other in modules}
    # of `from common import files` the package itself is not meant, unless it has names of its own
    empty = {other for other in found if modules[other].name == "__init__.py"}
    return found - {name} - {e for e in empty if not modules[e].read_text(encoding="utf-8").strip()}


def is_not_main(node):
    """Whether an `if` is another one than `if __name__ == "__main__"`."""
    return ast.unparse(node.test) != "__name__ == '__main__'"


def layer_of(name):
    """The number of a module's layer; the longest name that LAYERS has for it decides."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for number, layer in enumerate(LAYERS):
            if ".".join(parts[:length]) in layer:
                return number
    raise LookupError(f"{name} is in no layer")


def find_graph():
    """{module: the modules it imports}."""
    modules = find_modules()
    return {name: imports_of(name, path, modules) for name, path in modules.items()}


def find_circle(graph):
    """Modules that import each other in a circle, the first again at the end; [] without one."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for other in sorted(graph[name]):
            circle = visit(other)
            if circle:
                return circle
        done.add(path.pop())
        return []

    for name in graph:
        circle = visit(name)
        if circle:
            return circle
    return []


def draw(graph):
    """The layers as text, the lowest first."""
    lines = []
    for number in range(len(LAYERS)):
        names = [name for name in graph if layer_of(name) == number]
        lines.append(f"{number + 1}  " + ", ".join(names))
    return "\n".join(lines)


if __name__ == "__main__":
    print(draw(find_graph()))
