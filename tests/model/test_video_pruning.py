"""Pruning videos: counts of every newline mode, selection per frame, relevance on SigLIP, and what is refused."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llava.checkpoint import CheckpointError
from llava.layout.pooling import pool_patches
from llava.layout.views import NEWLINE, video_layout
from llava.layout.visuals import VideoReading
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import DecoderPruner, PruningInputs, get_pruner, list_pruners, pruner_class
from llava.pruning.blocks import ROWS, CosineRows, map_rank_by_rows, redundancy_by_blocks
from llava.pruning.functional import cosine_similarity, greedy_map_rank, redundancy_graph
from llava.relevance.policy import Announcer
from llava.relevance.siglip import SiglipJointSpace
from records import FEATURES, Records, load_picture

SIGLIP = "google/siglip-so400m-patch14-384"
QUESTION = "What is the colour of the ball?"
JOINT = Records("video/records/siglip_joint")
ON_VIDEO = [name for name in list_pruners() if pruner_class(name).place not in ("pixels", "encoder")]


@pytest.fixture(scope="module")
def loaded(video):
    return load_pretrained_model(str(video / "checkpoints/llava-video-tiny-qwen2"), device="cpu")


@pytest.fixture
def model(loaded, monkeypatch):
    """The model with average pooling; tests may set other keys."""
    model = loaded[1]
    monkeypatch.setattr(model.config, "mm_spatial_pool_mode", "average")
    return model


@pytest.fixture(scope="module")
def clips():
    """Two clips of other content than noise: windows that wander over golden pictures. (4 and 3 frames)"""
    land, square = load_picture("land640x480"), load_picture("square336")
    first = [land.crop((40 * t, 20 * t, 40 * t + 320, 20 * t + 240)) for t in range(4)]
    return first, [square.crop((t * 20, 0, 200 + t * 20, 200)) for t in range(3)]


@pytest.fixture(scope="module")
def pixels(loaded, clips):
    return [loaded[2](images=clip, return_tensors="pt")["pixel_values"] for clip in clips]


def ids_of(loaded, videos=1, question=QUESTION):
    prompt = f"<|im_start|>user\n{'<image>' * videos}\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer_image_token(prompt, loaded[0], return_tensors="pt")[None]


def embed(model, ids, videos, **options):
    with torch.no_grad():
        return model.embed_prompts(ids, images=videos, modalities="video", **options)


# --- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, side, unpruned",
    [
        ("average", 13, {"no_token": 10816, "one_token": 10817, "frame": 10880, "grid": 11648}),
        ("max", 13, {"no_token": 10816, "one_token": 10817, "frame": 10880, "grid": 11648}),
        ("bilinear", 14, {"no_token": 12544, "one_token": 12545, "frame": 12608, "grid": 13440}),
    ],
)
def test_counts_of_64_frames(mode, side, unpruned):
    for position, count in unpruned.items():
        layout = VideoReading(mode, position, "spatial_unpad").layout(64, 27)
        assert len(layout.sequence) == count
        assert layout.eligible.shape == (64, side * side)
        assert len(video_layout(64, side, position, "flat").sequence) == 64 * side * side
    assert len(VideoReading("average", "grid", "spatial_unpad", slow_every=10).layout(64, 27).sequence) == 3732


def test_newlines_need_a_token():
    for position in ("grid", "frame"):
        with pytest.raises(ValueError, match="needs the newline token"):
            video_layout(2, 13, position, "spatial")
    assert len(video_layout(2, 13, "one_token", "spatial").sequence) == 338
    with pytest.raises(
        ValueError, match="mm_newline_position must be one of grid, frame, one_token, no_token, got 'x'"
    ):
        video_layout(2, 13, "x", "spatial_unpad")
    with pytest.raises(ValueError, match="mm_spatial_pool_mode must be one of average, max, bilinear"):
        VideoReading("mean", "grid", "spatial_unpad").layout(2, 27)


@pytest.mark.parametrize("position", ["grid", "frame", "one_token", "no_token"])
def test_the_promised_count_in_every_newline_mode(loaded, model, pixels, monkeypatch, position):
    monkeypatch.setattr(model.config, "mm_newline_position", position)
    ids = ids_of(loaded)
    prompts = embed(model, ids, pixels[:1], pruner=get_pruner("script", keep_tokens=9))
    assert prompts.inputs_embeds.shape[1] == ids.shape[1] - 1 + 4 * 9
    assert prompts.kept[0].per_view() == [9] * 4
    with_newlines = embed(model, ids, pixels[:1], pruner=get_pruner("script", keep_tokens=9, newlines="keep"))
    kept = with_newlines.kept[0]
    rows = {int(number) // 13 for number in kept.sequence if number >= 0}
    assert kept.newlines == {"grid": len(rows), "frame": 4, "one_token": 1, "no_token": 0}[position]
    assert torch.equal(kept.sequence[kept.sequence >= 0], prompts.kept[0].sequence)
    if position == "grid":  # each newline behind the last kept token of its row
        sequence = kept.sequence.tolist()
        for place, number in enumerate(sequence):
            if number == NEWLINE:
                following = sequence[place + 1] if place + 1 < len(sequence) else None
                assert following is None or following // 13 != sequence[place - 1] // 13


# --- invariants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_VIDEO)
def test_keeping_all_is_the_unpruned_prompt(loaded, model, pixels, name):
    ids = ids_of(loaded)
    whole = embed(model, ids, pixels[:1])
    for keep in (169, 1000):
        assert torch.equal(
            embed(model, ids, pixels[:1], pruner=get_pruner(name, keep_tokens=keep)).inputs_embeds,
            whole.inputs_embeds,
        )


@pytest.mark.parametrize("name", ON_VIDEO)
def test_every_method_keeps_its_count_and_a_clip_alone_equals_the_clip_in_a_batch(loaded, model, pixels, name):
    pruner = get_pruner(name, keep_tokens=100 if issubclass(pruner_class(name), DecoderPruner) else 16)
    rows = torch.cat([ids_of(loaded), ids_of(loaded)])
    together = embed(model, rows, pixels, pruner=pruner)
    for i, clip in enumerate(pixels):
        alone = embed(model, ids_of(loaded), [clip], pruner=pruner)
        assert torch.equal(alone.kept[0].sequence, together.kept[i].sequence)
        if pruner.count_is_exact and not isinstance(pruner, DecoderPruner):
            assert alone.kept[0].per_view() == [16] * len(clip)
        length = alone.inputs_embeds.shape[1]
        assert torch.allclose(alone.inputs_embeds[0], together.inputs_embeds[i, :length], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"scope": "global"}])
def test_every_frame_finds_its_own_budget(loaded, model, pixels, options):
    """Between a floor, of each of several views or of all together, and a third of the tokens; alone as in a batch."""
    pruner = get_pruner("script", keep_tokens="auto:0.9", **options)
    rows = torch.cat([ids_of(loaded), ids_of(loaded)])
    together = embed(model, rows, pixels, pruner=pruner)
    for i, clip in enumerate(pixels):
        alone = embed(model, ids_of(loaded), [clip], pruner=pruner).kept[0]
        assert torch.equal(alone.sequence, together.kept[i].sequence)
        if options:
            assert 16 <= sum(alone.per_view()) <= 56 * len(clip)
        else:
            assert all(4 <= count <= 56 for count in alone.per_view())
    assert len({count for kept in together.kept for count in kept.per_view()}) > 1


@pytest.mark.parametrize("name", [name for name in ON_VIDEO if name not in ("script_release", "random")])
def test_a_frame_in_a_video_is_selected_as_if_alone(loaded, model, pixels, name):
    if issubclass(pruner_class(name), DecoderPruner):
        pytest.skip("acts on the whole prompt")
    pruner = get_pruner(name, keep_tokens=16)
    video = embed(model, ids_of(loaded), pixels[:1], pruner=pruner).kept[0]
    for t, frame in enumerate(pixels[0]):
        alone = embed(model, ids_of(loaded), [frame], pruner=pruner).kept[0]
        assert torch.equal(alone.mask()[0], video.mask()[t])


def test_kept_rows_are_rows_of_the_pooled_features_in_order_of_time(loaded, model, pixels):
    ids = ids_of(loaded)
    prompts = embed(model, ids, pixels[:1], pruner=get_pruner("script", keep_tokens=16))
    pooled = model.encode_pictures(pixels[:1], modality="video").features
    sequence = prompts.kept[0].sequence
    assert (sequence.diff() > 0).all()
    start = int((ids[0] == -200).nonzero())
    assert torch.equal(prompts.inputs_embeds[0, start : start + 64], pooled.flatten(0, 1)[sequence])


def test_encoded_once_asked_often(loaded, model, pixels):
    encoded = model.encode_pictures(pixels, modality="video")
    pruner = get_pruner("script", keep_tokens=16)
    rows = torch.cat([ids_of(loaded), ids_of(loaded)])
    assert torch.equal(
        embed(model, rows, encoded, pruner=pruner).inputs_embeds,
        embed(model, rows, pixels, pruner=pruner).inputs_embeds,
    )
    second = embed(model, ids_of(loaded), encoded.pick([1]), pruner=pruner)
    assert torch.equal(
        second.kept[0].sequence, embed(model, ids_of(loaded), pixels[1:], pruner=pruner).kept[0].sequence
    )


def test_picture_and_video_in_one_prompt(loaded, model, pixels):
    picture = load_picture("square336")
    tiles = process_images([picture], loaded[2], model.config)[0]
    pruner = get_pruner("script", keep_tokens=16)
    with torch.no_grad():
        mixed = model.embed_prompts(
            ids_of(loaded, 2),
            images=[pixels[0], tiles],
            image_sizes=[(0, 0), picture.size],
            modalities=["video", "image"],
            pruner=pruner,
        )
        alone = model.embed_prompts(ids_of(loaded), images=[tiles], image_sizes=[picture.size], pruner=pruner)
    assert [tokens.per_view() for tokens in mixed.kept] == [[16] * 4, [16] * len(tiles)]
    assert torch.equal(mixed.kept[1].sequence, alone.kept[0].sequence)


def test_modalities_are_counted_per_visual(loaded, model, pixels):
    rows = torch.cat([ids_of(loaded), ids_of(loaded), ids_of(loaded)])
    with pytest.raises(ValueError, match="3 images and videos, but 2 modalities"):
        model.embed_prompts(rows, images=[*pixels, pixels[0]], modalities=["video", "video"])
    with pytest.raises(ValueError, match="1 <image> placeholders, but 2 images"):
        model.embed_prompts(ids_of(loaded), images=pixels, modalities="video")


# --- relevance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["average", "bilinear"])
def test_full_source_gives_the_recorded_cosines(video, loaded, model, monkeypatch, mode):
    """The patches' embeddings are pooled as the features are, then compared with the question."""
    monkeypatch.setattr(model.config, "mm_spatial_pool_mode", mode)
    tower = model.get_vision_tower()
    monkeypatch.setattr(tower, "image_embeds_source", "pixels")
    frames = [Image.open(path).convert("RGB") for path in sorted((video / "frames/clipA").glob("*.png"))]
    clip = loaded[2](images=frames, return_tensors="pt")["pixel_values"]
    embeds = model.encode_pictures([clip], modality="video").image_embeds(tower)
    texts = JOINT.tensors["clipA.text_embeds_raw.all"]
    cosines = F.normalize(embeds, dim=-1) @ F.normalize(texts, dim=-1).mT
    want = JOINT.tensors[f"clipA.pooled_text_cosine_{mode}_full_tower.all"]
    assert (cosines - want).abs().max() < 1e-5


