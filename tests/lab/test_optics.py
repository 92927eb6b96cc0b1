"""A slit blurs up and down, and by as many pixels as it was told."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter

from stratoscope.errors import InputError
from stratoscope.lab import optics


def test_equals_scipy_s_gaussian_filter() -> None:
    x = torch.rand(2, 3, 32, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = optics.slit(x, 2.0, 0.7)
    expected = gaussian_filter(x.numpy(), (0, 0, 2.0, 0.7), mode="mirror", radius=(0, 0, 6, 6))
    assert (found - torch.from_numpy(expected)).abs().max() < 1e-12


def test_a_point_becomes_an_upright_line() -> None:
    x = torch.zeros(1, 1, 33, 33)
    x[..., 16, 16] = 1
    found = optics.slit(x, 3.0)[0, 0]
    at = torch.arange(33.0) - 16
    assert found.sum() == pytest.approx(1, abs=1e-5)
    tall, wide = ((found.sum(dim=d) * at**2).sum().sqrt().item() for d in (1, 0))
    assert tall == pytest.approx(3.0, rel=0.03)  # the kernel ends after three deviations
    assert wide == pytest.approx(0.6, rel=0.03)


def test_refusals() -> None:
    with pytest.raises(InputError, match="above 0"):
        optics.slit(torch.zeros(1, 1, 9, 9), 0.0)
    with pytest.raises(InputError, match="too small"):
        optics.slit(torch.zeros(1, 1, 9, 9), 3.0)
