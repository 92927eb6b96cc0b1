"""Finding a model's read-out: the head that the family names, or else one that is looked for among
the model's own modules and believed only if it gives the model's own output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stratoscope.models.batch import Batch
from stratoscope.models.readout import Kind, Readout, Step, Where, pooled, still
from stratoscope.models.sites import Site
from stratoscope.models.weights import shape

if TYPE_CHECKING:
    from stratoscope.models.lm import LM

_BETWEEN: tuple[Step, ...] = (torch.relu, torch.tanh, nn.functional.gelu)


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, eq=False)
class Alone:
    """A module that takes (example, position, dim) and reads the first position: it is given one,
    (..., dim)."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        values = self.module(x.reshape(-1, 1, x.shape[-1]))
        return values.reshape(*x.shape[:-1], -1)


def find(lm: LM) -> Readout:
    """The read-out that the family names; else one that is found and verified on `prompts`, see
    `search`."""
    layout, model = lm.layout, lm.model
    if layout.family_head:
        pooled = lm.family.pooled is not None
        names = _names(model) if pooled else ()
        cap = next((cap for key in _CAPS if (cap := getattr(layout.config(), key, None))), None)
        sizes = shape(layout.family_head[-1])  # of today: embeddings can be resized
        size = len(names) if pooled else sizes[0] if sizes else layout.dims[""].vocab
        kind: Kind = "classes" if pooled else "vocab"
        where: Where = "first" if pooled else "every"
        return Readout(
            kind,
            where,
            size,
            layout.final_norm,
            tuple(layout.family_head),
            names,
            cap,
            mask=None if pooled else mask_token(lm),
        )
    if layout.base is model:
        return _vectors(lm)
    return search(lm)


def mask_token(lm: LM) -> int | None:
    """The id that a masked language model fills in; None for a causal model, or where no mask token
    is known."""
    if lm.family.towers[""].causal:
        return None
    known = getattr(lm.tokenizer, "mask_token_id", None)
    return getattr(lm.layout.config(), "mask_token_id", None) if known is None else known


def search(lm: LM) -> Readout:
    """The head of a classifier or reward model, by structure: modules beside the base model, the
    base's pooler before them, applied at one position or to a mean. It is believed if it gives the
    model's own output on prompts of unequal length, padded; otherwise the read-out is unknown, and
    asking for it is refused with the reason.
    """
    from stratoscope.models.specimen import specimen

    batch = lm.batch(specimen(lm))
    name = type(lm.model).__name__
    try:
        resid, own = _last_stream(lm, batch), own_output(lm, batch)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = (
            f"{name} does not answer a plain batch of prompts ({type(error).__name__}: "
            f"{str(error)[:120]})"
        )
        return _unknown(f"{reason}, so its read-out cannot be found.")
    if own is None:  # an encoder that gives vectors
        return _vectors(lm)
    if len(own) > 1 and torch.allclose(own[0], own[-1], rtol=1e-4, atol=0) and own.ndim == 2:
        reason = (
            f"{name} answers every prompt alike (is its head zero?), so where it reads its "
            "answer cannot be told."
        )
        return _unknown(reason)
    normed = resid if lm.layout.final_norm is None else lm.layout.final_norm(resid)
    places: list[tuple[Where, Tensor]] = [("every", own)]
    if own.ndim == 2:
        alone: tuple[Where, ...] = ("last", "first", "mean", "patches")
        places = [(where, own) for where in alone]
        if own.shape == normed.shape[:2]:  # one value for each token
            places.append(("every", own[..., None]))
    for where, output in places:
        for steps in _chains(lm):
            readout = _try(lm, where, steps, normed, batch)
            if readout is not None and _same(readout, output, batch):
                return _named(lm, where, steps, output)
    tried = ", ".join(n for n, m in lm.model.named_children() if m is not lm.layout.base)
    return _unknown(
        f"the head of {name} ({tried}) could not be rebuilt: no chain of these modules at the "
        "last, the first or the mean "
        "position gives the model's own output. Its metric is refused; sites inside its layers "
        "can be read."
    )


def _vectors(lm: LM) -> Readout:
    reason = (
        f"`logits` does not exist on {lm.family.name}: {type(lm.model).__name__} has no "
        "read-out to a vocabulary"
    )
    return Readout("vectors", "every", lm.dims.dim, reason=f"{reason} or to classes.")


