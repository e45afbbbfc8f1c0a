"""data.video: files of every make become the frames that were drawn, or a reason."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from gkdcli.data.video import BadVideo, VideoReader, probe, read_frames, stored_size
from gkdcli.settings import DataSettings
from tests.videos import Frames, draw, psnr, write_sound, write_video

NATIVE = DataSettings(short_side=0)
RAW = DataSettings(short_side=0, storage="raw")


def _decoded(jpegs: list[bytes]) -> Frames:
    pictures = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) for jpeg in jpegs]
    return np.stack(pictures).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "codec", "least_db"),
    [("a.mp4", "libx264", 30), ("a.avi", "mpeg4", 28), ("a.mkv", "ffv1", 30), ("a.webm", "libvpx", 25)],
)
def test_frames_are_those_drawn_in_order(tmp_path: Path, name: str, codec: str, least_db: float) -> None:
    drawn = draw()
    path = write_video(tmp_path / name, drawn, codec=codec)
    read = _decoded([frame for frame in read_frames(path, NATIVE) if isinstance(frame, bytes)])
    assert read.shape == drawn.shape
    for place in range(len(drawn)):
        scores = [psnr(read[place], picture) for picture in drawn]
        assert np.argmax(scores) == place
        assert scores[place] > least_db


def test_probe_says_what_was_written(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "a.mp4", draw(50), fps=20))
    assert (info.codec, info.width, info.height, info.fps) == ("h264", 64, 48, 20)
    assert (info.frames, info.duration_sec, info.rotation) == (50, 2.5, 0)


def test_jpegs_are_decoded_by_torchvision_to_the_same_pixels(tmp_path: Path) -> None:
    import torch
    from torchvision.io import decode_jpeg

    path = write_video(tmp_path / "a.mp4", draw(3))
    jpegs = [frame for frame in read_frames(path, NATIVE) if isinstance(frame, bytes)]
    ours = decode_jpeg(torch.frombuffer(bytearray(jpegs[1]), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - _decoded(jpegs)[1]).max() <= 2


def test_raw_frames_are_rgb_and_close_to_jpeg(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", draw(3))
    raw = np.stack([frame for frame in read_frames(path, RAW) if isinstance(frame, np.ndarray)])
    jpeg = _decoded([frame for frame in read_frames(path, NATIVE) if isinstance(frame, bytes)])
    assert raw.dtype == np.uint8
    assert psnr(raw, jpeg) > 35


def test_quality_is_a_trade_of_bytes_for_likeness(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", draw(2, 128, 96))
    low, high = (
        sum(len(frame) for frame in read_frames(path, DataSettings(short_side=0, jpeg_quality=quality)))
        for quality in (60, 98)
    )
    assert low < 0.7 * high


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_turned_videos_are_read_upright(tmp_path: Path, turn: int) -> None:
    drawn = draw(3)
    path = write_video(tmp_path / "a.mp4", drawn, rotation=turn)
    read = next(frame for frame in read_frames(path, RAW) if isinstance(frame, np.ndarray))
    assert psnr(read, np.rot90(drawn[0], turn // 90)) > 30
    info = probe(path)
    assert (info.rotation, info.width, info.height) == (turn, read.shape[1], read.shape[0])


@pytest.mark.parametrize(("width", "height"), [(65, 49), (17, 16), (64, 2)])
def test_odd_sizes_are_kept(tmp_path: Path, width: int, height: int) -> None:
    drawn = draw(4, width, height)
    path = write_video(tmp_path / "a.mp4", drawn)
    read = np.stack([frame for frame in read_frames(path, RAW) if isinstance(frame, np.ndarray)])
    assert read.shape == drawn.shape
    assert len(list(read_frames(path, NATIVE))) == 4


@pytest.mark.parametrize(
    ("width", "height", "settings", "expected"),
    [
        (320, 240, {"short_side": 0}, (320, 240)),
        (321, 241, {"short_side": 0}, (321, 241)),
        (340, 256, {"short_side": 256}, (340, 256)),
        (1920, 1080, {"short_side": 256}, (456, 256)),
        (1080, 1920, {"short_side": 256}, (256, 456)),
        (320, 240, {"short_side": 256}, (342, 256)),
        (100, 100, {"short_side": 33}, (33, 33)),
        (640, 480, {"size": [112, 112], "short_side": 256}, (112, 112)),
    ],
)
def test_stored_size(width: int, height: int, settings: dict[str, object], expected: tuple[int, int]) -> None:
    assert stored_size(width, height, DataSettings.model_validate(settings)) == expected


def test_too_elongated_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(BadVideo, match="more than fits"):
        list(read_frames(write_video(tmp_path / "a.mp4", draw(2, 400, 2)), DataSettings()))


def test_scaled_frames_look_like_scaled_drawings(tmp_path: Path) -> None:
    drawn = draw(3, 160, 120)
    path = write_video(tmp_path / "a.mp4", drawn)
    for settings in ({"short_side": 60}, {"size": [80, 60]}):
        data = DataSettings.model_validate({"storage": "raw", **settings})
        read = next(frame for frame in read_frames(path, data) if isinstance(frame, np.ndarray))
        small = cv2.resize(drawn[0], (80, 60), interpolation=cv2.INTER_AREA).astype(np.uint8)
        assert read.shape == small.shape
        assert psnr(read, small) > 28


@pytest.mark.parametrize("turn", [0, 90])
def test_an_exact_size_is_pillows_bicubic_to_the_bit(tmp_path: Path, turn: int) -> None:
    """The published arrays were made so (METHOD.md 7)."""
    path = write_video(tmp_path / "a.mp4", draw(3, 160, 120), rotation=turn)
    native = [frame for frame in read_frames(path, RAW) if isinstance(frame, np.ndarray)]
    data = DataSettings(size=[56, 40], storage="raw")
    with VideoReader(path) as video:
        assert video.scaling(data) == ("PIL bicubic", 56, 40)
    for whole, small in zip(native, read_frames(path, data), strict=True):
        wanted = Image.fromarray(whole).resize((56, 40), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(small, np.asarray(wanted))


def _kept(path: Path, fps: float) -> list[int]:
    every = [frame for frame in read_frames(path, RAW) if isinstance(frame, np.ndarray)]
    data = DataSettings(short_side=0, storage="raw", fps=fps)
    kept = [frame for frame in read_frames(path, data) if isinstance(frame, np.ndarray)]
    return [next(i for i, frame in enumerate(every) if np.array_equal(frame, picture)) for picture in kept]


def test_sampling_keeps_a_frame_when_the_count_reaches_the_quotient(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", draw(20), fps=25)
    assert _kept(path, 10) == [2, 4, 7, 9, 12, 14, 17, 19]  # METHOD.md 7, by hand: 2.5, carried
    with VideoReader(path) as video:
        assert video.sampling(DataSettings(fps=10)) == ("one frame in 2.5", 10)


def test_a_slower_video_keeps_every_frame_and_says_so(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", draw(7), fps=6)
    assert _kept(path, 10) == list(range(7))
    with VideoReader(path) as video:
        words, fps = video.sampling(DataSettings(fps=10))
    assert fps == 6
    assert "every frame" in words
    assert "6 frames/s" in words


def test_a_variable_frame_rate_gives_every_frame_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", draw(20), fps=25, durations=[1, 3] * 10)
    assert len(list(read_frames(path, NATIVE))) == 20
    assert probe(path).fps == pytest.approx(12.5, rel=0.1)


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    assert len(list(read_frames(write_video(tmp_path / "a.mp4", draw(1)), NATIVE))) == 1


def test_no_frame_left_by_sampling_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(BadVideo, match="too short"):
        list(read_frames(write_video(tmp_path / "a.mp4", draw(2)), DataSettings(short_side=0, fps=5)))


@pytest.mark.parametrize("color_range", ["tv", "pc"])
@pytest.mark.parametrize("space", ["bt709", "smpte170m"])
def test_colours_follow_the_tags_of_the_file(tmp_path: Path, color_range: str, space: str) -> None:
    """Range and matrix are honoured: a red of (200, 40, 60) comes back whatever the file's convention."""
    red = np.full((2, 48, 64, 3), (200, 40, 60), np.uint8)
    path = tmp_path / "a.mp4"
    full = color_range == "pc"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        matrix = 1 if space == "bt709" else 6
        stream.codec_context.color_range = 2 if full else 1
        stream.codec_context.colorspace = matrix
        for picture in red:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=matrix, dst_color_range=2 if full else 1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read = next(frame for frame in read_frames(path, RAW) if isinstance(frame, np.ndarray))
    assert np.abs(read.astype(int) - red[0]).max() <= 6


