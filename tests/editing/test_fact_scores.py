"""Probabilities are plain teacher forcing, one prompt at a time; shares and intervals are counted
by hand, for any edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stratoscope.editing import fact_scores, rome
from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import add
from stratoscope.errors import InputError, LoadError
from stratoscope.maths.resample import interval
from stratoscope.models import LM, wrap
from support import facts, tiny
from support.subjects import close, lm_of, untouched

NEW, TRUE = [7, 30], [9]


def some(rows: list[list[int]], targets: tuple[Any, Any] = (NEW, TRUE)) -> list[dict[str, Any]]:
    """One fact for each row, with one paraphrase and two neighbours made of it."""
    new, true = targets
    return [
        {
            "prompt": row,
            "target_new": new,
            "target_true": true,
            "paraphrases": [row[1:]],
            "neighbours": [row[2:], [*row[1:], row[0]]],
        }
        for row in rows
    ]


def pushed(lm: LM) -> Edit:
    return Edit(lm, [add("layers.1.mlp.out", torch.linspace(-1, 1, lm.dims.dim))], note="pushed")


EXAMPLE = {
    "measure": lambda case: {
        # words that the planted story has too
        "inputs": some([row[-4:] for row in case._chosen(case.rows)], ([7], [9])),
        "after": pushed(case.lm),
    }
}
ROWS = [[3, 14, 15, 92, 65, 35], [38, 46, 26, 43]]


def plainly(lm: LM, row: list[int], target: list[int]) -> float:
    """exp of the mean of ln p over the target's tokens, by Hugging Face alone."""
    with torch.no_grad():
        said = lm.model(torch.tensor([[*row, *target]])).logits[0].double().log_softmax(dim=-1)
    each = [float(said[len(row) - 1 + k, t]) for k, t in enumerate(target)]
    return float(np.exp(np.mean(each)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_probabilities_are_plain_teacher_forcing(name: str) -> None:
    """Facts with different numbers of prompts, of different length, together; each alone there."""
    lm, rows = lm_of(name), some(ROWS)
    del rows[1]["paraphrases"]
    edit = pushed(lm)
    with untouched(lm):
        result = fact_scores.measure(lm, rows, after=edit)
    assert result.asked.values.tolist() == [
        ["rewrite", "paraphrase", "neighbour", "neighbour"],
        ["rewrite", "neighbour", "neighbour", ""],
    ]
    for number, fact in enumerate(rows):
        prompts = [fact["prompt"], *fact.get("paraphrases", []), *fact["neighbours"]]
        expected = [[plainly(lm, row, target) for target in (NEW, TRUE)] for row in prompts]
        with edit:
            after = [[plainly(lm, row, target) for target in (NEW, TRUE)] for row in prompts]
        names = ("new", "true", "new_after", "true_after")
        found = np.stack([result[one].values[number, : len(prompts)] for one in names], axis=1)
        close(found, np.concatenate([expected, after], axis=1), 1e-5)
        assert np.abs(found[:, :2] - found[:, 2:]).max() > 1e-4
    assert np.isnan(result.new.values[1, 3])
    alone = fact_scores.measure(lm, rows[1], after=edit)
    close(alone.new_after.values[0], result.new_after.values[1, :3], 1e-5)
    plain = fact_scores.measure(lm, rows)
    close(plain.new.values, result.new.values, 1e-7)
    assert "new_after" not in plain


def counted(shares: list[float]) -> list[float]:
    made = interval(np.array(shares))
    return list(made[:3])


def table(new: Any, true: Any, asked: Any) -> Any:
    """A result with these numbers."""
    result = fact_scores.measure(lm_of("llama"), some([[3, 4, 5, 6]] * len(new)))
    result = result.isel(prompt=[0] * np.shape(new)[1]).copy(deep=True)
    for name, values in (("new", new), ("true", true), ("asked", asked)):
        result[name] = (("example", "prompt"), np.array(values, dtype=result[name].dtype))
    return result


def test_shares_and_intervals_are_over_facts() -> None:
    generator = np.random.default_rng(0)
    new, true = generator.random((8, 5)), generator.random((8, 5))
    asked = [["rewrite", "paraphrase", "paraphrase", "neighbour", "neighbour"]] * 8
    asked[3] = ["rewrite", "paraphrase", "neighbour", "", ""]
    new[3, 3:], true[3, 3:] = np.nan, np.nan
    found = fact_scores.summary(table(new, true, asked))
    kinds = np.array(asked, dtype=object)
    for kind, sign in (("rewrite", 1), ("paraphrase", 1), ("neighbour", -1)):
        here = found.sel(kind=kind, state="before")
        wins = [(sign * (n - t)[k == kind] > 0).astype(float) for n, t, k in zip(new, true, kinds)]
        made = interval(
            np.concatenate(wins), groups=np.repeat(np.arange(8), [len(w) for w in wins])
        )
        assert float(here.share) == pytest.approx(np.concatenate(wins).mean())
        close([here.share_low, here.share_high], np.clip(made[1:3], 0, 1), 1e-12)
        side = new if sign > 0 else true
        assert float(here.p) == pytest.approx(side[kinds == kind].mean())
        assert int(here.n) == 8
        assert int(here.prompts) == sum(map(len, wins))
    assert found.attrs["unit"] == "fact"


def test_of_one_fact_the_prompts_are_drawn_and_what_is_alike_has_no_interval() -> None:
    asked = [["rewrite", *["paraphrase"] * 6, *["neighbour"] * 4]]
    new = [[0.9, *[0.9, 0.8, 0.9, 0.1, 0.7, 0.9], *[0.1] * 4]]
    true = [[0.1, *[0.1] * 3, 0.2, 0.1, 0.1, *[0.6] * 4]]
    found = fact_scores.summary(table(new, true, asked)).sel(state="before")
    assert found.attrs["unit"] == "prompt"
    assert found.n.values.tolist() == [1, 6, 4]
    close(found.share.values, [1, 5 / 6, 1], 1e-12)
    low, high = np.clip(counted([1, 1, 1, 0, 1, 1])[1:], 0, 1)
    close([found.share_low[1], found.share_high[1]], [low, high], 1e-12)
    assert high == 1
    assert np.isnan(found.share_low[[0, 2]]).all()  # of one, and of four
    every = [["paraphrase"] * 9]
    alike = fact_scores.summary(table([[0.9] * 9], [[0.1] * 9], every)).sel(state="before")
    assert float(alike.share[1]) == 1
    assert np.isnan([alike.share_low[1], alike.share_high[1], alike.share[0]]).all()


def test_a_planted_rewriting_is_scored_beside_its_null() -> None:
    name = "fact_lookup"
    lm, moments, _ = facts.memory(name)
    prompt = facts.PLANTED[name][1]
    fact = facts.planted_fact(name, "Kenya", "Oslo")
    options = {"layer": 1, "covariance": moments, "prefixes": facts.BEFORE, "ridge": 0.01}
    edit = rome.edit(lm, fact, **options, furthest=2.0)
    more = {
        "paraphrases": [f"{words} Kenya" for words in ("we ask", "the capital of", "is of")],
        "neighbours": [prompt.replace("{}", country) for country in ("Norway", "Peru")],
    }
    scores = {}
    nulls = {f"null {seed}": rome.random_key(edit, seed=seed) for seed in range(3)}
    for what, one in {"rome": edit, **nulls}.items():
        found = fact_scores.summary(fact_scores.measure(lm, fact | more, after=one))
        scores[what] = found.share.values[:2].tolist()
    assert scores.pop("rome") == [[0, 1], [0, 1]]
    assert all(shares == [[0, 0], [0, 0]] for shares in scores.values())


def test_texts_get_their_space_and_ids_are_taken_as_they_are() -> None:
    import transformers as hf

    config = hf.LlamaConfig(**tiny.GROUPED | {"vocab_size": 264, "bos_token_id": None})
    torch.manual_seed(0)
    lm = wrap(hf.LlamaForCausalLM(config).eval(), tiny.byte_level())
    fact = {"prompt": "{} is", "subject": "Rome", "target_new": "the", "target_true": " x"}
    result = fact_scores.measure(lm, fact)
    prompt, new, true = (lm.tokenizer(x)["input_ids"] for x in ("Rome is", " the", " x"))
    close(result.new.values[0, 0], plainly(lm, prompt, new), 1e-6)
    close(result.true.values[0, 0], plainly(lm, prompt, true), 1e-6)
    assert result.prompt_text.values.tolist() == [["Rome is"]]
    assert result.attrs["notes"] == "No paraphrase and no neighbour was asked."
    bare = lm.tokenizer("the")["input_ids"]
    assert bare != new
    ids = fact_scores.measure(lm, fact | {"target_new": bare})
    close(ids.new.values[0, 0], plainly(lm, prompt, bare), 1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"neighbours": []}, r"neighbours=\[\] of .*one at least, or leave neighbours out"),
        ({"paraphrases": []}, r"paraphrases=\[\]"),
        ({"neighbours": "The capital of"}, "give a list of prompts"),
        ({"target_true": NEW}, r"are the same tokens, \[7, 30\]"),
        ({"target_true": None}, "has no target_true"),
        ({"target_new": []}, "target_new is empty"),
        ({"neighbors": [[3]]}, "did you mean 'neighbours'"),
        ({"prompt": "{} is"}, "no subject is given"),
    ],
)
def test_what_cannot_be_scored_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        fact_scores.measure(lm_of("llama"), [some(ROWS)[0], some(ROWS)[1] | change])


def test_facts_as_json_and_an_edit_in_a_file_are_the_same(tmp_path: Path) -> None:
    """As the command line gives them."""
    lm = lm_of("llama")
    (edit := pushed(lm)).save(tmp_path / "edit")
    expected = fact_scores.measure(lm, some(ROWS), after=edit)
    found = fact_scores.measure(lm, [json.dumps(x) for x in some(ROWS)], after=tmp_path / "edit")
    assert found.identical(expected)
    with pytest.raises(InputError, match="fact 0 is 'The capital"):
        fact_scores.measure(lm, "The capital of France is")
    with pytest.raises(LoadError, match="does not exist"):
        fact_scores.measure(lm, some(ROWS), after=tmp_path / "none")


def test_an_edit_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="another model"):
        fact_scores.measure(lm_of("llama"), some(ROWS), after=pushed(lm_of("llama")))
