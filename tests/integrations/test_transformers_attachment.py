"""How a pruner comes onto a model of the library and leaves it, and what it refuses."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from llava.integrations.transformers import UnsupportedModelError
from llava.model.multimodal_encoder.clip_encoder import CLIPImageProcessor
from llava.pruning import get_pruner
from transformers_families import IMAGE, TEXT, built, clip, family

PRUNER = get_pruner("divprune", keep_tokens=3)


@pytest.fixture
def host():
    return family("llava")


def greedy(model, arguments, **options):
    with torch.no_grad():
        return model.generate(**arguments, **{"max_new_tokens": 4, "do_sample": False, **options})


def hooks(model):
    return [
        len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._forward_hooks_always_called)
        for module in model.modules()
    ]


# --- attaching and leaving -----------------------------------------------------------------------------------------


def test_with_a_handle_instead_of_a_block(host):
    expected, before = greedy(host.model, host.batch()), hooks(host.model)
    with PRUNER(host.model) as handle:
        pruned = greedy(host.model, host.batch())
        assert [one.per_view for one in handle.kept] == [[3]] * 3
    handle = PRUNER.attach(host.model)
    assert torch.equal(greedy(host.model, host.batch()), pruned)
    handle.remove()
    handle.remove()
    assert torch.equal(greedy(host.model, host.batch()), expected)
    assert "generate" not in host.model.__dict__
    assert hooks(host.model) == before


def test_a_second_pruner_is_refused_and_the_first_stays(host):
    before = hooks(host.model)
    with PRUNER(host.model):
        pruned = greedy(host.model, host.batch())
        with pytest.raises(RuntimeError, match="attached to this model already"):
            get_pruner("random").attach(host.model)
        with pytest.raises(RuntimeError, match="attached"), PRUNER(host.model):
            pass
        assert torch.equal(greedy(host.model, host.batch()), pruned)
    assert hooks(host.model) == before


def test_an_exception_inside_the_block_restores_the_model(host):
    expected, before = greedy(host.model, host.batch()), hooks(host.model)
    with pytest.raises(KeyError), PRUNER(host.model):
        raise KeyError
    assert torch.equal(greedy(host.model, host.batch()), expected)
    assert hooks(host.model) == before


@pytest.mark.parametrize("broken", ["vision", "language"])
def test_an_exception_inside_a_call_leaves_the_next_call_whole(host, broken):
    """Neither the stub of the language model nor the plan of the broken call stays behind."""
    part = host.model.model.vision_tower if broken == "vision" else host.model.model.language_model.layers[0]

    def fail(*_):
        raise MemoryError("no room")

    with PRUNER(host.model):
        expected, scores = greedy(host.model, host.batch()), host.model(**host.batch()).logits
        for call in (lambda: greedy(host.model, host.batch()), lambda: host.model(**host.batch())):
            hook = part.register_forward_pre_hook(fail)
            with pytest.raises(MemoryError):
                call()
            hook.remove()
            assert torch.equal(greedy(host.model, host.batch()), expected)
            assert torch.equal(host.model(**host.batch()).logits, scores)
    assert "forward" not in host.model.model.language_model.__dict__
    assert "get_image_features" not in host.model.model.__dict__


def test_an_interrupted_forward_leaves_the_next_call_whole(host):
    """After Ctrl-C torch runs no hook behind a forward, not even those that are always called."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), PRUNER(host.model):
        calls = (lambda: host.model(**host.batch()).logits, lambda: greedy(host.model, host.batch()))
        for call in calls:
            expected = call()
            hook = host.model.lm_head.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                host.model(**host.batch())
            hook.remove()
            assert torch.equal(call(), expected)


def test_a_wrapper_that_was_there_before_comes_back(host):
    mine = host.model.generate
    host.model.generate = mine
    try:
        with PRUNER(host.model):
            assert host.model.generate is not mine
        assert host.model.generate is mine
    finally:
        del host.model.generate


