"""editing.core_neurons: counts by hand and by plain hooks; cut weights give what masked neurons
give, on every kind of MLP, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stratoscope.editing import core_neurons, round_weights
from stratoscope.engine.edit import Edit
from stratoscope.engine.generate import generate
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import InputError, SiteError
from stratoscope.models import LM, wrap
from support import tiny
from support.subjects import ROWS, THREE, close, entering, lm_of, padded, parts, untouched

FAMILIES = ("llama", "gpt2", "gemma2", "phi3", "opt", "gpt_neox")  # gated, Conv1D, fused, no module


def some(lm: LM, keep: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(lm.dims.layers, lm.dims.neurons, generator=generator) < keep


EXAMPLE = {"edit": lambda case: {"request": some(case.lm)}, "measure": {"keep": 0.3}}


def by_hand(act: np.ndarray, share: float, keep: float) -> list[int]:
    """The core of one prompt in one layer, from (position, neuron) activations, by sorting."""
    counts = np.zeros(act.shape[1])
    for row in act:
        positive = np.sort(row[row > 0])[::-1]
        if len(positive):
            counts += row >= positive[int(np.ceil(share * len(positive))) - 1]
    order = np.lexsort((-act.sum(axis=0), -counts))
    return sorted(order[: round(keep * act.shape[1])].tolist())


@contextmanager
def masked(lm: LM, core: Tensor) -> Iterator[None]:
    """Neurons out of the core set to 0 by plain hooks where they enter the last projection."""
    handles = []
    for layer, mask in enumerate(core):
        [out] = lm.layout.writers(lm.layout.resolve_one(f"layers.{layer}.mlp.out"))[:1]
        hook = lambda _, args, mask=mask: (args[0] * mask, *args[1:])  # noqa: E731
        handles.append(out.register_forward_pre_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def go_on(lm: LM, row: list[int], new: list[int], core: Tensor | None = None) -> Tensor:
    """Logits of new tokens one by one after a prompt, by plain Transformers; masked where a core is
    given, after the prompt."""
    with torch.no_grad():
        cache = lm.model(torch.tensor([row]), use_cache=True).cache
        with nullcontext() if core is None else masked(lm, core.float()):
            return torch.cat(
                [lm.model(torch.tensor([[token]]), cache=cache).logits[0] for token in new]
            )


def test_counts_by_hand() -> None:
    act = torch.tensor([[[5.0, 4, 3, 2, 1, -9], [-1, -1, -1, -1, 2, 3], [0, 0, 0, -1, -1, -1]]])
    found = core_neurons.counted(act, 0.4)[0].int().tolist()
    assert found == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
    assert core_neurons.counted(act.abs(), 0.4)[0].sum(dim=1).tolist() == [3, 6, 3]  # ties
    counts, total = torch.tensor([[2.0, 1, 2, 1, 0]]), torch.tensor([[1.0, 2, 3, 9, 9]])
    assert core_neurons.most(counts, 0.6, total).tolist() == [[True, False, True, True, False]]
    assert core_neurons.most(counts, 0.6).tolist() == [[True, True, True, False, False]]
    assert core_neurons.most(counts, 0.01).sum() == 1
    core = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 1, 1]]], dtype=bool)
    close(core_neurons.overlap(core), [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]])


@pytest.mark.parametrize("name", THREE)
def test_the_core_is_that_of_plain_hooks(name: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        found = core_neurons.measure(lm, padded(ROWS, "left"), token_share=0.3, keep=0.25)
    for example, row in enumerate(ROWS):
        for layer in range(lm.dims.layers):
            act = entering(lm, parts(lm, layer)[1], row).numpy()
            core = np.flatnonzero(found.core[example, layer].values).tolist()
            assert core == by_hand(act, 0.3, 0.25)
    assert found.counts.max() <= len(ROWS[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_weights_give_what_masked_neurons_give(name: str) -> None:
    """The prompt's own core, found while it is read; then token by token, weights cut out."""
    lm = lm_of(name)
    row, new = ROWS[0], [5, 61, 33]
    core = torch.tensor(core_neurons.measure(lm, [row], keep=0.3).core[0].values)
    core[:1] = True
    expected, plain = go_on(lm, row, new, core), go_on(lm, row, new)
    edit = core_neurons.edit(lm, 0.3, from_layer=1)
    with untouched(lm), edit:
        found = go_on(lm, row, new)
        assert edit.saving == pytest.approx(0.7 * 2 / 3, abs=0.01)
    assert (plain - expected).abs().max() > 1e-3
    close(found, expected, 1e-5)
    with edit, torch.enable_grad():  # what was read counts anew in each block
        lm.model(torch.tensor([row]))
        assert edit.saving == 0


