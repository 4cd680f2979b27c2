"""What the server takes and tells: sizes of requests, who may reach it, no path of its own in what it sends."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import Any

PATH = re.compile(r"(?<![\w/:.])~?(?:/[\w.@+-]+){2,}/?|[A-Za-z]:(?:\\[\w.@+ -]+)+")
REFUSED = ("/upload",)  # the page sends pictures through the queue, where they are checked

Message = dict[str, Any]


def check_address(host: str, open_to_network: bool) -> None:
    """Raise ValueError if a server at ``host`` could be reached from other machines and nobody asked for it."""
    if open_to_network:
        return
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise ValueError(
            f"--host {host} can be reached from other machines, and whoever reaches the page uses this one's model: "
            "add --open-to-network if that is wanted"
        )


def without_paths(text: str) -> str:
    """A message with the paths of this machine cut to their last part."""
    return PATH.sub(lambda match: re.split(r"[/\\]", match.group().rstrip("/\\"))[-1], text)


class LimitedRequests:
    """ASGI middleware: no request body beyond ``most_bytes`` is read, and Gradio's own uploads are refused.

    Args:
        app: what answers the others.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].rstrip("/").endswith(REFUSED):
            await refuse(send, 404, "nothing is uploaded here")
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and (not lengths[0].isdigit() or int(lengths[0]) > self.most_bytes):
            await refuse(send, 413, f"a request may have {self.most_bytes} bytes")
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most_bytes:
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, counted, send)


async def refuse(send: Callable[[Message], Awaitable[None]], status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
