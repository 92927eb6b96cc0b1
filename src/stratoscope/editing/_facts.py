"""Facts as people write them, read as token ids: what is asked, where the subject ends, and what is
to be said.

    {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome",
     "target_true": "Paris", "paraphrases": [...], "neighbours": [...]}

`{}` stands for the subject, which may stand in the prompt itself too. Without a tokenizer all of
these are token ids. A target that does not begin with a space gets one, as in EasyEdit; ids are
taken as they are. `essence`: the prompt after which nothing is to change, "{} is a" unless given
(without a tokenizer the subject alone).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from stratoscope.engine import outside
from stratoscope.engine.generate import generate
from stratoscope.engine.metric import tokens_of
from stratoscope.errors import InputError, SiteError
from stratoscope.models import source
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text

FIELDS = (
    "prompt",
    "subject",
    "target_new",
    "target_true",
    "paraphrases",
    "neighbours",
    "essence",
)
OPENINGS = ("The", "Therefore", "Because", "I", "You")  # what the model goes on with, for contexts
ESSENCE = "{} is a"  # what the subject is, it is to stay

Text = str | Sequence[int]
Fact = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A fact as an edit needs it.

    rows: the prompt in every context, the bare one first; ends: where the subject's last token
    stands in each. target: what is to follow. essence, essence_end: the prompt after which nothing
    is to change, and where the subject ends in it. said: the fact in words.
    """

    rows: list[list[int]]
    ends: list[int]
    target: list[int]
    essence: list[int]
    essence_end: int
    said: str


def refuse(lm: LM) -> None:
    """Raise SiteError for a model that no fact can be asked of."""
    if not lm.family.towers[""].causal or not lm.family.reads_text or not lm.layout.head:
        raise SiteError(
            f"{lm.family.name} does not predict the next token of a text: no fact can be asked of "
            "it by a prompt."
        )
    source.refuse(lm, "a fact is asked by one text that the model goes on with")


def facts(request: Any, needs: Sequence[str]) -> list[Fact]:
    """One fact or several, each a table or its JSON, with the fields that are needed. Raises
    InputError."""
    rows = [request] if isinstance(request, Mapping | str) else request
    if isinstance(rows, Sequence):
        rows = [_read(row) if isinstance(row, str) else row for row in rows]
    if not isinstance(rows, Sequence) or not rows:
        raise InputError(
            f"a fact was expected, or a list of them, and this is {request!r:.80}: give "
            '{"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}.'
        )
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"fact {number} is {row!r:.80}: give a table with {', '.join(needs)}.")
        for name in row.keys() - set(FIELDS):
            near = get_close_matches(str(name), FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FIELDS)}."
            raise InputError(f"fact {number} has a field {name!r}, which no fact has: {hint}")
        if missing := [name for name in needs if row.get(name) is None]:
            raise InputError(f"fact {number} has no {' and no '.join(missing)}: it is needed here.")
    return list(rows)


def spoken(fact: Fact) -> Text:
    """The prompt with the subject in its place."""
    prompt, subject = fact["prompt"], fact.get("subject")
    if not isinstance(prompt, str) or "{}" not in prompt:
        return prompt
    if not isinstance(subject, str):
        raise InputError(f"{prompt!r} has a place for a subject, and no subject is given as text.")
    return prompt.replace("{}", subject)


def asked(lm: LM, fact: Fact, prefix: Text = "") -> tuple[list[int], int]:
    """The ids of the prompt behind a prefix, and the position of the subject's last token.

    Raises InputError where the subject is not in the prompt, or there more than once, or where no
    token ends with it.
    """
    prompt, subject, whole = fact["prompt"], fact["subject"], spoken(fact)
    if not isinstance(whole, str):
        return _among_ids(list(whole), subject, [] if isinstance(prefix, str) else list(prefix))
    if not isinstance(subject, str) or not subject.strip():
        raise InputError(f"the subject of {whole!r} is {subject!r}: give its name, as text.")
    times = prompt.count("{}") or prompt.count(subject)
    if times != 1:
        raise InputError(
            f"the subject {subject!r} stands {times} times in the prompt {prompt!r}: it must stand "
            "there once, spelt alike, or as {}."
        )
    lead = f"{prefix.rstrip()} " if isinstance(prefix, str) and prefix else ""
    start = prompt.index("{}") if "{}" in prompt else prompt.index(subject)
    text = lead + whole
    row, head = ids_of(lm, text), ids_of(lm, text[: len(lead) + start + len(subject)])
    if row[: len(head)] != head:
        joined = next((i for i, (a, b) in enumerate(zip(row, head)) if a != b), len(row) - 1)
        raise InputError(
            f"the tokenizer reads the end of the subject {subject!r} together with what follows it "
            f"in {text!r} (token {joined}, {token_text(lm.tokenizer, row[joined])!r}), so no token "
            "is the subject's last: put a space or another word behind it, or a longer subject."
        )
    return row, len(head) - 1


