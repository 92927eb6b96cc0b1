"""The workbench in a real browser: load, type, click, cancel, reload, two tabs, hostile text, a
long prompt, keyboard alone."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.report import explain
from stratoscope.workbench.app import create
from stratoscope.workbench.desk import Desk
from support.asgi import TOKEN

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH"),
    pytest.mark.slow(reason="a browser starts and draws"),
]
TRUTH = planted.fact_lookup()
DONE, LONG = "Done in", 60_000
HOSTILE = "<img src=x onerror=document.title='hit'> </script><b>a"


@pytest.fixture(scope="module")
def address(any_text) -> Iterator[str]:
    import uvicorn

    def load(name: str) -> Any:
        return any_text if name == "of any text" else wrap(TRUTH.model, TRUTH.tokenizer)

    desk = Desk(["planted", "of any text"], load, [TRUTH.clean])
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        app = create(desk, Path(folder), token=TOKEN, port=port)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{port}/?token={TOKEN}"
        server.should_exit = True
        thread.join(30)
    listening.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu"]
        opened = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def tab(browser, address, complaints) -> Iterator[Any]:
    """A page of a person who has opened the printed address; whatever it complains of fails."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(LONG)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
    page.goto(address)
    yield page
    context.close()
    assert complaints == []


def explained(page: Any, prompt: str = TRUTH.clean) -> None:
    page.fill("textarea", prompt)
    page.check("[name=quick]")
    page.click(".go")
    page.locator(".busy").wait_for(state="hidden")
    assert DONE in page.inner_text("[role=status]"), page.inner_text(".pane form")


def test_type_click_change_reload(tab) -> None:
    assert "token" not in tab.url
    tab.fill("[name=answer]", TRUTH.answer)
    tab.fill("[name=foil]", TRUTH.foil)
    explained(tab)
    assert tab.locator(".sections .main-svg").count() >= 6
    tab.locator("[data-section=direct] a[data-unit]").first.click()
    tab.get_by_role("rowheader", name="switched off").wait_for()
    unit = tab.input_value("[name=unit]")
    assert f"unit={unit}" in tab.url
    # steered, live
    tab.fill("#unit input[type=range]", "3")
    tab.get_by_text("3 times as strong").wait_for()
    # a cell of a picture: the last row of the heads
    plot = tab.locator("[data-section=direct] .plot").nth(1)
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 8, box["y"] + box["height"] / 4)
    tab.wait_for_url("**unit=L1H0*")
    tab.get_by_text("head 0 of layer 1").wait_for()
    # every state is an address: opened again it shows the same, and back goes back
    tab.reload()
    tab.get_by_text(DONE).wait_for()
    tab.get_by_text("head 0 of layer 1").wait_for()
    assert tab.input_value("textarea") == TRUTH.clean
    tab.go_back()
    tab.get_by_role("heading", name=unit).wait_for()
    with tab.expect_download() as waited:
        tab.click("[data-take=python]")
    assert "st.explain" in waited.value.path().read_text()


def test_keyboard_alone(tab) -> None:
    tab.keyboard.type(TRUTH.clean)  # the prompt has the focus
    tab.keyboard.press("Enter")
    tab.get_by_text(DONE).wait_for()
    tab.focus("[name=unit]")
    tab.keyboard.type("L0M")
    tab.keyboard.press("Enter")
    tab.get_by_text("the MLP of layer 0").wait_for()
    tab.keyboard.press("Escape")
    tab.locator("#unit").wait_for(state="hidden")
    assert "unit" not in tab.url


def test_cancel_keeps_what_is_finished(tab, monkeypatch) -> None:
    slow = explain.explain

    def slower(*inputs: Any, report: Any, **how: Any) -> Any:
        def wait(name: str, done: int, total: int) -> None:
            for _ in range(40 if name == "tokens.occlusion" else 1):
                report(name, done, total)
                time.sleep(0.1 if name == "tokens.occlusion" else 0)

        return slow(*inputs, report=wait, **how)

    monkeypatch.setattr("stratoscope.workbench.stream.explain", slower)
    tab.fill("textarea", TRUTH.corrupt)
    tab.check("[name=quick]")
    tab.click(".go")
    tab.locator("[data-section=prediction] .main-svg").first.wait_for()
    tab.click(".stop")
    tab.get_by_text("Cancelled").wait_for()
    assert tab.locator("[data-section=prediction] .main-svg").count() >= 1
    assert tab.locator("[data-section=neurons]").count() == 0
    assert not tab.is_visible(".stop")
    monkeypatch.undo()
    explained(tab, TRUTH.corrupt)  # and it can be asked again


def test_two_tabs_and_two_panes(tab) -> None:
    other = tab.context.new_page()  # the cookie opens it
    other.goto(tab.url)
    explained(tab)
    explained(other, TRUTH.corrupt)
    other.close()
    tab.click("#compare")
    second = tab.locator("article").nth(1)
    second.locator("textarea").fill(TRUTH.corrupt)
    second.locator(".go").click()
    second.get_by_text(DONE).wait_for()
    answers = tab.locator(".versus .towards").all_inner_texts()
    assert len(answers) == len(set(answers)) == 2
    assert "b.prompt=" in tab.url
    tab.reload()
    tab.locator("article").nth(1).get_by_text(DONE).wait_for()


def test_hostile_text_and_a_long_prompt(tab) -> None:
    tab.select_option("select", "of any text")
    explained(tab, HOSTILE)
    assert HOSTILE[:4] in "".join(tab.locator(".strip").first.inner_text().split())
    assert tab.locator("img").count() == 0
    assert tab.title().startswith(HOSTILE[:30])
    explained(tab, "a b" * 67)
    assert tab.locator(".strip bdi").count() >= 200


@pytest.mark.parametrize(("width", "scheme"), [(1400, "dark"), (800, "light"), (390, "dark")])
def test_nothing_is_wider_than_the_page(browser, address, width, scheme) -> None:
    size = {"width": width, "height": 800}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    context.set_default_timeout(LONG)
    page = context.new_page()
    page.goto(address)
    explained(page)
    page.fill("[name=unit]", "L1H0")
    page.press("[name=unit]", "Enter")
    page.get_by_role("rowheader", name="switched off").wait_for()
    wide, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= room
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    context.close()


def test_what_is_refused_is_said(tab, complaints) -> None:
    explained(tab)
    tab.fill("[name=unit]", "L99H0")
    tab.press("[name=unit]", "Enter")
    tab.get_by_text("counted from 0").first.wait_for()
    tab.fill("[name=unit]", "L0H0")
    tab.press("[name=unit]", "Enter")
    tab.get_by_role("rowheader", name="switched off").wait_for()
    assert [text for text in complaints if "400" not in text] == []
    complaints.clear()  # the browser itself tells of a 400
