"""A site: the address of one tensor inside a transformer, written the same way for every
architecture.

    embed   layers.3.resid_pre   layers.3.attn.z   layers.*.mlp.act   final_norm   logits
    vision.layers.2.resid_post   projector

`POINTS` is the whole vocabulary. The axes named there are the axes of the tensor that `trace`
returns and that `intervene` edits, whatever layout the model itself uses. TransformerLens names are
accepted (`blocks.3.attn.hook_z`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from stratoscope.errors import SiteError

# point -> axes of its tensor. `q` and `z` have one slice per query head; `k` and `v` one per
# key/value head. q and k are the vectors whose product is the score: after rotary embedding and any
# q/k norm. The order is that of computation: where two points pass through one module, the earlier
# is shown (and edited) first.
POINTS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("example", "position", "dim"),
    "attn.q": ("example", "position", "head", "head_dim"),
    "attn.k": ("example", "position", "kv_head", "head_dim"),
    "attn.v": ("example", "position", "kv_head", "head_dim"),
    "attn.scores": ("example", "head", "query", "key"),
    "attn.pattern": ("example", "head", "query", "key"),
    "attn.z": ("example", "position", "head", "head_dim"),
    "attn.out": ("example", "position", "dim"),
    "mix.out": ("example", "position", "dim"),
    "resid_mid": ("example", "position", "dim"),
    "mlp.router": ("example", "position", "expert"),
    "mlp.pre": ("example", "position", "neuron"),
    "mlp.act": ("example", "position", "neuron"),
    "mlp.out": ("example", "position", "dim"),
    "resid_post": ("example", "position", "dim"),
}
GLOBAL_POINTS: dict[str, tuple[str, ...]] = {
    "embed": ("example", "position", "dim"),
    "final_norm": ("example", "position", "dim"),
    "logits": ("example", "position", "vocab"),
    "projector": ("example", "position", "dim"),
}
# The points whose value exists only inside the attention function: reading them switches the seam
# on.
SEAM_POINTS = frozenset({"attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern"})

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "attn.hook_q": "attn.q", "attn.hook_k": "attn.k", "attn.hook_v": "attn.v",
    "attn.hook_z": "attn.z", "attn.hook_attn_scores": "attn.scores",
    "attn.hook_pattern": "attn.pattern", "hook_attn_out": "attn.out", "attn.hook_rot_q": "attn.q",
    "attn.hook_rot_k": "attn.k", "mlp.hook_pre": "mlp.pre", "mlp.hook_post": "mlp.act",
    "hook_mlp_out": "mlp.out",
}  # fmt: skip
# names whose tensor TransformerLens takes before a step that our site comes after
SOMETIMES_ANOTHER = frozenset({"attn.hook_q", "attn.hook_k", "ln_final.hook_normalized"})
_TRANSFORMER_LENS_GLOBAL = {"hook_embed": "embed", "ln_final.hook_normalized": "final_norm"}


@dataclass(frozen=True, order=True)
class Site:
    """An address: which tower ("" or "vision"), which layer (None for a global point, "*" for all),
    which point."""

    tower: str
    layer: int | str | None
    point: str
    # the TransformerLens name it was asked by, where that is another tensor on some models (see
    # `Layout.resolve`)
    alias: str = field(default="", compare=False, repr=False)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis words of the tensor at this site."""
        return (GLOBAL_POINTS if self.layer is None else POINTS)[self.point]

    @property
    def seam(self) -> bool:
        """Whether the value exists only inside the attention function."""
        return self.point in SEAM_POINTS

    def at(self, layer: int) -> Site:
        """The same point in another layer."""
        return replace(self, layer=layer)

    def __str__(self) -> str:
        prefix = f"{self.tower}." if self.tower else ""
        return prefix + (self.point if self.layer is None else f"layers.{self.layer}.{self.point}")


def parse(text: str | Site) -> Site:
    """Read a site name. Raises SiteError that shows the text and the nearest names."""
    if isinstance(text, Site):
        return text
    tower, rest = ("vision", text[len("vision.") :]) if text.startswith("vision.") else ("", text)
    if rest in GLOBAL_POINTS:
        return Site(tower, None, rest)
    if rest in _TRANSFORMER_LENS_GLOBAL:
        return Site(
            tower,
            None,
            _TRANSFORMER_LENS_GLOBAL[rest],
            alias=rest if rest in SOMETIMES_ANOTHER else "",
        )
    match = re.fullmatch(r"(layers|blocks)\.(\*|-?\d+)\.(.+)", rest)
    if match:
        _, number, given = match.groups()
        point = _TRANSFORMER_LENS.get(given, given)
        if point in POINTS:
            layer = "*" if number == "*" else int(number)
            return Site(tower, layer, point, alias=given if given in SOMETIMES_ANOTHER else "")
    raise SiteError(_unreadable(text, match.group(3) if match else None))


def expand(sites: str | Site | Iterable[str | Site], n_layers: dict[str, int]) -> list[Site]:
    """Parse, resolve `*` and negative layers, and drop repetitions; `n_layers` gives each tower's
    depth.

    Raises SiteError for a tower that the model lacks or a layer out of range.
    """
    listed = [sites] if isinstance(sites, (str, Site)) else list(sites)
    found: dict[Site, None] = {}
    for site in map(parse, listed):
        if site.tower not in n_layers:
            raise SiteError(
                f"site `{site}`: this model has no {site.tower or 'main'} tower of layers."
            )
        depth = n_layers[site.tower]
        if site.layer is None:
            found[site] = None
        elif site.layer == "*":
            found.update({site.at(layer): None for layer in range(depth)})
        else:
            layer = int(site.layer)
            if not -depth <= layer < depth:
                raise SiteError(
                    f"site `{site}`: layer {layer} of {depth}; layers run from 0 to {depth - 1} "
                    f"(or -{depth} to -1)."
                )
            found[site.at(layer % depth)] = None
    return list(found)


def _unreadable(text: str, point: str | None) -> str:
    if point is not None:
        near = [f"layers.N.{p}" for p in difflib.get_close_matches(point, POINTS, n=3, cutoff=0.3)]
    else:
        near = difflib.get_close_matches(
            text, [*GLOBAL_POINTS, *(f"layers.N.{p}" for p in POINTS)], n=3, cutoff=0.3
        )
    hint = f" Did you mean {', '.join(f'`{n}`' for n in near)}?" if near else ""
    points = ", ".join(POINTS)
    return (
        f"`{text}` is not a site name.{hint} A site is one of {', '.join(GLOBAL_POINTS)}, or "
        "`layers.N.POINT` with N a "
        f"number or `*` and POINT one of {points}; prefix `vision.` for a vision tower."
    )