@pytest.mark.parametrize("name", [*FAMILIES, "bert"])
def test_a_given_core_acts_on_all_that_runs(name: str, tmp_path: Path) -> None:
    lm = lm_of(name)
    core, inputs = some(lm), padded(ROWS, "left")
    with torch.no_grad(), masked(lm, core.float()):
        expected = lm(inputs)["logits"].clone()
    edit = core_neurons.edit(lm, core.numpy())
    edit.save(tmp_path / "core")
    loaded = core_neurons.Core.load(lm, tmp_path / "core")
    with untouched(lm), torch.no_grad():
        for each in (edit, loaded):
            with each:
                found = lm(inputs)["logits"].clone()
                assert each.saving == pytest.approx(1 - float(core.float().mean()))
            close(found, expected, 1e-5)
        with Edit.load(lm, tmp_path / "core"):  # as a mask alone
            close(lm(inputs)["logits"], expected, 1e-5)
    with edit:  # with gradients it is masked
        close(lm(inputs)["logits"].detach(), expected, 1e-5)
        assert edit.saving == 0


def test_all_neurons_are_the_plain_model_to_the_bit() -> None:
    lm = lm_of("llama")
    for request in (1.0, torch.ones(lm.dims.layers, lm.dims.neurons, dtype=torch.bool)):
        with untouched(lm), core_neurons.edit(lm, request, from_layer=0):
            assert torch.equal(go_on(lm, ROWS[0], [5, 61]), go_on(lm, ROWS[0], [5, 61]))
            inside = go_on(lm, ROWS[0], [5, 61])
        assert torch.equal(inside, go_on(lm, ROWS[0], [5, 61]))


def test_a_batch_of_several_cores_is_masked_and_equals_each_alone() -> None:
    lm = lm_of("llama")
    edit = core_neurons.edit(lm, 0.2, from_layer=0)
    with untouched(lm), edit:
        both = generate(lm, padded(ROWS, "left"), tokens=6, eos_token_id=-1)
        assert edit.saving == 0
        alone = [generate(lm, [row], tokens=6, eos_token_id=-1)[0] for row in ROWS]
        assert edit.saving == pytest.approx(0.8, abs=0.02)
        twice = generate(lm, [ROWS[0], ROWS[0]], tokens=6, eos_token_id=-1)
        assert edit.saving == pytest.approx(0.8, abs=0.02)  # one core for both
    assert [x.tolist() for x in both] == [x.tolist() for x in alone]
    assert twice[1].tolist() == alone[0].tolist()


def test_who_reads_neurons_sees_them_masked() -> None:
    lm = lm_of("llama")
    core = some(lm)
    edit = core_neurons.edit(lm, core)
    plain = capture(lm, ROWS[:1], "layers.*.mlp.act").stack("layers.*.mlp.act")[:, 0]
    with edit:
        seen = capture(lm, ROWS[:1], "layers.*.mlp.act").stack("layers.*.mlp.act")[:, 0]
        assert edit.saving == 0
    assert torch.equal(seen[0], plain[0] * core[0])
    assert not seen.transpose(1, 2)[~core].any()
    with torch.no_grad(), edit, trace(lm, "layers.1.mlp.pre", stop=False) as pre:
        lm(ROWS[:1])
        assert edit.saving == pytest.approx(float((~core).float()[[0, 2]].sum() / core.numel()))
    assert pre["layers.1.mlp.pre"].shape[-1] == lm.dims.neurons


