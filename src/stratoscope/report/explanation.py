"""What one explained prediction consists of: the results, what was asked, and why a result is not
there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xarray as xr

from stratoscope.errors import ResultError

# Every result the page can show, and what the reader misses without it.
RESULTS = {
    "layers.logit_lens": "what each layer would predict",
    "layers.direct_logit_attribution": "which components write the answer directly",
    "layers.activation_patching": "which layers and tokens carry the answer causally",
    "heads.activation_patching": "which heads carry the answer causally",
    "heads.attention_pattern": "where the top heads look",
    "heads.roles": "what the top heads do in general",
    "neurons.contribution": "which neurons write the answer directly",
    "neurons.vocabulary": "which tokens the top neurons promote",
    "clamp": "what happens when a top neuron is switched off",
    "tokens.shapley": "input tokens by their Shapley values",
    "tokens.occlusion": "input tokens by occlusion",
    "tokens.verbalize": "the summary in words",
    "circuits.discover": "a circuit of edges between components, which --circuit adds",
}

LEFT_OUT = "left out (--skip)."  # why a result is not there that nobody asked for


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything one report shows; every entry of `results` (its keys are those of `RESULTS`) is
    optional.

    prompt: the text given; tokens: the model's tokens of it, in order. answer, foil: the two next
    tokens compared. foil_how, corrupt_how: one sentence each on how foil and corrupt prompt came to
    be. notes: warnings for the reader. missing: why a result is not there, by its key. predictions:
    the most probable next tokens with their probabilities, best first. results: one example each
    (`example` of size 1 or absent). words: answer and foil as methods take them: token ids, or
    whole texts. answer_probability, foil_probability: given when the token is not among
    `predictions`. whole: answer and foil are texts scored with all their tokens.
    provenance: model, weights, dtype, kernel, device, versions (dict),
    seed, seconds, peak_memory_mb, seconds_by_step (dict), command; others too.

    Raises ResultError for a key of `results` that the page does not know.
    """

    prompt: str
    tokens: Sequence[str]
    answer: str
    foil: str
    predictions: Sequence[tuple[str, float]]
    results: Mapping[str, xr.Dataset | xr.DataArray]
    provenance: Mapping[str, Any]
    corrupt_prompt: str | None = None
    corrupt_how: str = ""
    foil_how: str = ""
    notes: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    answer_probability: float | None = None
    foil_probability: float | None = None
    whole: bool = False
    words: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.results) - set(RESULTS)):
            raise ResultError(f"The report was given {unknown}; it can show {sorted(RESULTS)}.")

    @property
    def masked(self) -> int | None:
        """The position of the mask that is predicted; None where the next token is."""
        lens = self.one("layers.logit_lens")
        if lens is None or "read_at" not in lens.coords:
            return None
        at = int(lens["read_at"])
        return at if at < len(self.tokens) - 1 else None

    def one(self, key: str) -> Any:
        """The result named `key` without its example axis, or None when it was not measured."""
        result = self.results.get(key)
        return result.isel(example=0) if result is not None and "example" in result.dims else result
