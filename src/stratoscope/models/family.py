"""A family: the table from sites to the modules of one architecture, and nothing else.

Families are data. A `Tower` says, for one stack of layers, at which module each point can be read;
a `Family` joins one or more towers with the read-out. `families/` holds one default table and short
exceptions; `prove.py` proves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stratoscope.models.sites import SEAM


@dataclass(frozen=True)
class Point:
    """Where a point's value passes: the input or output of a module (path inside the layer, "" is
    the layer itself).

    `part=(i, n)`: the value is chunk i of n equal chunks of the last axis (fused projections);
    `columns=(start, stop)`: it is these columns of it, where the chunks are not equal (Mamba-2).
    `where="seam"`: it exists only inside the attention function that the module at `path` calls.
    `where="sum"`: it is the stream and what the layer's last mixing adds (attn.out, mix.out or
    cross.out), a value that no module receives alone; that stream is what enters the layer, or the
    module at `start`.
    `scale`: an attribute of the layer (a number or a parameter; a path inside the layer) that
    multiplies the module's output before it is added: layer scale, Granite's residual multiplier.
    """

    path: str
    where: Literal["input", "output", "seam", "sum"]
    part: tuple[int, int] | None = None
    scale: str | None = None
    start: str = ""
    columns: tuple[int, int] | None = None

    def within(self, width: int) -> tuple[int, int] | None:
        """The columns of a last axis of this width that are the value, None where all are."""
        if self.part is None:
            return self.columns
        number, count = self.part
        size = -(-width // count)  # as torch.chunk cuts
        return number * size, min(width, (number + 1) * size)


def into(path: str) -> Point:
    return Point(path, "input")


def out_of(path: str, part: tuple[int, int] | None = None, scale: str | None = None) -> Point:
    return Point(path, "output", part, scale)


def attention_points(attention: str, o_proj: str, kind: str = "attn") -> dict[str, Point]:
    """The points of an attention module that goes through the seam; z is read where the output
    projection takes it. kind: "cross" where its keys are another tower's positions."""
    inside = {f"{kind}.{name}": Point(attention, "seam") for name in SEAM}
    return inside | {f"{kind}.z": into(o_proj)}


RESIDUAL_POINTS = {"resid_pre": into(""), "resid_mid": Point("", "sum"), "resid_post": out_of("")}


@dataclass(frozen=True)
class Tower:
    """One stack of layers. Paths of `layers`, `embed` and `final_norm` start at the base model,
    those of points and writes at a layer.

    `takes`: the forward argument that holds its sequence: ids where its name ends in `_ids`
    (input_ids, item_ids, residue_ids), pictures where it is pixel_values, else a series of numbers.
    `mask`: the argument that is 1 where the sequence is real, "" where there is none.

    Of a series, `lengths` is the model's method that tells how many positions come of so many steps
    ("" where all are real), `alone` says that series of unequal length are not padded, and `rows`
    is the config key of how many rows each example becomes.

    `attn_write`, `cross_write`, `mlp_write`, `mix_write`: the modules, in order, that turn z (heads
    joined), the neurons and ssm.z into attn.out, cross.out, mlp.out and mix.out: the projection,
    then a post-norm or a scale (a module, a parameter or a number) where there is one. Empty when
    it is not such a product (experts).

    `kinds`: where layers of one stack differ, what `but` changes in every layer that holds the
    module at a path: {"mlp.experts": {...}, "mamba": {...}}. A layer may hold several; they are
    made in order.
    """

    layers: str
    points: Mapping[str, Point]
    attn_write: tuple[str, ...]
    mlp_write: tuple[str, ...]
    embed: str | None = None
    final_norm: str | None = None
    config: str = ""
    takes: str = "input_ids"
    mask: str = "attention_mask"
    lengths: str = ""
    alone: bool = False
    rows: str = ""
    # "sequential": mid = pre + attn (+ cross), post = mid + mlp. "parallel": post = pre + attn +
    # mlp. "post-norm": mid = norm(pre + attn), post = norm(mid + mlp), as in BERT; then `norms`
    # names one for each addition. A norm may be a number of the layer's (Gemma 4's layer_scalar) or
    # "" for none: either way the stream is no sum of writes.
    residual: Literal["sequential", "parallel", "post-norm"] = "sequential"
    norms: tuple[str, ...] | None = None
    cross_write: tuple[str, ...] = ()
    mix_write: tuple[str, ...] = ()
    causal: bool = True
    # Whether positions hear of one another also beside the attention function (a state space, a
    # convolution, a mask made from the values): then rows of several runs cannot be packed, and
    # `sweep` runs its cells one by one.
    mixes: bool = False
    # Whether a gate or a norm of each head stands between pattern @ v and z (Qwen 3.5's output
    # gate).
    gated: bool = False
    activation: str | None = (
        None  # the MLP's activation, where it does not shut far below zero (xIELU)
    )
    # what the model adds to the stream between two layers when a picture is given, so that
    # resid_post of one layer is not resid_pre of the next (DeepStack)
    between: str | None = None
    flat: bool = (
        False  # the stack carries (position, dim) with no example axis: all images in one row
    )
    lacks: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def but(self, **changes) -> Tower:
        """A copy with some fields changed; `points` are merged, and a point in `lacks` is removed
        from the table."""
        added, lacking = changes.pop("points", {}), changes.pop("lacks", {})
        lacks = {**{name: why for name, why in self.lacks.items() if name not in added}, **lacking}
        points = {**self.points, **added}
        points = {name: point for name, point in points.items() if name not in lacks}
        return replace(self, points=points, lacks=lacks, **changes)


