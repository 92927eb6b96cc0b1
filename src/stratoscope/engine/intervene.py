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
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from stratoscope.engine.select import Positions, key_axis, position_index, run_at, take, with_gone
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.provenance import value_told
from stratoscope.models.run import Run
from stratoscope.models.sites import Site, parse

WHERE = ("positions", "units", "keys", "examples", "steps")  # what narrows an intervention
UNIT_AXES = ("head", "kv_head", "neuron", "channel", "dim", "expert", "vocab")

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

    value: broadcasts against the selection, whose axes are the site's, narrowed: e.g. (example,
    position, head, head_dim).
    """

    site: Site
    operation: Literal["replace", "add", "scale", "clamp", "project_out"]
    value: Tensor
    positions: Positions = None
    units: Sequence[int] | None = None
    keys: Positions = None
    examples: Sequence[int] | None = None
    steps: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise InputError(
                f"operation {self.operation!r} at `{self.site}`: choose one of "
                f"{', '.join(OPERATIONS)}."
            )

    def describe(self) -> dict[str, Any]:
        """What provenance tells of it, beside the site."""
        where = {name: getattr(self, name) for name in WHERE if getattr(self, name) is not None}
        told = {
            name: x.tolist() if hasattr(x, "tolist") else _lists(x) for name, x in where.items()
        }
        return {"operation": self.operation, "value": value_told(self.value), **told}

    def apply(self, x: Tensor, run: Run) -> Tensor:
        """The site's tensor with the change made; the same tensor when this step or position is not
        concerned."""
        axis = key_axis(self.site)
        queries = self.positions is not None and (axis is None or "query" in self.site.axes)
        if (self.steps is not None and run.step not in self.steps) or (run.step > 0 and queries):
            return x
        named = self.positions if self.keys is None else self.keys
        gone = 0
        if axis is not None and named is not None:
            gone = run_at(self.site, run, self.site.axes[axis]).gone(x.shape[axis])
        # make place for what a sliding window's cache has let go, so that keys count from 0
        if gone:
            changed = self._change(with_gone(x, axis, gone, 0.0), run)
            return changed.narrow(axis, gone, x.shape[axis])
        return self._change(x, run)

    def _change(self, x: Tensor, run: Run) -> Tensor:
        index = self.index(x, run)
        chosen = x if index is None else x[index]
        value = self.value
        if self.operation in ("replace", "add", "scale"):
            # one for each example: of all its beams
            if run.copies > 1 and value.ndim == chosen.ndim and len(value) > 1:
                value = value.repeat_interleave(run.copies, dim=0)
            self._refuse_misfit(value, chosen)
        changed = OPERATIONS[self.operation](chosen, value)
        return changed if index is None else torch.index_put(x, index, changed.to(x.dtype))

    def _refuse_misfit(self, value: Tensor, chosen: Tensor) -> None:
        pairs = zip(reversed(value.shape), reversed(chosen.shape))
        if value.ndim > chosen.ndim or any(own not in (1, there) for own, there in pairs):
            raise InputError(
                f"a value of shape {tuple(value.shape)} does not fit what is selected at "
                f"`{self.site}`, of shape "
                f"{tuple(chosen.shape)} ({', '.join(self.site.axes)}; a single position keeps its "
                "axis)."
            )

    def index(self, x: Tensor, run: Run) -> tuple[Tensor, ...] | None:
        """Index tensors, one for each axis up to the last narrowed one, or None for everything."""
        chosen: dict[int, Tensor] = {}
        rows = self._rows(len(x), run)
        for axis, word in enumerate(self.site.axes):
            if word == "example" and self.examples is not None:
                chosen[axis] = rows[:, None]
            elif (named := self._named(word)) is not None:
                there, size = run_at(self.site, run, word), x.shape[axis]
                chosen[axis] = position_index(named, there, len(x), size, rows.tolist())[rows]
            elif word in UNIT_AXES and self.units is not None:
                chosen[axis] = _units(self.units, x.shape[axis], word, self.site)[None]
        if not chosen:
            return None
        index = []
        for axis in range(max(chosen) + 1):
            picked = chosen.get(axis, torch.arange(x.shape[axis])[None] if axis else rows[:, None])
            shape = [1] * (max(chosen) + 1)
            shape[0] = picked.shape[0]
            shape[axis] = picked.shape[0] if axis == 0 else picked.shape[1]
            index.append(picked.reshape(shape).to(x.device))
        return tuple(index)

    def _named(self, word: str) -> Positions:
        """The positions named along an axis."""
        own = {"position": self.positions, "query": self.positions, "key": self.keys}
        return own.get(word)

    def _rows(self, count: int, run: Run) -> Tensor:
        """The rows of the named examples (all beams of each); of all without names."""
        if self.examples is None:
            return torch.arange(count)
        there = count // run.copies
        if not all(0 <= example < there for example in self.examples):
            raise InputError(
                f"examples {list(self.examples)}: this batch has {there}, numbered from 0."
            )
        first = torch.tensor(list(self.examples), dtype=torch.long) * run.copies
        return (first[:, None] + torch.arange(run.copies)).flatten()


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
    found = []
    for change in interventions:
        for site in lm.layout.resolve(change.site):
            if site.point == "mlp.router":
                raise SiteError(
                    f"`{site}` can be read but not changed: Transformers chooses the experts "
                    "beside these logits, so a "
                    f"change of them would do nothing. Change `mlp.out`."
                )
            _refuse_unknown_units(lm, change, site)
            narrowed = {"positions": ("position", "query"), "keys": ("key",), "units": UNIT_AXES}
            for option, words in narrowed.items():
                if getattr(change, option) is not None and not set(words) & set(site.axes):
                    raise InputError(
                        f"`{option}` cannot narrow `{site}`, whose axes are {', '.join(site.axes)}."
                    )
            found.append(replace(change, site=site))
    return found


def _refuse_unknown_units(lm: LM, change: Intervention, site: Site) -> None:
    """Before anything runs, where the model's sizes are known; `index` sees to the rest."""
    sizes = lm.layout.sizes(site)
    word = next((axis for axis in site.axes if axis in sizes and axis != "head_dim"), None)
    if word and change.units is not None:
        _units(change.units, sizes[word], word, site)
    if change.examples is not None and not all(example >= 0 for example in change.examples):
        raise InputError(f"examples {list(change.examples)}: examples are numbered from 0.")


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


def _lists(x: Any) -> Any:
    return [_lists(one) for one in x] if isinstance(x, Sequence) else int(x)


def _units(units: Sequence[int], size: int, word: str, site: Site) -> Tensor:
    index = torch.as_tensor(list(units))
    if index.numel() == 0 or int(index.max()) >= size or int(index.min()) < -size:
        raise InputError(
            f"{word} {list(units)} at `{site}`: this site has {size}, numbered 0 to {size - 1}."
        )
    return index % size
