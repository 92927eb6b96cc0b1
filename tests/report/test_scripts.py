"""Prompts in other scripts than Latin: nothing is garbled, no token moves its neighbours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import xarray as xr

from stratoscope.cli.explain import _plain, _rows
from stratoscope.report import page, words
from stratoscope.report.explanation import Explanation
from stratoscope.results import dataset

ARABIC = ("ع", "ا", "ص", "←", "م", "ة", " ف")
HINDI = ("भ", "←", "ा", "र", "त", " क", "ी")
CHAT = ("<|im_start|>", "user", "\n", "Hi", "<|im_end|>", "\n", " x")


def said(tokens: tuple[str, ...]) -> Explanation:
    """An explanation with a strip, an aligned pair and a sentence of these tokens."""
    n = len(tokens)
    text = {"text": (("example", "position"), [list(tokens)])}
    strip = xr.Dataset({"attribution": (("example", "position"), [np.arange(n) - 2.0])}, text)
    corrupt = {"corrupt_text": (("example", "position"), [[*tokens[:-1], tokens[0]]])}
    effect = np.zeros((1, 2, n))
    effect[0, :, 3] = 0.9
    patched = xr.Dataset(
        {"effect": (("example", "layer", "position"), effect), "null": 0 * effect[0, 0, 0]},
        text | corrupt,
        {"draws": 20},
    )
    patched["null"] = patched["effect"] * 0
    for name in ("bound", "clean_difference", "corrupt_difference"):
        patched[name] = ("example", [0.5])
    patched = patched.assign_coords(position=np.arange(n), layer=[0, 1])
    return Explanation(
        prompt="".join(t for t in tokens if t != "←"),
        tokens=tokens,
        answer=tokens[-1],
        foil=tokens[0],
        predictions=[(tokens[-1], 0.5), (tokens[0], 0.25)],
        results={"tokens.occlusion": strip, "layers.activation_patching": patched},
        provenance={"seconds": 1.0},
        corrupt_prompt=tokens[0],
        foil_how=f"The foil {tokens[0]!r} (+1.5) was chosen.",
    )


@pytest.mark.parametrize("tokens", [ARABIC, HINDI, CHAT], ids=["arabic", "hindi", "chat"])
def test_every_token_is_isolated_and_none_is_garbled(tokens: tuple[str, ...]) -> None:
    html = page.render(said(tokens))
    body = html[html.index("<body>") : html.index('id="themes"')]
    assert "\ufffd" not in body
    for kind in ('class="token', "<li><small>", '<li class="differs"><small>'):
        for after in body.split(kind)[1:]:
            assert after.index("<bdi>") < after.index("</code>")
    strip = body[body.index('class="strip"') :]
    assert strip[: strip.index("</div>")].count("<bdi") == len(tokens)
    assert ("by position in every picture" in body) == (tokens is ARABIC)


def test_a_prompt_keeps_the_direction_of_its_script() -> None:
    html = page.render(said(ARABIC))
    assert '<h1 dir="auto">عاصمة ف' in html
    assert "The foil &#x27;<bdi>ع</bdi>&#x27; (+1.5)" in html


def test_special_tokens_of_a_chat_are_there_and_stand_back() -> None:
    html = page.render(said(CHAT))
    assert (
        '<span class="special">&lt;|im_start|&gt;</span>user<span class="special">↵</span>' in html
    )
    assert '<code class="special"><bdi>&lt;|im_end|&gt;</bdi></code>' in html


def test_a_token_shown_with_its_left_neighbour_is_named_by_it() -> None:
    patched = said(ARABIC).one("layers.activation_patching")
    assert "token 3 (a part of “ص”) in layers 0 to 1" in words.carried(patched)


def test_the_terminal_isolates_words_and_names_the_mask() -> None:
    found = said(ARABIC)
    assert dict(_rows(found))["next token"].startswith("\u2068' ف'\u2069 50%")
    assert str(_plain("“ف” (+1.2)")) == "“\u2068ف\u2069” (+1.2)"
    assert "'◌ी'" in dict(_rows(said(HINDI)))["next token"]
    axes = ("example", "depth", "position", "rank")
    lens = dataset(
        {"probability": (axes, np.ones((1, 1, len(ARABIC), 1)))},
        method="layers.logit_lens",
        provenance={},
        settings={},
        coords={"read_at": (("example",), [2])},
    )
    masked = dataclasses.replace(found, results={"layers.logit_lens": lens})
    assert _rows(masked)[0][0] == "at the mask"
