"""The atlas as one page and as data: every paper and claim stands in it, filters hide what they
should, hostile text stays text, nothing is fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from stratoscope import cli
from stratoscope.claims import atlas as whole
from stratoscope.claims import ledger, pages, words
from stratoscope.report import atlas as page

DATA = whole.data(pages.own())
HTML = page.render(DATA)


def keys(html: str, section: str) -> list[str]:
    inside = html.partition(f'<section id="{section}"')[2].partition("</section>")[0]
    return re.findall(r'data-key="([^"]+)"', inside)


def test_every_paper_and_claim_stands_in_it() -> None:
    built = [paper for paper in DATA["papers"] if paper["built"]]
    assert len(DATA["papers"]) >= 243
    assert sorted(keys(HTML, "papers")) == sorted(paper["key"] for paper in DATA["papers"])
    assert sorted(keys(HTML, "matrix")) == sorted(paper["key"] for paper in built)
    assert {p["key"] for p in built} == {e.row.key for e in pages.own().built()}
    for paper in built:
        own = HTML.partition(f'<details class="paper" id="{paper["key"]}"')[2].partition(
            "</details>"
        )[0]
        assert paper["claims"]
        for claim in paper["claims"]:
            assert f"<small>{claim['name']}</small>" in own, claim["name"]
    counts = re.findall(r'<li><b>(\d+)</b> <b class="[\w-]+">([^<]+)</b>', HTML)
    assert {word: int(n) for n, word in counts} == DATA["counts"]
    assert sum(DATA["counts"].values()) == 243


def test_what_runs_across_papers_is_named_first_and_names_them() -> None:
    across = [paper for paper in DATA["papers"] if paper.get("across")]
    assert {p["key"] for p in across} == {*pages.own().across}
    head = HTML.partition("<header>")[2].partition("</header>")[0]
    for paper in across:
        assert f'data-open="{paper["key"]}"' in head
        own = HTML.partition(f'<details class="paper" id="{paper["key"]}"')[2]
        own = own.partition("</details>")[0]
        assert "What we ask" in own
        assert re.findall(r'data-open="([^"]+)"', own) == paper["across"]


def test_it_is_small_and_fetches_nothing() -> None:
    assert len(HTML.encode()) < 500_000
    assert "default-src 'none'" in HTML
    asked = re.findall(r'\b(?:src|href|srcset|data|action)="([^"]*)"', HTML)
    assert asked
    assert [url for url in asked if not url.startswith("#")] == []
    assert re.findall(r"url\(|@import|https?://|fetch\(|XMLHttp", HTML.partition("<main>")[0]) == []
    assert re.findall(r"fetch\(|XMLHttp|import\(", HTML.rpartition("<script>")[2]) == []
    assert "plotly" not in HTML.lower()


def test_the_data_hold_each_verdict_that_counts_or_not() -> None:
    """And are strict JSON: NaN is text."""
    text = json.dumps(DATA, allow_nan=False)
    assert json.loads(text) == DATA
    for entry in pages.own().built():
        [paper] = [paper for paper in DATA["papers"] if paper["key"] == entry.row.key]
        told = [v for claim in paper["claims"] for v in claim["verdicts"]] + paper["superseded"]
        assert len(told) == len(entry.verdicts)
        assert all(
            {"values", "units", "draws", "code", "commit", "seconds"} <= v.keys() for v in told
        )
        assert paper["stale"] == entry.stale()
        assert paper["unsaid"] == (entry.paper.unsaid if entry.paper else None)


def test_the_matrix_shows_the_worst_word() -> None:
    claim = {"tier": "small", "kind": "real", "subject": "one"}
    paper = {
        "claims": [
            claim | {"word": "reproduced"}, claim | {"word": "not reproduced"},
            claim | {"word": "reproduced", "kind": "miniature", "subject": "tiny"},
            claim | {"word": "not reproduced", "tier": "identity"},
        ]
    }  # fmt: skip
    assert whole.matrix(paper, ["one", "two", whole.MINIATURES]) == [
        "not reproduced", "", "reproduced",
    ]  # fmt: skip
    assert set(page.SIGNS) == set(words.STATUSES)


def test_an_effect_is_a_share_of_the_papers_own() -> None:
    verdict = {"values": {"x": -0.5, "y": 3.0, "z": "nan"}, "interval": {"x": [-1.0, 0.5]}}
    second = {"values": {"x": -18.0, "z": "nan"}, "interval": {}, "seed": 3}
    claim = {"says": "s", "subject": "one", "word": "direction only"}
    claim |= {"verdicts": [verdict | {"seed": 2}, second]}
    claim |= {"found_there": {"x": -2.0, "y": 0.0, "z": 1.0, "w": 1.0}}
    paper = {"key": "k", "title": "t", "claims": [claim]}
    [effect] = whole.effects({"papers": [paper]})
    first, far = effect["runs"]
    assert effect["there"] == -2.0
    assert (first["share"], first["ends"], first["seed"]) == (0.25, [-0.25, 0.5], 2)
    assert (far["share"], far["ends"]) == (9.0, [])
    drawn = page._drawn(effect)
    assert drawn["runs"][0] == {"x": 30.0, "line": [10.0, 40.0], "beyond": False}
    assert drawn["runs"][1] == {"x": 100.0, "line": [], "beyond": True}
    assert (drawn["seeds"], drawn["shares"]) == ("seeds 2, 3", "0.25, 9.00")


def test_claims_between_models_have_a_column_of_their_own() -> None:
    claim = {"tier": "small", "kind": "real", "word": "reproduced"}
    paper = {"claims": [claim | {"subject": name} for name in ("a", "a, b", "b and more")]}
    assert whole.subjects({"papers": [paper]}) == ["a", whole.TOGETHER]
    assert whole.matrix(paper, ["a", whole.TOGETHER]) == ["reproduced", "reproduced"]


def test_hostile_text_stays_text() -> None:
    evil = "</script><img src=x onerror=alert(1)>\"'&"
    data = json.loads(json.dumps(DATA))
    paper = next(paper for paper in data["papers"] if paper["built"])
    paper |= {"title": evil, "says": evil, "source": evil}
    paper["claims"][0] |= {"says": evil, "subject": evil, "null": {evil: evil}}
    html = page.render(data)
    assert "<img" not in html
    assert html.count("</script>") == HTML.count("</script>")
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    inside = html.partition('id="atlas">')[2].partition("</script>")[0]
    assert evil.casefold() in json.loads(inside)[0]["text"] + json.loads(inside)[-1]["text"] or any(
        evil.casefold() in found["text"] for found in json.loads(inside)
    )


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("level=layer", lambda p: p["level"] == "layer"),
        ("search=HEADS+talking", lambda p: all(w in p["text"] for w in ("heads", "talking"))),
        (
            "subject=smollm2&null=random",
            lambda p: any(
                c["subject"] == "smollm2" and "random" in c["nulls"] for c in p["claims"]
            ),
        ),
        (
            "word=not+built&from=2015&to=2020",
            lambda p: "not built" in p["words"] and 2015 <= p["year"] <= 2020,
        ),
        (
            "subject=smollm2&seconds=600",
            lambda p: any(
                c["subject"] == "smollm2" and 0 <= c["seconds"] <= 600 for c in p["claims"]
            ),
        ),
    ],
)
def test_a_filter_hides_the_others(tmp_path: Path, asked: str, shown) -> None:
    path = page.write(DATA, tmp_path / "atlas.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chromium"]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", f"{path.as_uri()}#{asked}"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    rows = re.findall(r'<details class="paper"[^>]*>', done.stdout)
    left = {re.findall(r'data-key="([^"]+)"', row)[0] for row in rows if "hidden" not in row}
    wanted = {p["key"] for p in map(page.searched, DATA["papers"]) if shown(p)}
    assert left == wanted
    assert 0 < len(wanted) < len(rows)
    assert f"{len(wanted)} of {len(rows)} shown" in done.stdout


def test_the_command_writes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "all.html"
    done = CliRunner().invoke(cli.main, ["atlas", "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    assert f"Page: {out.as_uri()}" in done.output
    assert f"243 papers and {len(pages.own().across)} files across papers, " in done.output
    kept = json.loads((tmp_path / "all.json").read_text())
    assert kept["schema"] == whole.SCHEMA
    assert len(kept["papers"]) == len(ledger.rows()) + len(pages.own().across)
    nowhere = CliRunner().invoke(cli.main, ["atlas", "--out", str(tmp_path / "no" / "x.html")])
    assert nowhere.exit_code == 2
    assert "could not be written" in " ".join(nowhere.stderr.split())
