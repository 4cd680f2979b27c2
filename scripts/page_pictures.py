"""Make the pictures of the page and the gallery that stand in the documents again, from the toy.

    python scripts/page_pictures.py      (needs pip install -e ".[page,browser]" and Chromium)

Writes docs/gallery.html from docs/gallery.json, and playground/results/page_*.jpg by a real browser.
"""

from __future__ import annotations

import io
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "playground" / "results"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--no-sandbox",  # as root there is none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",  # a camera that shows a test picture
    "--use-fake-ui-for-media-stream",
)
QUALITY = 82
WAIT = 100_000  # milliseconds; a busy machine is slow
LIST, GALLERY = ROOT / "docs" / "gallery.json", ROOT / "docs" / "gallery.html"
TITLE = "Script: which visual tokens are kept for a question"
INTRODUCTION = (
    "Kept patches are bright, dropped ones dark. Choose an overlay, play the order of choice, point at a patch. "
    "Made by python scripts/page_pictures.py from the embedded toy; times are of the machine that made the file."
)


def browser_path() -> str | None:
    """The distribution's Chromium; ``None`` where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def launch(playwright: Any) -> Any:
    """A headless browser."""
    return playwright.chromium.launch(executable_path=browser_path(), args=list(FLAGS))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve_toy(*flags: str) -> str:
    """The page on the toy, served from a thread of this process; its address."""
    from llava.serve.page.__main__ import parse_arguments, serve

    arguments = ["--device", "cpu", "--max-new-tokens", "16", "--port", str(free_port()), *flags]
    return serve(parse_arguments(arguments), prevent_thread_lock=True)


def opened(browser: Any, address: str, **options: Any) -> Any:
    """The page in a tab of a browser profile of its own, its first picture on the desk."""
    tab = browser.new_context(**options).new_page()
    tab.set_default_timeout(WAIT)
    tab.goto(address)
    tab.wait_for_selector("#preview img")
    return tab


def compare(tab: Any) -> None:
    """Press Compare and wait for the four looks."""
    tab.click("#compare-part button >> nth=0")
    tab.click("button#compare")
    tab.wait_for_selector("#result .sv[data-ready] .sv-look:nth-child(4)")
    tab.wait_for_selector("#live >> text=done")


def main() -> int:
    from playwright.sync_api import sync_playwright

    from llava.serve import gallery

    made = ["--title", TITLE, "--introduction", INTRODUCTION, "--list", str(LIST), "--out", str(GALLERY)]
    if gallery.main(["--device", "cpu", "--max-new-tokens", "16", *made]):
        return 2
    address = serve_toy()
    with sync_playwright() as playwright:
        browser = launch(playwright)
        tab = opened(browser, address, viewport={"width": 1760, "height": 900})
        compare(tab)
        tab.click("#compare-part button >> nth=0")
        tab.select_option(".sv-bar select", "relevance")
        tab.evaluate("scrollTo(0, 0)")
        tab.hover(".sv-look:nth-child(1) .sv-stage", position={"x": 150, "y": 110})
        save(tab.screenshot(), RESULTS / "page_compare.jpg", 1200)
        phone = opened(browser, address, viewport={"width": 390, "height": 844}, color_scheme="dark")
        phone.click("#ask")
        phone.wait_for_selector("#result .sv[data-ready]")
        phone.locator("#result").scroll_into_view_if_needed()
        phone.evaluate("document.querySelector('#result').scrollIntoView()")
        save(phone.screenshot(), RESULTS / "page_phone.jpg", 390)
        browser.close()
    return 0


def save(shot: bytes, path: Path, width: int) -> None:
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.thumbnail((width, 10 * width))
    picture.save(path, quality=QUALITY)
    print(f"[{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB]")


if __name__ == "__main__":
    sys.exit(main())
