"""Relative representations: an embedding told by its cosines with a few anchors, so that two spaces
can be compared.

Paper: relative-representations

    r[example, anchor] = cos(e[example], e[anchor])

e is any encoder; the same anchors (the same texts, pictures or words) are encoded by each. r does
not change when a space is rotated, mirrored or scaled, and so what was learned on one encoder's r
works on another's (`embeddings/stitching.py`). The paper draws anchors uniformly at random and does
not centre e; `choose` also has its other selectors (farthest point, k-means, the first, which are
the most frequent where a vocabulary is sorted so).

Reads as: how an input lies to others that are known, whatever basis the encoder happened to learn.
Does not show that two spaces agree: a shear, or features that only one has, changes r; `agreement`
says how far they do. Where all embeddings point one way (language models), all cosines are near 1
and differences are small.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

Pooling = Literal["mean", "first", "last"]
Selector = Literal["uniform", "farthest", "kmeans", "first"]


def relative(
    x: Float[Tensor, "example dim"], anchors: Float[Tensor, "anchor dim"]
) -> Float[Tensor, "example anchor"]:
    """Cosine of each example with each anchor; 0 where either is the zero vector."""
    return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(anchors, dim=-1).T


def choose(
    x: Float[Tensor, "example dim"], count: int, *, how: Selector = "uniform", seed: int = 0
) -> Int[Tensor, " anchor"]:
    """Which examples to take as anchors. Raises InputError when there are fewer than `count` of
    them.

    uniform: at random. farthest: each the one least like all before it, by cosine, from a random
    first one. kmeans: the one nearest to each centre of the directions. first: the first `count`.
    """
    if not 1 <= count <= len(x):
        raise InputError(f"{count} anchors of {len(x)} examples: choose 1 to {len(x)}.")
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    if how == "uniform":
        return drawn
    if how == "first":
        return torch.arange(count)
    if how == "farthest":
        return _farthest(x, count, int(drawn[0]))
    if how == "kmeans":
        return _central(x, count, seed)
    raise InputError(f"how={how!r}: choose uniform, farthest, kmeans or first.")


def _farthest(x: Tensor, count: int, start: int) -> Tensor:
    chosen, nearest = [start], torch.full((len(x),), -torch.inf)
    while len(chosen) < count:
        nearest = torch.maximum(nearest, relative(x, x[chosen[-1:]])[:, 0].cpu())
        nearest[chosen] = torch.inf  # not again, also among duplicates
        chosen.append(int(nearest.argmin()))
    return torch.tensor(chosen)


def _central(x: Tensor, count: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    centres = KMeans(count, n_init=1, random_state=seed).fit(
        nn.functional.normalize(x, dim=-1).cpu().numpy()
    )
    near, chosen = relative(torch.as_tensor(centres.cluster_centers_).to(x), x), []
    for row in near:  # one by one, so that no example is an anchor twice
        row[chosen] = -torch.inf
        chosen.append(int(row.argmax()))
    return torch.tensor(chosen)


def agreement(
    one: Float[Tensor, "example dim"], two: Float[Tensor, "example dim"], *, top: int = 10
) -> dict[str, Float[Tensor, " example"]]:
    """How far two spaces of equal dimension say the same of the same examples; three numbers for
    each example.

    mrr: 1 / rank of the example itself when `one`'s vector is looked up among all of `two`, by
    cosine (chance: about ln n / n). jaccard: of the `top` nearest by that look-up and the `top`
    nearest within `one`. cosine: of the two vectors.
    """
    if one.shape != two.shape or not 1 <= top <= len(one):
        raise InputError(
            f"two spaces of shapes {tuple(one.shape)} and {tuple(two.shape)}, top={top}: must fit."
        )
    by_name: dict[str, list[Tensor]] = {"mrr": [], "jaccard": [], "cosine": []}
    for rows in torch.arange(len(one)).split(512):
        across, within = relative(one[rows], two), relative(one[rows], one)
        own = across.gather(1, rows[:, None].to(across.device))
        shared = _members(across, top) & _members(within, top)
        by_name["mrr"].append(1 / (1 + (across > own).sum(dim=1)))
        by_name["jaccard"].append(shared.sum(dim=1) / (2 * top - shared.sum(dim=1)))
        by_name["cosine"].append(own[:, 0])
    return {name: torch.cat(parts) for name, parts in by_name.items()}


def _members(similarity: Tensor, top: int) -> Tensor:
    return torch.zeros_like(similarity, dtype=torch.bool).scatter(
        1, similarity.topk(top).indices, True
    )


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    anchors: Any,
    site: str = "layers.-1.resid_post",
    pooling: Pooling = "mean",
) -> xr.Dataset:
    """The relative representation of each input: (example, dim), where `dim` counts anchors
    (`anchor_text` names them).

    anchors: prompts, as `inputs` are. site: one with axes example, position, dim. pooling: the mean
    over real tokens (what sentence encoders such as MiniLM do), or the first or last token's
    vector. Raises InputError or SiteError.
    """
    near = relative(
        embed(lm, inputs, site=site, pooling=pooling),
        embed(lm, anchors, site=site, pooling=pooling),
    )
    texts = {
        "example_text": (("example",), _texts(lm, inputs)),
        "anchor_text": (("dim",), _texts(lm, anchors)),
    }
    return dataset(
        {"relative": (("example", "dim"), near)},
        method="embeddings.relative_representations",
        provenance=lm.provenance,
        settings={"site": site, "pooling": pooling},
        coords=texts,
        site=site,
    )


@torch.no_grad()
def embed(
    lm: LM, inputs: Any, *, site: str = "layers.-1.resid_post", pooling: Pooling = "mean"
) -> Float[Tensor, "example dim"]:
    """One vector of an LM for each input; padding takes no part. Raises InputError for an unknown
    pooling."""
    at, batch = lm.layout.resolve_one(site), lm.batch(inputs)
    if at.axes != ("example", "position", "dim"):
        raise InputError(
            f"`{at}` has axes {', '.join(at.axes)}; an embedding needs example, position, dim."
        )
    if pooling in ("first", "last"):
        return capture(lm, batch, at, positions=0 if pooling == "first" else -1)[at].float()
    if pooling != "mean":
        raise InputError(f"pooling={pooling!r}: choose mean, first or last.")
    x = capture(lm, batch, at)[at].float()
    real = torch.ones(x.shape[:2], device=x.device) if batch.mask is None else batch.mask.to(x)
    return (x * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)


def _texts(lm: LM, inputs: Any) -> list[str]:
    batch = lm.batch(inputs)
    return list(batch.texts) or [str(number) for number in range(len(batch))]
