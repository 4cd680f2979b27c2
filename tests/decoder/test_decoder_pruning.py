"""Dropping visual tokens between decoder layers: against a layer-by-layer reference, batches, caches, generation."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    StaticCache,
)

from llava.decoder.attachment import DecoderPruning, find_pruning, pruning_decoder
from llava.decoder.stages import PictureSpan, PromptRow
from llava.eval.measure.cost import prefill_flops
from llava.mm_utils import process_images
from llava.pruning import get_pruner
from llava.pruning.decoder_pruner import Cut
from llava.pruning.fastv import FastV
from llava.pruning.sparsevlm import cluster_count, pool_size, recycle
from prompts import QUESTIONS, V15, V16, answer, ids_of, prompt_of
from records import load_picture, selection_cases

METHODS = {
    "fastv": {},
    "pyramiddrop": {},
    "sparsevlm": {},
    "sparsevlm 2": {"version": 2, "heads": 3},
    "dart": {},
}


def method(name, **options):
    return get_pruner(name.split()[0], **METHODS[name], **options)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def decoder(request):
    """A Llama body of 6 layers with grouped keys; nothing in it is as small as to hide a mistake."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation=request.param,
        initializer_range=0.3,
    )
    return LlamaModel(config).eval()


# Prompts: two pictures in one, one in another, none in the third. (start of picture, its length)
PICTURES = [[(3, 30), (38, 20)], [(5, 40)], []]
LENGTHS = [70, 52, 9]


def make_batch(rows=(0, 1, 2), side="left", target=0.4, width=48, eligible=None):
    """Padded embeddings (B, T, d) of some of the prompts, their mask and positions, and `PromptRow`s."""
    longest = max(LENGTHS[row] for row in rows)
    embeds, mask = torch.randn(len(rows), longest, width), torch.zeros(len(rows), longest, dtype=torch.long)
    positions, places = torch.zeros(len(rows), longest, dtype=torch.long), []
    for number, row in enumerate(rows):
        start = longest - LENGTHS[row] if side == "left" else 0
        real = slice(start, start + LENGTHS[row])
        embeds[number, real] = torch.randn(LENGTHS[row], width, generator=torch.Generator().manual_seed(row))
        mask[number, real] = 1
        positions[number, real] = torch.arange(LENGTHS[row])
        spans = [
            PictureSpan(first, count, int(target * count), None if eligible is None else eligible(count))
            for first, count in PICTURES[row]
        ]
        places.append(PromptRow(start, LENGTHS[row], tuple(spans)))
    return embeds, mask, positions, places


@torch.no_grad()
def prefill(decoder, pruner, batch, **options):
    embeds, mask, positions, rows = batch
    block = nullcontext() if pruner is None else pruning_decoder(decoder, pruner, rows)
    with block as pruning:
        output = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True, **options)
    return output, pruning


# --- the reference: one prompt, layer by layer, whole attention matrices -------------------------------------------


