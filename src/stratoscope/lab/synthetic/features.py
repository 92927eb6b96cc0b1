"""Features of differing complexity: bits, a bar, and one answer for each feature, in order.

    b1 b2 ... bn | f1 f2 ... fk         after the bar, every answer is a target
    best:  the feature, a function of the bits, with certainty

Each feature has four bits of its own; a kind says how many of them it reads: "linear" one, "xor"
two, "parity" all four (its exclusive or). The others, and `noise` bits more, say nothing. So all
features are independent, true in half of the rows, and asked for alike; they differ in nothing but
what it takes to compute them. The bar is id 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.lab.synthetic._stream import Stream

READS = {"linear": 1, "xor": 2, "parity": 4}
OWN, BAR = 4, 2


def labels(ids: Int[Tensor, "row position"], kinds: Sequence[str]) -> Int[Tensor, "row feature"]:
    """What each feature is in each row, from its bits alone."""
    own = [ids[:, OWN * at : OWN * at + READS[kind]].sum(dim=1) for at, kind in enumerate(kinds)]
    return torch.stack(own, dim=1) % 2


def stream(
    *,
    seed: int = 0,
    split: str = "train",
    kinds: Sequence[str] = ("linear", "parity"),
    noise: int = 8,
) -> Stream:
    """Rows of 4 * len(kinds) + noise bits, the bar and the answers. Raises InputError for another
    kind, or none."""
    kinds = tuple(kinds)
    if not kinds or not set(kinds) <= READS.keys() or noise < 0:
        raise InputError(f"kinds={kinds}, noise={noise}: kinds are {', '.join(READS)}; noise >= 0.")
    bits = OWN * len(kinds) + noise

    def draw(generator: torch.Generator, n: int) -> Tensor:
        ids = torch.randint(2, (n, bits), generator=generator)
        return torch.cat([ids, torch.full((n, 1), BAR), labels(ids, kinds)], dim=1)

    def best(ids: Tensor) -> Tensor:
        """Before the bar, either bit."""
        said = torch.full((*ids.shape, 3), 0.5)
        said[..., BAR] = 0.0
        after = max(0, ids.shape[1] - bits)
        if after:
            answers = labels(ids[:, :bits], kinds)[:, :after]
            said[:, bits : bits + answers.shape[1]] = torch.nn.functional.one_hot(
                answers, 3
            ).float()
        return said

    def pair(ids: Tensor, generator: torch.Generator) -> tuple[list[int], list[int], int, int]:
        """One of the bits that the feature reads is turned round."""
        at = int(torch.randint(len(kinds), (1,), generator=generator))
        place = OWN * at + int(torch.randint(READS[kinds[at]], (1,), generator=generator))
        clean, answer = ids[: bits + 1 + at].tolist(), int(ids[bits + 1 + at])
        corrupt = [*clean[:place], 1 - clean[place], *clean[place + 1 :]]
        return clean, corrupt, answer, 1 - answer

    places = torch.arange(bits + 1 + len(kinds))
    return Stream(
        "features",
        seed,
        split,
        3,
        bits + 1 + len(kinds),
        places > bits,
        0.5,
        "What a feature of the bits is, one after another. In the corrupt prompt one bit that it "
        "reads is another. An answer says nothing of the later ones.",
        "after Lampinen et al. 2024, arXiv:2405.05847; sizes our own",
        draw,
        best,
        pair,
    )
