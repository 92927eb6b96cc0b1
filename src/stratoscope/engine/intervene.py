"""`intervene`: change any site while the model runs. An intervention is a value: where, what, and nothing hidden.

    with intervene(lm, ablate("layers.5.attn.z", units=[3]), add("layers.9.resid_post", vector, positions=-1)):
        lm(prompts)

The site's axes decide what can be narrowed: `examples`, `positions` (queries, for scores and patterns), `keys`, and
`units`: heads, neurons or dimensions, whichever the site has. `steps` counts forward passes while generating: 0 is the
prompt. After step 0 only one new position exists, so interventions at named positions act on step 0 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from stratoscope.engine.select import Positions, position_index, run_at
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site, parse
from stratoscope.models.taps import Run

UNIT_AXES = ("head", "kv_head", "neuron", "dim", "expert", "vocab")

# what is selected, and the intervention's value -> what takes its place
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "replace": lambda x, value: value.to(x).expand_as(x),
    "add": lambda x, value: x + value.to(x),
    "scale": lambda x, value: x * value.to(x),
    "clamp": lambda x, value: x.clamp(float(value[0]), float(value[1])),
    "project_out": lambda x, value: x - (x @ value.to(x).T) @ value.to(x),
}


@dataclass(frozen=True, eq=False)  # tensors do not compare
class Intervention:
    """One change at one site (or at all layers, with `*`).

    value: broadcasts against the selection, whose axes are the site's, narrowed: e.g. (example, position, head,
    head_dim).
    """

    site: Site
    operation: Literal["replace", "add", "scale", "clamp", "project_out"]
    value: Tensor
    positions: Positions = None
    units: Sequence[int] | None = None
    keys: Positions = None
    examples: Sequence[int] | None = None
    steps: Sequence[int] | None = None

    def apply(self, x: Tensor, run: Run) -> Tensor:
        """The site's tensor with the change made; the same tensor when this step or position is not concerned."""
        run = run_at(self.site, run)
        later = run.step > 0
        if (self.steps is not None and run.step not in self.steps) or (later and self.positions is not None):
            return x
        gone = run.past + x.shape[-2] - x.shape[-1] if self.keys is not None and run.step else 0
        if gone > 0:  # tokens that a sliding window's cache has let go: make place for them, so that keys count from 0
            return self._change(nn.functional.pad(x, (gone, 0)), run)[..., gone:]
        return self._change(x, run)

    def _change(self, x: Tensor, run: Run) -> Tensor:
        index = self.index(x, run)
        chosen = x if index is None else x[index]
        if self.operation in ("replace", "add", "scale"):
            self._refuse_misfit(chosen)
        changed = OPERATIONS[self.operation](chosen, self.value)
        return changed if index is None else torch.index_put(x, index, changed.to(x.dtype))

    def _refuse_misfit(self, chosen: Tensor) -> None:
        pairs = zip(reversed(self.value.shape), reversed(chosen.shape))
        if self.value.ndim > chosen.ndim or any(own not in (1, there) for own, there in pairs):
            raise InputError(
                f"a value of shape {tuple(self.value.shape)} does not fit what is selected at `{self.site}`, of shape "
                f"{tuple(chosen.shape)} ({', '.join(self.site.axes)}; a single position keeps its axis)."
            )

    def index(self, x: Tensor, run: Run) -> tuple[Tensor, ...] | None:
        """Index tensors, one for each axis up to the last narrowed one, or None for everything."""
        chosen: dict[int, Tensor] = {}
        examples = (
            torch.arange(x.shape[0])
            if self.examples is None
            else torch.as_tensor(list(self.examples), dtype=torch.long)
        )
        for axis, word in enumerate(self.site.axes):
            if word == "example" and self.examples is not None:
                if not all(0 <= example < x.shape[0] for example in self.examples):
                    raise InputError(f"examples {list(self.examples)}: this batch has {x.shape[0]}, numbered from 0.")
                chosen[axis] = examples[:, None]
            elif word in ("position", "query") and self.positions is not None:
                chosen[axis] = self._rows(self.positions, run, x, axis)
            elif word == "key" and self.keys is not None:
                chosen[axis] = self._rows(self.keys, run, x, axis)
            elif word in UNIT_AXES and self.units is not None:
                chosen[axis] = _units(self.units, x.shape[axis], word, self.site)[None]
        if not chosen:
            return None
        index = []
        for axis in range(max(chosen) + 1):
            picked = chosen.get(axis, torch.arange(x.shape[axis])[None] if axis else examples[:, None])
            shape = [1] * (max(chosen) + 1)
            shape[0] = picked.shape[0]
            shape[axis] = picked.shape[0] if axis == 0 else picked.shape[1]
            index.append(picked.reshape(shape).to(x.device))
        return tuple(index)

    def _rows(self, positions: Positions, run: Run, x: Tensor, axis: int) -> Tensor:
        index = position_index(positions, run, x.shape[0], x.shape[axis], self.examples)
        return index if self.examples is None else index[list(self.examples)]


