"""One request to an ASGI application, without a server or a browser."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

PORT, TOKEN = 4321, "the-token"
OPEN = {"host": f"127.0.0.1:{PORT}", "cookie": f"stratoscope-{PORT}={TOKEN}"}


class Answer:
    """status, headers (lower case) and body of one request."""

    def __init__(self) -> None:
        self.status, self.headers, self.parts = 0, {}, []

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def text(self) -> str:
        return self.body.decode()


def ask(
    app: Any,
    path: str,
    query: dict[str, str] | None = None,
    *,
    headers: dict[str, str] = OPEN,
    method: str = "GET",
    leave: Callable[[Answer], bool] = lambda so_far: False,
) -> Answer:
    """One request over ASGI. leave: the browser goes away once this is true."""
    answer = Answer()

    async def one() -> None:
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answer.parts.append(message.get("body", b""))
            if leave(answer):
                gone.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": urlencode(query or {}).encode(),
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", PORT),
        }
        await app(scope, receive, send)

    asyncio.run(one())
    return answer
