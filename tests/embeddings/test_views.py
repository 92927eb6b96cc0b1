"""Features are what plain forward calls give; views of the same pictures are told from others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stratoscope.embeddings import similarity, views
from stratoscope.errors import InputError
from stratoscope.lab import small_nets
from support.subjects import close


def net_and_pictures() -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(24, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return small_nets.fresh(small_nets.cnn, 0), x


def test_features_are_the_outputs_of_plain_calls() -> None:
    net, x = net_and_pictures()
    first, last = views.features(net, ["1", "7"], x, cells=7, batch=5)
    with torch.no_grad():
        plain = net[:2](x)
        # 14 x 14 to 7 x 7: the mean of four
        pooled = plain.reshape(24, -1, 7, 2, 7, 2).mean(dim=(3, 5)).flatten(1)
        close(first, pooled, 1e-5)
        close(last, net[:8](x), 1e-5)
    assert not net[1]._forward_hooks
    vit = small_nets.fresh(lambda: small_nets.vit(layers=2), 0)
    [name] = [n for n, m in vit.named_modules() if type(m).__name__ == "ViTLayer"][-1:]
    with torch.no_grad():
        hidden = vit(x, output_hidden_states=True).hidden_states
    close(views.features(vit, [name], x)[0], hidden[2].flatten(1), 1e-5)


def test_aligned_equals_similarity_by_hand() -> None:
    net, x = net_and_pictures()
    other = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = views.aligned(net, ["1", "5"], x, [x, other])
    for kind in views.KINDS:
        assert found[kind].shape == (2, 2)
        close(found[kind][0], [1, 1], 1e-6)
        assert (found[kind][1] < 0.99).all()
        assert np.abs(found[f"shuffled_{kind}"]).max() < 0.25
    with torch.no_grad():
        a, b = (nn.functional.adaptive_avg_pool2d(net[:2](v), 8).flatten(1) for v in (x, other))
    expected = similarity.cka(similarity.rbf(a.numpy()), similarity.rbf(b.numpy()))
    assert found["rbf"][1, 0] == pytest.approx(expected, abs=1e-5)
    moved = similarity.rsa(
        similarity.distances(a.numpy()), similarity.distances(b.numpy()[np.r_[23, :23]])
    )
    assert found["shuffled_rsa"][1, 0] == pytest.approx(moved, abs=1e-4)


def test_refusals() -> None:
    net, x = net_and_pictures()
    with pytest.raises(InputError, match="parts 99 are not among"):
        views.features(net, ["99"], x)
    with pytest.raises(InputError, match="as many in each"):
        views.aligned(net, ["1"], x, [x[:3]])
