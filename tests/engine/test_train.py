"""The one trainer: against a plain loop, killed and resumed, parameters that have rates of their
own, and what it leaves as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stratoscope.engine import checkpoint, train
from stratoscope.errors import InputError, ResultError


def small_recipe(steps: int = 12, *, fail_at: int | None = None) -> train.Recipe:
    """Dropout, tied weights, a buffer that changes, and a parameter that the loss never meets."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 7))
    model[3].weight = model[0].weight
    model.register_parameter("idle", nn.Parameter(torch.zeros(2, 2)))

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        if step == fail_at:
            raise KeyboardInterrupt
        rows = train.epoch_rows(14, 4, step, seed=5) % 7
        return nn.functional.cross_entropy(model(rows), torch.randint(7, (4,), generator=generator))

    def save(model: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sum.json").write_text(json.dumps(float(model[0].weight.detach().sum())))

    return train.Recipe(
        model, loss, save, lambda model: {"half": 0.5}, steps, 1e-2, checkpoints=(0, 5)
    )


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    whole, broken, rest = small_recipe(), small_recipe(fail_at=8), small_recipe()
    story = train.train(whole, tmp_path / "a", seed=1)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        train.train(broken, tmp_path / "b", seed=1, every=-1.0)
    assert "can go on" in interrupted.value.__notes__[0]
    seen: list[int] = []
    again = replace(
        rest,
        loss=lambda model, step, generator: (seen.append(step), whole.loss(model, step, generator))[
            1
        ],
    )
    resumed = train.train(again, tmp_path / "b", seed=1)
    assert seen == [8, 9, 10, 11]
    assert resumed.resumed == 1
    assert (resumed.curve, resumed.held_out) == (story.curve, story.held_out)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    for file in ("sum.json", "checkpoints/step-0/sum.json", "checkpoints/step-5/sum.json"):
        assert (tmp_path / "a/ready" / file).read_text() == (
            tmp_path / "b/ready" / file
        ).read_text()


def test_seed_and_random_state(tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    sums = []
    for number, seed in enumerate((1, 1, 2)):
        recipe = small_recipe()
        torch.set_rng_state(before)
        train.train(recipe, tmp_path / str(number), seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        sums.append((tmp_path / str(number) / "ready/sum.json").read_text())
    assert sums[0] == sums[1] != sums[2]


def test_a_damaged_state_is_not_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"half a fi")
    assert train.train(small_recipe(), tmp_path, seed=1).resumed == 0


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    recipe = replace(
        small_recipe(), loss=lambda model, step, generator: model[0].weight.sum() * float("nan")
    )
    with pytest.raises(ArithmeticError, match="step 0"):
        train.train(recipe, tmp_path, seed=1)


def test_the_learning_rate() -> None:
    recipe = replace(small_recipe(110), rate=2.0, warmup=10, floor=0.1)
    assert recipe.rate_at(0) == pytest.approx(0.2)
    assert recipe.rate_at(10) == pytest.approx(2.0)
    assert recipe.rate_at(60) == pytest.approx(1.1)
    assert recipe.rate_at(110) == pytest.approx(0.2)


def test_each_epoch_has_every_row_once() -> None:
    rows = [train.epoch_rows(12, 4, step, seed=1).tolist() for step in range(6)]
    for epoch in (rows[:3], rows[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(12))
    assert rows[:3] != rows[3:]


def test_embeddings_can_learn_faster() -> None:
    table, layer = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5)
    layer.weight = table.weight  # tied: still an embedding
    recipe = replace(
        small_recipe(), model=torch.nn.Sequential(table, layer), rate=0.1, embedding_rate=1.0
    )
    groups = train._groups(recipe)
    assert [(len(g["params"]), g["times"], g["weight_decay"]) for g in groups] == [
        (1, 10, 0),
        (1, 1, 0),
    ]
    assert groups[0]["params"][0] is table.weight
    assert len(train._groups(replace(recipe, embedding_rate=None))[0]["params"]) == 1


def test_it_is_adamw_under_a_cosine_to_the_bit(tmp_path: Path) -> None:
    """A plain loop, written again here: groups, rates, clipping and seeds."""
    ours, theirs = small_recipe(), small_recipe()
    train.train(ours, tmp_path, seed=1)
    model = theirs.model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), fused=True)
    with torch.random.fork_rng(devices=[]):
        for step in range(12):
            for group in adamw.param_groups:
                group["lr"] = 1e-2 * (step + 1) / 50
            torch.manual_seed(1_000_003 + step + 1)
            generator = torch.Generator().manual_seed(1_000_003 + step + 1)
            theirs.loss(model, step, generator).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, ours.model.state_dict()[name]), name


