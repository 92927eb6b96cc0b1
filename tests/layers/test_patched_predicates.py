"""layers.patched_predicates: plain Transformers on changed embeddings, a planted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stratoscope.engine.generate import generate
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.layers import _predicates, patched_predicates
from stratoscope.layers._predicates import Predicate
from stratoscope.models import wrap
from support.subjects import close, lm_of, untouched

EXAMPLE: dict[str, Any] = {"measure": {"into": [5, -1, 7], "new": 2, "depths": [0, 2]}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IsCity(Paris)", [("IsCity", ("Paris",), False)]),
        ("A(x), B(y, z)", [("A", ("x",), False), ("B", ("y", "z"), False)]),
        ("¬A(x) ∧ not B(y)", [("A", ("x",), True), ("B", ("y",), True)]),
        ("¬(A(x) ∧ ¬B(y))", [("A", ("x",), True), ("B", ("y",), False)]),
        ("In(CapitalOf(Paris), Europe)",
         [("In", ("Paris", "Europe"), False), ("CapitalOf", ("Paris",), False)]),
        ('Wrote("William Shakespeare", Hamlet).',
         [("Wrote", ("William Shakespeare", "Hamlet"), False)]),
        ("A(x), B(y, cut of", [("A", ("x",), False)]),
        ("A(), B( , )", []),
        ("no predicate at all", []),
        ("Lives_in(Anna, New York)\nA(x)",
         [("Lives_in", ("Anna", "New York"), False), ("A", ("x",), False)]),
    ],
)  # fmt: skip
def test_predicates_are_read(text: str, expected: list[Any]) -> None:
    assert _predicates.parse(text) == [Predicate(*one) for one in expected]


def test_a_graph_of_them() -> None:
    text = "IsCapitalCity(Paris), CountryOf(PARIS, France), ¬In(Paris, Spain)"
    text += ", CountryOf(Paris, France)"
    made = _predicates.graph(_predicates.parse(text))
    assert {*made.nodes} == {"paris", "capital city", "france", "spain"}
    edges = {(a, b, d["relation"], d["negated"]) for a, b, d in made.edges(data=True)}
    assert edges == {
        ("paris", "capital city", "is", False),
        ("paris", "france", "CountryOf", False),
        ("paris", "spain", "In", True),
    }
    assert made.number_of_edges() == 3


@torch.no_grad()
def test_it_is_plain_transformers_on_changed_embeddings_and_its_own_changes_nothing() -> None:
    """Patched at every step, as it must not be, the same vector says something else."""
    lm, ids, place = lm_of("llama"), [5, 17, 40, 7, 33], 2
    table = lm.model.get_input_embeddings().weight
    plain = generate(lm, [ids], tokens=6)[0]
    assert patched_predicates.write(lm, ids, place, table[40][None], 6) == [
        " ".join(map(str, plain.tolist()))
    ]
    vector = torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(3))
    with untouched(lm):
        [found] = patched_predicates.write(lm, ids, place, vector, 6)
    row, said, always = table[torch.tensor(ids)].clone(), [], []
    row[place] = vector[0]
    for kept, every in ((said, False), (always, True)):
        rows = row.clone()
        for _ in range(6):
            token = int(lm.model(inputs_embeds=rows[None]).logits[0, -1].argmax())
            if token == lm.model.config.eos_token_id:
                break
            kept.append(token)
            rows = torch.cat([rows, vector if every else table[token][None]])
    assert found == " ".join(map(str, said))
    assert said != always
    assert said != plain.tolist()


@torch.no_grad()
def test_states_are_summed_at_the_ends_of_words() -> None:
    p = planted.two_hop()
    lm = wrap(p.model, p.tokenizer)
    claims = ["the capital of Japan", "home of Yuki and Luis"]
    found = patched_predicates.states(lm, claims, [["capital", "Japan"], ["Luis"]])
    for number, (claim, at) in enumerate(zip(claims, ([1, 3], [4]))):
        ids = torch.tensor([lm.batch(claim).text[0][0].tolist()])
        hidden = lm.model(ids, output_hidden_states=True).hidden_states
        for depth in range(lm.dims.layers):
            close(found[depth, number], hidden[depth][0, at].sum(dim=0), 1e-5)
    mean = patched_predicates.states(lm, claims[:1], [["capital", "Japan"]], "mean")
    close(2 * mean[:, 0], found[:, 0], 1e-5)


def test_a_planted_model_says_the_capital_of_the_person_whose_state_is_put_there() -> None:
    p = planted.two_hop()
    lm = wrap(p.model, p.tokenizer)
    into = "the capital of the home of [claim]"
    ids = lm.batch("the capital of the home of Yuki").text[0][0].tolist()
    row = [*ids[:-1], -1]
    found = patched_predicates.measure(
        lm,
        ["Yuki", "Luis", "Marie"],
        into=row,
        depths=[0],
        new=1,
        words=[["Yuki"], ["Luis"], ["Marie"]],
    )
    said = [text.strip() for text in found.text.values[:, 0]]
    assert said == ["Tokyo", "Lima", "Warsaw"] == [t.strip() for t in found.plain_text.values]
    assert [t.strip() for t in found.null_other_text.values[:, 0]] == ["Lima", "Warsaw", "Tokyo"]
    assert [text.strip() for text in found.null_random_text.values[:, 0]] != said
    assert into.count(patched_predicates.CLAIM) == 1


def test_what_is_refused() -> None:
    p = planted.two_hop()
    lm = wrap(p.model, p.tokenizer)
    for given, words in (
        ({"depths": [9]}, "choose among 0 to"),
        ({"into": "the capital of"}, r"0 times '\[claim\]'"),
        ({"into": [3, 4]}, "0 ids -1"),
        ({"into": [3, -1], "words": [["Tokyo"]]}, "are not in"),
        ({"into": [3, -1], "words": []}, "words of 0 claims for 1"),
    ):
        with pytest.raises(InputError, match=words):
            patched_predicates.measure(lm, ["the home of Yuki"], **given)
    with pytest.raises(SiteError, match="does not go on from a text"):
        patched_predicates.measure(lm_of("bert"), [[3, 4]], into=[3, -1])
