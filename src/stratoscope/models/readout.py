"""The read-out: what a model makes of its last residual stream, and at which position.

A language model reads every position into its vocabulary; a classifier or a reward model reads one
position (the last real token, the class token) or a mean. `lm.readout` is the one place that knows.
`find_readout` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from stratoscope.errors import InputError, SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.run import Each

if TYPE_CHECKING:
    pass

Kind = Literal["vocab", "classes", "values", "vectors", "unknown"]
# every: each position has an output of its own. last, first: the last real token, the first (class)
# token. mean: all real positions. patches: all but the first.
Where = Literal["every", "last", "first", "mean", "patches"]
Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Readout:
    """What stands behind the last residual stream.

    kind: "vocab" (logits of tokens), "classes" (logits of labels), "values" (one number: a reward,
    a regression), "vectors" (a bare encoder: nothing), "unknown" (a head that could not be rebuilt;
    `reason` says why). size: how many outputs. names: what they are called, () for a vocabulary.
    where: the position that is read. norm, steps: what is applied in turn.
    """

    kind: Kind
    where: Where
    size: int
    norm: nn.Module | None = None
    steps: tuple[Step, ...] = ()
    names: tuple[str, ...] = ()
    softcap: float | None = None
    padding: int | None = None  # where "last" is read, the id that the model passes over
    mask: int | None = None  # of a masked language model, the id of its mask token
    reason: str = ""

    @property
    def modules(self) -> list[nn.Module]:
        """The steps, where each is a module that takes any rows (..., dim); else []."""
        plain = [step for step in self.steps if isinstance(step, nn.Module)]
        return plain if len(plain) == len(self.steps) else []

    @property
    def position(self) -> int:
        """The position that is read where no prompt says otherwise: -1 (the last real token)
        or 0."""
        return 0 if self.where == "first" else -1

    def place(self, batch: Batch) -> int | Each:
        """The position that is read, as `capture` and `intervene` take it: one for all examples
        where one says it, else one for each."""
        if self.mask is None or batch.ids is None or not self.single:
            return self.position
        at = self.positions(batch)
        return -1 if bool((at == batch.lengths - 1).all()) else Each(at.tolist())

    @property
    def single(self) -> bool:
        """Whether one position alone is read."""
        return self.where not in ("mean", "patches")

    def __call__(self, resid: Tensor, *, normalised: bool = False) -> Tensor:
        """(..., dim) residuals -> (..., output): final norm, head, soft-cap, exactly as the model
        does.

        normalised: the input has passed the final norm already. Raises SiteError for a model
        without a read-out.
        """
        if self.reason:
            raise SiteError(self.reason)
        x = resid if normalised or self.norm is None else self.norm.forward(resid)
        with still(self.steps):
            # `forward`, not a call: hooks at these modules are for the model's own runs
            for step in self.steps:
                x = getattr(step, "forward", step)(x)
        if x.ndim < resid.ndim:  # a head that squeezes its one output
            x = x[..., None]
        return x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap

    def positions(self, batch: Batch) -> Tensor:
        """(example,) the position at which each example is read: where `where` is "every" that of
        the next token, the last real one, or that of the mask token where a masked language model's
        prompt holds exactly one; of a picture its first patch. Raises SiteError where no single
        position is read.
        """
        if not self.single:
            raise SiteError(
                f"this model reads a mean over positions ({self.where}), not one of them."
            )
        if self.where != "first" and batch.mask is not None:
            last = batch.lengths - 1
            if (
                self.padding is not None
                and batch.ids is not None
                and bool((batch.ids.gather(1, last[:, None]) == self.padding).any())
            ):
                raise InputError(
                    f"a prompt ends with token {self.padding}, which this classifier takes for "
                    "padding and passes over: "
                    f"take it off, or wrap the model with another `config.pad_token_id`."
                )
            if self.mask is None or batch.ids is None:
                return last
            masked = (batch.ids == self.mask) & batch.mask
            return torch.where(masked.sum(dim=1) == 1, masked.int().argmax(dim=1), last)
        held = batch.mask if batch.mask is not None else next(iter(batch.extra.values()))
        return torch.zeros(len(batch), dtype=torch.long, device=held.device)

    def of(self, resid: Tensor, batch: Batch) -> Tensor:
        """(example, position, dim) last residual stream -> (example, output): what the model says
        of each example."""
        if self.single:
            at = self.positions(batch).to(resid.device)
            return self(resid[torch.arange(len(at), device=resid.device), at])
        return self(
            pooled(self.where, resid if self.norm is None else self.norm.forward(resid), batch),
            normalised=True,
        )


@contextmanager
def still(steps: Iterable[Step]) -> Iterator[None]:
    """Eval mode for the modules among the steps (heads hold dropout of their own); training flags
    are restored."""
    held = [getattr(step, "module", step) for step in steps]
    training = [
        m for top in held if isinstance(top, nn.Module) for m in top.modules() if m.training
    ]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


def pooled(where: Where, x: Tensor, batch: Batch) -> Tensor:
    """(example, position, dim) -> (example, dim): the mean over real positions, less the first for
    patches."""
    real = torch.ones(x.shape[:2], device=x.device) if batch.mask is None else batch.mask.to(x)
    if where == "patches":
        real = real.index_fill(1, torch.zeros(1, dtype=torch.long, device=x.device), 0)
    return (x * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