def _unknown(reason: str) -> Readout:
    return Readout("unknown", "every", 0, reason=reason)


def own_output(lm: LM, batch: Batch) -> Tensor | None:
    """What the model says: (example, output) or (example, position, output); start and end of an
    answer side by side."""
    with lm.taps.using():
        return answer_of(raw_output(lm, batch))


def raw_output(lm: LM, batch: Batch) -> Any:
    """The output of a plain run. A classifier without a padding id takes one prompt at a time, and
    is given them so."""
    try:
        return lm(batch)
    except ValueError:
        if len(batch) == 1 or batch.extra or batch.ids is None:
            raise
        alone = [answer_of(lm(batch.example(i))) for i in range(len(batch))]
        if not all(x is not None and x.ndim == 2 for x in alone):
            raise
        return {"logits": torch.cat(alone)}


def answer_of(output: Any) -> Tensor | None:
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)
    # BertForPreTraining has two read-outs
    x = output.get("logits", output.get("prediction_logits"))
    return x if isinstance(x, Tensor) and x.ndim in (2, 3) else None


def _last_stream(lm: LM, batch: Batch) -> Tensor:
    streams: list[Tensor] = []
    last = Site("", lm.dims.layers - 1, "resid_post")
    with lm.taps.using(reads={last: [lambda x, run: streams.append(x.detach().clone())]}):
        raw_output(lm, batch)
    return streams[0]


def _chains(lm: LM) -> Iterator[tuple[Step, ...]]:
    """Modules beside the base model, in their order, with or without the base's pooler and an
    activation between."""
    base = lm.layout.base
    beside = [m for m in lm.model.children() if m is not base and not isinstance(m, nn.Dropout)]
    pooler = getattr(base, "pooler", None)
    before = [pooler] if isinstance(pooler, nn.Module) else []
    for length in range(1, len(beside) + len(before) + 1):
        for chosen in combinations([*before, *beside], length):
            for first in (chosen[0], Alone(chosen[0])):
                yield (first, *chosen[1:])
                if length == 2:
                    yield from ((first, between, chosen[1]) for between in _BETWEEN)


def _try(
    lm: LM, where: Where, steps: Sequence[Step], normed: Tensor, batch: Batch
) -> Tensor | None:
    """The output of a chain, or None where it does not fit."""
    if where == "every":
        x = normed
    elif where in ("last", "first"):
        at = Readout("classes", where, 0).positions(batch)
        x = normed[torch.arange(len(batch), device=normed.device), at.to(normed.device)]
    else:
        x = pooled(where, normed, batch)
    try:
        with still(steps):
            for step in steps:
                x = step(x)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError):
        return None
    return x if isinstance(x, Tensor) else None


def _same(got: Tensor, own: Tensor, batch: Batch) -> bool:
    if got.ndim == own.ndim - 1 and own.shape[-1] == 1:
        got = got[..., None]  # a head that squeezes its one output
    if got.shape != own.shape:
        return False
    if own.ndim == 3 and batch.mask is not None:
        got, own = got[batch.mask], own[batch.mask]
    gap, scale = (got - own).float(), own.float()
    allowed = 1e-4 if own.dtype in (torch.float32, torch.float64) else 3e-2
    return bool(
        gap.abs().max() <= allowed * scale.abs().max() and gap.norm() <= allowed * scale.norm()
    )


def _named(lm: LM, where: Where, steps: tuple[Step, ...], own: Tensor) -> Readout:
    size, names = int(own.shape[-1]), _names(lm.model)
    if size == lm.dims.vocab and len(names) != size:
        mask = mask_token(lm) if where == "every" else None
        return Readout("vocab", where, size, lm.layout.final_norm, steps, mask=mask)
    if hasattr(lm.model, "qa_outputs") and size == 2:
        names = ("start", "end")
    kind: Kind = "values" if size == 1 else "classes"
    names = names if len(names) == size else tuple(map(str, range(size)))
    pad = lm.model.config.get_text_config().pad_token_id if where == "last" else None
    return Readout(kind, where, size, lm.layout.final_norm, steps, names, padding=pad)


def _names(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        str(label) for _, label in sorted((getattr(model.config, "id2label", None) or {}).items())
    )
