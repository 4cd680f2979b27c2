"""The efficiency command: its counts against formulas, its limit against the model's own path, its table."""

import dataclasses
import json
from functools import partial

import pytest
import torch

from llava.eval.measure import efficiency_subject, efficiency_transformers, transformers_presets
from llava.eval.measure.cost import count_macs, prefill_flops
from llava.eval.measure.efficiency import Row, Subject, main, make_rows, measure, method_of, summary_of
from llava.eval.measure.efficiency_table import print_table
from llava.eval.measure.geometry import GEOMETRIES, build_random
from llava.model.builder import DEFAULT_CHECKPOINT, TOY_FOLDER, load_pretrained_model
from llava.pruning import PruningInputs, get_pruner


@pytest.fixture(scope="module")
def subject():
    _, model, image_processor, _ = load_pretrained_model(DEFAULT_CHECKPOINT)
    return Subject(model, image_processor, (336, 336), 2, "cpu")


@pytest.fixture(scope="module")
def tiled():
    _, model, image_processor, _ = load_pretrained_model(str(TOY_FOLDER / "llava-toy-v1.6"))
    return Subject(model, image_processor, (672, 672), 1, "cpu")


@pytest.fixture(scope="module")
def without_storage():
    """LLaVA-NeXT-7B, its language model without storage."""
    return build_random(GEOMETRIES["llava-v1.6-vicuna-7b"], torch.bfloat16, "cpu", decoder_device="meta")[0]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [320, 2880])
