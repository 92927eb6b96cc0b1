"""Every method that takes an answer scores whole ones with all their tokens, or says why it cannot
and what can: none uses the first token in silence.

What else a call needs says `WHOLE_ANSWER` in the method's own test, a table of options; a method
that asks about one token only has there, as `ONE_TOKEN`, a part of the reason that it gives.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from stratoscope import catalogue
from stratoscope.engine.metric import Whole
from stratoscope.errors import InputError, SiteError
from support import cases, tiny

ROW, CORRUPT = [3, 14, 15, 92, 65], [3, 14, 77, 92, 80]
WHOLE = {"answer": Whole((5, 60)), "foil": Whole((9,))}


def measure(address: str) -> Any:
    return catalogue.module(address).measure


def taking_answers() -> list[str]:
    measures = [m.address for m in catalogue.methods() if "measure" in m.verbs]
    return [name for name in measures if "answer" in inspect.signature(measure(name)).parameters]


@pytest.mark.parametrize("address", taking_answers())
def test_a_whole_answer_is_scored_or_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stratoscope.circuits.discover.SIZES", 2)
    more = cases.declared(address, "WHOLE_ANSWER", {})
    why = cases.declared(address, "ONE_TOKEN", "")
    parameters = inspect.signature(measure(address)).parameters
    asked = {key: value for key, value in WHOLE.items() if key in parameters}
    if "corrupt" in parameters:
        more = {"corrupt": [CORRUPT], **more}
    lm = tiny.lm("llama")
    if address == "circuits.discover":  # its own would be integrated gradients, ten times as long
        strength = measure("circuits.edge_attribution")(lm, [ROW], **asked, corrupt=[CORRUPT])
        more = {**more, "attribution": strength}
    if why:
        with pytest.raises((InputError, SiteError), match=why) as refused:
            measure(address)(lm, [ROW], **asked, **more)
        assert "layers and heads" in str(refused.value)  # what can be asked instead
        return
    found = measure(address)(lm, [ROW], **asked, **more)
    assert "scored as wholes, of 2 and 1 tokens" in found.attrs["notes"]
    assert found["answer"].values.tolist() == ["560"]
    first = measure(address)(
        lm, [ROW], **{key: word.words[0] for key, word in asked.items()}, **more
    )
    assert any(not first[key].equals(found[key]) for key in found.data_vars if key in first)


def test_argument_passing_and_the_kept_tokens_of_wholes() -> None:
    """The last token of the prompt is exchanged, not the answer's; kept tokens are scored whole."""
    from stratoscope.engine.intervene import intervene, replaced
    from stratoscope.engine.trace import capture

    lm = tiny.lm("llama")
    found = measure("heads.argument_passing")(lm, [ROW], corrupt=[CORRUPT], **WHOLE)
    site = "layers.1.attn.z"
    z = capture(lm, [CORRUPT], site)[site]
    total = {}
    for text in ((5, 60), (9,)):
        row = [[*ROW, *text]]
        change = replaced(site, z[:, 4:5, 2:3], positions=4, units=[2])
        for name, changes in (("clean", ()), ("moved", (change,))):
            with torch.no_grad(), intervene(lm, *changes):
                said = lm(row).logits[0].log_softmax(dim=-1)
            total[name, text] = sum(float(said[4 + k, token]) for k, token in enumerate(text))
    clean, moved = (total[n, (5, 60)] - total[n, (9,)] for n in ("clean", "moved"))
    effect = (moved - clean) / float(found.corrupt_difference[0] - found.clean_difference[0])
    assert float(found.effect[0, 1, 2]) == pytest.approx(effect, rel=2e-3, abs=1e-4)
    kept = measure("tokens.simulatability")(lm, [ROW], count=9, **WHOLE)  # every token is shown
    assert float(kept.kept[0]) == pytest.approx(clean, abs=1e-4)