def test_one_call_at_a_time(host):
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(20)

    answers = []
    with PRUNER(host.model):
        expected = greedy(host.model, host.batch())
        hook = host.model.model.vision_tower.register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: answers.append(greedy(host.model, host.batch())))
        thread.start()
        assert inside.wait(20)
        for call in (host.model.generate, host.model):
            with pytest.raises(RuntimeError, match="under way in another thread"):
                call(**host.batch())
        go_on.set()
        thread.join(20)
        hook.remove()
    assert torch.equal(answers[0], expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("placed", ["dispatched", "offloaded"])
def test_models_that_accelerate_has_placed(name, placed):
    host = family(name)
    model = copy.deepcopy(host.model)
    with PRUNER(model):
        expected = greedy(model, host.batch())
    if placed == "dispatched":
        parts = {part: "cpu" for part, _ in model.named_children()}
        dispatch_model(model, device_map=parts, force_hooks=True)
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    before = {part: (set(module.__dict__), module.__dict__.get("forward")) for part, module in model.named_modules()}
    with PRUNER(model):
        assert torch.equal(greedy(model, host.batch()), expected)
    after = {part: (set(module.__dict__), module.__dict__.get("forward")) for part, module in model.named_modules()}
    assert after == before
    remove_hook_from_submodules(model)


def test_the_pipeline(host):
    """Its answers are those of generate, cut where the pipeline cuts them."""
    words = family_tokenizer()
    processor = simple_processor(words)
    pipeline = hf.ImageTextToTextPipeline(model=host.model, processor=processor)
    picture = Image.new("RGB", (28, 28), (200, 30, 90))
    prompt = "w5 w6 <image> w7 w8 w9"
    options = {"max_new_tokens": 4, "do_sample": False}
    with PRUNER(host.model) as handle:
        answer = pipeline(images=[picture], text=prompt, generate_kwargs=options, return_full_text=False)
        inputs = processor(images=[picture], text=prompt, return_tensors="pt")
        output = greedy(host.model, dict(inputs))
        assert handle.kept[0].per_view == [3]
    new = output[0, inputs["input_ids"].shape[1] :]
    found = answer[0] if isinstance(answer, list) else answer
    assert found["generated_text"].split() == words.decode(new, skip_special_tokens=True).split()


def family_tokenizer():
    vocabulary = {f"w{number}": number for number in range(128) if number != IMAGE} | {"<image>": IMAGE}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w3",
        bos_token="w1",
        pad_token="w0",
        extra_special_tokens={"image_token": "<image>"},
    )


def simple_processor(tokenizer):
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return hf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_compiled_decoding_with_a_static_cache(name):
    """The same tokens, and no hook breaks the graph of a decode step."""
    host = family(name)
    compilation = hf.CompileConfig(backend="eager", fullgraph=False, mode=None)
    compilation._compile_all_devices = True  # the library compiles on accelerators alone
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with PRUNER(host.model):
        expected = greedy(host.model, host.batch())
        options = {"cache_implementation": "static", "compile_config": compilation}
        assert torch.equal(greedy(host.model, host.batch(), **options), expected)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


# --- limits, prompts, caches ---------------------------------------------------------------------------------------


def test_limits_that_count_the_prompt(host):
    prompt = host.single(0)
    width = prompt["input_ids"].shape[1]
    with PRUNER(host.model):
        expected = greedy(host.model, prompt, max_new_tokens=4)
        assert torch.equal(greedy(host.model, prompt, max_new_tokens=None, max_length=width + 4), expected)
        config = hf.GenerationConfig(max_length=width + 4, pad_token_id=0, do_sample=False)
        assert torch.equal(greedy(host.model, prompt, max_new_tokens=None, generation_config=config), expected)
        assert config.max_length == width + 4


def test_a_mask_left_out_is_read_from_the_padding(host):
    arguments = host.batch()
    mask = arguments.pop("attention_mask")
    with PRUNER(host.model):
        assert torch.equal(greedy(host.model, arguments), greedy(host.model, arguments | {"attention_mask": mask}))


def test_ids_as_the_first_argument_and_forward_by_position(host):
    arguments = host.single(0)
    rest = {name: value for name, value in arguments.items() if name != "input_ids"}
    with torch.no_grad(), PRUNER(host.model):
        expected = greedy(host.model, arguments)
        assert torch.equal(
            host.model.generate(arguments["input_ids"], max_new_tokens=4, do_sample=False, **rest), expected
        )
        scores = host.model(**arguments).logits
        by_position = host.model(arguments["input_ids"], arguments["pixel_values"], arguments["attention_mask"])
        assert torch.equal(by_position.logits, scores)


