"""A unit by its name, and where it stands in the model: what a click on a picture means.

| name  | what it is                            | site                              |
|-------|---------------------------------------|-----------------------------------|
| L5H3  | head 3 of layer 5                     | `layers.5.attn.z`, unit 3         |
| L5N12 | neuron 12 of layer 5                  | `layers.5.mlp.act`, unit 12       |
| L5M   | what the MLP of layer 5 writes        | `layers.5.mlp.out`                |
| L5T4  | the stream of token 4 after layer 5   | `layers.5.resid_post`, position 4 |
| T4    | the embedding of token 4              | `embed`, position 4               |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stratoscope.errors import InputError

if TYPE_CHECKING:
    from stratoscope.models.batch import Batch
    from stratoscope.models.lm import LM

_NAME = re.compile(r"L(\d{1,4})(?:([HNT])(\d{1,7})|(M))|T(\d{1,6})", re.ASCII)
_KINDS = {"H": "head", "N": "neuron", "T": "stream", "M": "mlp"}
_POINTS = {"head": "attn.z", "neuron": "mlp.act", "mlp": "mlp.out", "stream": "resid_post"}


@dataclass(frozen=True, slots=True)
class Unit:
    """kind: head, neuron, mlp, stream or token. number: of the head or neuron in its layer, or of
    the token."""

    kind: str
    layer: int
    number: int

    @classmethod
    def parse(cls, name: str) -> Unit:
        """Raises InputError for a text that names none."""
        match = _NAME.fullmatch(name.strip())
        if match is None:
            raise InputError(
                f"{name!r:.40} names no unit: L5H3 is a head, L5N12 a neuron, L5M an MLP, L5T4 a "
                "token's stream after a layer, T4 a token."
            )
        layer, letter, number, mlp, token = match.groups()
        if token is not None:
            return cls("token", 0, int(token))
        return cls(_KINDS[letter or mlp], int(layer), int(number or 0))

    @property
    def name(self) -> str:
        letter = next((x for x, kind in _KINDS.items() if kind == self.kind), "T")
        number = "" if self.kind == "mlp" else str(self.number)
        return f"{'' if self.kind == 'token' else f'L{self.layer}'}{letter}{number}"

    @property
    def site(self) -> str:
        point = _POINTS.get(self.kind)
        return "embed" if point is None else f"layers.{self.layer}.{point}"

    @property
    def where(self) -> dict[str, list[int]]:
        """What narrows an intervention at its site to it."""
        if self.kind in ("head", "neuron"):
            return {"units": [self.number]}
        return {} if self.kind == "mlp" else {"positions": [self.number]}

    def said(self, batch: Batch) -> str:
        """In words, with the token where it is of one."""
        if self.kind == "mlp":
            return f"the MLP of layer {self.layer}"
        if self.kind in ("head", "neuron"):
            return f"{self.kind} {self.number} of layer {self.layer}"
        token = f"token {self.number}, {batch.tokens[0][self.number]!r}"
        return token if self.kind == "token" else f"{token}, after layer {self.layer}"

    def refuse(self, lm: LM, batch: Batch) -> None:
        """Raise InputError where this model and this prompt have no such unit, SiteError where the
        architecture has no such site."""
        sizes = {"head": lm.dims.heads, "neuron": lm.dims.neurons}
        layers, tokens = lm.dims.layers, len(batch.tokens[0])
        if self.layer >= layers:
            raise InputError(f"{self.name}: the model has {layers} layers, counted from 0.")
        if self.kind in sizes and self.number >= (size := sizes[self.kind] or 0):
            raise InputError(f"{self.name}: layer {self.layer} has {size} {self.kind}s.")
        if self.kind in ("stream", "token") and self.number >= tokens:
            raise InputError(f"{self.name}: the prompt has {tokens} tokens, counted from 0.")
        lm.layout.resolve(self.site)

    def others(self, lm: LM, count: int) -> list[Unit]:
        """Up to `count` heads or neurons of the same layer, spread evenly over it: chance."""
        sizes: dict[str, Any] = {"head": lm.dims.heads, "neuron": lm.dims.neurons}
        size = sizes.get(self.kind) or 0
        step = max(1, size // (count + 1))
        found = [(self.number + step * k) % size for k in range(1, count + 1) if size > 1]
        return [Unit(self.kind, self.layer, n) for n in dict.fromkeys(found) if n != self.number]

    def python(self) -> list[str]:
        """Lines that switch it off, with `lm` and `prompt` as they stand."""
        where = "".join(f", {name}={value}" for name, value in self.where.items())
        seen = f"st.capture(lm, prompt, {self.site!r})[{self.site!r}]"
        lines = [f"value = {seen}  # of every token"]
        off = f"st.ablate({self.site!r}{where})"
        if self.kind == "head":
            pattern = "st.heads.attention_pattern.measure(lm, prompt"
            shown = f".sel(layer={self.layer}, head={self.number})"
            lines = [
                f"pattern = {pattern}, layers=[{self.layer}]){shown}",
                "print(st.show(pattern))",
            ]
        if self.kind == "neuron":
            lines.append(
                f"words = st.neurons.vocabulary.measure(lm, [({self.layer}, {self.number})])"
            )
        return [
            *lines,
            f"with st.intervene(lm, {off}):",
            "    off = st.tokens.next_token.measure(lm, prompt)",
            "print(st.show(off))",
        ]
