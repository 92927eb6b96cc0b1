"""Every cell of a sweep equals the same cell run alone, for interventions drawn at random on every
architecture."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine.base import PACKED_POINTS
from stratoscope.engine.intervene import (
    Intervention,
    ablate,
    add,
    clamped,
    knock_out,
    project_out,
    replaced,
    scaled,
)
from stratoscope.engine.sweep import naive, plan, sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.models.sites import Site
from support import tiny

TEXT = [n for n in tiny.CONFIGS if n not in ("vit", "clip", "siglip", "bert_base", *tiny.VLMS)]
CAUSAL = [n for n in TEXT if n not in (*tiny.ENCODERS, "bloom")]
TOLERANCE = 1e-4


def metric(logits: Tensor, example: Tensor) -> Tensor:
    """Depends on which example a row belongs to, so that rows of the wrong one are found out."""
    weight = torch.linspace(-1, 1, logits.shape[1]) + 0.1 * example[:, None].to(logits)
    return (logits * weight).sum(dim=1)


def prompts(draw: random.Random, examples: int) -> list[list[int]]:
    return [[draw.randrange(3, 90) for _ in range(draw.randint(1, 9))] for _ in range(examples)]


class Drawn:
    """Interventions drawn at random for one model and batch; values near the model's own, so that
    effects are finite."""

    def __init__(self, name: str, given: Any, draw: random.Random) -> None:
        self.lm, self.draw = tiny.lm(name), draw
        self.batch = self.lm.batch(given)
        self.sites = [
            s
            for s in self.lm.sites()
            if s.tower == "" and s.layer is not None and s.point in PACKED_POINTS
        ]
        self.sites = [s for s in self.sites if s.point != "mlp.router"]
        self.base = capture(self.lm, self.batch, *self.sites)
        self.generator = torch.Generator().manual_seed(draw.randrange(2**31))

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def positions(self) -> Any:
        shortest = int(self.batch.lengths.min())
        among = range(-shortest, shortest)
        kind = self.draw.choice(["all", "int", "last", "list", "one each"])
        if kind == "all":
            return None
        if kind in ("int", "last"):
            return -1 if kind == "last" else self.draw.choice(among)
        count = self.draw.randint(1, min(3, shortest))
        rows = [self.draw.sample(range(shortest), count) for _ in range(len(self.batch))]
        return rows[0] if kind == "list" else rows

    def change(self, site: Site | None = None) -> Intervention:
        site = site or self.draw.choice(self.sites)
        x, where = self.base[site], {}
        where["positions"] = self.positions()
        examples = len(self.batch)
        if examples > 1 and self.draw.random() < 0.4:
            where["examples"] = sorted(
                self.draw.sample(range(examples), self.draw.randint(1, examples))
            )
        if self.draw.random() < 0.4 and self.draw.choice([True, False]):
            where["units"] = self.draw.sample(
                range(x.shape[2]), self.draw.randint(1, min(3, x.shape[2]))
            )
        operation = self.draw.choice(
            ["replace", "add", "scale", "clamp", "project_out", "same", "zero"]
        )
        if operation == "clamp":
            return clamped(site, -0.3, 0.4, **where)
        if operation == "project_out":
            where.pop("units", None)
            return project_out(site, self.noise(self.draw.randint(1, 2), x.shape[-1]), **where)
        if operation == "zero":
            return ablate(site, **where)
        value = self.value(x, where)
        # the base run's own value: it matters only where something before it changed
        if operation == "same":
            return replaced(site, self.selected(site, x, where), **where)
        return {"replace": replaced, "add": add, "scale": scaled}[operation](site, value, **where)

    def value(self, x: Tensor, where: dict[str, Any]) -> Tensor:
        """A number, a vector of the last axis, or a tensor of the selection's whole shape."""
        kind = self.draw.choice(["number", "vector", "whole"])
        if kind == "number":
            return self.noise(1)[0]
        width = len(where["units"]) if "units" in where and x.ndim == 3 else x.shape[-1]
        if kind == "vector":
            return self.noise(width)
        shape = [
            len(where.get("examples", range(len(self.batch)))),
            self.count(where),
            *x.shape[2:],
        ]
        if "units" in where:
            shape[2] = len(where["units"])
        return self.noise(*shape)

    def count(self, where: dict[str, Any]) -> int:
        positions = where["positions"]
        return (
            self.batch.ids.shape[1]
            if positions is None
            else torch.as_tensor(positions).reshape(-1, 1).shape[0]
            if (not isinstance(positions, list) or not isinstance(positions[0], list))
            else len(positions[0])
        )

    def selected(self, site: Site, x: Tensor, where: dict[str, Any]) -> Tensor:
        """What the base run holds at the selection."""
        held: list[Tensor] = []
        probe = Intervention(site, "scale", torch.ones(()), **where)
        from stratoscope.models.taps import Run

        index = probe.index(x, Run(self.batch))
        held.append(x if index is None else x[index])
        return held[0]

    def cells(self, count: int) -> list[list[Intervention]]:
        cells = [
            [self.change() for _ in range(self.draw.choice([1, 1, 1, 2, 3]))] for _ in range(count)
        ]
        return [*cells, [self.change(site) for site in self.draw.sample(self.sites, 2)]]


