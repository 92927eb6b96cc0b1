"""Associative recall: pairs of key and value, and then some of the keys again, each with its value.

    k1 v1 k2 v2 ... kn vn | k3 v3 k1 v1 ...        after the bar, values are targets
    best:  the value that followed this key, with certainty

Keys of a row are different; values are drawn freely.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.lab.synthetic._stream import Stream, other, permutations


def stream(
    *,
    seed: int = 0,
    split: str = "train",
    keys: int = 32,
    values: int = 32,
    pairs: int = 8,
    queries: int = 8,
) -> Stream:
    """Ids below `keys` are keys, the `values` next ones values. Raises InputError for more pairs
    than keys, or more queries than pairs."""
    if not 1 <= queries <= pairs <= keys or values < 2:
        raise InputError(
            f"recall needs queries <= pairs <= keys and two values; got {queries} queries, {pairs} "
            f"pairs, {keys} keys, {values} values."
        )

    def draw(generator: torch.Generator, n: int) -> Int[Tensor, "row position"]:
        chosen = permutations(n, keys, generator)[:, :pairs]
        values_at = keys + torch.randint(values, (n, pairs), generator=generator)
        again = permutations(n, pairs, generator)[:, :queries]
        shown = torch.stack([chosen, values_at], dim=-1).flatten(1)
        query = torch.stack([chosen.gather(1, again), values_at.gather(1, again)], dim=-1).flatten(
            1
        )
        return torch.cat([shown, query], dim=1)

    def best(ids: Int[Tensor, "row position"]) -> Float[Tensor, "row position vocab"]:
        where = ids[:, None, : 2 * pairs : 2] == ids[:, :, None]  # (row, position, pair)
        values_there = torch.nn.functional.one_hot(ids[:, 1 : 2 * pairs : 2], keys + values)
        return where.float() @ values_there.float()

    def pair(ids: Tensor, generator: torch.Generator) -> tuple[list[int], list[int], int, int]:
        """Another value stands beside the key that is asked first."""
        clean = ids[: 2 * pairs + 1].tolist()
        place = clean.index(clean[-1]) + 1
        answer = clean[place]
        foil = other(answer, range(keys, keys + values), generator)
        return clean, [*clean[:place], foil, *clean[place + 1 :]], answer, foil

    places = torch.arange(2 * (pairs + queries))
    return Stream(
        "recall",
        seed,
        split,
        keys + values,
        2 * (pairs + queries),
        (places > 2 * pairs) & (places % 2 == 1),
        1 / values,
        "Which value stood beside this key. In the corrupt prompt another one does. All keys and "
        "values are met in training, so being right does not show that new ones would be read.",
        "multi-query associative recall (Arora et al. 2023, arXiv:2312.04927)",
        draw,
        best,
        pair,
    )
