"""Run the commands of the documents: every bash and Python block of README.md, CONTRIBUTING.md, EVAL.md and docs/.

    python scripts/check_docs.py                    # all pages
    python scripts/check_docs.py docs/video.md      # one
    python scripts/check_docs.py --list             # what would run, and why the others would not

A page's blocks run one after the other in a copy of the repository of their own, so that a block finds what an earlier
one of the same page has written, and nothing is left behind. The first error ends the check. A comment right before a
block says what is special about it:

    <!-- not run: needs a GPU -->            the block is left out; the reason must be given
    <!-- file: llava/pruning/mine.py -->     the block is not run but written to this file of the copy
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("bash", "python")
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|file): (?P<value>.+?) -->\n+)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: the page's path.
        line: number of the line with the opening fence.
        language: what the fence says, such as "bash".
        text: what is between the fences.
        reason: why it is not run; ``None`` if it is.
        file: where it is written instead of being run, relative to the repository.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None = None
    file: str | None = None

    @property
    def runs(self) -> bool:
        return self.language in LANGUAGES and self.reason is None and self.file is None

    def __str__(self) -> str:
        return f"{os.path.relpath(self.page)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        marks = {{"not run": "reason", "file": "file"}[match["mark"]]: match["value"]} if match["mark"] else {}
        found.append(Block(page, line, match["language"], match["text"], **marks))
    return found


def pages(root: Path = ROOT) -> list[Path]:
    """The pages whose commands are run."""
    return [
        *(root / name for name in ("README.md", "CONTRIBUTING.md", "EVAL.md")),
        *sorted((root / "docs").glob("*.md")),
    ]


def copy_repository(target: Path) -> None:
    """Everything that git tracks or would track, as it is now."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_block(block: Block, folder: Path, limit: float) -> subprocess.CompletedProcess:
    """Run one block in the copy at ``folder``, against the code that is there. Raises subprocess.TimeoutExpired."""
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, block.text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )


def check_page(page: Path, limit: float) -> str | None:
    """Run a page's blocks in a new copy of the repository; the first error as text, ``None`` if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        for block in blocks_of(page):
            if block.file is not None:
                (Path(folder) / block.file).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / block.file).write_text(block.text, encoding="utf-8")
            if not block.runs:
                continue
            start = time.perf_counter()
            try:
                done = run_block(block, Path(folder), limit)
            except subprocess.TimeoutExpired as late:
                return f"{block}: not done after {limit:.0f} s\n{late.output or ''}"
            if done.returncode:
                return f"{block}: exit code {done.returncode}\n{block.text}\n{done.stdout}"
            print(f"{block}: {time.perf_counter() - start:.1f} s", flush=True)
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Check pages; 0 if all that runs has run, 1 at the first error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE.md", help="default: all")
    parser.add_argument("--list", action="store_true", help="tell what would run, and run nothing")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one block (default: 300)")
    options = parser.parse_args(arguments)
    for page in options.pages or pages():
        if options.list:
            for block in blocks_of(page):
                if block.language in LANGUAGES:
                    print(f"{block}: {block.language}, {block.reason or block.file or 'runs'}")
            continue
        error = check_page(page, options.limit)
        if error is not None:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