def attention_of(decoder, index, hidden, positions):
    """Attention probabilities (h, N, N) of a layer, and its rotated keys (N, h c), written out."""
    layer, width = decoder.layers[index], decoder.layers[0].self_attn.head_dim
    normed = layer.input_layernorm(hidden)[0]
    angles = positions[:, None].float() * decoder.rotary_emb.inv_freq[None]
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))

    def heads(states):
        states = states.unflatten(-1, (-1, width)).transpose(0, 1)
        return states * cos + torch.cat([-states[..., width // 2 :], states[..., : width // 2]], -1) * sin

    queries, keys = heads(layer.self_attn.q_proj(normed)), heads(layer.self_attn.k_proj(normed))
    return softmax_of(queries, keys), keys.transpose(0, 1).flatten(1)


def softmax_of(queries, keys):
    keys = keys.repeat_interleave(queries.shape[0] // keys.shape[0], 0)
    logits = queries @ keys.mT * queries.shape[-1] ** -0.5
    return (logits + torch.full(logits.shape[-2:], -torch.inf).triu(1)).softmax(-1)


def choose(name, decoder, cut, watched, hidden, positions, visual, text, raters, keep):
    """Which of the visual positions are kept, ascending, and tokens made of the others: methods.md 4, 5, 6 and 11."""
    attention, keys = attention_of(decoder, *watched)
    if name in ("fastv", "pyramiddrop"):
        scores = attention.mean(0)[-1, visual]
        return sorted(visual[i] for i in scores.topk(keep).indices), None
    if name == "dart":
        final = decoder.norm(hidden)[0]
        norms = keys.abs().sum(-1)
        pivots = [visual[i] for i in norms[visual].topk(min(4, keep)).indices]
        taken, left = list(pivots), keep - min(4, keep)
        pivots += [text[i] for i in norms[text].topk(min(4, len(text))).indices]
        for number, pivot in enumerate(pivots):
            share = left // len(pivots) + (number < left % len(pivots))
            similarity = torch.cosine_similarity(final, final[pivot][None], dim=-1)
            free = [place for place in visual if place not in taken]
            taken += sorted(free, key=lambda place: similarity[place].item())[:share]
        return sorted(taken), None
    if name == "sparsevlm 2":
        apart = (positions[:, None] - positions).float()[:, :, None] * decoder.rotary_emb.inv_freq
        width = decoder.layers[0].self_attn.head_dim
        attention = attention / (2 * apart.cos().sum(-1) * width**-0.5)  # (1, 1) turned by two angles, in every plane
        mass = attention[:, raters][:, :, visual].sum((1, 2))
        attention = attention[mass.topk(3).indices]
    relation = attention.mean(0)[raters][:, visual].mean(0)
    order = relation.argsort(descending=True)
    kept = sorted(visual[i] for i in order[:keep])
    if name == "sparsevlm 2":
        return kept, None
    pool = [visual[i] for i in order[keep : keep + pool_size(len(visual) - keep)]]
    return kept, recycle(hidden[:, pool], cluster_count(len(pool)))[0][0]


@torch.no_grad()
def reference(name, decoder, embeds, pictures, pruner, written=0):
    """Last hidden states (N, d) and lengths per layer of one prompt (N, d) without padding, cuts done by hand.

    ``written`` tokens stand behind the prompt and take no part in choosing.
    """
    hidden, prompt = embeds[None], len(embeds) - written
    positions = torch.arange(len(embeds))
    spans = [list(range(first, first + count)) for first, count in pictures]
    cuts = [{cut.after: cut for cut in pruner.cuts(len(span), int(0.4 * len(span)), 6)} for span in spans]
    lengths, previous, raters = [], None, []
    for span in spans:
        text = [p for p in range(span[-1] + 1, prompt) if all(p not in other for other in spans)]
        scores = (embeds[span] @ embeds[text].mT).softmax(-1).mean(0)
        raters.append([number for number, score in enumerate(scores) if score > scores.mean()])
    for index, layer in enumerate(decoder.layers):
        if any(index in own for own in cuts):
            watched = previous if pruner.watches == "layer before" else (index, hidden, positions)
            end = hidden.shape[1] - written
            watched = (watched[0], watched[1][:, :end], watched[2][:end])
            pieces, new_positions, new_spans, done = [], [], [], 0
            for number, span in enumerate(spans):
                pieces.append(hidden[0, done : span[0]])
                new_positions.append(positions[done : span[0]])
                text = [p for p in range(span[-1] + 1, end) if all(p not in other for other in spans)]
                rating = [text[i] for i in raters[number]]
                keep = pruner.kept(cuts[number][index].keep, len(span))
                kept, made = choose(
                    name, decoder, index, watched, hidden[:, :end], positions[:end], span, text, rating, keep
                )
                start = sum(map(len, pieces))
                pieces.append(hidden[0, kept])
                new_positions.append(positions[kept])
                if made is not None:
                    pieces.append(made)
                    new_positions.append(torch.zeros(len(made), dtype=torch.long))
                new_spans.append(list(range(start, sum(map(len, pieces)))))
                done = span[-1] + 1
            pieces.append(hidden[0, done:])
            new_positions.append(positions[done:])
            hidden, positions, spans = torch.cat(pieces)[None], torch.cat(new_positions), new_spans
            if pruner.renumbers:
                positions = torch.arange(len(positions))
        lengths.append(hidden.shape[1])
        previous = (index, hidden, positions)
        mask = torch.full((hidden.shape[1],) * 2, torch.finfo(hidden.dtype).min).triu(1)[None, None]
        embeddings = decoder.rotary_emb(hidden, positions[None])
        hidden = layer(hidden, attention_mask=mask, position_embeddings=embeddings)
    return decoder.norm(hidden)[0], lengths


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_a_padded_batch_is_what_the_reference_does_with_each_prompt(decoder, name, side):
    """Last hidden states and cache lengths; prompts of different length with two pictures, one and none."""
    pruner = method(name)
    batch = make_batch(side=side)
    output, pruning = prefill(decoder, pruner, batch)
    stage = pruning.prompt.stages[-1]
    for row in range(3):
        embeds, _, _, places = make_batch((row,))
        expected, lengths = reference(name, decoder, embeds[0], PICTURES[row], pruner)
        own = stage.rows[row]
        assert own.length == lengths[-1]
        got = output.last_hidden_state[row, own.start : own.start + own.length]
        assert torch.allclose(got, expected, atol=2e-4)
        alone, _ = prefill(decoder, pruner, (embeds, None, None, places))
        assert [layer.keys.shape[2] for layer in alone.past_key_values.layers] == lengths
    visual = [sum(pruner.counts(span.count, span.target, 6)[5] for span in row.pictures) for row in batch[3]]
    text = [length - sum(count for _, count in own) for length, own in zip(LENGTHS, PICTURES, strict=True)]
    assert [row.length for row in stage.rows] == [sum(pair) for pair in zip(visual, text, strict=True)]
    assert [layer.keys.shape[2] for layer in output.past_key_values.layers] == [
        max(row.length for row in pruning.prompt.stages[number].rows) for number in stage_of_layers(pruning)
    ]


def stage_of_layers(pruning):
    starts = [stage.first_layer for stage in pruning.prompt.stages]
    return [sum(start <= layer for start in starts) - 1 for layer in range(6)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_decoding_on_the_caches_is_one_forward_over_prompt_and_written_tokens(decoder, name, side):
    """Step by step, two tokens at once, and all again without a cache: three ways, and the reference."""
    pruner, (embeds, mask, positions, rows) = method(name), make_batch(side=side)
    new = torch.randn(3, 4, 48)
    lengths = mask.sum(-1, keepdim=True)
    new_positions = lengths + torch.arange(4)
    whole_mask = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], 1)
    with torch.no_grad(), pruning_decoder(decoder, pruner, rows):
        again = decoder(
            inputs_embeds=torch.cat([embeds, new], 1),
            attention_mask=whole_mask,
            position_ids=torch.cat([positions, new_positions], 1),
        ).last_hidden_state[:, -4:]
    for steps in ((1, 1, 1, 1), (2, 2), (4,)):
        with torch.no_grad(), pruning_decoder(decoder, pruner, rows):
            cache = decoder(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=True
            ).past_key_values
            done, found = 0, []
            for step in steps:
                now = slice(done, done + step)
                output = decoder(
                    inputs_embeds=new[:, now],
                    attention_mask=whole_mask[:, : embeds.shape[1] + done + step],
                    position_ids=new_positions[:, now],
                    past_key_values=cache,
                )
                found.append(output.last_hidden_state)
                done += step
        assert torch.allclose(torch.cat(found, 1), again, atol=1e-4)
    for row in range(3):
        own = torch.cat([make_batch((row,))[0][0], new[row]])
        expected, _ = reference(name, decoder, own, PICTURES[row], pruner, written=4)
        assert torch.allclose(again[row], expected[-4:], atol=2e-4)


@dataclass(frozen=True, kw_only=True)
class KeepAll(FastV):
    """Cuts that keep everything: the mechanism at work with nothing to do."""

    name: ClassVar[str] = "keep all"

    def average_cuts(self, tokens, target, layers):
        return [Cut(place, tokens) for place in range(1, layers)]


@pytest.mark.parametrize("renumbers", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cuts_that_drop_nothing_change_no_bit(decoder, side, renumbers, monkeypatch):
    monkeypatch.setattr(KeepAll, "renumbers", renumbers)
    batch = make_batch(side=side)
    plain, _ = prefill(decoder, None, batch)
    cut, pruning = prefill(decoder, KeepAll(), batch)
    assert len(pruning.prompt.stages) == 6
    real = batch[1].bool()
    assert torch.equal(plain.last_hidden_state[real], cut.last_hidden_state[real])


def test_text_tokens_are_untouched(decoder):
    """Every position that is no picture is there after the last cut, in order."""
    for name in METHODS:
        _, pruning = prefill(decoder, method(name), batch := make_batch())
        origin = pruning.prompt.stages[-1].origin
        for number, row in enumerate(batch[3]):
            visual = {row.start + p for s in row.pictures for p in range(s.start, s.start + s.count)}
            text = [p for p in range(row.start, row.start + row.length) if p not in visual]
            left = origin[number][origin[number] >= 0].tolist()
            assert left == sorted(left)
            assert [p for p in left if p not in visual] == text


@pytest.mark.parametrize("name", METHODS)
def test_padding_patches_are_not_kept(decoder, name):
    def third(count):
        return torch.arange(count) % 3 > 0

    batch = make_batch(target=0.6, eligible=third)
    _, pruning = prefill(decoder, method(name), batch)
    for places in pruning.kept_places():
        assert (places % 3 > 0).all()
    spans = [span for row in batch[3] for span in row.pictures]
    for span, left in zip(spans, pruning.prompt.stages[-1].rows[0].pictures, strict=False):
        assert left.count == method(name).counts(span.count, span.target, 6, span.able)[-1]


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_a_prompt_stay_copies(decoder, name):
    """Beams and returned sequences: each prompt stands several times in the batch that the decoder gets."""
    embeds, mask, positions, rows = make_batch((0, 1))
    thrice = [tensor.repeat_interleave(3, 0) for tensor in (embeds, mask, positions)]
    once, _ = prefill(decoder, method(name), (embeds, mask, positions, rows))
    output, pruning = prefill(decoder, method(name), (*thrice, rows))
    assert torch.allclose(output.last_hidden_state, once.last_hidden_state.repeat_interleave(3, 0), atol=1e-5)
    assert len(pruning.kept_places()) == 3


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_keeps_the_counts(decoder, name):
    half = deepcopy(decoder).bfloat16()
    embeds, mask, positions, rows = make_batch()
    output, _ = prefill(half, method(name), (embeds.bfloat16(), mask, positions, rows))
    exact, _ = prefill(decoder, method(name), (embeds, mask, positions, rows))
    assert output.last_hidden_state.dtype == torch.bfloat16
    assert output.last_hidden_state.isfinite().all()
    lengths = [[layer.keys.shape[2] for layer in run.past_key_values.layers] for run in (output, exact)]
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_that_ends_with_its_picture(decoder, name):
    """No text comes after it: the last token stands in for raters and text pivots."""
    rows = [PromptRow(0, 30, (PictureSpan(5, 25, 12),))]
    assert rows[0].text_after(0) == [29]
    output, pruning = prefill(decoder, method(name), (torch.randn(1, 30, 48), None, None, rows))
    assert output.last_hidden_state.isfinite().all()
    assert output.last_hidden_state.shape[1] == 5 + method(name).counts(25, 12, 6)[-1]
    assert (pruning.kept_places()[0].diff() > 0).all()


# --- attaching -----------------------------------------------------------------------------------------------------


def hooks(decoder):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in decoder.modules())


def test_hooks_are_gone_after_the_block_and_after_an_error(decoder):
    before, batch = hooks(decoder), make_batch()
    plain, _ = prefill(decoder, None, batch)
    prefill(decoder, method("fastv"), batch)
    assert hooks(decoder) == before
    with pruning_decoder(decoder, method("fastv"), batch[3]):
        assert hooks(decoder) > before
    with pytest.raises(RuntimeError), pruning_decoder(decoder, method("fastv"), batch[3]):
        decoder(inputs_embeds=torch.randn(3, 70, 7))  # of a wrong width: a layer fails after the hooks have run
    assert hooks(decoder) == before
    assert find_pruning(decoder) is None
    with torch.no_grad():
        assert torch.equal(prefill(decoder, None, batch)[0].last_hidden_state, plain.last_hidden_state)


def test_one_at_a_time_on_a_decoder_and_any_number_on_several(decoder):
    embeds, mask, positions, rows = batch = make_batch()
    torch.manual_seed(9)
    other = LlamaModel(decoder.config).eval()
    alone = [prefill(one, method(name), batch)[0] for one, name in ((decoder, "fastv"), (other, "pyramiddrop"))]
    with (
        torch.no_grad(),
        pruning_decoder(decoder, method("fastv"), rows),
        pruning_decoder(other, method("pyramiddrop"), rows),
    ):
        both = [m(inputs_embeds=embeds, attention_mask=mask, position_ids=positions) for m in (decoder, other)]
        with pytest.raises(RuntimeError, match="attached to this decoder already"):
            DecoderPruning(decoder, method("dart"), rows).attached().__enter__()
    for one, two in zip(alone, both, strict=True):
        assert torch.equal(one.last_hidden_state, two.last_hidden_state)


def test_what_cannot_work_says_so(decoder):
    embeds, mask, positions, rows = make_batch()
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    pruner = method("fastv")

    def refused(message, pruner=pruner, rows=rows, **changes):
        with torch.no_grad(), pytest.raises(ValueError, match=message), pruning_decoder(decoder, pruner, rows):
            decoder(**inputs | changes)

    refused("a StaticCache cannot hold", past_key_values=StaticCache(decoder.config, max_cache_len=99))
    refused("needs whole prompts: 3 of 70 tokens", inputs_embeds=embeds[:, :20], attention_mask=None)
    refused("needs whole prompts", inputs_embeds=embeds[:2], attention_mask=mask[:2], position_ids=positions[:2])
    refused(r"attention_mask= as \(B, T\)", attention_mask=torch.zeros(3, 1, 70, 70))
    refused("a cut after 9 layers does not fit a decoder of 6", pruner=method("fastv", layer=9))
    foreign = prefill(decoder, None, make_batch())[0].past_key_values
    refused("filled without this pruning", past_key_values=foreign, inputs_embeds=embeds[:, :1], attention_mask=None)
    with torch.no_grad(), pruning_decoder(decoder, pruner, rows):
        cache = decoder(**inputs, use_cache=True).past_key_values
        cache.layers[-3].crop(-1)
        cache.layers[1].crop(-1)
        with pytest.raises(ValueError, match="was changed since the prompt was shortened"):
            decoder(inputs_embeds=embeds[:, :1], past_key_values=cache)


def test_hosts_that_lack_something_are_named():
    with pytest.raises(
        ValueError, match=r"Linear is no Llama-style decoder, .* lacks layers, norm, rotary_emb, config"
    ):
        DecoderPruning(torch.nn.Linear(2, 2), method("fastv"))
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 8,
    }
    with pytest.raises(ValueError, match="Qwen3Attention has q_norm"):
        DecoderPruning(Qwen3Model(Qwen3Config(**small)), method("fastv"))
    sliding = Qwen2Config(**small, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(ValueError, match="needs full attention in all layers"):
        DecoderPruning(Qwen2Model(sliding), method("fastv"))
    fused = SimpleNamespace(self_attn=torch.nn.Linear(2, 2), input_layernorm=None)
    host = SimpleNamespace(layers=[fused], norm=None, rotary_emb=None, config=None)
    with pytest.raises(ValueError, match=r"lacks self_attn\.q_proj, self_attn\.k_proj, self_attn\.head_dim"):
        DecoderPruning(host, method("fastv"))


@pytest.mark.parametrize("name", METHODS)
def test_another_family_is_served(name):
    """Qwen2: biases on queries and keys, masks by kind of layer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8,
        initializer_range=0.3,
    )
    decoder = Qwen2Model(config).eval()
    for layer in decoder.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    pruner = method(name)
    output, pruning = prefill(decoder, pruner, make_batch())
    for row in range(2):
        expected, _ = reference(name, decoder, make_batch((row,))[0][0], PICTURES[row], pruner)
        own = pruning.prompt.stages[-1].rows[row]
        assert torch.allclose(output.last_hidden_state[row, own.start :], expected, atol=2e-4)


# --- inside LLaVA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [V15, V16])
@pytest.mark.parametrize("name", METHODS)
def test_counts_known_beforehand_are_the_caches_lengths(load, pixels_of, checkpoint, name):
    tokenizer, model, _, _ = load(checkpoint)
    layers = model.config.num_hidden_layers
    pixels, sizes = pixels_of(checkpoint, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    for budget in (400, 0.8, 480):
        pruner = method(name, keep_tokens=budget)
        with torch.no_grad():
            kept = model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner).kept[0]
            output = model(ids, images=pixels, image_sizes=sizes, pruner=pruner, use_cache=True)
        text = ids.shape[1] - 1
        lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
        assert [length - text for length in lengths] == list(kept.per_layer)
        assert len(kept.sequence) == kept.per_layer[0]
        assert output.logits.shape[1] == lengths[-1]
        assert len(kept.per_layer) == layers
        asked = pruner.count(576) * (1 if checkpoint == V15 else len(pixels[0]))
        if checkpoint == V15:  # where padding patches go, more than the budget may have to go
            eligible = int(kept.layout.eligible.sum())
            assert sum(kept.per_layer) / layers <= min(asked, eligible) + 3


@pytest.mark.parametrize("checkpoint", [V15, V16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_its_members(load, checkpoint, side, name):
    tokenizer, model, processor, _ = load(checkpoint)
    prompts = [prompt_of(QUESTIONS[0]), prompt_of(QUESTIONS[1], images=2), prompt_of("Hello?", images=0)]
    pictures = [load_picture(picture) for picture in ("land640x480", "square336", "tall300x900")]
    pixels = list(process_images(pictures, processor, model.config))
    pixels = torch.stack(pixels) if checkpoint == V15 else pixels
    sizes = [picture.size for picture in pictures]
    pruner = method(name, keep_tokens=400)
    ids, mask = ids_of(tokenizer, *prompts, side=side)
    together = answer(model, ids, mask, images=pixels, image_sizes=sizes, pruner=pruner)
    for row, (first, last) in enumerate([(0, 1), (1, 3), (3, 3)]):
        own, _ = ids_of(tokenizer, prompts[row])
        images = pixels[first:last] if last > first else None
        alone = answer(model, own, images=images, image_sizes=sizes[first:last], pruner=pruner)
        assert together[row] == alone[0]


@pytest.mark.parametrize("name", METHODS)
def test_generation_with_and_without_a_cache_by_hand_beams_and_sampling(load, pixels_of, name):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "land640x480")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    options = {"images": pixels, "image_sizes": sizes, "pruner": method(name, keep_tokens=350)}
    greedy = answer(model, ids, **options)
    assert answer(model, ids, use_cache=False, **options) == greedy
    assert answer(model, ids, num_beams=1, num_return_sequences=2, do_sample=True, top_k=1, **options) == greedy * 2
    beams = answer(model, ids, num_beams=3, num_return_sequences=2, **options)
    assert answer(model, ids, num_beams=3, num_return_sequences=2, use_cache=False, **options) == beams
    assert len(answer(model, ids, do_sample=True, num_return_sequences=3, **options)) == 3
    assert find_pruning(model.get_model()) is None
    # A user's own loop: the cache knows that it was shortened, the method is not named again.
    with torch.no_grad():
        output = model(ids, **options, use_cache=True)
        written = [int(output.logits[0, -1].argmax())]
        cache, seen = output.past_key_values, output.past_key_values.get_seq_length()
        for step in range(5):
            position = torch.tensor([[seen + step]])
            output = model(torch.tensor([written[-1:]]), past_key_values=cache, position_ids=position)
            written.append(int(output.logits[0, -1].argmax()))
    assert written == greedy[0]


def test_pruning_changes_logits_and_leaves_no_trace(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    options = {"images": pixels, "image_sizes": sizes}
    with torch.no_grad():
        plain = model(ids, **options).logits
        for name in METHODS:
            pruned = model(ids, **options, pruner=method(name, keep_tokens=300)).logits
            assert pruned.shape[1] < plain.shape[1]
            assert not torch.allclose(pruned[:, -1], plain[:, -1], atol=1e-5)
        assert torch.equal(model(ids, **options).logits, plain)


def test_llavas_own_entry_point_refuses_what_it_cannot_do(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    with pytest.raises(ValueError, match="'fastv' acts inside the decoder"):
        model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, pixels, sizes, pruner=method("fastv", keep_tokens=300)
        )


def test_a_cache_that_is_emptied_and_used_again_has_no_memory(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    with torch.no_grad():
        options = {"images": pixels, "image_sizes": sizes, "use_cache": True}
        plain = model(ids, **options).logits
        cache = model(ids, pruner=method("fastv", keep_tokens=300), **options).past_key_values
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("this version of the library resets a cache to zeros, not to nothing")
        assert torch.equal(model(ids, past_key_values=cache, **options).logits, plain)


@pytest.mark.parametrize("checkpoint", [V15, V16])
def test_what_is_kept_is_written_down(load, pixels_of, checkpoint):
    tokenizer, model, _, _ = load(checkpoint)
    pixels, sizes = pixels_of(checkpoint, "wide1000x400", "square336")
    ids, mask = ids_of(tokenizer, prompt_of(QUESTIONS[0]), prompt_of(QUESTIONS[1]))
    prompts = model.embed_prompts(
        ids, mask, images=pixels, image_sizes=sizes, pruner=method("fastv", keep_tokens=350), padding_side="left"
    )
    whole = list(prompts.kept)
    model.generate(prompts, max_new_tokens=2)
    for before, after in zip(whole, prompts.kept, strict=True):
        assert before.is_pruned
        assert len(after.sequence) == after.per_layer[-1] < len(before.sequence)
        assert not (after.mask() & ~after.layout.eligible).any()
        order = before.sequence.tolist()
        assert after.patches + after.newlines == len(after.sequence)
        assert set(after.sequence.tolist()) <= set(order)


def test_embedded_prompts_can_be_answered_again(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "wide1000x400")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    pruner = method("fastv", keep_tokens=350)
    prompts = model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner, padding_side="left")
    answers = []
    for _ in range(2):
        answer = model.generate(prompts, max_new_tokens=4)
        answers.append((answer.tolist(), prompts.kept[0].sequence.tolist(), prompts.kept[0].recycled))
    assert answers[0] == answers[1]


def test_the_loss_is_over_the_text_that_is_left(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "square336")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    with torch.no_grad():
        for name in METHODS:
            options = {"images": pixels, "image_sizes": sizes, "pruner": method(name, keep_tokens=300)}
            output = model(ids, labels=ids, **options)
            text = ids[0, int((ids[0] < 0).nonzero()) + 1 :]
            logp = output.logits[0, -len(text) - 1 : -1].log_softmax(-1)
            before = ids[0, : int((ids[0] < 0).nonzero())]
            start = output.logits[0, : len(before) - 1].log_softmax(-1)
            total = logp.gather(1, text[:, None]).sum() + start.gather(1, before[1:, None]).sum()
            assert torch.allclose(output.loss, -total / (len(text) + len(before) - 1), atol=1e-5)


def test_padding_of_a_square_competes_only_if_asked(load, pixels_of):
    tokenizer, model, _, _ = load(V15)
    pixels, sizes = pixels_of(V15, "wide1000x400")
    ids, _ = ids_of(tokenizer, prompt_of(QUESTIONS[0]))
    for exclude in (True, False):
        pruner = method("fastv", keep_tokens=400, exclude_padding=exclude)
        prompts = model.embed_prompts(ids, images=pixels, image_sizes=sizes, pruner=pruner, padding_side="left")
        model.generate(prompts, max_new_tokens=1)
        assert bool((prompts.kept[0].mask() & ~prompts.kept[0].layout.eligible).any()) is not exclude


def test_work_follows_from_the_counts():
    """The paper's 4.4 TFLOPs of FastV at 320 tokens, two for a multiply-accumulate."""
    counts = get_pruner("fastv").counts(2880, 320, 32)
    assert 2 * prefill_flops(counts, 4096, 11008) / 1e12 == pytest.approx(4.44, abs=0.02)


# --- what a layer is asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("sparsevlm_position"))
def test_products_of_positions_are_the_recorded_ones(case, tensors, monkeypatch):
    """From a pass of a decoder whose positions have the gaps that an earlier cut left."""
    positions, heads = tensors["positions"][None], 2
    torch.manual_seed(0)
    width = heads * case["head_dim"]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        vocab_size=8,
        rope_parameters={"rope_type": "default", "rope_theta": case["rope_theta"]},
    )
    seen = []
    pruner = get_pruner("sparsevlm", version=2, heads=1, budget="nominal", layers="1")
    choose = type(pruner).choose_at
    monkeypatch.setattr(type(pruner), "choose_at", lambda self, *args: (seen.append(args[0]), choose(self, *args))[1])
    row = PromptRow(0, positions.shape[1], (PictureSpan(case["prefix"], case["n"], case["kept"]),))
    decoder = LlamaModel(config).eval()
    with torch.no_grad(), pruning_decoder(decoder, pruner, [row]):
        decoder(inputs_embeds=torch.randn(1, positions.shape[1], width), position_ids=positions)
    assert torch.allclose(seen[0].position_products[0], tensors["term"], atol=1e-4)
    assert bool((seen[0].position_products < 0).any())
