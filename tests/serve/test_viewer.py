"""What the page and the gallery show, without either: the methods' own selections; HTML, addresses, JSON."""

import argparse
import json
import re
import threading
from html import unescape
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from convert_to_transformers import convert
from PIL import Image

from llava.model.builder import TOY_FOLDER
from llava.pictures import load_image
from llava.pruning import PruningInputs, get_pruner, list_pruners, parse_options
from llava.pruning.functional import cosine_similarity
from llava.serve import gallery
from llava.serve.options import add_session
from llava.serve.status import Stopped
from llava.serve.viewer.cache import prompt_cache_bytes
from llava.serve.viewer.desk import Room, Silent, read_upload
from llava.serve.viewer.html import document, fragment
from llava.serve.viewer.look import Comparison, as_dict, closest_kept, steps_of
from llava.serve.viewer.setting import Setting, options_of, parse_entry
from llava.video import Video
from records import GOLDEN

CHECKPOINTS = GOLDEN / "checkpoints"
V15, V16 = (str(CHECKPOINTS / name) for name in ("llava-v1.5-tiny-wide", "llava-v1.6-vicuna-tiny-wide"))
PICTURE = GOLDEN / "images" / "land640x480.png"
QUESTION = "What is it?"


def room_of(model, *flags):
    parser = argparse.ArgumentParser()
    add_session(parser)
    return Room(parser.parse_args(["--model-path", model, "--device", "cpu", "--max-new-tokens", "3", *flags]))


@pytest.fixture(scope="module")
def room():
    return room_of(V15)


@pytest.fixture
def desk(room):
    desk = room.desk()
    desk.show("land.png", [Image.open(PICTURE).convert("RGB")])
    return desk


def test_what_is_shown_is_what_select_keeps(desk):
    look = desk.look(Setting(QUESTION, "script", "24", ("relevance=projector",)))
    session = desk.session
    words = session.tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        query = session.model.get_input_embeddings()(words)
    valid = session.pictures.layouts[0].eligible
    inputs = PruningInputs(
        session.pictures.features,
        query_embeds=query,
        valid=None if bool(valid.all()) else valid,
        relevance_sign=session.model.vision.relevance_sign,
    )
    selection = get_pruner("script", keep_tokens=24, relevance="projector").select(inputs)
    (view,) = look.pictures[0].views
    assert view.kept.flatten().equal(selection.mask[0])
    redundancy = view.scores["redundancy"].flatten()
    assert redundancy[valid[0]].equal(selection.details["redundancy"][0][valid[0]])
    assert redundancy[~valid[0]].isnan().all()  # padding takes no part
    assert view.outside.flatten().equal(~valid[0])
    assert view.closest.flatten()[~valid[0]].eq(-1).all()
    steps = view.order.flatten()[selection.indices[0]]
    assert steps.sort().values.tolist() == list(range(24))
    assert steps.argsort().equal(selection.details["order"][0][selection.indices[0]].argsort())
    assert look.kept == 24
    assert look.tokens == 576


@pytest.mark.parametrize("name", ["script", "divprune", "uniform", "fastv", "pool", "trim"])
def test_kept_tokens_add_up_for_every_kind_of_method(desk, name):
    look = desk.look(Setting(QUESTION, name, "300" if name == "fastv" else "16"))
    tokens = desk.session.last_prompt.kept[0]
    assert look.pictures[0].views[0].kept.flatten().equal(tokens.mask()[0])
    assert look.kept + look.made == tokens.patches + tokens.recycled
    assert ("order" in tokens.details) == (look.pictures[0].views[0].order is not None)


def test_the_cache_is_as_large_as_the_one_that_the_model_fills(desk):
    for name, keep in (("script", "16"), ("fastv", "300"), ("script", "full")):
        look = desk.look(Setting(QUESTION, name, keep))
        prompt = desk.session.last_prompt
        if name == "fastv":
            text = prompt.rows[0].length - 576
            assert look.per_layer[0] == 576
            lengths = [text + count for count in look.per_layer]
        else:
            with torch.no_grad():
                cache = desk.session.model(
                    inputs_embeds=prompt.inputs_embeds, attention_mask=prompt.attention_mask, use_cache=True
                ).past_key_values
            assert look.cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            lengths = [prompt.rows[0].length] * len(look.per_layer)
        config = desk.session.model.config
        assert look.cache_bytes == prompt_cache_bytes(config, lengths, 4)


def test_a_second_question_reuses_the_towers_features(desk):
    first, second = desk.look(Setting(QUESTION, keep="16")), desk.look(Setting("A dog?", keep="16"))
    assert first.seconds["vision"] > 0
    assert second.seconds["vision"] == 0
    assert "cached" in fragment(desk.comparison([first, second]), "c")


