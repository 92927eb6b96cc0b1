"""Stitching: one network's encoder with another one's decoder, which were not trained together.

    relative      decoder(cos(encoder(x), encoder(anchors)))       nothing is fitted
    absolute      decoder(encoder(x))
    affine, orthogonal      decoder(map(encoder(x)))       the map that the same anchors fit

Relative representations (Moschella et al., 2022) let a decoder read an encoder that it never saw;
decoder and encoder must have been trained with anchors. The maps are the reference: they are given
no more, and the nets need no anchors, but each pair needs its own map.

Reads as: whether two encoders say the same, up to a rotation and a scale (relative, orthogonal) or
any matrix (affine). Does not show that they say the same things well: see each net's own score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stratoscope.embeddings.relative_representations import agreement, relative
from stratoscope.errors import InputError

Map = Literal["affine", "orthogonal"]


def fitted(
    one: Float[Tensor, "example dim"], two: Float[Tensor, "same other"], how: Map = "affine"
) -> Callable[[Tensor], Tensor]:
    """The map that takes `one`'s vectors to `two`'s of the same examples, by least squares: a
    function of (example, dim).

    affine: any matrix and a shift; the smallest one where there are more dimensions than examples.
    orthogonal: a rotation or mirror, one scale and a shift (Procrustes). Raises InputError for
    spaces that have not the same examples, or fewer than two.
    """
    if len(one) != len(two) or len(one) < 2:
        raise InputError(
            f"a map from {len(one)} to {len(two)} examples: give the same ones, at least 2, twice."
        )
    here, there = one.mean(dim=0), two.mean(dim=0)
    x, y = (one - here).double(), (two - there).double()
    matrix = torch.linalg.pinv(x) @ y
    if how == "orthogonal":
        u, size, v = torch.linalg.svd(x.T @ y, full_matrices=False)
        matrix = u @ v * (size.sum() / (x * x).sum())
    turn = matrix.to(one.dtype)
    return lambda e: (e - here) @ turn + there


class Stitched(nn.Module):
    """decoder(relative(encoder(x), encoder(anchors))): trained as one net, or put together from two
    that were.

    Anchors are encoded anew with every batch, without a gradient, as in the authors' code. Without
    any the decoder reads the embedding itself: what stitching is compared with.
    """

    anchors: Tensor | None

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor],
        decoder: Callable[[Tensor], Tensor],
        anchors: Tensor | None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("anchors", anchors)

    def forward(self, x: Float[Tensor, "example ..."]) -> Float[Tensor, "example ..."]:
        e = self.encoder(x)
        if self.anchors is None:
            return self.decoder(e)
        with torch.no_grad():
            known = self.encoder(self.anchors)
        return self.decoder(relative(e, known))


@torch.no_grad()
def stitch(
    one: Stitched,
    two: Stitched,
    anchors: Float[Tensor, "anchor ..."] | None = None,
    how: Literal["relative", "absolute"] | Map = "relative",
) -> Stitched:
    """`one`'s encoder with `two`'s decoder, in evaluation mode; nothing is trained.

    relative: through cosines with the anchors. absolute: as they are. affine, orthogonal: through
    the map that `fitted` finds between both encoders' vectors of the anchors; the nets are then
    those that read no cosines. Raises InputError where anchors are needed and there are none.
    """
    if anchors is None and how != "absolute":
        raise InputError(f"stitching how={how!r} needs anchors: inputs that both encoders take.")
    encoder, decoder = one.eval().encoder, two.eval().decoder
    if anchors is None or how in ("relative", "absolute"):
        return Stitched(encoder, decoder, anchors if how == "relative" else None).eval()
    across = fitted(encoder(anchors), two.encoder(anchors), how)
    return Stitched(lambda x: across(encoder(x)), decoder, None).eval()


def crossed(
    anchored: tuple[Stitched, Stitched],
    plain: tuple[Stitched, Stitched],
    untrained: tuple[nn.Module, nn.Module],
    anchors: Float[Tensor, "anchor ..."],
    score: Callable[[nn.Module], float],
    *,
    orders: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """The score of two nets' decoders with each other's encoder in every way, the mean of both
    directions.

    anchored: two nets that were trained with these anchors; plain: two without; untrained: two
    encoders like theirs that have learned nothing. native, absolute_native: each net as it is.
    stitched: relative. shuffled: with the other net's anchors in other orders, the mean of so many.
    untrained: the decoder of a net with anchors, through them, with an encoder that knows nothing.
    absolute, affine, orthogonal: of the nets without anchors.
    """
    generator = torch.Generator().manual_seed(seed)
    mixed = [anchors[torch.randperm(len(anchors), generator=generator)] for _ in range(orders)]
    idle = [Stitched(encoder, nn.Identity(), anchors) for encoder in untrained]
    ways: dict[str, list[Stitched]] = {"native": [*anchored], "absolute_native": [*plain]}
    for one, two, fresh in ((0, 1, 0), (1, 0, 1)):
        ways.setdefault("stitched", []).append(stitch(anchored[one], anchored[two], anchors))
        ways.setdefault("shuffled", []).extend(
            stitch(anchored[one], anchored[two], each) for each in mixed
        )
        ways.setdefault("untrained", []).append(stitch(idle[fresh], anchored[two], anchors))
        for how in ("absolute", "affine", "orthogonal"):
            ways.setdefault(how, []).append(stitch(plain[one], plain[two], anchors, how))
    return {name: sum(map(score, nets)) / len(nets) for name, nets in ways.items()}


def found_again(
    one: Float[Tensor, "example dim"],
    two: Float[Tensor, "example other"],
    anchors: Int[Tensor, " anchor"],
    *,
    parallel: Int[Tensor, " anchor"] | None = None,
    how: Literal["relative", "absolute", "axes"] | Map = "relative",
) -> Float[Tensor, " example"]:
    """How well each example finds itself in the other of two spaces: 1 / its rank by cosine, the
    mean of both ways; NaN for anchors, which take no part.

    anchors: which examples are anchors; parallel: which are taken for them in the second space (the
    same, unless given: others are a null). relative, affine, orthogonal: as in `stitch`. absolute:
    as they are, the shorter one filled up with zeros; axes: each on its own principal axes.
    """
    given = anchors if parallel is None else parallel
    rest = torch.ones(len(one), dtype=torch.bool).index_fill(0, torch.cat([anchors, given]), False)
    if how == "relative":
        ways = [(relative(one, one[anchors]), relative(two, two[given]))]
    elif how in ("absolute", "axes"):
        ways = [_alike(_axes(one), _axes(two)) if how == "axes" else _alike(one, two)]
    else:
        forth = fitted(one[anchors], two[given], how)
        ways = [(forth(one), two), (one, fitted(two[given], one[anchors], how)(two))]
    a, b = ways[0][0][rest], ways[0][1][rest]
    c, d = ways[-1][0][rest], ways[-1][1][rest]
    mrr = (agreement(a, b, top=1)["mrr"] + agreement(d, c, top=1)["mrr"]) / 2
    ranks = torch.full((len(one),), torch.nan)
    ranks[rest] = mrr.cpu()
    return ranks


def _alike(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Both of the larger width, the shorter one filled up with zeros."""
    width = max(one.shape[1], two.shape[1])
    one, two = (nn.functional.pad(x, (0, width - x.shape[1])) for x in (one, two))
    return one, two


def _axes(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh.T
