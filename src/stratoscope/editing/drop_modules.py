"""Drop attention or MLP modules: inside the block they are not computed, and the residual stream
goes by unchanged.

Paper: llm-drop

    layers.N.attn.out = 0 and nothing of that attention runs;   layers.N.mlp.out = 0 likewise;
                                                                both: the layer is gone

The module's `forward` is put aside for the length of the block. Attention that is left out keeps no
keys and values either: the others are numbered anew in the cache, so that generating goes on
rightly. Only the norm before the module still runs. The numbers are those of writing zeros at the
sites (and a saved edit, loaded again, does just that).

Reads as: what the model can do without these modules, and how much faster. Does not show what they
were for, nor that the model could not be trained to do better without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from posixpath import commonpath
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import replaced
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site

# what is dropped -> where its computation is entered
POINTS = {"attn.out": "attn.q", "mlp.out": "mlp.pre"}


class Nothing:
    """A `forward` that computes nothing: zeros as wide as its input, or `width`, in a tuple where
    attention gives one."""

    def __init__(self, width: int | None, pair: bool) -> None:
        self.width, self.pair = width, pair

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        zeros = (
            torch.zeros_like(x) if self.width is None else x.new_zeros(*x.shape[:-1], self.width)
        )
        return (zeros, None) if self.pair else zeros


class Drop(Edit):
    """Zeros at the sites, and nothing computed for them. Nests; everything is put back on any
    exit."""

    def __enter__(self) -> Drop:
        with ExitStack() as opening:
            for change in self.interventions:
                for module, nothing in _stubs(self.lm, change.site):
                    _put(opening, module, "forward", nothing)
            _renumber(opening, self.lm)
            super().__enter__()
            opening.callback(super().__exit__)
            self._open.append(opening.pop_all())
        return self


def edit(lm: LM, request: Sequence[str | Site]) -> Drop:
    """An edit without these modules: `with drop_modules.edit(lm, ["layers.3.attn.out",
    "layers.7.mlp.out"]): ...`.

    request: sites `layers.N.attn.out` or `layers.N.mlp.out`; N may be `*`;
    `layers.module_importance.least` gives them. Raises InputError for anything else; SiteError
    where attention cannot be told from the addition of the residual stream (Bloom); on entering,
    InputError when no attention of the first layer's kind (full, or sliding) would be left in a
    model that generates: by it the cache counts the tokens.
    """
    if (
        isinstance(request, str)
        or not request
        or not all(isinstance(site, (str, Site)) for site in request)
    ):
        raise InputError(
            f"modules are named as sites, such as ['layers.3.attn.out']; got {request!r:.80}."
        )
    sites = lm.layout.resolve(request)
    for site in sites:
        if site.point not in POINTS or site.tower:
            raise InputError(
                f"`{site}` is no module to drop: name attn.out or mlp.out of a layer of the main "
                "tower."
            )
        _stubs(lm, site)
    held = [replaced(site, 0.0) for site in sites]
    return Drop(lm, held, note=f"without {', '.join(map(str, sites))}")


def _stubs(lm: LM, site: Site) -> list[tuple[nn.Module, Nothing]]:
    """The modules that must not run, and what stands in for them."""
    tower, layer, attention = (
        lm.family.towers[site.tower],
        lm.layout.layer(site),
        site.point == "attn.out",
    )
    out, enter = tower.points[site.point].path, tower.points.get(POINTS[site.point])
    writers = tower.attn_write if attention else tower.mlp_write
    if enter is None and attention:
        raise SiteError(
            f"`{site}` cannot be left out on {lm.family.name}, whose attention module adds the "
            "residual stream itself: "
            "`engine.intervene.ablate` writes zeros there, without the gain in speed."
        )
    if enter is None:  # a mixture of experts
        return [(layer.get_submodule(out), Nothing(None, pair=False))]
    # the module around it does more than compute: only its two ends are taken away
    if out == writers[0]:
        first = Nothing(None, pair=True) if attention else Nothing(0, pair=False)
        return [
            (layer.get_submodule(enter.path), first),
            (layer.get_submodule(out), Nothing(lm.dims.dim, pair=False)),
        ]
    whole = commonpath([path.replace(".", "/") for path in (enter.path, writers[0])]).replace(
        "/", "."
    )
    return [(layer.get_submodule(whole), Nothing(None, pair=attention))]


def _renumber(opening: ExitStack, lm: LM) -> None:
    """Give the attention modules that are left the first places of their kind in the cache, which
    counts by those."""
    tower, config = lm.family.towers[""], lm.layout.config()
    if "attn.q" not in tower.points or not lm.model.can_generate():
        return
    modules = [layer.get_submodule(tower.points["attn.q"].path) for layer in lm.layout.layers[""]]
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(modules)
    runs = [not isinstance(module.__dict__.get("forward"), Nothing) for module in modules]
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        left = [place for place in places if runs[place]]
        if not left and kind == kinds[0]:  # of another kind nobody asks
            raise InputError(
                f"no {kind.replace('_', ' ')} would be left: keep one, by which the cache counts "
                "the tokens."
            )
        for place, old in zip(places, left):
            if place != old:
                _put(opening, modules[old], "layer_idx", place)


def _put(opening: ExitStack, module: nn.Module, name: str, value: object) -> None:
    """Set an attribute of the module's own; on leaving, what was there (or was not) is there
    again."""
    own = module.__dict__
    if name in own:
        opening.callback(own.__setitem__, name, own[name])
    else:
        opening.callback(own.pop, name)
    own[name] = value