def test_bridge_from_the_checkpoints_own_tower_is_as_recorded(video, loaded, model):
    frames = [Image.open(path).convert("RGB") for path in sorted((video / "frames/clipA").glob("*.png"))]
    tower = model.get_vision_tower()
    features = tower(loaded[2](images=frames, return_tensors="pt")["pixel_values"])
    JOINT.check("clipA", "patch_embeds_bridge", tower.image_embeds(features), FEATURES)
    texts = JOINT.tensors["clipA.text_embeds_raw.all"]
    cosines = F.normalize(tower.image_embeds(features), dim=-1) @ F.normalize(texts, dim=-1).mT
    assert (cosines - JOINT.tensors["clipA.patch_text_cosine_bridge.all"]).abs().max() < 1e-5


def test_the_sign_is_plus_one_and_the_question_matters(loaded, model, pixels):
    assert model.relevance_sign == 1
    kept = [
        embed(model, ids_of(loaded), pixels[:1], pruner=get_pruner("script", keep_tokens=16), query=query).kept[0]
        for query in ("a red square", "Where does the man go?")
    ]
    assert not torch.equal(kept[0].sequence, kept[1].sequence)
    relevance = kept[0].selection.details["relevance"]
    assert torch.equal(relevance.amin(1), torch.zeros(4))  # scaled within each frame
    assert torch.equal(relevance.amax(1), torch.ones(4))


