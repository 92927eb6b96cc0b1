"""A layout: a family's table resolved against one model, from site names to the modules that carry
them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stratoscope.errors import FamilyError, SiteError
from stratoscope.models.alias import refuse_another_tensor
from stratoscope.models.dims import dims_of
from stratoscope.models.family import Family, Point, Tower
from stratoscope.models.sites import GLOBAL_POINTS, POINTS, Site, expand
from stratoscope.models.weights import Scaled


class Layout:
    """Where each site of this model lives. Raises FamilyError when the family's paths do not fit
    the model."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        # the `Readout` of a head that the family does not name, once it is found
        self.found_head: Any = None
        self.base: nn.Module = model.base_model
        self.layers = {
            name: list(self._global(tower.layers)) for name, tower in family.towers.items()
        }
        self._towers = {
            name: [self._as_in(layer, family.towers[name]) for layer in layers]
            for name, layers in self.layers.items()
        }
        if family.head and not self.family_head and _reads_out(model):
            raise FamilyError(
                f"{type(model).__name__} has an output embedding, but not at {family.head}, where "
                "family "
                f"`{family.name}` reads logits."
            )
        self.dims = {name: dims_of(self, towers, name) for name, towers in self._towers.items()}

    def resolve(self, sites: str | Site | Iterable[str | Site]) -> list[Site]:
        """Parse and expand site names, and refuse those that this model does not have. Raises
        SiteError."""
        depths = {name: len(layers) for name, layers in self.layers.items()}
        resolved = expand(sites, depths, self.family.main)
        for site in resolved:
            reason = self.lack(site)
            if reason:
                raise SiteError(f"`{site}` does not exist on {self.family.name}: {reason}.")
            if site.alias:
                refuse_another_tensor(self, site)
        return resolved

    def resolve_one(self, site: str | Site) -> Site:
        """The one site that a name means. Raises SiteError, also for a name with `*`."""
        resolved = self.resolve(site)
        if len(resolved) != 1:
            raise SiteError(
                f"`{site}` names {len(resolved)} sites where one is needed: give a layer's number "
                "for `*`."
            )
        return resolved[0]

    def lack(self, site: Site) -> str | None:
        """Why this model has no such site, or None."""
        tower = self.tower(site)
        if site.layer is not None:
            cross = site.point.startswith("cross.")
            none = "its layers read no other tower" if cross else "it has no such part"
            return tower.lacks.get(site.point) or (None if site.point in tower.points else none)
        if site.tower and site.point not in ("embed", "final_norm"):
            return "a tower beside the main one has no such part of its own"
        if site.point == "logits":
            if self.head or (self.found_head and not self.found_head.reason):
                two = (
                    "it has two outputs for each token, start_logits and end_logits; "
                    "`lm.readout` gives both"
                )
                return two if hasattr(self.model, "qa_outputs") else None
            none = f"{type(self.model).__name__} has no read-out to a vocabulary or to classes"
            return self.found_head.reason.rstrip(".") if self.found_head else none
        if site.point == "projector":
            return None if self.family.projector else "it has no projector between vision and text"
        return None if getattr(tower, site.point) else "it has no such part"

    def all_sites(self) -> list[Site]:
        """Every site of the model, in the order in which they are computed within a layer."""
        names = [
            Site(t, layer, p)
            for t, ls in self.layers.items()
            for layer in range(len(ls))
            for p in POINTS
        ]
        ends = [
            Site(t, None, p)
            for t in self.layers
            for p in GLOBAL_POINTS
            if t == "" or p in ("embed", "final_norm")
        ]
        return [site for site in names + ends if self.lack(site) is None]

    def sizes(self, site: Site) -> dict[str, int]:
        """How long the site's axes are, less those that the input decides. A state space counts
        heads of its own."""
        dims, heads = self.dims[site.tower], self.dims[site.tower].heads
        if site.point == "ssm.delta":
            start, stop = self.locate(site)[1].columns or (0, 0)
            heads = stop - start
        return {
            "dim": dims.dim,
            "head": heads,
            "kv_head": dims.kv_heads,
            "head_dim": dims.head_dim,
            "neuron": dims.neurons,
            "channel": dims.channels,
        }

    def locate(self, site: Site) -> tuple[nn.Module, Point]:
        """The module whose input or output carries the site, and how."""
        tower = self.tower(site)
        if site.layer is not None:
            point = tower.points[site.point]
            if point.where == "sum":
                mixers = ("cross.out", "attn.out", "mix.out")
                write = next(tower.points[name] for name in mixers if name in tower.points)
                point = replace(point, path=write.path, scale=write.scale)
            return self.part(self.layer(site), point.path), point
        if site.point == "logits":
            return self.model, Point("", "output")
        path = self.family.projector if site.point == "projector" else getattr(tower, site.point)
        return self._global(path), Point(path, "output")

    def layer(self, site: Site) -> nn.Module:
        return self.layers[site.tower][int(site.layer)]

    def attention(self, site: Site) -> nn.Module:
        """The module that calls the attention interface in the site's layer, for its own positions;
        for another tower's where the site is one of `cross.`"""
        query = "cross.q" if site.point.startswith("cross.") else "attn.q"
        return self.part(self.layer(site), self.tower(site).points[query].path)

    def start(self, site: Site, point: Point) -> nn.Module:
        """The module whose input is the stream that a sum begins with."""
        layer = self.layer(site)
        return self.part(layer, point.start) if point.start else layer

    def tower(self, site: Site) -> Tower:
        """The table that holds in the site's layer: the tower's own, changed by what that layer
        holds."""
        return (
            self.family.towers[site.tower]
            if site.layer is None
            else self._towers[site.tower][int(site.layer)]
        )

    @property
    def packable(self) -> bool:
        """Whether rows of several runs can go through the main stack as one: only attention, by the
        seam, mixes them."""
        return all(
            "attn.q" in tower.points and "cross.out" not in tower.points and not tower.mixes
            for tower in self._towers[""]
        )

    @property
    def gated(self) -> bool:
        """Whether in some layer of the main stack z is not pattern @ v, but that times a gate or
        through a norm."""
        return any(tower.gated for tower in self._towers[""])

    def scale(self, site: Site, point: Point) -> Tensor | float | None:
        """What stands as a factor between the module of `locate` and the stream: a number or
        (dim,)."""
        return _value(self.layer(site), point.scale) if point.scale else None

    def writers(self, site: Site) -> list[nn.Module]:
        """The modules that turn z or the neurons into `attn.out`, `cross.out`, `mix.out` or
        `mlp.out`: a projection, then a post-norm or scale."""
        paths = self.write(site)
        if not paths:
            raise SiteError(
                f"`{site}` on {self.family.name} is not one projection of heads, neurons or "
                "channels."
            )
        layer = self.layer(site)
        writers = [_value(layer, path) for path in paths]
        return [
            LayerScale(own) if isinstance(own, (Tensor, float, int)) else self.part(layer, path)
            for path, own in zip(paths, writers)
        ]

    def write(self, site: Site) -> tuple[str, ...]:
        """The paths of `writers`, () where there are none."""
        tower = self.tower(site)
        return {
            "attn.out": tower.attn_write,
            "cross.out": tower.cross_write,
            "mix.out": tower.mix_write,
            "mlp.out": tower.mlp_write,
        }.get(site.point, ())

    def norms(self, site: Site) -> list[nn.Module]:
        """What the stream goes through after each of a post-norm layer's additions."""
        norms = [(path, _value(self.layer(site), path)) for path in self.tower(site).norms or ()]
        plain = {"": nn.Identity()}
        return [
            plain.get(path) or (LayerScale(x) if not isinstance(x, nn.Module) else x)
            for path, x in norms
        ]

    @property
    def final_norm(self) -> nn.Module | None:
        path = self.family.towers[""].final_norm
        return self._global(path) if path else None

    @property
    def head(self) -> list[nn.Module]:
        """The read-out's modules in order; empty when this model class has none, or none that takes
        single rows."""
        return self.family_head or (self.found_head.modules if self.found_head else [])

    @property
    def family_head(self) -> list[nn.Module]:
        """The read-out where the family names it, if this model class has it."""
        if not all(self._has(self.model, path) for path in self.family.head):
            return []
        modules = [self.part(self.model, path) for path in self.family.head]
        scale, added = self.family.logit_scale, None
        if self.family.logit_bias:
            added = _value(self.model, self.family.logit_bias)
        if scale == 1.0 and added is None:
            return modules
        return [*modules[:-1], Scaled(modules[-1], scale, added)]

    def config(self, tower: str = "") -> Any:
        """The config of one tower."""
        name = self.family.towers[tower].config
        whole: Any = self.model.config
        if name:
            return getattr(whole, name)
        return whole.get_text_config() if tower == "" and self.family.reads_text else whole

    def _as_in(self, layer: nn.Module, tower: Tower) -> Tower:
        for path, changes in tower.kinds.items():
            if self._has(layer, path):
                tower = tower.but(**changes)
        return tower

    def _global(self, path: str) -> nn.Module:
        """From the base model; from the whole model where its prefix names only the stack
        (DINOv3)."""
        whole = not self._has(self.base, path) and self._has(self.model, path)
        return self.part(self.model if whole else self.base, path)

    def part(self, start: nn.Module, path: str) -> nn.Module:
        """The module at a path of the family's. Raises FamilyError where there is none."""
        if not self._has(start, path):
            raise FamilyError(
                f"family `{self.family.name}` looks for `{path}` in {type(start).__name__}, which "
                "has none: "
                f"{type(self.model).__name__} is not laid out as this family says."
            )
        return start.get_submodule(path)

    @staticmethod
    def _has(start: nn.Module, path: str) -> bool:
        # some modules name a part that their config leaves out
        return _value(start, path) is not None


class LayerScale(nn.Module):
    """A layer's scale, which models hold as a number or a bare parameter, as the module that
    multiplies by it."""

    def __init__(self, scale: Tensor | float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _value(layer: nn.Module, path: str) -> Any:
    """What an attribute path inside a layer leads to, or None."""
    value: Any = layer
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return value


def _reads_out(model: nn.Module) -> bool:
    try:
        return model.get_output_embeddings() is not None
    except (AttributeError, NotImplementedError):  # encoders and vision models have no such notion
        return False
