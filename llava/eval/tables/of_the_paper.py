"""Tables 1, 5, 6 and 11 of the paper on a checkpoint: rows of benchmark runs, with intervals."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from llava.eval.benchmarks import COLUMNS, SCALES
from llava.eval.files import read_json, write_json
from llava.eval.measure import efficiency, redundancy
from llava.eval.runner import identity
from llava.eval.tables.resampling import RESAMPLES, Resampled, paired
from llava.eval.tables.rows import average
from llava.eval.tables.runs import UNPRUNED, StudyRun
from llava.eval.tables.significance import compare, compare_items
from llava.eval.tables.study import Spec, Study, parse_spec
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import pick_device

Table = tuple[list[str], list[list[Any]], list[str]]  # heads, rows, notes
ESTIMATORS = {
    "exhaustive": Spec("exhaustive", "script", ("relevance=none", "dpp=false", "graph=exhaustive")),
    "bipartite": Spec("bipartite", "script", ("relevance=none", "dpp=false", "graph=bipartite")),
    "random": Spec("random", "random"),
}
PARTS = [  # of Table 5, in its order: GSP, relevance, DPP
    Spec(
        f"{'graph' if gsp else '-'}, {'relevance' if relevance else '-'}, {'DPP' if dpp else '-'}",
        "script",
        (f"gsp={gsp}".lower(), *(() if relevance else ("relevance=none",)), f"dpp={dpp}".lower()),
    )
    for gsp, relevance, dpp in (
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (True, True, False),
        (False, True, True),
        (True, True, True),
    )
]
OF_TABLE_5 = ("pope", "mme", "gqa", "sqa")
OF_TABLE_6 = ("fastv", "pyramiddrop", "sparsevlm", "visionzip", "divprune", "script", "script:dpp=false")
OF_TABLE_11 = ("fastv", "trim", "visionzip", "divprune", "sparsevlm", "script")
DETERMINISTIC = "deterministic: greedy decoding and no draw, so that its runs are equal; it was asked once"


def table_1(options: argparse.Namespace) -> Table:
    """Three ways to find redundant tokens: pairs, time, agreement with the exhaustive one, POPE accuracy, speed-up."""
    study = Study(options)
    specs = [
        spec
        if spec.pruner == "random"
        else Spec(spec.label, spec.pruner, (*spec.options, f"tau={options.tau:g}", f"gamma={options.gamma:g}"))
        for spec in ESTIMATORS.values()
    ]
    study.plan(["pope"], specs)
    folder = options.pictures or options.data_root / "pope" / "val2014"
    pictures = redundancy.find_pictures(folder, options.count)
    if len(pictures) < options.count:
        raise FileNotFoundError(f"{folder} has {len(pictures)} pictures, not {options.count}")

    def measure() -> dict[str, Any]:
        features = redundancy.read_features(options.model_path, pictures, pick_device(options.device))
        keep = max(1, round(float(options.keep_tokens) * features.shape[1]))
        if float(options.keep_tokens) >= 1:
            keep = int(options.keep_tokens)
        rows = redundancy.measure(features, keep, options.tau, options.gamma, options.repeats)
        return {"rows": rows, "keep": keep, "tokens": features.shape[1], "views": len(features)}

    given = {
        "keep": options.keep_tokens,
        "tau": options.tau,
        "gamma": options.gamma,
        "repeats": options.repeats,
        "pictures": [path.name for path in pictures],
    }
    measured = remembered(options, 1, given, measure)
    rows = []
    pairs = max(row["pairs"] for row in measured["rows"])
    for row, spec in zip(measured["rows"], specs, strict=True):
        found = study.ask("pope", spec).score
        items = Resampled("accuracy", {"score": found["accuracy"], "items": found["items"]})
        iou, time = redundancy.PRINTED[row["estimator"]]
        rows.append(
            [
                row["estimator"],
                f"{100 * row['pairs'] / pairs:.1f}",
                f"{row['time']:.0f} ({time})",
                f"{row['iou_kept']:.2f}, {row['iou_discarded']:.2f} ({iou:.2f})",
                f"{found['accuracy']:.2f} {_between(items.interval())}",
                f"{100 / row['time']:.2f}",
            ]
        )
    heads = ["estimator", "pairs, %", "time (paper)", "IoU kept, discarded (paper)", "POPE accuracy", "speed-up"]
    notes = [
        f"{measured['keep']} of {measured['tokens']} tokens kept, relevance none, no DPP; times of one view, medians; "
        f"agreement over {measured['views']} views. The paper does not say which K its IoU is of.",
        "Speed-up: the exhaustive estimator's time over this one's.",
    ]
    return heads, rows, notes


def table_5(options: argparse.Namespace) -> Table:
    """Script's three parts on and off: POPE, MME, GQA and SQA, their mean, and its share of the unpruned model's."""
    study, specs = Study(options), [Spec(UNPRUNED), *PARTS]
    study.plan(OF_TABLE_5, specs)
    runs = study.ask_all()
    rows, whole = [], 0.0
    for spec in specs:
        own = {name: runs[name, spec] for name in OF_TABLE_5}
        acc = average({name: found.score["score"] for name, found in own.items()})
        whole = whole or acc
        resampled = {name: Resampled(name, found.score) for name, found in own.items()}
        cells = [f"{own[name].score['score']:.2f} {_between(resampled[name].interval())}" for name in OF_TABLE_5]
        rows.append([spec.label, *cells, f"{acc:.2f} {_between(average_interval(resampled))}", _share(acc, whole)])
    heads = ["graph, relevance, DPP", *(COLUMNS[name] for name in OF_TABLE_5), "Acc.", "Relative"]
    notes = ["Acc.: mean with MME / 20. The first pruned row draws at random; --pruner-args seed=K draws otherwise."]
    return heads, rows, notes


def average_interval(parts: Mapping[str, Resampled]) -> tuple[float, float]:
    """The 95 % interval of Acc.: every benchmark's items are resampled on their own."""
    drawn = [
        part.scores(part.draw(RESAMPLES, seed)) / SCALES.get(name, 1.0)
        for seed, (name, part) in enumerate(parts.items())
    ]
    low, high = np.quantile(np.mean(drawn, 0), [0.025, 0.975])
    return float(low), float(high)


