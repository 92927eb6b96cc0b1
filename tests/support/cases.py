"""The subjects of the contract suite, and how a verb is called on one: by its method's EXAMPLE.

`EXAMPLE` stands in the method's own test, `tests/ROOM/test_NAME.py`: for each verb of the method
the keyword arguments of a call, or a function of the `Case` that returns them. What is not given
is the case's own prompts:

    EXAMPLE = {
        "measure": lambda case: {"corrupt": case.corrupt, "answer": case.answer},
        "edit": {"request": [(0, 1)]},
    }
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as hf
import xarray as xr
from torch import Tensor

from stratoscope import catalogue
from stratoscope.errors import FamilyError, InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from support import skips, tiny

TESTS = Path(__file__).parents[1]
DEFAULT = ("planted", "llama", "gpt2", "bert", "llava", "vit")
NIGHTLY = ("gemma2", "gpt_neox", "phi3", "opt", "bloom", "mixtral")
SUBJECTS = [*DEFAULT, *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY)]
# a verb that trains may want a text classifier; `measure` and `edit` are not tried on it
FITTED = [*SUBJECTS, "classifier"]
REFUSALS = (SiteError, InputError, FamilyError)
ROWS = ((3, 14, 15, 65, 35, 89), (38, 46, 26, 43))  # two prompts of different length


@dataclass(frozen=True)
class Case:
    """A subject with two prompts, or one of them alone.

    side: where prompts are padded. example: the only one that is given, without padding.
    """

    name: str
    lm: LM
    side: str = "right"
    example: int | None = None

    @property
    def inputs(self) -> Any:
        """The prompts, as a tokenizer or an image processor gives them."""
        return self._given(self.rows, 1)

    @property
    def corrupt(self) -> Any:
        """The same prompts with their words in another order, or other pictures: far enough that
        an effect is not a ratio of roundings."""
        return self._given(self.turned, 2)

    @property
    def answer(self) -> list[int]:
        """What each prompt is asked for."""
        return self._chosen([1, 2] if self.name == "vit" else [7, 8])

    @property
    def foil(self) -> list[int]:
        return self._chosen([3, 4] if self.name == "vit" else [9, 10])

    @property
    def references(self) -> Any:
        """Two prompts that stay the same whichever are measured."""
        return replace(self, example=None, side="right").corrupt

    @cached_property
    def rows(self) -> list[list[int]]:
        """The ids of both prompts; [] for a model of pictures alone."""
        if self.name == "vit":
            return []
        if self.name == "planted":
            story = planted.induction()
            ids = story.tokenizer(story.clean)["input_ids"]
            return [list(ids), list(ids[2:])]
        picture = [1, *[tiny.IMAGE] * 4] if self.name == "llava" else []
        return [picture + list(row) for row in ROWS]

    @property
    def turned(self) -> list[list[int]]:
        """The rows, the first word after the picture moved to the end."""
        start = 5 if self.name == "llava" else 0
        return [row[:start] + row[start + 1 :] + row[start : start + 1] for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        """The positions of each prompt: words, or the patches of a picture and its class token."""
        return self._chosen([len(row) for row in self.rows] or [5, 5])

    def at(self, side: str = "right", example: int | None = None) -> Case:
        return replace(self, side=side, example=example)

    def _chosen(self, both: list[Any]) -> list[Any]:
        return both if self.example is None else [both[self.example]]

    def _given(self, rows: list[list[int]], seed: int) -> Any:
        texts = padded(self._chosen(rows), self.side) if rows else {}
        if self.name not in ("vit", "llava"):
            return self._chosen(rows) if self.example is not None else texts
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return texts | {"pixel_values": torch.stack(self._chosen(list(pixels)))}


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


@cache
def subject(name: str) -> LM:
    if name == "planted":
        story = planted.induction()
        return wrap(story.model, story.tokenizer)
    if name == "classifier":
        torch.manual_seed(0)
        config = hf.BertConfig(**tiny.SMALL, num_labels=3)
        return wrap(hf.BertForSequenceClassification(config).eval())
    return wrap(tiny.model(name))


@cache
def case(name: str) -> Case:
    return Case(name, subject(name))


def own_test(address: str, tests: Path = TESTS) -> Path:
    room, _, name = address.replace(".", "/").rpartition("/")
    return tests / room / f"test_{name}.py"


@cache
def _module(path: Path) -> ModuleType:
    """A test file, imported under the name that pytest gives it."""
    name = ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def declared(address: str, name: str, default: Any) -> Any:
    """What a method's own test says under a name, beside its EXAMPLE."""
    path = own_test(address)
    return getattr(_module(path), name, default) if path.is_file() else default


def example(address: str, verb: str, case: Case | None) -> dict[str, Any]:
    """The arguments of one call. Fails where the method's own test gives no example."""
    path = own_test(address)
    if not path.is_file():
        pytest.fail(f"{address} has no test of its own: write {path.relative_to(TESTS.parent)}")
    given = getattr(_module(path), "EXAMPLE", {}).get(verb)
    if given is None:
        pytest.fail(f"{path.relative_to(TESTS.parent)} has no EXAMPLE of the verb {verb!r}")
    return dict(given if isinstance(given, Mapping) else given(case))


def call(address: str, verb: str, case: Case, **more: Any) -> Any:
    """What the verb gives for its example; data that it does not name are the case's prompts."""
    function = getattr(catalogue.module(address), verb)
    given = {"request" if verb == "edit" else "inputs": case.inputs}
    return function(case.lm, **(given | example(address, verb, case) | more))


def measure(address: str, case: Case) -> xr.Dataset:
    """A measure's result, always as a Dataset."""
    result = call(address, "measure", case)
    assert isinstance(result, (xr.Dataset, xr.DataArray))
    if isinstance(result, xr.Dataset):
        return result
    return result.to_dataset(name=result.name, promote_attrs=True)


OUTCOMES: dict[tuple[str, str, str], str] = {}  # (address, verb, subject) -> "yes", or why not


def attempt(address: str, verb: str, name: str, **more: Any) -> Any:
    """What the verb gives on a subject; None where the method refuses it for a listed reason."""
    try:
        if verb == "measure":
            result = measured(address, name)
        else:
            result = call(address, verb, case(name), **more)
    except REFUSALS as refusal:
        text = str(refusal)
        if not skips.listed(text):
            pytest.fail(f"{address} refuses {name} for a reason that no list has: {text}")
        OUTCOMES[address, verb, name] = text
        return None
    OUTCOMES[address, verb, name] = "yes"
    return result


@cache
def measured(address: str, name: str) -> xr.Dataset:
    return measure(address, case(name))


def supported(address: str, verb: str, name: str, **more: Any) -> Any:
    """`attempt`; skips the test where the subject is refused."""
    result = attempt(address, verb, name, **more)
    if result is None:
        pytest.skip(f"refused: {OUTCOMES[address, verb, name]}")
    return result


def runs_on(address: str, verb: str = "measure", **more: Any) -> str | None:
    """The first subject that a verb runs on; decoders are tried first."""
    order = ("llama", "planted", "gpt2", "bert", "llava", "vit")
    order = (*order, "classifier") if verb == "fit" else order
    return next((name for name in order if attempt(address, verb, name, **more) is not None), None)
