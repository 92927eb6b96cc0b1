"""A site: the address of one tensor inside a transformer, written the same way for every
architecture.

    embed   layers.3.resid_pre   layers.3.attn.z   layers.*.mlp.act   final_norm   logits
    vision.layers.2.resid_post   encoder.layers.*.attn.pattern   projector

A name without a prefix is of the model's main stack, the one that is read out. Another stack goes
by the name that the family gives its tower; a main stack may have a name too (`decoder.`).

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
# q/k norm. Cross-attention reads another tower: the positions of `cross.k` and `cross.v`, and the
# keys of its scores and pattern, are that tower's. `ssm.` is a state space's: what its convolution
# reads, its gate, each head's step (before bias and softplus), and what its output projection
# takes. The order is that of computation: where two points pass through one module, the earlier is
# shown (and edited) first.
POINTS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("example", "position", "dim"),
    "attn.q": ("example", "position", "head", "head_dim"),
    "attn.k": ("example", "position", "kv_head", "head_dim"),
    "attn.v": ("example", "position", "kv_head", "head_dim"),
    "attn.scores": ("example", "head", "query", "key"),
    "attn.pattern": ("example", "head", "query", "key"),
    "attn.z": ("example", "position", "head", "head_dim"),
    "attn.out": ("example", "position", "dim"),
    "ssm.in": ("example", "position", "channel"),
    "ssm.gate": ("example", "position", "channel"),
    "ssm.delta": ("example", "position", "head"),
    "ssm.z": ("example", "position", "channel"),
    "mix.out": ("example", "position", "dim"),
    "cross.q": ("example", "position", "head", "head_dim"),
    "cross.k": ("example", "position", "kv_head", "head_dim"),
    "cross.v": ("example", "position", "kv_head", "head_dim"),
    "cross.scores": ("example", "head", "query", "key"),
    "cross.pattern": ("example", "head", "query", "key"),
    "cross.z": ("example", "position", "head", "head_dim"),
    "cross.out": ("example", "position", "dim"),
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
SEAM = ("q", "k", "v", "scores", "pattern")
SEAM_POINTS = frozenset(f"attn.{name}" for name in SEAM)
CROSS_SEAM_POINTS = frozenset(f"cross.{name}" for name in SEAM)

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
_STACK = ("layers", "blocks")  # what no tower is called
_TRANSFORMER_LENS_GLOBAL = {"hook_embed": "embed", "ln_final.hook_normalized": "final_norm"}


@dataclass(frozen=True, order=True)
class Site:
    """An address: which tower ("" is the main stack), which layer (None for a global point, "*" for
    all), which point."""

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
        return self.point in SEAM_POINTS | CROSS_SEAM_POINTS

    @property
    def source(self) -> str | None:
        """The axis that counts the positions of the tower which cross-attention reads, or None."""
        return {"k": "position", "v": "position", "scores": "key", "pattern": "key"}.get(
            self.point.removeprefix("cross.")
        )

    def at(self, layer: int) -> Site:
        """The same point in another layer."""
        return replace(self, layer=layer)

    def __str__(self) -> str:
        prefix = f"{self.tower}." if self.tower else ""
        return prefix + (self.point if self.layer is None else f"layers.{self.layer}.{self.point}")


def parse(text: str | Site) -> Site:
    """Read a site name, of a tower of any name: which there are is the model's to say (`expand`).

    Raises SiteError that shows the text and the nearest names.
    """
    if isinstance(text, Site):
        return text
    tower, dot, rest = text.partition(".")
    site = _read("", text)
    if site is None and dot and re.fullmatch(r"[A-Za-z]\w*", tower) and tower not in _STACK:
        site = _read(tower, rest)
    if site is None:
        raise SiteError(_unreadable(text))
    return site


def _read(tower: str, rest: str) -> Site | None:
    """The site that a name without a tower's prefix means, or None."""
    if rest in GLOBAL_POINTS:
        return Site(tower, None, rest)
    if rest in _TRANSFORMER_LENS_GLOBAL:
        return Site(
            tower,
            None,
            _TRANSFORMER_LENS_GLOBAL[rest],
            alias=rest if rest in SOMETIMES_ANOTHER else "",
        )
    match = re.fullmatch(r"(?:layers|blocks)\.(\*|-?\d+)\.(.+)", rest)
    if match is None:
        return None
    number, given = match.groups()
    point = _TRANSFORMER_LENS.get(given, given)
    if point not in POINTS:
        return None
    layer = "*" if number == "*" else int(number)
    return Site(tower, layer, point, alias=given if given in SOMETIMES_ANOTHER else "")


def expand(
    sites: str | Site | Iterable[str | Site], n_layers: dict[str, int], main: str = ""
) -> list[Site]:
    """Parse, resolve `*` and negative layers, and drop repetitions; `n_layers` gives each tower's
    depth, `main` the name that the main stack goes by beside none.

    Raises SiteError for a tower that the model lacks or a layer out of range.
    """
    listed = [sites] if isinstance(sites, (str, Site)) else list(sites)
    resolved: dict[Site, None] = {}
    for site in map(parse, listed):
        if main and site.tower == main:
            site = replace(site, tower="")
        if site.tower not in n_layers:
            raise SiteError(_no_tower(site, n_layers, main))
        depth = n_layers[site.tower]
        if site.layer is None:
            resolved[site] = None
        elif site.layer == "*":
            resolved.update({site.at(layer): None for layer in range(depth)})
        else:
            layer = int(site.layer)
            if not -depth <= layer < depth:
                raise SiteError(
                    f"site `{site}`: layer {layer} of {depth}; layers run from 0 to {depth - 1} "
                    f"(or -{depth} to -1)."
                )
            resolved[site.at(layer % depth)] = None
    return list(resolved)


def _no_tower(site: Site, n_layers: Iterable[str], main: str) -> str:
    also = f" (or `{main}.`)" if main else ""
    others = "".join(f", and `{name}.` for its {name} tower" for name in n_layers if name)
    return (
        f"site `{site}`: this model has no {site.tower or 'main'} tower of layers. Its sites begin "
        f"with no prefix{also} for the main stack{others}."
    )


def _unreadable(text: str) -> str:
    match = re.fullmatch(r"(?:\w+\.)?(?:layers|blocks)\.(?:\*|-?\d+)\.(.+)", text)
    if match is not None:
        close = difflib.get_close_matches(match.group(1), POINTS, n=3, cutoff=0.3)
        near = [f"layers.N.{p}" for p in close]
    else:
        near = difflib.get_close_matches(
            text, [*GLOBAL_POINTS, *(f"layers.N.{p}" for p in POINTS)], n=3, cutoff=0.3
        )
    hint = f" Did you mean {', '.join(f'`{n}`' for n in near)}?" if near else ""
    points = ", ".join(POINTS)
    return (
        f"`{text}` is not a site name.{hint} A site is one of {', '.join(GLOBAL_POINTS)}, or "
        f"`layers.N.POINT` with N a number or `*` and POINT one of {points}; a tower beside the "
        "main stack has its name before it, such as `vision.` or `encoder.`."
    )
