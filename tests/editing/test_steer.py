"""A planted concept is found again, the edit is a plain hook's addition, also while generating with
a cache, and nothing is left behind."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from stratoscope.editing import steer
from stratoscope.engine.edit import Edit
from stratoscope.engine.generate import generate
from stratoscope.engine.metric import last_logits
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, LoadError, SiteError
from stratoscope.models import LM, wrap
from support.concept import FOIL, MORE, axis, concept, pairs
from support.subjects import CORRUPT, ROWS, THREE, close, lm_of, padded, untouched

EXAMPLE = {
    "fit": lambda case: {"inputs": {"positive": case.inputs, "negative": case.corrupt}},
    "edit": lambda case: {
        "request": {"layers.1.resid_post": torch.linspace(-1, 1, case.lm.dims.dim)},
        "strength": 3.0,
    },
}


def unit(x: Tensor) -> Tensor:
    return x.flatten() / x.norm()


def layer_of(lm: LM, number: int) -> nn.Module:
    return (
        lm.model.transformer.h[number]
        if lm.family.name == "gpt2"
        else lm.model.model.layers[number]
    )


@contextmanager
def plainly(module: nn.Module, vector: Tensor) -> Iterator[None]:
    """A forward hook as anybody writes it: the vector added to what a layer gives."""

    def hook(_: nn.Module, __: object, out: Tensor | tuple[Tensor, ...]) -> object:
        return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    handle = module.register_forward_hook(hook)
    yield
    handle.remove()


# --- what is fitted -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", steer.WAYS)
def test_a_planted_concept_is_found(how: str) -> None:
    lm = concept()
    asked = {"answer": MORE, "foil": FOIL} if how == "attribution" else {}
    found = steer.fit(lm, pairs(48), how=how, **asked)
    for vector in found.vectors.values():
        assert float(unit(vector) @ axis()) > 0.97
    assert found.agreement == dict.fromkeys(found.vectors, 1.0)
    back = steer.fit(lm, [(no, yes) for yes, no in pairs(48)], how=how, **asked)
    for name, vector in found.vectors.items():  # the sign is the pairs'
        close(back.vectors[name], -vector)


def test_centred_differences_lose_what_all_pairs_share() -> None:
    """The wrong thing: the axis along which pairs differ from each other."""
    found = steer.fit(concept(topic=1.5), pairs(48), how="pca")
    both = found.states["layers.1.resid_post"]
    centred = PCA(n_components=1).fit((both[1] - both[0]).numpy()).components_[0]
    assert float(unit(found.vectors["layers.1.resid_post"]) @ axis()) > 0.9
    assert abs(float(torch.tensor(centred).float() @ axis())) < 0.5


def test_attribution_weighs_the_token_that_matters() -> None:
    """The concept stands first of four tokens, and what comes last says nothing of it."""
    lm, site = concept(), "layers.0.resid_pre"
    turned = [([yes[2], *yes[:2], 5], [no[2], *no[:2], 5]) for yes, no in pairs(48)]
    with pytest.raises(InputError, match=r"two sides are the same at `layers.0.resid_pre`"):
        steer.fit(lm, turned, site=site)
    every, first = (steer.fit(lm, turned, site=site, positions=p) for p in (None, 0))
    close(every.vectors[site] * 4, first.vectors[site])
    found = steer.fit(lm, turned, site=site, how="attribution", answer=MORE, foil=FOIL)
    along = [float(fit.vectors[site] @ axis()) for fit in (every, found, first)]
    assert 2 * along[0] < along[1] <= along[2] + 1e-4
    assert float(unit(found.vectors[site]) @ axis()) > 0.97


@pytest.mark.parametrize("name", THREE)
def test_a_mean_is_that_of_plain_hidden_states(name: str) -> None:
    lm = lm_of(name)
    sites = ["layers.1.resid_post", "layers.0.attn.z", "layers.2.mlp.out"]
    found = steer.fit(lm, list(zip(ROWS, CORRUPT)), site=sites)
    last = []
    for row in (*ROWS, *CORRUPT):
        with torch.no_grad():
            states = lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        last.append(states[2][0, -1])  # what enters layer 2
    close(found.vectors[sites[0]], (last[0] + last[1] - last[2] - last[3]) / 2)
    for side, given in enumerate((CORRUPT, ROWS)):
        for pair, row in enumerate(given):
            alone = capture(lm, [row], *sites, positions=-1)
            for site in sites:
                close(found.states[site][side, pair], alone[site][0])
    assert found.vectors[sites[1]].shape == (lm.dims.heads, lm.dims.head_dim)
    mean = steer.fit(lm, list(zip(ROWS, CORRUPT)), site=sites[0], positions=None)
    with torch.no_grad():
        whole = lm.model(torch.tensor([ROWS[1]]), output_hidden_states=True).hidden_states[2]
    close(mean.states[sites[0]][1, 1], whole[0].mean(dim=0))
    some = steer.fit(lm, list(zip(ROWS, CORRUPT)), site=sites[0], positions=[-2, 1])
    close(some.states[sites[0]][1, 1], whole[0, [3, 1]].mean(dim=0))


def test_pairs_are_read_in_every_form() -> None:
    lm = lm_of("llama")
    rows = [{"positive": yes, "negative": no} for yes, no in zip(ROWS, CORRUPT)]
    sides = [
        {"positive": padded(ROWS, s), "negative": padded(CORRUPT, s)} for s in ("left", "right")
    ]
    first = steer.fit(lm, list(zip(ROWS, CORRUPT))).vectors
    for given in (rows, *sides):
        for name, vector in steer.fit(lm, given).vectors.items():
            close(vector, first[name])


# --- what is added --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THREE)
def test_an_edit_is_a_plain_hook_s_addition(name: str) -> None:
    lm = lm_of(name)
    vector = torch.randn(lm.dims.dim, generator=torch.Generator().manual_seed(0))
    edit = steer.edit(lm, {"layers.1.resid_post": vector}, strength=1.5)
    plain = last_logits(lm, ROWS)
    with untouched(lm), edit:
        inside = last_logits(lm, ROWS)
        said = generate(lm, ROWS, tokens=6)
    for number, row in enumerate(ROWS):
        with plainly(layer_of(lm, 1), 1.5 * vector), torch.no_grad():
            expected = lm.model(torch.tensor([row])).logits[0, -1]
            whole = lm.model.generate(
                torch.tensor([row]), max_new_tokens=6, do_sample=False, pad_token_id=0
            )
        close(inside[number], expected, 1e-5)
        assert said[number].tolist() == whole[0, len(row) :].tolist()[: len(said[number])]
    assert not torch.allclose(inside, plain, atol=1e-2)
    with steer.edit(lm, {"layers.1.resid_post": vector}, strength=0.0):
        assert torch.equal(last_logits(lm, ROWS), plain)


def test_generation_with_the_cache_is_generation_without() -> None:
    """Every new token is steered too, whatever stands in the cache."""
    lm = lm_of("llama")
    vector = torch.randn(lm.dims.dim, generator=torch.Generator().manual_seed(1))
    row = list(ROWS[0])
    with steer.edit(lm, {"layers.0.resid_post": vector}, strength=2.0):
        [said] = generate(lm, [row], tokens=5)
        for token in said.tolist():
            assert int(last_logits(lm, [row])[0].argmax()) == token
            row.append(token)


def test_positions_and_heads_are_those_that_are_named() -> None:
    lm = lm_of("llama")
    z = torch.ones(lm.dims.heads, lm.dims.head_dim)
    with steer.edit(lm, {"layers.1.attn.z": z}, units=[2], positions=-1):
        seen = capture(lm, ROWS, "layers.1.attn.z")["layers.1.attn.z"]
    before = capture(lm, ROWS, "layers.1.attn.z")["layers.1.attn.z"]
    moved = seen - before
    for number, row in enumerate(ROWS):
        close(moved[number, len(row) - 1, 2], torch.ones(lm.dims.head_dim))
        moved[number, len(row) - 1, 2] = 0
    assert float(moved.abs().max()) == 0


def test_norms_are_kept(tmp_path: Path) -> None:
    lm = lm_of("llama")
    site, vector = "layers.1.resid_post", torch.linspace(-3, 3, lm.dims.dim)
    before = capture(lm, ROWS, site)[site]
    edit = steer.edit(lm, {site: vector}, strength=2.0, keep_norm=True)
    with untouched(lm), edit:
        after = capture(lm, ROWS, site)[site]
        logits = last_logits(lm, ROWS)
        # a sweep inside is of the model as it is there
        base = sweep(lm, ROWS, [()], lambda x, _: x[:, 7])
    close(after.norm(dim=-1), before.norm(dim=-1), 1e-5)
    added = before + 2 * vector
    close(after, added / added.norm(dim=-1, keepdim=True) * before.norm(dim=-1, keepdim=True))
    assert float((added.norm(dim=1) - before.norm(dim=1)).abs().max()) > 0.01  # the wrong axis
    close(base[0], logits[:, 7])
    edit.save(tmp_path / "turned.safetensors")
    with steer.Steer.load(lm, tmp_path / "turned.safetensors"):
        assert torch.equal(last_logits(lm, ROWS), logits)
    with steer.edit(lm, {site: vector}, strength=0.0, keep_norm=True):
        assert torch.equal(capture(lm, ROWS, site)[site], before)


def test_a_planted_answer_follows_the_strength() -> None:
    lm = concept()
    found = steer.fit(lm, pairs(32))
    prompt = [[5, 6, 7]]
    gaps = []
    for strength in (-1.0, 0.0, 1.0):
        with steer.edit(lm, found, layers=1, strength=strength):
            logits = last_logits(lm, prompt)[0]
        gaps.append(float(logits[MORE] - logits[FOIL]))
    assert gaps[0] < gaps[1] - 1 < gaps[2] - 2
    with steer.edit(lm, found, layers=1, strength=2.0):
        assert int(generate(lm, prompt, tokens=1)[0]) == MORE


# --- what is kept, and what is refused ------------------------------------------------------------


def test_a_fit_opens_in_a_folder_and_an_edit_in_a_file(tmp_path: Path) -> None:
    lm = lm_of("llama")
    found = steer.fit(lm, list(zip(ROWS, CORRUPT)), how="pca")
    found.save(tmp_path / "fit")
    with steer.edit(lm, tmp_path / "fit", layers=[0, 2], strength=2.0, positions=[0, -1]) as edit:
        expected = last_logits(lm, ROWS)
        assert "layers.0.resid_post, layers.2.resid_post" in edit.note
    edit.save(tmp_path / "edit.safetensors")
    with steer.Steer.load(lm, tmp_path / "edit.safetensors"):
        assert torch.equal(last_logits(lm, ROWS), expected)
    with pytest.raises(LoadError, match="was to hold 'edit', and holds 'steering edit'"):
        Edit.load(lm, tmp_path / "edit.safetensors")
    with pytest.raises(InputError, match=r"were fitted on LlamaForCausalLM .* and this is Gemma2"):
        steer.Steer.load(lm_of("gemma2"), tmp_path / "edit.safetensors")
    assert np.allclose(steer.Steering.load(tmp_path / "fit").agreement["layers.0.resid_post"], 1)


def test_bad_pairs_are_refused() -> None:
    lm = lm_of("llama")
    for nothing in ([], {"positive": [], "negative": []}, {"positive": ROWS}):
        with pytest.raises(InputError, match="no pair of texts"):
            steer.fit(lm, nothing)
    with pytest.raises(InputError, match="2 positive texts and 1 negative ones"):
        steer.fit(lm, {"positive": ROWS, "negative": CORRUPT[:1]})
    for half in (
        [(ROWS[0], CORRUPT[0]), (ROWS[1],)],
        [(ROWS[0], CORRUPT[0]), {"positive": ROWS[1]}],
    ):
        with pytest.raises(InputError, match="pair 1 is"):
            steer.fit(lm, half)
    with pytest.raises(InputError, match="the two sides are the same"):
        steer.fit(lm, list(zip(ROWS, ROWS)))
    with pytest.raises(SiteError, match="one vector at each token"):
        steer.fit(lm, list(zip(ROWS, CORRUPT)), site="layers.0.attn.pattern")
    with pytest.raises(InputError, match="choose 'mean', 'pca' or 'attribution'"):
        steer.fit(lm, list(zip(ROWS, CORRUPT)), how="median")
    with pytest.raises(InputError, match="give both"):
        steer.fit(lm, list(zip(ROWS, CORRUPT)), how="attribution", answer=7)


def test_bad_edits_are_refused() -> None:
    lm = lm_of("llama")
    found = steer.fit(lm, list(zip(ROWS, CORRUPT)))
    with pytest.raises(InputError, match=r"no layer was named: .* layers \[0, 1, 2\]"):
        steer.edit(lm, found)
    with pytest.raises(InputError, match=r"layers \[7\]"):
        steer.edit(lm, found, layers=7)
    assert len(steer.edit(lm, found, layers="all").held) == 3
    for strength in (1e30, float("nan"), float("inf")):
        with pytest.raises(InputError, match=re.escape(f"{strength:g} at `layers.2.resid_post`")):
            steer.edit(lm, found, layers=2, strength=strength)
    with pytest.raises(InputError, match=r"fitted on LlamaForCausalLM .* and this is Gemma2"):
        steer.edit(lm_of("gemma2"), found, layers=1)
    steer.edit(lm_of("gemma2"), found, layers=1, foreign=True)
    with pytest.raises(InputError, match=r"shape \(5,\), and LlamaForCausalLM has \(32,\) there"):
        steer.edit(lm, {"layers.1.resid_post": torch.ones(5)})


def test_an_edit_is_not_applied_twice() -> None:
    lm = lm_of("llama")
    found = steer.fit(lm, list(zip(ROWS, CORRUPT)))
    for keep in (False, True):
        one = steer.edit(lm, found, layers=1, keep_norm=keep)
        again = steer.edit(lm, found, layers=1, keep_norm=keep)
        with untouched(lm), one:
            for second in (one, again):
                with (
                    pytest.raises(InputError, match=r"being added at `layers.1.resid_post` alr"),
                    second,
                ):
                    pass
            with steer.edit(lm, found, layers=2):  # another layer's is no second time
                pass
        with one:
            pass  # left, it may be entered anew


def test_half_precision_names_the_layer_whose_vector_is_too_long() -> None:
    half = wrap(copy.deepcopy(lm_of("llama").model).half())
    vector = {"layers.1.resid_post": torch.ones(32)}
    steer.edit(half, vector, strength=6e4)
    with pytest.raises(InputError, match=r"strength 70000 at `layers.1.resid_post`: .* float16"):
        steer.edit(half, vector, strength=7e4)
