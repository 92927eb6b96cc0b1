"""Tune parts: a brief fine-tune of some heads and MLPs, as an edit; every other weight stays as it
is, to the bit.

Paper: arithmetic-heads ("precise" fine-tuning)

    theta[part] <- theta[part] - rate * Adam(grad of the mean loss of a batch of texts)

A head's part are the entries of its layer's attention on which its query, its key, its value or
what it writes depends: rows of q, k and v with their biases, columns of the output matrix. Where
query heads share keys and values, those rows are all of theirs. An MLP's part are its matrices and
biases. Norms are of no part.

Reads as: how far a few components can be taught a task, side by side with all weights (`only=None`)
or as many others. Does not show that the task was there before: any part of a model can be taught
something. Judge it on other text too.
Cost: `steps` forward and backward passes of batch_size texts; a copy of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.editing.fine_tune import _adam, _copy
from stratoscope.engine.alone import Layers
from stratoscope.engine.edit import Edit
from stratoscope.engine.mask_search import refuse
from stratoscope.engine.masks import MLP, matrices
from stratoscope.engine.train import Recipe, epoch_rows, train
from stratoscope.errors import InputError
from stratoscope.maths.loss import next_token_loss
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.weights import is_plain, matrix

Part = str | Sequence[int]
_HEAD, _MLP = re.compile(r"L(\d+)H(\d+)"), re.compile(r"L(\d+) mlp")


def parts(lm: LM, only: Sequence[Part]) -> dict[str, Tensor]:
    """Which entries of which parameters belong to these heads and MLPs: True where they do, by the
    parameter's name. Raises InputError for what is no head or MLP of this model."""
    heads, mlps = _read(lm, only)
    found: dict[str, Tensor] = {}
    own = dict(lm.model.named_parameters())
    names = {id(value): name for name, value in own.items()}

    def add(parameter: nn.Parameter, here: Tensor) -> None:
        name = names[id(parameter)]
        found[name] = found[name] | here if name in found else here.clone()

    for layer in sorted({layer for layer, _ in heads}):
        for parameter, here in _heads(lm, layer, [h for at, h in heads if at == layer]):
            add(parameter, here)
    for name, one in matrices(lm).items():
        if one.component == MLP and one.layer in mlps:
            beside = own.get(f"{name.removesuffix('weight')}bias")
            for parameter in (one.weight, *([] if beside is None else [beside])):
                add(parameter, torch.ones_like(parameter, dtype=torch.bool))
    return found


def edit(
    lm: LM,
    request: Any,
    *,
    only: Sequence[Part] | None = None,
    last: int | None = None,
    steps: int = 10,
    batch_size: int = 1,
    rate: float = 1e-4,
    seed: int = 0,
) -> Edit:
    """The change after `steps` steps: `with tune_parts.edit(lm, texts, only=["L9H3", "L5 mlp"]):
    lm(...)`.

    request: texts, shuffled by the seed, epoch after epoch. only: heads ("L9H3", or (9, 3)) and
    MLPs ("L5 mlp"); None trains all weights. last: how many tokens at each text's end are asked
    for; default all but the first. rate: of Adam, without decay. It is a copy that is trained.
    Raises SiteError for a model that does not predict the next token; InputError for an unknown
    part, fewer texts than a batch, a text too short for `last`, and a loss that is no number.
    """
    refuse(lm)
    batch = lm.batch(request)
    asked = 1 if last is None else last
    if steps < 1 or not 1 <= batch_size <= len(batch) or not 1 <= asked < int(batch.lengths.min()):
        raise InputError(
            f"steps={steps}, batch_size={batch_size}, last={last} of {len(batch)} texts of "
            f"{int(batch.lengths.min())} tokens and more: one step, a batch no larger than there "
            "are texts, and a token before the first that is asked for."
        )
    student = _copy(lm)
    student.model.requires_grad_(True)
    moving = None if only is None else parts(student, only)
    before = dict(lm.model.named_parameters())

    def put_back(model: nn.Module, step: int) -> None:
        for name, parameter in model.named_parameters():
            if moving is not None and name in moving:
                parameter.copy_(torch.where(moving[name], parameter, before[name]))

    recipe = Recipe(
        student.model,
        partial(_loss, student, batch, last, batch_size, seed),
        save=None,
        judge=None,
        steps=steps,
        rate=rate,
        betas=(0.9, 0.999),
        clip=None,
        training=False,
        schedule=lambda step: rate,
        select=None if moving is None else moving.__contains__,
        optimiser=partial(_adam, maximize=False),
        after=put_back,
    )
    try:
        train(recipe, None, seed=seed)
    except ArithmeticError as error:
        raise InputError(f"{error}: take fewer steps, or a lower rate than {rate}.") from error
    deltas = {name: (p - before[name]).detach() for name, p in student.model.named_parameters()}
    moved = {name: delta for name, delta in deltas.items() if bool(delta.any())}
    return Edit(lm, (), moved, note=f"{_named(lm, only, moving)}, {steps} steps at {rate}")


