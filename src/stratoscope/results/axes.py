"""The axis words: every dimension of every result has one of these names, and each means one thing.

A word that one method or one room alone needs is declared there, as `AXES = {"word": "what it
means"}` at the top level of the method's file or of the room's `__init__.py`; it may not take a
word that stands here.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

AXES: dict[str, str] = {
    "example": "one prompt, image or pair of the input",
    "layer": "a transformer layer, 0 to n_layers - 1",
    "depth": "number of layers passed, 0 to n_layers; 0 is what enters layer 0",
    "position": "a token of the unpadded prompt, 0 is its first",
    "query": "the position that attends",
    "key": "the position that is attended to",
    "head": "a query head of one layer",
    "kv_head": "a key/value head of one layer, shared by several query heads under grouped-query "
    "attention",
    "neuron": "a hidden unit of one layer's MLP",
    "channel": "a channel of one layer's state space, before its output projection",
    "dim": "a coordinate of the residual stream",
    "head_dim": "a coordinate inside one head",
    "vocab": "a token id of the vocabulary",
    "edge": "a link from one component to an input of a later one, with coordinates sender and "
    "receiver",
    "component": "a named writer to the residual stream: embedding, head, MLP or bias",
    "rank": "a place in a sorted list, 0 is best",
    "role": "a named behaviour of a head, such as induction",
    "unit": "an entry of a list of neurons, with coordinates layer and neuron",
    "step": "a step of generation, training or integration",
    "expert": "an expert of a mixture-of-experts layer",
    "draw": "one of several random draws",
}


def words(method: str) -> dict[str, str]:
    """The words that the results of a method (`tokens.transition_loss`) may use, with what they
    mean."""
    room = method.partition(".")[0]
    modules = (sys.modules.get(f"stratoscope.{name}") for name in (room, method))
    own = (vars(module).get("AXES", {}) for module in modules if module is not None)
    return {word: meaning for table in (*own, AXES) for word, meaning in table.items()}


def declared(root: Path | None = None) -> dict[str, dict[str, str]]:
    """The words declared beside the global ones, by the file (`tokens/transition_loss.py`) that
    declares them.

    Files are read, not imported. root: the package's folder.
    """
    folder = Path(__file__).parents[1] if root is None else root
    tables = {}
    for path in sorted(folder.glob("*/**/*.py")):
        if "\nAXES" in (text := path.read_text(encoding="utf-8")) and path != Path(__file__):
            tables[path.relative_to(folder).as_posix()] = _table(text)
    return {name: table for name, table in tables.items() if table}


def _table(text: str) -> dict[str, str]:
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        named = any(isinstance(target, ast.Name) and target.id == "AXES" for target in targets)
        if named and isinstance(value, ast.Dict):
            return ast.literal_eval(value)
    return {}


def page() -> str:
    """docs/axes.md, whole."""
    rows = [f"| `{word}` | {meaning} |" for word, meaning in AXES.items()]
    own = [
        f"| `{word}` | {meaning} | [`{file}`](../src/stratoscope/{file}) |"
        for file, table in declared().items()
        for word, meaning in table.items()
    ]
    lines = [_OPENING, "| axis | meaning |", "|---|---|", *rows]
    lines += [
        "",
        "Words that one method or room declares for itself:",
        "",
        "| axis | meaning | declared in |",
    ]
    return "\n".join([*lines, "|---|---|---|", *own, ""])


_OPENING = """# Axes: the words of every result

A result is an xarray DataArray or Dataset whose axes are named by these words and no others
(`stratoscope.results.AXES`). Padding is NaN in numbers and "" in text. This page is
generated: `make pages`.
"""

if __name__ == "__main__":
    (Path(__file__).parents[3] / "docs" / "axes.md").write_text(page(), encoding="utf-8")