def test_desks_do_not_share_pictures(room, desk):
    other = room.desk()
    with pytest.raises(ValueError, match="no picture"):
        other.look(Setting(QUESTION))
    other.show("square.png", [Image.open(GOLDEN / "images" / "square336.png").convert("RGB")])
    kept = other.look(Setting(QUESTION, keep="16")).mask()
    assert desk.look(Setting(QUESTION, keep="16")).mask().ne(kept).any()
    assert other.look(Setting(QUESTION, keep="16")).mask().equal(kept)


def test_a_listener_hears_the_stages_and_ends_the_answer(desk):
    heard = []

    class Listener(Silent):
        def stage(self, name):
            heard.append(name)

        def text(self, piece, end):
            if not end:
                raise Stopped

    look = desk.look(Setting(QUESTION, keep="16"), Listener())
    assert heard == ["vision", "selection", "answer"]
    assert look.stopped
    assert as_dict(desk.comparison([look]))["looks"][0]["stopped"]

    class Gone(Silent):
        def stage(self, name):
            raise Stopped

    with pytest.raises(Stopped):
        desk.look(Setting(QUESTION), Gone())
    assert not desk.look(Setting(QUESTION)).stopped  # the room is free again


def test_tiles_stand_in_their_grid():
    desk = room_of(V16).desk()
    desk.show("land.png", [Image.open(PICTURE).convert("RGB")])
    assert desk.tokens_of_view() == 576
    look = desk.look(Setting(QUESTION, keep="16"))
    (picture,) = look.pictures
    assert [view.title for view in picture.views] == ["overview", "tile 1", "tile 2", "tile 3", "tile 4"]
    assert picture.grid == (2, 2)
    assert [int(view.kept.sum()) for view in picture.views] == [16] * 5
    assert all(view.order[view.kept].sort().values.equal(torch.arange(16)) for view in picture.views)
    together = desk.look(Setting(QUESTION, keep="16", options=("scope=global",)))
    steps = torch.cat([view.order[view.kept] for view in together.pictures[0].views])
    assert steps.sort().values.equal(torch.arange(80))  # one order over all views
    html = document("t", [("h", desk.comparison([look, together]))])
    assert 'class="sv-tiles" style="--columns:2"' in html
    assert html.count("data:image/jpeg") == 5  # once, whatever the number of looks


def test_frames_of_a_video_are_a_strip(video):
    desk = room_of(str(video / "checkpoints" / "llava-video-tiny-qwen2")).desk()
    frames = [Image.fromarray(np.full((40, 40, 3), shade, np.uint8)) for shade in (20, 120, 220)]
    desk.show("clip.mp4", video=Video(frames, [0, 1, 2]))
    look = desk.look(Setting(QUESTION, "uniform", "16"))
    assert look.pictures[0].is_video
    assert [view.title for view in look.pictures[0].views] == ["frame 1", "frame 2", "frame 3"]
    assert 'class="sv-strip"' in fragment(desk.comparison([look]), "c")
    look = desk.look(Setting(QUESTION, keep="8", options=("scope=global",)))
    assert look.kept == 24
    own = desk.session.last_prompt.kept[0].mask()
    assert torch.stack([view.kept.flatten() for view in look.pictures[0].views]).equal(own)
    closest = torch.stack([view.closest.flatten() for view in look.pictures[0].views])
    assert own.flatten()[closest.flatten()].all()  # counted over all frames


def test_steps_and_closest_tokens():
    kept = torch.tensor([True, False, True, True, False])
    assert steps_of(torch.tensor([7, 0, 2, 9, 1]), kept).tolist() == [1, -1, 0, 2, -1]
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(30) % 4 == 0
    closest, cosine = closest_kept(features, kept)
    every = cosine_similarity(features[None])[0].fill_diagonal_(-2).masked_fill(~kept, -2)
    assert closest.equal(every.argmax(1))
    assert torch.allclose(cosine, every.amax(1), atol=1e-6)
    assert closest_kept(features, torch.zeros(30, dtype=torch.bool))[0].eq(-1).all()
    assert closest_kept(features, torch.arange(30) == 3)[0][3] == -1


