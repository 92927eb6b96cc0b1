"""Every law of the contract suite is kept by a tiny example and seen when it is broken."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import xarray as xr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stratoscope.benchmarks import Item
from stratoscope.models import LM, wrap
from support import laws, laws_made, skips, tiny
from support.compare import alone_differences, differences, fingerprint, touched, unpadded

# --- comparing ------------------------------------------------------------------------------------


def test_what_fills_padding_or_differs_is_seen() -> None:
    values = np.arange(12.0).reshape(2, 6)
    axes = ("example", "position")
    real = np.array([[True] * 6, [True] * 4 + [False] * 2])
    right = xr.Dataset({"x": (axes, np.where(real, values, np.nan))})
    assert unpadded(right, [6, 4]) == []
    texts = np.array([["a"] * 6, ["b"] * 6], dtype=object)
    for filled in (values, values.astype(int), texts):
        assert unpadded(xr.Dataset({"x": (axes, filled)}), [6, 4]) == ["x along position"]
    assert differences(right, right) == []
    assert differences(right, right * 1.001) == ["x: difference 1.0e-03"]
    assert differences(right, right + 1e-4) == []
    assert differences(right, right.isel(position=slice(0, 5)))[0].startswith("x: shapes")
    assert differences(right, right.fillna(0.0)) == ["x: NaN in different places"]
    single = right.isel(example=[1], position=slice(0, 4))
    assert alone_differences(right, single, 1, 4) == []
    assert alone_differences(right, single + 0.01, 1, 4) != []


def test_whatever_is_touched_is_seen() -> None:
    lm = wrap(tiny.model("gpt2"))
    before = fingerprint(lm)
    lm.model.transformer.h[0].mlp.c_fc.bias.data[0] += 1e-6
    lm.model.transformer.h[0].register_buffer("seen", torch.ones(1), persistent=False)
    lm.model.transformer.h[1].forward = lm.model.transformer.h[1].forward
    torch.rand(1)
    assert touched(before, fingerprint(lm)) == ["weights", "buffers", "forwards", "torch"]


def test_only_a_listed_reason_is_a_skip() -> None:
    assert skips.allowed("refused: gpt2 has no such thing")
    assert not skips.allowed("today it does not work")
    assert skips.listed(
        "these inputs hold no token ids (images or embeddings): this needs a prompt."
    )
    assert not skips.listed("a method may not refuse a model in words of its own making")
    assert not skips.listed("hold no token ids")


# --- edit -----------------------------------------------------------------------------------------


@dataclass
class Shift:
    """An edit of one weight. broken: the law that it breaks."""

    lm: LM
    broken: str = ""
    amount: float = 1.0

    def weight(self) -> Tensor:
        return self.lm.model.lm_head.weight.data

    def __enter__(self) -> None:
        self.before = self.weight().clone()
        self.weight()[0] += 0.0 if self.broken == "does nothing" else self.amount

    def __exit__(self, kind: object, *rest: object) -> bool:
        if self.broken == "adds and takes away":
            self.weight()[0] -= self.amount
        elif not (self.broken == "gives up" and kind):
            self.weight().copy_(self.before)
        return self.broken == "swallows"

    def save(self, file: Path) -> None:
        save_file({"amount": torch.tensor(self.amount)}, file)

    @classmethod
    def load(cls, lm: LM, file: Path) -> Shift:
        return cls(lm, amount=float(load_file(file)["amount"]))


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("", ""),
        ("does nothing", "outputs are the same inside the block"),
        ("adds and takes away", "left changed: weights"),
        ("gives up", "left changed by an exception: weights"),
        ("swallows", "the block swallows exceptions"),
        ("forgets", "read from its file it is another edit"),
        ("draws", "the same request again is another edit"),
    ],
)
def test_edits(broken: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(tiny.model("llama"))
    ids = torch.tensor([[3, 4, 5]])
    amounts = iter([0.3, 0.7])
    if broken == "forgets":
        monkeypatch.setattr(Shift, "load", classmethod(lambda cls, lm, file: cls(lm, amount=9.0)))

    def make() -> Shift:
        return Shift(lm, broken, next(amounts) if broken == "draws" else 0.3)

    faults = laws.undone(make, lambda: lm.model(ids).logits.detach(), lm, tmp_path / "edit")
    assert (fault in faults) if fault else faults == []


# --- fit ------------------------------------------------------------------------------------------


class Slope:
    """Three steps down a slope, as `slope` makes them."""

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def save(self, folder: Path) -> None:
        folder.mkdir()
        save_file({"w": self.w}, folder / "w.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Slope:
        return cls(load_file(folder / "w.safetensors")["w"])


def slope(folder: Path, lm: LM, broken: str = "") -> Slope:
    """Taken up where its folder says. broken: the law that it breaks."""
    folder.mkdir(exist_ok=True)
    file = folder / "at.safetensors"
    state = load_file(file) if file.is_file() else {"w": torch.ones(3), "step": torch.tensor(0)}
    w, start = state["w"].requires_grad_(True), int(state["step"])
    for step in range(0 if broken == "begins anew" else start, 3):
        (w * torch.arange(1.0, 4.0) ** (step + 1)).sum().backward()
        with torch.no_grad():
            w -= 0.1 * w.grad
        w.grad = None
        save_file({"w": w.detach(), "step": torch.tensor(step + 1)}, file)
    if broken == "touches":
        lm.model.lm_head.weight.data[0] += 1
    noise = torch.rand(3) if broken == "draws" else 0
    return Slope(w.detach() + noise)


@pytest.mark.parametrize(
    ("broken", "fault"),
    [("", ""), ("touches", "changed: weights"), ("draws", "the same seed, another w")],
)
def test_fits(broken: str, fault: str, tmp_path: Path) -> None:
    lm = wrap(tiny.model("llama"))
    faults = laws.kept(lambda folder: slope(folder, lm, broken), lm, tmp_path)
    assert (fault in faults) if fault else faults == []


def test_a_fit_that_loads_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(tiny.model("llama"))
    monkeypatch.setattr(Slope, "load", classmethod(lambda cls, folder: cls(torch.zeros(3))))
    assert laws.kept(lambda folder: slope(folder, lm), lm, tmp_path) == ["loaded, another w"]


def test_a_fit_that_does_not_go_on_where_it_was(tmp_path: Path) -> None:
    lm = wrap(tiny.model("llama"))
    (tmp_path / "good").mkdir()
    assert laws.resumed(lambda folder: slope(folder, lm), tmp_path / "good") == []
    (tmp_path / "bad").mkdir()
    found = laws.resumed(lambda folder: slope(folder, lm, "begins anew"), tmp_path / "bad")
    assert found == ["resumed, another w"]
    (tmp_path / "never").mkdir()
    never = laws.resumed(lambda folder: slope(folder, lm), tmp_path / "never", after=9)
    assert never == ["it was never interrupted"]


# --- build ----------------------------------------------------------------------------------------

ROWS = [[3, 14, 15, 65, 35], [38, 46, 26]]


def test_a_built_model(tmp_path: Path) -> None:
    model = tiny.model("llama")
    count = sum(p.numel() for p in model.parameters())
    assert laws_made.built(model, ROWS, count) == []
    assert laws_made.reopened(model, ROWS[0], tmp_path) == []
    assert laws_made.built(model, ROWS, count + 1) == [f"{count} parameters, not {count + 1}"]
    assert laws_made.built(nn.Linear(2, 2), ROWS, 6) == ["it is a Linear, not a PreTrainedModel"]
    model.register_parameter("idle", nn.Parameter(torch.ones(2)))
    assert "no gradient reaches idle" in laws_made.ungrown(model, ROWS)


def test_a_built_model_that_hears_its_padding_or_loses_a_buffer(tmp_path: Path) -> None:
    class Hears(hf.LlamaForCausalLM):
        def forward(self, input_ids: Tensor | None = None, **rest: Any) -> Any:
            out = super().forward(input_ids=input_ids, **rest)
            out.logits = out.logits + 0.01 * out.logits.shape[1]
            return out

    model = Hears(tiny.CONFIGS["llama"]()[1]).eval()
    count = sum(p.numel() for p in model.parameters())
    faults = laws_made.built(model, ROWS, count)
    assert any(fault.startswith(("example 1 alone", "it is not proved")) for fault in faults)
    told = laws_made.reopened(model, ROWS[0], tmp_path)
    assert told == ["a fresh process gives other logits"]


# --- batch and loss -------------------------------------------------------------------------------


def shown(rows: Any, tokenizer: Any, generator: torch.Generator) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[n < len(row) for n in range(width)] for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def nats(model: Any, batch: dict[str, Tensor], broken: str = "") -> dict[str, Tensor]:
    given = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch["labels"]
    if broken == "leaks":
        given["input_ids"] = labels.clamp_min(0)
    if broken == "counts padding":
        labels = labels.clamp_min(0)
    if broken == "asks nothing":
        labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    logits = model(**given).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    return {"loss": loss, "targets": (batch["labels"][:, 1:] >= 0).sum()}


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("", ""),
        ("draws", "the same generator gives another batch"),
        ("leaks", "the target leaks into input_ids"),
        ("asks nothing", "a changed target does not change the loss"),
        ("counts padding", "padding takes part"),
        ("says little", "it says ['loss']: loss and targets are missing"),
    ],
)
def test_objectives(broken: str, fault: str) -> None:
    model = tiny.model("llama")

    def batch(rows: Any, tokenizer: Any, generator: torch.Generator) -> dict[str, Tensor]:
        made = shown(rows, tokenizer, generator)
        if broken == "draws":
            made["input_ids"] = (made["input_ids"] + int(torch.randint(1, 40, ()))) % 90
        return made

    def loss(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        made = nats(model, batch, broken)
        return {"loss": made["loss"]} if broken == "says little" else made

    def other(labels: Tensor) -> Tensor:
        return torch.where(labels >= 0, (labels + 1) % 90, labels)

    with torch.no_grad():
        faults = laws_made.objective(batch, loss, model, ROWS, other=other)
    assert any(found.startswith(fault) for found in faults) if fault else faults == []


# --- search and items -----------------------------------------------------------------------------


def index(broken: str = "") -> tuple[Callable[..., Any], Callable[[Any], Tensor]]:
    documents = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    def scores(query: Tensor) -> Tensor:
        return documents @ query

    def search(query: Tensor, k: int, budget: int) -> tuple[Tensor, Tensor]:
        looked = 45 - budget if broken == "shrinks" and budget < 40 else budget
        best = scores(query)[:looked].topk(min(k, looked))
        return best.indices, best.values * (2 if broken == "scores" else 1)

    return search, scores


@pytest.mark.parametrize(
    ("broken", "last", "fault"),
    [
        ("", 40, ""),
        ("scores", 40, "query 0: scores"),
        ("shrinks", 40, "recall falls"),
        ("", 20, "query "),
    ],
)
def test_searches(broken: str, last: int, fault: str) -> None:
    search, scores = index(broken)
    queries = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    faults = laws_made.searched(search, scores, list(queries), [5, 10, 15, last])
    assert any(found.startswith(fault) for found in faults) if fault else faults == []


def questions(broken: str, seed: int, split: str) -> list[Item]:
    generator = random.Random(f"{'' if broken == 'one for all' else seed} {split}")
    first = 500 if split == "train" and broken != "shared" else 0
    numbers = generator.sample(range(first, first + 500), 100)
    gold = [0 if broken == "leans" and n % 3 else n % 4 for n in range(100)]
    made = [Item(f"{n}?", ("a", "b", "c", "d"), g) for n, g in zip(numbers, gold)]
    if broken == "draws":
        made = [replace(item, context=f"{random.random()}") for item in made]
    return made


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ("", ""),
        ("draws", "the same seed, other items"),
        ("one for all", "another seed, the same items"),
        ("leans", "always 0 has 0.750"),
        ("shared", "items are in train and test"),
        ("blind", "an oracle has 0.25"),
    ],
)
def test_benchmarks(broken: str, fault: str) -> None:
    def right(items: Any, answers: Any) -> float:
        gold = [0 if broken == "blind" else item.gold for item in items]
        return sum(a == b for a, b in zip(answers, gold)) / len(items)

    faults = laws_made.asked(
        lambda seed, split: questions(broken, seed, split), right, chance=0.25, tolerance=0.02
    )
    assert any(fault in found for found in faults) if fault else faults == []
