"""The report holds the right numbers, asks no network, obeys no text, is written whole or not."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

from stratoscope.errors import ResultError
from stratoscope.report import page
from stratoscope.report.sections import section_of

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</script><h1>out</h1>",
    "<b>bold</b>",
]
HOSTILE += [
    '" onmouseover="alert(1)',
    "&lt;kept&gt;",
    "<a href='javascript:alert(1)'>x</a>",
    "\u202eright to left",
    " ",
]


class Reader(HTMLParser):
    """Every tag with its attributes, the style sheets, and the JSON of the figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.styles, self.data, self.text = "", [], ""
        self._inside: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self._inside = (tag, dict(attrs))
        self.tags.append(self._inside)

    def handle_endtag(self, tag):
        self._inside = ("", {})

    def handle_data(self, data):
        tag, attributes = self._inside
        if tag == "style":
            self.styles += data
        elif attributes.get("type") == "application/json":
            assert "<" not in data  # nothing inside can close the element, whatever the strings are
            self.data.append(json.loads(data))
        elif tag != "script":
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def whole(make):
    made = make()
    return made, Reader(page.render(made))


def figure(reader: Reader, z: np.ndarray) -> dict:
    """The one heatmap that shows exactly these values."""
    import base64

    def values(given):
        if isinstance(given, dict):  # plotly writes arrays as base64 with dtype and shape
            flat = np.frombuffer(base64.b64decode(given["bdata"]), dtype=given["dtype"])
            return flat.reshape([int(n) for n in given["shape"].split(",")])
        return np.array(given, dtype=float)

    maps = [f["data"][0] for f in reader.data if "data" in f and f["data"][0]["type"] == "heatmap"]
    found = [
        m
        for m in maps
        if values(m["z"]).shape == z.shape and np.allclose(values(m["z"]), z, equal_nan=True)
    ]
    assert len(found) == 1
    return found[0]


def test_every_result_has_its_picture(whole):
    made, reader = whole
    figure(reader, made.results["layers.logit_lens"]["probability"].values[0, :, :, 0])
    pattern = made.results["heads.attention_pattern"].values[0]
    figure(reader, pattern[21, 3])
    assert reader.text.count("Not measured in this run") == 0
    pictures = sum(name == "div" and a.get("class") == "plot" for name, a in reader.tags)
    # each with the figure of its claim, where it has one
    papers = reader.text.count("The paper behind this:")
    # six heads by effect have a pattern, and of three direct writers the two not among them
    assert 24 <= pictures <= 24 + papers


@pytest.mark.parametrize("larger", ["effect", "null"])
@pytest.mark.parametrize("key", ["layers.activation_patching", "heads.activation_patching"])
def test_null_stands_beside_its_effect_on_the_same_centred_scale(make, key, larger):
    made = make()
    found = made.results[key]
    if larger == "null":
        found = found.assign(null=10 * found["null"] + found["effect"])
    made = dataclasses.replace(made, results={key: found})
    reader = Reader(page.render(made))
    effect, null = (
        figure(reader, made.results[key][part].values[0]) for part in ("effect", "null")
    )
    assert (effect["zmin"], effect["zmax"]) == (null["zmin"], null["zmax"])
    assert effect["zmin"] == -effect["zmax"]
    assert effect["zmax"] == np.abs(made.results[key][larger].values).max()


def test_heads_of_the_direct_attribution_are_in_their_cells(whole):
    made, reader = whole
    found = made.results["layers.direct_logit_attribution"]
    # built layer by layer
    heads = found["contribution"].values[0][found["kind"].values == "head"].reshape(30, 9)
    figure(reader, heads)


def test_findings_agree_with_the_data(whole):
    text = whole[1].text
    assert "“␣Mary” becomes the top token after 25 of 30 layers" in text
    assert re.search(r"L21H3 adds most to the difference of [−+\d.]+ \(\+1.93 logits\): it", text)
    assert "it suppresses “␣John” (−1.45) and raises “␣Mary” (+0.48)." in text
    assert "token 10 “␣John” in layers 0 to" in text
    assert "then at token 17 “␣to” in layers" in text
    assert (
        "6 heads exceed chance, the strongest L21H3 (+0.44), L14H5 (+0.31) and L17H1 (+0.22)"
        in text
    )
    assert "Neuron 1203 of layer 28 writes +0.52" in text
    assert "Both methods single out token 1 “␣Mary”" in text


