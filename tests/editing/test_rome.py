"""The update is the constrained least squares of numpy, the write that of a plain loop; a planted
memory is changed at one key, and not a bit is left behind."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from stratoscope.editing import rome
from stratoscope.editing._fact_keys import Moments, solved
from stratoscope.engine.edit import Edit
from stratoscope.engine.metric import last_logits
from stratoscope.errors import InputError, LoadError, SiteError
from stratoscope.lab.planted.facts import CAPITALS
from stratoscope.models import LM, wrap
from support import facts, tiny
from support.facts import FACT, LEARNED, PREFIXES, corpus, matrix, planted_fact
from support.subjects import close, lm_of, untouched

EXAMPLE = {
    "fit": {"inputs": [FACT["prompt"], [11, 10, 9, 8]], "layers": [0, 1]},
    "edit": lambda case: {
        "request": FACT,
        "layer": 1,
        "covariance": facts.fitted(case.lm, 1),
        "prefixes": [],
        "steps": 2,
        "ridge": 0.1,
    },
}
MODELS = ("llama", "gpt2", "gemma2", "qwen2", "smollm2")
LONG = FACT | {"target_new": [8, 13, 60]}
END = 2  # where the subject ends in FACT


def spread_out(size: int, seed: int = 0) -> torch.Tensor:
    """Of full rank, and far from even."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(4 * size, size, generator=generator).double()
    return (
        keys.T
        @ keys
        / len(keys)
        * torch.logspace(-2, 2, size).double().outer(torch.logspace(-2, 2, size).double())
    )


