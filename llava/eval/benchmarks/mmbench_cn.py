"""MMBench-CN: MMBench's questions in Chinese, asked and scored in the same way."""

from __future__ import annotations

from pathlib import Path

from llava.eval.benchmarks.base import locate
from llava.eval.benchmarks.mmbench import MMBench
from llava.eval.benchmarks.shared.question_lists import LETTER_INSTRUCTION_CN


class MMBenchCN(MMBench):
    name, columns, place = "mmbench_cn", {"mmbench_cn": "MMB-CN"}, 9
    section, folder, question_file = "MMBench-CN", "mmbench_cn", "mmbench_dev_cn_20231003.tsv"
    instruction = LETTER_INSTRUCTION_CN

    def find_questions(self, data_root: Path, output_root: Path) -> Path:
        """As for others; some guides put the table beside the English one."""
        roots = (Path(data_root), Path(output_root))
        beside = f"mmbench/{self.question_file}"
        own = Path(data_root) / self.folder / self.question_file
        if not own.is_file() and any((root / beside).is_file() for root in roots):
            return locate([output_root, data_root], beside, self.section)
        return super().find_questions(data_root, output_root)


BENCHMARK = MMBenchCN()
