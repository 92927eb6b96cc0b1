"""A sequence of anything: items, residues, patches of a series. Batched equals single, and what the
model calls a position stands in results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

from stratoscope.engine.intervene import ablate, intervene
from stratoscope.engine.sweep import naive, sweep
from stratoscope.engine.trace import capture, trace
from stratoscope.errors import FamilyError, InputError
from stratoscope.heads import attention_pattern
from stratoscope.layers import token_influence
from stratoscope.models import LM, families, wrap
from stratoscope.models.batch import Batch
from stratoscope.models.family import Family
from stratoscope.plots import heatmap

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def told(config: Any, head: tuple[str, ...], **names: Any) -> Family:
    """The family of a known architecture that is given its sequence under other names."""
    known = families.find(config)
    assert known is not None
    return replace(known, towers={"": known.towers[""].but(**names)}, head=head)


class ItemsConfig(LlamaConfig):
    model_type = "test_items"


class Items(PreTrainedModel):
    """What is looked at next, by what was looked at before."""

    config_class = ItemsConfig
    base_model_prefix = "model"
    main_input_name = "item_ids"
    FAMILY = told(LlamaConfig(), ("score",), takes="item_ids", mask="item_mask")

    def __init__(self, config: ItemsConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, item_ids: Tensor, item_mask: Tensor | None = None, **options: Any) -> Any:
        found = self.model(input_ids=item_ids, attention_mask=item_mask, use_cache=False)
        return {"logits": self.score(found.last_hidden_state)}

    def name_positions(self, batch: Batch) -> list[list[str]]:
        rows = zip(batch.ids.tolist(), batch.lengths.tolist())
        return [[f"film {item}" for item in row[:n]] for row, n in rows]


class ResiduesConfig(BertConfig):
    model_type = "test_residues"


class Residues(PreTrainedModel):
    """Something said of every residue of a chain."""

    config_class = ResiduesConfig
    base_model_prefix = "model"
    main_input_name = "residue_ids"
    FAMILY = told(BertConfig(), (), takes="residue_ids", mask="residue_mask")

    def __init__(self, config: ResiduesConfig) -> None:
        super().__init__(config)
        self.model = BertModel(config, add_pooling_layer=False)
        self.buried = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, residue_ids: Tensor, residue_mask: Tensor | None = None, **o: Any) -> Any:
        found = self.model(input_ids=residue_ids, attention_mask=residue_mask)
        return {"logits": self.buried(found.last_hidden_state)}

    def name_positions(self, batch: Batch) -> list[list[str]]:
        rows = zip(batch.ids.tolist(), batch.lengths.tolist())
        return [
            [f"{'ACDEFGHIKLMNPQRSTVWY'[i % 20]}{at + 1}" for at, i in enumerate(row[:n])]
            for row, n in rows
        ]


class SeriesConfig(LlamaConfig):
    model_type = "test_series"


class Series(PreTrainedModel):
    """The next four steps of a series, at every patch of four."""

    config_class = SeriesConfig
    base_model_prefix = "model"
    main_input_name = "past_values"
    FAMILY = told(
        LlamaConfig(),
        (),
        takes="past_values",
        mask="past_observed_mask",
        lengths="patches_of",
        embed=None,
    )

    def __init__(self, config: SeriesConfig) -> None:
        super().__init__(config)
        self.model, self.patches = LlamaModel(config), nn.Linear(4, config.hidden_size)
        self.ahead = nn.Linear(config.hidden_size, 4)
        self.post_init()

    def patches_of(self, steps: Tensor) -> Tensor:
        return steps // 4

    def forward(self, past_values: Tensor, past_observed_mask: Any = None, **o: Any) -> Any:
        whole = past_values.shape[1] // 4 * 4  # the last patch is left out unless it is full
        x, mask = self.patches(past_values[:, :whole].unflatten(1, (-1, 4))), past_observed_mask
        mask = None if mask is None else mask[:, :whole].unflatten(1, (-1, 4)).amin(dim=-1)
        found = self.model(inputs_embeds=x, attention_mask=mask, use_cache=False)
        return {"logits": self.ahead(found.last_hidden_state)}

    def name_positions(self, batch: Batch) -> list[list[str]]:
        return [[f"t{4 * at}-{4 * at + 3}" for at in range(n)] for n in batch.lengths.tolist()]


def series(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, generator=generator) for n in lengths]


IDS = [[5, 9, 3, 7, 2, 11], [8, 4]]
KINDS: dict[str, tuple[type, type, Any]] = {
    "items": (Items, ItemsConfig, IDS),
    "residues": (Residues, ResiduesConfig, IDS),
    "series": (Series, SeriesConfig, series(24, 8)),
}


def made(kind: str) -> tuple[LM, Any]:
    model, config, inputs = KINDS[kind]
    torch.manual_seed(0)
    return wrap(model(config(**SMALL, vocab_size=24)).eval()), inputs


@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_single(kind: str) -> None:
    lm, inputs = made(kind)
    sites = ["layers.*.resid_post", "layers.*.attn.pattern"]
    both = capture(lm, inputs, *sites)
    for number, one in enumerate(inputs):
        for alone in ([one], lm.batch(inputs).example(number)):
            seen = capture(lm, alone, *sites)
            for site in seen.sites:
                x, whole = seen[site][0], both[site][number]
                whole = whole[tuple(slice(n) for n in x.shape)]
                torch.testing.assert_close(whole, x, rtol=1e-4, atol=1e-5)
    # and it is what the model itself says, given its own arguments
    name, own = type(lm.model).main_input_name, torch.as_tensor(inputs[0])[None]
    plain = lm.model(**{name: own})["logits"]
    torch.testing.assert_close(lm([inputs[0]])["logits"], plain)
    last = capture(lm, [inputs[0]], "layers.1.resid_post")["layers.1.resid_post"]
    torch.testing.assert_close(lm.readout(last), plain)


SIDES = [(kind, side) for kind in ("items", "residues") for side in ("left", "right")]


@pytest.mark.parametrize(("kind", "side"), [*SIDES, ("series", "right")])
def test_a_mapping_with_the_models_own_names_is_read(kind: str, side: str) -> None:
    lm, inputs = made(kind)
    width = len(inputs[0])
    padded, masks = [], []
    for row in map(torch.as_tensor, inputs):
        fill = torch.full((width - len(row),), 3).to(row.dtype)
        real, none = torch.ones(len(row)).long(), torch.zeros(len(fill)).long()
        padded.append(torch.cat([fill, row] if side == "left" else [row, fill]))
        masks.append(torch.cat([none, real] if side == "left" else [real, none]))
    main = lm.family.towers[""]
    given = {main.takes: torch.stack(padded), main.mask: torch.stack(masks)}
    site = "layers.1.resid_post"
    both, listed = capture(lm, given, site)[site], capture(lm, inputs, site)[site]
    real = lm.batch(inputs).mask
    torch.testing.assert_close(both[real], listed[real], rtol=1e-5, atol=1e-6)


def test_a_users_own_call_is_counted_by_the_models_own_mask() -> None:
    lm, inputs = made("items")
    ids = torch.tensor([inputs[0], [0] * 4 + inputs[1]])
    mask = (torch.arange(6) >= torch.tensor([[0], [4]])).long()
    with trace(lm, "layers.1.resid_post", positions=0) as seen:
        lm.model(item_ids=ids, item_mask=mask)
    first = capture(lm, [inputs[1]], "layers.1.attn.v")  # its own first item, though it is padded
    with trace(lm, "layers.1.attn.v", positions=0) as values:
        lm.model(item_ids=ids, item_mask=mask)
    assert seen["layers.1.resid_post"].shape == (2, 32)
    torch.testing.assert_close(values["layers.1.attn.v"][1], first["layers.1.attn.v"][0, 0])


def test_names_of_positions_stand_in_results_and_plots() -> None:
    lm, inputs = made("items")
    result = attention_pattern.measure(lm, inputs)
    assert result["text_key"].values[0].tolist() == [f"film {i}" for i in IDS[0]]
    assert result["text_key"].values[1].tolist() == ["film 8", "film 4", "", "", "", ""]
    assert str(result["example_text"].values[1]) == "film 8 film 4"
    figure = heatmap.heatmap(result.isel(example=0, layer=0, head=0), x="key", y="query")
    assert "film␣11" in figure.layout.xaxis.ticktext  # spaces are shown
    lm, inputs = made("residues")
    assert lm.batch(inputs).tokens[1] == ("K1", "F2")
    lm, inputs = made("series")
    assert lm.batch(inputs).tokens[1] == ("t0-3", "t4-7")
    result = token_influence.measure(lm, inputs, probes=2)
    assert result["text_query"].values[1].tolist() == ["t0-3", "t4-7", "", "", "", ""]
    assert np.isnan(result["influence"].values[1, :, 2:]).all()


def test_edits_and_sweeps_run_on_a_series() -> None:
    lm, inputs = made("series")
    change = ablate("layers.0.attn.z", positions=-1)
    with intervene(lm, change):
        after = lm(inputs)["logits"]
    plain = lm(inputs)["logits"]
    assert torch.equal(after[0, :5], plain[0, :5])  # the last patch alone
    assert not torch.allclose(after[0, 5], plain[0, 5])
    assert not torch.allclose(after[1, 1], plain[1, 1])
    metric = lambda logits, example: logits[:, 0]  # noqa: E731
    cells = [ablate("layers.0.attn.z", positions=at) for at in (0, 1)]
    got = sweep(lm, inputs, cells, metric)
    torch.testing.assert_close(got, naive(lm, inputs, cells, metric), rtol=1e-4, atol=1e-5)


def test_what_no_sequence_can_be_made_of_is_told(monkeypatch) -> None:
    lm, _ = made("series")
    for wrong, message in (
        (series(3), "too short for one position"),
        ([torch.full((4,), torch.nan)], "`past_values` are series of finite floats"),
        ("a text", "`past_values` are series of finite floats; got str"),
        ({"pixel_values": torch.ones(1, 3, 4, 4)}, "this model takes `past_values`"),
        ({"past_values": torch.ones(1, 8), "past_observed_mask": torch.ones(1, 4)}, "each step"),
        (
            {"past_values": torch.ones(1, 2), "past_observed_mask": torch.tensor([[0, 1]])},
            "padding at the end",
        ),
    ):
        with pytest.raises(InputError, match=message):
            lm.batch(wrong)
    lm, _ = made("items")
    with pytest.raises(InputError, match="hold `input_ids` beside the model's own name"):
        lm.batch({"item_ids": [[1]], "input_ids": [[1]]})
    with pytest.raises(InputError, match="without a tokenizer"):
        lm.batch("a film")
    monkeypatch.setattr(Items, "name_positions", lambda self, batch: [["one"]])
    with pytest.raises(FamilyError, match=r"gave \[1\] names for \[2\] positions"):
        lm.batch([[4, 5]])


def test_a_model_that_takes_no_mask_is_given_one_length() -> None:
    lm, _ = made("items")
    bare = replace(Items.FAMILY, towers={"": Items.FAMILY.towers[""].but(mask="")})
    bare = wrap(lm.model, family=bare)
    same = capture(bare, [IDS[0], IDS[0]], "layers.1.resid_post")["layers.1.resid_post"]
    torch.testing.assert_close(
        same[1], capture(lm, IDS, "layers.1.resid_post")["layers.1.resid_post"][0]
    )
    with pytest.raises(InputError, match=r"sequences of \[6, 2\] positions .* takes no mask"):
        bare(IDS)


def test_a_model_that_lets_padding_through_is_refused(monkeypatch) -> None:
    model = KINDS["series"][0]
    forward = model.forward

    def deaf(self: Any, past_values: Tensor, past_observed_mask: Any = None, **o: Any) -> Any:
        return forward(self, past_values - past_values.mean(dim=1, keepdim=True))

    monkeypatch.setattr(model, "forward", deaf)
    with pytest.raises(FamilyError, match=r"lets padding through|does not hold"):
        made("series")