def least(moment: np.ndarray, key: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The D of least tr(D moment D^T) with D key = change, by its stationarity and its constraint:
    one system of n + 1 unknowns for each row."""
    n = len(key)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n], system[:n, n], system[n, :n] = 2 * moment, key, key
    right = np.zeros((n + 1, len(change)))
    right[n] = change
    return np.linalg.solve(system, right)[:n].T


# --- the closed form ------------------------------------------------------------------------------


def test_the_update_is_the_constrained_least_squares() -> None:
    moment, generator = spread_out(24), torch.Generator().manual_seed(1)
    key, change = (torch.randn(n, generator=generator).double() for n in (24, 7))
    found = rome.rank_one(key, change, moment)
    close(found, least(moment.numpy(), key.numpy(), change.numpy()), 1e-6)
    close(found @ key, change, 1e-9)
    # keys that are orthogonal to it in the metric of the corpus are written as before
    others = torch.randn(50, 24, generator=generator).double()
    along = torch.linalg.solve(moment, key)
    others -= torch.outer(others @ along / (key @ along), key)
    assert float((others @ found.T).abs().max()) < 1e-9 * float(others.norm())


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_is_the_closed_form_of_plain_keys_and_a_plainly_learned_write(name: str) -> None:
    """Contexts of different length in one padded batch, and each alone by plain hooks."""
    lm, rows = lm_of(name), corpus()
    with untouched(lm):
        moments = rome.fit(lm, rows, layers=1, context=13)
        made = rome.edit(
            lm, LONG, layer=1, covariance=moments, prefixes=PREFIXES, ridge=0.01, **LEARNED
        )
    expected = facts.second_moment(lm, 1, rows)
    close(moments.moments["layers.1.mlp.act"], expected, 1e-5)
    expected += 0.01 * expected.diagonal().mean() * np.eye(len(expected))
    keys = [
        facts.key(lm, 1, [*prefix, *FACT["prompt"]], len(prefix) + END)
        for prefix in ([], *PREFIXES)
    ]
    size = float(facts.write(lm, 1, FACT["prompt"], END).norm())
    change = facts.learned(lm, 1, LONG, PREFIXES, size, **LEARNED)
    assert float(change.norm()) > 0.3
    [(weight, delta)] = made.deltas.items()
    assert dict(lm.model.named_parameters())[weight] is facts.projection(lm, 1).weight
    key = np.mean(keys, axis=0)
    found = matrix(lm, delta)
    close(found @ key, change, 2e-4)
    own = found @ key  # what was learned, to its last digit
    close(found, least(expected, key, own), 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_inside_the_edit_the_key_gives_the_value_and_nothing_else_changes(name: str) -> None:
    lm = lm_of(name)
    made = rome.edit(
        lm, FACT, layer=1, covariance=facts.fitted(lm, 1), prefixes=[], ridge=0.1, **LEARNED
    )
    [(weight, delta)] = made.deltas.items()
    key = facts.key(lm, 1, FACT["prompt"], END)
    wanted = facts.write(lm, 1, FACT["prompt"], END).double().numpy() + matrix(lm, delta) @ key
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    with untouched(lm), made:
        close(facts.write(lm, 1, FACT["prompt"], END), wanted, 1e-5)
        changed = [n for n, p in lm.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [weight]


def test_a_write_is_changed_no_further_than_is_said() -> None:
    lm = lm_of("llama")
    options = {"layer": 1, "covariance": facts.fitted(lm, 1), "prefixes": [], "ridge": 0.1}
    key = facts.key(lm, 1, FACT["prompt"], END)
    size = float(facts.write(lm, 1, FACT["prompt"], END).norm())
    far, near = (
        matrix(lm, next(iter(rome.edit(lm, FACT, **options, **(LEARNED | more)).deltas.values())))
        for more in ({}, {"furthest": 0.05})
    )
    assert float(np.linalg.norm(far @ key)) > 0.1 * size
    assert float(np.linalg.norm(near @ key)) == pytest.approx(0.05 * size, rel=1e-4)


def test_keys_orthogonal_in_the_corpus_are_written_as_before() -> None:
    lm = lm_of("llama")
    moments = rome.fit(lm, corpus(), layers=1)
    made = rome.edit(lm, FACT, layer=1, covariance=moments, prefixes=[], ridge=0.01, **LEARNED)
    held = moments.moments["layers.1.mlp.act"].numpy()
    key = facts.key(lm, 1, FACT["prompt"], END)
    along = np.linalg.solve(held + 0.01 * held.diagonal().mean() * np.eye(len(held)), key)
    others = np.stack([facts.key(lm, 1, row, n) for row in corpus() for n in (3, 7)])
    others -= np.outer(others @ along / (key @ along), key)
    module = facts.projection(lm, 1)
    given = torch.tensor(others, dtype=torch.float32)
    with torch.no_grad():
        plain = module(given)
        with made:
            moved = (module(given) - plain).abs().max()
            at_key = (module(torch.tensor(key).float()) - module.forward(given[0])).norm()
    assert float(moved) < 1e-5
    assert float(at_key) > 0.1


@pytest.mark.parametrize("name", facts.PLANTED)
def test_a_planted_fact_is_rewritten_and_the_others_stay(name: str) -> None:
    lm, moments, asked = facts.memory(name)
    layer = facts.PLANTED[name][0]
    plain = last_logits(lm, asked)
    made = rome.edit(
        lm,
        planted_fact(name, "Kenya", "Oslo"),
        layer=layer,
        covariance=moments,
        prefixes=facts.BEFORE,
        furthest=2.0,
        ridge=0.01 if layer else 1.0,
    )
    with untouched(lm), made:
        edited = last_logits(lm, asked)
        behind = last_logits(lm, [f"is of the {text}" for text in asked])
    said = [lm.tokenizer.decode(i) for i in edited.argmax(dim=1)]
    assert said == ["Oslo" if country == "Kenya" else CAPITALS[country] for country in CAPITALS]
    assert said == [lm.tokenizer.decode(i) for i in behind.argmax(dim=1)]
    moved = (edited - plain).abs().amax(dim=1)
    kenya = list(CAPITALS).index("Kenya")
    others = [n for n in range(len(CAPITALS)) if n != kenya]
    assert float(moved[kenya]) > 20
    # the Llama's countries have neurons of their own; GPT-2's noise is louder
    assert float(moved[others].max()) < (1e-3 if layer else 0.1)
    # the null: as strong a write, under keys by chance
    with rome.random_key(made, seed=1):
        by_chance = last_logits(lm, asked)
    said = [lm.tokenizer.decode(i) for i in by_chance.argmax(dim=1)]
    assert said == list(CAPITALS.values())


def test_the_null_has_the_same_writes_under_other_keys() -> None:
    for name in ("llama", "gpt2"):
        lm = lm_of(name)
        made = rome.edit(
            lm, FACT, layer=1, covariance=facts.fitted(lm, 1), prefixes=[], ridge=1.0, steps=2
        )
        [one, other] = (
            matrix(lm, next(iter(edit.deltas.values())))
            for edit in (made, rome.random_key(made, seed=3))
        )
        close(other @ other.T, one @ one.T, 1e-5)
        keys = [np.linalg.svd(x).Vh[0] for x in (one, other)]
        assert abs(keys[0] @ keys[1]) < 0.6
        again, drawn = (rome.random_key(made, seed=seed) for seed in (3, 4))
        close(matrix(lm, next(iter(again.deltas.values()))), other, 1e-12)
        assert not np.allclose(matrix(lm, next(iter(drawn.deltas.values()))), other)


# --- the edit is one of the house -----------------------------------------------------------------


def test_a_second_edit_is_made_on_top_of_the_first() -> None:
    name = "fact_lookup"
    lm, moments, asked = facts.memory(name)
    options = {"layer": 1, "covariance": moments, "prefixes": facts.BEFORE, "ridge": 0.01}
    with untouched(lm), rome.edit(lm, planted_fact(name, "Kenya", "Oslo"), **options):
        second = rome.edit(lm, planted_fact(name, "Peru", "Tokyo"), **options)
        with second:
            ids = last_logits(lm, asked).argmax(dim=1)
    assert [lm.tokenizer.decode(i) for i in ids] == [
        "Paris", "Tokyo", "Tokyo", "Oslo", "Oslo", "Havana",
    ]  # fmt: skip


def test_twice_is_refused_and_a_folder_serves_as_well(tmp_path: Path) -> None:
    lm = lm_of("llama")
    moments = facts.fitted(lm, 1)
    moments.save(tmp_path / "keys")
    options = {"layer": 1, "prefixes": [], "ridge": 0.1, "steps": 2}
    made = rome.edit(lm, FACT, covariance=moments, **options)
    again = rome.edit(lm, FACT, covariance=tmp_path / "keys", **options)
    assert torch.equal(*(next(iter(one.deltas.values())) for one in (made, again)))
    made.save(tmp_path / "edit")
    with untouched(lm), made:
        inside = last_logits(lm, [FACT["prompt"]])
        for same in (made, again):
            with pytest.raises(InputError, match="open already"), same:
                pass
        assert torch.equal(last_logits(lm, [FACT["prompt"]]), inside)
    with Edit.load(lm, tmp_path / "edit"):
        assert torch.equal(last_logits(lm, [FACT["prompt"]]), inside)
    with pytest.raises(LoadError, match=r"no fitted.json"):
        rome.edit(lm, FACT, covariance=tmp_path, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_get_an_update_made_in_full(dtype: torch.dtype) -> None:
    lm = wrap(tiny.model("llama").to(dtype))
    made = rome.edit(
        lm, FACT, layer=1, covariance=facts.fitted(lm, 1), prefixes=[], ridge=0.1, **LEARNED
    )
    [(_, delta)] = made.deltas.items()
    assert delta.dtype is torch.float32
    key = facts.key(lm, 1, FACT["prompt"], END)
    before = facts.write(lm, 1, FACT["prompt"], END).double()
    with untouched(lm), made:
        found = facts.write(lm, 1, FACT["prompt"], END).double() - before
    wanted = torch.tensor(matrix(lm, delta) @ key)
    # a weight's rounding, of the weight's own size, over all neurons
    assert float((found - wanted).norm()) < 8 * torch.finfo(dtype).eps * float(before.norm())
    assert float(wanted.norm()) > 0.3 * float(before.norm())


def test_without_prefixes_the_model_says_its_own() -> None:
    lm = with_text()
    options = {"layer": 1, "covariance": facts.fitted(lm, 1), "ridge": 0.1, "steps": 2}
    fact = {"prompt": "{} is the", "subject": "Rome", "target_new": "x"}
    given = []
    for opening in ("The", "Therefore", "Because", "I", "You"):
        ids = torch.tensor([lm.tokenizer(opening)["input_ids"]])
        said = lm.model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=0)[0]
        said = said[: len(said) - int(said[-1] == lm.model.config.eos_token_id)]
        given.append(f"{lm.tokenizer.decode(said)}.")
    own, same, bare = (
        next(iter(rome.edit(lm, fact, prefixes=prefixes, **options).deltas.values()))
        for prefixes in (None, given, [])
    )
    assert torch.equal(own, same)
    assert not torch.allclose(own, bare, rtol=0.1)


# --- what is refused ------------------------------------------------------------------------------


def test_a_covariance_that_cannot_be_solved_says_its_rank() -> None:
    keys = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(InputError, match=r"has rank 5, and 8 are needed.*ridge=0.01"):
        solved(keys.T @ keys, torch.ones(8, 1).double())
    silent = spread_out(6)
    silent[2], silent[:, 2] = 0, 0
    with pytest.raises(InputError, match=r"has rank 5, and 6"):
        solved(silent, torch.ones(6, 1).double())
    lm = lm_of("llama")
    with pytest.raises(InputError, match=r"has rank 9, and 48 are needed"):
        rome.edit(lm, FACT, layer=1, covariance=facts.fitted(lm, 1), prefixes=[])


def test_covariances_of_something_else_are_refused() -> None:
    lm, other = lm_of("llama"), facts.fitted(lm_of("gpt2"), 1)
    options = {"layer": 1, "prefixes": [], "ridge": 0.1}
    with pytest.raises(InputError, match=r"fitted on GPT2.*fit it on this model"):
        rome.edit(lm, FACT, covariance=other, **options)
    wide = Moments(moments=other.moments, tokens=9, settings={}, seed=None, provenance={})
    with pytest.raises(InputError, match=r"is \(128, 128\), and the keys there have 48"):
        rome.edit(lm, FACT, covariance=wide, **options)
    with pytest.raises(InputError, match=r"is of layers.0.mlp.act, not of `layers.1.mlp.act`"):
        rome.edit(lm, FACT, covariance=facts.fitted(lm, 0), **options)
    with pytest.raises(InputError, match="ridge=-1"):
        rome.edit(lm, FACT, layer=1, covariance=facts.fitted(lm, 1), ridge=-1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": [4, 6]}, r"stands 0 times in the prompt"),
        ({"prompt": [4, 5, 4, 5, 6]}, r"stands 2 times"),
        ({"subject": []}, "give its ids"),
        ({"subject": "France"}, "give its ids"),
        ({"target_new": []}, r"target_new is empty"),
        ({"target_new": [96]}, r"has the id 96; there are 96"),
        ({"target_new": None}, "has no target_new"),
        ({"neighbors": []}, "did you mean 'neighbours'"),
    ],
)
def test_a_fact_that_cannot_be_read_is_refused(change: dict, said: str) -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match=said):
        rome.edit(lm, FACT | change, layer=1, covariance=facts.fitted(lm, 1), ridge=0.1)


def with_text() -> LM:
    """A tokenizer of bytes that joins "h" and "e", and a space and "the"."""
    config = hf.LlamaConfig(**tiny.GROUPED | {"vocab_size": 264, "bos_token_id": None})
    torch.manual_seed(0)
    return wrap(hf.LlamaForCausalLM(config).eval(), tiny.byte_level())


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ({"subject": "Paris"}, r"subject 'Paris' stands 0 times in the prompt 'Rome is the'"),
        ({"subject": "e"}, "stands 2 times"),
        ({"subject": " "}, "give its name"),
        ({"subject": "R", "prompt": "{} and {}"}, "stands 2 times"),
        (
            {"subject": "th", "prompt": "In {}e"},
            r"reads the end of the subject 'th' together.*' the'",
        ),
        ({"target_new": "  "}, "target_new is empty"),
        ({"prompt": "Rome is t", "target_new": "\the"}, None),
        ({"prompt": "Rome is ", "target_new": "the"}, r"leave out the space at the prompt's end"),
    ],
)
def test_a_text_that_the_tokenizer_cuts_elsewhere_is_refused(fact: dict, said: str | None) -> None:
    lm = with_text()
    whole = {"prompt": "Rome is the", "subject": "Rome", "target_new": "x"} | fact
    asked = {"layer": 1, "covariance": facts.fitted(lm, 1), "prefixes": [], "ridge": 0.1}
    if said is None:
        assert rome.edit(lm, whole, **asked, steps=1).deltas
        return
    with pytest.raises(InputError, match=said):
        rome.edit(lm, whole, **asked)


def test_a_subject_in_the_prompt_or_in_its_place_is_one() -> None:
    lm = with_text()
    asked = {"layer": 1, "covariance": facts.fitted(lm, 1), "ridge": 0.1, "steps": 2}
    asked["prefixes"] = ["We know: "]
    forms = [
        {"prompt": "{} is the", "subject": "Rome", "target_new": "x"},
        {"prompt": "Rome is the", "subject": "Rome", "target_new": " x"},
    ]
    one, two = (next(iter(rome.edit(lm, form, **asked).deltas.values())) for form in forms)
    assert torch.equal(one, two)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match=r"has 3, numbered 0 to 2"):
        rome.edit(lm, FACT, layer=layer, covariance=facts.fitted(lm, 1))
    with pytest.raises(InputError, match=r"has 3, numbered 0 to 2"):
        rome.fit(lm, corpus(), layers=[0, layer])


def test_models_without_such_a_weight_are_refused() -> None:
    for name in ("bert", "vit"):
        with pytest.raises(SiteError, match="does not predict"):
            rome.fit(lm_of(name), corpus(), layers=1)
    with pytest.raises(SiteError, match=r"no linear map .*mixture of experts.*fine_tune"):
        rome.fit(lm_of("mixtral"), corpus(), layers=1)
    lm = lm_of("llama")
    mlp, held = lm.model.model.layers[1].mlp, facts.fitted(lm, 1)
    plain = mlp.down_proj

    class Int8(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) * 0.01)

    mlp.down_proj = Int8(48, 32, bias=False)
    codes = (plain.weight.detach() * 100).round().to(torch.int8)
    mlp.down_proj.weight = torch.nn.Parameter(codes, requires_grad=False)
    with pytest.raises(InputError, match=r"Int8, which holds no plain .*quantised.*unquantised"):
        rome.edit(lm, FACT, layer=1, covariance=held, ridge=0.1)
    mlp.down_proj = deepcopy(plain)
    lm.model.model.layers[2].mlp.down_proj.weight = mlp.down_proj.weight
    with pytest.raises(SiteError, match=r"is that of .*layers.1.*layers.2.* at once"):
        rome.edit(lm, FACT, layer=1, covariance=held, ridge=0.1)


def test_what_else_is_refused() -> None:
    lm = lm_of("llama")
    options = {"layer": 1, "covariance": facts.fitted(lm, 1), "ridge": 0.1}
    for request, said in (([FACT, LONG], "2 facts.*memit"), ([], "a fact was expected")):
        with pytest.raises(InputError, match=said):
            rome.edit(lm, request, **options)
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"kl": -1.0}, {"furthest": 0.0}):
        with pytest.raises(InputError, match="one step at least"):
            rome.edit(lm, FACT, **options | wrong)
    with pytest.raises(InputError, match="lower the rate"):
        rome.edit(lm, FACT, **options, kl=1e39)
    with pytest.raises(InputError, match="these texts have 144"):
        rome.fit(lm, corpus(), layers=1, tokens=145)
    with pytest.raises(InputError, match="of which layers"):
        rome.fit(lm, corpus(), layers=[])
    with pytest.raises(InputError, match="changes no weight"):
        rome.random_key(Edit(lm))


def test_a_corpus_is_read_in_parts_that_make_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows are of one token behind BOS, so that where a part ends changes nothing before it."""
    lm = lm_of("gpt2")
    whole = rome.fit(lm, corpus(), layers=[0, 2], tokens=100, context=2)
    monkeypatch.setattr(rome, "_TOKENS", 7)
    parts = rome.fit(lm, corpus(), layers=[0, 2], tokens=100, context=2)
    assert whole.tokens == parts.tokens == 100
    for site, held in whole.moments.items():
        close(parts.moments[site], held, 1e-6)
    singly = [[t] for row in corpus() for t in row][:100]
    close(whole.moments["layers.2.mlp.act"], facts.second_moment(lm, 2, singly), 1e-5)
