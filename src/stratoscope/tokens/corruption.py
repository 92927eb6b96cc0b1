"""A corrupt prompt made by itself: the tokens that matter most, exchanged for others of their kind.

Paper: textbook (symmetric token replacement: Zhang and Nanda, "Towards Best Practices of Activation Patching", 2024)

    corrupt = argmin over draws of  d(prompt with k important tokens <- random tokens of their kind)

d is the logit difference answer - foil; importance is occlusion; a token's kind is its neighbourhood in embedding space
among tokens that are written alike, in the same script and of the same class (`engine.kinds`). k grows from 1 until d
has changed sign or `most` tokens are changed; for k = 1 each of the `most` is tried. Function words are exchanged only
where there is no other word.
Without a foil, the pair is chosen together: of the answer's likely
rivals (`kinds.rivals`) and the draws, those for which the model is surest of the rival after the draw, so that the
prompts differ in what tells the two words apart. The last token, special tokens and what a chat template wrote are
never exchanged. Length and all other tokens stay, so the pair can be patched token by token.

Reads as: one prompt near the given one on which the model answers otherwise. Does not show the only or the smallest
such change, and a name exchanged for a name asks another question than a name exchanged for noise.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine.kinds import Kind, rivals
from stratoscope.engine.kinds import kind as kind_of
from stratoscope.engine.metric import Words, last_logits, target
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text
from stratoscope.results import dataset
from stratoscope.tokens import occlusion

RIVALS = 24  # foils that are tried together with the corrupt prompt, where none is given


def kind(
    embedding: Float[Tensor, "vocab dim"], token: int, allowed: Bool[Tensor, " vocab"], size: int
) -> Int[Tensor, " near"]:
    """The `size` allowed tokens whose embeddings point most nearly where the token's does, itself left out."""
    others = allowed.clone()
    others[token] = False
    near = torch.cosine_similarity(embedding.float(), embedding[token][None].float(), dim=1)
    return near.masked_fill(~others, -torch.inf).topk(min(size, int(others.sum()))).indices


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
    """One corrupt prompt for each prompt, as ids; the coordinates answer and foil say what it is to tell apart.

    foil: without one (and with a tokenizer) it is chosen together with the prompt; foil_why says so.
    importance: (example, position), default occlusion. most: how many tokens may change. draws: random exchanges
    tried for each number of tokens. near: how many neighbours count as a token's kind. Returns id (example, position;
    -1 at padding), changed, foil_id, clean_difference, corrupt_difference and `how`, a sentence. Raises InputError when a
    prompt has no token that can be exchanged.
    """
    batch = lm.batch(inputs)
    asked = target(lm, batch, answer, foil)
    if importance is None:
        words = {"answer": asked.answer.tolist(), "foil": asked.foil.tolist()}
        importance = occlusion.measure(lm, batch, **words)["attribution"]
    original = batch.text[0].cpu()
    rows, lows, foils, whys = torch.full_like(original, -1), [], [], []
    logits = last_logits(lm, batch)
    for example in range(len(batch)):
        n = int(batch.lengths[example])
        weight = torch.from_numpy(importance.values[example, :n].copy()).float()
        generator = torch.Generator().manual_seed(seed)  # alike for every example: its place in a batch must not matter
        word = int(asked.answer[example])
        free = rivals(lm, logits[example], word, RIVALS) if foil is None else []
        against = torch.tensor(free or [int(asked.foil[example])])
        ids, low, chosen = _corrupt(lm, original[example, :n], weight, word, against, most, draws, near, generator)
        rows[example, :n] = ids
        lows.append(low)
        foils.append(chosen)
        whys.append(_why(lm, asked.answer_text[example], chosen, len(free)) if free else "")
    asked = target(lm, batch, asked.answer.tolist(), foils)
    changed = (rows != original) & (rows >= 0)
    told = [_how(lm, batch, rows, changed, e, draws, seed) for e in range(len(batch))]
    told = [t if low < 0 else f"{t} The answer still leads there, by {low:.2f} logits." for t, low in zip(told, lows)]
    corrupt = Batch(rows.clamp_min(0), batch.mask.cpu(), {}, tuple(tuple(t) for t in _texts(lm, rows)))
    return dataset(
        {
            "id": (("example", "position"), rows),
            "changed": (("example", "position"), changed),
            "foil_id": (("example",), asked.foil),
            "clean_difference": (("example",), asked.difference(logits).float()),
            "corrupt_difference": (("example",), torch.tensor(lows)),
            "how": (("example",), told),
            "foil_why": (("example",), whys),
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
        if len(pools) < most and len(found := _pool(lm, ids, position, never, near)):
            pools[position] = found
    if not pools:
        raise InputError(
            "no token of the prompt before the last is a word or a number that could be exchanged: give a corrupt "
            "prompt (--corrupt)."
        )
    order = list(pools)
    best, least, found = ids, math.inf, (math.inf, int(foils[0]))
    for places in [[p] for p in order] + [order[:count] for count in range(2, len(order) + 1)]:
        if len(places) > 1 and found[0] < 0:
            break
        trial = ids.repeat(draws, 1)
        for p in places:
            trial[:, p] = pools[p][torch.randint(len(pools[p]), (draws,), generator=generator)]
        logits = last_logits(lm, trial).float()
        difference = (logits[:, [answer]] - logits[:, foils.to(logits.device)]).cpu()  # (draw, foil)
        # with one foil the furthest from the answer; of several the one that the model is surest of
        rank = difference if len(foils) == 1 else -logits.log_softmax(dim=-1)[:, foils.to(logits.device)].cpu()
        draw, which = divmod(int(rank.argmin()), len(foils))
        if float(rank[draw, which]) < least:
            best, least = trial[draw], float(rank[draw, which])
            found = float(difference[draw, which]), int(foils[which])
    return best, *found


def led_to(lm: LM, corrupt: Any, answer: int) -> int:
    """The foil of a given corrupt prompt: the likeliest token of the answer's kind there, or the likeliest other one."""
    logits = last_logits(lm, corrupt)[0]
    found = rivals(lm, logits, answer) or [t for t in logits.topk(2).indices.tolist() if t != answer]
    return max(found, key=lambda token: float(logits[token]))


def _why(lm: LM, answer: str, foil: int, among: int) -> str:
    return (
        f"The foil {token_text(lm.tokenizer, foil)!r} was chosen by itself, together with the corrupt prompt: like "
        f"{answer!r} a {kind_of(answer)}, and of its {among} likely rivals the one that the model is surest of after "
        f"the corrupt prompt."
    )


def _pool(lm: LM, ids: Tensor, position: int, never: list[int], near: int) -> Tensor:
    """The ids that may be put at a position: of its token's kind; none where nothing may be exchanged."""
    kinds, word = kinds_of(lm), int(ids[position])
    none = torch.empty(0, dtype=torch.long)
    if position == len(ids) - 1 or kinds[word] is None or position in _template(lm, ids.tolist()):
        return none
    embedding = lm.weight("embed").detach()
    allowed = torch.tensor([kind == kinds[word] for kind in kinds])
    allowed[never] = False
    return kind(embedding, word, allowed.to(embedding.device), near).cpu()


def kinds_of(lm: LM) -> list[Kind | None]:
    """The kind of every token id; None for what is no word and no number, and for special tokens."""
    if lm.tokenizer is None:
        return [None] * lm.dims.vocab
    if lm.tokenizer not in _KINDS:
        special = {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
        every = [None if i in special else kind_of(token_text(lm.tokenizer, i)) for i in range(lm.dims.vocab)]
        _KINDS[lm.tokenizer] = [k if k and k.signs in ("letters", "digits") else None for k in every]
    return _KINDS[lm.tokenizer]


_KINDS: WeakKeyDictionary[Any, list[Kind | None]] = WeakKeyDictionary()


def _template(lm: LM, ids: list[int]) -> set[int]:
    """The positions that a chat template wrote: what every conversation opens and ends with, and names of roles."""
    tokenizer = lm.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return set()
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    marks = [n for n, i in enumerate(ids) if i in special and i != tokenizer.bos_token_id]
    if not marks:
        return set()
    said = [{"role": "user", "content": "x"}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    usual = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = next((n for n, (a, b) in enumerate(zip(ids, usual)) if a != b), len(ids))
    end = next((n for n, (a, b) in enumerate(zip(ids[::-1], usual[::-1])) if a != b), len(ids))
    found = {*range(start), *range(len(ids) - end, len(ids))}
    for mark in marks:  # a role stands between a special token and the end of its line
        rest = range(mark + 1, len(ids))
        stop = next((n for n in rest if ids[n] in special or "\n" in token_text(tokenizer, ids[n])), len(ids))
        found |= set(range(mark, stop)) if stop - mark <= 4 else {mark}
    return found


def _texts(lm: LM, rows: Tensor) -> list[list[str]]:
    return [[token_text(lm.tokenizer, i) for i in row if i >= 0] for row in rows.tolist()]


def _how(lm: LM, batch: Batch, rows: Tensor, changed: Tensor, example: int, draws: int, seed: int) -> str:
    places = changed[example].nonzero()[:, 0].tolist()
    swaps = [
        f"{batch.tokens[example][p].strip()!r} for {token_text(lm.tokenizer, int(rows[example, p])).strip()!r}"
        for p in places
    ]
    many = len(places) > 1
    most = f"the {len(places)} tokens that matter most" if many else "one of the tokens that matter most"
    return (
        f"Made automatically: {most} by occlusion exchanged for {'others' if many else 'another'} of the same kind "
        f"and similar embedding ({', '.join(swaps)}), the best of {draws} random draws each (seed {seed})."
    )