@pytest.mark.parametrize("name", ["script", "cdpruner", "trim", "script_release"])
def test_without_siglip_relevance_comes_from_the_language_model(loaded, model, pixels, monkeypatch, caplog, name):
    tower = model.get_vision_tower()
    monkeypatch.setattr(tower, "joint_folder", None)
    monkeypatch.setattr(tower, "_joint_space", None)
    monkeypatch.setattr(model, "_announcer", Announcer(), raising=False)
    if pruner_class(name).place == "encoder":
        pytest.skip("acts before the projector")
    pruner = get_pruner(name, keep_tokens=16)
    kept = embed(model, ids_of(loaded), pixels[:1], pruner=pruner).kept[0]
    assert kept.relevance.source == "language"
    assert "first attention; the full SigLIP" in caplog.text
    told = dataclasses.replace(pruner, relevance="language")
    assert torch.equal(kept.sequence, embed(model, ids_of(loaded), pixels[:1], pruner=told).kept[0].sequence)
    asked = dataclasses.replace(pruner, relevance="clip")
    with pytest.raises(ValueError, match=r"'\w+' cannot have relevance=clip: the full SigLIP .* is not at hand"):
        embed(model, ids_of(loaded), pixels[:1], pruner=asked)
    with pytest.raises(CheckpointError, match=r"needs the full SigLIP.*--siglip-path"):
        tower.joint_space()


