"""The workbench's addresses. Everything is read; nothing is written but what the browser saves.

| address                             | gives                                                     |
|-------------------------------------|-----------------------------------------------------------|
| `/`                                 | the page                                                  |
| `/explain?STATE`                    | events of an explanation, a JSON line each (`stream`)     |
| `/unit?STATE`                       | what one unit changes, HTML (`look`)                      |
| `/pictures?STATE`                   | where it looks, what it says                              |
| `/change?STATE&factor=2`            | the same at another strength                              |
| `/chance?STATE`                     | how far others of its layer reach                         |
| `/texts?STATE`                      | a neuron's top texts                                      |
| `/report` `/notebook` `/python` ... | what is shown, to take away                               |
| `/files`, `/open?path=NAME`         | the folder's results and pages                            |
| `/atlas`                            | the atlas                                                 |

STATE is a `State.address`. A request that cannot be answered gets 400 and one sentence.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stratoscope.errors import InputError, StratoscopeError
from stratoscope.plots.text import number
from stratoscope.report import page, sheet
from stratoscope.workbench import files, look
from stratoscope.workbench.desk import Desk
from stratoscope.workbench.guard import Guard
from stratoscope.workbench.state import State
from stratoscope.workbench.stream import explained
from stratoscope.workbench.unit import Unit

HERE = Path(__file__).parent
THREADS = 6
SCRIPTS = {
    "page.css": sheet.HERE,
    "bench.css": HERE,
    "figures.js": sheet.HERE,
    "bench.js": HERE,
}
# a page that somebody made: its scripts run, in an origin of their own
APART = {"content-security-policy": "sandbox allow-scripts allow-popups"}


def create(desk: Desk, folder: Path, *, token: str, port: int) -> Starlette:
    """The application: what `desk` has open, what is in `folder`, for those who have the token."""
    bench = Bench(desk, folder)
    pages = {
        "/": bench.page,
        "/explain": bench.explain,
        "/unit": bench.unit,
        "/change": bench.change,
        "/pictures": bench.pictures,
        "/chance": bench.chance,
        "/texts": bench.texts,
        "/report": bench.report,
        "/python": bench.python,
        "/notebook": bench.notebook,
        "/files": bench.files,
        "/open": bench.open,
        "/atlas": bench.atlas,
        "/static/{name}": bench.static,
    }
    return Starlette(
        routes=[Route(path, told(answer)) for path, answer in pages.items()],
        middleware=[Middleware(Guard, token=token, port=port)],
        lifespan=bench.lifespan,
    )


def told(answer: Callable[[Request], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """The same, with a refusal as a sentence for the person."""

    @functools.wraps(answer)
    async def safe(request: Request) -> Response:
        try:
            return await answer(request)
        except StratoscopeError as error:
            return JSONResponse({"error": str(error)}, 400)

    return safe


class Bench:
    """The answers to all addresses."""

    def __init__(self, desk: Desk, folder: Path) -> None:
        self.desk, self.folder = desk, folder
        self.threads = ThreadPoolExecutor(THREADS, "workbench")
        self.running: set[Event] = set()

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        for stop in self.running:
            stop.set()
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def page(self, _: Request) -> Response:
        names = self.desk.names
        html = sheet.fragment(
            "bench.html", HERE, models=names, folder=str(self.folder), texts=len(self.desk.texts),
            themes=json.dumps(sheet.THEMES), least=look.LEAST, most=look.MOST,
        )  # fmt: skip
        return HTMLResponse(html)

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == "plotly.js":
            from plotly.offline import get_plotlyjs

            headers = {"cache-control": "private, max-age=86400"}  # 4.8 MB: once a day
            return Response(get_plotlyjs(), media_type="text/javascript", headers=headers)
        if name not in SCRIPTS:
            return Response("There is no such file.", 404)
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        return Response((SCRIPTS[name] / name).read_text("utf-8"), media_type=kind)

    async def explain(self, request: Request) -> Response:
        state, stop = self._state(request), Event()
        loop, events = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()

        def tell(event: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                explained(self.desk, state, tell, stop)
            finally:
                tell(None)

        async def lines() -> AsyncIterator[str]:
            try:
                while (event := await events.get()) is not None:
                    yield json.dumps(event) + "\n"
            finally:  # also when the browser has gone: then the work stops at its next step
                stop.set()
                self.running.discard(stop)

        self.running.add(stop)
        loop.run_in_executor(self.threads, work)
        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def unit(self, request: Request) -> Response:
        return HTMLResponse(await self._clicked(request, whole=True))

    async def change(self, request: Request) -> Response:
        return HTMLResponse(await self._clicked(request, whole=False))

    async def _clicked(self, request: Request, whole: bool) -> str:
        state = self._state(request)
        unit, factor = Unit.parse(state.unit), request.query_params.get("factor")
        strength = None if factor is None else _number(factor)

        def work() -> str:
            made, lane = self.desk.made(state), self.desk.lanes(state.model)[1]
            with lane.taken(Event()) as lm:
                changes = look.changed(lm, state, unit, strength, made, lane.once)
                said = unit.said(lm.batch(state.prompt))
            if not whole:
                return sheet.fragment("changes.html", HERE, **changes)
            about = {"name": unit.name, "kind": unit.kind, "said": said}
            more = {"texts": len(self.desk.texts), "least": look.LEAST, "most": look.MOST}
            return sheet.fragment("unit.html", HERE, **about, **changes, **more)

        return await self._in_thread(work)

    async def pictures(self, request: Request) -> Response:
        state = self._state(request)
        unit = Unit.parse(state.unit)

        def work() -> str:
            lane = self.desk.lanes(state.model)[1]
            with lane.taken(Event()) as lm:
                shown = look.pictures(lm, state, unit, lane.once)
            return sheet.fragment("pictures.html", HERE, **shown)

        return HTMLResponse(await self._in_thread(work))

    async def chance(self, request: Request) -> Response:
        state = self._state(request)
        unit = Unit.parse(state.unit)

        def work() -> dict[str, Any]:
            made, lane = self.desk.made(state), self.desk.lanes(state.model)[1]
            with lane.taken(Event()) as lm:
                found = look.chance(lm, state, unit, made, lane.once)
            if found is None:
                return {"reach": None, "said": "It has no others to compare with."}
            low, high, count = found
            said = (
                f"Chance: {count} others of this layer, each switched off, change the difference "
                f"by {number(low)} to {number(high)}."
            )
            return {"reach": max(abs(low), abs(high)), "said": said}

        return JSONResponse(await self._in_thread(work))

    async def texts(self, request: Request) -> Response:
        state = self._state(request)
        unit = Unit.parse(state.unit)

        def work() -> str:
            with self._quick(state) as lm:
                found = look.top_texts(lm, unit, self.desk.texts)
            return sheet.fragment("texts.html", HERE, found=found)

        return HTMLResponse(await self._in_thread(work))

    async def report(self, request: Request) -> Response:
        state = self._state(request)
        made = self.desk.made(state)
        if made is None:
            raise InputError("this is not explained to its end yet: run it, then take the report.")
        return _file(await self._in_thread(lambda: page.render(made)), "report.html", "text/html")

    async def python(self, request: Request) -> Response:
        return _file(self._state(request).python(), "explain.py", "text/x-python")

    async def notebook(self, request: Request) -> Response:
        kind = "application/x-ipynb+json"
        return _file(self._state(request).notebook(), "explain.ipynb", kind)

    async def files(self, _: Request) -> Response:
        return JSONResponse(await self._in_thread(lambda: files.listed(self.folder)))

    async def open(self, request: Request) -> Response:
        path = files.inside(self.folder, request.query_params.get("path", ""))
        if path.suffix == ".html":
            return HTMLResponse(await self._in_thread(path.read_bytes), headers=APART)

        def drawn() -> str:
            from stratoscope import results
            from stratoscope.report import show

            result = results.load(path)
            names = [None] if not hasattr(result, "data_vars") else show.numbers(result)
            pictures = [(name or result.name, show.show(result, name)) for name in names]
            return sheet.fragment("result.html", HERE, name=path.name, pictures=pictures)

        return HTMLResponse(await self._in_thread(drawn))

    async def atlas(self, _: Request) -> Response:
        return HTMLResponse(await self._in_thread(_atlas), headers=APART)

    def _state(self, request: Request) -> State:
        return State.read(request.query_params, self.desk.names)

    def _quick(self, state: State) -> Any:
        return self.desk.lanes(state.model)[1].taken(Event())

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


@functools.cache
def _atlas() -> str:
    from stratoscope.claims import atlas, ledger
    from stratoscope.report import atlas as drawn

    return drawn.render(atlas.data(ledger.atlas()))


def _file(text: str, name: str, kind: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{name}"'} | APART
    # half of a surrogate pair in a token must not cost the whole page
    return Response(text.encode("utf-8", "replace"), media_type=kind, headers=headers)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"strength {text!r:.40} is no number.") from None
