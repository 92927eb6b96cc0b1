"""Names of TransformerLens that mean another tensor there are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from stratoscope.errors import SiteError
from stratoscope.models.sites import Site

if TYPE_CHECKING:
    from stratoscope.models.layout import Layout


def refuse_another_tensor(layout: Layout, site: Site) -> None:
    """TransformerLens shows queries and keys before rotary embedding, and an RMS norm's output
    before its weight."""
    if site.point == "final_norm":
        if isinstance(layout.final_norm, nn.LayerNorm):  # there it is the norm's output too
            return
        difference = (
            f"the final norm's output before its weight; `{site}` is after it, what the "
            "read-out takes"
        )
    else:
        turned = any("rotary" in type(module).__name__.lower() for module in layout.base.modules())
        if not turned and not any(
            getattr(layout.config(), name, None) for name in ("rope_parameters", "rotary_dim")
        ):
            return
        difference = (
            f"taken before rotary embedding; `{site}` is after it, as "
            f"`{site.alias.replace('hook_', 'hook_rot_')}`"
        )
    raise SiteError(
        f"TransformerLens's `{site.alias}` is {difference}. Ask for `{site}` if that is "
        "what you want."
    )