def test_a_folder_of_siglip_can_be_given(video):
    checkpoint = str(video / "checkpoints/llava-video-tiny-qwen2")
    _, model, _, _ = load_pretrained_model(
        checkpoint, device="cpu", joint_space_path=str(video / "checkpoints" / SIGLIP)
    )
    assert isinstance(model.get_vision_tower().joint_space(), SiglipJointSpace)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in list_pruners() if name not in ON_VIDEO])
def test_methods_before_the_projector_are_refused(loaded, model, pixels, monkeypatch, name):
    monkeypatch.setattr(model.get_vision_tower(), "observe", None)  # before the tower runs
    with pytest.raises(ValueError, match=f"'{name}' acts before the projector"):
        embed(model, ids_of(loaded), pixels[:1], pruner=get_pruner(name, keep_tokens=64))


def test_slow_fast_and_pruning_exclude_each_other(loaded, model, pixels, monkeypatch):
    monkeypatch.setattr(model.config, "add_faster_video", True)
    with pytest.raises(ValueError, match=r"needs model\.faster_token"):
        embed(model, ids_of(loaded), pixels[:1])
    monkeypatch.setattr(model.get_model(), "faster_token", torch.nn.Parameter(torch.randn(96)), raising=False)
    assert embed(model, ids_of(loaded), pixels[:1]).inputs_embeds.shape[1] == ids_of(loaded).shape[1] - 1 + 183 + 129
    with pytest.raises(ValueError, match=r"slow/fast video .* cannot be pruned"):
        embed(model, ids_of(loaded), pixels[:1], pruner=get_pruner("script", keep_tokens=16))


def test_checkpoints_of_pictures_refuse_videos(load):
    model = load("llava-v1.5-tiny")[1]
    with pytest.raises(ValueError, match="not made for videos"):
        model.encode_pictures([torch.zeros(2, 3, 336, 336)], modality="video")


