"""Stitching works through anchors across a rotation, through a fitted map across a shear; the maps
are numpy's and scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor, nn

from stratoscope.embeddings import relative_representations as rr
from stratoscope.embeddings import stitching as st
from stratoscope.errors import InputError
from support.subjects import close


def space(count: int = 200, dim: int = 6) -> Tensor:
    return (
        torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        + 0.5
    )


def rotation(dim: int, seed: int = 1) -> Tensor:
    x = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(x).Q


def test_stitching_across_a_rotation() -> None:
    """An encoder in another basis gives the decoder the same numbers through anchors, and others
    without."""
    x, turn = space().float(), rotation(6).float()
    encoders = [nn.Identity(), lambda e: 3 * e @ turn]
    heads = [nn.Linear(20, 4), nn.Linear(6, 4)]
    for head, anchors in zip(heads, (x[:20], None)):
        native, stitched = (st.Stitched(encoder, head, anchors)(x) for encoder in encoders)
        assert ((native - stitched).abs().max() < 1e-5) == (anchors is not None)
    net = st.Stitched(nn.Linear(6, 3), nn.Linear(20, 4), x[:20])
    net(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert len(list(net.parameters())) == 4  # anchors are no weight


def test_fitted_maps_find_what_was_done_and_no_more() -> None:
    """Closed forms: an affine map from examples enough is found, an orthogonal one only if it is
    one; numpy's least squares and scipy's Procrustes say the same."""
    x, noise = space(60), 0.1 * space(60, 4).roll(7, 0)
    sheared = x @ space(6, 4) + 2.0
    turned = 3 * x @ rotation(6) - 1.0
    unseen = space(9) + 1
    close(st.fitted(x, sheared)(unseen), unseen @ space(6, 4) + 2.0, 1e-9)
    close(st.fitted(x, turned, "orthogonal")(unseen), 3 * unseen @ rotation(6) - 1.0, 1e-9)
    assert (st.fitted(x, x * torch.arange(1.0, 7), "orthogonal")(x) / x).std() > 0.1
    ones = np.c_[x.numpy(), np.ones(60)]
    expected = np.linalg.lstsq(ones, (sheared + noise).numpy(), rcond=None)[0]
    found = st.fitted(x, sheared + noise)(unseen)
    close(found, np.c_[unseen.numpy(), np.ones(9)] @ expected, 1e-9)
    other = turned + 0.3 * space(60).roll(5, 0)
    a, b = (each - each.mean(0) for each in (x, other))
    matrix, size = orthogonal_procrustes(a.numpy(), b.numpy())
    expected = a.numpy() @ matrix * size / (a**2).sum().item() + other.mean(0).numpy()
    close(st.fitted(x, other, "orthogonal")(x), expected, 1e-9)
    # fewer examples than dimensions: the examples themselves are met
    few = st.fitted(x[:4], sheared[:4])
    close(few(x[:4]), sheared[:4], 1e-9)
    for few in (3, 1):
        with pytest.raises(InputError, match="same ones"):
            st.fitted(x[:few], x[:1])


def test_stitch() -> None:
    """Across a shear only an affine map helps; across a rotation anchors and both maps do."""
    x, turn = space().float(), rotation(6).float()
    shear = (torch.eye(6) + torch.ones(6, 6).triu(1)).float()
    for matrix, good in ((turn, {"relative", "affine", "orthogonal"}), (shear, {"affine"})):
        for how in ("relative", "absolute", "affine", "orthogonal"):
            anchors = x[:20] if how == "relative" else None
            decoder = nn.Linear(20 if how == "relative" else 6, 4)
            home = st.Stitched(nn.Identity(), decoder, anchors)
            away = st.Stitched(lambda e, m=matrix: e @ m, decoder, anchors)
            found = st.stitch(away, home, x[:20], how)(x)
            assert ((found - home(x)).abs().max() < 1e-4) == (how in good), how
    with pytest.raises(InputError, match="needs anchors"):
        st.stitch(away, home, how="affine")


def test_anchors_carry_no_gradient() -> None:
    """As in the authors' code: the gradient is that of plain cosines with fixed vectors."""
    encoder, x, anchors = nn.Linear(6, 3), space(5).float(), space(9).float()
    st.Stitched(encoder, nn.Identity(), anchors)(x).sum().backward()
    assert encoder.weight.grad is not None
    found, fixed = encoder.weight.grad.clone(), encoder(anchors).detach()
    encoder.zero_grad()
    torch.cosine_similarity(encoder(x)[:, None], fixed[None], dim=-1).sum().backward()
    close(found, encoder.weight.grad, 1e-5)


