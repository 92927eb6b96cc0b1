"""An interrupted scoring goes on where it stopped, and ends in the very numbers of an unbroken
one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import xarray as xr
from tokenizers import Tokenizer, models, pre_tokenizers

import stratoscope
from stratoscope.benchmarks import Item, _resume, controls, likelihood
from stratoscope.editing import clamp
from stratoscope.engine import resume as files
from stratoscope.errors import InputError, ResultError
from stratoscope.models.lm import LM

ITEMS = [
    Item("w1 w2 w3", ("w4", "w5", "w6 w7"), 0, "a", "one"),
    Item("w9", ("w8 w1 w3", "w8 w1", "w8 w2 w3 w4"), 1, "a", "alike"),
    Item("", ("w3 w4 w5 w6", "w3 w4 w7 w6"), 0, "b", "whole texts"),
    Item("w1 w2 w3 w1 w2 w3 w5 w8 w9", ("w1", "w2"), 1, "b", "single"),
    Item("w7 w7", ("w1 w1", "w2 w3 w4 w9 w9"), 0, "b", "different"),
]
CHOICES = sum(len(item.choices) for item in ITEMS)
SMALL = {"batch_tokens": 12}  # several passes, some of several items


def subject(seed: int = 0) -> LM:
    torch.manual_seed(seed)
    words = {"<s>": 0} | {f"w{i}": i for i in range(1, 20)}
    whole = Tokenizer(models.WordLevel(words))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", pad_token="<s>")
    config = hf.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return stratoscope.wrap(hf.LlamaForCausalLM(config).eval(), tokenizer)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often a model is called inside."""
    calls, forward = [0], hf.LlamaForCausalLM.forward

    @functools.wraps(forward)
    def counting(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return forward(*args, **options)

    hf.LlamaForCausalLM.forward = counting
    try:
        yield calls
    finally:
        hf.LlamaForCausalLM.forward = forward


def trials(normalise: str) -> list[int]:
    """Calls that find out whether beginnings can be shared, of each half."""
    lm, numbers = subject(), []
    bare = [replace(item, context="") for item in ITEMS]
    for items in (ITEMS, bare) if normalise == "blind" else (ITEMS,):
        groups = [likelihood._choices(lm, item) for item in items]
        with counted() as calls, torch.no_grad():
            assert likelihood._can_share(lm, groups)
        numbers += calls
    return numbers


def until(number: int, seen: list[int]) -> Any:
    """A progress that is interrupted at its call of this number, from 1; 0: never."""

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == number:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("normalise", ["sum", "blind"])
@pytest.mark.parametrize("shared", [True, False])
def test_killed_anywhere_it_goes_on(shared: bool, normalise: str, tmp_path: Path) -> None:
    """Nothing finished is run again, and nothing is missing."""
    settings = {"shared_prefix": shared, "normalise": normalise, **SMALL}
    first, second, unbroken_progress = subject(), subject(), []
    with counted() as unbroken:
        expected = likelihood.score(
            first, ITEMS, progress=lambda *done: unbroken_progress.append(done), **settings
        )
    total = CHOICES * (2 if normalise == "blind" else 1)
    every = [done for done, _ in unbroken_progress]
    assert len(every) > 4
    assert unbroken_progress == [(done, total) for done in every]
    assert every[-1] == total
    again = trials(normalise) if shared else [0]
    for number in range(1, len(every)):
        file, before, after = tmp_path / f"{number}.part", [], []
        with counted() as calls:
            with pytest.raises(KeyboardInterrupt):
                likelihood.score(
                    first, ITEMS, save=file, progress=until(number, before), **settings
                )
            result = likelihood.score(
                second, ITEMS, save=file, progress=until(0, after), **settings
            )
        xr.testing.assert_identical(result, expected)
        assert before == every[:number]
        assert after[0] == min(before[-1], CHOICES)  # the first file's, then the second's
        assert after == sorted(set(after))
        assert after[-1] == total
        halves = 1 + (before[-1] > CHOICES)  # how many had begun
        assert calls[0] == unbroken[0] + sum(again[:halves])


def test_finished_passes_are_in_the_file_as_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a kill, which writes no more: here at once, and else once a second."""
    seconds = iter(range(0, 10_000, 2))
    monkeypatch.setattr(_resume.time, "monotonic", lambda: float(next(seconds)))
    lm, file, counts = subject(), tmp_path / "scores.part", []

    def progress(done: int, total: int) -> None:
        saved, _ = files.files.read(file, kind="sweep")
        counts.append((done, int((~saved["result"].isnan()).sum())))

    likelihood.score(lm, ITEMS, save=file, progress=progress, **SMALL)
    assert len(counts) > 4
    assert all(done == written for done, written in counts)


def test_a_finished_file_is_read_and_nothing_run(tmp_path: Path) -> None:
    lm, file, options = subject(), tmp_path / "scores.part", {"shared_prefix": False, **SMALL}
    first = likelihood.score(lm, ITEMS, save=file, normalise="blind", **options)
    with counted() as calls:
        again = likelihood.score(lm, ITEMS, save=file, normalise="blind", **options)
        tokens = likelihood.score(lm, ITEMS, save=file, normalise="tokens", **options)
    assert calls == [0]
    xr.testing.assert_identical(again, first)
    expected = likelihood.score(lm, ITEMS, normalise="tokens", **options)
    xr.testing.assert_identical(tokens, expected)


def test_the_control_takes_what_blind_has(tmp_path: Path) -> None:
    lm, file = subject(), tmp_path / "scores.part"
    likelihood.score(lm, ITEMS, save=file, normalise="blind")
    seen: list[tuple[int, int]] = []
    beside = controls.score(
        lm, ITEMS, save=file, normalise="blind", progress=lambda *done: seen.append(done)
    )
    assert seen == [(CHOICES, CHOICES)]  # read, and nothing after
    np.testing.assert_array_equal(beside["right"], controls.score(lm, ITEMS)["right"])


def test_a_file_of_another_question_is_refused(tmp_path: Path) -> None:
    lm, file = subject(), tmp_path / "scores.part"
    with suppress(KeyboardInterrupt):
        likelihood.score(lm, ITEMS, save=file, progress=until(2, []), **SMALL)
    content = file.read_bytes()
    words = "does not hold the beginning of these scores.*delete it"
    with pytest.raises(ResultError, match=words):
        likelihood.score(lm, ITEMS[1:], save=file, **SMALL)
    with pytest.raises(ResultError, match=words):
        likelihood.score(
            lm, [replace(ITEMS[0], context="w1 w2 w4"), *ITEMS[1:]], save=file, **SMALL
        )
    with pytest.raises(ResultError, match=words):
        likelihood.score(subject(1), ITEMS, save=file, **SMALL)
    with pytest.raises(ResultError, match=words), clamp.edit(lm, [(1, 3)], value=5.0):
        likelihood.score(lm, ITEMS, save=file, **SMALL)
    with pytest.raises(ResultError, match=words):
        likelihood.score(lm, ITEMS, save=file)  # other passes
    with pytest.raises(ResultError, match=words):
        likelihood.score(lm, ITEMS, save=file, shared_prefix=False, **SMALL)
    assert file.read_bytes() == content
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ResultError, match="or something else"):
        likelihood.score(lm, ITEMS, save=file, **SMALL)
    with pytest.raises(ResultError, match="cannot be written"):
        likelihood.score(lm, ITEMS, save=tmp_path / "absent" / "scores.part", **SMALL)
    with pytest.raises(InputError, match="choose one of sum"):
        likelihood.score(lm, ITEMS, normalise="mean")
