"""Who may ask the workbench: the person who started it, from a page of its own.

A page of another site, opened in the same browser, can send requests to this machine. So every
request must name this machine as its host (else a foreign name that leads here could read), come
from no other origin, and carry a token that only the terminal has shown: once in the address, from
then on in a cookie that no script reads and no other site sends.
"""

from __future__ import annotations

from http.cookies import SimpleCookie
from secrets import compare_digest
from urllib.parse import parse_qsl, urlencode

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # plotly's and jinja's own
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOST = "This address needs the token that `stratoscope serve` printed. Open the address it printed."


class Guard:
    """The application inside, for those who may ask. token: what they must show. port: where this
    machine is asked."""

    def __init__(self, app: ASGIApp, *, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        self.cookie = f"stratoscope-{port}"  # a cookie knows no port, and two may be running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            """Send with the headers that every answer has, and that it did not choose itself."""
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                more = ((k.encode(), v.encode()) for k, v in HEADERS.items())
                message["headers"] = [*message["headers"], *(h for h in more if h[0] not in own)]
            await send(message)

        answer = self.refusal(scope) or self.app
        await answer(scope, receive, guarded)

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to those who may not ask, or who bring their token; None for all others."""
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if headers.get("host") not in self.hosts:
            return PlainTextResponse("Wrong host: the workbench answers to 127.0.0.1.", 400)
        origin = headers.get("origin")
        other = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if (origin is not None and origin != f"http://{headers['host']}") or (
            other and headers.get("sec-fetch-mode") != "navigate"
        ):
            return PlainTextResponse("Another site may not ask the workbench.", 403)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("The workbench is only read.", 405)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown = next((value for name, value in query if name == "token"), None)
        if shown is not None and self._right(shown):
            rest = urlencode([pair for pair in query if pair[0] != "token"])
            answer = RedirectResponse(f"{scope['path']}{'?' if rest else ''}{rest}", 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
            return answer
        held = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        if held is None or not self._right(held.value):
            return PlainTextResponse(LOST, 403)
        return None

    def _right(self, token: str) -> bool:
        return compare_digest(token.encode(), self.token.encode())
