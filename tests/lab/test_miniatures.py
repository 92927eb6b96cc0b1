"""Folders and cards of miniatures, and twenty steps of each of the text ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stratoscope
from stratoscope import lab
from stratoscope.engine import train
from stratoscope.errors import InputError, LoadError
from stratoscope.lab import miniatures
from stratoscope.lab.miniatures import _text, grok, tiny_lstm, tiny_mlm, tiny_twohop

SILENT: Callable[..., None] = lambda *_: None  # noqa: E731

XML = """  <page>
    <title>Frogs &amp; toads</title>
    <text xml:space="preserve">{{taxobox | name = {{frog}} }}
{| class=&quot;x&quot; | cell |}
'''Frogs''' are [[amphibian|animals]] of the order [[Anura]].&lt;ref&gt;Smith&lt;/ref&gt; \
&lt;!-- not this --&gt;They live near
water&amp;mdash;see [http://frogs.example the site].

== Life ==
[[Image:frog.jpg|thumb|A [[frog]]]]
* [[short]]
Frogs jump, croak and eat flies; in winter they sleep in the mud of ponds, and wake when it \
is warm again in spring. Some
of them are loud.
[[Category:Animals]]
[[de:Frosch]]</text>
  </page>
  <page>
    <title>Toad</title>
    <text xml:space="preserve">#REDIRECT [[Frogs]]</text>
  </page>
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A little text instead of the real corpora."""
    pages = [XML.replace("Frog", f"Frog{i}").replace("near", f"near {i * i}") for i in range(40)]
    card = {"licence": "none"}

    def data(name: str) -> SimpleNamespace:
        rst = [f"Chapter {i}\n\n.. function:: print(x{i})" for i in range(20)]
        return SimpleNamespace(
            train=pages if name == "enwik8" else rst, validation=pages[:30], card=card
        )

    monkeypatch.setattr(lab, "data", data, raising=False)


# --- folders and cards ----------------------------------------------------------------------------


def test_make_card_and_cache(cache: Path) -> None:
    sizes = {"steps": 20, "modulus": 7, "dim": 16, "neurons": 8}
    told: list[tuple[int, int]] = []
    folder = lab.make(
        "grok", seed=4, progress=lambda done, steps, said: told.append((done, steps)), **sizes
    )
    assert told[-2] == (20, 20)  # and then: it is ready
    assert sorted(p.name for p in (cache / "miniatures").iterdir() if p.is_dir()) == [folder.name]
    card = lab.card("grok", seed=4, **sizes)
    assert {"name": "grok", "seed": 4, "steps": 20, "resumed": 0}.items() <= card.items()
    assert card["settings"]["modulus"] == 7
    assert card["settings"]["heads"] == 4  # a default
    assert card["curve"][-1][0] == 20
    assert card["results"].keys() == {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}
    assert card["held_out"].keys() == {str(round(at * 20)) for at in grok.CHECKPOINTS}
    assert card["parameters"] == sum(
        v.numel() for v in load_file(folder / "model.safetensors").values()
    )
    assert card["cpu_seconds"] > 0
    assert {"torch", "transformers", "stratoscope"} <= card["versions"].keys()
    assert card["about"].startswith("One transformer layer")
    stamp = (folder / "card.json").stat().st_mtime_ns
    assert lab.make("grok", seed=4, **sizes) == folder
    assert (folder / "card.json").stat().st_mtime_ns == stamp
    other = lab.make("grok", seed=5, **sizes)
    assert (folder / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_an_interrupted_make_is_taken_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"steps": 10, "modulus": 7, "dim": 16, "neurons": 8}
    whole = load_file(lab.make("grok", **sizes) / "model.safetensors")
    for file in sorted((cache / "miniatures").glob("grok*"))[::-1]:
        file.rename(cache / "elsewhere")

    class Clock(train._Clock):
        def read(self) -> float:
            return 31.0

    def stop(done: int, steps: int, said: str) -> None:
        if done == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_Clock", Clock)
    with pytest.raises(KeyboardInterrupt):
        lab.make("grok", progress=stop, **sizes)
    with pytest.raises(InputError, match="has not been trained here"):
        lab.card("grok", **sizes)
    resumed = load_file(lab.make("grok", **sizes) / "model.safetensors")
    assert lab.card("grok", **sizes)["resumed"] == 1
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert not list((cache / "miniatures").glob(".*training"))


def test_what_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="tiny-gpt"):
        lab.make("tiny-gtp")
    with pytest.raises(InputError, match=r"no setting wings; it has modulus"):
        lab.make("grok", wings=2)
    with pytest.raises(LoadError, match="Lower its `rate`"):
        lab.make("grok", steps=400, modulus=5, dim=16, neurons=8, rate=1e30)
    (blocked := cache.with_name("file")).write_text("")
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(blocked))
    with pytest.raises(LoadError, match="STRATOSCOPE_CACHE"):
        lab.make("grok", steps=2, modulus=5, dim=16, neurons=8)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(LoadError, match="STRATOSCOPE_CACHE"):
        lab.make("grok", steps=2, modulus=5, dim=16, neurons=8)


# --- what each of them learns ---------------------------------------------------------------------


def test_wiki_markup_becomes_prose() -> None:
    [article] = _text.prose(XML)
    assert article == (
        "Frogs & toads\n\nFrogs are animals of the order Anura. They live near\nwater—see the "
        "site.\n\nLife\n\n"
        "Frogs jump, croak and eat flies; in winter they sleep in the mud of ponds, and wake when "
        "it is warm again in"
        " spring. Some\nof them are loud."
    )


def test_bigrams_by_hand() -> None:
    """After a: b twice, c once. Smoothed by one unigram, whose counts have one more each."""
    text = _text.Corpus(range(3), torch.tensor([0, 1, 0, 2, 0, 1]), torch.tensor([0]), 1, {})
    single = torch.tensor([4, 3, 2]) / 9
    found = _text.bigram_loss(text, torch.tensor([[0, 1, 0]]), prior=1.0)
    after_a, after_b = (2 + single[1]) / 4, (1 + single[0]) / 2
    assert found == pytest.approx(-(after_a.log() + after_b.log()).item() / 2)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tiny-gpt", {"layers": 1, "dim": 48, "heads": 2, "context": 32}),
        ("tiny-gpt-small", {"layers": 1, "dim": 48, "heads": 2, "context": 32}),
        ("tiny-mlm", {"layers": 2, "dim": 48, "heads": 2, "context": 32, "batch": 4}),
        (
            "tiny-twohop",
            {"people": 10, "relations": 3, "layers": 1, "dim": 32, "heads": 2, "batch": 32},
        ),
        ("grok", {"modulus": 7, "dim": 16, "neurons": 8}),
    ],
)
def test_twenty_steps(name: str, sizes: dict[str, Any], words: None) -> None:
    folder = lab.make(name, steps=20, **sizes)
    lm = stratoscope.load(folder)
    prompt = {
        "tiny-twohop": tiny_twohop.questions(0, people=10, relations=3)[0].prompt,
        "grok": "3 4 =",
    }
    logits = lm([prompt.get(name, "Frogs jump")]).logits
    assert logits.shape[-1] == len(lm.tokenizer)
    first, *_, last = (loss for _, loss in lab.card(name, steps=20, **sizes)["curve"])
    assert last < first
    if name in ("tiny-gpt", "grok"):
        untrained = stratoscope.load(folder / "checkpoints" / "step-0")
        assert untrained.provenance["weights"] != lm.provenance["weights"]


def test_the_recurrent_one(words: None) -> None:
    folder = lab.make("tiny-lstm", steps=20, dim=16, hidden=24, batch=4, context=16)
    model, tokenizer = tiny_lstm.load(folder)
    ids = tokenizer(["Frogs jump far"], return_tensors="pt")["input_ids"]
    embedded, first, second = model.layers(ids)
    assert [states.shape[-1] for states in (embedded, first, second)] == [16, 24, 24]
    torch.testing.assert_close(model(ids)[:, :2], model(ids[:, :2]))  # it cannot see what comes
    assert model.config["dim"] == 16
    with pytest.raises(LoadError, match="no tiny-lstm"):
        tiny_lstm.load(folder / "checkpoints")


def test_the_made_up_world() -> None:
    asked = tiny_twohop.questions(3)
    assert asked == tiny_twohop.questions(3) != tiny_twohop.questions(4)
    facts = {q.prompt: q.answer for q in asked if q.split == "one hop"}
    assert len(facts) == 80 * 8
    used: tuple[set[str], set[str]] = set(), set()
    hops = []
    for q in asked:
        if q.bridge is not None:
            first, _, kind = q.prompt.rpartition(" 's ")
            second = f"{q.bridge} 's {kind}"
            assert (facts[first], facts[second]) == (q.bridge, q.answer)
            hops.append((first, second, q.split))
            if q.split == "seen":
                used[0].add(first)
                used[1].add(second)
    assert len(hops) == 80 * 8 * 8
    for first, second, split in hops:
        if split == "new pair":
            assert first in used[0]
            assert second in used[1]
        if split in ("new first", "new both"):
            assert first not in used[0] | used[1]
        if split in ("new second", "new both"):
            assert second not in used[0] | used[1]
    assert {q.split for q in asked} == set(tiny_twohop.SPLITS)


def test_masking() -> None:
    class Tokens:
        mask_token_id = 1

        def __len__(self) -> int:
            return 50

    ids = torch.full((100, 100), 7)
    asked, shown = tiny_mlm.masked(ids, Tokens(), 0.3, torch.Generator().manual_seed(0))
    assert asked.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(shown[~asked], ids[~asked])
    assert (shown[asked] == 1).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (shown[asked] == 7).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_addition() -> None:
    train, test = grok.pairs(1, modulus=11, share=0.4)
    rows = torch.cat([train, test])
    assert len(torch.unique(rows, dim=0)) == 121
    assert len(train) == round(0.4 * 121)
    assert torch.equal((rows[:, 0] + rows[:, 1]) % 11, rows[:, 3])


def test_every_one_is_named() -> None:
    assert {"tiny-gpt", "tiny-gpt-small", "tiny-lstm", "tiny-mlm", "tiny-twohop", "grok"} <= set(
        miniatures.names()
    )
