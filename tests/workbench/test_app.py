"""Who may ask, what they get, what stays closed, and that work ends with the person's interest."""

from __future__ import annotations

import json
import time

import pytest

from stratoscope.cli import serve
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.report import page
from stratoscope.tokens import next_token
from stratoscope.workbench.guard import HEADERS
from stratoscope.workbench.state import State
from support.asgi import OPEN, PORT, TOKEN, Answer, ask

HOST = {"host": f"127.0.0.1:{PORT}"}
TRUTH = planted.fact_lookup()
QUERY = {"prompt": TRUTH.clean, "answer": TRUTH.answer, "foil": TRUTH.foil, "quick": "1"}


def events(answer: Answer) -> list[dict]:
    return [json.loads(line) for line in answer.text.splitlines()]


def test_the_token_opens_and_a_cookie_keeps_open(app) -> None:
    first = ask(app, "/", {"prompt": "a b", "token": TOKEN}, headers=HOST)
    assert (first.status, first.headers["location"]) == (303, "/?prompt=a+b")  # it leaves the bar
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    again = ask(app, "/", headers=HOST | {"cookie": cookie.partition(";")[0]})
    assert again.status == 200
    assert "<textarea" in again.text


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        (HOST, {}, 403),
        (HOST, {"token": "guessed"}, 403),
        (HOST, {"token": ""}, 403),
        (HOST | {"cookie": f"stratoscope-{PORT}=guessed"}, {}, 403),
        (HOST | {"cookie": f"stratoscope-1={TOKEN}"}, {}, 403),
        (OPEN | {"host": f"evil.example:{PORT}"}, {}, 400),  # a name that leads here
        (OPEN | {"host": "127.0.0.1:1"}, {}, 400),
        ({"cookie": OPEN["cookie"]}, {}, 400),
        (OPEN | {"origin": "http://evil.example"}, {}, 403),
        (OPEN | {"origin": "null"}, {}, 403),
        (OPEN | {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, {}, 403),
        (OPEN | {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, {}, 403),
        (OPEN | {"origin": HOST["host"]}, {}, 403),
        (OPEN | {"origin": f"http://{HOST['host']}", "sec-fetch-site": "same-origin"}, {}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/", "/static/bench.js", "/files"])
def test_others_may_not_ask(app, path, headers, query, status) -> None:
    assert ask(app, path, query, headers=headers).status == status


def test_a_taken_port_is_said() -> None:
    with serve.listen(0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match="leave --port out"):
            serve.listen(port)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_is_written(app, method) -> None:
    assert ask(app, "/explain", QUERY, method=method).status == 405


def test_every_answer_has_the_headers(app) -> None:
    for path in ("/", "/static/bench.css", "/files", "/nowhere", "/static/nowhere"):
        headers = ask(app, path).headers
        assert {k: headers.get(k) for k in HEADERS} == HEADERS
    assert "unsafe-inline" not in HEADERS["content-security-policy"].partition("style-src")[0]
    assert "://" not in ask(app, "/").text  # the page asks nobody else


def test_an_explanation_comes_part_by_part_and_is_kept(app, desk) -> None:
    found = events(ask(app, "/explain", QUERY))
    assert found[-1] == {"done": True}
    steps = [event["step"] for event in found if "step" in event]
    assert "what it predicts" in steps
    assert "patching heads, and the null" not in steps  # quick
    at = {name: i for i, e in enumerate(found) if (name := e.get("section"))}
    first = next(i for i, e in enumerate(found) if "section" in e)
    assert found[first]["section"] == "prediction"
    lens = next(
        i for i, e in enumerate(found) if e.get("step") == "the prediction through the layers"
    )
    assert first < lens  # the first picture before the second step
    assert {"prediction", "direct", "heads", "neurons", "tokens"} <= set(at)
    state = State.read(QUERY, desk.names)
    made = desk.made(state)
    whole = page.render(made)
    for event in found[::-1]:
        if event.get("section") == "direct":
            assert event["html"].count('class="plot"') == 3
            break
    report = ask(app, "/report", QUERY)
    assert report.headers["content-disposition"] == 'attachment; filename="report.html"'
    assert report.text == whole
    # asked again it is there at once, and drawn alike
    again = events(ask(app, "/explain", QUERY | {"unit": "L0H0"}))
    assert not any("step" in event for event in again)
    last = {e.get("section", "head"): e for e in found if "section" in e or "head" in e}
    assert {e.get("section", "head"): e for e in again[:-1]} == last


def test_a_unit_is_shown_with_the_words_of_the_explanation(app, desk) -> None:
    layer, number = sorted(TRUTH.neurons)[0]
    ask(app, "/explain", QUERY)
    query = QUERY | {"unit": f"L{layer}N{number}"}
    html = ask(app, "/unit", query).text
    assert "switched off" in html
    assert "as in the corrupt prompt" in html  # the explanation knows one
    assert "speaks for" in ask(app, "/pictures", query).text
    found = json.loads(ask(app, "/chance", query).text)
    assert found["reach"] < 0.1
    assert found["said"].startswith("Chance: 8 others")
    alone = json.loads(ask(app, "/chance", QUERY | {"unit": "T1"}).text)
    assert alone["reach"] is None
    changes = ask(app, "/change", query | {"factor": "2.5"}).text
    assert "2.5 times as strong" in changes
    assert "<table>" in changes
    assert "Top texts" in ask(app, "/texts", query).text


@pytest.mark.parametrize(
    ("path", "more", "what"),
    [
        ("/explain", {"prompt": " "}, "empty"),
        ("/explain", {"model": "/etc/passwd"}, "was started with"),
        ("/unit", {"unit": "L99H0"}, "2 layers"),
        ("/unit", {}, "names no unit"),
        ("/change", {"unit": "L0H0", "factor": "much"}, "no number"),
        ("/change", {"unit": "L0H0", "factor": "inf"}, "strength"),
        ("/texts", {"unit": "L0H0"}, "for a neuron"),
        ("/report", {"seed": "999"}, "not explained to its end"),
        ("/open", {"path": "nowhere.nc"}, "no result"),
    ],
)
def test_a_refusal_is_a_sentence(app, path, more, what) -> None:
    answer = ask(app, path, QUERY | more)
    assert answer.status == 400
    assert what in json.loads(answer.text)["error"]


def test_a_wrong_answer_is_told_in_the_stream(app) -> None:
    [*_, last] = events(ask(app, "/explain", QUERY | {"answer": TRUTH.foil}))
    assert "error" in last
    assert "Traceback" not in last["error"]


def test_work_stops_when_the_person_has_gone(app, desk) -> None:
    """The browser leaves after the first step; the next step is never begun, and the model is free
    at once."""
    full = {k: v for k, v in QUERY.items() if k != "quick"}
    answer = ask(app, "/explain", full, leave=lambda so_far: b"predicts" in so_far.body)
    assert b"done" not in answer.body
    lane, _ = desk.lanes("fact_lookup")
    began = time.perf_counter()
    while lane.lock.locked() and time.perf_counter() - began < 30:
        time.sleep(0.02)
    assert not lane.lock.locked()
    assert desk.made(State.read(full, desk.names)) is None
    # and the model is as it was
    chances = next_token.measure(lane.lm, TRUTH.clean)["probability"].values
    assert (
        chances
        == next_token.measure(desk.lanes("fact_lookup")[1].lm, TRUTH.clean)["probability"].values
    ).all()


def test_the_folder_is_open_and_nothing_beside_it(app, desk, tmp_path) -> None:
    from stratoscope import results

    lm, _ = desk.lanes("fact_lookup")
    (tmp_path / "below").mkdir()
    results.save(next_token.measure(lm.lm, TRUTH.clean), tmp_path / "below" / "next.nc")
    (tmp_path / "a <b>.html").write_text("<script>alert(1)</script>")
    (tmp_path / "secret.txt").write_text("no")
    (tmp_path / ".hidden.html").write_text("no")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.html"
    outside.write_text("no")
    (tmp_path / "link.html").symlink_to(outside)
    assert sorted(json.loads(ask(app, "/files").text)) == ["a <b>.html", "below/next.nc"]
    drawn = ask(app, "/open", {"path": "below/next.nc"})
    assert drawn.status == 200
    assert drawn.text.count("<img") >= 2
    made = ask(app, "/open", {"path": "a <b>.html"})
    assert made.text == "<script>alert(1)</script>"
    # whatever it does, it does in an origin of its own: no cookie, no request to us
    assert made.headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in made.headers["content-security-policy"]
    for path in (
        "link.html",
        f"../{outside.name}",
        str(outside),
        "secret.txt",
        "below",
        "",
        "below/../../" + outside.name,
        "a\0.html",
        "/etc/passwd",
    ):
        assert ask(app, "/open", {"path": path}).status == 400, path


def test_hostile_text_stays_text(app) -> None:
    hostile = {"prompt": "<img src=x> </script><script>2</script>", "model": "of_any_text"}
    found = events(ask(app, "/explain", hostile | {"quick": "1"}))
    assert found[-1] == {"done": True}
    html = "".join(event.get("html", "") + event.get("head", "") for event in found)
    for unit in ("L0N3", "L0H1", "T2"):
        html += ask(app, "/unit", hostile | {"unit": unit}).text
        html += ask(app, "/pictures", hostile | {"unit": unit}).text
    assert "&lt;" in html
    assert "<img" not in html
    assert "<script>" not in html
    told = ask(app, "/explain", QUERY | {"model": "<b>x</b>"})
    assert told.headers["content-type"] == "application/json"


def test_the_atlas_is_there(app, monkeypatch) -> None:
    from stratoscope.workbench import app as module

    monkeypatch.setattr(module, "_atlas", lambda: "<p>atlas</p>")
    answer = ask(app, "/atlas")
    assert answer.text == "<p>atlas</p>"
    assert answer.headers["content-security-policy"].startswith("sandbox")
