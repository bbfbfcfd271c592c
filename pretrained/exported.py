"""
Reading back a folder that export.py wrote, as the checkpoint that it was.
"""

from pretrained import tokenizer_json
from pretrained.tokenizer_json import JsonTokenizer

K = 256.0  # see export.norm_as_layer; a power of two, so that dividing by it and back loses nothing


def undo(saved, state, content):
    """The checkpoint's dict of an exported folder. saved: the part of it in config.json; state: the
    weights under our names; content: of tokenizer.json."""
    parts = saved["parts"]
    E, kind = parts["tower"]["arguments"]["width"], parts["projector"]["kind"]
    depth = parts["tower"]["arguments"]["depth"]
    state = {n: w for n, w in state.items() if not n.startswith(f"tower.blocks.{depth}.")}
    W = state["projector.0.weight"]
    if W.shape[1] == 2 * E:
        state["projector.0.weight"] = W[:, E:] * K
    if kind != "mlp2x_gelu":
        del state["projector.2.weight"], state["projector.2.bias"]
        first = [state.pop(f"projector.0.{name}") for name in ("weight", "bias")]
        if kind == "linear":
            state |= dict(zip(("projector.weight", "projector.bias"), first))
    for name in ("cls_token", "pos_embed"):
        if f"tower.{name}" in state:
            state[f"tower.{name}"] = state[f"tower.{name}"].reshape(1, -1, E)
    roles = saved["tokenizer"]  # {"eos": id, ...} of another vocabulary; None for ours
    written = JsonTokenizer(content, roles) if roles else tokenizer_json.undo(content)
    return saved | {"weights": state, "tokenizer": {"kind": written.kind, "ranks": written.dump()}}
