"""Pictures of labelled results: one function per shape of result, never one per method.

| shape of the array          | function                                                     |
|-----------------------------|--------------------------------------------------------------|
| two axes                    | `heatmap.heatmap`; `heatmap.largest` gives several one scale |
| one axis, signed or shares  | `bars.bars`; several arrays over one axis: `bars.grouped`    |
| one axis that is a progress | `lines.line`                                                 |
| one number per token        | `tokens.strip` (HTML: the text itself, tinted)               |
| too large to draw whole     | `choose.strongest`, `choose.pick`, `choose.spread`           |

Each takes an `xarray.DataArray`, reads the axis names and the token text from it, and returns a
plotly `Figure` that is readable in a notebook as it is. A page that changes between light and dark
replaces `layout.template` by `theme.template(theme.LIGHT)` or `theme.template(theme.DARK)`; nothing
else in a figure depends on the theme.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __path__)
