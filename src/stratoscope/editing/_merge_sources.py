"""A model's tensors by name, each read when it is asked for: of a folder's safetensors, without
opening the model, or of a model in memory; and whether two models are of one base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stratoscope.editing import _merge_files as files
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.ready import ready
from stratoscope.models.weights import quantised
from stratoscope.store import pretrained

Kind = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, eq=False)
class Weights:
    """Tensors by name, tied ones once, and nothing read yet.

    called: as the user names the model. kinds: shape and dtype of each. ties: other names of tied
    tensors, to those in `kinds`. tokenizer: its JSON text, None where it has none.
    """

    called: str
    kinds: Mapping[str, Kind]
    read: Callable[[str], Tensor]
    ties: Mapping[str, str] = field(default_factory=dict)
    vocab: int | None = None
    tokenizer: Callable[[], str | None] = lambda: None
    folder: Path | None = None
    model: Any = None
    lm: LM | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.read(self.ties.get(name, name)).detach()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.model is None else self.model.device

    @property
    def floating(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what can be added to; integer buffers are none of it."""
        return {n: shape for n, (shape, dtype) in self.kinds.items() if dtype.is_floating_point}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in self.kinds.values())


def opened(source: Any, called: str = "the model") -> Weights:
    """The weights of an LM, a Hugging Face model in memory, a folder, or a model's name.

    called: how a model in memory is called in messages. Raises LoadError for a folder without
    safetensors or with damaged ones, InputError for quantised weights.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, str | Path):
        place = pretrained.resolve(str(source))
        folder = place if isinstance(place, Path) else files.fetched(place)
        return _of_folder(folder, str(source))
    lm = source if isinstance(source, LM) else None
    return _of_model(ready(source) if lm is None else lm.model, lm, called)


def refuse_other_base(base: Weights, fine: Weights) -> None:
    """Raise InputError where two models are not of one base, with the first tensor that differs in
    name or shape, or the first token."""
    for name in (*base.kinds, *fine.kinds):
        one, two = base.kinds.get(name), fine.kinds.get(name)
        if one and two and (one[0], one[1].is_floating_point) == (two[0], two[1].is_floating_point):
            continue
        sizes = (base.vocab, fine.vocab)
        words = "" if sizes[0] == sizes[1] else f", with vocabularies of {sizes[0]} and {sizes[1]}"
        raise InputError(
            f"{base.called} and {fine.called} are not of one base{words}: `{name}` is "
            f"{_said(base, name)} in the first and {_said(fine, name)} in the second. Give models "
            "that were trained from this base and nothing added."
        )
    one, two = _tokens(base.tokenizer()), _tokens(fine.tokenizer())
    if one and two and one != two:
        number = min(i for i in one.keys() | two.keys() if one.get(i) != two.get(i))
        raise InputError(
            f"{base.called} and {fine.called} have different tokenizers: token {number} is "
            f"{one.get(number)!r} in the first and {two.get(number)!r} in the second, so their "
            "weights speak of different words. Give models with one tokenizer."
        )


def _said(weights: Weights, name: str) -> str:
    if name in weights.kinds:
        shape, dtype = weights.kinds[name]
        return f"{shape} {str(dtype).removeprefix('torch.')}"
    return f"tied to `{weights.ties[name]}`" if name in weights.ties else "absent"


def _tokens(text: str | None) -> dict[int, str]:
    """The ordinary vocabulary by id; added tokens differ among models of one base. Empty where
    nothing is known."""
    vocab = json.loads(text)["model"].get("vocab", {}) if text else {}
    if isinstance(vocab, list):
        return {number: row[0] for number, row in enumerate(vocab)}
    return {number: token for token, number in vocab.items()}


# --- in memory ------------------------------------------------------------------------------------


def adapted(model: nn.Module) -> bool:
    """Whether a model in memory has adapters inside, as PEFT puts them there."""
    return any(hasattr(m, "base_layer") or hasattr(m, "modules_to_save") for m in model.modules())


def _of_model(model: Any, lm: LM | None, called: str) -> Weights:
    if adapted(model):
        raise InputError(
            f"{called} has adapters inside, so its weights are not one model's: give the model "
            "without them, or `merge_and_unload()` of it."
        )
    if quantised(model):
        raise InputError(
            f"some weights of {called} are quantised, and no difference of such is a weight: load "
            "it in float32 or bfloat16."
        )
    # tied parameters are one object under two names
    state, first = model.state_dict(keep_vars=True), {}
    for name, value in state.items():
        first.setdefault(id(value), name)
    kinds = {name: (tuple(state[name].shape), state[name].dtype) for name in first.values()}
    ties = {name: first[id(value)] for name, value in state.items() if name not in kinds}
    backend = getattr(lm.tokenizer if lm else None, "backend_tokenizer", None)
    return Weights(
        called, kinds, state.__getitem__, ties,
        vocab=_vocab(model.config.to_dict()), model=model, lm=lm,
        tokenizer=lambda: None if backend is None else backend.to_str(),
    )  # fmt: skip


# --- in a folder ----------------------------------------------------------------------------------


def _of_folder(folder: Path, called: str) -> Weights:
    config = files.table(folder / "config.json")
    if "quantization_config" in config:
        raise InputError(
            f"{called} holds quantised weights, and no difference of such is a weight: give the "
            "folder that it was made of."
        )
    where: dict[str, Path] = {}
    kinds: dict[str, Kind] = {}
    for file in files.shards(folder):
        for name, row in files.header(file)[1].items():
            if row["dtype"] not in files.DTYPES:
                raise InputError(
                    f"`{name}` of {called} is {row['dtype']}: merged are float64, float32, "
                    "float16 and bfloat16. Give the folder before it was quantised."
                )
            where[name], kinds[name] = file, (tuple(row["shape"]), files.DTYPES[row["dtype"]])
    ties = {alias: name for alias, name in files.tied(folder, config).items() if name in kinds}
    text = folder / "tokenizer.json"
    return Weights(
        called, {name: kind for name, kind in kinds.items() if name not in ties},
        lambda name: files.handle(where[name]).get_tensor(name), ties, vocab=_vocab(config),
        tokenizer=lambda: text.read_text("utf-8") if text.is_file() else None, folder=folder,
    )  # fmt: skip


def _vocab(config: Mapping[str, Any]) -> int | None:
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