def test_comparisons(desk):
    looks = [desk.look(Setting(QUESTION, name, "16")) for name in ("grid", "uniform", "grid")]
    comparison = desk.comparison(looks)
    overlap = comparison.overlap()
    assert overlap[0, 2] == 1
    assert overlap.equal(overlap.T)
    first, second = looks[0].mask(), looks[1].mask()
    assert overlap[0, 1] == pytest.approx(((first & second).sum() / (first | second).sum()).item())
    assert comparison.varying() == ["method"]
    for count in (0, 7):
        with pytest.raises(ValueError, match="one to 6 looks"):
            Comparison("p", "m", tuple(looks[:1] * count))


def test_html_holds_all_it_needs_and_nothing_foreign(desk):
    nasty = '<script>alert(1)</script> "quoted" </script> ${1+1}'
    desk.name = nasty
    html = document(nasty, [(nasty, desk.compare([Setting(nasty, keep="16")]))], nasty)
    assert "<script>alert" not in html
    assert html.count("<script") == html.count("</script>") == 1
    assert not re.findall(r'(?:src|href)="?http|@import|url\((?!data:)', html.replace("background-image:url", ""))
    said = json.loads(unescape(re.search(r'<div class="sv-data" hidden>(.*?)</div>', html, re.DOTALL).group(1)))
    assert said["looks"][0]["question"] == nasty
    view = said["looks"][0]["pictures"][0]["views"][0]
    assert len(view["kept"]) == len(view["order"]) == 16
    assert len(view["scores"]["relevance"]) == 576
    dark = re.search(r'<path d="([^"]*)"', html).group(1)
    assert sum(map(int, re.findall(r"h(\d+)v", dark))) == 576 - 16


def test_settings_are_written_and_read_in_addresses():
    setting = Setting("Is 1 + 1 = 2 & so on?", "script", "auto:0.9", ("tau=0.3", "gsp=false"))
    query = setting.query("a picture")
    assert Setting.from_query(parse_qs(query[1:])) == setting
    assert parse_qs(query[1:])["picture"] == ["a picture"]
    for wrong in (
        {},
        {"method": "nope"},
        {"keep": "0"},
        {"keep": "many"},
        {"options": ("tau=9",)},
        {"question": "x" * 2001},
    ):
        with pytest.raises(ValueError, match=r"\S"):
            Setting(**({"question": "q"} | wrong if wrong else {"question": " "}))
    assert parse_entry("script tau=0.3 gsp=false") == ("script", ("tau=0.3", "gsp=false"))
    with pytest.raises(ValueError, match="unknown pruner"):
        parse_entry("")


def test_every_option_of_every_method_has_a_field_with_help():
    for name in list_pruners():
        options = {option.name: option for option in options_of(name)}
        assert "keep_tokens" not in options
        for option in options.values():
            assert option.help, (name, option.name)
            assert get_pruner(name) == get_pruner(name, **written_default(name, option))
    script = {option.name: option for option in options_of("script")}
    assert script["graph"].choices == ("bipartite", "exhaustive")
    assert script["gsp"].kind == "switch"
    assert next(iter(script)) == "gsp_ratio"


def written_default(name, option):
    return parse_options(name, [f"{option.name}={option.default}"])


def test_uploads_go_through_the_checks_of_every_picture(tmp_path):
    good = PICTURE.read_bytes()
    (picture,), video = read_upload(good, "a.png", 10**7, 4)
    assert picture.size == (640, 480)
    assert video is None
    with pytest.raises(ValueError, match="more than the limit"):
        read_upload(good, "a.png", 1000, 4)
    for data, name in ((b"no picture", "a.png"), (good[:2000], "b.png"), (b"%!PS-Adobe", "c.eps"), (b"junk", "d.mp4")):
        with pytest.raises(ValueError, match=name) as raised:
            read_upload(data, name, 10**7, 4)
        assert "/" not in str(raised.value).replace(" / ", "")