def agree(lm: Any, given: Any, cells: list[Any], **options: Any) -> Tensor:
    got, expected = sweep(lm, given, cells, metric, **options), naive(lm, given, cells, metric)
    assert got.shape == expected.shape == (len(cells), len(lm.batch(given)))
    gap = (got - expected).abs()
    assert float(gap.max()) <= TOLERANCE * max(1.0, float(expected.abs().max())), cells[
        int(gap.amax(dim=1).argmax())
    ]
    assert tiny.gap(got, expected) < TOLERANCE
    return got


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", TEXT)
def test_random_cells_equal_their_naive_runs(name: str, seed: int) -> None:
    draw = random.Random(f"{name} {seed}")
    given = prompts(draw, draw.randint(1, 3))
    drawn = Drawn(name, given, draw)
    cells = drawn.cells(14)
    got = agree(drawn.lm, given, cells, budget=draw.choice([None, None, 60_000]))
    base = naive(drawn.lm, given, [[]], metric)
    assert bool((got != base).any()), "no cell changed anything: the test would see nothing"


@pytest.mark.parametrize("name", TEXT)
def test_every_packable_site(name: str) -> None:
    """One cell at each site: an added vector at one position, and a halved unit."""
    lm, given = tiny.lm(name), tiny.inputs("llama")
    sites = [
        s
        for s in lm.sites()
        if s.layer == 1 and s.point in PACKED_POINTS and s.point != "mlp.router"
    ]
    cells: list[Any] = [add(s, 1.5, positions=2) for s in sites] + [
        scaled(s, -1.0, units=[1]) for s in sites
    ]
    agree(lm, given, cells)
    told = plan(lm, given, cells)
    if name in CAUSAL:
        assert told.naive == 0
        assert told.packed_rows < told.naive_rows


def test_left_padding_and_single_prompts_give_the_same_numbers() -> None:
    lm, rows = tiny.lm("gemma2"), tiny.inputs("llama")
    left = {
        "input_ids": torch.tensor([rows[0], [0] * 4 + rows[1]]),
        "attention_mask": torch.tensor([[1] * 9, [0] * 4 + [1] * 5]),
    }
    cells = [
        replaced(f"layers.{n}.{p}", 0.7, positions=-2)
        for n in range(3)
        for p in ("resid_pre", "attn.z", "mlp.act")
    ]
    together, from_left = (sweep(lm, x, cells, metric) for x in (rows, left))
    assert torch.equal(together, from_left)
    for number, row in enumerate(rows):
        alone = sweep(
            lm, [row], cells, lambda logits, example, n=number: metric(logits, example + n)
        )
        assert tiny.gap(together[:, number], alone[:, 0]) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_replacement_by_the_base_value_matters_once_something_before_it_changed(
    name: str,
) -> None:
    lm, given = tiny.lm(name), tiny.inputs("llama")
    base = capture(lm, given, "layers.2.resid_pre", "layers.1.mlp.out", "layers.1.resid_pre")
    # not one number: a LayerNorm would not see it
    early = add("layers.0.resid_post", torch.linspace(-2, 2, 32))
    restored = replaced("layers.2.resid_pre", base["layers.2.resid_pre"])
    kept = replaced("layers.1.mlp.out", base["layers.1.mlp.out"])
    got = agree(
        lm,
        given,
        [[], [restored], [kept], [early], [early, restored], [early, kept], [restored, early]],
    )
    nothing, restored_alone, kept_alone, moved, undone, part, undone_too = got
    assert torch.equal(nothing, restored_alone)
    assert torch.equal(nothing, kept_alone)
    assert tiny.gap(moved, nothing) > 1e-2
    assert tiny.gap(undone, nothing) < 1e-5
    assert tiny.gap(part, moved) > 1e-3
    assert tiny.gap(undone_too, undone) < 1e-5
    assert plan(lm, given, [[], [restored], [kept]]).skipped == 6


