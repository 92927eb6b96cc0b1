"""Prompts continued by the beginnings of their answers: the rows on which whole answers are scored.

Each row ends where a token of an answer or a foil is asked for; no beginning stands there twice. A
causal model computes the prompt alike on every row, so what is changed in a prompt is changed on
all of its rows, and what is found on them (a score, a gradient) is summed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.intervention import ALIKE, Intervention
from stratoscope.engine.metric import Target
from stratoscope.engine.select import position_index
from stratoscope.errors import InputError, SiteError
from stratoscope.models import longrope
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run


@dataclass(frozen=True)
class Continued:
    """Prompts with the beginnings of their answers and foils, none twice: one row each.

    example: (row,) whose prompt. following: (row, 2) the answer's and the foil's next token there;
    counts: (row, 2) 1.0 where there is one, else 0.0. turned: where a LongRoPE model's angles
    change, if an answer goes beyond it and its prompt does not, else None.
    """

    prompts: Batch
    batch: Batch
    example: Tensor
    following: Tensor
    counts: Tensor
    turned: int | None = None

    def metric(self, logits: Float[Tensor, "row vocab"], row: Tensor) -> Float[Tensor, " row"]:
        """log p(answer's next token) - log p(foil's next token), as far as there is one."""
        following, counts = (x[row.to(x.device)] for x in (self.following, self.counts))
        logits, counts = logits.float(), counts.to(logits.device)
        signed = logits.gather(1, following.to(logits.device)) * counts
        # where both follow the same text, what makes logits probabilities is the same and drops out
        return signed[:, 0] - signed[:, 1] - (counts[:, 0] - counts[:, 1]) * logits.logsumexp(dim=1)

    def summed(self, rows: Float[Tensor, "*cell row"]) -> Float[Tensor, "*cell example"]:
        """The sum of each example's rows; (row,) -> (example,) too."""
        sums = rows.new_zeros(*rows.shape[:-1], len(self.prompts))
        return sums.index_add(-1, self.example.to(rows.device), rows)

    def in_prompts(
        self, rows: Float[Tensor, "row longer dim"]
    ) -> Float[Tensor, "example position dim"]:
        """Of each prompt's positions, the sum over its rows; zero at padding."""
        lengths = self.prompts.lengths.to(rows.device)
        rows = rows[:, : int(lengths.max())]
        sums = rows.new_zeros(len(lengths), *rows.shape[1:])
        sums = sums.index_add(0, self.example.to(rows.device), rows)
        real = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
        return sums * real[..., None]

    def moved(self, cell: Intervention, base: Tensor | None) -> list[Intervention]:
        """A change of the prompts, made on every row of its examples, at the prompt's positions.

        base: the site's values in the prompts; a replacement by the very same is left out, as in
        `sweep`. [] when nothing is left. Raises SiteError for a site that has no position axis,
        InputError where what stands there in a prompt is not what stands there under its answer.
        """
        if cell.site.axes[:2] != ("example", "position") or cell.keys is not None:
            raise SiteError(
                f"`{cell.site}` cannot be changed under a whole answer: its axes are not (example, "
                f"position, ...), so the prompt's part is not known."
            )
        entered = cell.site.point == "embed" or cell.site == Site("", 0, "resid_pre")
        if self.turned and cell.operation == "replace" and not entered:
            raise InputError(
                f"a whole answer makes a prompt longer than {self.turned} tokens, and there this "
                f"model (LongRoPE) turns the prompt's own positions by other angles: what stood at "
                f"`{cell.site}` in the prompt cannot be put under it. Ask for one token, or give a "
                f"longer prompt or a shorter answer."
            )
        lengths = self.prompts.lengths.cpu()
        count, width = len(lengths), int(lengths.max())
        named = list(range(count)) if cell.examples is None else list(cell.examples)
        at = position_index(cell.positions, Run(self.prompts), count, width, named)
        real = at < lengths[:, None]  # padding would be the answer's tokens
        if base is not None and cell.operation == "replace":
            differs = (cell.apply(base, Run(self.prompts)) != base).flatten(2).any(dim=2).cpu()
            real = real & differs.gather(1, at.clamp(0, width - 1))
        # what is left out takes the place and the value of something that is not
        pick = torch.where(real, torch.arange(at.shape[1]), real.int().argmax(dim=1)[:, None])
        concerned = {example for example in named if real[example].any()}
        rows = [row for row, example in enumerate(self.example.tolist()) if example in concerned]
        if not rows:
            return []
        of = self.example[rows]
        value = cell.value
        if cell.operation in ALIKE:
            value = value[(None,) * (len(cell.site.axes) - value.ndim)]
            if value.shape[0] > 1:
                value = value[[named.index(example) for example in of.tolist()]]
            if value.shape[1] > 1:
                value = value.expand(len(rows), *value.shape[1:])
                index = pick[of].to(value.device)
                value = value[torch.arange(len(rows), device=value.device)[:, None], index]
        at = at.gather(1, pick)[self.example]
        return [replace(cell, value=value, positions=at, examples=rows)]


def continued(lm: LM, batch: Batch, target: Target) -> Continued:
    """Every text after which a token of an answer or a foil is asked, and those tokens.

    Raises InputError under an outer change that names positions or examples: it would act on other
    ones here.
    """
    for changes, _ in lm.taps.listening:
        for change in (getattr(e, "__self__", None) for site in changes for e in changes[site]):
            if isinstance(change, Intervention) and _names_places(change):
                raise InputError(
                    f"a change outside names positions, keys or examples at `{change.site}`, and a "
                    f"whole answer is scored on longer prompts and more of them. Ask for one token."
                )
    ids, mask = batch.text
    prompts = [row[real].tolist() for row, real in zip(ids, mask)]
    places: dict[tuple[int, tuple[int, ...]], list[int | None]] = {}
    for example, pair in enumerate(target.tokens):
        for side, tokens in enumerate(pair):
            for k, token in enumerate(tokens):
                places.setdefault((example, tokens[:k]), [None, None])[side] = token
    following = torch.tensor([[token or 0 for token in pair] for pair in places.values()])
    there = [[float(token is not None) for token in pair] for pair in places.values()]
    rows = lm.batch([[*prompts[example], *before] for example, before in places])
    example = torch.tensor([example for example, _ in places])
    most = longrope.limit(lm.layout.config())
    beyond = most is not None and any(
        len(prompts[example]) <= most < len(prompts[example]) + len(before)
        for example, before in places
    )
    counts, turned = torch.tensor(there), most if beyond else None
    return Continued(batch, rows, example, following, counts, turned)


def _names_places(change: Intervention) -> bool:
    """Whether an outer change says where in the prompts, or which of them, it acts."""
    named = any(getattr(change, name) is not None for name in ("positions", "keys", "examples"))
    if named or change.operation not in ALIKE:
        return named
    rest = len(change.site.axes) - 2  # after example and position
    return any(size > 1 for size in change.value.shape[: max(change.value.ndim - rest, 0)])