def test_models_of_the_library_show_the_same(tmp_path):
    convert(str(TOY_FOLDER / "llava-toy-v1.5"), tmp_path / "toy")
    picture = load_image(sorted((TOY_FOLDER / "data/eval/MME/MME_Benchmark_release_version/color").glob("*.png"))[0])
    side = min(picture.size)
    # The library's class does not tell which patches show only padding.
    picture = picture.crop((0, 0, side, side)).resize((336, 336))
    looks, desks = [], []
    for flags in (("--hf", "--clip-path", str(TOY_FOLDER / "clip-toy-336")), ()):
        desk = room_of(str(tmp_path / "toy") if flags else str(TOY_FOLDER / "llava-toy-v1.5"), *flags).desk()
        desk.show("scene", [picture])
        looks.append([desk.look(Setting("What color is the star?", keep=keep)) for keep in ("16", "full")])
        desks.append(desk)
    for theirs, ours in zip(*looks, strict=True):
        assert theirs.answer == ours.answer
        assert theirs.mask().equal(ours.mask())
        (view,), (own,) = theirs.pictures[0].views, ours.pictures[0].views
        assert np.abs(view.colours.astype(int) - own.colours).max() <= 1
    for look in looks[0]:
        assert "/" not in look.reads
    view, own = (each[0].pictures[0].views[0] for each in looks)
    assert view.order.equal(own.order)
    assert set(view.scores) == set(own.scores) == {"redundancy", "kept_by_gsp", "relevance"}
    assert view.closest.equal(own.closest)
    assert torch.allclose(view.cosine, own.cosine, atol=1e-4)
    first, again = looks[0][0], desks[0].look(Setting("What color is the star?", keep="16"))
    assert first.seconds["vision"] > 0
    assert again.seconds["vision"] == 0  # the features are there
    assert again.answer == first.answer
    assert again.pictures[0].views[0].closest.equal(view.closest)
    asked = own.scores["relevance"] > 0  # ours leaves padding out before it scales
    both = torch.stack([one.scores["relevance"][asked] for one in (view, own)])
    assert torch.corrcoef(both)[0, 1] > 0.9999


def test_tiles_of_models_of_the_library(tmp_path):
    convert(str(CHECKPOINTS / "llava-v1.6-vicuna-tiny"), tmp_path / "tiny")
    desk = room_of(str(tmp_path / "tiny"), "--hf").desk()
    desk.show("wide.png", [Image.open(GOLDEN / "images" / "wide1000x400.png").convert("RGB")])
    each = desk.look(Setting(QUESTION, "divprune", "4")).pictures[0]
    assert desk.tokens_of_view() == each.views[0].kept.numel()
    sizes = [view.kept.numel() for view in each.views]
    for number, view in enumerate(each.views):
        assert view.order[view.kept].sort().values.equal(torch.arange(4))
        first = sum(sizes[:number])  # the nearest kept token is one of the same view
        near = view.closest[view.closest >= 0] - first
        assert view.kept.flatten()[near].all()
    together = desk.look(Setting(QUESTION, keep="4", options=("scope=global", "relevance=none")))
    (picture,) = together.pictures
    steps = torch.cat([view.order[view.kept] for view in picture.views])
    assert steps.sort().values.equal(torch.arange(len(steps)))
    closest = torch.cat([view.closest.flatten() for view in picture.views])
    assert together.mask()[closest[closest >= 0]].all()


def test_one_call_of_the_model_runs_at_a_time(room, desk):
    running, most = [], []

    class Listener(Silent):
        def stage(self, name):
            if name == "answer":
                running.append(1)
                most.append(len(running))

        def text(self, piece, end):
            if end:
                running.pop()

    other = room.desk()
    other.show("land.png", [Image.open(PICTURE).convert("RGB")])
    threads = [
        threading.Thread(target=one.look, args=(Setting(QUESTION, keep="16"), Listener())) for one in (desk, other) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_a_gallery_is_written_from_a_list_and_from_flags(tmp_path, capsys):
    (tmp_path / "land.png").write_bytes(PICTURE.read_bytes())
    looks = [{"question": QUESTION, "keep": 16}, {"question": QUESTION, "method": "grid", "keep": 16}]
    (tmp_path / "list.json").write_text(json.dumps([{"title": "One", "image": "land.png", "looks": looks}]))
    common = ["--model-path", V15, "--device", "cpu", "--max-new-tokens", "3", "--out", str(tmp_path / "out.html")]
    assert gallery.main([*common, "--list", str(tmp_path / "list.json")]) == 0
    html = (tmp_path / "out.html").read_text()
    assert html.count('class="sv-look"') == 2
    assert str(tmp_path) not in html
    crossed = ["--image-file", str(PICTURE), "--query", QUESTION, "--pruner", "grid", "uniform", "--keep-tokens", "4"]
    assert gallery.main([*common, *crossed]) == 0
    wrong = (
        ["--list", str(tmp_path / "list.json"), "--query", "q"],
        ["--image-file", str(PICTURE)],
        [*crossed, "5", "6", "7"],
        [*crossed[:4], "--pruner", "nope"],
    )
    for arguments in wrong:
        assert gallery.main([*common, *arguments]) == 2
    for entries in ([], [{}], [{"image": "a", "looks": []}], [{"image": "a", "looks": [{"quest": "q"}]}]):
        (tmp_path / "list.json").write_text(json.dumps(entries))
        assert gallery.main([*common, "--list", str(tmp_path / "list.json")]) == 2
    assert "error: " in capsys.readouterr().err