def test_counted_work_of_a_language_model_is_the_formula_and_the_head(without_storage, tokens):
    """7B without storage: torch's counter and methods.md 1.1 agree.

    To the last multiply-accumulate with Transformers 5.23; before, the table of rotations was a product as well.
    """
    embeds = torch.empty(1, tokens, 4096, device="meta", dtype=torch.bfloat16)
    counted = count_macs(lambda: without_storage(inputs_embeds=embeds, use_cache=True, logits_to_keep=1))
    assert counted - prefill_flops([tokens] * 32, 4096, 11008) - 4096 * 32000 in (0, tokens * 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_work_of_a_selection_is_its_similarity_and_little_else(dtype):
    inputs = PruningInputs(torch.randn(2, 200, 512, dtype=dtype), relevance=torch.rand(2, 200))
    counted = count_macs(lambda: get_pruner("script", keep_tokens=20).select(inputs))
    similarity = 2 * 200 * 200 * 512
    assert similarity / 2 <= counted < similarity  # half of it is multiplied, and the squares on its diagonal


def test_the_limit_gives_the_model_what_keeping_the_first_tokens_gives_it(subject, tiled):
    for each in (subject, tiled):
        first = get_pruner("first", keep_tokens=48)
        with torch.inference_mode():
            encoded = each.encode()
            given = each.embed(Row("limit", 48), encoded)
            pruned = each.embed(Row("first", 48, first), encoded).inputs_embeds
        assert torch.equal(given.sort(1).values, pruned.sort(1).values)  # tiles are read row by row across them


def test_stages_and_the_whole_lead_to_the_same_prompt(subject):
    row = Row("script", 32, get_pruner("script", keep_tokens=32))
    with torch.inference_mode():
        encoded = subject.encode()
        kept = subject.select(row, encoded, subject.read_question(row, encoded))
        prompts = subject.embed(row, subject.visuals)
    start = efficiency_subject.TEXT_BEFORE
    for picture, embeds in zip(kept, prompts.inputs_embeds, strict=True):
        torch.testing.assert_close(embeds[start : start + 32], picture)


@pytest.mark.slow
def test_figures_of_the_table(subject):
    rows = make_rows(["script", "fastv"], [64], 576)
    assert measure(subject, rows, repeats=1, warm_up=1, new_tokens=2) == 1
    limit = rows[1]
    found = {row.name: summary_of(row, limit, rows[0]) for row in rows}
    config = subject.model.config
    token_bytes = 2 * config.num_hidden_layers * config.hidden_size * 4
    text = efficiency_subject.TEXT_BEFORE + efficiency_subject.TEXT_AFTER
    for name, tokens in (("unpruned", 576), ("limit", 64), ("script", 64)):
        figures = found[name]
        assert figures["visual_tokens"] == figures["average_tokens"] == tokens
        assert figures["visual_cache_bytes"] == tokens * token_bytes
        assert figures["cache_bytes"] == (tokens + text) * token_bytes
        assert figures["formula_macs"] == prefill_flops(
            [tokens] * config.num_hidden_layers, config.hidden_size, config.intermediate_size
        )
        assert set(figures["milliseconds"]) == set(efficiency_subject.STAGES)
        assert not figures["note"]
    fastv = found["fastv"]
    assert fastv["cache_bytes"] == fastv["visual_cache_bytes"] + text * token_bytes  # layers of different length
    assert found["limit"]["counted_macs"] < found["script"]["counted_macs"] < found["unpruned"]["counted_macs"]
    assert found["limit"]["share_of_limit"] == 1


def test_a_method_that_this_model_cannot_host_keeps_its_line_and_says_why():
    _, model, image_processor, _ = load_pretrained_model(DEFAULT_CHECKPOINT)
    model.tokenizer = None
    one = Subject(model, image_processor, (336, 336), 1, "cpu")
    rows = [Row("unpruned", None), Row("script", 8, get_pruner("script", keep_tokens=8, relevance="projector"))]
    measure(one, rows, repeats=1, warm_up=0, new_tokens=2)
    assert "tokenizer" in summary_of(rows[1], None, rows[0])["note"]
    assert rows[0].seconds["first token"]


@pytest.mark.parametrize("name", ["mid", "llava-v1.6-vicuna-7b", "llava-video-7b"])
def test_work_is_the_same_counted_without_doing_it(name):
    """`--counts-only` against a real pass, at small widths: three ways to read pictures, five methods, the limit."""
    sizes = {"width": 64, "layers": 2, "heads": 4, "ffn": 96, "vocabulary": 2048, "tower": (32, 2, 2, 48)}
    geometry = dataclasses.replace(GEOMETRIES[name], **sizes, key_value_heads=None)
    if geometry.frames:
        geometry = dataclasses.replace(geometry, frames=2)
    else:
        geometry = dataclasses.replace(geometry, text_tower=(32, 2, 2, 48), joint_width=32)
    counted = []
    for decoder in (None, "meta"):
        model, image_processor = build_random(geometry, torch.float32, "cpu", decoder_device=decoder)
        subject = Subject(model, image_processor, geometry.picture, 1, "cpu", geometry.frames)
        rows = make_rows(["divprune", "pool", "random", "uniform", "visionzip"], [16], subject.tokens_per_view)
        measure(subject, rows, repeats=0, warm_up=0, new_tokens=1)
        counted.append([{k: v for k, v in row.figures.items() if k != "extra_memory_bytes"} for row in rows])
    assert counted[0] == counted[1]
    assert counted[0][0]["counted_macs"] > 0


def test_figures_of_a_video():
    """LLaVA-Video's preset with smaller numbers: tokens per frame, newlines of the unpruned clip, no joint space."""
    sizes = {
        "width": 64,
        "layers": 2,
        "heads": 4,
        "key_value_heads": 2,
        "ffn": 96,
        "tower": (32, 2, 2, 48),
        "frames": 3,
    }
    geometry = dataclasses.replace(GEOMETRIES["llava-video-7b"], **sizes, vocabulary=2048)
    model, image_processor = build_random(geometry, torch.float32, "cpu")
    subject = Subject(model, image_processor, geometry.picture, 2, "cpu", geometry.frames)
    rows = make_rows(["script", "cdpruner"], [16], subject.tokens_per_view)
    assert measure(subject, rows, repeats=1, warm_up=0, new_tokens=2) == 1
    unpruned, limit, script, cdpruner = (summary_of(row, rows[1], rows[0]) for row in rows)
    assert unpruned["visual_tokens"] == 3 * 13 * 14
    assert limit["visual_tokens"] == script["visual_tokens"] == 3 * 16
    assert script["visual_cache_bytes"] == 2 * 2 * 48 * 32 * 4
    assert rows[2].pruner.relevance == "language"
    assert rows[3].pruner.relevance == "language"
    assert cdpruner["visual_tokens"] == 3 * 16


TINY_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 2048,
}
TINY = {
    "qwen2.5-vl-7b": partial(
        transformers_presets.qwen2_5_vl,
        TINY_TEXT,
        {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        side=16,
    ),
    "internvl3-8b": partial(
        transformers_presets.internvl3,
        TINY_TEXT,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [64, 64],
            "patch_size": [4, 4],
        },
        tiles=3,
    ),
}


