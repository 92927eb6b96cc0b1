"""Pictures as other eyes see them.

A cat's pupil is an upright slit: what is out of focus is blurred along the slit, up and down, and
hardly to the sides (Banks et al., 2015, doi:10.1126/sciadv.1500391). That much of a cat's view is
made here; colours, acuity, field of view and movement are not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.errors import InputError


def slit(
    x: Float[Tensor, "example channel row column"], upright: float, sideways: float | None = None
) -> Float[Tensor, "example channel row column"]:
    """Pictures through an upright slit: a Gaussian blur of `upright` pixels up and down, and of
    `sideways` (a fifth of it, unless given) to the sides. Edges are mirrored.

    Raises InputError for a deviation that is not above 0, or a picture that is too small for it.
    """
    wide = upright / 5 if sideways is None else sideways
    if not (upright > 0 and wide > 0):
        raise InputError(f"blurs of {upright} and {wide} pixels: give deviations above 0.")
    reach = max(1, round(3 * max(upright, wide)))
    if min(x.shape[-2:]) <= reach:
        raise InputError(
            f"pictures of {x.shape[-2]} x {x.shape[-1]} pixels are too small for a blur that "
            f"reaches {reach}: give larger ones, or a smaller blur."
        )
    at = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    rows, columns = (torch.exp(-((at / s) ** 2) / 2) for s in (upright, wide))
    kernel = torch.outer(rows / rows.sum(), columns / columns.sum())
    channels = x.shape[1]
    padded = nn.functional.pad(x, (reach,) * 4, mode="reflect")
    return nn.functional.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)