def _bad(tmp_path: Path, make: str) -> Path:
    good = write_video(tmp_path / "good.mp4", draw(100), options={"g": "10"}).read_bytes()
    path = tmp_path / "bad.mp4"
    match make:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"no video " * 300)
        case "cut":
            path.write_bytes(good[: len(good) // 2])
        case "cut avi":
            path = write_video(tmp_path / "bad.avi", draw(100), codec="mpeg4")
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "cut mkv":
            path = write_video(tmp_path / "bad.mkv", draw(100))
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "cut, moov first":
            write_video(path, draw(100))
            _faststart(path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "noise":
            noise = bytearray(good)
            noise[3000 : len(noise) - 6000] = np.random.default_rng(0).bytes(len(noise) - 9000)
            path.write_bytes(noise)
        case "sound":
            write_sound(path)
        case "playlist":
            path.write_bytes(b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
        case "folder":
            path.mkdir()
    return path


def _faststart(path: Path) -> None:
    with (
        av.open(str(path)) as source,
        av.open(str(path) + ".mp4", "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    Path(str(path) + ".mp4").replace(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ("empty", "an empty file"),
        ("text", "not a video"),
        ("cut", "not a video"),
        ("cut avi", "truncated: .* of 100 frames"),
        ("cut mkv", "truncated: .* of 4.0 s"),
        ("cut, moov first", "truncated|damaged"),
        ("noise", "damaged|no frame"),
        ("sound", "no video stream"),
        ("playlist", "not a video|no video stream"),
        ("folder", "not a video"),
        ("gone", "the file has disappeared"),
    ],
)
def test_bad_files_are_a_reason_in_one_line(
    tmp_path: Path, make: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadVideo, match=reason) as caught:
        list(read_frames(_bad(tmp_path, make), NATIVE))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["-dash.mp4", "with space.mp4", "日本 ü.mp4", "a:b%d#?.mp4", "http:x.mp4"])
def test_awkward_file_names_open(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", draw(2)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert probe(Path(name)).frames == 2
