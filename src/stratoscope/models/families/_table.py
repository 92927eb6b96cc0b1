"""The table of architectures: what was proved on a tiny instance, what it lacks, and what is
refused, and why.

`table.json` is written by `make families`, which builds the instances; here
it is only read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).parent / "table.json"
_ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern")
_CROSS = tuple(f"cross.{name}" for name in ("q", "k", "v", "scores", "pattern", "z", "out"))
# said of nearly every model: it has no second mixer beside attention, no experts, or nothing but
# experts, and reads no other tower
_PLAIN = ("ssm.in", "ssm.gate", "ssm.delta", "ssm.z", "mix.out", "mlp.router", *_CROSS)
Status = Literal["proved", "probed", "refused", "not tried"]
MEANING = {
    "proved": "named by a file of `models/families/` and proved on a tiny instance",
    "probed": "found in the structure of its layers, proved on a tiny instance and again on your "
    "model",
    "refused": "its sites would lie; the reason is the one you will be told",
    "not tried": "no tiny instance is built here; your model is probed, and proved or refused",
}


@dataclass(frozen=True)
class Entry:
    """One model type. lacks: for each reason, the points that are missing and the layers of the
    tiny instance."""

    type: str
    kind: Literal["causal", "encoder", "encoder-decoder", "series", "vision"]
    status: Status
    why: str = ""
    residual: str = ""
    lacks: tuple[tuple[str, str, str], ...] = ()  # points, layers, reason


def of(name: str, kind: Any, lm: Any) -> Entry:
    """The entry of an LM that holds."""
    status = "probed" if lm.family.name.endswith("(probed)") else "proved"
    return Entry(name, kind, status, residual=lm.family.towers[""].residual, lacks=_lacks(lm))


def _lacks(lm: Any) -> tuple[tuple[str, str, str], ...]:
    from stratoscope.models.sites import POINTS, Site

    by_reason: dict[str, dict[str, list[int]]] = {}
    for layer in range(lm.dims.layers):
        for point in (p for p in POINTS if p not in _PLAIN):
            reason = lm.layout.lack(Site("", layer, point))
            if reason:
                by_reason.setdefault(reason, {}).setdefault(point, []).append(layer)
    rows = []
    for reason, points in by_reason.items():
        layers = next(iter(points.values()))
        where = (
            "every layer"
            if len(layers) == lm.dims.layers
            else f"layers like {layers[0]} of {lm.dims.layers}"
        )
        rows.append((_shortened(list(points)), where, reason))
    return tuple(rows)


def _shortened(points: Sequence[str]) -> str:
    """`attn.q|k|v|scores|pattern` for the five inside of attention."""
    if all(point in points for point in _ATTENTION):
        rest = [point for point in points if point not in _ATTENTION]
        return ", ".join(["attn.q|k|v|scores|pattern", *rest])
    return ", ".join(points)


def entries() -> list[Entry]:
    """The stored table, in its order: causal language models first, each kind by name."""
    rows = json.loads(FILE.read_text("utf-8"))
    return [Entry(**row | {"lacks": tuple(map(tuple, row.get("lacks", ())))}) for row in rows]


def write(entries: Iterable[Entry]) -> None:
    rows = [{k: v for k, v in asdict(entry).items() if v} for entry in entries]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    FILE.write_text(f"[\n{lines}\n]\n", "utf-8")


def page(entries: Sequence[Entry]) -> str:
    """docs/families.md."""
    causal = [entry for entry in entries if entry.kind == "causal"]
    held = sum(entry.status in ("proved", "probed") for entry in causal)
    tried = sum(entry.status != "not tried" for entry in causal)
    text = [
        "# Architectures",
        "",
        f"Transformers names {len(causal)} types of causal language models; {tried} are built here "
        "as tiny random models, and",
        f"{held} of them hold: logits, hidden states and attention are Hugging Face's, what the "
        "parts write adds up to the",
        "stream, a wrong table is found out. Written by `make families`; "
        "the same table is printed by",
        "`stratoscope families` and, for one type, `stratoscope families qwen3_moe`.",
        "",
        *(f"- **{status}**: {meaning}." for status, meaning in MEANING.items()),
        "",
        "A model is proved when it is wrapped, whatever stands here. An architecture that is "
        "refused can be taught:",
        "",
        "```python",
        "from stratoscope.models.families.llama import TOWER",
        "from stratoscope.models.family import Family, out_of",
        "",
        'mine = Family("mine", '
        '{"": TOWER.but(points={"mlp.pre": out_of("mlp.w1")}, mlp_write=("mlp.w2",))})',
        "# proved on your model, or refused with the worst invariant",
        "lm = stratoscope.wrap(model, tokenizer, family=mine)",
        "```",
        "",
    ]
    for kind, title in (
        ("causal", "Causal language models"),
        ("encoder", "Encoders"),
        ("encoder-decoder", "Encoder-decoders"),
        ("series", "Sound and time series"),
        ("vision", "Vision and text"),
    ):
        text += [f"## {title}", "", "| type | | lacks, or why not |", "|---|---|---|"]
        text += [f"| `{e.type}` | {e.status} | {_remark(e)} |" for e in entries if e.kind == kind]
        text += [""]
    return "\n".join(text)


def _remark(entry: Entry) -> str:
    reasons = (
        [entry.why]
        if entry.why
        else [f"`{points}` ({where}): {reason}" for points, where, reason in entry.lacks]
    )
    if entry.residual == "post-norm":
        reasons.insert(
            0, "its stream is normed or scaled after additions, so it is no sum of writes"
        )
    return "; ".join(reasons).replace("|", "\\|").replace("<", "&lt;")
