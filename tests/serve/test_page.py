"""The page without a browser and without Gradio: who may reach it, what it takes, tells and keeps apart."""

import asyncio
import base64
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from llava.serve.page import __main__ as command
from llava.serve.page.limits import LimitedRequests, check_address
from llava.serve.page.pieces import error, picture_box, preview, told
from llava.serve.page.user import Bundled, Progress, Replaced, User, address_of, read_address, told_error
from llava.serve.status import Stopped
from llava.serve.viewer.paths import without_paths
from llava.serve.viewer.setting import Setting
from llava.serve.viewer.turns import Turns
from records import GOLDEN

PICTURE = GOLDEN / "images" / "small97x61.png"
SETTINGS = [Setting(f"question {number} & more", keep="16") for number in range(3)]


class Desk:
    """Answers with two words, in a thread that waits for each of them to be let through."""

    def __init__(self, fails=None):
        self.shown, self.fails, self.name = [], fails, ""
        self.gate = threading.Semaphore(100)

    def show(self, name, pictures=(), video=None):
        self.shown.append((name, [picture.size for picture in pictures]))
        self.name = name

    def look(self, setting, listener):
        if self.fails is not None:
            raise self.fails
        listener.stage("vision")
        for word in ("two ", "words"):
            self.gate.acquire()
            try:
                listener.text(word, False)
            except Stopped:
                return SimpleNamespace(setting=setting, stopped=True)
        return SimpleNamespace(setting=setting, stopped=False)

    def comparison(self, looks):
        return tuple(looks)


def test_only_this_machine_unless_the_user_says_so(capsys):
    for host in ("127.0.0.1", "127.0.0.5", "::1", "localhost"):
        check_address(host, False)
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        check_address(host, True)
        with pytest.raises(ValueError, match="--open-to-network"):
            check_address(host, False)


def test_bad_flags_end_before_a_model_is_loaded(capsys):
    pytest.importorskip("gradio")
    assert command.main(["--host", "0.0.0.0"]) == 2
    assert command.main(["--image-file", str(GOLDEN / "nothing.png")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_messages_hold_no_path_of_the_server():
    assert without_paths("no file at /home/me/models/clip.bin, nor in ~/a/b/") == "no file at clip.bin, nor in b"
    assert without_paths("relevance=clip: read in /srv/x/clip-toy-336") == "relevance=clip: read in clip-toy-336"
    assert (
        without_paths("a share of 1/2, and/or https://example.org/a/b")
        == "a share of 1/2, and/or https://example.org/a/b"
    )
    assert told_error(ValueError("not at /srv/secret/place")) == "not at place"
    assert "secret" not in told_error(OSError("/srv/secret"))
    assert told_error(Stopped()) == "stopped"


def answer_of(middleware, scope, messages=()):
    sent, left = [], list(messages)

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(middleware({"type": "http", "headers": [], **scope}, receive, send))
    return sent


def test_requests_beyond_the_limit_are_not_read():
    read = []

    async def app(scope, receive, send):
        while True:
            message = await receive()
            read.append(message)
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200})

    limited = LimitedRequests(app, 100)
    long = [(b"content-length", b"101")]
    assert answer_of(limited, {"path": "/queue/join", "headers": long})[0]["status"] == 413
    assert answer_of(limited, {"path": "/gradio_api/upload"})[0]["status"] == 404
    assert not read
    parts = [{"type": "http.request", "body": b"x" * 60, "more_body": True}] * 3  # without a length
    answer_of(limited, {"path": "/queue/join"}, parts)
    assert [message["type"] for message in read] == ["http.request", "http.disconnect"]
    ok = [{"type": "http.request", "body": b"x" * 60}]
    assert answer_of(limited, {"path": "/queue/join"}, ok)[0]["status"] == 200


