"""A sparse dictionary: what stands at one site, written as a few features out of many.

    z = act((x - b_dec) W_enc + b_enc)          features, mostly 0
    y = z W_dec + b                             b = b_dec_out, or b_dec where there is none

An autoencoder writes y where it read x; a transcoder reads one site and writes another (an MLP's
neurons, say, and its output). What act is says `kind`:

    relu        max(0, pre)
    topk        the k largest of max(0, pre), the rest 0
    jumprelu    max(0, pre) where pre > threshold
    batchtopk   the same: its k largest of a whole batch become, after training, one threshold
    gated       max(0, exp(r_mag) (x - b_dec) W_enc + b_mag) where pre > 0

    dictionary = Dictionary.load("folder")      # SAELens's own format, and `save` writes it
    z = dictionary.encode(x)                    # (..., dim) -> (..., feature)
    y = dictionary(x)                           # decode(encode(x), x)

At a site with heads, the heads lie side by side: a token is one vector (`flat`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine import saelens
from stratoscope.engine.places import MLPInput, Place, place
from stratoscope.errors import InputError, LoadError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.store import tensors as files

Kind = Literal["relu", "topk", "batchtopk", "jumprelu", "gated"]
# what each kind must have beside its four matrices and biases
NEEDS: dict[str, tuple[str, ...]] = {
    "relu": (),
    "topk": ("k",),
    "batchtopk": ("threshold",),
    "jumprelu": ("threshold",),
    "gated": ("b_mag", "r_mag"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Dictionary:
    """Weights, the kind of activation, and the sites that are read and written.

    site_out: "" where the dictionary writes what it reads. k: of topk. threshold: of jumprelu and
    batchtopk, one for each feature or one number. rescale: whether features compete (and are given)
    by what they write, pre times the norm of their row of W_dec. normalise: what is done to each
    vector before, and undone after if it is written where it was read: `layer_norm` (its mean
    taken away, divided by its deviation + 1e-5) or `constant_norm_rescale` (to norm sqrt(dim)).
    W_skip: (out, dim) of a transcoder, adds W_skip x. about: what a folder said beside, JSON.
    Raises InputError where the parts do not fit together.
    """

    W_enc: Float[Tensor, "dim feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature out"]
    b_dec: Float[Tensor, " dim"]
    b_dec_out: Float[Tensor, " out"] | None = None
    kind: Kind = "relu"
    site_in: str
    site_out: str = ""
    k: int | None = None
    threshold: Tensor | None = None
    b_mag: Float[Tensor, " feature"] | None = None
    r_mag: Float[Tensor, " feature"] | None = None
    W_skip: Float[Tensor, "out dim"] | None = None
    rescale: bool = False
    normalise: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in NEEDS:
            raise InputError(f"kind {self.kind!r}: a dictionary is one of {', '.join(NEEDS)}.")
        if not self.site_out:
            object.__setattr__(self, "site_out", self.site_in)
        if missing := [name for name in NEEDS[self.kind] if getattr(self, name) is None]:
            raise InputError(f"a {self.kind} dictionary needs `{missing[0]}`, and has none.")
        if self.threshold is not None:
            object.__setattr__(self, "threshold", self.threshold.to(self.b_enc) + 0 * self.b_enc)
        (dim, feature), out = self.W_enc.shape, self.W_dec.shape[-1]
        if self.k is not None and not 1 <= self.k <= feature:
            raise InputError(f"k={self.k}: this dictionary has {feature} features; keep 1 or more.")
        b_dec = (dim,) if self.b_dec_out is not None else (out,)
        shapes = {
            "W_dec": (feature, out), "b_enc": (feature,), "b_dec": b_dec, "b_dec_out": (out,),
            "threshold": (feature,), "b_mag": (feature,), "r_mag": (feature,), "W_skip": (out, dim),
        }  # fmt: skip
        for name, shape in shapes.items():
            there = getattr(self, name)
            if there is not None and tuple(there.shape) != shape:
                raise InputError(
                    f"`{name}` is {tuple(there.shape)}; with W_enc {dim, feature} and W_dec "
                    f"{tuple(self.W_dec.shape)} it must be {shape}."
                )
        if self.b_dec_out is None and dim != out:
            raise InputError(
                f"this dictionary reads {dim} numbers a token and writes {out}: give `b_dec_out`, "
                "the bias of what is written; `b_dec` is taken from what is read."
            )

    @property
    def features(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows feature"]:
        """The features of each vector, in the dictionary's own dtype."""
        x = self._scaled(x.to(self.W_enc.dtype))[0] - self.b_dec
        pre = x @ self.W_enc + self.b_enc
        if self.rescale:
            pre = pre * self.W_dec.norm(dim=-1)
        if self.r_mag is not None and self.b_mag is not None:
            size = x @ (self.W_enc * self.r_mag.exp()) + self.b_mag
            return size.relu() * (pre > 0)
        if self.kind == "topk":
            most = pre.topk(int(self.k or 0), dim=-1)
            return torch.zeros_like(pre).scatter(-1, most.indices, most.values.relu())
        return pre.relu() if self.threshold is None else pre.relu() * (pre > self.threshold)

    def decode(
        self,
        features: Float[Tensor, "*rows feature"],
        x: Float[Tensor, "*rows dim"] | None = None,
    ) -> Float[Tensor, "*rows out"]:
        """What the features write, biases included.

        x: what they were read from; a dictionary that normalises, or has a skip, needs it. Raises
        InputError where it is missing.
        """
        bias = self.b_dec if self.b_dec_out is None else self.b_dec_out
        written = self._rows(features) @ self.W_dec + bias
        if (self._undone or self.W_skip is not None) and x is None:
            raise InputError(
                "this dictionary normalises what it reads, or has a skip: decode(features, x) "
                "needs the x that the features were read from."
            )
        if x is None:
            return written
        x = x.to(self.W_enc.dtype)
        if self._undone:
            _, unit, mean = self._scaled(x)
            written = written * unit + mean
        return written if self.W_skip is None else written + x @ self.W_skip.T

    def __call__(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows out"]:
        return self.decode(self.encode(x), x)

    def moved(
        self, change: Float[Tensor, "*rows feature"], x: Float[Tensor, "*rows dim"]
    ) -> Float[Tensor, "*rows out"]:
        """decode(z + change, x) - decode(z, x), exactly 0 where nothing changes."""
        written = self._rows(change) @ self.W_dec
        return written * self._scaled(x.to(self.W_enc.dtype))[1] if self._undone else written

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        """The same dictionary there; itself where it is there already."""
        tensors, rest = self.parts()
        moved = {name: x.to(device=device, dtype=dtype) for name, x in tensors.items()}
        if all(moved[name] is x for name, x in tensors.items()):
            return self
        return type(self)(**moved, **rest)

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name, and all that JSON can hold: `Dictionary(**tensors, **rest)`."""
        held = {one.name: getattr(self, one.name) for one in fields_of(self)}
        tensors = {name: x for name, x in held.items() if isinstance(x, Tensor)}
        names = {"W_enc", "b_dec_out", "threshold", "b_mag", "r_mag", "W_skip"} | tensors.keys()
        return tensors, {name: x for name, x in held.items() if name not in names}

    def save(self, folder: str | Path) -> Path:
        """Write SAELens's folder, made if absent: `cfg.json` and `sae_weights.safetensors`.

        What that format has no word for is folded into the encoder (a `b_dec` beside `b_dec_out`;
        `rescale` of what is no topk). Raises LoadError when it cannot be written.
        """
        config, tensors = saelens.folder({f.name: getattr(self, f.name) for f in fields_of(self)})
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.write(folder / saelens.WEIGHTS, tensors, kind="dictionary")
            part = folder / f".{saelens.CONFIG}"
            part.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            os.replace(part, folder / saelens.CONFIG)
        except OSError as error:
            raise LoadError(
                f"The dictionary could not be written to {folder}: {error}. Make room, or give "
                "another folder."
            ) from error
        return folder

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        site_in: str | None = None,
        site_out: str | None = None,
        scale: float | None = None,
        device: str | torch.device = "cpu",
    ) -> Dictionary:
        """A folder of SAELens's format, by whomever it was written.

        site_in, site_out: where the folder does not say, or says it by a name that is none here.
        scale: what activations were multiplied by in training, asked for by name where it is
        needed. Raises LoadError for a folder that is none, is damaged, or says something that
        changes the numbers and is not known here.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / saelens.CONFIG).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise LoadError(
                f"A dictionary was to be loaded from {folder}, whose {saelens.CONFIG} cannot be "
                f"read ({error}). Give a folder that SAELens or `Dictionary.save` wrote."
            ) from error
        tensors, _ = files.read(folder / saelens.WEIGHTS, kind=None, device=device)
        made = saelens.fields(config, tensors, where=str(folder), scale=scale)
        made |= {"site_in": site_in or made["site_in"], "site_out": site_out or made["site_out"]}
        if not made["site_in"]:
            raise LoadError(f"{folder} does not say which site it is of: give `site_in=`.")
        return cls(**made)

    def sites(self, lm: LM) -> tuple[Place, Site]:
        """The place that is read and the site that is written, on this model.

        Raises SiteError for a site that it lacks, or that is no vector at a token, and for an
        MLP's input (`engine.places`) as what is written; InputError, with both numbers, where a
        token has another width there.
        """
        found: list[Any] = []
        for site, width in ((self.site_in, len(self.W_enc)), (self.site_out, self.W_dec.shape[1])):
            at = place(lm, site) if not found else lm.layout.resolve_one(site)
            there = width_at(lm, at)
            if there != width:
                raise InputError(
                    f"this dictionary is of {width} numbers a token at `{site}`, and this model "
                    f"has {there} there: give the model that it was trained on, or another site."
                )
            found.append(at)
        return found[0], found[1]

    @property
    def _undone(self) -> bool:
        return self.normalise != "none" and self.site_in == self.site_out

    def _rows(self, features: Tensor) -> Tensor:
        return features / self.W_dec.norm(dim=-1) if self.rescale else features

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is read of x, and by what and about what it was scaled."""
        one, zero = x.new_ones(()), x.new_zeros(())
        if self.normalise == "none":
            return x, one, zero
        if self.normalise == "constant_norm_rescale":
            unit = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return x / unit, unit, zero
        mean = x.mean(dim=-1, keepdim=True)
        deviation = (x - mean).std(dim=-1, keepdim=True)
        return (x - mean) / (deviation + 1e-5), deviation, mean


def width_at(lm: LM, site: Place) -> int:
    """How many numbers a token has at a site, its heads side by side. Raises SiteError for a site
    whose values belong to no one token."""
    if isinstance(site, MLPInput):
        return lm.layout.sizes(site.pre)["dim"]
    if site.axes[:2] != ("example", "position"):
        raise SiteError(
            f"`{site}` has the axes {', '.join(site.axes)}: a dictionary is of a site with one "
            "vector at each token."
        )
    sizes = lm.layout.sizes(site) | {"vocab": lm.dims.vocab}
    return torch.Size(sizes[axis] for axis in site.axes[2:]).numel()


def flat(x: Float[Tensor, "example position ..."]) -> Float[Tensor, "example position dim"]:
    """A site's tensor as one vector a token."""
    return x.flatten(2)