def _loss(
    lm: LM,
    batch: Batch,
    last: int | None,
    size: int,
    seed: int,
    model: nn.Module,
    step: int,
    generator: torch.Generator,
) -> Tensor:
    ids, real = batch.text
    rows = epoch_rows(len(ids), size, step, seed).tolist()
    shown = lm.batch([ids[row][real[row]].tolist() for row in rows])
    ids, counted = shown.text
    if last is not None:
        place = torch.arange(ids.shape[1], device=ids.device)
        counted = counted & (place >= shown.lengths.to(ids.device)[:, None] - last)
    return next_token_loss(lm(shown)["logits"], ids, counted)


def _heads(lm: LM, layer: int, heads: Sequence[int]) -> list[tuple[nn.Parameter, Tensor]]:
    """Entries that a query, key or value of these heads depends on, by asking for their gradient on
    a random input; and what the output matrix takes from them."""
    [asks, writes] = lm.layout.resolve([f"layers.{layer}.attn.{point}" for point in ("q", "out")])
    plain = [module for module in lm.layout.attention(asks).modules() if is_plain(module)]
    inside = [p for module in plain for p in module.parameters(recurse=False)]
    flags = [p.requires_grad for p in inside]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, lm.dims.dim, generator=generator).to(inside[0])
    total = torch.zeros((), device=x.device)
    try:
        for p in inside:
            p.requires_grad_(True)
        with torch.enable_grad(), Layers(lm, lm.batch([[1, 1, 1]])) as layers:
            seen = layers.attention(layer, x)
            for side in (seen.q, seen.k, seen.v):
                own = side[:, list(heads)].float()
                total = total + (own * torch.randn(own.shape, generator=generator).to(own)).sum()
            slopes = torch.autograd.grad(total, inside, allow_unused=True)
    finally:
        for p, flag in zip(inside, flags):
            p.requires_grad_(flag)
    projection: Any = lm.layout.writers(writes)[0]
    weight = matrix(projection)
    taken = torch.zeros_like(weight, dtype=torch.bool).unflatten(1, (lm.dims.heads, -1))
    taken[:, list(heads)] = True
    out = taken.flatten(1) if weight is projection.weight else taken.flatten(1).T
    depends = [(p, slope != 0) for p, slope in zip(inside, slopes) if slope is not None]
    return [*depends, (projection.weight, out)]


def _read(lm: LM, only: Sequence[Part]) -> tuple[list[tuple[int, int]], list[int]]:
    """Heads as (layer, head), and the layers of MLPs."""
    heads, mlps = [], []
    for part in only:
        name = part if isinstance(part, str) else "L{}H{}".format(*part)
        if (found := _HEAD.fullmatch(name)) and int(found[2]) < lm.dims.heads:
            heads.append((int(found[1]), int(found[2])))
        elif found := _MLP.fullmatch(name):
            mlps.append(int(found[1]))
        if not found or int(found[1]) >= lm.dims.layers or not (heads or mlps):
            raise InputError(
                f"{part!r} is no part of this model: heads run from L0H0 to "
                f"L{lm.dims.layers - 1}H{lm.dims.heads - 1}, MLPs from 'L0 mlp'."
            )
    if not only:
        raise InputError("only=[]: name one head or MLP at least, or None for all weights.")
    return heads, mlps


def _named(lm: LM, only: Sequence[Part] | None, moving: Mapping[str, Tensor] | None) -> str:
    """What was trained, in words: with shared keys and values, whose they are as well."""
    if only is None or moving is None:
        return "all weights trained"
    heads, _ = _read(lm, only)
    group = max(1, lm.dims.heads // (lm.dims.kv_heads or lm.dims.heads))
    beside = sorted(
        {
            (layer, other)
            for layer, head in heads
            for other in range(head // group * group, (head // group + 1) * group)
        }
        - {*heads}
    )
    what = ", ".join(p if isinstance(p, str) else "L{}H{}".format(*p) for p in only)
    count = sum(int(here.sum()) for here in moving.values())
    return f"{count:,} weights of {what} trained" + (
        f" (keys and values are those of {', '.join(f'L{a}H{b}' for a, b in beside)} too)"
        if beside
        else ""
    )