def test_a_change_at_a_later_step_changes_no_single_pass() -> None:
    from dataclasses import replace

    cells = [replace(add("layers.1.mlp.out", 2.0), steps=steps) for steps in ([0], [1], [0, 3])]
    got = agree(tiny.lm("llama"), tiny.inputs("llama"), cells)
    assert not torch.equal(got[0], got[1])


def test_listed_order_at_one_site_is_kept() -> None:
    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    cells = []
    for site in (
        "layers.1.resid_pre",
        "layers.1.attn.z",
        "layers.1.mlp.act",
        "layers.1.resid_post",
    ):
        for one, two in (
            (add(site, 1.0), scaled(site, 3.0)),
            (clamped(site, -0.1, 0.1), add(site, 1.0)),
        ):
            cells += [[one, two], [two, one]]
    got = agree(lm, given, cells)
    assert all(tiny.gap(got[i], got[i + 1]) > 1e-3 for i in range(0, len(cells), 2))


def test_a_small_budget_makes_many_waves_and_the_same_numbers() -> None:
    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    cells = [
        replaced(f"layers.{n}.resid_post", 0.5, positions=p) for n in range(3) for p in range(5)
    ]
    whole = agree(lm, given, cells)
    small = agree(lm, given, cells, budget=40_000)
    assert tiny.gap(small, whole) < 1e-5
    one, many = plan(lm, given, cells), plan(lm, given, cells, budget=40_000)
    assert len(one.waves) < len(many.waves)
    lengths = lm.batch(given).lengths
    rows = [int((lengths[wave.example] - wave.first).sum()) for wave in many.waves]
    assert max(rows) <= many.rows_per_wave
    assert sum(map(len, many.waves)) == sum(map(len, one.waves)) == 30
    with pytest.raises(InputError, match="holds no row"):
        sweep(lm, given, cells, metric, budget=10)


def test_the_plan_says_what_will_be_done() -> None:
    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    same = capture(lm, given, "layers.1.resid_pre")["layers.1.resid_pre"]
    cells = [
        replaced("layers.1.resid_pre", same),
        replaced("layers.1.resid_pre", 0.3, positions=-1),
        scaled("layers.1.attn.pattern", 0.5),
        knock_out(0, -1, 0),
    ]
    told = plan(lm, given, cells)
    assert (told.cells, told.skipped, told.naive) == (8, 2, 4)
    assert "8 results: 2 equal the base run, 4 run naively" in told.explain()
    assert "%" in told.explain()
    agree(lm, given, cells)
    whole = plan(lm, [list(range(3, 63))], [replaced("layers.2.resid_pre", 0.3, positions=-1)])
    assert (whole.naive_rows, whole.packed_rows) == (180, 1)
    assert "99% of the naive" in whole.explain()


def test_where_sharing_would_not_be_exact_cells_run_naively() -> None:
    given = tiny.inputs("llama")
    everywhere = [
        add("embed", 0.5, positions=1),
        scaled("final_norm", 1.5),
        scaled("layers.1.attn.pattern", 0.5),
    ]
    agree(
        tiny.lm("llama"),
        given,
        [
            *everywhere,
            knock_out("*", -1, 0),
            add("logits", 1.0),
            [everywhere[0], add("layers.1.mlp.out", 1.0)],
        ],
    )
    bloom = [add(f"layers.{n}.resid_post", 0.5, positions=1) for n in range(3)]
    agree(tiny.lm("bloom"), given, bloom)
    assert plan(tiny.lm("bloom"), given, bloom).naive == 6


@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert", "roberta"])
def test_encoders_share_what_lies_below_but_no_position(name: str) -> None:
    lm, given = tiny.lm(name), tiny.inputs("llama")
    cells = [add(f"layers.{n}.resid_pre", 1.0, positions=p) for n in range(3) for p in (0, -1)]
    agree(lm, given, cells)
    assert all(bool((wave.first == 0).all()) for wave in plan(lm, given, cells).waves)


def test_a_decoder_that_attends_both_ways_is_no_decoder() -> None:
    import transformers as hf

    from stratoscope.models import wrap

    torch.manual_seed(0)
    lm = wrap(
        hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**tiny._sliding(use_bidirectional_attention=True))
        ).eval()
    )
    agree(
        lm,
        tiny.inputs("llama"),
        [add(f"layers.{n}.resid_pre", 1.0, positions=-1) for n in range(3)],
    )


