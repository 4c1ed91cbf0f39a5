"""How the page is served: its port, what gradio must not do, what a browser must not load.  No gradio here until it runs."""

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.logging import say

LARGEST_BODY = 1 << 20  # bytes of a request
POSTS = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/run/predict")  # the last, of what is not queued
GETS = ("/gradio_api/queue/data", "/gradio_api/heartbeat/", "/gradio_api/info")  # and the drawings' files
HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """The page's place, kept from the start, so that a taken port is told before anything is loaded.  Raises: UserError."""
    try:
        place = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = (error.strerror or str(error)).split(" (while")[0]
        raise UserError(f"--host {host} --port {port} cannot be used ({why}); try another --port") from error
    with place:
        if not is_loopback(host):
            say(f"warning: --host {host}: anyone who reaches port {place.getsockname()[1]} of this machine can draw")
        yield place


def address(host: str, place: socket.socket) -> str:
    """For the address bar."""
    shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{place.getsockname()[1]}"


def hush(folder: Path) -> None:
    """Before gradio is imported: no analytics, no look for newer versions, and no files but in our folder."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(folder), GRADIO_EXAMPLES_CACHE=str(folder))


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end the program with its folder removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        yield


class Guard:
    """In front of gradio, as an ASGI app: only the requests that the page makes, and no outside hosts for the browser.

    gradio itself would take uploads, and fetch any address that it is given as the name of a file.
    """

    def __init__(self, app: Any, folder: Path):
        self.app, self.gets = app, (*GETS, f"/gradio_api/file={folder}/")

    def refused(self, scope: dict[str, Any]) -> int | None:
        """The status of a refusal."""
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            return None if not path.startswith(("/gradio_api", "/monitoring")) or path.startswith(self.gets) else 404
        if method != "POST" or path not in POSTS:
            return 404
        headers = dict(scope["headers"])  # a chunked body, which no browser sends, has no length to trust
        size = b"" if b"transfer-encoding" in headers else headers.get(b"content-length", b"")
        return None if size.isdigit() and int(size) <= LARGEST_BODY else 413

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        status = self.refused(scope) if scope["type"] == "http" else 404

        async def with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *((name.encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        if status is None:
            return await self.app(scope, receive, with_headers)
        await with_headers({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})


def run(app: Any, place: socket.socket) -> None:
    """Until a signal ends it."""
    import uvicorn

    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([place])