def table_6(options: argparse.Namespace) -> Table:
    """Tokens, work, times and memory of methods, with POPE's F1 beside, and Script without its DPP."""
    study = Study(options)
    specs = [Spec(UNPRUNED), *map(parse_spec, options.pruners)]
    study.plan(["pope"], specs)

    def measure() -> dict[str, Any]:
        more = ",".join(options.pruner_args)
        pruners = [text + (("," if ":" in text else ":") + more if more else "") for text in options.pruners]
        words = ["--model-path", options.model_path, "--keep-tokens", options.keep_tokens, "--pruners", *pruners]
        words += ["--repeats", options.repeats, "--new-tokens", options.new_tokens, "--device", options.device]
        words += [] if options.image_grid is None else ["--image-grid", options.image_grid]
        words += [] if options.dtype == "auto" else ["--dtype", options.dtype]
        return efficiency.measure_all(efficiency.parse_arguments(list(map(str, words))), show=False)

    given = {
        name: getattr(options, name) for name in ("keep_tokens", "pruners", "pruner_args", "repeats", "new_tokens")
    }
    measured = remembered(options, 6, given, measure)
    lines = [row for row in measured["batches"][0]["rows"] if row["method"] != "limit"]
    rows = []
    for spec, line in zip(specs, lines, strict=True):
        found = study.ask("pope", spec).score
        milliseconds = line["milliseconds"]
        memory = measured["weight_bytes"] + line.get("extra_memory_bytes", 0)
        rows.append(
            [
                "script without DPP" if spec.label == "script:dpp=false" else spec.label,
                f"{line.get('average_tokens', 0):.0f}",
                f"{2 * line.get('formula_macs', 0) / 1e12:.4g}",
                f"{milliseconds['prefill']:.1f}" if "prefill" in milliseconds else "–",
                f"{milliseconds['decode']:.2f}" if "decode" in milliseconds else "–",
                f"{line.get('visual_cache_bytes', 0) / 2**20:.1f}",
                f"{memory / 2**30:.3f}",
                f"{found['score']:.2f} {_between(Resampled('pope', found).interval())}",
            ]
        )
    heads = ["method", "tokens", "TFLOPs", "prefill, ms", "decode, ms/token", "cache, MB", "memory, GiB", "POPE F1"]
    notes = [f"{line['method']}: {line['note']}" for line in lines if line["note"]]
    notes.append(
        f"Times on {measured['device']}, {measured['dtype']}, {measured['threads']} threads, {measured['date']}. "
        "TFLOPs: two for a multiply-accumulate, visual tokens alone, as the paper counts. Memory: weights, and the "
        "highest point of a prefill beyond them. Tokens are averaged over layers."
    )
    return heads, rows, notes


