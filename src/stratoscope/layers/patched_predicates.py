"""Patched predicates: what the model writes of the state that a claim leaves at each depth.

Paper: latent-knowledge-graph

    s[depth]    = sum of resid[depth, token] over the last tokens of the claim's words
    text[depth] = what is generated after `into`, with s[depth] in place of the embedding of its
                  placeholder, in the first forward pass only

`into` is a prompt that asks for facts about a claim in the form Name(argument, argument), with
worked examples; the claim itself stands in it as one made-up word. Later passes find what that word
left in the cache. Which words count may be given: the paper takes nouns, names and verbs.

null_random: random vectors of the same length in place of s; null_other: the states of the next
claim, by which what the model writes whatever it is given is told from what it reads.
Reads as: what the state holds, in the basis of the embeddings. Does not show that the model uses
it; a small model repeats its worked examples (`layers.knowledge_graph` counts them). Ask first what
it writes of the plain claim.
Cost: for each depth one generation for all claims, three with the nulls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.generate import generate
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset

CLAIM = "[claim]"
INTO = """Say whether each claim is true, and list facts about it as predicates.

Claim: The Nile flows through Egypt
Label: true
Facts: IsRiver(Nile), FlowsThrough(Nile, Egypt)

Claim: Mozart wrote Hamlet
Label: false
Facts: IsComposer(Mozart), AuthorOf(Hamlet, Shakespeare), ¬AuthorOf(Hamlet, Mozart)

Claim: Whales are mammals
Label: true
Facts: IsMammal(Whale), LivesIn(Whale, Sea)

