"""Pairs of prompts that differ in a variable: read, with what stands at one site in each source
prompt, and what each base prompt is to say with the source's value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.metric import tokens_of, word
from stratoscope.engine.select import Positions, position_index
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site

_TOKENS = 4096  # that run at the same time
Where = Positions | Mapping[str, Positions]
Values = Float[Tensor, "pair place *units"]


@dataclass(frozen=True)
class Pairs:
    """Pairs made ready at one site: what stands there in the source prompts, and where it goes.

    at: (pair, place), the tokens of the base prompts. answer: (pair,) what each base prompt is to
    say once the part has been interchanged.
    """

    base: Batch
    source: Batch
    answer: Int[Tensor, " pair"]
    site: Site
    at: Int[Tensor, "pair place"]
    values: Values

    def __len__(self) -> int:
        return len(self.base)

    def coords(self, lm: LM) -> dict[str, Any]:
        return self.base.coords() | {
            "answer": (("example",), [word(lm, int(one)) for one in self.answer]),
            "source_text": (("example",), list(self.source.texts or [""] * len(self))),
        }


def site_of(lm: LM, name: str, *, flat: bool) -> Site:
    """A site of the main stack with one vector a token; flat: not one for each head. Raises
    SiteError for others."""
    if not lm.family.reads_text:
        raise SiteError(
            f"{lm.family.name} reads no tokens, and pairs of prompts are what is interchanged here."
        )
    site = lm.layout.resolve_one(name)
    odd = site.axes[:2] != ("example", "position") or site.tower or site.layer is None
    if odd or (flat and len(site.axes) > 3):
        raise SiteError(
            f"`{site}` has the axes {', '.join(site.axes)}: directions are searched for where one "
            "vector of a layer stands at each token, such as resid_post, mlp.out or attn.out."
        )
    return site


def pairs(lm: LM, inputs: Any, site: Site, positions: Where) -> Pairs:
    """Rows (base, source, answer) or {"base": ..., "source": ..., "answer": ...}, read, and the
    source prompts run up to the site. Raises InputError for a row that lacks something, an answer
    of several tokens, and positions that fit no prompt."""
    rows = [
        tuple(row.get(key) for key in ("base", "source", "answer"))
        if isinstance(row, Mapping)
        else tuple(row)
        for row in inputs
    ]
    for number, row in enumerate(rows):
        if len(row) != 3 or any(part is None for part in row):
            raise InputError(
                f"pair {number} is {str(row)!r:.80}: give (base, source, answer), or "
                '{"base": ..., "source": ..., "answer": ...}.'
            )
    if not rows:
        raise InputError("there is no pair: give at least one base, source and answer.")
    base, source = (lm.batch([row[side] for row in rows]) for side in (0, 1))
    named = positions if isinstance(positions, Mapping) else {}
    at, there = (
        _places(batch, named.get(side, positions if not named else -1))
        for batch, side in ((base, "base"), (source, "source"))
    )
    if at.shape != there.shape:
        raise InputError(
            f"{at.shape[1]} tokens of a base prompt and {there.shape[1]} of a source prompt are "
            "interchanged: name as many in each with positions=."
        )
    held = []
    for some in _parts(source):
        part, own = some_of(lm, source, some), there[some].tolist()
        held.append(capture(lm, part, site, positions=own)[site].float())
    answers = torch.tensor([_label(lm, row[2]) for row in rows])
    return Pairs(base, source, answers, site, at, torch.cat(held))


def plain(positions: Where) -> Any:
    """Positions as JSON holds them."""
    if isinstance(positions, Mapping):
        return {side: plain(own) for side, own in positions.items()}
    return np.asarray(positions).tolist() if positions is not None else None


def _places(batch: Batch, positions: Positions) -> Int[Tensor, "pair place"]:
    """The tokens that are named, each counted from its prompt's first; None: all, which asks for
    prompts of one length."""
    ids, mask = batch.text
    if positions is None and not bool(mask.all()):
        raise InputError(
            "positions=None interchanges every token, and these prompts differ in length: name "
            "the tokens, -1 for the last."
        )
    return position_index(positions, Run(batch=batch), len(batch), ids.shape[1])


def _label(lm: LM, answer: Any) -> int:
    """The output that a label stands for. Raises InputError for one that is no single token."""
    if isinstance(answer, int | np.integer):
        if 0 <= answer < lm.readout.size:
            return int(answer)
        raise InputError(f"answer id {answer} is outside the read-out of {lm.readout.size}.")
    if lm.readout.names:
        if answer not in lm.readout.names:
            raise InputError(f"answer {answer!r} is no class; there are {lm.readout.names}.")
        return lm.readout.names.index(answer)
    ids = tokens_of(lm, str(answer), "answer")
    if len(ids) > 1:
        raise InputError(
            f"answer {answer!r} is {len(ids)} tokens; a label is one: give its first, or an id."
        )
    return ids[0]


def some_of(lm: LM, batch: Batch, rows: Tensor) -> Batch:
    ids, mask = batch.text
    return lm.batch([row[real].tolist() for row, real in zip(ids[rows], mask[rows])])


def _parts(batch: Batch) -> tuple[Tensor, ...]:
    size = max(1, _TOKENS // batch.text[0].shape[1])
    return torch.arange(len(batch)).split(size)
