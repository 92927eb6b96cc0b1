"""A recurrent language model (two LSTM layers) with tiny-gpt's text, tokens and size, to compare
transformers with.

It is no Hugging Face model: `load(folder)` gives the module and its tokenizer, and `layers` its
states.

    model, tokenizer = tiny_lstm.load(lab.make("tiny-lstm"))
    embedded, first, second = model.layers(ids)                 # each (example, token, width of
                                                                the layer)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stratoscope.engine.train import Recipe
from stratoscope.errors import LoadError
from stratoscope.lab.miniatures import _text
from stratoscope.store import tensors

VERSION = 1
# to its end, seed 0, one thread: how long it took, and how well it does
TRAINED = "8 CPU minutes: 2.35 bits a byte"


class TinyLSTM(nn.Module):
    """Embedding, LSTM layers, a projection back to the embedding's width, and the embedding again
    as read-out."""

    def __init__(self, vocab: int, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.config = {"vocab": vocab, "dim": dim, "hidden": hidden, "depth": depth}
        self.embed = nn.Embedding(vocab, dim)
        # it is the read-out too: logits should begin near 0
        nn.init.normal_(self.embed.weight, std=0.05)
        sizes = [dim] + [hidden] * depth
        self.lstm = nn.ModuleList(
            nn.LSTM(before, after, batch_first=True) for before, after in pairwise(sizes)
        )
        self.project = nn.Linear(hidden, dim)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def layers(self, ids: Int[Tensor, "example token"]) -> list[Float[Tensor, "example token _"]]:
        """The embedding, then what each LSTM layer gives at each token (its hidden state h)."""
        states = [self.embed(ids)]
        for layer in self.lstm:
            states.append(layer(states[-1])[0])
        return states

    def forward(self, ids: Int[Tensor, "example token"]) -> Float[Tensor, "example token vocab"]:
        """Logits of the next token."""
        return self.project(self.layers(ids)[-1]) @ self.embed.weight.T + self.bias


def load(folder: Path | str) -> tuple[TinyLSTM, Any]:
    """The model, in evaluation mode, and its tokenizer. Raises LoadError for a folder that is no
    tiny-lstm."""
    from transformers import PreTrainedTokenizerFast

    try:
        config = json.loads((Path(folder) / "lstm.json").read_text("utf-8"))
        model = TinyLSTM(**config)
        model.load_state_dict(tensors.read(Path(folder) / "model.safetensors", kind=None)[0])
    except (OSError, ValueError, LoadError) as error:
        raise LoadError(
            f"{folder} holds no tiny-lstm: {error}. lab.make('tiny-lstm') gives one."
        ) from error
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def recipe(
    seed: int,
    say: Callable[[str], object],
    *,
    dim: int = 192,
    hidden: int = 320,
    depth: int = 2,
    steps: int = 1000,
    batch: int = 16,
    context: int = 128,
    rate: float = 4e-3,
    megabytes: float = 16.0,
) -> Recipe:
    """As many tokens a step as tiny-gpt, in windows half as long."""
    text = _text.corpus(say, megabytes=megabytes)

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        ids = _text.windows(text.train, batch, context + 1, generator)
        return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def save(model: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors.write(folder / "model.safetensors", model.state_dict(), kind="weights")
        (folder / "lstm.json").write_text(json.dumps(model.config) + "\n", "utf-8")
        text.tokenizer.save_pretrained(folder)

    return Recipe(
        TinyLSTM(len(text.tokenizer), dim, hidden, depth),
        loss,
        save,
        lambda model: _text.language_judge(text, context, model),
        steps=steps,
        rate=rate,
        decay=0.01,
        data=text.data,
        notes=[
            "Not a Hugging Face model: `tiny_lstm.load(folder)` reads it.",
            _text.seen(text, steps * batch * context),
        ],
    )
