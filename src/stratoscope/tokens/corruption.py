"""A corrupt prompt made by itself: the tokens that matter most, exchanged for others of their kind.

Paper: textbook (symmetric token replacement: Zhang and Nanda, "Towards Best Practices of Activation Patching", 2024)

    corrupt = argmin over draws of  d(prompt with tokens[k most important] <- random tokens of their kind)

d is the logit difference answer - foil; importance is occlusion; a token's kind is its neighbourhood in embedding space
among tokens of the same shape (leading space, capital, letters). k grows from 1 until the difference has changed sign
or `most` tokens are changed. Length and all other tokens stay, so the pair can be patched token by token.

Reads as: one prompt near the given one on which the model answers otherwise. Does not show the only or the smallest
such change, and a name exchanged for a name asks another question than a name exchanged for noise.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine.metric import Target, Words, last_logits, target
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text
from stratoscope.results import dataset
from stratoscope.tokens import occlusion


def kind(
    embedding: Float[Tensor, "vocab dim"], token: int, allowed: Bool[Tensor, " vocab"], size: int
) -> Int[Tensor, " near"]:
    """The `size` allowed tokens whose embeddings point most nearly where the token's does, itself left out."""
    near = torch.cosine_similarity(embedding, embedding[token][None], dim=1)
    near = near.masked_fill(~allowed, -torch.inf)
    near[token] = -torch.inf
    return near.topk(min(size, int(allowed.sum()))).indices


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    importance: xr.DataArray | None = None,
    most: int = 3,
    draws: int = 16,
    near: int = 64,
    seed: int = 0,
) -> xr.Dataset:
    """One corrupt prompt for each prompt, as ids.

    importance: (example, position), default occlusion. most: how many tokens may change. draws: random exchanges
    tried for each number of tokens. near: how many neighbours count as a token's kind. Returns id (example, position;
    -1 at padding), changed, clean_difference, corrupt_difference and `how`, a sentence. Raises InputError when a
    prompt has no token that can be exchanged.
    """
    batch = lm.batch(inputs)
    asked = target(lm, batch, answer, foil)
    if importance is None:
        words = {"answer": asked.answer.tolist(), "foil": asked.foil.tolist()}
        importance = occlusion.measure(lm, batch, **words)["attribution"]
    clean = asked.difference(last_logits(lm, batch))
    original = batch.text[0].cpu()
    rows, lows = torch.full_like(original, -1), []
    for example in range(len(batch)):
        n = int(batch.lengths[example])
        weight = torch.from_numpy(importance.values[example, :n].copy()).float()
        generator = torch.Generator().manual_seed(seed)  # alike for every example: its place in a batch must not matter
        ids, low = _corrupt(lm, original[example, :n], weight, _one(asked, example), most, draws, near, generator)
        rows[example, :n] = ids
        lows.append(low)
    changed = (rows != original) & (rows >= 0)
    told = [_how(lm, batch, rows, changed, e, draws, seed) for e in range(len(batch))]
    corrupt = Batch(rows.clamp_min(0), batch.mask.cpu(), {}, tuple(tuple(t) for t in _texts(lm, rows)))
    return dataset(
        {
            "id": (("example", "position"), rows),
            "changed": (("example", "position"), changed),
            "clean_difference": (("example",), clean.float()),
            "corrupt_difference": (("example",), torch.stack(lows).float()),
            "how": (("example",), told),
        },
        method="tokens.corruption",
        provenance=lm.provenance,
        settings={"most": most, "draws": draws, "near": near},
        seed=seed,
        coords=batch.coords() | corrupt.coords("position", "corrupt_text") | asked.coords | batch.coords(),
        notes=" ".join(asked.notes),
    )


def _corrupt(
    lm: LM,
    ids: Tensor,
    weight: Tensor,
    asked: Target,
    most: int,
    draws: int,
    near: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    embedding = lm.weight("embed").detach()
    shapes = _shapes(lm)
    order = [p for p in weight.argsort(descending=True).tolist() if _shape(token_text(lm.tokenizer, int(ids[p])))]
    if not order:
        raise InputError("no token of the prompt is a word that could be exchanged: give a corrupt prompt (--corrupt).")
    best, lowest = ids, torch.tensor(torch.inf)
    for count in range(1, min(most, len(order)) + 1):
        trial = ids.repeat(draws, 1)
        for position in order[:count]:
            word = int(ids[position])
            allowed = torch.tensor([shape == shapes[word] for shape in shapes], device=embedding.device)
            pool = kind(embedding, word, allowed, near).cpu()
            pool = pool[~torch.isin(pool, torch.stack([asked.answer[0], asked.foil[0]]))]
            trial[:, position] = pool[torch.randint(len(pool), (draws,), generator=generator)]
        difference = asked.difference(last_logits(lm, trial), torch.zeros(draws, dtype=torch.long)).cpu()
        if difference.min() < lowest:
            best, lowest = trial[difference.argmin()], difference.min()
        if lowest < 0:
            break
    return best, lowest


def _shape(text: str) -> str:
    """What a word token looks like (leading space, capital), "" for one that is not a word."""
    bare = text.strip()
    if not bare.isalpha():
        return ""
    return f"{text[:1].isspace()}{bare[0].isupper()}"


def _shapes(lm: LM) -> list[str]:
    if lm.tokenizer is None:
        return [""] * lm.dims.vocab
    special = set(lm.tokenizer.all_special_ids)
    return ["" if i in special else _shape(token_text(lm.tokenizer, i)) for i in range(lm.dims.vocab)]


def _one(asked: Target, example: int) -> Target:
    at = slice(example, example + 1)
    return Target(asked.answer[at], asked.foil[at], asked.answer_text[at], asked.foil_text[at])


def _texts(lm: LM, rows: Tensor) -> list[list[str]]:
    return [[token_text(lm.tokenizer, i) for i in row if i >= 0] for row in rows.tolist()]


def _how(lm: LM, batch: Batch, rows: Tensor, changed: Tensor, example: int, draws: int, seed: int) -> str:
    places = changed[example].nonzero()[:, 0].tolist()
    swaps = [
        f"{batch.tokens[example][p].strip()!r} for {token_text(lm.tokenizer, int(rows[example, p])).strip()!r}"
        for p in places
    ]
    many = len(places) > 1
    most = f"the {len(places)} tokens that matter most" if many else "the token that matters most"
    return (
        f"Made automatically: {most} by occlusion exchanged for {'others' if many else 'another'} of similar embedding and "
        f"shape ({', '.join(swaps)}), the strongest of {draws} random draws (seed {seed})."
    )
