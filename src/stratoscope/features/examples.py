"""Top examples: at which tokens of which texts a feature, a unit or a direction is largest.

Paper: textbook (top-activating examples, as in Bricken et al., "Towards monosemanticity", 2023)

    value[feature, token] = encode(x)[feature]      of a dictionary
                          = x[unit]                 of a site: a neuron, a dimension
                          = x . direction           of a direction there
    the `top` largest over all tokens of all texts, BOS not counted

Texts go by a few at a time and only the largest so far are held, so a corpus of any length will do.
`share` is how often the value is above 0, `mean` its mean over all tokens.

Reads as: what a feature's highest values have in common, beside how often it speaks at all. Does
not show what it does at the rest of its values, nor what it is for: the highest of a random
direction have things in common too. Compare with `direction=` drawn at random.
Cost: one run of every text up to the site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.dictionary import Dictionary, width_at
from stratoscope.engine.places import Place, place, seen
from stratoscope.errors import InputError
from stratoscope.features._texts import counted, parts
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def largest(
    values: Float[Tensor, "token feature"],
    places: Int[Tensor, "token 2"],
    held: tuple[Tensor, Tensor],
    top: int,
) -> tuple[Float[Tensor, "rank feature"], Int[Tensor, "rank feature 2"]]:
    """The `top` largest of these and of those held so far, and where they are."""
    here = places[:, None].expand(-1, values.shape[1], -1)
    both, where = torch.cat([held[0], values]), torch.cat([held[1], here])
    # of like values the earlier, whatever runs together
    best = both.argsort(dim=0, descending=True, stable=True)[:top]
    return both.gather(0, best), where.gather(0, best[..., None].expand(-1, -1, 2))


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    dictionary: Dictionary | str | Path | None = None,
    site: str | None = None,
    units: Sequence[int] | None = None,
    direction: Float[Tensor, "*feature dim"] | None = None,
    top: int = 10,
    around: int = 8,
) -> xr.Dataset:
    """activation, token, context, text and place of the top examples, (feature, rank) each; share
    and mean (feature).

    dictionary: one, or a folder of one; else a site, whose units or `direction` are asked. units:
    which features or units, default all. around: tokens of context before and after, the token
    itself in << >>. text, place: the number of the text, and of the token in it, -1 where there are
    fewer tokens than `top`. Raises InputError where not one of dictionary and site is given, or for
    a unit that is not there; SiteError for a site that the model lacks.
    """
    batch = lm.batch(inputs)
    at, values, numbers = _asked(lm, dictionary, site, units, direction)
    if top < 1 or around < 0:
        raise InputError(f"top={top}, around={around}: at least one example, and no less than 0.")
    device, first = batch.text[0].device, 0
    held = (
        torch.empty(0, len(numbers), device=device),
        torch.empty(0, len(numbers), 2, dtype=torch.long, device=device),
    )
    sums = torch.zeros(3, len(numbers), dtype=torch.double, device=device)
    for part in parts(lm, batch):
        real = counted(lm, part)
        here = values(seen(lm, part, at)[at][real]).float()
        held = largest(here, real.nonzero() + torch.tensor([first, 0], device=device), held, top)
        sums += torch.stack([torch.ones_like(here), here > 0, here]).double().sum(dim=1)
        first += len(part)
    found, where = held[0].T.cpu(), held[1].transpose(0, 1).cpu()
    rest = top - found.shape[1]
    found = torch.nn.functional.pad(found, (0, max(0, rest)), value=torch.nan)
    where = torch.nn.functional.pad(where, (0, 0, 0, max(0, rest)), value=-1)
    words = [[_shown(batch, *place, around) for place in row] for row in where.tolist()]
    axes = ("feature", "rank")
    return dataset(
        {
            "activation": (axes, found),
            "token": (axes, [[token for token, _ in row] for row in words]),
            "context": (axes, [[context for _, context in row] for row in words]),
            "text": (axes, where[..., 0]),
            "place": (axes, where[..., 1]),
            "share": (("feature",), sums[1] / sums[0]),
            "mean": (("feature",), sums[2] / sums[0]),
        },
        method="features.examples",
        provenance=lm.provenance,
        settings={"top": top, "around": around, "dictionary": dictionary is not None},
        coords={"feature": numbers},
        site=str(at),
    )


def _asked(
    lm: LM, dictionary: Any, site: str | None, units: Sequence[int] | None, direction: Any
) -> tuple[Place, Callable[[Tensor], Tensor], list[int]]:
    """Where to read, what to make of it, and the number of each feature."""
    if (dictionary is None) == (site is None):
        raise InputError("give a dictionary, or a site whose units or `direction` are asked.")
    if direction is not None and (dictionary is not None or units is not None):
        raise InputError("a direction is of a site, and has no units: give it alone with `site=`.")
    device = lm.model.device
    if site is None:
        made = dictionary if isinstance(dictionary, Dictionary) else Dictionary.load(dictionary)
        made = made.to(device)
        at, size, read = made.sites(lm)[0], made.features, made.encode
    else:
        at = place(lm, site)
        size, read = width_at(lm, at), lambda x: x
    if direction is not None:
        lines = torch.atleast_2d(torch.as_tensor(direction)).to(device).float()
        if lines.shape[1] != size:
            raise InputError(
                f"a direction of {lines.shape[1]} numbers at `{at}`, where a token has {size}."
            )
        return at, lambda x: x.float() @ lines.T, list(range(len(lines)))
    numbers = list(range(size)) if units is None else list(units)
    if not numbers or not all(0 <= number < size for number in numbers):
        raise InputError(f"units {numbers!r:.80}: there are {size}, numbered 0 to {size - 1}.")
    index = torch.tensor(numbers, device=device)
    return at, lambda x: read(x).index_select(-1, index), numbers


def _shown(batch: Batch, text: int, place: int, around: int) -> tuple[str, str]:
    """A token, and it among its neighbours; "" where there is none."""
    if text < 0:
        return "", ""
    row = batch.tokens[text]
    space = " " if batch.words else ""
    before, after = row[max(0, place - around) : place], row[place + 1 : place + 1 + around]
    return row[place], space.join((*before, f"<<{row[place]}>>", *after))