def table_11(options: argparse.Namespace) -> Table:
    """Methods over 20 runs: mean, sample standard deviation, one-sided paired tests that the last one is better."""
    specs = [parse_spec(text) for text in options.pruners]
    if options.runs < 2:
        raise ValueError(f"--runs must be at least 2, got {options.runs}: a test pairs runs")
    study = Study(options)
    seeds = {spec: range(options.runs) if spec.is_random and not options.resample else (0,) for spec in specs}
    of_seed = {
        spec: [Spec(spec.label, spec.pruner, spec.options, seed) for seed in own] for spec, own in seeds.items()
    }
    study.plan([options.benchmark], [one for own in of_seed.values() for one in own])
    runs = {spec: [study.ask(options.benchmark, one) for one in own] for spec, own in of_seed.items()}
    best = specs[-1]
    values = _resampled_values(runs, options) if options.resample else _values_of_runs(runs, options.runs)
    rows, notes = [], []
    for spec in specs:
        own = values[spec]
        tests = [None, None, None]
        if spec != best:
            over = compare(values[best], own, "greater")
            items = [[found.score["items"] for found in runs[one]] for one in (best, spec)]
            tests = [over.t_test, over.wilcoxon, compare_items(*items, "greater").wilcoxon]
        rows.append(
            [spec.label, f"{fmean(own):.2f}", f"{stdev(own):.2f}", *("–" if p is None else f"{p:.3g}" for p in tests)]
        )
        if not options.resample and not spec.is_random:
            notes.append(f"{spec.label} is {DETERMINISTIC}.")
    if options.resample:
        notes.append(
            f"The {options.runs} values are resamples of the items of one run, the same for all methods: their spread "
            "is that of the items, and their p-values fall with the number of resamples. The last column tests the "
            "items themselves."
        )
    else:
        notes.append("--resample draws items instead, which gives every method a spread.")
    heads = [
        "method",
        f"mean {COLUMNS[options.benchmark]}",
        "standard deviation",
        "t-test p",
        "Wilcoxon p",
        "items, Wilcoxon p",
    ]
    return (
        heads,
        rows,
        [f"H1: {best.label} is better; one-sided, paired; the least Wilcoxon p is 2^-{options.runs}.", *notes],
    )


def _values_of_runs(runs: Mapping[Spec, Sequence[StudyRun]], count: int) -> dict[Spec, list[float]]:
    """The scores of ``count`` runs; a deterministic method's one score, as often."""
    return {
        spec: [found.score["score"] for found in own] * (count if len(own) == 1 else 1) for spec, own in runs.items()
    }


def _resampled_values(runs: Mapping[Spec, Sequence[StudyRun]], options: argparse.Namespace) -> dict[Spec, list[float]]:
    """Scores of the first run of each method on the same ``--runs`` resamples of items."""
    found = {spec: Resampled(options.benchmark, own[0].score) for spec, own in runs.items()}
    first = next(iter(found.values()))
    return {spec: list(map(float, paired(first, one, options.runs)[1])) for spec, one in found.items()}


def remembered(
    options: argparse.Namespace, table: int, given: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What was measured before of the same checkpoint in the same way on this device, or is measured now and kept."""
    settings = {
        "checkpoint": identity.checkpoint_identity(options.model_path, options.model_base),
        "device": identity.device_name(pick_device(options.device)),
        "libraries": identity.library_versions(),
        "dtype": options.dtype,
        "image_grid": options.image_grid,
        **given,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    name = get_model_name_from_path(options.model_path)
    path = options.output_root / "tables" / name / f"table{table}_{digest}.json"
    if path.is_file() and not options.measure_again:
        print(f"measured before: {path} (--measure-again measures anew)", file=sys.stderr)
        return read_json(path)["measured"]
    found = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": settings, "measured": found}, indent=1)
    return found


def _between(bounds: tuple[float, float]) -> str:
    return f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def _share(acc: float, whole: float) -> str:
    return f"{100 * acc / whole:.2f}" if whole else "–"
