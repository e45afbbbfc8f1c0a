"""data.images: extracted images in the layouts people have, kept byte for byte where settings allow."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from gkdcli.data.images import FrameFolder, jpeg_size
from gkdcli.data.video import BadVideo, decode
from gkdcli.settings import DataSettings
from tests.videos import draw, psnr

NATIVE = DataSettings(short_side=0)


def write_images(
    folder: Path, count: int = 6, kind: str = "image", first: int = 1, width: int = 64, height: int = 48
) -> Path:
    """`image_00001.jpg`, ...; flow is grey."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, picture in enumerate(draw(count, width, height)):
        pixels = picture[:, :, 0] if kind.startswith("flow") else picture[:, :, ::-1]
        cv2.imwrite(str(folder / f"{kind}_{place + first:05d}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return folder


@pytest.mark.parametrize(("kind", "first"), [("image", 1), ("img", 1), ("img", 0)])
def test_images_are_kept_byte_for_byte(tmp_path: Path, kind: str, first: int) -> None:
    write_images(tmp_path, kind=kind, first=first)
    (tmp_path / "n_frames").write_text("6\n")
    with FrameFolder(tmp_path) as video:
        assert (video.info.width, video.info.height, video.info.frames, video.info.fps) == (64, 48, 6, 0.0)
        stored = [picture.stored(NATIVE) for picture in video.pictures(NATIVE)]
    assert stored == [path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))]
    assert video.read == 6


def test_other_sizes_and_raw_stores_decode_them(tmp_path: Path) -> None:
    write_images(tmp_path)
    small = DataSettings(short_side=24)
    with FrameFolder(tmp_path) as video:
        pictures = [picture.stored(small) for picture in video.pictures(small)]
    assert isinstance(pictures[0], bytes)
    assert decode(pictures[0]).shape == (24, 32, 3)
    raw = DataSettings(short_side=0, storage="raw")
    with FrameFolder(tmp_path) as video:
        rgb = np.stack([np.asarray(picture.stored(raw)) for picture in video.pictures(raw)])
    assert psnr(rgb, draw(6)) > 28  # red is red


