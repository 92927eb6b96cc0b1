"""How long a person waits at the workbench: the first picture after a prompt of 20 tokens, and what
a click says, in a real browser (Chromium, by playwright) on this machine.

.venv/bin/python bench/workbench.py

Milliseconds from the press or click to the moment when the browser holds the picture or the rows,
by an observer on the page itself. Bars: 1,500 for the first picture, 500 for a click.
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from stratoscope._threads import use_free_cores

OUT = Path(__file__).with_suffix(".json")
PROMPTS = (
    "The quick brown fox jumps over the lazy dog because the weather in the city of Paris is very",
    "When Mary and John went to the store on Monday, John gave a drink and a book to his friend",
)
UNITS = ("L5H3", "L6H3", "L20H1", "L12N7", "L13N9", "L21H4")
WAIT = """([what, unit]) => new Promise((done) => {
  const began = performance.now();
  const watch = new MutationObserver(() => {
    if (!document.querySelector(what)) return;
    watch.disconnect();
    done(performance.now() - began);
  });
  if (unit) {
    const box = document.querySelector("[name=unit]");
    box.value = unit;
    box.dispatchEvent(new Event("change"));
    document.querySelector("#unit .inside").replaceChildren();
  } else document.querySelector(".go").click();
  watch.observe(document.body, { subtree: true, childList: true });
})"""


def main() -> None:
    use_free_cores()
    import torch
    import uvicorn
    from playwright.sync_api import sync_playwright

    import stratoscope
    from stratoscope.workbench.app import create
    from stratoscope.workbench.desk import Desk

    desk = Desk(["smollm2"], stratoscope.load)
    desk.lanes("smollm2")
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    app = create(desk, Path(tempfile.mkdtemp()), token="bench", port=port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    found: dict[str, list[float]] = {"first_picture": [], "rows": [], "picture": []}
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"http://127.0.0.1:{port}/?token=bench")
        time.sleep(1.5)
        for prompt in PROMPTS:
            page.fill("textarea", prompt)
            found["first_picture"].append(page.evaluate(WAIT, [".main-svg", ""]))
            time.sleep(3)
            page.click(".stop")
            for unit in UNITS:
                time.sleep(1.5)
                found["rows"].append(page.evaluate(WAIT, ["#unit tbody tr", unit]))
            for unit in ("L7H1", "L14N3"):
                time.sleep(1.5)
                found["picture"].append(page.evaluate(WAIT, ["#unit .pictures *", unit]))
        browser.close()
    server.should_exit = True
    made = {name: [round(ms) for ms in values] for name, values in found.items()}
    about = {"threads": torch.get_num_threads(), "tokens": 20, "model": "smollm2"}
    OUT.write_text(json.dumps(about | {"milliseconds": made}, indent=1) + "\n")
    for name, values in made.items():
        sys.stdout.write(
            f"{name}: median {statistics.median(values):.0f} ms, most {max(values)} ms\n"
        )


if __name__ == "__main__":
    main()
