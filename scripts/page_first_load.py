"""How long the page takes to be there: a browser without a cache, from the navigation to a page that takes a question.

    python scripts/page_first_load.py      (needs pip install -e ".[page,browser]" and Chromium)

The toy is served by a process of its own, as it is for a user. Ready is a page whose picture is drawn and whose button
Ask is enabled.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from page_pictures import WAIT, free_port, launch

READY = """() => {
  const picture = document.querySelector("#preview img"), ask = document.querySelector("#ask");
  return picture?.complete && picture.naturalWidth > 0 && ask && !ask.disabled;
}"""


@contextmanager
def served() -> Iterator[str]:
    """The address of a page on the toy, for the length of a block."""
    command = [sys.executable, "-m", "llava.serve.page", "--device", "cpu", "--port", str(free_port())]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield next(filter(None, (re.match(r"\[(http\S+)", line) for line in server.stdout))).group(1)
    finally:
        server.terminate()
        server.wait()


def first_load(browser: Any, address: str) -> tuple[float, int]:
    """Seconds until the page is ready in a profile of its own, and how many files it asked for."""
    tab = browser.new_context().new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    start = time.perf_counter()
    tab.goto(address, wait_until="commit", timeout=WAIT)
    tab.wait_for_function(READY, timeout=WAIT)
    seconds = time.perf_counter() - start
    tab.context.close()
    return seconds, len(asked)


def main(arguments: Sequence[str] | None = None) -> int:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description="Seconds until the page is there, in a browser without a cache.")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    with served() as address, sync_playwright() as playwright:
        browser = launch(playwright)
        load = os.getloadavg()[0]
        found = [first_load(browser, address) for _ in range(options.repeats)]
        browser.close()
    seconds = [one for one, _ in found]
    print(f"first {seconds[0]:.2f} s, median {statistics.median(seconds):.2f} s, slowest {max(seconds):.2f} s", end="")
    print(f" of {len(found)}; {found[0][1]} files; load average before: {load:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
