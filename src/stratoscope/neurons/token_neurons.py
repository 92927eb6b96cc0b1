"""Which neurons stand for a token: every neuron's weights read through the LM head, and the index
from tokens to neurons.

Paper: neuron-lm-head

    logits[neuron, vocab] = U . N(N_mlp(W_up[neuron]))             as in neurons.vocabulary;
                                                                   fold=False: U . W_up[neuron]
    score[neuron, token]  = (logits[neuron, token] - mean) / sd    over the vocabulary

Mean and deviation come from the mean and covariance of U's rows: exact, and without the neuron x
vocabulary table, so the whole model is searched at the price of one small product a layer. The
paper gives token probabilities, a softmax of logits whose size depends on the length of the
weights; the score does not, so neurons of all layers can be compared. The abstract does not say
whether norms are folded in: `fold` does both.

null: the activation of a random neuron of the same layer, there.
Reads as: neurons whose weights are the token's direction; `place` 0 says that the token is the
neuron's own first. Does not show that the neuron fires at the token, or for the concept:
`activation` is that at the token itself, and a clamp (`editing.clamp`) shows what it does. With
tied embeddings early layers match a token because they read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.neurons._weights import Side, directions, linear, weighed
from stratoscope.results import dataset

NULL = "the activation of a neuron of the same layer, drawn at random"


def standardised(
    rows: Float[Tensor, "neuron dim"],
    centred: Float[Tensor, "token dim"],
    covariance: Float[Tensor, "dim dim"],
) -> Float[Tensor, "neuron token"]:
    """Each row's logits for some tokens, above their mean over the vocabulary and divided by their
    deviation.

    centred: those tokens' rows of the unembedding, less the mean of all its rows, whose covariance
    is given.
    """
    spread = ((rows @ covariance) * rows).sum(dim=-1).clamp_min(1e-30).sqrt()
    return (rows @ centred.T) / spread[:, None]


@torch.no_grad()
def measure(
    lm: LM, inputs: Any, *, side: Side = "up", top: int = 5, fold: bool = True, seed: int = 0
) -> xr.Dataset:
    """The neurons that stand for each token of the inputs, best first: (example, position, rank).

    layer, neuron: which; score: as above; place: where the token stands in the neuron's own list;
    activation, null: at that position. side: which weights are read. top: how many neurons. Raises
    SiteError where logits are not linear in what a neuron reads or writes; InputError for a `top`
    that is not there.
    """
    linear(lm)
    if not 1 <= top <= lm.dims.layers * lm.dims.neurons:
        raise InputError(f"top={top}: choose 1 to {lm.dims.layers * lm.dims.neurons}.")
    batch = lm.batch(inputs)
    ids, mask = batch.text
    tokens = ids[mask].unique()
    layer, neuron, score = search(lm, tokens, side=side, top=top, fold=fold)
    place = _places(lm, tokens, layer, neuron, side, fold)
    # padding finds something, hidden below
    at = torch.searchsorted(tokens, ids.clamp(tokens.min(), tokens.max()))
    acts = (
        capture(lm, batch, "layers.*.mlp.act").stack("layers.*.mlp.act").permute(1, 2, 0, 3).cpu()
    )
    example, position = torch.meshgrid(*(torch.arange(n) for n in ids.shape), indexing="ij")
    generator = torch.randint(
        0, lm.dims.neurons, neuron[at].shape, generator=torch.Generator().manual_seed(seed)
    )
    spot = (example[..., None], position[..., None], layer[at].cpu())
    hidden, gap = ~mask[..., None].cpu(), torch.where(mask, 0.0, torch.nan)[..., None].cpu()
    axes = ("example", "position", "rank")
    whole = {"layer": layer[at], "neuron": neuron[at], "place": place[at]}
    real = {
        "score": score[at].cpu(),
        "activation": acts[*spot, neuron[at].cpu()],
        "null": acts[*spot, generator],
    }
    return dataset(
        {name: (axes, value.cpu().masked_fill(hidden, -1)) for name, value in whole.items()}
        | {name: (axes, value.float() + gap) for name, value in real.items()},
        method="neurons.token_neurons",
        provenance=lm.provenance,
        settings={"side": side, "top": top, "fold": fold},
        seed=seed,
        coords=batch.coords() | {"rank": list(range(top))},
        null_kind=NULL,
    )


@torch.no_grad()
def search(
    lm: LM,
    tokens: Int[Tensor, " token"] | Sequence[Int[Tensor, " _"]],
    *,
    side: Side = "up",
    top: int = 5,
    fold: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer, neuron and score of the neurons that stand for each token most, over the whole model:
    (token, rank).

    tokens: given several rows of them, neurons are found for each row as a whole, by the mean
    score of its tokens: (row, rank). All are looked for at once.
    """
    several = not isinstance(tokens, Tensor)
    head = lm.weight("logits").float()
    mean = head.mean(dim=0)
    covariance = (head.T @ head) / len(head) - mean[:, None] * mean
    means = torch.stack([head[row].mean(dim=0) for row in tokens]) if several else head[tokens]
    centred = means - mean
    tables = [
        standardised(_rows(lm, at, side, fold), centred, covariance) for at in range(lm.dims.layers)
    ]
    best = torch.cat(tables).T.topk(top, dim=1)
    return best.indices // lm.dims.neurons, best.indices % lm.dims.neurons, best.values


@torch.no_grad()
def top_tokens(
    lm: LM, *, side: Side = "up", fold: bool = True, layers: Sequence[int] | None = None
) -> Int[Tensor, "layer neuron"]:
    """The first token of every neuron of all or some layers: the neuron x vocabulary table, layer
    by layer."""
    linear(lm)
    head = lm.weight("logits").float().T
    chosen = range(lm.dims.layers) if layers is None else layers
    return torch.stack([(_rows(lm, layer, side, fold) @ head).argmax(dim=-1) for layer in chosen])


def _rows(lm: LM, layer: int, side: Side, fold: bool) -> Float[Tensor, "neuron dim"]:
    """A layer's directions as the unembedding takes them."""
    rows = directions(lm, layer, side, fold=fold).float()
    return weighed(lm.layout.final_norm, rows) if fold else rows


def _places(
    lm: LM, tokens: Tensor, layer: Tensor, neuron: Tensor, side: Side, fold: bool
) -> Int[Tensor, "token rank"]:
    """How many tokens each found neuron puts before its own."""
    tables = {at: _rows(lm, at, side, fold) for at in sorted(set(layer.flatten().tolist()))}
    head = lm.weight("logits").float()
    place = torch.empty_like(neuron)
    for row, token in enumerate(tokens.tolist()):
        units = zip(layer[row].tolist(), neuron[row].tolist())
        logits = torch.stack([tables[at][unit] for at, unit in units]) @ head.T
        place[row] = (logits > logits[:, token, None]).sum(dim=-1)
    return place
