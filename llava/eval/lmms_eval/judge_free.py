"""Task files of our own for lmms-eval: HallusionBench without a judge.

The official task asks GPT-4 about every answer. Its code holds the judge-free metrics that tables of InternVL3 use as
well, but no task names them: the file written here includes the official one and does.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llava.eval.benchmarks.hallusionbench import JUDGE_FREE

OFFICIAL = "tasks/hallusion_bench/hallusion_bench_image.yaml"
AGGREGATION = "lmms_eval.tasks.hallusion_bench.evaluate_hb.hb_aggregation_result_{}_intern"
JUDGE_FREE_METRICS = "metric_list:\n" + "".join(
    f"  - metric: {name}\n    aggregation: !function {AGGREGATION.format(name)}\n    higher_is_better: true\n"
    for name in ("aAcc", "qAcc", "fAcc")
)


def write_judge_free_task(folder: Path) -> Path:
    """Write the task file into a folder of its own; returns the folder, for ``--include_path``."""
    package = Path(importlib.util.find_spec("lmms_eval").origin).parent
    folder.mkdir(parents=True, exist_ok=True)
    text = f"include: {package / OFFICIAL}\ntask: {JUDGE_FREE}\n{JUDGE_FREE_METRICS}"
    (folder / f"{JUDGE_FREE}.yaml").write_text(text, encoding="utf-8")
    return folder