def test_a_cache_of_a_pruned_turn_is_not_gone_on_with(host):
    arguments = host.single(0)
    text = {"input_ids": torch.tensor([[5]])}
    with torch.no_grad(), PRUNER(host.model):
        of_generate = greedy(host.model, arguments, return_dict_in_generate=True).past_key_values
        of_forward = host.model(**arguments, use_cache=True).past_key_values
        mine = hf.DynamicCache(config=host.model.config)
        greedy(host.model, arguments, past_key_values=mine)
        for cache in (of_generate, of_forward, mine):
            for call in (host.model, host.model.generate):
                with pytest.raises(ValueError, match=r"was pruned.*whole conversation"):
                    call(**text, past_key_values=cache)
        of_text = host.model(input_ids=torch.tensor([[1, 5]]), use_cache=True).past_key_values
        assert host.model(**text, past_key_values=of_text).logits.shape[1] == 1
        with pytest.raises(ValueError, match="not empty"):
            greedy(host.model, arguments, past_key_values=of_text)


def test_calls_that_cannot_be_pruned(host):
    arguments = host.batch()
    embeds = host.model.get_input_embeddings()(arguments["input_ids"])
    features = host.model.model.get_image_features(arguments["pixel_values"])
    without = {name: value for name, value in arguments.items() if name != "input_ids"}
    with torch.no_grad(), PRUNER(host.model):
        expected = greedy(host.model, host.batch())
        for call in (host.model.generate, host.model):
            with pytest.raises(ValueError, match="cannot be found in embeddings; give input_ids"):
                call(**without, inputs_embeds=embeds)
            with pytest.raises(ValueError, match="needs input_ids"):
                call(**without)
            with pytest.raises(ValueError, match="give pixel_values instead"):
                call(input_ids=arguments["input_ids"], mm_encoder_outputs={"image": features})
            with pytest.raises(ValueError, match="Image features and image tokens do not match"):
                call(**arguments | {"pixel_values": arguments["pixel_values"][:2]})
            with pytest.raises(ValueError, match=r"attention_mask must be \(B, L\)"):
                call(**arguments | {"attention_mask": torch.ones(2, 3)})
        with pytest.raises(ValueError, match="text-only assistant"):
            greedy(host.model, host.single(0), assistant_model=family("llava_next").model)
        with pytest.raises(ValueError, match="give a number"):
            host.model(**arguments, logits_to_keep=torch.tensor([1]))
        assert torch.equal(greedy(host.model, host.batch()), expected)


def test_questions_that_cannot_be_read(host):
    script = get_pruner("script", keep_tokens=3)
    with pytest.raises(ValueError, match=r"attach the model with its processor, pruner\(model, processor\)"):
        script.attach(host.model)
    assert "generate" not in host.model.__dict__
    with torch.no_grad(), script(host.model, family_tokenizer()) as handle:
        with pytest.raises(ValueError, match="2 prompts but 3 queries"):
            host.model.generate(**host.batch(), query=["a", "b", "c"])
        with pytest.raises(TypeError, match="query must be text"):
            host.model(**host.batch(), query=["a", 3])
        for nothing in ("", "<image>\n ", "Answer the question using a single word or phrase."):
            with pytest.raises(ValueError, match=r"prompt 0 asks nothing.*pass query="):
                host.model.generate(**host.batch(), query=nothing)
        bare = host.prompts([["image"]], [0])
        with pytest.raises(ValueError, match="pass query="):
            host.model.generate(**bare)
        handle.query = "w7 w8"
        greedy(host.model, bare)
        by_handle = handle.kept[0].kept
        handle.query = None
        greedy(host.model, bare, query="<image>\nw7 w8\nAnswer the question using a single word or phrase.")
        assert torch.equal(handle.kept[0].kept, by_handle)


def test_only_prompts_with_pictures_must_ask_something(host):
    """A row of text alone may be anything; the number of the row that asks nothing is that of the batch."""
    rows = host.prompts([[], ["image", 4]], [0])
    with torch.no_grad(), get_pruner("script", keep_tokens=3)(host.model, family_tokenizer()) as handle:
        host.model(**rows)
        assert handle.kept[0].per_view == [3]
        with pytest.raises(ValueError, match="prompt 1 asks nothing"):
            host.model(**rows, query=["w4", " "])


