"""Crowds, disconnects and dead processes: answers stay those of single requests, and nobody waits for the dead.

One server after another: the first answers a crowd, is left by clients in mid-stream and loses its front end; the
second answers the crowd's requests one by one and loses its engine; the third answers again.
"""

import base64
import http.client
import json
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from conftest import MME

pytest.importorskip(
    "vllm", reason="vLLM is not installed: scripts/test_vllm.sh runs these in an environment of its own"
)
import psutil

from llava.eval.measure.serving_load import get, server

KEEP = 64
CROWD = 64
DISCONNECTS = 200
SETTLED = 33  # tokens; beyond them a toy picture's directions run out, and noise of 1e-7 changes 1 to 3 choices of 64
AT_ONCE = 30  # seconds in which a client of a dead process must hear of it, on a busy machine
PICTURES = [
    "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for path in sorted((MME / "position").glob("*.png"))[:6]
]
QUESTIONS = ("What colour is the circle?", "Is the house left of the tree?", "Is there a tree?", "What is it?")


@contextmanager
def running(toy, folder):
    """Port of a server, and its processes: the front end first."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")
    overrides = {"architectures": ["ScriptLlavaForConditionalGeneration"], "script_pruning": {"keep_tokens": KEEP}}
    arguments = ["--model", str(toy("v1.5")), "--served-model-name", "toy", "--hf-overrides", json.dumps(overrides)]
    arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "16"]
    arguments += ["--trust-request-mm-kwargs", "--block-size", "32"]
    before = {process.pid for process in psutil.Process().children()}
    with server(arguments, folder / "log") as port:
        front = next(process for process in psutil.Process().children() if process.pid not in before)
        yield port, [front, *front.children(recursive=True)]


def engine_of(processes):
    return next(process for process in processes if "EngineCore" in "".join(process.cmdline()))


def send(port, picture, question, tokens=6, options=None, **body):
    """The connection and the server's response to a question."""
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    body |= {
        "model": "toy",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "mm_processor_kwargs": options,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def answer(port, picture, question, options=None):
    """Tokens of the prompt, and the words and logprobs of a whole answer."""
    connection, response = send(port, picture, question, options=options, logprobs=True)
    said = json.loads(response.read())
    connection.close()
    assert response.status == 200, said
    words = said["choices"][0]["logprobs"]["content"]
    return said["usage"]["prompt_tokens"], [word["token"] for word in words], [word["logprob"] for word in words]


def crowd():
    """Requests of which no two are alike: pictures, questions, budgets, methods and policies mixed."""
    draw, seen = random.Random(5), set()
    while len(seen) < CROWD:
        options = {"keep_tokens": draw.choice((4, 9, 16, 33, 64))}
        if draw.random() < 0.3:
            options = {"image_pruning_rate": draw.choice((0.9, 0.95, 0.99))}
        if draw.random() < 0.3:
            options["image_pruning_method"] = draw.choice(("divprune", "cdpruner", "uniform"))
        elif draw.random() < 0.4:
            options["reuse"] = "picture"
        request = draw.choice(PICTURES), draw.choice(QUESTIONS), json.dumps(options)
        if request not in seen:
            seen.add(request)
            yield *request[:2], options


def tokens_of(request):
    """How many visual tokens a request of the crowd asks for."""
    options = request[2]
    return options.get("keep_tokens") or round((1 - options["image_pruning_rate"]) * 576)


def idle(port):
    """Whether the server works on nothing and holds no KV block."""
    text = get(port, "/metrics")[1]
    gauges = re.findall(
        r"^vllm:(?:num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)", text, re.M
    )
    assert len(gauges) >= 3
    return not any(map(float, gauges))


def check_that_clients_hear(port, kill):
    """Call ``kill`` in the midst of the answers to streaming and to waiting clients: all end at once, none content."""
    begun, ends = threading.Barrier(9), []

    def client(number):
        streams, whole = number % 2 == 0, False
        if not streams:  # hears nothing before its end
            begun.wait()
        try:
            question = f"What is it, {number}?"
            connection, response = send(port, PICTURES[number % 6], question, tokens=1500, stream=streams)
            if streams:
                response.readline()
                begun.wait()
            text = response.read().decode().replace(" ", "")
            whole = response.status == 200 and '"finish_reason":"length"' in text
            connection.close()
        except (OSError, http.client.HTTPException):
            pass
        ends.append((whole, time.monotonic()))

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    time.sleep(0.5)  # the waiting ones' requests arrive
    kill()
    killed = time.monotonic()
    for thread in threads:
        thread.join(AT_ONCE)
    assert len(ends) == 8
    assert not any(whole for whole, _ in ends)
    assert max(end for _, end in ends) - killed < AT_ONCE


def test_from_a_crowd_to_dead_processes(toy, tmp_path):
    requests = list(crowd())
    with running(toy, tmp_path) as (port, processes):
        with ThreadPoolExecutor(CROWD) as pool:
            together = list(pool.map(lambda request: answer(port, *request), requests))

        def leave(number):
            draw = random.Random(number)
            picture, question = draw.choice(PICTURES), f"{draw.choice(QUESTIONS)} {draw.random()}"
            connection, response = send(port, picture, question, tokens=200, stream=True)
            for _ in range(draw.randrange(6)):
                response.readline()
            connection.close()

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(leave, range(DISCONNECTS)))
        deadline = time.monotonic() + 60
        while not idle(port) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert idle(port)
        assert answer(port, *requests[0])[:2] == together[0][:2]

        check_that_clients_hear(port, processes[0].kill)
        for process in processes[1:]:  # vLLM's engine stays: ended as systemd or a container ends a service
            if process.is_running():
                process.kill()

    with running(toy, tmp_path) as (port, processes):
        for request, (count, words, logprobs) in zip(requests, together, strict=True):
            alone = answer(port, *request)
            assert alone[:2] == (count, words), request
            assert alone[2] == pytest.approx(logprobs, abs=1e-3 if tokens_of(request) <= SETTLED else 0.05), request

        check_that_clients_hear(port, engine_of(processes).kill)
        _, left = psutil.wait_procs(processes, timeout=60)
        assert not left  # a front end without its engine ends by itself, so that whoever supervises it starts it anew

    with running(toy, tmp_path) as (port, _):
        assert answer(port, *requests[0])[:2] == together[0][:2]
