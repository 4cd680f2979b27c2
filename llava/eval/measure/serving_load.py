"""How a vLLM server serves many clients at once, unpruned and pruned in one run.

    python -m llava.eval.serving_load --model /tmp/random-llava --keep-tokens 64

Starts one server after another on this machine: the model as vLLM has it ("unpruned"), then under Script's
architecture with every policy of `--reuse`. Against each, N clients ask through the OpenAI API, each its next question
when the last is answered: all about the same new picture, about a hot one (of which questions have been answered
before, so that it is in every cache), and each about another one. The table says which share of the prompts' tokens
came from the prefix cache, requests per second, time to the first token, p50 and p99 of the whole answer, and the most
of the KV cache that was in use; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import math
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

WORDS = ("what", "which", "is", "the", "of", "left", "right", "near", "circle", "house", "tree", "many")
KV_USE = re.compile(r"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? ([0-9.e+-]+)$", re.MULTILINE)
START_SECONDS = 900
UNPRUNED = "unpruned"
HEATING = 6  # questions about a hot picture before its row begins: more than make it hot (`ServerOptions.reuse_after`)


@dataclass(frozen=True)
class LoadRow:
    """One cell of the table; times in seconds, ``kv_use`` a share of the cache, ``cached`` of the prompts' tokens."""

    mode: str
    pictures: str
    clients: int
    requests: int
    prompt_tokens: int
    cached: float
    requests_per_second: float
    first_token_p50: float
    first_token_p99: float
    answer_p50: float
    answer_p99: float
    kv_use: float