@pytest.mark.parametrize("name", tiny.VLMS)
def test_the_text_stack_of_a_vision_language_model_with_an_image(name: str) -> None:
    lm, given = tiny.lm(name), tiny.inputs(name)
    draw = random.Random(name)
    drawn = Drawn(name, given, draw)
    image = int(lm.batch(given).image[0].nonzero()[0])
    cells: list[Any] = [
        add(f"layers.{n}.resid_pre", 1.0, positions=p)
        for n in range(3)
        for p in (image, image + 1, -1)
    ]
    cells += [
        *drawn.cells(8),
        add("projector", 0.5),
        scaled("vision.layers.1.mlp.out", 0.5, positions=-1),
    ]
    got = agree(lm, given, cells)
    assert tiny.gap(got[-2], naive(lm, given, [[]], metric)[0]) > 1e-4


def test_progress_counts_to_the_end() -> None:
    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    cells = [
        replaced(f"layers.{n}.resid_post", 0.5, positions=p) for n in range(3) for p in range(5)
    ]
    said: list[tuple[int, int]] = []
    sweep(
        lm,
        given,
        [*cells, scaled("layers.1.attn.pattern", 0.5)],
        metric,
        budget=60_000,
        progress=lambda *x: said.append(x),
    )
    assert said[-1] == (32, 32)
    assert [d for d, _ in said] == sorted({d for d, _ in said})


def test_no_cells_and_bad_cells() -> None:
    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    assert sweep(lm, given, [], metric).shape[0] == 0
    with pytest.raises(SiteError):
        sweep(lm, given, [add("layers.0.mlp.router", 1.0)], metric)


