"""Paper files of the tests' own, in a folder of their own, under keys that the ledger has."""

from __future__ import annotations

from pathlib import Path

import pytest

from stratoscope.claims import paper

DROP = '''"""What Matters in Transformers? Not All Attention is Needed.

He, Sun, Shen and Li, 2024. arXiv:2406.15786.
Claim: half of the attention layers can go at little cost,
    unlike MLPs.
Methods: layers.logit_lens, heads.roles
Protocol: Llama-2-13B, half of its attention layers, on the
    authors' benchmarks.

More words, of any kind.
"""

from __future__ import annotations

from stratoscope.claims import Measured, claim
from stratoscope.errors import InputError
from stratoscope.results import label


@claim(
    says="Dropping attention layers costs little",
    where="abstract; Table 2",
    read="abstract",
    tier="small",
    subject="a made-up model",
    kind="real",
    n="40 texts",
    expect="attention <= 0.5 * mlp and attention < random",
    direction="attention < mlp",
    null={"random": "as many layers, drawn at random"},
    thresholds="half: the ledger's",
)
def attention_goes_first(seed: int) -> Measured:
    """Numbers made up for the test;
    seed 6 is refused, seed 7 fails, seed 8 stops half-way, seed 9 is interrupted."""
    if seed == 6:
        raise InputError("5 heads are left\\nin layer 16 to draw 9 from.")
    if seed == 8:
        raise RuntimeError("half-way")
    if seed == 9:
        raise KeyboardInterrupt
    attention = {5: 0.3, 7: 0.9}.get(seed, 0.02)
    drawn = [attention, 0.41, 0.11]
    words = {"component": ["attention", "mlp", "random"]}
    return Measured(
        values={"attention": attention, "mlp": 0.41},
        null={"random": 0.35},
        n=40,
        interval={"attention": (attention - 0.01, attention + 0.02)},
        figure=label(drawn, "component", name="rise_of_perplexity", method="test", coords=words),
        note="Tried on <made-up> numbers | only.",
    )


@claim(
    says="Nothing dropped costs nothing",
    where="by definition",
    tier="identity",
    subject="no model",
    expect="cost == 0",
    null={"everything": "cost of dropping everything"},
)
def nothing_costs_nothing(seed: int) -> Measured:
    """A closed form."""
    if seed == 6:
        raise InputError("nothing to drop")
    return Measured(values={"cost": 0.0}, null={"everything": 1.0}, n=1)
'''
LENS = '''"""Another paper, with a claim that no one has run.

A. Uthor, 2023.
Claim: it is so.
Methods: layers.logit_lens
"""

from stratoscope.claims import Measured, claim


@claim(
    says="It is so",
    where="abstract",
    read="abstract",
    tier="small",
    subjects=("smollm2",),
    n="3 texts",
    expect="a > b",
    null={"b": "the same, shuffled"},
)
def it_is_so(lm, seed: int) -> Measured:
    raise AssertionError("a listing must not run this")
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for `papers/`: one paper to run, one that was never run; the cache lies
    elsewhere."""
    made = tmp_path / "papers"
    made.mkdir()
    (made / "llm_drop.py").write_text(DROP)
    (made / "lazy_neuron.py").write_text(LENS)
    monkeypatch.setattr(paper, "FOLDER", made)
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    return made