def test_processors_that_do_not_fit(host):
    script, before = get_pruner("script", keep_tokens=3), hooks(host.model)
    with pytest.raises(ValueError, match="got SimpleNamespace, which has no tokenizer"):
        script.attach(host.model, SimpleNamespace(tokenizer=None, image_processor=1))
    wrong = SimpleNamespace(tokenizer=family_tokenizer(), image_token_id=7)
    with pytest.raises(ValueError, match="image token has the id 7, in LlavaForConditionalGeneration it is 120"):
        script.attach(host.model, wrong)
    mark = family_tokenizer()  # as Gemma 3: the processor's own is the mark that begins a picture
    mark.image_token_id = 120
    named = {"image_token": "<mark>", "boi_token": "<mark>", "image_token_id": 7}
    script.attach(host.model, SimpleNamespace(tokenizer=mark, **named)).remove()
    larger = family_tokenizer()
    larger.add_tokens([f"more{number}" for number in range(10)])
    with pytest.raises(ValueError, match="tokenizer is of another model: it has 138 tokens"):
        script.attach(host.model, larger)
    with pytest.raises(ValueError, match="positions must be auto, packed or original, got 'kept'"):
        script.attach(host.model, positions="kept")
    assert hooks(host.model) == before


# --- classes that nobody has listed --------------------------------------------------------------------------------


class NewFamilyForConditionalGeneration(hf.LlavaForConditionalGeneration):
    """A class that the list does not know, and that is built to the pattern."""


def test_an_unknown_class_that_fits_works(host):
    config = hf.LlavaConfig(vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    model = built(NewFamilyForConditionalGeneration, config)
    with PRUNER(model) as handle:
        assert torch.equal(greedy(model, host.batch()), greedy(model, host.batch(), use_cache=False))
    assert [one.per_view for one in handle.kept] == [[3]] * 3


def test_classes_that_do_not_fit_are_refused_with_the_list(host):
    text_only = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    remote = type("Remote", (nn.Module,), {"__module__": "transformers_modules.somebody.model"})()
    config = hf.LlavaConfig(vision_config=clip(), text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    without_placeholder = built(hf.LlavaForConditionalGeneration, config)
    without_placeholder.config.image_token_id = None
    encoder_decoder = copy.copy(host.model)
    encoder_decoder.config = SimpleNamespace(is_encoder_decoder=True)
    for model, reason in [
        (text_only, "no model.language_model or model.text_model"),
        (remote, "remote code.*load it as a class of the library"),
        (nn.Linear(1, 1), "no config or no generate"),
        (without_placeholder, "names no image_token_id"),
        (encoder_decoder, "encoder-decoder"),
    ]:
        with pytest.raises(UnsupportedModelError, match=f"{reason}.*LlavaNext, "):
            PRUNER.attach(model)


def test_a_language_model_that_is_called_otherwise_is_refused(host):
    model = copy.deepcopy(host.model)
    base = model.model
    base.forward = lambda **arguments: base.language_model(input_ids=arguments["input_ids"])
    with PRUNER(model), pytest.raises(UnsupportedModelError, match="not called with inputs_embeds="):
        greedy(model, host.batch())


def test_features_that_do_not_reach_the_placeholders_are_refused(host):
    """A class that computes features and gives its language model something else: cross-attention, discrete tokens."""
    model = copy.deepcopy(host.model)
    base = model.model

    def forward(**named):
        base.get_image_features(named.pop("pixel_values"))
        embeds = base.get_input_embeddings()(named.pop("input_ids"))
        return base.language_model(inputs_embeds=embeds, attention_mask=named["attention_mask"])

    base.forward = forward
    with PRUNER(model), pytest.raises(UnsupportedModelError, match="image placeholders are not its image features"):
        greedy(model, host.batch())


def test_features_of_all_pictures_in_one_piece_are_refused(host):
    """Else nothing would be known of which row they belong to, and nothing would be pruned in silence."""
    model = copy.deepcopy(host.model)
    base = model.model
    compute = base.get_image_features

    def in_one_piece(*positional, **named):
        output = compute(*positional, **named)
        output.pooler_output = [torch.cat(list(output.pooler_output))]
        return output

    base.get_image_features = in_one_piece
    with torch.no_grad():
        model(**host.batch())  # the library itself does not mind
    with PRUNER(model), pytest.raises(UnsupportedModelError, match="48 image placeholders that do not match its feat"):
        greedy(model, host.batch())
