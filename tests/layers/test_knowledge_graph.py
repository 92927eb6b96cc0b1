"""layers.knowledge_graph: what is written is put in the model's mouth, and counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from stratoscope.errors import InputError
from stratoscope.layers import knowledge_graph, patched_predicates
from support.subjects import lm_of

EXAMPLE: dict[str, Any] = {"measure": {"into": [5, -1, 7], "new": 2, "depths": [0, 2]}}
SAID = {
    "text": [["IsCity(Paris), In(Paris, France)", "In(Paris, France), Near(Paris, Hamlet)", "x"]],
    "null_other_text": [["In(Rome, Italy)", "IsCity(Paris)", ""]],
    "null_random_text": [["", "", "A(B)"]],
}


def test_shares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(*args: Any, **options: Any) -> xr.Dataset:
        axes = ("example", "depth")
        return xr.Dataset(
            {name: (axes, np.array(rows, dtype=object)) for name, rows in SAID.items()}
            | {"plain_text": ("example", np.array(["A(b)"], dtype=object))},
            {"depth": [0, 1, 2], "example_text": ("example", ["Paris is in France"])},
        )

    monkeypatch.setattr(patched_predicates, "measure", put)
    found = knowledge_graph.measure(lm_of("llama"), ["..."])
    first = found.isel(example=0)
    assert first.predicates.values.tolist() == [2, 2, 0]
    assert first.entity_share.values.tolist() == [1, 1, 0]
    assert first.word_share.values[:2].tolist() == [1, 0.5]
    assert first.example_share.values[:2].tolist() == [0, pytest.approx(1 / 3)]  # Hamlet
    assert np.isnan(first.jaccard.values[0])
    assert first.jaccard.values[1:].tolist() == [pytest.approx(1 / 3), 0]
    assert first.central.values.tolist() == ["paris", "paris", ""]
    assert first.centrality.values[:2].tolist() == [1, 1]
    assert first.null_other.values.tolist() == [0, 0.5, 0]
    assert first.null_random.values.tolist() == [0, 0, 0]
    assert found.plain_predicates.values.tolist() == [1]
    asked = knowledge_graph.measure(lm_of("llama"), ["..."], entities=[["Italy"]])
    assert asked.null_other.values.tolist() == [[1, 0, 0]]
    with pytest.raises(InputError, match="entities of 2 claims for 1"):
        knowledge_graph.measure(lm_of("llama"), ["..."], entities=[["Italy"], []])
