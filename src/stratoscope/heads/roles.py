"""Head roles: how far each head does one of five things heads are known for, and what chance would
give.

Paper: textbook (Olsson et al., "In-context Learning and Induction Heads", 2022; Wang et al., 2022)

On random words x said twice, x_0 .. x_{n-1} x_0 .. x_{n-1}, the mean over tokens of pattern[query,
key]:

    previous_token    query i, key i - 1
    duplicate_token   query: the second x_j, key: the first x_j
    induction         query: the second x_j, key: what followed the first x_j

and on the prompts, where o[s] = N(W_O v[s]) is what a head would write if it read token s alone (N:
the norms after it, with their scale held at the last token):

    copying           share of words s whose own logit is among the top 5 of U o[s]
    name_mover        sum over tokens s that are the answer of pattern[last, s] * o[s] . (u_answer
                      - u_foil)

null: for the first three, uniform attention to what a query may see (sliding windows not counted);
for copying, another word of the prompts in the place of the own one; for name_mover, as many other
tokens.

Reads as: what kind of head this is, on these inputs. Does not show that the model uses it: for
that, patch or ablate it. A head can have several roles, or one that is not here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.engine.metric import Target, Words, target
from stratoscope.engine.pieces import before
from stratoscope.engine.trace import capture
from stratoscope.engine.writes import final_norm, post_norms
from stratoscope.errors import InputError
from stratoscope.heads._copied import copied
from stratoscope.maths.norm import FrozenNorm
from stratoscope.models import source
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset

TOP = 5
DEFINITIONS = {
    "previous_token": "Mean attention to the token before, on random words said twice.",
    "duplicate_token": "Mean attention from a word's second place to its first, on random words "
    "said twice.",
    "induction": "Mean attention from a word's second place to what followed its first, on random "
    "words said twice.",
    "copying": f"Share of the prompts' words that are in the top {TOP} of what the head writes on "
    "reading them.",
    "name_mover": "Logit of answer over foil that the head writes from reading the answer in the "
    "prompt, or NaN.",
}


def repeated_roles(
    pattern: Float[Tensor, "text head query key"], length: int
) -> Float[Tensor, "head role=3"]:
    """The first three roles, on sequences whose last 2 * length tokens are one text said twice."""
    size = pattern.shape[-1]
    every, second = torch.arange(1, size), torch.arange(size - length, size)
    pairs = [(every, every - 1), (second, second - length), (second, second - length + 1)]
    return torch.stack([pattern[:, :, query, key].mean(dim=(0, 2)) for query, key in pairs], dim=-1)


def uniform(size: int, causal: bool) -> Float[Tensor, "text=1 head=1 query key"]:
    """The pattern of a head that reads all it may see alike."""
    seen = torch.ones(size, size).tril() if causal else torch.ones(size, size)
    return (seen / seen.sum(dim=-1, keepdim=True))[None, None]


def moved(
    carried: Float[Tensor, "position head"], named: Bool[Tensor, " position"]
) -> Float[Tensor, "kind=2 head"]:
    """Sum over the named positions; the mean of the others, times as many (NaN if there are
    none)."""
    return torch.stack([carried[named].sum(dim=0), carried[~named].mean(dim=0) * named.sum()])


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    repeats: int = 4,
    length: int = 24,
    seed: int = 0,
) -> xr.Dataset:
    """Score and null of every head in every role: (layer, head, role), over all tokens and
    examples.

    inputs, answer, foil: for copying and name_mover; default as `target` chooses. repeats, length,
    seed: of the random texts; `length` is cut to what vocabulary and context allow, with a note.
    copying and name_mover are NaN, with a note, where logits are not linear in what heads write.
    Raises SiteError for a model whose attention cannot be seen (Bloom).
    """
    lm.layout.resolve("layers.*.attn.pattern")
    batch = lm.batch(inputs)
    if batch.ids is None or ("vision" in lm.family.towers and not lm.layout.head):
        raise InputError(
            f"{lm.family.name} does not run on text alone: these roles of heads are defined on "
            "text."
        )
    source.refuse(lm, "the texts said twice, by which these roles are defined, are prompts alone")
    texts, size, notes = _said_twice(lm, repeats, length, seed)
    patterns = (
        capture(lm, texts, "layers.*.attn.pattern").stack("layers.*.attn.pattern").float().cpu()
    )
    score = torch.stack([repeated_roles(pattern, size) for pattern in patterns])
    chance = uniform(patterns.shape[-1], lm.family.towers[""].causal)
    null = repeated_roles(chance, size).expand_as(score)
    on_prompts = torch.full((2, *score.shape[:2], 2), torch.nan)
    coords: dict[str, Any] = {"layer": list(range(len(score))), "head": list(range(score.shape[1]))}
    if lm.family.towers[""].residual == "post-norm" or len(lm.layout.head) != 1:
        notes.append(
            f"No copying, no name_mover: {lm.family.name}'s logits are not linear in what heads "
            "write."
        )
    elif lm.layout.gated:
        notes.append(
            f"No copying, no name_mover: a gate stands between {lm.family.name}'s values and what "
            "heads write."
        )
    else:
        wanted = target(
            lm, batch, answer, foil, single="it is what heads write on one token's logit"
        )
        on_prompts = _on_prompts(lm, batch, wanted)
        notes += wanted.notes
        coords |= wanted.coords
    axes = ("layer", "head", "role")
    return dataset(
        {
            "score": (axes, torch.cat([score, on_prompts[0]], 2)),
            "null": (axes, torch.cat([null, on_prompts[1]], 2)),
        },
        method="heads.roles",
        provenance=lm.provenance,
        settings={"repeats": repeats, "length": size},
        seed=seed,
        coords=coords | {"role": list(DEFINITIONS)},
        notes=" ".join(notes),
        **{f"definition_{role}": text for role, text in DEFINITIONS.items()},
    )


def _said_twice(
    lm: LM, repeats: int, length: int, seed: int
) -> tuple[list[list[int]], int, list[str]]:
    """Random texts, each said twice after the token that prompts start with; their length;
    notes."""
    known, start = lm.dims.vocab, before(lm)
    if lm.tokenizer is not None:
        known = min(known, len(lm.tokenizer))
    words = np.setdiff1d(np.arange(known), _special(lm))
    context = getattr(lm.layout.config(), "max_position_embeddings", None) or 10**9
    size = min(length, len(words), (context - len(start)) // 2)
    if size < 2 or repeats < 1:
        raise InputError(
            f"repeats={repeats}, length={length}: at least 1 text of 2 words; room for {size}."
        )
    generator = np.random.default_rng(seed)
    # no word twice
    texts = [generator.choice(words, size, replace=False).tolist() for _ in range(repeats)]
    notes = (
        [f"Random texts have {size} words, not {length}: no more fit this model."]
        if size < length
        else []
    )
    return [[*start, *text, *text] for text in texts], size, notes


def _special(lm: LM) -> list[int]:
    """Ids that stand for no word."""
    keys = [f"{name}_token_id" for name in ("bos", "eos", "pad", "cls", "sep", "image")] + [
        "image_token_index"
    ]
    ids = {
        getattr(config, key, None)
        for config in (lm.layout.config(), lm.model.config)
        for key in keys
    }
    if lm.tokenizer is not None:
        ids |= {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
    return sorted(i for i in ids if isinstance(i, int))


def _on_prompts(lm: LM, batch: Batch, wanted: Target) -> Float[Tensor, "kind=2 layer head role=2"]:
    """Score and null of copying, over words, and of name_mover, over examples that hold the
    answer."""
    final = f"layers.{lm.dims.layers - 1}.resid_post"
    values = capture(lm, batch, "layers.*.attn.v")
    sites = ("layers.*.attn.pattern", "layers.*.attn.z", final)
    ends = capture(lm, batch, *sites, positions=lm.readout.place(batch))
    norm, unembed = final_norm(lm, ends[final]), lm.weight("logits").float()
    towards = unembed[wanted.answer] - unembed[wanted.foil]
    named = torch.eq(batch.ids, wanted.answer.to(batch.ids.device)[:, None])
    plain = torch.isin(batch.ids, torch.tensor(_special(lm), device=batch.ids.device), invert=True)
    word = plain.logical_and(batch.mask)
    own = batch.ids.masked_select(word)
    scores = []
    for layer in range(lm.dims.layers):
        at = f"layers.{layer}.attn"
        out = _written(lm, layer, values[f"{at}.v"], ends[f"{at}.z"], norm)
        copy = copied(out[word], unembed, own, TOP)
        carried = ends[f"{at}.pattern"].transpose(1, 2) * torch.einsum("ephd,ed->eph", out, towards)
        moves = [
            moved(x[real], n[real])
            for x, n, real in zip(carried, named, batch.mask)
            if n[real].any()
        ]
        move = torch.stack(moves).mean(dim=0) if moves else torch.full_like(copy, torch.nan)
        scores.append(torch.stack([copy, move], dim=-1))
    return torch.stack(scores, dim=1).float().cpu()


def _written(
    lm: LM, layer: int, v: Tensor, z: Tensor, norm: FrozenNorm
) -> Float[Tensor, "example position head dim"]:
    """What each query head would write if it read one position alone, through the norms that
    follow; in float32."""
    [site] = lm.layout.resolve(f"layers.{layer}.attn.out")
    # head h reads key/value head h // group
    v = v.repeat_interleave(lm.dims.heads // v.shape[2], dim=2)
    out = torch.einsum(
        "ephk,dhk->ephd", v.float(), lm.weight(site).float().unflatten(1, (lm.dims.heads, -1))
    )
    for frozen in [*post_norms(lm, site, z.flatten(1)), norm]:
        out = replace(frozen, scale=frozen.scale[:, None, None]).linear(out)
    return out
