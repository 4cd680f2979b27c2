"""The load test of servers, against a server that only pretends."""

import json
import sys
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llava.eval.measure import serving_load
from llava.eval.measure.serving_load import (
    HEATING,
    LoadRow,
    ask,
    make_picture,
    measure,
    percentile,
    server,
    server_arguments,
    table,
)
from llava.integrations.vllm.options import ServerOptions, read_server_options


class Pretender(BaseHTTPRequestHandler):
    """Streams two tokens, and notes what it was asked."""

    asked: list
    refuses = False

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'vllm:kv_cache_usage_perc{engine="0",model_name="model"} 0.25\n')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.send_response(400 if self.refuses else 200)
        self.end_headers()
        if self.refuses:
            self.wfile.write(b"the server allows 64")
            return
        events = [{"choices": [{"delta": {"content": word}}]} for word in ("A", " cat")]
        events.append({"choices": [], "usage": {"prompt_tokens": 76, "prompt_tokens_details": {"cached_tokens": 19}}})
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def port():
    Pretender.asked, Pretender.refuses = [], False
    served = ThreadingHTTPServer(("127.0.0.1", 0), Pretender)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served.server_address[1]
    served.shutdown()
    thread.join()
    served.server_close()


SETTING = Namespace(side=16, served_name="model", answer_tokens=2)


@pytest.mark.parametrize("pictures, distinct", [("same", 1), ("different", 12)])
def test_a_cell_asks_every_question_once(port, pictures, distinct):
    row = measure(port, "pruned", pictures, 3, 12, SETTING)
    parts = [body["messages"][0]["content"] for body in Pretender.asked]
    assert len({part[1]["text"] for part in parts}) == len(parts) == 12
    assert len({part[0]["image_url"]["url"] for part in parts}) == distinct
    assert (row.clients, row.requests, row.prompt_tokens, row.cached) == (3, 12, 76, 0.25)
    assert row.requests_per_second > 0
    assert row.first_token_p50 <= row.answer_p50 <= row.answer_p99


def test_a_hot_picture_has_been_asked_about_before(port):
    measure(port, "auto", "hot", 2, 4, SETTING)
    parts = [body["messages"][0]["content"] for body in Pretender.asked]
    assert len({part[0]["image_url"]["url"] for part in parts}) == 1
    assert len({part[1]["text"] for part in parts}) == len(parts) == 4 + HEATING
    assert ServerOptions().reuse_after <= HEATING


def test_all_modes_are_asked_the_same(port):
    for mode in ("unpruned", "none"):
        measure(port, mode, "different", 1, 3, SETTING)
    assert Pretender.asked[:3] == Pretender.asked[3:]


def test_a_refusal_ends_the_run_with_its_message(port):
    Pretender.refuses = True
    with pytest.raises(RuntimeError, match="HTTP 400: the server allows 64"):
        measure(port, "pruned", "same", 2, 8, SETTING)


def test_a_server_that_does_not_start_shows_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"), server([], tmp_path / "log"):
        pass


def test_percentiles():
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.99) == 99
    assert percentile(values, 1) == 100
    assert percentile([3.0], 0.99) == 3
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2


def test_modes_differ_by_the_architecture_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlavaForConditionalGeneration"]}))
    arguments = Namespace(
        model=str(tmp_path), served_name="m", keep_tokens=8, method="script", server_args=["--seed", "1"]
    )
    unpruned, pruned = (server_arguments(arguments, mode) for mode in ("unpruned", "auto"))
    assert pruned[: len(unpruned)] == unpruned
    assert pruned[len(unpruned)] == "--hf-overrides"
    overrides = json.loads(pruned[-1])
    assert overrides["architectures"] == ["ScriptLlavaForConditionalGeneration"]
    read_server_options(overrides["script_pruning"], None)  # a server takes them
    assert overrides["script_pruning"]["reuse"] == "auto"


def test_table_puts_the_modes_side_by_side():
    rows = [
        LoadRow(mode, "same", n, 8, 70, 0.5, 1.0, 0.1, 0.2, 0.3, 0.4, 0.5)
        for mode in ("p", "unpruned")
        for n in (1, 4)
    ]
    lines = table(rows).splitlines()[2:]
    assert [tuple(cell.strip() for cell in line.split("|")[2:4]) for line in lines] == [
        ("1", "unpruned"),
        ("1", "p"),
        ("4", "unpruned"),
        ("4", "p"),
    ]


def test_pictures_differ_by_their_seed(port):
    assert make_picture(1, 16) == make_picture(1, 16) != make_picture(2, 16)
    answer = ask(port, "model", make_picture(1, 16), "What?", 2)
    assert 0 < answer.first <= answer.whole
    assert (answer.prompt, answer.cached) == (76, 19)


def test_bad_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serving_load", "--model", "/nowhere"])
    with pytest.raises(SystemExit):
        serving_load.parse()
    assert "--model must be a folder with a config.json, got /nowhere" in capsys.readouterr().err
