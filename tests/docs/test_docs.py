"""The documents point at things that exist, the README is short, made tables are up to date, blocks can be read."""

import importlib.util
import re
from pathlib import Path

import pytest
from check_docs import LANGUAGES, ROOT, blocks_of, copy_repository, main, pages

from llava.pruning import list_pruners
from llava.pruning.method_table import END, START, method_table

README = ROOT / "README.md"
ALL_PAGES = [*pages(), ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w/.<$-])((?:llava|scripts|tests|docs|playground)/[\w./*-]*[\w/*])")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def ignored(path: str) -> bool:
    """Whether git ignores the path: what a command makes is not there before it has run."""
    return any(path.startswith(line.rstrip("/")) for line in text_of(ROOT / ".gitignore").splitlines())


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} links {target}"
        assert not anchor or anchor in anchors_of(place), f"{page.name} links {target}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_paths_in_the_text_exist(page):
    made = {block.file for block in blocks_of(page)}
    for path in PATH.findall(text_of(page)):
        there = list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists() or path in made
        assert there or ignored(path), f"{page.name} names {path}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_modules_in_commands_exist(page):
    for module in re.findall(r"python -m (llava[\w.]*\w)", text_of(page)):
        assert importlib.util.find_spec(module) is not None, f"{page.name} names {module}"


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 200


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "methods.md"], ids=lambda page: page.name)
def test_the_table_of_methods_is_up_to_date(page):
    shown = text_of(page).split(START)[1].split(END)[0].strip()
    assert shown == method_table(page.parent), "python -m llava.pruning.method_table --write README.md docs/methods.md"
    assert [line.split("`")[1] for line in shown.splitlines()[2:]] == list_pruners()


def test_the_index_names_every_page():
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", text_of(ROOT / "docs" / "README.md")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_block_says_its_language(page):
    for block in blocks_of(page):
        assert block.language, str(block)
        assert block.reason is None or block.language in LANGUAGES, f"{block} would not be run anyway"


# --- the runner ----------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    def page(text):
        path = tmp_path / "page.md"
        path.write_text(text)
        return path

    return page


def test_blocks_are_read_with_their_marks(page):
    text = "a\n\n```bash\ntrue\n```\n\n<!-- not run: needs a GPU -->\n```python\nx\n```\n\n```json\n{}\n```\n"
    text += "\n<!-- file: a/b.py -->\n\n```python\ny = 1\n```\n<!-- not run: far away -->\n\nb\n\n```bash\nls\n```\n"
    found = blocks_of(page(text))
    assert [block.runs for block in found] == [True, False, False, False, True]
    assert [block.line for block in found] == [3, 8, 12, 18, 25]
    assert (found[1].reason, found[3].file, found[3].text) == ("needs a GPU", "a/b.py", "y = 1\n")


def test_blocks_of_a_page_share_a_copy_of_the_repository(page, capsys, monkeypatch):
    monkeypatch.setattr("check_docs.copy_repository", lambda folder: None)
    text = "<!-- file: part/b.py -->\n```python\ny = 1\n```\n\n```bash\ncat part/b.py > c\n```\n"
    assert main([str(page(text + '```python\nassert open("c").read() == "y = 1\\n"\n```\n'))]) == 0
    assert main([str(page(text + "```bash\ncat gone | sort\n```\n"))]) == 1
    assert "exit code 1" in capsys.readouterr().err
    assert main(["--limit", "0.2", str(page("```bash\nsleep 5\n```\n"))]) == 1
    assert "not done after" in capsys.readouterr().err
    assert not Path("c").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout of git")
def test_the_copy_has_what_git_has(tmp_path):
    copy_repository(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == README.read_bytes()
    assert not (tmp_path / ".git").exists()
