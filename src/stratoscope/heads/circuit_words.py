"""A head's circuits in words: the singular directions of W_OV and of W_QK, each with the tokens at
both of its ends.

Paper: textbook (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; Millidge
and Black, "The Singular Value Decompositions of Transformer Weight Matrices are Highly
Interpretable", 2022)

    circuit="ov":  W = O V      = sum_r  s_r u_r v_r^T        read: E v_r     write: U N(u_r)
    circuit="qk":  W = Q^T K    = sum_r  s_r u_r v_r^T        read: E v_r     write: E u_r

E is the embedding, U the unembedding, N the final norm's weight and centring; V, Q and K hold those
of the norm before attention (`heads.composition`). A head that reads a token far along v_r writes
s_r u_r, so says `write`'s words; of W_QK, a query of `write`'s words looks for keys of `read`'s. A
direction has two ends: reading along -v_r it writes -u_r (`against`). Its sign is such that the
longest product of `read` is positive. With grouped queries each query head has its own O and Q.

null: the longest standardised product (by its mean and deviation over the vocabulary) of random
directions that the same circuit can read, and write. Where peak_read is no longer than these, the
words are what any direction would show.
Reads as: what the head does to tokens by way of no other component. Does not show that it does it:
weights know no prompt, and a head of a later layer mostly reads what others have written, which the
embedding does not hold.
Cost: the weights of all heads once (`composition.reads`), then components x vocabulary products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import composition
from stratoscope.maths.norm import freeze
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text
from stratoscope.results import dataset

Circuit = Literal["ov", "qk"]
NULL = "the longest standardised product of random directions of the same circuit"
AXES = {
    "listed": "an entry of a list of heads, with coordinates layer and head",
    "direction": "a singular direction of a head's circuit, 0 the strongest",
}


def peak(scores: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
    """The longest product, in deviations over the vocabulary from its mean."""
    away = scores - scores.mean(dim=-1, keepdim=True)
    return away.abs().amax(dim=-1) / scores.std(dim=-1).clamp_min(1e-30)


def signed(
    read: Float[Tensor, "direction vocab"], write: Float[Tensor, "direction vocab"]
) -> tuple[Float[Tensor, "direction vocab"], Float[Tensor, "direction vocab"]]:
    """Both turned round where the longest product of `read` is negative."""
    longest = read.gather(-1, read.abs().argmax(dim=-1, keepdim=True))
    sign = torch.where(longest < 0, -1.0, 1.0).to(read)
    return sign * read, sign * write


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Sequence[Sequence[int]],
    *,
    circuit: Circuit = "ov",
    components: int = 3,
    top: int = 8,
    draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """read, write, and read_against, write_against: tokens of each direction (listed, direction,
    rank), with their products (read_score, ...); strength, share (listed, direction): s_r, and of
    the sum of squares; peak_read, peak_write, and null_read, null_write (listed, draw).

    inputs: heads as (layer, head); no prompt takes part. circuit: what the head moves ("ov") or
    what it looks for ("qk", at equal positions). components: how many directions. top: how many
    tokens. draws, seed: of the null. Raises InputError for a head or a number that is not there;
    SiteError where tokens do not reach a head, or its writes the vocabulary, by one matrix.
    """
    (q, k, v), o = composition.reads(lm), composition.writes(lm)
    heads = _checked(lm, inputs, components, top, draws, v.shape[-2])
    embed, unembed = lm.weight("embed").float(), lm.weight("logits").float()
    if circuit == "qk":
        outer, inner, said = q.mT, k, embed
    else:
        outer, inner, said = o, v, _through_final_norm(lm, unembed)
    generator = torch.Generator().manual_seed(seed)
    tables: dict[str, list[Any]] = {name: [] for name in (*_TEXTS, *_NUMBERS)}
    for head in heads:
        u, s, vt = composition.svd_of_product(outer[head], inner[head])
        mix = torch.randn(2, draws, len(s), generator=generator).to(u)
        read, write = signed(vt[:components] @ embed.T, u[:, :components].T @ said.T)
        sides = {"read": read, "write": write, "read_against": -read, "write_against": -write}
        for name, products in sides.items():
            best = products.topk(top)
            tables[name].append([
                [token_text(lm.tokenizer, i) for i in row] for row in best.indices.tolist()
            ])  # fmt: skip
            tables[f"{name}_score"].append(best.values)
        numbers = {
            "strength": s[:components],
            "share": s[:components] ** 2 / s.pow(2).sum().clamp_min(1e-30),
            "peak_read": peak(read),
            "peak_write": peak(write),
            "null_read": peak(mix[0] @ vt @ embed.T),
            "null_write": peak(mix[1] @ u.T @ said.T),
        }
        for name, value in numbers.items():
            tables[name].append(value)
    words = ("listed", "direction", "rank")
    axes = dict.fromkeys((*_TEXTS, *(f"{n}_score" for n in _TEXTS)), words) | {
        name: ("listed", "draw" if name.startswith("null") else "direction")
        for name in ("strength", "share", "peak_read", "peak_write", "null_read", "null_write")
    }
    return dataset(
        {
            name: (axes[name], value if name in _TEXTS else torch.stack(value))
            for name, value in tables.items()
        },
        method="heads.circuit_words",
        provenance=lm.provenance,
        settings={"circuit": circuit, "top": top},
        seed=seed,
        coords={
            "layer": (("listed",), [layer for layer, _ in heads]),
            "head": (("listed",), [head for _, head in heads]),
            "direction": list(range(components)),
            "rank": list(range(top)),
        },
        null_kind=NULL,
    )


_TEXTS = ("read", "write", "read_against", "write_against")
_NUMBERS = (
    *(f"{name}_score" for name in _TEXTS),
    *("strength", "share", "peak_read", "peak_write", "null_read", "null_write"),
)


def _through_final_norm(lm: LM, unembed: Float[Tensor, "vocab dim"]) -> Float[Tensor, "vocab dim"]:
    """U N: what of the stream each token's logit reads, the norm's scale left out."""
    frozen = freeze(lm.layout.final_norm, unembed[:1])
    scaled = frozen.weight * unembed
    return scaled - scaled.mean(dim=-1, keepdim=True) if frozen.centred else scaled


def _checked(
    lm: LM,
    inputs: Sequence[Sequence[int]],
    components: int,
    top: int,
    draws: int,
    rank: int,
) -> list[tuple[int, int]]:
    sizes = lm.dims.layers, lm.dims.heads
    if len(lm.layout.head) != 1 or lm.weight("embed").shape[1] != lm.dims.dim:
        raise SiteError(
            f"{lm.family.name} has no linear way from a token to a head, or from a head to the "
            "vocabulary: there are no words at the ends."
        )
    heads = [tuple(head) for head in inputs]
    if not heads or any(
        len(head) != 2 or not (0 <= head[0] < sizes[0] and 0 <= head[1] < sizes[1])
        for head in heads
    ):
        raise InputError(
            f"heads are (layer, head), 0 to {sizes[0] - 1} and {sizes[1] - 1}, at least one; got "
            f"{list(inputs)!r:.80}."
        )
    if not 1 <= components <= rank or not 1 <= top <= lm.dims.vocab or draws < 1:
        raise InputError(
            f"components={components}, top={top}, draws={draws}: a circuit has {rank} components, "
            f"the vocabulary {lm.dims.vocab} tokens, and the null needs a draw."
        )
    return heads  # type: ignore[return-value]