def test_an_exact_size_is_pillows_bicubic_to_the_bit(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = DataSettings(size=[40, 20], storage="raw")
    with FrameFolder(tmp_path) as video:
        assert video.scaling(data) == ("PIL bicubic", 40, 20)
        pictures = [picture.stored(data) for picture in video.pictures(data)]
    paths = sorted(tmp_path.glob("*.jpg"))
    for path, small in zip(paths, pictures, strict=True):
        whole = Image.fromarray(decode(path.read_bytes())[:, :, ::-1])
        np.testing.assert_array_equal(small, np.asarray(whole.resize((40, 20), Image.Resampling.BICUBIC)))


def test_flow_is_kept_too_and_the_last_repeated(tmp_path: Path) -> None:
    write_images(tmp_path, 6, "img")
    for kind in ("flow_x", "flow_y"):
        write_images(tmp_path, 5, kind)
    with FrameFolder(tmp_path) as video:
        assert video.has_flow
        flow = list(video.flows(NATIVE))
    assert len(flow) == 6
    assert flow[5] == flow[4] != flow[3]
    assert flow[2] == tuple((tmp_path / f"flow_{axis}_00003.jpg").read_bytes() for axis in "xy")
    with FrameFolder(tmp_path) as video:
        raw = list(video.flows(DataSettings(short_side=24, storage="raw")))
    assert np.asarray(raw[0]).shape == (24, 32, 2)


def _bad(folder: Path, make: str) -> Path:
    write_images(folder)
    third = folder / "image_00003.jpg"
    match make:
        case "gap":
            third.unlink()
        case "late start":
            (folder / "image_00001.jpg").unlink()
        case "n_frames":
            (folder / "n_frames").write_text("7")
        case "n_frames text":
            (folder / "n_frames").write_text("six")
        case "two layouts":
            write_images(folder, 2, "img")
        case "truncated":
            third.write_bytes(third.read_bytes()[:-200])
        case "empty":
            third.write_bytes(b"")
        case "png":
            third.write_bytes(cv2.imencode(".png", draw(1)[0])[1].tobytes())
        case "size":
            write_images(folder / "other", 3, width=32, height=32)
            (folder / "other" / "image_00003.jpg").replace(third)
        case "same number":
            (folder / "image_3.jpg").write_bytes(third.read_bytes())
        case "flow count":
            write_images(folder, 3, "flow_x")
            write_images(folder, 3, "flow_y")
        case "flow x alone":
            write_images(folder, 5, "flow_x")
        case "huge" | "no scan":
            jpeg = third.read_bytes()
            start = jpeg.index(b"\xff\xc0")
            sides = (60000).to_bytes(2) * 2 if make == "huge" else jpeg[start + 5 : start + 9]
            scan = jpeg.index(b"\xff\xda") if make == "no scan" else len(jpeg) - 2
            third.write_bytes(jpeg[: start + 5] + sides + jpeg[start + 9 : scan] + b"\xff\xd9")
            if make == "huge":
                for path in folder.iterdir():
                    path.write_bytes(third.read_bytes())
        case "flow numbers":
            write_images(folder, 5, "flow_x", first=0)
            write_images(folder, 5, "flow_y", first=1)
        case "nothing":
            for path in folder.iterdir():
                path.unlink()
    return folder


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ("gap", "image 3 is missing after image_00002.jpg"),
        ("late start", "image 1 is missing"),
        ("n_frames", "n_frames says '7', 6 images are there"),
        ("n_frames text", "n_frames says 'six'"),
        ("two layouts", "two layouts"),
        ("truncated", "image_00003.jpg is truncated"),
        ("empty", "image_00003.jpg is empty"),
        ("png", "image_00003.jpg is no JPEG file"),
        ("size", "image_00003.jpg is 32x32, the first image 64x48"),
        ("same number", "two images have the number 3"),
        ("flow count", "3 images of flow for 6 frames"),
        ("huge", "60000x60000 would be stored 60000x60000, more than fits"),
        ("no scan", "cannot be decoded"),
        ("flow numbers", "only one has number 0"),
        ("flow x alone", "5 images of flow x, 0 of flow y"),
        ("nothing", "no image_"),
    ],
)
def test_what_is_wrong_is_a_reason_in_one_line(tmp_path: Path, make: str, reason: str) -> None:
    with pytest.raises(BadVideo, match=reason) as caught, FrameFolder(_bad(tmp_path, make)) as video:
        list(video.pictures(NATIVE))
    assert "\n" not in str(caught.value)


def test_scaled_flow_is_as_much_faster(tmp_path: Path) -> None:
    """Twice the picture is twice as many px per frame; 127.5 is no motion."""
    for kind in ("flow_x", "flow_y"):
        for number in (1, 2):
            picture = np.full((48, 64), 148, np.uint8)
            cv2.imwrite(str(tmp_path / f"{kind}_{number:05d}.jpg"), picture)
    with FrameFolder(tmp_path) as video:
        (flow, _) = video.flows(DataSettings(size=[128, 48], storage="raw"))
    assert np.asarray(flow)[..., 0].mean() == pytest.approx(168, abs=1)
    assert np.asarray(flow)[..., 1].mean() == pytest.approx(148, abs=1)


def test_frames_cannot_be_chosen_by_an_unknown_rate(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(BadVideo, match="frame rate"), FrameFolder(tmp_path) as video:
        list(video.pictures(DataSettings(short_side=0, fps=10)))
    for kind in ("flow_x", "flow_y"):
        write_images(tmp_path, 5, kind)
    with pytest.raises(BadVideo, match="frame rate"), FrameFolder(tmp_path) as video:
        list(video.flows(DataSettings(short_side=0, fps=10)))


def test_sizes_come_from_the_header() -> None:
    for quality, progressive in ((50, 0), (95, 1)):
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
        colour = cv2.imencode(".jpg", draw(1, 70, 50)[0], options)[1].tobytes()
        grey = cv2.imencode(".jpg", draw(1, 70, 50)[0][:, :, 0], options)[1].tobytes()
        assert jpeg_size(colour, "a") == (70, 50, 3)
        assert jpeg_size(grey, "a") == (70, 50, 1)
