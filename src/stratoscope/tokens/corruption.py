"""A corrupt prompt made by itself: the tokens that matter most, exchanged for others of their kind.

Paper: textbook (symmetric token replacement: Zhang and Nanda, "Towards Best Practices of Activation
Patching", 2024)

    corrupt = argmin over draws of  d(prompt with k important tokens <- random tokens of their kind)

d is the logit difference answer - foil; importance is occlusion; a token's kind is its
neighbourhood in embedding space among tokens that are written alike, in the same script and of the
same class (`engine.kinds`). k grows from 1 until d has changed sign or `most` tokens are changed;
for k = 1 each of the `most` is tried. Function words are exchanged only where there is no other
word. Without a foil, the pair is chosen together: of the answer's likely rivals (`kinds.rivals`)
and the draws, those for which the model is surest of the rival after the draw, so that the prompts
differ in what tells the two words apart. The last token, special tokens and what a chat template
wrote are never exchanged. Length and all other tokens stay, so the pair can be patched token by
token.

Reads as: one prompt near the given one on which the model answers otherwise. Does not show the only
or the smallest such change, and a name exchanged for a name asks another question than a name
exchanged for noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from stratoscope.engine.kinds import kind as kind_of
from stratoscope.engine.kinds import rivals
from stratoscope.engine.metric import Words, last_logits, target
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text
from stratoscope.results import dataset
from stratoscope.tokens import occlusion
from stratoscope.tokens._exchangeable import kinds_of, pool

RIVALS = 24  # foils that are tried together with the corrupt prompt, where none is given


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
    """One corrupt prompt for each prompt, as ids; the coordinates answer and foil say what it is to
    tell apart.

    foil: without one (and with a tokenizer) it is chosen together with the prompt; foil_why says
    so. importance: (example, position), default occlusion. most: how many tokens may change. draws:
    random exchanges tried for each number of tokens. near: how many neighbours count as a token's
    kind. Returns id (example, position;
    -1 at padding), changed, foil_id, clean_difference, corrupt_difference and `how`, a sentence.
    Raises InputError when a prompt has no token that can be exchanged.
    """
    batch = lm.batch(inputs)
    wanted = target(
        lm, batch, answer, foil, single="the corrupt prompt is chosen by its next token"
    )
    if importance is None:
        words = {"answer": wanted.answer.tolist(), "foil": wanted.foil.tolist()}
        importance = occlusion.measure(lm, batch, **words)["attribution"]
    logits, original = last_logits(lm, batch), batch.text[0].cpu()
    rows, lows, foils, whys = torch.full_like(original, -1), [], [], []
    for example in range(len(batch)):
        n = int(batch.lengths[example])
        weight = torch.from_numpy(importance.values[example, :n].copy()).float()
        # alike for every example: its place in a batch must not matter
        generator = torch.Generator().manual_seed(seed)
        word = int(wanted.answer[example])
        free = rivals(lm, logits[example], word, RIVALS) if foil is None else []
        against = torch.tensor(free or [int(wanted.foil[example])])
        best_prompt = _corrupt(
            lm, original[example, :n], weight, word, against, most, draws, near, generator
        )
        rows[example, :n], low, chosen = best_prompt
        lows.append(low)
        foils.append(chosen)
        whys.append(_why(lm, wanted.answer_text[example], chosen, len(free)) if free else "")
    wanted = target(lm, batch, wanted.answer.tolist(), foils)
    changed = (rows != original) & (rows >= 0)
    texts = [_how(lm, batch, rows, changed, e, draws, seed, lows[e]) for e in range(len(batch))]
    corrupt = Batch(
        rows.clamp_min(0), batch.mask.cpu(), {}, tuple(tuple(t) for t in _texts(lm, rows))
    )
    return dataset(
        {
            "id": (("example", "position"), rows),
            "changed": (("example", "position"), changed),
            "foil_id": (("example",), wanted.foil),
            "clean_difference": (("example",), wanted.difference(logits).float()),
            "corrupt_difference": (("example",), torch.tensor(lows)),
            "how": (("example",), texts),
            "foil_why": (("example",), whys),
        },
        method="tokens.corruption",
        provenance=lm.provenance,
        settings={"most": most, "draws": draws, "near": near},
        seed=seed,
        coords=batch.coords()
        | corrupt.coords("position", "corrupt_text")
        | wanted.coords
        | batch.coords(),
        notes=" ".join(wanted.notes),
    )


def _corrupt(
    lm: LM,
    ids: Tensor,
    weight: Tensor,
    answer: int,
    foils: Tensor,
    most: int,
    draws: int,
    near: int,
    generator: torch.Generator,
) -> tuple[Tensor, float, int]:
    """The corrupt ids, the difference there, and the foil of these that it leads to."""
    pools: dict[int, Tensor] = {}  # position -> what may stand there instead
    never = [answer, *(foils.tolist() if len(foils) == 1 else [])]
    kinds, by_weight = kinds_of(lm), weight.argsort(descending=True).tolist()
    for position in sorted(by_weight, key=lambda p: bool((k := kinds[int(ids[p])]) and k.function)):
        if pools and (k := kinds[int(ids[position])]) and k.function:
            break
        if len(pools) < most and len(reached := pool(lm, ids, position, never, near)):
            pools[position] = reached
    if not pools:
        raise InputError(
            "no token of the prompt before the last is a word or a number that could be exchanged: "
            "give a corrupt "
            "prompt (--corrupt)."
        )
    order = list(pools)
    best, least, reached = ids, math.inf, (math.inf, int(foils[0]))
    for places in [[p] for p in order] + [order[:count] for count in range(2, len(order) + 1)]:
        if len(places) > 1 and reached[0] < 0:
            break
        trial = ids.repeat(draws, 1)
        for p in places:
            trial[:, p] = pools[p][torch.randint(len(pools[p]), (draws,), generator=generator)]
        logits = last_logits(lm, trial).float()
        # (draw, foil)
        difference = (logits[:, [answer]] - logits[:, foils.to(logits.device)]).cpu()
        # with one foil the furthest from the answer; of several the one that the model is surest of
        rank = (
            difference
            if len(foils) == 1
            else -logits.log_softmax(dim=-1)[:, foils.to(logits.device)].cpu()
        )
        draw, which = divmod(int(rank.argmin()), len(foils))
        if float(rank[draw, which]) < least:
            best, least = trial[draw], float(rank[draw, which])
            reached = float(difference[draw, which]), int(foils[which])
    return best, *reached


def led_to(lm: LM, corrupt: Any, answer: int) -> int:
    """The foil of a given corrupt prompt: the likeliest token of the answer's kind there, or the
    likeliest other one."""
    logits = last_logits(lm, corrupt)[0]
    candidates = rivals(lm, logits, answer) or [
        t for t in logits.topk(2).indices.tolist() if t != answer
    ]
    return max(candidates, key=lambda token: float(logits[token]))


def _why(lm: LM, answer: str, foil: int, among: int) -> str:
    return (
        f"The foil {token_text(lm.tokenizer, foil)!r} was chosen by itself, together with the "
        "corrupt prompt: like "
        f"{answer!r} a {kind_of(answer)}, and of its {among} likely rivals the one that the model "
        "is surest of after "
        f"the corrupt prompt."
    )


def _texts(lm: LM, rows: Tensor) -> list[list[str]]:
    return [[token_text(lm.tokenizer, i) for i in row if i >= 0] for row in rows.tolist()]


def _how(
    lm: LM,
    batch: Batch,
    rows: Tensor,
    changed: Tensor,
    example: int,
    draws: int,
    seed: int,
    low: float,
) -> str:
    places = changed[example].nonzero()[:, 0].tolist()
    swaps = [
        f"{batch.tokens[example][p].strip()!r} for "
        f"{token_text(lm.tokenizer, int(rows[example, p])).strip()!r}"
        for p in places
    ]
    many = len(places) > 1
    most = (
        f"the {len(places)} tokens that matter most"
        if many
        else "one of the tokens that matter most"
    )
    still = "" if low < 0 else f" The answer still leads there, by {low:.2f} logits."
    return (
        f"Made automatically: {most} by occlusion exchanged for {'others' if many else 'another'} "
        "of the same kind "
        f"and similar embedding ({', '.join(swaps)}), the best of {draws} random draws each (seed "
        f"{seed}).{still}"
    )