def dropping(folder: Path) -> train.Recipe:
    """A transformer layer with dropout that learns which of its inputs is largest, slowly."""
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    model = nn.Sequential(nn.Linear(1, 8), layer, nn.Linear(8, 1))

    def loss(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        time.sleep(0.005)  # long enough to be killed meanwhile
        x = torch.randn(4, 6, 1, generator=generator)
        return nn.functional.cross_entropy(model(x)[..., 0], x[..., 0].argmax(-1))

    def save(model: nn.Module, to: Path) -> None:
        from safetensors.torch import save_file

        to.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), to / "model.safetensors")

    return train.Recipe(model, loss, save, None, steps=100, rate=1e-2, checkpoints=(60,))


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    """kill -9 of a real process, at a random step: the end is the same to the bit."""
    code = (
        "import sys, pathlib, test_train as t; f = pathlib.Path(sys.argv[1]);"
        "s = t.train.train(t.dropping(f), f, seed=4, every=0.0); print(s.resumed)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    state = tmp_path / "killed" / "state.safetensors"
    process = subprocess.Popen(command, env=env)
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    train.train(dropping(tmp_path), tmp_path / "whole", seed=4)
    for file in ("model.safetensors", "checkpoints/step-60/model.safetensors"):
        killed, whole = (load_file(tmp_path / run / "ready" / file) for run in ("killed", "whole"))
        assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    recipe = replace(small_recipe(fail_at=4))
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe, tmp_path, seed=1, every=-1.0)
    with pytest.raises(ResultError, match="its seed is 1, not 2"):
        train.train(small_recipe(), tmp_path, seed=2)
    other = replace(small_recipe(), model=nn.Linear(3, 2))
    with pytest.raises(ResultError, match=r"another training: buffer .* absent here"):
        train.train(other, tmp_path, seed=1)


def test_rates_of_their_own_and_what_is_not_trained() -> None:
    """One step of Adam moves by the learning rate: where the rate is halved, by half of it."""
    recipe = replace(
        small_recipe(1), rates={"^3.bias": 0.5, "bias": 3.0}, warmup=0, decay=0.0, clip=None
    )
    before = {name: value.clone() for name, value in recipe.model.named_parameters()}
    train.train(recipe, None, seed=1)
    moved = {
        name: (value - before[name]).abs().max().item()
        for name, value in recipe.model.named_parameters()
    }
    assert moved["0.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["2.bias"] == pytest.approx(3e-2, rel=1e-3)
    assert moved["3.bias"] == pytest.approx(5e-3, rel=1e-3)
    chosen = replace(small_recipe(), select=lambda name: name == "3.bias", decay=0.5)
    idle = chosen.model.get_parameter("idle").requires_grad_(False)
    train.train(chosen, None, seed=1)
    changed = {n for n, v in chosen.model.named_parameters() if not torch.equal(v, before[n])}
    assert changed == {"3.bias"}
    assert [v.requires_grad for v in chosen.model.parameters()].count(False) == 1
    assert not idle.requires_grad
    with pytest.raises(InputError, match=r"'gain' .* there are idle"):
        train.train(replace(small_recipe(), rates={"gain": 2.0}), None, seed=1)
    with pytest.raises(InputError, match="nothing to train"):
        train.train(replace(small_recipe(), select=lambda name: False), None, seed=1)


def test_after_each_step() -> None:
    """A projection after a step holds at the end; True ends the training."""
    called: list[int] = []

    def halt(model: nn.Module, step: int) -> bool:
        called.append(step)
        model.get_parameter("3.bias").clamp_(max=0.001)
        return step == 5

    recipe = replace(small_recipe(), after=halt)
    story = train.train(recipe, None, seed=1)
    assert called == [1, 2, 3, 4, 5]
    assert story.step == 5
    assert recipe.model.get_parameter("3.bias").max().item() == pytest.approx(0.001)


def test_what_it_leaves_as_it_was() -> None:
    """Flags of training and of gradients, module by module, also when it fails."""
    for fail_at in (None, 3):
        recipe = small_recipe(fail_at=fail_at)
        recipe.model.eval()[1].train()
        modes = [part.training for part in recipe.model.modules()]
        state = torch.get_rng_state()
        try:
            train.train(replace(recipe, select=lambda name: "bias" in name), None, seed=1)
        except KeyboardInterrupt:
            assert fail_at == 3
        assert [part.training for part in recipe.model.modules()] == modes
        assert all(p.requires_grad and p.grad is None for p in recipe.model.parameters())
        assert torch.equal(state, torch.get_rng_state())


def test_evaluation_mode_draws_nothing() -> None:
    """training=False: no dropout, batch statistics stay."""
    recipe = replace(small_recipe(), training=False)
    before = recipe.model[2].running_mean.clone()
    train.train(recipe, None, seed=1)
    assert torch.equal(before, recipe.model[2].running_mean)
    train.train(small := small_recipe(), None, seed=1)
    assert not torch.equal(before, small.model[2].running_mean)


def test_no_other_loop_takes_steps() -> None:
    source = Path(train.__file__).parents[1]
    steps = ("optimizer.step(", "optimiser.step(", "adam.step(", "adamw.step(", "sgd.step(")
    found = {p.name for p in source.rglob("*.py") if any(s in p.read_text().lower() for s in steps)}
    assert found == {"train.py"}


def test_moments_lie_in_memory_as_their_parameter_does() -> None:
    """A transposed parameter went on with other numbers: fused AdamW mixed the two layouts."""
    parameter = torch.empty(3, 5).T
    moment = torch.arange(15.0).reshape(5, 3)
    laid = checkpoint._laid_out(moment, parameter)
    assert torch.equal(laid, moment)
    assert laid.stride() == parameter.stride() != moment.stride()
    assert checkpoint._laid_out(torch.tensor(7.0), parameter) == 7