def test_nothing_in_the_page_can_ask_the_network(whole):
    reader = whole[1]
    assert reader.count("script") > 18
    for name, attributes in reader.tags:
        for attribute in ("src", "srcset", "data", "action", "poster", "background", "xlink:href"):
            assert attribute not in attributes, (name, attributes)
        assert attributes.get("href", "#").startswith("#")
        assert name not in ("link", "iframe", "object", "embed", "base", "img")
        assert "url(" not in (attributes.get("style") or "")
    assert "url(" not in reader.styles
    assert "@import" not in reader.styles
    policy = next(
        a["content"] for name, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe-eval" not in policy


def test_plotly_is_in_the_page_once_and_the_page_is_light(whole):
    html = page.render(whole[0])
    assert html.count("Copyright 2012") == 1
    assert html.count('id="plotly"') == 1
    assert len(html.encode()) < 2.5e6


def hostile(make):
    """An explanation in which every text that a model or a user could give is an attack."""
    made, bad = make(words=HOSTILE), HOSTILE[0]
    tokens = {"text": (("example", "position"), np.array([HOSTILE * 2]))}
    results = {
        k: v.assign_coords(tokens) if "text" in v.coords else v for k, v in made.results.items()
    }
    texts = dict.fromkeys(("prompt", "answer", "corrupt_prompt", "corrupt_how"), bad)
    likely = [(word, 0.1) for word in HOSTILE]
    facts = {**made.provenance, bad: bad, "command": bad, "seconds_by_step": {bad: 1.0}}
    return dataclasses.replace(
        made,
        **texts,
        foil=HOSTILE[1],
        notes=HOSTILE,
        results=results,
        predictions=likely,
        provenance=facts,
    )


def test_no_text_becomes_markup(make):
    clean, dirty = Reader(page.render(make())), Reader(page.render(hostile(make)))
    assert dirty.count("script") == clean.count("script")
    for tag in ("img", "h1", "a"):
        assert dirty.count(tag) == clean.count(tag)
    assert not any(name.startswith("on") for _, attributes in dirty.tags for name in attributes)
    # Plotly itself acts on markup in a figure: none may stand in labels and boxes but our line
    # breaks.
    shown = json.dumps([f for f in dirty.data if "data" in f], ensure_ascii=False)
    assert set(re.findall(r"<[^>]*>", shown)) <= {"<br>", "<extra>", "</extra>"}
    assert "&lt;script&gt;" in shown


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking "
)
QUIET += (
    "--disable-component-update --disable-sync --virtual-time-budget=8000 "
    "--enable-logging=stderr --dump-dom"
)


@pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium on the PATH to load the report as a reader would"
)
def test_a_browser_draws_the_figures_and_runs_no_injected_script(make, tmp_path):
    path = page.write(hostile(make), tmp_path / "report.html")
    command = [
        str(CHROMIUM),
        *QUIET.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    tree, written = Reader(done.stdout), Reader(path.read_text(encoding="utf-8"))
    assert tree.count("script") == written.count("script")
    assert tree.count("img") == 0
    assert tree.count("h1") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in done.stdout
    # every figure was drawn, under the content security policy
    assert done.stdout.count('class="main-svg"') >= 18
    # words in cells are black or white by the colour under them, never plotly's grey on green
    inks = re.findall(r'class="heatmap-label"><text[^>]*fill: (rgb\([^)]*\))', done.stdout)
    assert len(inks) > 50
    # a head that a sentence names is the way to its row
    ways = set(re.findall(r'<a href="#(L\d+H\d+)">\1</a>', done.stdout))
    assert ways
    assert all(f'id="{name}"' in done.stdout for name in ways)
    assert set(inks) <= {"rgb(0, 0, 0)", "rgb(255, 255, 255)"}
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []


@pytest.mark.parametrize("key", sorted(page.RESULTS))
def test_a_missing_result_is_said_and_the_rest_is_shown(make, key):
    made = make()
    without = dataclasses.replace(made, results={k: v for k, v in made.results.items() if k != key})
    html = page.render(without)
    assert f"Not measured in this run: {page.RESULTS[key]} ({key})" in html
    assert html.count("Not measured in this run") == 1


def test_a_report_of_nothing_but_a_prediction(make):
    bare = dataclasses.replace(
        make(), results={}, corrupt_prompt=None, notes=(), provenance={}, predictions=[]
    )
    text = Reader(page.render(bare)).text
    for what in page.RESULTS.values():
        assert what in text


def test_nan_leaves_gaps_and_breaks_nothing(make):
    made = make()

    def gaps(found):
        if isinstance(found, xr.DataArray):
            return found.where(False)
        return found.map(lambda array: array.where(False) if array.dtype.kind == "f" else array)

    html = page.render(
        dataclasses.replace(made, results={k: gaps(v) for k, v in made.results.items()})
    )
    assert not re.search(r"\bnan\b", Reader(html).text.lower())
    some = made.results["layers.activation_patching"].copy(deep=True)
    some["effect"][0, 3, 4] = np.nan
    reader = Reader(
        page.render(dataclasses.replace(made, results={"layers.activation_patching": some}))
    )
    assert figure(reader, some["effect"].values[0])["zmax"] == np.nanmax(
        np.abs(some["effect"].values)
    )


def test_an_unknown_result_is_refused_by_name(make):
    with pytest.raises(ResultError, match=r"layers\.tuned"):
        dataclasses.replace(make(), results={"layers.tuned": xr.Dataset()})


def headline(explanation: page.Explanation) -> list[str]:
    html = page.render(explanation)
    return re.sub(
        r"<[^>]*>", " ", re.search(r'<p class="versus">(.*?)</p>', html, re.DOTALL)[1]
    ).split()


def test_probabilities_of_answer_and_foil_come_from_the_predictions_or_are_given(make):
    assert headline(make()) == ["␣Mary", "62%", "rather", "than", "␣John", "14%"]
    far = dataclasses.replace(make(), predictions=[(" a", 0.5)], answer_probability=0.25)
    assert headline(far) == ["␣Mary", "25%", "rather", "than", "␣John"]


def test_write_leaves_the_old_report_or_the_new_one_never_half(make, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def interrupted(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            page.write(make(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"
    assert page.write(make(), path) == path
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_full_disk_is_said_and_leaves_nothing(make, tmp_path, monkeypatch):
    from pathlib import Path

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResultError, match="No space left"):
        page.write(make(), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["missing/report.html", "."])
def test_a_place_that_cannot_hold_a_file_is_refused(make, tmp_path, place):
    with pytest.raises(ResultError, match="could not be written"):
        page.write(make(), tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_does_not_cost_the_report(make, tmp_path):
    made = dataclasses.replace(make(), prompt="broken \ud83d token", notes=["\ud83d"])
    assert page.write(made, tmp_path / "r.html").stat().st_size > 1e6


def test_what_does_not_exceed_its_null_is_grey_in_tables_and_figures(make):
    made = make()
    found = made.results["heads.activation_patching"]
    loud = found.assign(bound=found["bound"] * 0 + 0.25)  # L14H5 and L21H3 alone are above it
    results = {**made.results, "heads.activation_patching": loud}
    html = page.render(dataclasses.replace(made, results=results))
    table = html[html.index('<section id="heads">') : html.index('<section id="neurons">')]
    rows = {
        name: "grey" in row
        for row, name in re.findall(r'<tr([^>]*)><th scope="row">(L\d+H\d+)', table)
    }
    assert {name for name, grey in rows.items() if not grey} == {"L21H3", "L14H5"}
    assert len(rows) > 6
    assert figure(Reader(html), loud["effect"].values[0])["meta"]["quiet"] == pytest.approx(
        0.25 / 0.44
    )
    neurons = html[html.index('<section id="neurons">') : html.index('<section id="tokens">')]
    clamp = made.results["clamp"]
    change = np.abs((clamp["difference_after"] - clamp["difference_before"]).values)
    assert (
        neurons.count("off quiet")
        == int((change <= np.abs(clamp["null_change"].values).max()).sum())
        > 0
    )


def test_a_neuron_of_negative_activation_promotes_what_its_direction_suppresses(make):
    made = make()
    vocabulary, active = (made.one(f"neurons.{name}") for name in ("vocabulary", "contribution"))
    signs = set()
    for n, row in enumerate(section_of(made, "neurons").more["rows"]):
        value = float(active["activation"].values[row["layer"], row["neuron"]])
        parts = [vocabulary[part].values[n, :6].tolist() for part in ("promoted", "suppressed")]
        assert [row["promoted"], row["suppressed"]] == (parts if value >= 0 else parts[::-1])
        signs.add(value >= 0)
    assert signs == {True, False}


def test_a_circuit_is_held_against_the_best_random_one(make):
    made = make()
    found = made.results["circuits.discover"]
    null = found["null_faithfulness"].copy(data=np.tile([0.11, 0.53], (4, 1)))
    made.results["circuits.discover"] = found.assign(null_faithfulness=null)
    assert "random circuits of that size keep at most +0.53." in section_of(made, "circuit").finding


def test_a_head_within_its_null_is_given_no_role_in_the_finding(make):
    made = make()
    assert "By their role scores" in section_of(made, "heads").finding
    found = made.results["heads.activation_patching"]
    made.results["heads.activation_patching"] = found.assign(bound=found["bound"] * 0 + 9)
    assert "By their role scores" not in section_of(made, "heads").finding
