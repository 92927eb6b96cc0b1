"""Models of one base for the tests of task vectors and merges: each is taught what comes after a
word."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stratoscope.models import LM, wrap
from support import tiny

FIRST, SECOND = (5, 7), (11, 13)  # a word, and what a model is taught to say after it


def rows(pair: tuple[int, int], seed: int, n: int = 16) -> list[list[int]]:
    """Other words, then the word, then what comes after it."""
    drawn = torch.randint(20, 90, (n, 3), generator=torch.Generator().manual_seed(seed))
    return [[*row, *pair] for row in drawn.tolist()]


def taught(model: Any, *pairs: tuple[int, int], steps: int = 12, rate: float = 3e-3) -> Any:
    """A copy that has taken a few steps of Adam on the last token of such rows."""
    student = deepcopy(model).eval().requires_grad_(True)
    optimiser = torch.optim.Adam(student.parameters(), lr=rate)
    for step in range(steps):
        ids = torch.tensor([row for pair in pairs for row in rows(pair, step)])
        optimiser.zero_grad()
        logits = student(ids).logits[:, -2]
        torch.nn.functional.cross_entropy(logits, ids[:, -1]).backward()
        optimiser.step()
    optimiser.zero_grad()
    return student.requires_grad_(False)


@torch.no_grad()
def share(model: Any, pair: tuple[int, int]) -> float:
    """How often it says what comes after the word, on rows that nothing was taught with."""
    ids = torch.tensor(rows(pair, 1000, 40))
    return float((model(ids).logits[:, -2].argmax(-1) == pair[1]).float().mean())


def three(name: str = "smollm2") -> tuple[LM, LM, LM]:
    """A random base, and two models that were each taught one thing from there."""
    base = wrap(tiny.model(name).eval().requires_grad_(False))
    first, second = (taught(base.model, pair) for pair in (FIRST, SECOND))
    return base, LM(first, base.family), LM(second, base.family)


def moved(lm: LM, seed: int, size: float = 0.02) -> Any:
    """A copy whose weights are a little other than the model's."""
    model = deepcopy(lm.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator) * size
            value.add_(noise.to(value))
    return model


def tokenizer(words: int = 96) -> Any:
    whole = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, words)}))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", pad_token="<s>")


def saved(lm: LM, folder: Path, **options: Any) -> Path:
    lm.model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All of a folder's tensors as they are in its files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found