@contextmanager
def intervene(lm: LM, *interventions: Intervention) -> Iterator[None]:
    """Make the changes inside the block; sites are refused before anything runs. Nests; the outer acts first."""
    edits: dict[Site, list[Callable[[Tensor, Run], Tensor]]] = {}
    for change in resolve(lm, interventions):
        edits.setdefault(change.site, []).append(change.apply)
    with lm.taps.using(edits=edits):
        yield


def resolve(lm: LM, interventions: Sequence[Intervention]) -> list[Intervention]:
    """Each intervention once for every site its pattern names. Raises SiteError; InputError for a misplaced option."""
    found = []
    for change in interventions:
        for site in lm.layout.resolve(change.site):
            if site.point == "mlp.router":
                raise SiteError(
                    f"`{site}` can be read but not changed: Transformers chooses the experts beside these logits, so a "
                    f"change of them would do nothing. Change `mlp.out`."
                )
            _refuse_unknown_units(lm, change, site)
            narrowed = {"positions": ("position", "query"), "keys": ("key",), "units": UNIT_AXES}
            for option, words in narrowed.items():
                if getattr(change, option) is not None and not set(words) & set(site.axes):
                    raise InputError(f"`{option}` cannot narrow `{site}`, whose axes are {', '.join(site.axes)}.")
            found.append(replace(change, site=site))
    return found


def _refuse_unknown_units(lm: LM, change: Intervention, site: Site) -> None:
    """Before anything runs, where the model's sizes are known; `index` sees to the rest."""
    dims = lm.layout.dims[site.tower]
    sizes = {"head": dims.heads, "kv_head": dims.kv_heads, "neuron": dims.neurons, "dim": dims.dim}
    word = next((axis for axis in site.axes if axis in sizes), None)
    if word and change.units is not None:
        _units(change.units, sizes[word], word, site)
    if change.examples is not None and not all(example >= 0 for example in change.examples):
        raise InputError(f"examples {list(change.examples)}: examples are numbered from 0.")


def replaced(site: str | Site, value: Tensor | float, **where: object) -> Intervention:
    """Put `value` in place of what is there."""
    return Intervention(parse(site), "replace", torch.as_tensor(value), **where)


def add(site: str | Site, value: Tensor | float, *, scale: float = 1.0, **where: object) -> Intervention:
    """Add `scale * value`, e.g. a steering vector."""
    return Intervention(parse(site), "add", torch.as_tensor(value) * scale, **where)


def scaled(site: str | Site, factor: Tensor | float, **where: object) -> Intervention:
    """Multiply by `factor`."""
    return Intervention(parse(site), "scale", torch.as_tensor(factor), **where)


def clamped(site: str | Site, low: float = -torch.inf, high: float = torch.inf, **where: object) -> Intervention:
    """Keep values between `low` and `high`; low == high fixes them."""
    if low > high:
        raise InputError(f"clamp at `{site}`: low {low} is above high {high}.")
    return Intervention(parse(site), "clamp", torch.tensor([low, high]), **where)


def project_out(site: str | Site, directions: Tensor, **where: object) -> Intervention:
    """Remove the component in the span of `directions`: (dim,) or (direction, dim), made orthonormal first."""
    basis = torch.linalg.qr(torch.atleast_2d(directions).float().T).Q.T
    return Intervention(parse(site), "project_out", basis, **where)


def ablate(
    site: str | Site,
    kind: Literal["zero", "mean", "resample"] = "zero",
    *,
    reference: Tensor | None = None,
    seed: int = 0,
    **where: object,
) -> Intervention:
    """Take a site's information away.

    zero: put zeros. mean: put `reference`, the site's mean as `Trace.mean` gives it (real tokens only). resample: put
    the values of `reference` with its examples permuted, none left in its own place; there, reference is the site
    (narrowed alike) on other or the same prompts, as `trace` gives it.
    """
    if kind == "zero":
        return replaced(site, 0.0, **where)
    if reference is None:
        raise InputError(f"{kind} ablation of `{site}` needs `reference=`: the site's values on reference prompts.")
    if kind == "mean":
        return replaced(site, reference, **where)
    if reference.shape[0] < 2:
        raise InputError(f"resample ablation of `{site}` needs at least two reference examples; got one.")
    generator = torch.Generator().manual_seed(seed)
    shift = int(torch.randint(1, reference.shape[0], (1,), generator=generator))
    return replaced(site, reference.roll(shift, dims=0), **where)


def knock_out(
    layer: int | str, queries: Positions, keys: Positions, *, heads: Sequence[int] | None = None
) -> Intervention:
    """Cut attention from `queries` to `keys` in one layer or all (`"*"`): those scores become -inf before softmax."""
    site = parse(f"layers.{layer}.attn.scores")
    return Intervention(site, "replace", torch.tensor(-torch.inf), positions=queries, keys=keys, units=heads)


def _units(units: Sequence[int], size: int, word: str, site: Site) -> Tensor:
    index = torch.as_tensor(list(units))
    if index.numel() == 0 or int(index.max()) >= size or int(index.min()) < -size:
        raise InputError(f"{word} {list(units)} at `{site}`: this site has {size}, numbered 0 to {size - 1}.")
    return index % size
