"""Fetching a picture from the web: a limit for the whole transfer, and only over HTTP."""

from __future__ import annotations

import http.client
import io
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

URL_TIMEOUT_SECONDS = 10  # for everything: connecting, redirections, headers, contents
URL_MAX_BYTES = 32 * 1024 * 1024
CHUNK = 64 * 1024


class DeadlineReader(io.RawIOBase):
    """A socket's stream whose every wait ends at the deadline: a server that drips bytes cannot renew it.

    Args:
        left: seconds left; raises TimeoutError where there are none.
    """

    def __init__(self, sock: Any, left: Callable[[], float]) -> None:
        self._socket, self._stream, self._left = sock, sock.makefile("rb", buffering=0), left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._left())
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


def download(address: str, seconds: float = URL_TIMEOUT_SECONDS, most: int = URL_MAX_BYTES) -> bytes:
    """What an http(s) address holds.

    The transfer runs in a thread of its own: the system's look-up of a name takes no deadline, so that only who waits
    for it can stop waiting.

    Raises:
        OSError: it cannot be had in ``seconds``, has more than ``most`` bytes, leads away from HTTP, or is not
            answered in HTTP; names the address and the reason.
    """
    end = time.monotonic() + seconds
    outcome: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def left() -> float:
        remaining = end - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the time is over")
        return remaining

    def transfer() -> None:
        try:
            outcome.put(_fetched(address, most, left))
        except Exception as error:  # told where it is waited for
            outcome.put(error)

    threading.Thread(target=transfer, name="download", daemon=True).start()
    try:
        found = outcome.get(timeout=seconds)
    except queue.Empty:
        found = TimeoutError("the time is over")
    if isinstance(found, (OSError, http.client.HTTPException, ValueError)):
        reason = str(found) or type(found).__name__
        raise OSError(f"cannot fetch {address} within {seconds:g} s: {reason}") from found
    if isinstance(found, Exception):
        raise found
    if len(found) > most:
        raise OSError(f"{address} holds more than {most / 2**20:g} MiB")
    return found


def _fetched(address: str, most: int, left: Callable[[], float]) -> bytes:
    """The first bytes of what an address holds, few more than ``most`` of them."""
    data = bytearray()
    with _opener(left).open(address, timeout=left()) as response:
        while len(data) <= most and (chunk := response.read(CHUNK)):
            data += chunk
    return bytes(data)


def _opener(left: Callable[[], float]) -> urllib.request.OpenerDirector:
    """An opener that knows HTTP and nothing else (the usual one also opens files, FTP and data addresses)."""

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(sock, *arguments, **options)
            self.fp.close()
            self.fp = io.BufferedReader(DeadlineReader(sock, left))

    def timed(connection: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        class Timed(connection):
            response_class = Response

            def connect(self) -> None:
                self.timeout = left()
                super().connect()

        return Timed

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(timed(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(timed(http.client.HTTPSConnection), request)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        Http(),
        Https(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
