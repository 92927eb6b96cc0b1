"""`intervene`: change any site while the model runs. An intervention is a value: where, what, and
nothing hidden.

    with intervene(lm, ablate("layers.5.attn.z", units=[3]), add("layers.9.resid_post", vector,
    positions=-1)):
        lm(prompts)

The site's axes decide what can be narrowed: `examples`, `positions` (queries, for scores and
patterns), `keys`, and `units`: heads, neurons or dimensions, whichever the site has. `steps` counts
forward passes while generating: 0 is the prompt. Named positions are the prompt's, so they act on
step 0 alone; but keys and values (`attn.k`, `attn.v`, and `keys` of scores and patterns) are read
again at every later step, and stay changed there, as in a run without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stratoscope.engine.intervention import UNIT_AXES, Intervention, units_at
from stratoscope.engine.select import Positions, take
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site, parse


@contextmanager
def intervene(lm: LM, *interventions: Intervention) -> Iterator[None]:
    """Make the changes inside the block; sites are refused before anything runs. Nests; the outer
    acts first."""
    edits: dict[Site, list[Callable[[Tensor, Run], Tensor]]] = {}
    for change in resolve(lm, interventions):
        edits.setdefault(change.site, []).append(change.apply)
    with lm.taps.using(edits=edits):
        yield


def resolve(lm: LM, interventions: Sequence[Intervention]) -> list[Intervention]:
    """Each intervention once for every site its pattern names. Raises SiteError; InputError for a
    misplaced option."""
    return resolve_cells(lm, [interventions])[0]


def resolve_cells(
    lm: LM, cells: Sequence[Intervention | Sequence[Intervention]]
) -> list[list[Intervention]]:
    """`resolve` for each cell of a sweep, which names the same sites many times."""
    known: dict[Site, list[Site]] = {}
    table: list[list[Intervention]] = []
    for cell in cells:
        resolved = []
        for change in [cell] if isinstance(cell, Intervention) else cell:
            if (sites := known.get(change.site)) is None:
                sites = known[change.site] = _changeable(lm, change.site)
            for site in sites:
                _refuse_misplaced(lm, change, site)
                resolved.append(change if site == change.site else replace(change, site=site))
        table.append(resolved)
    return table


def _changeable(lm: LM, pattern: Site) -> list[Site]:
    """The sites of a pattern, itself where it names just itself."""
    sites = lm.layout.resolve(pattern)
    for site in sites:
        if site.point == "mlp.router":
            raise SiteError(
                f"`{site}` can be read but not changed: Transformers chooses the experts "
                "beside these logits, so a "
                f"change of them would do nothing. Change `mlp.out`."
            )
    return [pattern] if sites == [pattern] else sites


def _refuse_misplaced(lm: LM, change: Intervention, site: Site) -> None:
    if change.examples is not None and not all(example >= 0 for example in change.examples):
        raise InputError(f"examples {list(change.examples)}: examples are numbered from 0.")
    narrowed = {"positions": ("position", "query"), "keys": ("key",), "units": UNIT_AXES}
    for option, words in narrowed.items():
        if getattr(change, option) is not None and not set(words) & set(site.axes):
            raise InputError(
                f"`{option}` cannot narrow `{site}`, whose axes are {', '.join(site.axes)}."
            )
    if change.units is not None:
        _refuse_unknown_units(lm, change, site)


def _refuse_unknown_units(lm: LM, change: Intervention, site: Site) -> None:
    """Before anything runs, where the model's sizes are known; `index` sees to the rest."""
    sizes = lm.layout.sizes(site)
    word = next((axis for axis in site.axes if axis in sizes and axis != "head_dim"), None)
    if word and change.units is not None:
        units_at(change.units, sizes[word], word, site)


def replaced(site: str | Site, value: Tensor | float, **where: object) -> Intervention:
    """Put `value` in place of what is there."""
    return Intervention(parse(site), "replace", torch.as_tensor(value), **where)


def add(
    site: str | Site, value: Tensor | float, *, scale: float = 1.0, **where: object
) -> Intervention:
    """Add `scale * value`, e.g. a steering vector."""
    return Intervention(parse(site), "add", torch.as_tensor(value) * scale, **where)


def scaled(site: str | Site, factor: Tensor | float, **where: object) -> Intervention:
    """Multiply by `factor`."""
    return Intervention(parse(site), "scale", torch.as_tensor(factor), **where)


def clamped(
    site: str | Site, low: float = -torch.inf, high: float = torch.inf, **where: object
) -> Intervention:
    """Keep values between `low` and `high`; low == high fixes them."""
    if low > high:
        raise InputError(f"clamp at `{site}`: low {low} is above high {high}.")
    return Intervention(parse(site), "clamp", torch.tensor([low, high]), **where)


