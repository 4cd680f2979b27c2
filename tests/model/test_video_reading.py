"""Videos from files and folders: which frames, when, and a clear word about what cannot be read."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from llava.model.multimodal_encoder.siglip_encoder import SiglipImageProcessor
from llava.video import Video, format_times, load_video, process_video, sample_frames, time_instruction
from records import GOLDEN, golden_bytes

SAMPLING = json.loads(golden_bytes(GOLDEN / "video/records/frame_sampling.json"))
CASES = json.loads(golden_bytes(GOLDEN / "video/records/llava_video.json"))


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="PyAV is not installed: nothing that reads video files is tested")


def grey(number, side=32):
    """A frame that tells its number by its colour."""
    return Image.new("RGB", (side, side), (8 * number,) * 3)


def number_of(frame):
    return round(np.asarray(frame).mean() / 8)


def write_video(av, path, frames, rate=5, stamps=None):
    """A file of grey frames; ``stamps`` in units of 1 / rate give it a variable rate."""
    codec, pixel_format = ("mpeg4", "yuv420p") if path.suffix == ".mp4" else ("ffv1", "yuv444p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = pixel_format
        container.start_encoding()
        for i in range(frames):
            frame = av.VideoFrame.from_image(grey(i))
            frame.pts = i if stamps is None else stamps[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(av, path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# --- which frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [entry for entry in SAMPLING if "error" not in entry], ids=str)
def test_recorded_sampling(entry):
    total, fps = entry["total_frames"], entry["average_fps"]
    indices, times = sample_frames(total, fps, entry["max_frames"], entry["video_fps"], entry["force_sample"])
    assert indices == entry["frame_indices"]
    assert format_times(times) == entry["frame_time"]
    assert total / fps == pytest.approx(entry["video_time"], rel=1e-9)


def test_slow_videos_take_every_frame():
    """Where the reference fails: its step rounds to zero."""
    assert sample_frames(5, 0.4, 8, 1, False) == ([0, 1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("values, name", [((0, 1, 4), "total"), ((4, 0, 4), "fps"), ((4, 1, 0), "most")])
def test_nothing_to_sample(values, name):
    with pytest.raises(ValueError, match=f"needs a positive {name}, got 0"):
        sample_frames(*values)


def test_the_sentence_about_times_is_the_recorded_one():
    prompt = CASES["grid_average_A_time_demo"]["prompts"][0]
    sentence = next(line for line in prompt.split("\n") if line.startswith("The video lasts"))
    duration, times = sentence.split(" seconds")[0].split()[-1], sentence.split("located at ")[1].split(".Please")[0]
    assert time_instruction(float(duration), [float(time.rstrip("s")) for time in times.split(",")]) == sentence


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i in range(1, 13):
        grey(i).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    return tmp_path


def test_a_folder_is_read_by_number_and_spread_evenly(folder):
    video = load_video(folder, 4)
    assert [number_of(frame) for frame in video.frames] == [1, 4, 8, 12]
    assert video.indices == [0, 3, 7, 11]
    assert video.times is None
    assert video.time_instruction is None


def test_fewer_frames_than_asked(folder, caplog):
    assert [number_of(frame) for frame in load_video(folder, 24).frames[:4]] == [1, 1, 1, 2]
    assert "has only 12 frames, 24 were asked for: frames are repeated" in caplog.text
    assert len(load_video(folder, 24, force=False).frames) == 12


def test_a_bad_frame_in_a_folder_is_named(folder):
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"7\.png is (not an image|a damaged)"):
        load_video(folder, 12)


def test_an_empty_folder_and_nothing_at_all(tmp_path):
    with pytest.raises(ValueError, match="holds no frames: expected pictures"):
        load_video(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="no video file or folder of frames at"):
        load_video(tmp_path / "gone.mp4", 4)
    with pytest.raises(ValueError, match="at least one frame, got 0"):
        load_video(tmp_path, 0)


def test_frames_become_pixels_of_the_tower():
    half = [0.5] * 3
    processor = SiglipImageProcessor(size={"height": 384, "width": 384}, resample=3, image_mean=half, image_std=half)
    pixels = process_video(Video([grey(0), grey(31)], [0, 1]), processor)
    assert pixels.shape == (2, 3, 384, 384)
    assert torch.equal(pixels[0], torch.full((3, 384, 384), -1.0))


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
def test_a_file_gives_the_sampled_frames(av, tmp_path, name):
    path = write_video(av, tmp_path / name, 20)
    video = load_video(path, 4)
    assert video.indices == [0, 6, 12, 19]
    assert [number_of(frame) for frame in video.frames] == video.indices
    assert video.times == pytest.approx([0, 1.2, 2.4, 3.8])
    assert video.duration == pytest.approx(4.0)
    assert "lasts for 4.00 seconds, and 4 frames" in video.time_instruction
    every_second = load_video(path, 64, force=False)
    assert [number_of(frame) for frame in every_second.frames] == [0, 5, 10, 15]
    assert [number_of(frame) for frame in load_video(path, 25).frames][:3] == [0, 0, 1]


def test_a_file_and_the_folder_of_its_frames_agree(av, tmp_path):
    path = write_video(av, tmp_path / "clip.mkv", 9)
    (tmp_path / "frames").mkdir()
    for i in range(9):
        grey(i).save(tmp_path / "frames" / f"{i}.png")
    one, other = load_video(path, 4), load_video(tmp_path / "frames", 4)
    assert [number_of(frame) for frame in one.frames] == [number_of(frame) for frame in other.frames]


def test_a_variable_frame_rate_is_told(av, tmp_path, caplog):
    path = write_video(av, tmp_path / "clip.mkv", 6, rate=10, stamps=[0, 1, 2, 10, 11, 30])
    video = load_video(path, 6)
    assert [number_of(frame) for frame in video.frames] == list(range(6))
    assert "variable frame rate" in caplog.text


def test_sound_alone_and_broken_files(av, tmp_path):
    with pytest.raises(ValueError, match=r"sound\.wav holds no video, only audio"):
        load_video(write_sound(av, tmp_path / "sound.wav"), 4)
    for name, content in (("empty.mp4", b""), ("text.mp4", b"no video at all" * 50)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a video that can be read"):
            load_video(tmp_path / name, 4)
    header = write_video(av, tmp_path / "none.mkv", 0)
    with pytest.raises(ValueError, match=r"none\.mkv (holds no|is not a video)"):
        load_video(header, 4)


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile secret.mkv\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nsecret.mkv\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    '<Representation id="1"><BaseURL>secret.mkv</BaseURL></Representation></AdaptationSet></Period></MPD>\n',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "mpd", "ffconcat"])
def test_a_file_that_names_others_reads_none_of_them(av, tmp_path, monkeypatch, kind, suffix):
    monkeypatch.chdir(tmp_path)
    write_video(av, tmp_path / "secret.mkv", 4)
    clip = tmp_path / f"clip.{suffix}"
    clip.write_text(PLAYLISTS[kind])
    with pytest.raises(ValueError, match=rf"clip\.{suffix} is not a video that can be read"):
        load_video(clip, 2)


def test_a_name_is_no_protocol(av, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(av, tmp_path / "one.mkv", 4).rename("concat:one.mkv")
    assert len(load_video("concat:one.mkv", 2).frames) == 2


def test_frames_that_would_not_fit_are_refused(av, tmp_path, monkeypatch):
    path = write_video(av, tmp_path / "clip.mkv", 8)
    (tmp_path / "frames").mkdir()
    for i in range(8):
        grey(i).save(tmp_path / "frames" / f"{i}.png")
    monkeypatch.setattr("llava.video.MAX_CLIP_PIXELS", 5 * 32 * 32)
    for source in (path, tmp_path / "frames"):
        assert len(load_video(source, 5).frames) == 5
        with pytest.raises(ValueError, match="6 frames of 32 x 32 pixels are more than the limit"):
            load_video(source, 6)


def test_a_file_that_breaks_off_is_refused_or_read_to_where_it_does(av, tmp_path):
    whole = write_video(av, tmp_path / "whole.mkv", 12)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: len(whole.read_bytes()) // 2])
    video = load_video(cut, 3)
    assert 0 < video.indices[-1] < 11
    assert [number_of(frame) for frame in video.frames] == video.indices


def test_without_pyav_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"1")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "script-llava\[video\]"'):
        load_video(tmp_path / "clip.mp4", 4)