def test_what_is_sent_comes_to_the_desk_or_is_refused():
    user, offered = User(Desk()), {"scene": Bundled("scene", picture=Image.new("RGB", (9, 8)))}
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    user.take({"name": "own.png", "data": data}, offered, 10**6, 4)
    assert user.desk.shown == [("own.png", [(97, 61)])]
    assert user.bundled is None
    user.take({"bundled": "scene"}, offered, 10**6, 4)
    assert user.desk.shown[1:] == [("scene", [(9, 8)])]
    assert user.bundled == "scene"
    for wrong, match in (
        ({"bundled": "/etc/passwd"}, "there is no picture"),
        ({"name": "a.png", "data": "!!"}, r"\S"),
        ({"name": "a.png", "data": base64.b64encode(b"junk").decode()}, "a.png is not an image"),
        ({"name": "big.png", "data": "A" * 3000}, "big.png is larger than the limit"),
        ("text", "expected a picture"),
    ):
        with pytest.raises(ValueError, match=match):
            user.take(wrong, offered, 2000, 4)
    assert len(user.desk.shown) == 2
    assert user.bundled == "scene"  # what was there is still there


def test_words_come_as_they_are_written_and_the_looks_one_by_one():
    user, told_of = User(Desk()), []
    for progress in user.work(SETTINGS[:2]):
        told_of.append(progress)
        assert len(progress.done) <= len(user.comparison or ())  # what is done can be shown
    assert [progress.answer for progress in told_of if progress.answer] == ["two ", "two words"] * 2
    assert [len(progress.done) for progress in told_of if "waiting" in progress.doing] == [0, 1]
    assert all("1 of 2: " in progress.doing or "2 of 2: " in progress.doing for progress in told_of)
    assert len(user.comparison) == 2
    for settings in ([], SETTINGS * 3):
        with pytest.raises(ValueError, match="one to 6"):
            next(user.work(settings))


def test_stop_ends_the_answer_and_all_that_would_follow():
    user = User(Desk())
    user.desk.gate = threading.Semaphore(1)
    for progress in user.work(SETTINGS):
        if progress.answer:
            user.stop.set()
            user.desk.gate.release()
    assert [look.stopped for look in user.comparison] == [True]
    work = user.work(SETTINGS)  # the next one runs, and ends with its reader
    next(work)
    assert not user.stop.is_set()
    work.close()
    assert user.stop.is_set()


def test_a_new_run_ends_the_one_before_which_tells_nothing_more():
    user = User(Desk())
    user.desk.gate = threading.Semaphore(1)
    first, second = user.work(SETTINGS[:2]), user.work(SETTINGS[2:])
    while not next(first).answer:
        pass
    next(second)
    user.desk.gate.release(5)
    with pytest.raises(Replaced):
        next(first)
    list(second)
    assert [look.setting for look in user.comparison] == SETTINGS[2:]


def test_turns_come_in_order_and_those_who_wait_may_leave():
    turns, order, places = Turns(most_waiting=2), [], []
    in_line = threading.Barrier(2)

    def take(name, leaves=False):
        def waiting(before):
            if name not in places:
                places.append(name)
                in_line.wait()
            if leaves:
                raise Stopped

        try:
            with turns.turn(waiting):
                order.append(name)
        except Stopped:
            order.append(f"{name} left")

    with turns.turn(lambda before: None):
        threads = [threading.Thread(target=take, args=one) for one in (("a", True), ("b",), ("c",))]
        threads[0].start()
        in_line.wait()
        threads[0].join()
        for thread in threads[1:]:
            thread.start()
            in_line.wait()
        with pytest.raises(ValueError, match="2 others are waiting"), turns.turn(lambda before: None):
            pass
    for thread in threads:
        thread.join()
    assert order == ["a left", "b", "c"]


def test_what_a_look_raises_is_told():
    with pytest.raises(ValueError, match="no such budget"):
        list(User(Desk(ValueError("no such budget"))).work(SETTINGS))


def test_addresses_hold_the_picture_and_every_look():
    for settings in (SETTINGS[:1], SETTINGS):
        assert read_address(address_of(settings, "a scene")[1:]) == ("a scene", settings)
        assert read_address(address_of(settings, None)[1:]) == (None, settings)
    assert read_address("") == (None, [])
    with pytest.raises(ValueError, match="unknown pruner"):
        read_address("question=q&method=nope")
    with pytest.raises(ValueError, match="7 looks"):
        read_address("&".join(["look=question%3Dq"] * 7))


def test_text_of_others_is_no_html():
    nasty = "<img src=x onerror=alert(1)>"
    one = Bundled(nasty, picture=Image.new("RGB", (4, 4)))
    for html in (
        error(nasty),
        told(Progress(nasty, nasty)),
        picture_box([one], 100),
        preview(one.picture, nasty, nasty),
    ):
        assert "<img src=x" not in html
