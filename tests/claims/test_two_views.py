"""What human-cat-cka measures when it cannot run whole: the claim on the authors' encoders with
tiny ones in their place, and the order of layers on scores made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from stratoscope.claims.verdict import FAILED, NO_TEST, REPRODUCED, judge
from stratoscope.lab import small_nets
from stratoscope.papers import _two_views as two
from stratoscope.papers import human_cat_cka


def test_order_of_layers_by_hand() -> None:
    generator = np.random.default_rng(0)
    scores = []
    for _ in range(6):
        rows = np.tile(np.linspace(0.9, 0.4, 6), (2, 1)) + 0.01 * generator.normal(size=(2, 6))
        flat = 0.01 * generator.normal(size=(2, 6))
        scores.append({"rbf": rows, "rsa": rows / 2, "untrained_rbf": rows, "shuffled_rbf": flat})
    found = two.order(scores, (1.0, 2.0), "a net").numbers
    assert found["drop"] == pytest.approx(0.4, abs=0.02)
    assert found["drop_rsa"] == pytest.approx(found["drop"] / 2, rel=1e-4)
    assert found["untrained_drop"] == found["drop"]
    assert found["early"] - found["late"] == pytest.approx(found["drop"], rel=1e-4)
    assert found["lowest"] < found["late"]
    assert found["drop_low"] > found["shuffled_drop_high"] + 0.05
    assert abs(found["shuffled_drop"]) < 0.02


def test_sets_share_no_picture() -> None:
    rows = torch.cat(two.sets(3)).flatten(1)
    assert len(rows) == two.SETS * two.EACH == len(rows.unique(dim=0))


def test_the_claim_on_the_authors_encoders_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both encoders are tiny ones; told apart by name, and the one given twice is its own equal."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=224,
        patch_size=56,
    )
    net = small_nets.fresh(lambda: ViTForImageClassification(config), 0)
    requested = []

    def load(name: str) -> SimpleNamespace:
        requested.append(name)
        return SimpleNamespace(model=net)

    monkeypatch.setattr(human_cat_cka.models, "load", load)
    generator = torch.Generator().manual_seed(0)
    pictures = [255 * torch.rand(8, 3, 32, 32, generator=generator) for _ in range(5)]
    monkeypatch.setattr(two, "sets", lambda seed: pictures)
    measured = human_cat_cka.dino_aligns_most(0)
    assert requested == ["facebook/dino-vitb16", "google/vit-base-patch16-224"]
    assert measured.n == 5
    found = measured.numbers
    assert found["dino"] == found["supervised"] > found["shuffled"]
    assert found["dino_rsa"] == found["supervised_rsa"]


def test_the_ranking_that_cannot_be_run_is_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """And would be judged if there were a network of DINO's; then above or below the others."""
    [claim] = human_cat_cka.dino_is_not_here.claims
    here, words, spread = {"a": 0.8, "b": 0.7}, [], np.linspace(-0.01, 0.01, 10)
    for more in ({}, {"dino": 0.9}, {"dino": 0.75}):
        nets = here | more
        monkeypatch.setattr(two, "PARTS", dict.fromkeys(nets, ()))
        monkeypatch.setattr(two, "means", lambda name, seed, nets=nets: nets[name] + spread)
        measured = human_cat_cka.dino_is_not_here(0)
        words.append(judge(claim, measured.numbers, int(measured.n), claim.least).status)
    assert words == [NO_TEST, REPRODUCED, FAILED]