Claim: [claim]
Label:"""
SITES = ("layers.0.resid_pre", "layers.*.resid_post")


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    depths: Sequence[int] | None = None,
    words: Sequence[Sequence[str]] | None = None,
    into: str | Sequence[int] = INTO,
    pool: Literal["sum", "mean"] = "sum",
    new: int = 48,
    nulls: bool = True,
    seed: int = 0,
) -> xr.Dataset:
    """text, null_random_text, null_other_text (example, depth): what is generated; plain_text
    (example): of the claim as it is, in words.

    inputs: claims. depths: layers passed, default all. words: for each claim those whose last
    tokens are summed, default all. into: the prompt, with `[claim]` once; or its ids, with -1
    there. pool: of the tokens' states. new: tokens. nulls: off, these are "". seed: of the random
    vectors. Raises InputError for a depth, a word or a placeholder that is not there, SiteError for
    a model that cannot generate.
    """
    if not lm.model.can_generate() or not lm.family.towers[""].causal:
        raise SiteError(f"{lm.family.name} does not go on from a text: it has nothing to write.")
    batch = lm.batch(inputs)
    chosen = list(range(lm.dims.layers + 1)) if depths is None else list(depths)
    if not chosen or not all(0 <= depth <= lm.dims.layers for depth in chosen):
        raise InputError(f"depths={depths}: choose among 0 to {lm.dims.layers}, at least one.")
    ids, place = _asked(lm, into)
    capture(lm, batch, "logits", positions=-1)  # what writes must be numbers as well
    read = states(lm, batch, words, pool)
    generator = torch.Generator().manual_seed(seed)
    said: dict[str, list[list[str]]] = {"text": [], "null_random_text": [], "null_other_text": []}
    for depth in chosen:
        own = read[depth]
        noise = torch.randn(len(own), own.shape[1], generator=generator).to(own)
        random = noise * (own.norm(dim=1) / noise.norm(dim=1))[:, None]
        given = {"text": own}
        if nulls:
            given |= {"null_random_text": random, "null_other_text": own.roll(-1, dims=0)}
        for name, vectors in given.items():
            said[name].append(write(lm, ids, place, vectors, new))
    axes, empty = ("example", "depth"), [[""] * len(batch)] * len(chosen)
    arrays = {
        name: (axes, [list(row) for row in zip(*(rows or empty))]) for name, rows in said.items()
    }
    return dataset(
        arrays | {"plain_text": (("example",), _plain(lm, batch, ids, place, new))},
        method="layers.patched_predicates",
        provenance=lm.provenance,
        settings={"into": into if isinstance(into, str) else list(into), "pool": pool, "new": new},
        seed=seed,
        coords={"depth": chosen, "example_text": batch.coords()["example_text"]},
    )


def write(
    lm: LM, ids: Sequence[int], place: int, vectors: Float[Tensor, "example dim"], new: int
) -> list[str]:
    """What follows the prompt with each vector in place of the token at `place`, in the first pass
    alone."""
    change = replaced("layers.0.resid_pre", vectors[:, None], positions=place, steps=[0])
    with intervene(lm, change):
        return _texts(lm, generate(lm, [list(ids)] * len(vectors), tokens=new))


def states(
    lm: LM, inputs: Any, words: Sequence[Sequence[str]] | None = None, pool: str = "sum"
) -> Float[Tensor, "depth example dim"]:
    """The sum, or mean, of the states of the last tokens of words, at every depth."""
    if pool not in ("sum", "mean"):
        raise InputError(f"pool={pool!r}: choose 'sum' or 'mean'.")
    batch = lm.batch(inputs)
    ends = _ends(lm, batch, words)
    seen = capture(lm, batch, *SITES)
    depths = torch.cat([seen[SITES[0]][None], seen.stack(SITES[1])])
    weight = depths.new_zeros(depths.shape[1:3])
    for row, own in zip(weight, ends):
        row[own] = 1 if pool == "sum" else 1 / len(own)
    return torch.einsum("ndpf,dp->ndf", depths, weight)


def _asked(lm: LM, into: str | Sequence[int]) -> tuple[list[int], int]:
    """The prompt's ids, and where the claim's one token stands in them."""
    if not isinstance(into, str):
        ids = list(into)
        if ids.count(-1) != 1:
            raise InputError(
                f"`into` has {ids.count(-1)} ids -1: the claim's place is the one there is."
            )
        place = ids.index(-1)
        return [*ids[:place], 0, *ids[place + 1 :]], place
    if into.count(CLAIM) != 1:
        raise InputError(
            f"`into` has {into.count(CLAIM)} times {CLAIM!r}: write it once, as a word."
        )
    if lm.tokenizer is None:
        raise InputError("`into` is a text, and this model has no tokenizer: give its ids.")
    before, after = into.split(CLAIM)
    head = lm.batch(before.rstrip(" ")).text[0][0].tolist()
    read = lambda text: lm.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return [*head, read(" x")[-1], *read(after)], len(head)


def _ends(lm: LM, batch: Batch, words: Sequence[Sequence[str]] | None) -> list[list[int]]:
    """The last token of each word, or of these words, of each claim."""
    if words is not None and len(words) != len(batch):
        raise InputError(f"words of {len(words)} claims for {len(batch)}: a list for each claim.")
    mask = batch.text[1]
    ends = []
    for number, real in enumerate(mask.tolist()):
        n = sum(real)
        if lm.tokenizer is None:  # nothing says where a word ends
            ends.append(list(range(n)))
            continue
        row = batch.tokens[number][:n]
        row = [f" {token}" for token in row] if batch.words else row
        owner = [at for at, token in enumerate(row) for _ in token]
        found = [(m[0], owner[m.end() - 1]) for m in re.finditer(r"\w+", "".join(row))]
        if words is not None:
            wanted = {part for word in words[number] for part in re.findall(r"\w+", word)}
            if missing := wanted - {word for word, _ in found}:
                raise InputError(f"words {sorted(missing)} are not in {''.join(row)!r:.80}.")
            found = [(word, at) for word, at in found if word in wanted]
        ends.append(sorted({at for _, at in found}) or list(range(n)))
    return ends


def _plain(lm: LM, batch: Batch, ids: list[int], place: int, new: int) -> list[str]:
    rows = [row[real].tolist() for row, real in zip(*batch.text)]
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    rows = [row[1:] if len(row) > 1 and row[0] == bos else row for row in rows]
    return _texts(
        lm, generate(lm, [[*ids[:place], *row, *ids[place + 1 :]] for row in rows], tokens=new)
    )


def _texts(lm: LM, new: Sequence[Tensor]) -> list[str]:
    if lm.tokenizer is None:
        return [" ".join(map(str, row.tolist())) for row in new]
    return [lm.tokenizer.decode(row, skip_special_tokens=True) for row in new]
