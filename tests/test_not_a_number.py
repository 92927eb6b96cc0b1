"""A model or a value that is not a number is refused by name in every method; none makes a rank, a
share or a null of it."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from stratoscope import catalogue, circuits
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.metric import last_logits
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import InputError
from stratoscope.models import finite, wrap
from support import cases, tiny
from support.compare import differences

pytestmark = pytest.mark.usefixtures("without_type_checks")
MEASURES = [e.address for e in catalogue.methods() if "measure" in e.verbs and e.room != "circuits"]
FAULTS = ("layers.1.mlp.down_proj.weight", "lm_head.weight", "norm.weight")
CLEAN, CORRUPT = [[38, 46, 26, 43]], [[46, 43, 38, 26]]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("address", MEASURES)
def test_a_broken_weight_is_refused_by_name_or_takes_no_part(address: str, fault: str) -> None:
    """One NaN. What does not read the weight gives what the whole model gives; everything else says
    what it met."""
    healthy = cases.supported(address, "measure", "llama")
    lm = cases.subject("llama")
    weight = lm.model.get_parameter(fault if fault.startswith("lm_head") else f"model.{fault}")
    kept = weight.detach().clone()
    found, said = healthy, ""
    try:
        with torch.no_grad():
            weight.view(-1)[3] = torch.nan
        found = cases.measure(address, cases.case("llama"))
    except InputError as refusal:
        said = str(refusal)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not said or ("not a number" in said and "nan" in said)
    assert differences(healthy, found) == []


@pytest.mark.parametrize(
    "method",
    [
        "edge_attribution",
        "edge_attribution_ig",
        "path_patching",
        "faithfulness",
        "discover",
        "output_nodes",
    ],
)
@pytest.mark.parametrize("fault", FAULTS)
def test_circuits_of_a_broken_model_are_refused(method: str, fault: str) -> None:
    """discover kept all 927 edges, and said nothing."""
    model = deepcopy(tiny.model("llama"))
    lm = wrap(model)
    with torch.no_grad():
        model.get_parameter(fault if fault.startswith("lm_head") else f"model.{fault}").view(-1)[
            3
        ] = torch.nan
    with pytest.raises(InputError, match="not a number"):
        getattr(circuits, method).measure(lm, CLEAN, corrupt=CORRUPT, answer=5, foil=9)


def test_a_value_put_there_is_refused_and_named_and_a_trace_still_shows_it() -> None:
    lm = cases.subject("llama")
    with intervene(lm, replaced("layers.1.mlp.out", torch.nan, positions=2, examples=[1])):
        with pytest.raises(InputError, match=r"layers.1.mlp.out is nan at \(1, 2, 0\)"):
            capture(lm, [[3, 4, 5], [6, 7, 8]], "layers.*.mlp.out")
        with trace(lm, "layers.1.mlp.out") as seen:
            lm([[3, 4, 5], [6, 7, 8]])
    assert seen["layers.1.mlp.out"][1, 2].isnan().all()
    with (
        intervene(lm, replaced("layers.2.resid_post", torch.inf)),
        pytest.raises(InputError, match="not a number"),
    ):
        last_logits(lm, [[3, 4, 5]])


def test_what_may_be_infinite_and_what_stands_in_padding_is_no_fault() -> None:
    scores = capture(cases.subject("llama"), [[3, 4, 5], [6, 7]], "layers.*.attn.scores")
    assert scores["layers.0.attn.scores"].isinf().any()
    mask = torch.tensor([[True, True], [True, False]])
    padding = torch.ones(2, 2, 3)
    padding[1, 1] = torch.nan
    finite.refuse({"layers.0.resid_pre": padding}, mask)
    heads = torch.ones(2, 4, 2, 2)
    heads[1, :, 1] = torch.nan
    finite.refuse({"layers.0.attn.pattern": heads}, mask)
    padding[1, 0, 1] = -torch.inf
    with pytest.raises(InputError, match=r"resid_pre is -inf at \(1, 0, 1\)"):
        finite.refuse({"ids": torch.ones(2), "layers.0.resid_pre": padding}, mask)
    assert np.isfinite(float(padding[0, 0, 0]))