@torch.no_grad()
def test_nested_with_another_edit_and_after_an_error() -> None:
    lm = lm_of("llama")
    one, two = some(lm, 0.7), some(lm, 0.4)
    with core_neurons.edit(lm, one & two):
        expected = lm(ROWS[:1])["logits"].clone()
    with untouched(lm), core_neurons.edit(lm, one), core_neurons.edit(lm, two):
        close(lm(ROWS[:1])["logits"], expected, 1e-5)
    rounded = round_weights.edit(lm, 4)
    with rounded, masked(lm, one.float()):
        expected = lm(ROWS[:1])["logits"].clone()
    edit = core_neurons.edit(lm, one)
    with untouched(lm), edit:
        plain = lm(ROWS[:1])["logits"].clone()
        with rounded:  # the weights that were cut are no longer those
            close(lm(ROWS[:1])["logits"], expected, 1e-5)
        close(lm(ROWS[:1])["logits"], plain, 1e-6)
    forwards = [module.__dict__.get("forward") for module in lm.model.modules()]
    hook = lm.model.model.layers[1].mlp.act_fn.register_forward_hook(_break)
    before = {name: x.clone() for name, x in lm.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), edit:
        lm(ROWS[:1])
    hook.remove()
    assert all(torch.equal(x, before[name]) for name, x in lm.model.state_dict().items())
    assert [module.__dict__.get("forward") for module in lm.model.modules()] == forwards


def _break(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_planted_neuron_is_core_at_every_share_and_not_by_its_gate() -> None:
    """Neuron 7 speaks loudest at every token and decides the answer; neuron 9 has the larger gate,
    and what it says is negative."""
    lm = wrap(tiny.model("llama"))
    mlp, lens = lm.model.model.layers[1].mlp, lm.model.lm_head.weight
    with torch.no_grad():
        x = entering(lm, mlp.gate_proj, ROWS[0]).mean(dim=0)
        x = x / x.norm()
        for neuron, gate, up in ((7, 60.0, 60.0), (9, 90.0, -60.0)):
            mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = gate * x, up * x
        mlp.down_proj.weight[:, 7] = lens[33]
        mlp.down_proj.weight[:, 9] = 0.0
        gate = torch.nn.functional.silu(mlp.gate_proj(entering(lm, mlp, ROWS[0])))
    counts = core_neurons.counted(gate, 0.1).float().sum(dim=0)
    by_gate = core_neurons.most(counts, 1 / 48, gate.sum(dim=0))
    assert by_gate.nonzero().flatten().tolist() == [9]
    for keep in (1 / lm.dims.neurons, 0.1, 0.5, 1.0):
        found = core_neurons.measure(lm, [ROWS[0]], keep=keep, token_share=0.1)
        assert found.core[0, 1, 7]
    with core_neurons.edit(lm, 1 / lm.dims.neurons, token_share=0.1, from_layer=1):
        assert go_on(lm, ROWS[0], [14])[-1].argmax() == go_on(lm, ROWS[0], [14])[-1].argmax() == 33


def test_refusals() -> None:
    lm = lm_of("llama")
    for bad in ({"request": 0.0}, {"request": 1.5}, {"token_share": 0.0}, {"sign": "negative"}):
        with pytest.raises(InputError, match="shares are above 0"):
            core_neurons.edit(lm, **({"request": 0.4} | bad))
    with pytest.raises(InputError, match="layers 0 to 2"):
        core_neurons.edit(lm, 0.4, from_layer=3)
    with pytest.raises(InputError, match="True or False for each of 3 layers and 48 neurons"):
        core_neurons.edit(lm, torch.ones(2, 48, dtype=torch.bool))
    with pytest.raises(InputError, match="nothing to save"):
        core_neurons.edit(lm, 0.4).save("anywhere")
    cache = lm.model(torch.tensor([ROWS[0]]), use_cache=True).cache
    with core_neurons.edit(lm, 0.4), pytest.raises(InputError, match="before the block"):
        lm.model(torch.tensor([[5]]), cache=cache)
    with pytest.raises(SiteError):
        core_neurons.edit(lm_of("mixtral"), 0.4)