def following(lm: LM, prompt: Text, target: Text | int, what: str) -> list[int]:
    """The ids of a target as it follows a prompt. Raises InputError for an empty one."""
    target = [target] if isinstance(target, int) else target
    if not len(target) or (isinstance(target, str) and not target.strip()):
        raise InputError(f"{what} is empty ({target!r}): say what is to follow {prompt!r:.80}.")
    if not isinstance(target, str):
        if wrong := [i for i in target if not 0 <= i < lm.readout.size]:
            raise InputError(f"{what} has the id {wrong[0]}; there are {lm.readout.size} tokens.")
        return list(target)
    if not isinstance(prompt, str):
        return tokens_of(lm, target, what)
    space = "" if target[0].isspace() or prompt[-1:].isspace() else " "
    begun, whole = ids_of(lm, prompt), ids_of(lm, prompt + space + target)
    if whole[: len(begun)] != begun or len(whole) == len(begun):
        raise InputError(
            f"the tokenizer reads the end of the prompt {prompt!r} together with {what} "
            f"{target!r}: leave out the space at the prompt's end, or end it with a whole word."
        )
    return whole[len(begun) :]


def ids_of(lm: LM, text: Text) -> list[int]:
    """The ids of one text, as the model is given them."""
    ids, mask = lm.batch(text if isinstance(text, str) else [list(text)]).text
    return ids[0][mask[0]].tolist()


def contexts(lm: LM, given: Sequence[Text] | None) -> list[Text]:
    """What stands before the prompt in each context: first nothing, then what is given, or how the
    model itself goes on from a few openings (nothing more without a tokenizer)."""
    if given is not None:
        return ["", *given]
    if lm.tokenizer is None or not lm.model.can_generate():
        return [""]
    with outside.unheard(lm):
        ends = generate(lm, list(OPENINGS), tokens=10)
    whole = [[*ids_of(lm, opening), *end.tolist()] for opening, end in zip(OPENINGS, ends)]
    return ["", *(f"{lm.tokenizer.decode(ids, skip_special_tokens=True)}." for ids in whole)]


def question(lm: LM, fact: Fact, before: Sequence[Text]) -> Question:
    """A fact in all its contexts. Raises InputError."""
    rows, ends = zip(*(asked(lm, fact, prefix) for prefix in before))
    subject = fact["subject"]
    own = ESSENCE if isinstance(subject, str) else subject
    essence, end = asked(lm, {"prompt": fact.get("essence", own), "subject": subject})
    target = following(lm, spoken(fact), fact["target_new"], "target_new")
    said = f"{spoken(fact)!s} -> {fact['target_new']!s}"
    return Question(list(rows), list(ends), target, essence, end, said)


def _read(text: str) -> Any:
    """What JSON says; the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _among_ids(prompt: list[int], subject: Any, prefix: list[int]) -> tuple[list[int], int]:
    if isinstance(subject, str) or not len(subject):
        raise InputError(f"the prompt is token ids, and the subject {subject!r}: give its ids.")
    size = len(subject)
    starts = [i for i in range(len(prompt)) if prompt[i : i + size] == list(subject)]
    if len(starts) != 1:
        raise InputError(
            f"the subject {list(subject)} stands {len(starts)} times in the prompt {prompt}: it "
            "must stand there once."
        )
    return [*prefix, *prompt], len(prefix) + starts[0] + size - 1
