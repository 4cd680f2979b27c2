"""Pictures from the web: one limit for the whole transfer, only HTTP, and every fault a sentence."""

import io
import socket
import threading
import time
from contextlib import contextmanager
from socket import create_server

import pytest
from PIL import Image

from llava import downloads, pictures
from llava.downloads import download
from llava.mm_utils import load_image


@contextmanager
def server(answer):
    """A server on this machine that does ``answer(connection, path)`` for every connection; gives its address."""
    listening = create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=respond, args=(connection,), daemon=True).start()

    def respond(connection):
        with connection:
            try:
                answer(connection, connection.recv(4096).split()[1].decode())
            except OSError:
                return  # the other side has gone

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def drip(head):
    """Send ``head``, and then a byte again and again: no single wait is long."""

    def answer(connection, path):
        connection.sendall(head)
        for _ in range(400):
            connection.sendall(b"x")
            time.sleep(0.02)

    return answer


def test_a_picture_is_fetched_through_a_redirection():
    data = io.BytesIO()
    Image.new("RGB", (12, 8), (9, 90, 200)).save(data, "PNG")

    def answer(connection, path):
        if path == "/old":
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /new\r\nContent-Length: 0\r\n\r\n")
        else:
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + data.getvalue())

    with server(answer) as address:
        assert load_image(f"{address}/old").getpixel((3, 3)) == (9, 90, 200)


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\n\r\n", b""], ids=["header", "body", "status"]
)
def test_a_server_that_drips_is_cut_off(head):
    with server(drip(head)) as address:
        start = time.monotonic()
        with pytest.raises(OSError, match=r"cannot fetch http://127.* within 0\.3 s"):
            download(f"{address}/slow.png", seconds=0.3)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA"])
def test_a_redirection_away_from_http_is_refused(place):
    def answer(connection, path):
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode())

    with server(answer) as address, pytest.raises(OSError, match="cannot fetch"):
        download(address)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["nothing", "not HTTP", "404", "chunks", "long header", "bad address"],
)
def test_everything_that_is_no_answer_is_one_error(reply):
    replying = server(lambda connection, path: connection.sendall(reply))
    with replying as address, pytest.raises(OSError, match="cannot fetch http://127"):
        download(address)


@pytest.mark.parametrize(
    "place", ["127.0.0.1:9/picture.png", "[::1/a.png", "a..b/x", "/x", "127.0.0.1:99999/", "127.0.0.1:x/"]
)
def test_addresses_that_cannot_be_reached(place):
    with pytest.raises(OSError, match=r"cannot fetch http:.* within 10 s"):
        load_image(f"http://{place}")


def test_more_than_the_limit_is_not_read(monkeypatch):
    def answer(connection, path):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(5000))

    with server(answer) as address, pytest.raises(OSError, match="holds more than"):
        download(address, most=1000)
    assert pictures.download is downloads.download


def test_looking_up_a_name_is_within_the_time(monkeypatch):
    asked = threading.Event()

    def never(*arguments, **options):
        asked.set()
        time.sleep(5)
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"cannot fetch http://slow\.example/a\.png within 0\.3 s: the time is over"):
        download("http://slow.example/a.png", seconds=0.3)
    assert asked.is_set()
    assert time.monotonic() - began < 4
