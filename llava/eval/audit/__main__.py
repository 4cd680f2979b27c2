"""Check a checkpoint and a method: promises, whether the question is read, whether what is asked about is found.

python -m llava.eval.audit --model-path liuhaotian/llava-v1.5-7b --pruner script --keep-tokens 64
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.eval.audit import checks
from llava.eval.audit.checks import Finding
from llava.eval.audit.pictures import AuditPicture, load_pictures
from llava.eval.audit.report import method_table, print_findings, source_table, write_json, write_plot
from llava.eval.audit.subject import Subject
from llava.model.builder import DEFAULT_CHECKPOINT, TOY_FOLDER, pick_device
from llava.pruning import Method, get_pruner, list_pruners, parse_budget, parse_options
from llava.pruning.question_reader import QuestionReader

PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "playground" / "audit"
SOURCES = ("clip", "language", "qk", "words", "hawk", "projector")
ALL = 10**6  # a budget above every count


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default=DEFAULT_CHECKPOINT, help="folder or hub name; default: the toy")
    parser.add_argument("--hf", action="store_true", help="a model of the Transformers library's own classes")
    parser.add_argument("--clip-path", metavar="PATH", help="with --hf: the CLIP that the model's tower comes from")
    parser.add_argument("--siglip-path", metavar="PATH", help="folder of the full SigLIP that the tower comes from")
    parser.add_argument("--pruner", nargs="+", default=["script"], metavar="NAME", help="methods, or: all")
    parser.add_argument("--pruner-args", nargs="+", default=[], metavar="KEY=VALUE", help="options of the one method")
    parser.add_argument("--keep-tokens", default="32", metavar="N", help="visual tokens per view")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder with audit.json; default: photographs")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures alone")
    parser.add_argument("--choose", action="store_true", help="measure all sources of relevance, and name the best")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the figures (needs matplotlib)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--conv-mode", metavar="NAME", help="template; default: the checkpoint's")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    if options.pruner_args and (len(options.pruner) > 1 or options.pruner == ["all"]):
        parser.error("--pruner-args are the options of one method: name one --pruner")
    return options


def load_subject(options: argparse.Namespace) -> Subject:
    """The model under audit."""
    device = pick_device(options.device)
    if options.hf:
        from llava.eval.audit.library import LibrarySubject

        return LibrarySubject(options.model_path, device, options.dtype, options.clip_path, options.siglip_path)
    from llava.eval.audit.ours import OurSubject

    loading: dict[str, Any] = {"device": device}
    if options.siglip_path:
        loading["joint_space_path"] = options.siglip_path
    if options.dtype != "auto":
        loading["dtype"] = options.dtype
    return OurSubject(options.model_path, options.conv_mode, **loading)


def methods_of(options: argparse.Namespace) -> list[Method]:
    """The methods that the command line names. Raises ValueError."""
    budget = parse_budget(options.keep_tokens)
    names = list_pruners() if options.pruner == ["all"] else options.pruner
    return [get_pruner(name, keep_tokens=budget, **parse_options(name, options.pruner_args)) for name in names]


def audit(subject: Subject, method: Method, pictures: Sequence[AuditPicture], keep: int) -> list[Finding]:
    """All findings about one method; one that refuses the model has a single one that says why."""
    everything = get_pruner(method.name, keep_tokens=ALL)
    try:
        with subject.attached(method) as handle:
            del handle
        first = subject.trace(pictures[0].image, pictures[0].questions[0].text, method)
    except ValueError as error:
        return [Finding("runs here", None, f"refused: {error}")]
    findings = [Finding("source of relevance", None, first.source)] if first.source else []
    findings.append(checks.keeps_all_bit_for_bit(subject, everything, pictures))
    findings += checks.keeps_count_order_and_text(subject, method, pictures)
    findings.append(checks.batches_equal_singles(subject, method, pictures))
    findings += checks.reads_the_question(subject, method, pictures)
    findings += checks.finds_what_is_asked(subject, method, pictures)
    findings.append(checks.needs_the_picture(subject, method, pictures, keep))
    return findings


def choose(subject: Subject, pictures: Sequence[AuditPicture], keep: int) -> dict[str, Any]:
    """The area under the ROC curve of every source of relevance that this model can give."""
    found: dict[str, Any] = {}
    for source in tqdm(SOURCES, desc="sources", file=sys.stderr):
        method = get_pruner("script", keep_tokens=keep, relevance=source)
        try:
            findings = checks.finds_what_is_asked(subject, method, pictures)
        except ValueError as error:
            found[source] = {"refused": str(error)}
            continue
        found[source] = next((f.figures for f in findings if "auc" in f.figures), {"refused": "no relevance"})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the audit; 0 if every method passes every check that applies, 1 if not, 2 for bad input."""
    options = parse_arguments(arguments)
    folder = options.pictures
    if folder is None:
        folder = TOY_FOLDER / "data" if options.model_path == DEFAULT_CHECKPOINT else PHOTOGRAPHS
    try:
        methods = methods_of(options)
        pictures = load_pictures(folder, options.limit)
        subject = load_subject(options)
        with subject.attached(get_pruner("first", keep_tokens=1)):  # a model that cannot be pruned is refused here
            pass
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "model": str(options.model_path),
        "pictures": str(folder),
        "keep_tokens": options.keep_tokens,
    }
    results: dict[str, list[Finding]] = {}
    warnings.simplefilter("once")  # a method says the same at every picture
    try:
        for method in tqdm(methods, desc="methods", file=sys.stderr):
            keep = method.keep_tokens if isinstance(method.keep_tokens, int) else 32
            results[method.name] = audit(subject, method, pictures, keep)
            print_findings(method, results[method.name])
        if options.choose:
            report["sources"] = choose(subject, pictures, 32)
            print(source_table(report["sources"]))
    except KeyboardInterrupt:
        print("stopped: what was found so far is written", file=sys.stderr)
        return 1
    finally:
        if options.json:
            write_json(options.json, report, results)
        if options.plot and results:
            write_plot(options.plot, report, results)
    readers = [m.name for m in methods if isinstance(m, QuestionReader)]
    failed = [name for name, findings in results.items() if any(f.passed is False for f in findings)]
    if len(results) > 1:
        print(f"\n{method_table(results)}")
    print(f"\n{len(results)} methods, {len(readers)} read the question; failed a check: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