def under(prefix: str, tower: Tower, config: str = "") -> Tower:
    """The same tower inside a larger model: every path from the base model gets the prefix."""
    paths = {
        name: f"{prefix}.{getattr(tower, name)}"
        for name in ("layers", "embed", "final_norm")
        if getattr(tower, name)
    }
    return tower.but(config=config, **paths)


@dataclass(frozen=True)
class Family:
    """An architecture: its towers, its read-out and its config keys.

    `towers`: "" is the main stack, the one that is read out; others have any name ("vision",
    "encoder"), which their sites begin with. `main`: a name that the main stack goes by beside none
    ("decoder"). `source`: the tower that its cross-attention reads.

    `head`: modules applied in turn to the normalised last residual to give logits; paths start at
    the whole model. `logit_scale`: what the model multiplies the last of these modules' output by.
    `logit_bias`: a tensor of the model's, where it has it, that is added to that (BART).
    `handles`: config keys, beyond the common ones, that the tables above take account of.
    `per_token`: model inputs that its own processor gives for every token of a prompt, and their
    value (the prefix that PaliGemma reads in both directions). `pooled`: position that the head
    reads (ViT's class token); None when it reads every position.
    """

    name: str
    towers: Mapping[str, Tower]
    head: tuple[str, ...] = ("lm_head",)
    logit_scale: float = 1.0
    logit_bias: str = ""
    projector: str | None = None
    handles: frozenset[str] = frozenset()
    per_token: Mapping[str, int] = field(default_factory=dict)
    pooled: int | None = None
    reserved_positions: int = 0  # RoBERTa numbers positions from its padding id + 1
    main: str = ""
    source: str = ""

    @property
    def reads_text(self) -> bool:
        """Whether the main stack reads tokens, not pictures or other signals."""
        return self.towers[""].takes == "input_ids"

    @property
    def reads_ids(self) -> bool:
        """Whether the main stack reads ids, of tokens or of anything else."""
        return self.towers[""].takes.endswith("_ids")

    def takes_signal(self, tower: str = "") -> bool:
        """Whether a tower reads series of numbers, not ids or pictures."""
        takes = self.towers[tower].takes
        return takes != "pixel_values" and not takes.endswith("_ids")

    @property
    def names(self) -> dict[str, str]:
        """The main stack's own names of what a Batch calls input_ids and attention_mask."""
        main = self.towers[""]
        ids = {main.takes: "input_ids"} if self.reads_ids else {}
        return ids | ({main.mask: "attention_mask"} if main.mask else {})
