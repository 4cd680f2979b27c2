"""A health check that means something: a question about a picture, its answer, and how many tokens the prompt took.

    python deploy/ask_picture.py --url http://localhost:8000 --answer yes --most-prompt-tokens 120

A server that is up but does not prune, or sees nothing, fails: it exits with 1 and says why. The question is always
the same, so that all caches hold it after the first time. Needs the standard library only: it runs in any image.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).with_name("picture.png")
QUESTION = "Is the tree black? Please answer yes or no."


def get_json(url: str, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    """The server's answer; ``body`` is sent by POST, with the key of VLLM_API_KEY where it is set.

    Raises:
        OSError: no answer, or a refusal, with the server's words.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=seconds) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        words = error.read(1000).decode(errors="replace")
        raise OSError(f"{url} answers {error.code}: {words}") from None


def ask(url: str, picture: Path, question: str, seconds: float) -> tuple[str, int]:
    """Answer of the server's first model, and tokens of the prompt."""
    model = get_json(f"{url}/v1/models", None, seconds)["data"][0]["id"]
    data_url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": question}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 16,
        "temperature": 0,
    }
    reply = get_json(f"{url}/v1/chat/completions", body, seconds)
    return (reply["choices"][0]["message"]["content"] or "").strip(), reply["usage"]["prompt_tokens"]


def what_is_wrong(said: str, prompt_tokens: int, answer: str | None, most: int | None) -> str | None:
    """Why a reply is not that of a healthy server; ``None`` if it is."""
    if answer is not None and not re.search(answer, said, re.IGNORECASE):
        return f"the answer {said!r} does not match {answer!r}"
    if most is not None and prompt_tokens > most:
        return f"the prompt took {prompt_tokens} tokens, expected at most {most}: is the picture pruned?"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, without /v1")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="a PNG file")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--answer", help="regular expression that the answer must match somewhere, in any case")
    parser.add_argument("--most-prompt-tokens", type=int, help="text and visual tokens together")
    parser.add_argument("--seconds", type=float, default=60, help="for each of the two requests")
    options = parser.parse_args(arguments)
    try:
        said, prompt_tokens = ask(options.url.rstrip("/"), options.picture, options.question, options.seconds)
    except (OSError, ValueError, LookupError) as error:
        print(f"no answer: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"answer": said, "prompt_tokens": prompt_tokens}))
    wrong = what_is_wrong(said, prompt_tokens, options.answer, options.most_prompt_tokens)
    if wrong is not None:
        print(wrong, file=sys.stderr)
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
