"""A clean and a corrupt prompt made ready for patching: aligned, with answer, foil and both logit
differences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine import sequence
from stratoscope.engine.metric import Target, Words, logits_with, target
from stratoscope.engine.precision import spacing
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM


@dataclass(frozen=True)
class Pair:
    """base: the run that is patched; source: where vectors come from. Differences are answer -
    foil: (example,).

    rounding: (example,) the distance between neighbouring numbers of the model's precision, where
    the answer's and the foil's logits lie. base_values, source_values: (layer, example, position,
    ...), what stands at the pattern of sites that was asked for.
    """

    clean: Batch
    corrupt: Batch
    target: Target
    clean_difference: Tensor
    corrupt_difference: Tensor
    direction: Literal["denoise", "noise"]
    rounding: Tensor
    base_values: Tensor | None = None
    source_values: Tensor | None = None

    @property
    def base(self) -> Batch:
        return self.corrupt if self.direction == "denoise" else self.clean

    @property
    def source(self) -> Batch:
        return self.clean if self.direction == "denoise" else self.corrupt

    def normalise(
        self, difference: Float[Tensor, "*cells example"]
    ) -> Float[Tensor, "*cells example"]:
        """0 where the base run is unchanged, 1 where it has become the source run."""
        ends = (self.corrupt_difference, self.clean_difference)
        start, end = ends if self.direction == "denoise" else ends[::-1]
        return (difference.cpu() - start) / (end - start)

    def notes(self, null: Tensor | None = None) -> str:
        """What a reader must know: what was assumed of the target; pairs that run the other way;
        and, given the null's effects, whether one step of rounding makes an effect of their size
        (at least half of the largest).
        """
        notes, gap = [*self.target.notes], self.clean_difference - self.corrupt_difference
        against = (gap < 0).nonzero()[:, 0].tolist()
        if against:
            named = f"{', '.join(map(str, against[:8]))}{' ...' if against[8:] else ''}"
            notes.append(
                f"{len(against)} of {len(gap)} pairs say the answer more on the corrupt prompt "
                "than on the clean one "
                f"({named}): their effects are shares of the way back."
            )
        if null is not None and null.isfinite().any():
            step, largest = (
                float((self.rounding / gap.abs()).max()),
                float(null[null.isfinite()].abs().max()),
            )
            if step >= largest / 2:
                notes.append(
                    f"One step of rounding of a logit is an effect of up to {step:.2g}, the "
                    "largest of the null "
                    f"{largest:.2g}: smaller effects are rounding. Measure them in float32 "
                    "(engine.precision.in_float32)."
                )
        return " ".join(notes)

    @property
    def differences(self) -> dict[str, tuple[tuple[str], Tensor]]:
        """The two logit differences as variables of a labelled result."""
        axes = ("example",)
        return {
            "clean_difference": (axes, self.clean_difference),
            "corrupt_difference": (axes, self.corrupt_difference),
        }

    @property
    def coords(self) -> dict[str, Any]:
        text = self.corrupt.coords().get("text")  # pictures have none
        corrupt = {} if text is None else {"corrupt_text": text}
        return self.clean.coords() | corrupt | self.target.coords


@torch.no_grad()
def pair(
    lm: LM,
    clean: Any,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    direction: Literal["denoise", "noise"] = "denoise",
    *,
    single: str = "",
    sites: str = "",
) -> Pair:
    """Align two prompts (or two equally long lists) and measure both.

    Defaults: the answer is the clean run's top token, the foil the corrupt run's top token that is
    not the answer. single: why answer and foil cannot be `Whole` here; without a reason they can,
    and cells are run by `sequence.swept`. sites: a pattern (`layers.*.attn.z`) whose values both
    runs keep, so that nobody has to run the prompts again. Raises InputError when the prompts
    differ in number or token length, or when their logit differences are too close (1e-3) for an
    effect to be a share of anything.
    """
    if direction not in ("denoise", "noise"):
        raise InputError(
            f"direction {direction!r}: choose 'denoise' (clean into corrupt) or 'noise' (corrupt "
            "into clean)."
        )
    first, second = lm.batch(clean), lm.batch(corrupt)
    if len(first) != len(second):
        raise InputError(
            f"{len(first)} clean and {len(second)} corrupt prompts: give one corrupt prompt for "
            "each clean one."
        )
    for n, (a, b) in enumerate(zip(first.tokens, second.tokens)):
        if len(a) != len(b):
            raise InputError(
                f"clean prompt {n} has {len(a)} tokens and its corrupt prompt {len(b)}: patching "
                "pairs token with token, "
                "so both need the same number. Exchange words for others of equal length. Clean "
                f"{list(a)}, corrupt "
                f"{list(b)}."
            )
    patterns = [sites] if sites else []
    logits, seen = zip(*(logits_with(lm, side, *patterns) for side in (first, second)))
    ends = [side.stack(sites) for side in seen] if sites else [None, None]
    ask = partial(target, single=single) if single else sequence.target
    if foil is None:
        answers = ask(lm, first, answer, logits=logits[0]).answer
        best = logits[1].topk(2, dim=-1).indices.cpu()
        foil = torch.where(best[:, 0] == answers, best[:, 1], best[:, 0]).tolist()
    wanted = ask(lm, first, answer, foil, logits=logits[0])
    differences = [
        sequence.unchanged(lm, side, wanted, x).float().cpu()
        for side, x in zip((first, second), logits)
    ]
    close = (differences[0] - differences[1]).abs() < 1e-3
    if close.any():
        n = int(close.nonzero()[0])
        raise InputError(
            f"prompt pair {n}: the logit difference {wanted.answer_text[n]!r} - "
            f"{wanted.foil_text[n]!r} is the same in the "
            f"clean ({differences[0][n]:.3f}) and the corrupt run ({differences[1][n]:.3f}): there "
            "is nothing to restore. "
            f"Change the corrupt prompt, the answer or the foil."
        )
    every = torch.arange(len(first))  # of whole texts, the first tokens: the sum is no better known
    chosen = [x.cpu()[every, ids].float() for x in logits for ids in (wanted.answer, wanted.foil)]
    rounding = spacing(torch.stack(chosen).abs().amax(dim=0), lm.model.dtype)
    ends = ends[::-1] if direction == "denoise" else ends
    return Pair(first, second, wanted, *differences, direction, rounding, *ends)


def random_like(
    base: Float[Tensor, "layer example position *rest"],
    source: Float[Tensor, "layer example position *rest"],
    seed: int,
) -> Float[Tensor, "layer example position *rest"]:
    """The null of a patch: base plus a random direction of the length of (source - base), place by
    place.

    Drawn position by position and alike for all examples, so that an example's null does not depend
    on its batch.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, _, width, *rest = base.shape
    draws = [torch.randn(layers, *rest, generator=generator) for _ in range(width)]
    noise = torch.stack(draws, dim=1)[:, None].to(base)
    return base + noise * (
        (source - base).norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    )
