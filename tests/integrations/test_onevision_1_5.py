"""LLaVA-OneVision 1.5, which the library does not have: our class computes what the published code does, pruned too.

The record is of the code that comes with the checkpoints (as `lmms-engine` 0.1.4 ships it, on Transformers 4.57.6),
one picture and one frame at a time: of several together it reads all but the first from the wrong rows.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llava.eval.hosts.checks import check_class
from llava.eval.hosts.command import OURS
from llava.integrations.onevision_1_5 import LLaVAOneVision1_5_ForConditionalGeneration, RiceConfig
from llava.integrations.onevision_1_5.model import repeated_pictures
from llava.pruning import get_pruner
from records import GOLDEN

CHECKPOINT = GOLDEN / "onevision_1_5"
KEEP = 2


@pytest.fixture(scope="module")
def record():
    return load_file(CHECKPOINT / "record.safetensors")


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def prompt(record):
    return {
        "input_ids": record["ids"],
        "attention_mask": torch.ones_like(record["ids"]),
        "pixel_values": record["pixels"],
        "image_grid_thw": record["grids"],
        "pixel_values_videos": record["video_pixels"],
        "video_grid_thw": record["video_grids"],
    }


def first_picture(record):
    """The prompt up to the end of its first picture."""
    ids = record["ids"][:, :9]
    shown = {"pixel_values": record["pixels"][:24], "image_grid_thw": record["grids"][:1]}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shown}


def test_features_and_logits_are_those_of_the_published_code(model, record):
    assert isinstance(model, LLaVAOneVision1_5_ForConditionalGeneration)  # its auto_map asks for code that is not run
    with torch.no_grad():
        images = model.model.get_image_features(record["pixels"], record["grids"]).pooler_output
        [video] = model.model.get_video_features(record["video_pixels"], record["video_grids"]).pooler_output
        logits = model(**first_picture(record)).logits
    assert [len(one) for one in images] == [6, 2]
    torch.testing.assert_close(torch.cat(images), record["image_features"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(video, record["video_features"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, record["logits"], rtol=5e-4, atol=5e-4)


def test_it_passes_the_checks_of_every_host():
    [(model_type, name)] = OURS.items()
    outcome = check_class(model_type, name)
    assert outcome.status == "works", outcome.failed or outcome.reason
    assert (outcome.token, outcome.relevance) == ("4 patches", "`language`")


def test_images_and_the_frames_of_a_video_are_pruned(model, record):
    arguments = prompt(record)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    unpruned = model.generate(**arguments, **options)
    with get_pruner("divprune", keep_tokens=100)(model):
        assert torch.equal(model.generate(**arguments, **options).sequences, unpruned.sequences)
    with get_pruner("divprune", keep_tokens=KEEP)(model) as handle:
        output = model.generate(**arguments, **options)
        logits = model(**arguments).logits
    views = [one.picture.view_sizes() for one in handle.kept]
    assert views == [[6], [2], [2, 2, 2]]  # the frames of the video have two tokens each, and keep both
    assert [one.per_view for one in handle.kept] == [[KEEP], [2], [2, 2, 2]]
    text = int((record["ids"] < 60).sum() + (record["ids"] > 61).sum())
    assert output.past_key_values.get_seq_length() == text + KEEP + 2 + 6 + 3 - 1
    stays = torch.ones(record["ids"].shape[1], dtype=torch.bool)
    for one in handle.kept:
        stays[one.picture.columns] = one.kept
    with torch.no_grad():  # the language model on the rows that stay, counted on: no mRoPE
        embeds = model.get_input_embeddings()(record["ids"])
        for token, features in ((60, "image_features"), (61, "video_features")):
            embeds[record["ids"] == token] = record[features]
        expected = model.lm_head(model.model.language_model(inputs_embeds=embeds[:, stays]).last_hidden_state)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_beams_keep_the_pictures_of_a_row_together(model, record):
    """Two rows, the second of two pictures, with beams: each row is answered as it is alone."""
    first, second = record["ids"][:, :9], record["ids"][:, :14]
    rows = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), first], 1), second])
    patches, grids = record["pixels"], record["grids"]
    one = {"pixel_values": patches[:24], "image_grid_thw": grids[:1]}
    two = {"pixel_values": patches, "image_grid_thw": grids}
    both = {"pixel_values": torch.cat([patches[:24], patches]), "image_grid_thw": grids[[0, 0, 1]]}
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=rows, attention_mask=(rows != 0).long(), **both, **options)
    for row, (ids, shown) in enumerate(((first, one), (second, two))):
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **shown, **options)
        assert torch.equal(alone[0, ids.shape[1] :], together[row, rows.shape[1] :])


def test_pictures_are_repeated_row_by_row():
    pixels, grids = torch.arange(10.0)[:, None], torch.tensor([[1, 1, 2], [1, 2, 2], [1, 1, 4]])
    of_rows = torch.tensor([2, 0, 8])  # the second row shows nothing
    repeated, again = repeated_pictures(pixels, grids, of_rows, 2)
    assert again[:, 1:].tolist() == [[1, 2], [1, 2], [2, 2], [1, 4], [2, 2], [1, 4]]
    assert repeated.flatten().tolist() == [0, 1, 0, 1, *range(2, 10), *range(2, 10)]


def test_it_is_saved_and_loaded_again(model, record, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(**prompt(record)).logits, model(**prompt(record)).logits)


def test_bad_input_is_named(model, record, tmp_path):
    arguments = prompt(record)
    with pytest.raises(ValueError, match="7 image placeholders for 8 tokens"):
        model(**arguments | {"input_ids": record["ids"].clone().index_fill_(1, torch.tensor([2]), 5)})
    with pytest.raises(ValueError, match="grids of 24"):
        model(**arguments | {"image_grid_thw": record["grids"][:1]})
    with pytest.raises(ValueError, match="image_grid_thw"):
        model(**arguments | {"image_grid_thw": None})
    with pytest.raises(ValueError, match="multiples of 2"):
        model.model.visual(record["pixels"][:6], torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="have one frame"):
        RiceConfig(temporal_patch_size=2)
    shutil.copytree(CHECKPOINT, tmp_path / "other")
    values = json.loads((CHECKPOINT / "config.json").read_text())
    values["vision_config"]["text_hidden_size"] = 8
    (tmp_path / "other/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="width 8"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "other")
