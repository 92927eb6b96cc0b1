"""The rules are those of numpy written out, the merged model does what both sources do, and its
folder is the base's, tensor by tensor, whole or not there at all."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import stratoscope
from stratoscope.editing import _merge_rules as rules
from stratoscope.editing import merge, task_vector
from stratoscope.editing._merge_sources import Weights
from stratoscope.engine.metric import last_logits
from stratoscope.errors import InputError, LoadError, ResultError
from stratoscope.models import LM, wrap
from support import tiny
from support.merging import FIRST, SECOND, moved, saved, share, tensors, three, tokenizer
from support.subjects import ROWS, close, untouched

EXAMPLE = {"edit": lambda case: {"request": [moved(case.lm, 1), moved(case.lm, 2)], "density": 0.5}}
METHODS = ("linear", "task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")


@pytest.fixture(scope="module")
def models() -> tuple[LM, LM, LM]:
    return three()


@pytest.fixture(scope="module")
def folders(models: tuple[LM, ...], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("merge")
    sizes = ({"max_shard_size": "20KB"}, {}, {"max_shard_size": "9KB"})
    names = ("base", "first", "second")
    return [saved(lm, place / n, **size) for lm, n, size in zip(models, names, sizes)]


# --- the rules ------------------------------------------------------------------------------------


def by_hand(taus: np.ndarray, weights: list[float], method: str, density: float, shares: bool):
    """Number by number, of (task, n)."""
    tasks, n = taus.shape
    few = max(1, int(density * n))
    if method in ("ties", "magnitude_prune"):
        for row in taus:
            row[np.argsort(-np.abs(row), kind="stable")[few:]] = 0
    found = np.zeros(n)
    for i in range(n):
        column = taus[:, i]
        if method == "ties":
            votes = [w * x if shares else x for w, x in zip(weights, column)]
            sign = 1 if sum(votes) >= 0 else -1
            agree = [t for t in range(tasks) if np.sign(votes[t]) == sign]
            over = sum(weights[t] for t in agree) if shares else len(agree)
            found[i] = sum(weights[t] * column[t] for t in agree) / over if agree else 0
        else:
            found[i] = sum(w * x for w, x in zip(weights, column))
            found[i] /= sum(weights) if method == "linear" else 1
    return found


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.3], [1.0, -0.4, 2.0]])
@pytest.mark.parametrize("method", METHODS[:4])
def test_rules_are_those_written_out(method: str, weights: list[float], shares: bool) -> None:
    taus = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    for density in (0.2, 0.5, 1.0, 0.01):
        expected = by_hand(taus.flatten(1).double().numpy(), weights, method, density, shares)
        found = rules.mixed(taus, torch.tensor(weights), method, density=density, shares=shares)
        close(found.flatten(), expected, 1e-6)


def test_ties_by_a_worked_example() -> None:
    taus = torch.tensor([[3.0, -1.0, 0.125, 2.0], [1.0, 4.0, -0.25, -5.0]])
    ones = torch.ones(2)
    # half of each is kept: (3, 0, 0, 2) and (0, 4, 0, -5); signs + + + -
    assert rules.mixed(taus, ones, "ties", density=0.5).tolist() == [3.0, 4.0, 0.0, -5.0]
    assert rules.mixed(taus, ones, "ties", density=1.0).tolist() == [2.0, 4.0, -0.25, -5.0]


def test_dare_keeps_the_mean_and_draws_by_its_seed() -> None:
    taus = torch.randn(2, 200, generator=torch.Generator().manual_seed(1))
    draw = lambda seed: rules.dropped(taus, 0.25, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    one = draw(3)
    assert torch.allclose(one[one != 0], 4 * taus[one != 0])
    assert not torch.equal(one[0] != 0, one[1] != 0)  # each task draws for itself
    many = torch.stack([draw(seed) for seed in range(1500)])
    assert float((many != 0).float().mean()) == pytest.approx(0.25, abs=0.003)
    assert float((many.mean(dim=0) - taus).norm() / taus.norm()) < 0.08
    state = torch.get_rng_state()
    draw(0)
    assert torch.equal(state, torch.get_rng_state())


def test_dare_with_ties_is_ties_of_what_was_drawn() -> None:
    taus = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    weights, draw = torch.tensor([1.0, 0.5]), lambda: torch.Generator().manual_seed(9)
    kept = rules.dropped(taus, 0.5, draw())
    expected = by_hand(kept.double().numpy(), [1.0, 0.5], "ties", 1.0, True)
    found = rules.mixed(taus, weights, "dare_ties", density=0.5, generator=draw())
    close(found, expected, 1e-6)


# --- what a merged model does ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_does_both(models: tuple[LM, LM, LM], method: str) -> None:
    base, first, second = models
    assert [share(first.model, pair) for pair in (FIRST, SECOND)] == [1.0, 0.0]
    assert [share(second.model, pair) for pair in (FIRST, SECOND)] == [0.0, 1.0]
    options: dict[str, Any] = {} if method in METHODS[:2] else {"density": 0.5}
    options["scale"] = 1.0 if method in ("task_arithmetic", "dare_linear") else 1.6
    with untouched(base), merge.edit(base, [first, second], method=method, **options):
        assert min(share(base.model, pair) for pair in (FIRST, SECOND)) > 0.9
    assert share(base.model, FIRST) == 0.0


def test_an_edit_is_the_formula_on_state_dicts(models: tuple[LM, LM, LM]) -> None:
    base, first, second = models
    with merge.edit(base, [first, second], density=0.3, weights=[1.0, 2.0], scale=0.7):
        inside = {name: x.clone() for name, x in base.model.state_dict().items()}
    for name, start in base.model.state_dict().items():
        both = [m.model.state_dict()[name] - start for m in (first, second)]
        taus = torch.stack(both).flatten(1).double().numpy()
        mixed = by_hand(taus, [1.0, 2.0], "ties", 0.3, True)
        close(inside[name].flatten(), start.flatten().double().numpy() + 0.7 * mixed, 1e-6)
    assert torch.equal(inside["lm_head.weight"], inside["model.embed_tokens.weight"])


def test_task_vectors_are_merged_like_models(models: tuple[LM, LM, LM]) -> None:
    base, first, second = models
    taus = [task_vector.between(base, one) for one in (first, second)]
    with merge.edit(base, [first, second]):
        expected = last_logits(base, ROWS)
    with merge.edit(base, taus):
        assert torch.equal(last_logits(base, ROWS), expected)
    with merge.edit(base, [taus[0] + taus[1]], method="linear"):
        summed = last_logits(base, ROWS)
    with merge.edit(base, [first, second], method="task_arithmetic"):
        close(last_logits(base, ROWS), summed, 1e-5)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_folders_give_what_models_in_memory_give(
    models: tuple[LM, LM, LM], folders: list[Path], tmp_path: Path, method: str
) -> None:
    base, first, second = models
    out = merge.write(folders[0], folders[1:], tmp_path / "out", method=method, seed=3)
    ours = merge.write(base, [first, second], tmp_path / "memory", method=method, seed=3)
    mixed = merge.write(folders[0], [first, folders[2]], tmp_path / "mixed", method=method, seed=3)
    files, held, some = tensors(out), tensors(ours), tensors(mixed)
    assert files.keys() == held.keys() == some.keys()
    for name, x in files.items():
        assert torch.equal(x, held[name])
        assert torch.equal(x, some[name])
    opened = stratoscope.load(out)
    assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
    with merge.edit(base, folders[1:], method=method, seed=3):
        assert torch.equal(last_logits(base, ROWS), last_logits(opened, ROWS))


def test_a_folder_is_the_base_s_in_all_but_its_weights(folders: list[Path], tmp_path: Path) -> None:
    (folders[0] / "card.json").write_text('{"sha256": {"model.safetensors": "the base"}}')
    out = merge.write(folders[0], [str(folders[1])], tmp_path / "out", method="task_arithmetic")
    (folders[0] / "card.json").unlink()
    there = {path.name for path in out.iterdir()}
    assert there == {path.name for path in folders[0].iterdir()} | {"merge.json"}
    assert len([name for name in there if name.endswith(".safetensors")]) > 3
    for name in there - {"merge.json"}:
        one, two = ((place / name).read_bytes() for place in (folders[0], out))
        assert len(one) == len(two)
        assert (one == two) == (not name.endswith(".safetensors"))
    told = json.loads((out / "merge.json").read_text())
    assert (told["base"], told["method"]) == (str(folders[0]), "task_arithmetic")
    plain = tensors(folders[1])
    for name, x in tensors(out).items():
        close(x, plain[name], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_s_dtype_is_kept_and_sums_are_in_float32(
    models: tuple[LM, LM, LM], folders: list[Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    half = wrap(tiny.model("smollm2").to(dtype))
    base = saved(half, tmp_path / "half")
    out = merge.write(base, folders[1:], tmp_path / "out", method="task_arithmetic")
    ours = merge.write(half, list(models[1:]), tmp_path / "ours", method="task_arithmetic")
    start, found, held = (tensors(place) for place in (base, out, ours))
    first, second = tensors(folders[1]), tensors(folders[2])
    for name, x in start.items():
        wide = x.float()
        expected = (wide + ((first[name] - wide) + (second[name] - wide))).to(dtype)
        assert found[name].dtype == dtype
        assert torch.equal(found[name], held[name])
        assert float((found[name] != expected).float().mean()) < 0.01  # the order of a sum


def test_integer_buffers_are_the_base_s_and_floating_ones_are_merged(tmp_path: Path) -> None:
    config = hf.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1])
    torch.manual_seed(0)
    made = [hf.ResNetForImageClassification(config).eval() for _ in range(3)]
    for number, model in enumerate(made):
        for name, value in model.named_buffers():
            value.fill_(number + 3 if name.endswith("tracked") else number)
        model.save_pretrained(tmp_path / str(number))
    out = merge.write(tmp_path / "0", [tmp_path / "1", tmp_path / "2"], tmp_path / "out",
                      method="linear")  # fmt: skip
    for name, x in tensors(out).items():
        if name.endswith("num_batches_tracked"):
            assert x.dtype == torch.int64
            assert int(x) == 3
        elif name.endswith("running_mean"):
            assert torch.equal(x, torch.full_like(x, 1.5))


def test_a_tied_tensor_that_is_stored_twice_stays_tied(
    models: tuple[LM, LM, LM], folders: list[Path], tmp_path: Path
) -> None:
    twice = saved(models[0], tmp_path / "twice")
    held = load_file(twice / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, twice / "model.safetensors", metadata={"format": "pt"})
    found = tensors(merge.write(twice, folders[1:], tmp_path / "out"))
    plain = tensors(merge.write(folders[0], folders[1:], tmp_path / "plain"))
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], plain["model.embed_tokens.weight"])


def test_one_tensor_of_each_model_is_in_memory_at_a_time(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders are never opened as models, and no tensor is kept once it was written."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    read, most = Weights.__getitem__, []

    def watched(self: Weights, name: str) -> Tensor:
        value = read(self, name)
        alive.add(value)
        most.append(len(alive))
        return value

    monkeypatch.setattr(Weights, "__getitem__", watched)
    monkeypatch.setattr(hf.PreTrainedModel, "from_pretrained", None)
    merge.write(folders[0], folders[1:], tmp_path / "out")
    count = len(tensors(folders[0]))
    assert len(most) > 3 * count
    assert max(most) <= 3 < count


def test_an_interruption_leaves_nothing(folders: list[Path], tmp_path: Path) -> None:
    def stop(done: int, total: int, name: str) -> None:
        assert list(tmp_path.glob(".out.merging/*.safetensors"))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge.write(folders[0], folders[1:], tmp_path / "out", progress=stop)
    assert not any(tmp_path.iterdir())
    left = tmp_path / ".out.merging"  # of a process that was killed outright
    left.mkdir()
    (left / "stale.safetensors").write_text("")
    (tmp_path / "out").mkdir()  # an empty folder may be given
    out = merge.write(folders[0], folders[1:], tmp_path / "out")
    assert not left.exists()
    assert not (out / "stale.safetensors").exists()
    before = tensors(out)
    with pytest.raises(ResultError, match="is there already: give another folder"):
        merge.write(folders[0], folders[1:], out)
    with pytest.raises(ResultError, match="does not exist: create it"):
        merge.write(folders[0], folders[1:], tmp_path / "no" / "out")
    assert all(torch.equal(before[name], x) for name, x in tensors(out).items())


def test_no_room_is_said_before_anything_is_written(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1))
    with pytest.raises(ResultError, match="takes 0 MB and there are 0 MB: make room"):
        merge.write(folders[0], folders[1:], tmp_path / "out")
    assert not any(tmp_path.iterdir())
    assert merge.size(folders[0]) == sum(x.nbytes for x in tensors(folders[0]).values())


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": 0.0}, r"density=0: the share that is kept is above 0 and at most 1"),
        ({"density": 1.5}, r"density=1.5"),
        ({"density": float("nan")}, r"density=nan"),
        ({"method": "tie"}, r"method='tie': choose one of linear, task_arithmetic"),
        ({"method": "linear", "density": 0.5}, r"linear drops nothing, so leave it out"),
        ({"method": "linear", "weights": [1.0, -1.0]}, r"whose sum is not 0 in a mean"),
        ({"weights": [1.0]}, r"2 models, 1 weights"),
        ({"weights": [1.0, float("inf")]}, r"give numbers"),
        ({"scale": float("nan")}, r"scale=nan"),
    ],
)
def test_options_that_mean_nothing(
    models: tuple[LM, LM, LM], options: dict[str, Any], said: str
) -> None:
    with untouched(models[0]), pytest.raises(InputError, match=said):
        merge.edit(models[0], list(models[1:]), **options)


def test_no_model_is_refused(models: tuple[LM, LM, LM]) -> None:
    for given in ([], "folder"):
        with pytest.raises(InputError, match="give a list of at least one model"):
            merge.edit(models[0], given)


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy in one file, with its tensors changed."""
    held = tensors(folder)
    change(held)
    to.mkdir()
    save_file(held, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def test_models_of_another_base_are_refused_by_their_first_tensor(
    folders: list[Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def grow(held: dict[str, Tensor]) -> None:
        held[name] = torch.zeros(50, 32).half()

    cases = {
        rf"`{name}` is \(48, 32\) float32 in the first and \(50, 32\) float16 in": grow,
        rf"`{name}` is \(48, 32\) float32 in the first and absent": lambda held: held.pop(name),
        r"`new` is absent in the first and \(2,\) float32": lambda held: held.update(
            new=torch.ones(2)
        ),
        rf"`{name}` is .* and \(48, 32\) int32": lambda held: held.update({name: held[name].int()}),
    }
    for number, (said, change) in enumerate(cases.items()):
        other = changed(folders[1], tmp_path / str(number), change)
        with pytest.raises(InputError, match=said) as refused:
            merge.write(folders[0], [folders[1], other], tmp_path / "out")
        assert f"{folders[0]} and {other} are not of one base" in str(refused.value)
    assert not (tmp_path / "out").exists()
    untied = saved(wrap(tiny.model("llama")), tmp_path / "untied")
    with pytest.raises(InputError, match=r"`lm_head.weight` is tied to `model.embed_tokens"):
        merge.write(folders[0], [untied], tmp_path / "out")


def test_another_vocabulary_or_tokenizer_is_said(
    folders: list[Path], tmp_path: Path, models: tuple[LM, LM, LM]
) -> None:
    grown = tiny.model("smollm2")
    grown.resize_token_embeddings(97)
    with pytest.raises(InputError, match=r"with vocabularies of 96 and 97: `model.embed_tokens"):
        merge.edit(models[0], [grown])
    other = saved(models[1], tmp_path / "other")
    whole = json.loads((other / "tokenizer.json").read_text())
    words = whole["model"]["vocab"]
    words["w40"], words["w41"] = 41, 40
    (other / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match=r"different tokenizers: token 40 is 'w40' in the first"):
        merge.write(folders[0], [other], tmp_path / "out")
    held = LM(models[0].model, models[0].family, tokenizer=tokenizer())
    with pytest.raises(InputError, match=r"token 40 is 'w40' in the first and 'w41' in the sec"):
        merge.edit(held, [other])


def test_what_is_no_number_is_named_with_its_model(folders: list[Path], tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"

    def spoil(held: dict[str, Tensor]) -> None:
        held[name][3, 4] = float("nan")

    wrong = changed(folders[2], tmp_path / "wrong", spoil)
    with pytest.raises(InputError, match=rf"`{name}` of {wrong} is nan at \(3, 4\)"):
        merge.write(folders[0], [folders[1], wrong], tmp_path / "out")
    with pytest.raises(InputError, match=rf"`{name}` of {wrong} is nan"):
        merge.write(wrong, [folders[1]], tmp_path / "out")
    half = saved(wrap(tiny.model("smollm2").half()), tmp_path / "half")
    with pytest.raises(InputError, match=r", once changed, is (-)?inf at"):
        merge.write(half, [folders[1]], tmp_path / "out", scale=1e9)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.merging").exists()


def test_folders_that_cannot_be_read(folders: list[Path], tmp_path: Path) -> None:
    lost = changed(folders[1], tmp_path / "lost", lambda held: None)
    whole = (lost / "model.safetensors").read_bytes()
    (lost / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(LoadError, match="is damaged or no safetensors file"):
        merge.write(folders[0], [lost], tmp_path / "out")
    (lost / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"lacks model\.safetensors: weights are read from safe"):
        merge.write(folders[0], [lost], tmp_path / "out")
    config = json.loads((lost / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (lost / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="holds quantised weights"):
        merge.write(folders[0], [lost], tmp_path / "out")
    with pytest.raises(LoadError, match="does not exist"):
        merge.write(folders[0], [tmp_path / "nowhere"], tmp_path / "out")