def project_out(site: str | Site, directions: Tensor, **where: object) -> Intervention:
    """Remove the component in the span of `directions`: (dim,) or (direction, dim), of any length,
    repeated or dependent; a zero vector spans nothing. Raises InputError for directions that are
    not numbers.
    """
    given = torch.atleast_2d(torch.as_tensor(directions)).detach().float()
    if given.ndim != 2 or not given.isfinite().all():
        raise InputError(
            f"directions at `{site}` must be finite, (dim,) or (direction, dim); got "
            f"{tuple(given.shape)}."
        )
    given = given / given.norm(dim=1, keepdim=True).clamp_min(torch.finfo(given.dtype).tiny)
    _, sizes, basis = torch.linalg.svd(given.double(), full_matrices=False)
    # below this, rounding of what was given
    least = max(given.shape) * torch.finfo(torch.float32).eps
    return Intervention(parse(site), "project_out", basis[sizes > least].float(), **where)


def largest(site: str | Site, k: int, **where: object) -> Intervention:
    """Keep the k values of largest size along the last axis (of the named units), zero the rest."""
    if k < 0:
        raise InputError(f"k={k} at `{site}`: keep 0 or more.")
    return Intervention(parse(site), "largest", torch.tensor(k), **where)


def permuted(site: str | Site, order: Tensor, **where: object) -> Intervention:
    """Move values along the last axis: at place d stands what was at `order[..., d]`. Raises
    InputError for an order that is no permutation."""
    places = torch.arange(order.shape[-1], device=order.device)
    if order.is_floating_point() or not bool((order.sort(dim=-1).values == places).all()):
        raise InputError(
            f"the order at `{site}` is no permutation: each row holds 0 to {len(places) - 1} once."
        )
    return Intervention(parse(site), "permute", order, **where)


def ablate(
    site: str | Site,
    kind: Literal["zero", "mean", "resample"] = "zero",
    *,
    reference: Tensor | None = None,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
    **where: object,
) -> Intervention:
    """Take a site's information away.

    zero: put zeros. mean: put `reference`, the site's mean as `Trace.mean` gives it (real tokens
    only). resample: put the values of `reference` with its examples permuted, none left in its own
    place; there, reference is the site (narrowed alike) on other or the same prompts, as `trace`
    gives it. Where a reference prompt is shorter than the one it stands for, its own tokens begin
    again: its padding is never put anywhere. lengths: the tokens of each reference prompt, which a
    traced tensor knows until it is computed with.
    """
    if kind == "zero":
        return replaced(site, 0.0, **where)
    if reference is None:
        raise InputError(
            f"{kind} ablation of `{site}` needs `reference=`: the site's values on reference "
            "prompts."
        )
    if kind == "mean":
        return replaced(site, reference, **where)
    if reference.shape[0] < 2:
        raise InputError(
            f"resample ablation of `{site}` needs at least two reference examples; got one."
        )
    generator = torch.Generator().manual_seed(seed)
    shift = int(torch.randint(1, reference.shape[0], (1,), generator=generator))
    return replaced(site, _without_padding(site, reference, lengths).roll(shift, dims=0), **where)


def _without_padding(site: str | Site, reference: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """The reference with each prompt's own positions repeated after its end."""
    words = parse(site).axes
    axis = next((i for i, word in enumerate(words) if word in ("position", "query")), 0)
    if reference.ndim < len(words) or reference.shape[axis] == 1:
        return reference  # one position of each
    known = getattr(reference, "own_lengths", None) if lengths is None else list(lengths)
    if (
        known is None
        or len(known) != len(reference)
        or not all(0 < n <= reference.shape[axis] for n in known)
    ):
        raise InputError(
            f"resample ablation of `{site}`: how many of the {reference.shape[axis]} positions of "
            "each of the "
            f"{len(reference)} reference prompts are tokens, and how many padding? Give "
            "`lengths=`, one for each."
        )
    if words[axis] == "query" and len(set(known)) > 1:
        raise InputError(
            f"resample ablation of `{site}` needs reference prompts of one length; they have "
            f"{known}."
        )
    along = torch.arange(reference.shape[axis], device=reference.device)
    return take(reference, axis, along % torch.tensor(known, device=reference.device)[:, None])


def knock_out(
    layer: int | str, queries: Positions, keys: Positions, *, heads: Sequence[int] | None = None
) -> Intervention:
    """Cut attention from `queries` to `keys` in one layer or all (`"*"`): those scores become -inf
    before softmax."""
    site = parse(f"layers.{layer}.attn.scores")
    return Intervention(
        site, "replace", torch.tensor(-torch.inf), positions=queries, keys=keys, units=heads
    )