@contextmanager
def server(arguments: Sequence[str], log: Path) -> Iterator[int]:
    """A vLLM server on a free port of this machine, which it yields; ended with the block.

    Raises:
        RuntimeError: the server ends, or is not ready in `START_SECONDS`; shows its first error and its log's end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *arguments], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text().splitlines()
                cause = next((line for line in lines if "Error: " in line), "not told")
                tail = "\n".join(lines[-15:])
                raise RuntimeError(f"the server did not start; first error: {cause}\nthe end of its log:\n{tail}")
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(port: int) -> bool:
    try:
        return get(port, "/health")[0] == 200
    except OSError:
        return False


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def make_picture(seed: int, side: int) -> str:
    """A picture of coloured squares as a data URL; another seed, another picture."""
    draw = random.Random(seed)
    small = Image.new("RGB", (8, 8))
    small.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(64)])
    buffer = io.BytesIO()
    small.resize((side, side), Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Answered:
    """Seconds to the first token of an answer and to its last; tokens of the prompt, and how many were cached."""

    first: float
    whole: float
    prompt: int
    cached: int


def ask(port: int, model: str, picture: str, question: str, tokens: int) -> Answered:
    """Ask one question.

    Raises:
        RuntimeError: the server refuses; shows its message.
    """
    body = {
        "model": model,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start = time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {response.read().decode()[:500]}")
        first, prompt, cached = None, 0, 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                prompt = event["usage"]["prompt_tokens"]
                cached = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
        whole = time.perf_counter() - start
        return Answered(whole if first is None else first, whole, prompt, cached)
    finally:
        connection.close()


def measure(
    port: int, mode: str, pictures: str, clients: int, requests: int, arguments: argparse.Namespace
) -> LoadRow:
    """One cell: ``requests`` questions by ``clients`` threads."""
    seed = f"{pictures} {clients}"  # the same questions and pictures in both modes, new ones in every cell
    draw = random.Random(seed)
    jobs = [
        (make_picture(draw.randrange(2**31), arguments.side), " ".join(draw.choices(WORDS, k=12)) + "?")
        for _ in range(requests)
    ]
    if pictures != "different":
        jobs = [(jobs[0][0], question) for _, question in jobs]
    if pictures == "hot":
        for number in range(HEATING):
            ask(port, arguments.served_name, jobs[0][0], f"what is it, {clients} and {number}?", 1)
    rest, lock = iter(jobs), threading.Lock()
    answers: list[Answered] = []
    errors: list[BaseException] = []
    highest, over = 0.0, threading.Event()

    def client() -> None:
        while not errors:
            with lock:
                job = next(rest, None)
            if job is None:
                return
            try:
                answers.append(ask(port, arguments.served_name, *job, arguments.answer_tokens))
            except (OSError, RuntimeError) as error:
                errors.append(error)

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.25):
            highest = max([highest, *(float(value) for value in KV_USE.findall(get(port, "/metrics")[1]))])

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    if errors:
        raise RuntimeError(f"a request failed: {errors[0]}") from errors[0]
    first, whole = sorted(answer.first for answer in answers), sorted(answer.whole for answer in answers)
    return LoadRow(
        mode,
        pictures,
        clients,
        requests,
        max(answer.prompt for answer in answers),
        round(sum(answer.cached for answer in answers) / sum(answer.prompt for answer in answers), 4),
        round(requests / seconds, 3),
        *(round(value, 4) for value in (statistics.median(first), percentile(first, 0.99))),
        *(round(value, 4) for value in (statistics.median(whole), percentile(whole, 0.99))),
        round(highest, 4),
    )


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    return ascending[max(0, math.ceil(share * len(ascending) - 1e-9) - 1)]


def server_arguments(arguments: argparse.Namespace, mode: str) -> list[str]:
    """What a server of a mode is started with: the same, but for the architecture and its options.

    Args:
        mode: "unpruned", or a policy of ``reuse``.
    """
    shared = ["--model", arguments.model, "--served-model-name", arguments.served_name]
    shared += ["--enable-prompt-tokens-details", *arguments.server_args]
    if mode == UNPRUNED:
        return shared
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    overrides = {
        "architectures": ["Script" + config["architectures"][0]],
        "script_pruning": {
            "keep_tokens": arguments.keep_tokens,
            "image_pruning_method": arguments.method,
            "reuse": mode,
        },
    }
    return [*shared, "--hf-overrides", json.dumps(overrides)]


def table(rows: Sequence[LoadRow]) -> str:
    """The rows as Markdown, the modes beside each other, unpruned first."""
    names = "pictures, clients, mode, prompt, cached, requests/s, first token p50 / p99, answer p50 / p99, KV cache"
    lines = ["| " + names.replace(", ", " | ") + " |", "|---" * (names.count(", ") + 1) + "|"]
    for row in sorted(rows, key=lambda r: (r.pictures, r.clients, r.mode != UNPRUNED)):
        cells = [row.pictures, str(row.clients), row.mode, str(row.prompt_tokens), f"{row.cached:.0%}"]
        cells += [f"{row.requests_per_second:.2f}", f"{row.first_token_p50:.2f} / {row.first_token_p99:.2f} s"]
        cells += [f"{row.answer_p50:.2f} / {row.answer_p99:.2f} s", f"{row.kv_use:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in the format of the Transformers library")
    parser.add_argument("--keep-tokens", type=int, default=64)
    parser.add_argument("--method", default="script", help="image_pruning_method")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=8, help="requests of one client, but at least twice --clients")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--side", type=int, default=336, help="side of the pictures in pixels")
    kinds, policies = ("same", "hot", "different"), ("none", "picture", "auto")
    parser.add_argument("--pictures", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--reuse", nargs="+", choices=policies, default=["none"], help="policies to measure")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="further arguments of the server")
    arguments = parser.parse_args()
    if not (Path(arguments.model) / "config.json").is_file():
        parser.error(f"--model must be a folder with a config.json, got {arguments.model}")
    if min(*arguments.clients, arguments.requests, arguments.keep_tokens, arguments.answer_tokens, 10**9) < 1:
        parser.error("counts must be at least 1")
    arguments.served_name = "model"
    return arguments


def main() -> None:
    arguments = parse()
    rows: list[LoadRow] = []
    load_before = os.getloadavg()
    for mode in (UNPRUNED, *arguments.reuse):
        with (
            tempfile.TemporaryDirectory() as folder,
            server(server_arguments(arguments, mode), Path(folder) / "server.log") as port,
        ):
            for picture in (1, 2):  # warm-up: what is compiled or allocated once
                ask(port, arguments.served_name, make_picture(-picture, arguments.side), "what is it?", 4)
            for pictures in arguments.pictures:
                for clients in arguments.clients:
                    requests = max(arguments.requests, 2 * clients)
                    rows.append(measure(port, mode, pictures, clients, requests, arguments))
                    print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    setting: dict[str, Any] = {
        "model": arguments.model,
        "keep_tokens": arguments.keep_tokens,
        "method": arguments.method,
        "requests": arguments.requests,
        "answer_tokens": arguments.answer_tokens,
        "server_args": arguments.server_args,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average_before_and_after": [round(load_before[0], 2), round(os.getloadavg()[0], 2)],
    }
    print(json.dumps({"setting": setting, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
