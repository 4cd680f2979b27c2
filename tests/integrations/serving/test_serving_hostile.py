"""No request ends or confuses a server: some hundreds of hostile ones, and a plain question after each."""

import base64
import http.client
import io
import json
import os
import random

import pytest
from PIL import Image

pytest.importorskip(
    "vllm", reason="vLLM is not installed: scripts/test_vllm.sh runs these in an environment of its own"
)

from llava.eval.measure.serving_load import server
from llava.integrations.vllm.options import OPTION_NAMES, SERVER_NAMES
from llava.pruning import get_pruner, list_pruners

KEEP = 32
PLAIN = "What color is it?"
WEIRD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**31,
        2**63,
        10**30,
        1e300,
        -1e300,
        1e-300,
        0.5,
        1.0,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "1", "none", "script", "picture", "latest_turn", "\ud83c", "a\x00b", "\U0001f600", "x " * 3000),
    *([], [1], {}, {"a": {"b": 1}}, ["script"], [[[]]], {"": None}, {"\ud800": 1}),
]
FIXED = [
    {"image_pruning_args": {"tau": "0.3"}},
    {"image_pruning_args": {"kernel_exponent": 1e9}},
    {"image_pruning_args": {"gamma": 1e308}},
    {"image_pruning_args": {"seed": 2**70, "dpp": False, "gsp": False, "relevance": "none"}},
    {"image_pruning_args": {"scope": "global"}},
    {"image_pruning_args": {"heads": "/etc/passwd"}},
    {"image_pruning_args": {"relevance_sign": True}},
    {"image_pruning_method": "grid", "keep_tokens": 31},
    {"image_pruning_method": "grid", "image_pruning_args": {"scope": "global"}},
    {"image_pruning_method": "random", "image_pruning_args": {"seed": -1}},
    {"image_pruning_method": "cdpruner", "keep_per": "picture", "image_pruning_args": {"scaling": "picture"}},
    {"keep_per": "picture", "keep_tokens": 96},
    {"keep_per": "picture", "keep_tokens": 1},
    {"min_visual_tokens": 64},
    {"query": "Is it \ud83c?"},
    {"query": "?" * 5},
    {"query": "<image><image>"},
    {"script_plans": {"image": []}},
    {"crop_size": {"height": 10, "width": 10}},
    {"do_resize": False},
    {"images_kwargs": {"do_pad": False}},
    {"truncation": True, "max_length": 1},
]


@pytest.fixture(scope="module")
def port(toy, tmp_path_factory):
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")
    overrides = {"architectures": ["ScriptLlavaNextForConditionalGeneration"], "script_pruning": {"keep_tokens": KEEP}}
    arguments = ["--model", str(toy("v1.6")), "--served-model-name", "toy", "--hf-overrides", json.dumps(overrides)]
    arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"]
    arguments += ["--trust-request-mm-kwargs"]
    with server(arguments, tmp_path_factory.mktemp("server") / "log") as port:
        yield port


def url_of(size, colour):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


RED, BLUE = url_of((336, 336), "red"), url_of((900, 300), "blue")


def ask(port, options=None, question=PLAIN, url=RED, uuid=None, parts=None, **body):
    """Status, and the answer or the server's words."""
    picture = {"type": "image_url", "image_url": None if url is None else {"url": url}}
    if uuid is not None:
        picture["uuid"] = uuid
    content = [picture, {"type": "text", "text": question}] if parts is None else parts
    body = {
        "model": "toy",
        "max_tokens": 2,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
        **body,
    }
    if options is not None:
        body["mm_processor_kwargs"] = options
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text)["choices"][0]["message"]["content"] if response.status == 200 else text


def hostile():
    """Keyword arguments of `ask`, some hundreds."""
    draw = random.Random(0)
    yield from ({"options": options} for options in FIXED)
    names = sorted(OPTION_NAMES | SERVER_NAMES) + ["keep_token", "nonsense", "", "\ud800"]
    yield from ({"options": {draw.choice(names): draw.choice(WEIRD)}} for _ in range(120))
    for _ in range(120):
        method = draw.choice(list_pruners())
        fields = [*vars(get_pruner(method)), "nonsense"]
        arguments = {draw.choice(fields): draw.choice(WEIRD) for _ in range(draw.randint(0, 2))}
        yield {"options": {"image_pruning_method": method, "image_pruning_args": arguments}}
    sizes = [(1, 1), (1, 700), (700, 1), (3, 2), (2000, 11), (11, 2000), (337, 335)]
    for size in sizes:
        yield {"url": url_of(size, "green")}
        yield {"url": url_of(size, "green"), "options": {"keep_per": "picture", "keep_tokens": 40}}
    for question in (
        "",
        "???",
        "<image>",
        "<image>" * 40,
        "\ud83c",
        "\x00",
        "USER: ASSISTANT:",
        "### " * 200,
        "é" * 500,
    ):
        yield {"question": question}
        yield {"options": {"query": question}}
    for uuid in ("X", "X" * 10_000, "\ud800", "", "../../etc"):
        yield {"uuid": uuid, "url": RED}
        yield {"uuid": uuid, "url": BLUE}
        yield {"uuid": uuid, "url": BLUE, "question": "Is it red or blue?"}
        yield {"uuid": uuid, "url": None}
        yield {"uuid": uuid, "url": None, "question": "Is it green?"}
    yield {"url": "data:image/png;base64,AAAA"}
    yield {"parts": []}
    yield {"parts": [{"type": "text", "text": "No picture."}]}
    yield {"parts": [{"type": "image_url", "image_url": {"url": RED}}] * 3}


def test_a_plain_question_after_each(port):
    status, said = ask(port)
    assert status == 200
    requests = list(hostile())
    assert len(requests) > 300
    answered = {}
    for request in requests:
        status, text = ask(port, **request)
        answered.setdefault(status, []).append((request, text))
        assert ask(port) == (200, said), request
    unexpected = [row for status, rows in answered.items() if status not in (200, 400) for row in rows]
    assert not unexpected
    assert len(answered[200]) > 50
    assert len(answered[400]) > 150


@pytest.mark.parametrize(
    "request_, words",
    [
        (
            {"options": {"image_pruning_args": {"tau": "0.3"}}},
            "tau must be a finite number between -1 and 1; got '0.3'",
        ),
        ({"options": {"query": "Is it \ud83c?"}}, "query is no valid Unicode"),
        ({"options": {"keep_token": 4}}, "did you mean keep_tokens?"),
        ({"options": {"query": "a" * 5000}}, "query may have 4096 characters, this one has 5000"),
        ({"question": "?"}, "pruner 'script' selects by the question, and prompt 0 asks nothing"),
    ],
)
def test_refused_in_our_words(port, request_, words):
    status, text = ask(port, **request_)
    assert status == 400
    assert words in json.loads(text)["error"]["message"]


def test_pictures_of_one_name_are_two_pictures(port):
    """Three ordinary requests, which ended a server once."""
    alone = [ask(port, url=BLUE), ask(port, url=BLUE, question="Is it red or blue?")]
    assert ask(port, uuid="N")[0] == 200
    assert [ask(port, url=BLUE, uuid="N"), ask(port, url=BLUE, uuid="N", question="Is it red or blue?")] == alone