BAD: dict[str, Any] = {
    "position": lambda: add("layers.1.mlp.act", 1.0, positions=7),
    "unit": lambda: add("layers.1.mlp.act", 1.0, units=[48]),
    "negative unit": lambda: add("layers.1.mlp.act", 1.0, units=[-49]),
    "negative example": lambda: add("layers.1.mlp.act", 1.0, examples=[-1]),
    "example": lambda: add("layers.1.mlp.act", 1.0, examples=[2]),
    "value": lambda: add("layers.1.mlp.act", torch.ones(47)),
    "value of a position": lambda: replaced("layers.1.mlp.act", torch.ones(2, 48), positions=-1),
    "value with an axis too many": lambda: add("layers.1.mlp.act", torch.ones(1, 2, 9, 48)),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_cell_is_refused_by_sweep_as_by_naive(what: str) -> None:
    for run in (naive, sweep):
        with pytest.raises(InputError):
            run(tiny.lm("llama"), tiny.inputs("llama"), [BAD[what]()], metric)


def test_layer_arguments_that_are_not_known_are_not_guessed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer called with a tensor that nobody knows how to give to single rows: its cells run
    naively."""
    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    layer = lm.layout.layers[""][1]
    forward = layer.forward
    monkeypatch.setattr(
        layer,
        "forward",
        lambda *a, odd=None, **k: forward(*a, **k) * (1 if odd is None else odd.mean()),
    )
    cells = [add("layers.0.resid_pre", 1.0, positions=2)]
    assert plan(lm, given, cells).naive == 0
    handle = layer.register_forward_pre_hook(
        lambda m, a, k: (a, k | {"odd": torch.full((7, 5, 3), 1.5)}), with_kwargs=True, prepend=True
    )
    try:
        assert plan(lm, given, cells).naive == 2
        agree(lm, given, cells)
    finally:
        handle.remove()


def bare(name: str) -> tuple[Any, Any]:
    """A vision encoder without a read-out, and its pictures."""
    from stratoscope.models import wrap

    given = tiny.inputs(name)
    return wrap(tiny.model(name).vision_model), {"pixel_values": given["pixel_values"]}


@pytest.mark.parametrize("name", ["vit", "clip", "siglip"])
def test_pictures_share_what_lies_below_too(name: str, tmp_path: Any) -> None:
    """An image classifier is read at its class token; a bare encoder has no logits, so the metric
    gets the residual."""
    lm, given = (tiny.lm(name), tiny.inputs(name)) if name == "vit" else bare(name)
    both = {
        "pixel_values": torch.cat([given["pixel_values"], given["pixel_values"].flip(-1) + 0.3])
    }
    source = capture(lm, {"pixel_values": both["pixel_values"].flip(0)}, "layers.1.resid_pre")[
        "layers.1.resid_pre"
    ]
    cells = [replaced("layers.1.resid_pre", source[:, [p]], positions=p) for p in (0, 2, -1)]
    cells += [
        add(f"layers.{n}.{point}", 1.0, positions=1)
        for n in (0, 1)
        for point in ("attn.z", "mlp.act", "attn.k")
    ]
    cells += [
        ablate("layers.0.attn.z", units=[0]),
        scaled("layers.1.resid_post", 0.5, examples=[1]),
    ]
    got = agree(lm, both, cells)
    assert plan(lm, both, cells).naive == 0
    assert torch.equal(got, sweep(lm, both, cells, metric, save=tmp_path / "kept"))
    assert torch.equal(got, sweep(lm, both, cells, metric, save=tmp_path / "kept"))
    if name == "vit":
        whole = lm.model(pixel_values=both["pixel_values"]).logits
        assert tiny.gap(sweep(lm, both, [[]], metric)[0], metric(whole, torch.arange(2))) < 1e-5
    else:
        whole = lm.model(
            pixel_values=both["pixel_values"], output_hidden_states=True
        ).hidden_states[-1]
        assert (
            tiny.gap(sweep(lm, both, [[]], metric)[0], metric(whole[:, 0], torch.arange(2))) < 1e-5
        )


def test_a_picture_s_last_layer_is_finished_at_the_class_token_alone() -> None:
    lm, given = tiny.lm("vit"), tiny.inputs("vit")
    cells = [
        replaced("layers.2.mlp.out", 50.0, positions=1),
        scaled("layers.2.mlp.out", 0.5, positions=0),
    ]
    cells += [ablate("layers.2.attn.z", units=[head]) for head in range(4)] + [
        add("layers.2.resid_post", 3.0)
    ]
    cells += [ablate("layers.2.mlp.act", units=[n], positions=[1, 0, 2]) for n in range(4)]
    got = agree(lm, given, cells)
    assert torch.equal(got[0], naive(lm, given, [[]], metric)[0])
    assert plan(lm, given, cells).naive == 0


def test_a_cache_given_as_an_argument_is_no_part_of_the_base_run() -> None:
    """GPT-2's blocks take it by position, and a headless model keeps one."""
    import transformers as hf

    from stratoscope.models import wrap

    torch.manual_seed(0)
    model = hf.GPT2Model(
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99, n_positions=64)
    ).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    lm, given = wrap(model), [[4, 5, 6, 7, 8, 9]]
    cells = [ablate(f"layers.{layer}.mlp.out", positions=[p]) for layer in range(3) for p in (1, 5)]
    got = agree(lm, given, cells)
    zero = model.h[1].mlp.register_forward_hook(
        lambda m, a, out: out.index_fill(1, torch.tensor([1]), 0.0)
    )
    kept: list[Tensor] = []
    last = model.h[2].register_forward_hook(
        lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(torch.tensor(given))
    zero.remove()
    last.remove()
    assert abs(float(got[2, 0] - metric(kept[0][:, -1], torch.zeros(1, dtype=torch.long)))) < 1e-3
    assert plan(lm, given, cells).naive == 0


def test_sweeps_of_a_model_with_modules_left_out() -> None:
    from stratoscope.editing import drop_modules

    lm, given = tiny.lm("llama"), tiny.inputs("llama")
    cells = [add("layers.0.resid_pre", 1.0, positions=2), ablate("layers.1.attn.z", units=[1])]
    cells += [
        scaled("layers.1.mlp.act", 2.0),
        ablate("layers.2.attn.z", units=[0]),
        add("layers.2.mlp.out", 1.0),
    ]
    for left_out in (["layers.1.mlp.out"], ["layers.1.mlp.out", "layers.2.attn.out"]):
        with drop_modules.edit(lm, left_out):
            got = agree(lm, given, cells)
            base = naive(lm, given, [[]], metric)[0]
        assert torch.equal(got[2], base)  # what is not computed cannot be changed
        assert tiny.gap(got[0], base) > 1e-2


class Rounded(torch.nn.Module):
    """A linear layer as LLM.int8 and dynamic quantisation have it: how a row is rounded depends on
    the rows beside it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().max().clamp_min(1e-9) / 127
        return torch.nn.functional.linear((x / step).round() * step, self.weight)


def test_rows_that_depend_on_their_neighbours_are_not_packed() -> None:
    from stratoscope.models import wrap

    model = tiny.model("llama")
    model.model.layers[1].mlp.down_proj = Rounded(model.model.layers[1].mlp.down_proj)
    lm, given = wrap(model), [tiny.inputs("llama")[0]]
    cells = [
        scaled("layers.0.resid_post", factor, positions=p) for p in (1, 3) for factor in (0.1, 20.0)
    ]
    got = sweep(lm, given, cells, metric)
    assert torch.equal(got, naive(lm, given, cells, metric))
    assert plan(lm, given, cells).naive == 4