@pytest.mark.parametrize("preset", TINY)
def test_figures_of_models_of_transformers(preset):
    """The presets' own builders with smaller numbers: counts, work and cache of the library's classes."""
    built = efficiency_transformers.build_random_transformers(TINY[preset], torch.float32, "cpu")
    subject = efficiency_transformers.TransformersSubject(built, 2, "cpu")
    rows = [
        Row("unpruned", None),
        Row("limit", 10),
        Row("script", 10, get_pruner("script", keep_tokens=10, relevance="projector")),
        Row("fastv", 10, get_pruner("fastv", keep_tokens=10)),
    ]
    assert measure(subject, rows, repeats=1, warm_up=0, new_tokens=2) == 1
    unpruned, limit, script, fastv = (summary_of(row, rows[1], rows[0]) for row in rows)
    kept, text = 10 * built.preset.views, efficiency_subject.TEXT_BEFORE + efficiency_subject.TEXT_AFTER
    token_bytes = 2 * 2 * 32 * 4
    assert (unpruned["visual_tokens"], limit["visual_tokens"], script["visual_tokens"]) == (
        built.preset.tokens,
        kept,
        kept,
    )
    assert unpruned["cache_bytes"] == (built.preset.tokens + text) * token_bytes
    assert limit["cache_bytes"] == script["cache_bytes"] == (kept + text) * token_bytes
    assert limit["counted_macs"] < script["counted_macs"] < unpruned["counted_macs"]
    if preset == "internvl3-8b":
        assert fastv["visual_tokens"] < fastv["average_tokens"]
        assert fastv["cache_bytes"] == fastv["visual_cache_bytes"] + text * token_bytes
    else:
        assert "fastv" in fastv["note"]  # mRoPE: not hosted
    assert "generate" not in built.model.__dict__  # nothing stays attached


def test_an_interruption_keeps_the_complete_repeats(subject, monkeypatch, capsys):
    rows = make_rows(["script"], [64], 576)
    usual, calls = subject.times, []

    def impatient(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # in the second repeat
            raise KeyboardInterrupt
        return usual(*arguments)

    monkeypatch.setattr(subject, "times", impatient)
    assert measure(subject, rows, repeats=3, warm_up=0, new_tokens=2) == 1
    assert {len(values) for row in rows for values in row.seconds.values()} == {1}
    assert "interrupted after 1 of 3 repeats" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_ends_with_one_json_object_and_draws(tmp_path, capsys):
    drawing = tmp_path / "time.svg"
    arguments = ["--preset", "toy", "--keep-tokens", "64", "16", "--pruners", "script", "random"]
    assert (
        main(
            [
                *arguments,
                "--repeats",
                "1",
                "--warm-up",
                "0",
                "--new-tokens",
                "2",
                "--batch-sizes",
                "1",
                "2",
                "--plot",
                str(drawing),
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [batch["batch"] for batch in found["batches"]] == [1, 2]
    names = [(row["method"], row["keep_tokens"]) for row in found["batches"][0]["rows"]]
    assert names == [("unpruned", None)] + [
        (name, keep) for keep in (64, 16) for name in ("limit", "script", "random")
    ]
    assert drawing.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-tokens", "576"], "between 1 and 575 per view, got 576"),
        (["--keep-tokens", "0.5"], "takes counts"),
        (["--pruners", "scrypt"], "unknown pruner"),
        (["--model-path", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_refused_before_work(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_papers_rows_stand_beside_ours_and_are_marked(capsys):
    print_table([], "llava-v1.6-vicuna-7b", 1)
    printed = capsys.readouterr().out
    assert "| paper: Script | 320 | 2,050 (printed: 4.1 TFLOPs) |" in printed


def test_a_row_can_be_a_method_with_options():
    method = method_of("script:relevance=language,tau=0.6", 8)
    assert (method.name, method.keep_tokens, method.relevance, method.tau) == ("script", 8, "language", 0.6)
    assert method_of("random", 8) == get_pruner("random", keep_tokens=8)
    with pytest.raises(ValueError, match="no option taw"):
        method_of("script:taw=1", 8)


def test_a_fixed_grid_is_measured_as_it_is_evaluated(capsys):
    model = ["--model-path", str(TOY_FOLDER / "llava-toy-v1.6"), "--keep-tokens", "8", "--pruners", "first"]
    assert main([*model, "--counts-only", "--device", "cpu", "--image-grid", "336x672"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["image_grid"] == "336x672"
    assert [row["visual_tokens"] for row in found["batches"][0]["rows"]][1:] == [24, 24]  # three views
    assert main(["--counts-only", "--image-grid", "672x672"]) == 2
    assert "cut pictures into tiles" in capsys.readouterr().err