def test_another_stride_is_warned_about(loaded, model, pixels, monkeypatch, caplog):
    monkeypatch.setattr(model.config, "mm_spatial_pool_stride", 4)
    assert len(embed(model, ids_of(loaded), pixels[:1]).kept[0].sequence) == 4 * 182
    assert "mm_spatial_pool_stride 4 is not read" in caplog.text


# --- a budget for the whole clip -----------------------------------------------------------------------------------


def test_a_budget_for_the_video_is_dealt_over_its_frames(loaded, model, pixels):
    pruner = get_pruner("script", keep_tokens=16, scope="global")
    kept = embed(model, ids_of(loaded), pixels[:1], pruner=pruner).kept[0]
    assert kept.patches == 64
    assert len(set(kept.per_view())) > 1


def test_by_rows_gives_what_the_whole_matrix_gives(monkeypatch):
    inputs = PruningInputs(torch.randn(1, 700, 24, dtype=torch.float64), relevance=torch.rand(1, 700).double())
    pruner = get_pruner("script", tau=0.1)
    whole = pruner.select(inputs, keep=90)
    monkeypatch.setattr("llava.pruning.similarity.BY_ROWS_FROM", 700)
    by_rows = pruner.select(inputs, keep=90)
    assert torch.equal(by_rows.indices, whole.indices)
    assert torch.equal(by_rows.details["kept_by_gsp"], whole.details["kept_by_gsp"])


def test_rows_on_demand_are_the_matrix():
    features = torch.randn(2, 301, 16, dtype=torch.float64)
    features[:, 7] = 0
    features[:, 9] = features[:, 8]
    matrix = cosine_similarity(features)
    tokens = torch.tensor([3, 7, 8])
    assert torch.allclose(CosineRows(features[0]).rows(tokens), matrix[0, tokens])
    relevance = torch.rand(2, 301, dtype=torch.float64)
    assert torch.equal(
        map_rank_by_rows(features, 40, relevance=relevance), greedy_map_rank(matrix, 40, relevance=relevance)
    )
    valid = torch.rand(2, 301) > 0.2
    for mask in (None, valid):
        want, got = redundancy_graph(features, 0.1, valid=mask), redundancy_by_blocks(features, 0.1, valid=mask)
        assert torch.allclose(want[0], got[0])
        assert torch.allclose(want[1].double(), got[1].double())


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that was made."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, torch.Tensor):
                owner = value if value._base is None else value._base
                self.numel = max(self.numel, owner.numel())
        return output


def largest(pruner, frames, joined=False):
    features = torch.randn(frames, 169, 32)
    if joined:
        features = features.flatten(0, 1)[None]
    inputs = PruningInputs(features, relevance=torch.rand(features.shape[:2]))
    with LargestTensor() as seen:
        pruner.select(inputs, keep=16 * (frames if joined else 1))
    return seen.numel


def test_memory_of_the_selection_grows_linearly_with_frames():
    script = get_pruner("script", keep_tokens=16)
    sizes = [largest(script, frames) for frames in (4, 8, 16)]
    assert sizes == [sizes[0], 2 * sizes[0], 4 * sizes[0]]


def test_the_selection_over_a_long_video_never_builds_all_pairs(monkeypatch):
    tokens = 16 * 169
    script = get_pruner("script", keep_tokens=16)
    assert largest(script, 16, joined=True) >= tokens**2
    monkeypatch.setattr("llava.pruning.similarity.BY_ROWS_FROM", tokens)
    assert largest(script, 16, joined=True) <= tokens * ROWS


def test_pooling_by_hand():
    patches = torch.arange(729.0)[None, :, None]
    plane = patches.reshape(27, 27)
    average = pool_patches(patches, "average").reshape(13, 13)
    assert average[2, 3] == plane[4:6, 6:8].mean()
    assert pool_patches(patches, "max").reshape(13, 13)[12, 12] == plane[25, 25]
    bilinear = pool_patches(patches, "bilinear").reshape(14, 14)
    position = 27 / 14 * 3.5 - 0.5  # of output 3, between two patches
    assert bilinear[0, 3] == pytest.approx(27 * (27 / 14 * 0.5 - 0.5) + position, rel=1e-5)