def test_crossed() -> None:
    """Two nets of one function in unlike bases: by hand, way by way."""
    x, turn = space(40).float(), rotation(6).float()
    anchors, bases = x[:10], (torch.eye(6), 2 * turn)
    encoders = [lambda e, m=m: e @ m for m in bases]
    code, read = nn.Linear(10, 3), nn.Linear(6, 3)
    undone = [lambda e, m=m: read(e @ torch.linalg.inv(m)) for m in bases]
    anchored = tuple(st.Stitched(_as_module(e), code, anchors) for e in encoders)
    plain = tuple(st.Stitched(_as_module(e), _as_module(d), None) for e, d in zip(encoders, undone))
    idle = tuple(_as_module(lambda e: e * torch.arange(6.0)) for _ in range(2))

    def score(net: nn.Module) -> float:
        wanted = code(torch.cosine_similarity(x[:, None], anchors[None], dim=-1))
        return min((net(x) - each).abs().max().item() for each in (wanted, read(x)))

    found = st.crossed(anchored, plain, idle, anchors, score)
    for name in ("native", "stitched", "absolute_native", "affine", "orthogonal"):
        assert found.pop(name) < 1e-4, name
    assert min(found.values()) > 0.05
    assert set(found) == {"absolute", "shuffled", "untrained"}
    expected = [score(st.Stitched(encoders[i], plain[1 - i].decoder, None)) for i in (0, 1)]
    assert found["absolute"] == pytest.approx(sum(expected) / 2)


def test_found_again() -> None:
    """By hand through `agreement`, and what a rotation, a shear and wrong anchors leave of it."""
    x, anchors = space(120), torch.arange(30)
    sheared = x @ (torch.eye(6) + torch.ones(6, 6).triu(1)).double()
    for other, good in (
        (2 * x @ rotation(6), {"relative", "affine", "orthogonal"}),
        (sheared, {"affine"}),
    ):
        for how in ("relative", "affine", "orthogonal", "absolute", "axes"):
            found = st.found_again(x, other, anchors, how=how)
            assert found[:30].isnan().all()
            assert (found[30:].mean() > 0.99) == (how in good), (how, found[30:].mean())
    wrong = st.found_again(x, x, anchors, parallel=anchors + 30)
    assert wrong[:60].isnan().all()
    assert wrong[60:].mean() < 0.2
    a, b = (rr.relative(each, each[:30])[30:] for each in (x, sheared))
    by_hand = (rr.agreement(a, b)["mrr"] + rr.agreement(b, a)["mrr"]) / 2
    close(st.found_again(x, sheared, anchors)[30:], by_hand, 1e-6)
    wider = torch.cat([x, torch.zeros(120, 3).double()], dim=1)
    close(st.found_again(x, wider, anchors, how="absolute")[30:], torch.ones(90), 1e-6)
    away = x + torch.tensor([9.0, -9, 9, -9, 9, -9])
    close(st.found_again(x, away, anchors, how="axes")[30:], torch.ones(90), 1e-6)
    assert st.found_again(x, away, anchors, how="absolute")[30:].mean() < 0.5


def _as_module(function: object) -> nn.Module:
    made = nn.Module()
    made.forward = function  # type: ignore[assignment]
    return made
