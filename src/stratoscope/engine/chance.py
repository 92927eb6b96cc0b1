"""What the largest effect of a whole sweep is by chance: the bound that an effect must exceed to be
called a cause.

    bound = max over draws and places  |effect of a random direction as long as the change there|

One random direction for each place says what one place does by chance. The largest of many effects
is another matter: compared with the largest of as many random ones, it wins in half of all sweeps
in which nothing is there to be effects. Ranks tell the two apart. Were all effects chance, the
sweep's largest would be one of `draws` + 1 alike, and beyond the others in one of `draws` + 1.

As many sweeps are not run. The bound is one number, the largest of (draw, place), and most of these
can be left out: the effect of a random direction is, to first order, its product with the gradient,
which one backward pass gives for all places. The first draw is swept at every place, and of the
others as many cells as `exactly` says, those of the largest products; what counts is what they
really do. Measured on SmolLM2 with 20 full sweeps for each of five pairs of prompts: the bound is
the full one for heads (0.99 of it on one pair) and at least 0.99 of it for residual streams; a
further draw passes it in 6.0 % of cases, and the full one in 5.0 %. Hence 24 draws and not 19: with
what is left out, chance names something in 5 % of sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.engine import outside, sequence
from stratoscope.engine.continued import continued
from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import Intervention
from stratoscope.engine.metric import Target
from stratoscope.engine.pair import Pair, random_like
from stratoscope.engine.sweep import Progress
from stratoscope.errors import InputError, StratoscopeError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.provenance import foreign_hooks

# change(layer, place, vectors of that layer (example, position, ...), examples): a patch of a sweep
Change = Callable[[int, int, Tensor, list[int]], Intervention]


@torch.no_grad()
def patched(
    lm: LM,
    prompts: Pair,
    base: Float[Tensor, "layer example position *rest"],
    source: Float[Tensor, "layer example position *rest"],
    sites: Sequence[str],
    change: Change,
    *,
    exactly: int,
    draws: int,
    seed: int,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Effect and null (example, layer, place) of a patch at every place, and the bound (example,).

    base, source: values at `sites`, one for each layer. A place is a head where they have one,
    (layer, example, position, head, head_dim), and otherwise a position. The null is one random
    direction for each place. exactly: how many cells of the other draws are swept. Without a
    gradient (inference mode, a kernel that has none) all of them are. Raises InputError for no
    draw, and what `sweep` raises.
    """
    if draws < 1:
        raise InputError(f"draws={draws}: at least one draw is needed; 24 make a bound of 5 %.")
    seeds = [seed, *_further(seed, draws - 1)]
    layers, examples, width, *rest = base.shape
    shape = (layers, rest[0] if len(rest) > 1 else width)
    every = list(range(examples))
    # which examples have a place is asked on the host, once
    real = torch.ones(examples, width) if prompts.base.mask is None else prompts.base.mask.cpu()
    has = [every if len(rest) > 1 else real[:, p].nonzero()[:, 0].tolist() for p in range(shape[1])]
    cells = [
        change(layer, place, vectors[layer], has[place])
        for vectors in (source, random_like(base, source, seed))
        for layer in range(layers)
        for place in range(shape[1])
    ]
    slopes = _slopes(lm, prompts.base, prompts.target, sites, base)
    likely = _likeliest(base, source, slopes, seeds[1:], has, exactly)
    for number, chosen in zip(seeds[1:], likely):
        vectors = random_like(base, source, number)
        for layer, place in chosen.any(dim=0).nonzero().tolist():
            concerned = chosen[:, layer, place].nonzero()[:, 0].tolist()
            cells.append(change(layer, place, vectors[layer], concerned))
    effects = sequence.swept(lm, prompts.base, cells, prompts.target, save=save, progress=progress)
    effects = prompts.normalise(effects).T
    each = 2 * shape[0] * shape[1]
    effect, null = effects[:, :each].unflatten(1, (2, *shape)).unbind(1)
    # a cell on an example that it does not concern is the base run there: an effect of 0
    return effect, null, effects[:, each // 2 :].abs().amax(dim=1)


def _further(seed: int, count: int) -> list[int]:
    """Seeds of the draws after the first, the same however many follow."""
    generator = torch.Generator().manual_seed(seed)
    return [int(torch.randint(2**62, (), generator=generator)) for _ in range(count)]


def _likeliest(
    base: Tensor,
    source: Tensor,
    slopes: Tensor | None,
    seeds: Sequence[int],
    has: Sequence[Sequence[int]],
    exactly: int,
) -> Bool[Tensor, "draw example layer place"]:
    """Of each example the cells whose random direction has the largest product with the gradient;
    all of them without one."""
    there = torch.zeros(base.shape[1], len(has), dtype=torch.bool)
    for place, examples in enumerate(has):
        there[examples, place] = True
    size = (len(seeds), base.shape[1], base.shape[0], len(has))
    if slopes is None or not seeds:
        return there[:, None].expand(size)
    products = []
    for seed in seeds:
        product = ((random_like(base, source, seed) - base).float() * slopes).sum(dim=-1)
        product = product.sum(dim=2) if product.ndim == 4 else product  # a head at all positions
        products.append(product.abs().nan_to_num(torch.inf).transpose(0, 1))
    order = torch.stack(products).cpu().masked_fill(~there[:, None], -1).transpose(0, 1).flatten(1)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen.scatter_(1, order.topk(min(exactly, order.shape[1]), dim=1).indices, True)
    return chosen.unflatten(1, (size[0], *size[2:])).transpose(0, 1) & there[:, None]


def _slopes(
    lm: LM, batch: Batch, target: Target, sites: Sequence[str], base: Tensor
) -> Float[Tensor, "layer example position *rest"] | None:
    """d difference / d site; None where no gradient can be had.

    One prompt at a time, which bounds what a backward pass keeps; together where something is at
    work outside that may name examples, and where prompts bring more than tokens.
    """
    if target.tokens:
        longer = continued(lm, batch, target)
        rows, example, metric = longer.batch, longer.example.tolist(), longer.metric
    else:
        rows, example, metric = batch, list(range(len(batch))), target.difference
    width = base.shape[2]
    lengths = [width] * len(batch) if batch.mask is None else batch.host_lengths.tolist()
    alone = rows.ids is not None and not rows.extra
    alone = alone and not any(outside.sites(lm)) and not any(foreign_hooks(lm.model))
    slopes = torch.zeros_like(base, dtype=torch.float32)
    try:
        with torch.inference_mode(False), outside.unheard(lm):
            for group in [[n] for n in range(len(rows))] if alone else [list(range(len(rows)))]:
                part = rows.example(group[0]) if alone else rows
                ask = lambda logits, group=group: metric(logits, torch.tensor(group))  # noqa: E731
                grads = gradients(lm, part, sites, ask)[2]
                for layer, grad in enumerate(grads.values()):
                    for row, own in zip(group, grad.float()):
                        prompt = slice(lengths[example[row]])  # not what follows of a whole answer
                        slopes[layer, example[row], prompt] += own[prompt]
    except (StratoscopeError, RuntimeError):
        return None
    return slopes
