"""Videos in a search index: time stamps, frame rates, damage, and a real surveillance clip."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_search_index import CLIP, Lab, watch_estimates

from pab.core.errors import InputError
from pab.search.__main__ import main
from pab.search.index import Index
from pab.search.sources import VideoSource, clock_time, load_picture
from pab.search.video import frame_at, sampled_frames

# Installed by Debian's package opencv-doc, compressed or not.
VTEST = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")


def write_video(
    path: Path, times_ms: list[int], *, codec: str = "mpeg4", still: tuple[int, ...] = (),
    start_ms: int = 0, noise: bool = False, turn: int = 0,
) -> Path:  # fmt: skip
    """Write a video whose frames get brighter, except those that repeat the frame before.

    Args:
        path: file to write.
        times_ms: presentation time of each frame after ``start_ms``, milliseconds.
        codec: video codec.
        still: numbers of frames that look like the frame before.
        start_ms: offset of all presentation times in the file, milliseconds.
        noise: fill the frames with noise, so that packets are large.
        turn: rotation that a player applies, degrees counterclockwise.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn)
        level = 0
        for number, time in enumerate(times_ms):
            level = level if number in still else level + 10
            image = Image.new("RGB", (64, 48), (level, level, level))
            if noise:
                image = Image.effect_noise((64, 48), 100).convert("RGB")
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = start_ms + time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def level_of(image: Image.Image) -> int:
    """Return the brightness level of a frame of :func:`write_video`, from 1."""
    return round(float(np.asarray(image, dtype=np.float64).mean()) / 10)


REGULAR = [100 * number for number in range(20)]
VARIABLE = [0, 40, 80, 700, 720, 1500, 1501, 2400, 2999, 3000]


@pytest.mark.parametrize("times", [REGULAR, VARIABLE], ids=["regular", "variable"])
@pytest.mark.parametrize("start", [0, 5000])
@pytest.mark.parametrize("every", [0.0, 0.3, 0.7, 1.0])
def test_time_stamps_are_exact(tmp_path: Path, times: list[int], start: int, every: float) -> None:
    video = write_video(tmp_path / "v.mkv", times, start_ms=start)
    expected, due = [], 0.0
    for number, time in enumerate(times, start=1):
        if time / 1000 >= due - 1e-9:
            expected.append((number, time / 1000))
            while every and due <= time / 1000 + 1e-9:
                due += every
    frames = list(sampled_frames(video, every))
    found = [(level_of(frame.picture()), frame.time_s) for frame in frames]
    assert [number for number, _ in found] == [number for number, _ in expected]
    assert [time for _, time in found] == pytest.approx([time for _, time in expected], abs=1e-9)


@pytest.mark.parametrize("ending", ["mkv", "mp4", "avi"])
def test_a_frame_is_found_by_its_time_stamp(tmp_path: Path, ending: str) -> None:
    video = write_video(tmp_path / f"v.{ending}", REGULAR, start_ms=0)
    for frame in list(sampled_frames(video, 0.5)):
        assert level_of(frame_at(video, frame.time_s)) == level_of(frame.picture())
    with pytest.raises(InputError, match=r"expected a frame at 0\.155 s, found none"):
        frame_at(video, 0.155)
    with pytest.raises(InputError, match="expected a frame at 99"):
        frame_at(video, 99)


@pytest.mark.parametrize("ending", ["mkv", "mp4", "avi"])
@pytest.mark.parametrize("still", [(), range(10, 20)])
def test_the_number_of_frames_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, still: Sequence[int]
) -> None:
    lab, estimates = Lab(tmp_path), watch_estimates(monkeypatch)
    monkeypatch.setattr("pab.search.build.PICTURES", 2)
    video = write_video(tmp_path / f"v.{ending}", REGULAR, still=tuple(still))
    frames = lab.run(VideoSource([video], 0.1, distinct=bool(still))).rows
    assert estimates[-1] == (frames, frames)
    assert len(estimates) > frames // 2
    assert still or all(19 <= total <= 21 for _, total in estimates)


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_a_video_of_a_phone_is_turned_upright(tmp_path: Path, turn: int) -> None:
    video = write_video(tmp_path / "v.mp4", REGULAR, noise=True, turn=turn)
    (frame, *_) = sampled_frames(video, 0)
    stored = frame.decoded.to_image()
    way = {90: Image.Transpose.ROTATE_90, -90: Image.Transpose.ROTATE_270}
    expected = stored.transpose(way.get(turn, Image.Transpose.ROTATE_180))
    assert np.array_equal(frame.picture(), expected)
    assert np.array_equal(frame_at(video, frame.time_s), expected)


def test_near_identical_neighbours_are_left_out(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mkv", REGULAR, still=(1, 2, 3, 10, 11))
    every = [frame.time_s for frame in sampled_frames(video, 0)]
    kept = [frame.time_s for frame in sampled_frames(video, 0, distinct=True)]
    assert len(every) == 20
    assert not {0.1, 0.2, 0.3, 1.0, 1.1} & {round(time, 3) for time in kept}
    # Consecutive levels differ by 10, less than the threshold, so every second frame is kept.
    assert {0.5, 0.7, 0.9} <= {round(time, 3) for time in kept}


def test_videos_are_indexed_once(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    videos = [write_video(tmp_path / f"{name}.mkv", REGULAR) for name in ("a", "b")]
    report = lab.run(VideoSource(videos[:1], 0.5, distinct=False))
    assert (report.rows, report.encoded) == (4, 4)
    index = Index.open(lab.out)
    assert [(e.name, e.time_s) for e in index.entries()] == [
        (f"a.mkv/00:00:0{time // 1000}.{time % 1000:03}", time / 1000)
        for time in (0, 500, 1000, 1500)
    ]
    entry = index.entry(2)
    assert (entry.width, entry.height, entry.path) == (64, 48, videos[0])
    assert level_of(load_picture(entry)) == 11
    report = lab.run(VideoSource(videos, 0.5, distinct=False))
    assert (report.rows, report.kept, report.encoded, report.reused) == (8, 4, 0, 4)
    report = lab.run(VideoSource(videos, 0.5, distinct=False))
    assert (report.kept, report.encoded) == (8, 0)
    with pytest.raises(InputError, match=r"expected every_s 0\.5, as in the index, found 1\.0"):
        lab.run(VideoSource(videos, 1.0, distinct=False))


def test_frames_within_a_millisecond_have_one_name(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(8):
            image = Image.effect_noise((64, 48), 100).convert("RGB")
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    report = lab.run(VideoSource([tmp_path / "v.mp4"], 0, distinct=False))
    assert (report.rows, report.encoded) == (3, 3)
    entries = list(Index.open(lab.out).entries())
    assert [entry.time_s for entry in entries] == [0.0, 0.00075, 0.0015]
    frames = {frame.time_s: frame.picture() for frame in sampled_frames(tmp_path / "v.mp4", 0)}
    for entry in entries:
        assert np.array_equal(load_picture(entry), frames[entry.time_s or 0.0])


def test_a_stopped_run_continues_within_a_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path)
    video = write_video(tmp_path / "v.mkv", [40 * n for n in range(100)], noise=True)
    monkeypatch.setattr("pab.search.build.PICTURES", 10)
    true_encode, calls = lab.encoders[1].encode_images, 0

    def stopping(images: list[Image.Image], **_: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return true_encode(images)

    source = VideoSource([video], 0, distinct=False)
    with monkeypatch.context() as patch:
        patch.setattr(lab.encoders[1], "encode_images", stopping)
        with pytest.raises(KeyboardInterrupt, match="holds 40 images; resume"):
            lab.run(source, block=20)
    report = lab.run(source, block=20)
    assert (report.rows, report.kept, report.encoded) == (100, 40, 60)
    names = [entry.name for entry in Index.open(lab.out).entries()]
    assert names == sorted(names)


def test_a_damaged_video_keeps_the_frames_before_the_damage(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    video = write_video(tmp_path / "v.avi", [40 * n for n in range(100)], noise=True)
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    report = lab.run(VideoSource([video], 0, distinct=False))
    assert 10 < report.encoded < 100
    times = [entry.time_s for entry in Index.open(lab.out).entries()]
    assert times == pytest.approx([0.04 * n for n in range(len(times))], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("text.avi", b"not a video", "cannot be decoded"),
        ("empty.avi", b"", "an empty file"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nsecret.mkv\n#EXT-X-ENDLIST\n", "decoded|playlist"),
        ("list.avi", b"ffconcat version 1.0\nfile secret.mkv\n", "decoded|playlist"),
    ],
)  # fmt: skip
def test_files_that_are_no_videos(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    lab = Lab(tmp_path)
    write_video(tmp_path / "secret.mkv", REGULAR)
    good, bad = write_video(tmp_path / "good.mkv", REGULAR), tmp_path / name
    bad.write_bytes(content)
    report = lab.run(VideoSource([good, bad], 1.0, distinct=False))
    assert re.search(expected, report.unreadable[name])
    assert {entry.path for entry in Index.open(lab.out).entries()} == {good}


def test_names_of_frames_sort_by_time() -> None:
    assert clock_time(3725.25) == "01:02:05.250"
    times = [0.0, 0.9996, 59.9994, 59.9996, 3600.0, 35999.0]
    names = [clock_time(time) for time in times]
    assert names == sorted(names)
    assert names[1] == "00:00:01.000"


# -------------------------------------------------------------------------------------- a real clip


@pytest.fixture
def vtest(tmp_path: Path) -> Path:
    """The clip of Debian's package opencv-doc: 795 frames of 768 x 576 px, 10 per second."""
    packed = VTEST.with_name("vtest.avi.gz")
    if not VTEST.is_file() and not packed.is_file():
        pytest.skip(f"{VTEST} not found: apt-get install opencv-doc")
    path = tmp_path / "vtest.avi"
    if VTEST.is_file():
        path.symlink_to(VTEST)
    else:
        with gzip.open(packed) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path


def test_a_real_video(
    vtest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Index a frame every 7 s with the mini CLIP; compare with frames decoded one by one."""
    monkeypatch.chdir(Path(__file__).parents[1])
    out, found = tmp_path / "index", tmp_path / "found.json"
    words = ["index", *CLIP, "--video", str(vtest), "--every", "7", "--out", str(out)]
    main(words)
    assert "12 images indexed, 0 not readable" in capsys.readouterr().err
    index = Index.open(out)
    times = [index.entry(row).time_s for row in range(index.rows)]
    assert times == pytest.approx([7.0 * n for n in range(12)], abs=1e-9)
    with av.open(str(vtest)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == 795
    for row in range(index.rows):
        assert np.array_equal(load_picture(index.entry(row)), frames[70 * row])
    main(
        ["query", "--index", str(out), "--text", "people walk across a yard", "--json", str(found)]
        + ["--start", "20", "--end", "60"]
    )
    (one,) = json.loads(found.read_text())["queries"]
    assert sorted(image["time_s"] for image in one["images"]) == [21, 28, 35, 42, 49, 56]
    frames[350].save(tmp_path / "frame.png")
    main(
        ["query", "--index", str(out), "--image", str(tmp_path / "frame.png"), "--top_k", "1"]
        + ["--json", str(found)]
    )
    (one,) = json.loads(found.read_text())["queries"]
    assert one["images"][0]["time_s"] == 35.0
    assert one["images"][0]["score"] == pytest.approx(1.0, abs=1e-3)
    main(words)
    assert "0 images encoded" in capsys.readouterr().err


def test_the_common_folder_of_videos_may_grow_and_shrink(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    for name in ("c1", "c2"):
        (tmp_path / "vv" / name).mkdir(parents=True)
    first = write_video(tmp_path / "vv/c1/a.mkv", REGULAR)
    second = write_video(tmp_path / "vv/c2/b.mkv", REGULAR[:10], noise=True)
    lab.run(VideoSource([first], 1, distinct=False))
    report = lab.run(VideoSource([first, second], 1, distinct=False))
    assert (report.rows, report.reused, report.encoded) == (3, 2, 1)
    entries = list(Index.open(lab.out).entries())
    assert [entry.name.partition("/00")[0] for entry in entries] == ["c1/a.mkv"] * 2 + ["c2/b.mkv"]
    assert [entry.path for entry in entries] == [first, first, second]
    with pytest.raises(InputError, match=r"'c2/b\.mkv': expected every archive or video"):
        lab.run(VideoSource([first], 1, distinct=False))
    second.unlink()
    report = lab.run(VideoSource([first], 1, distinct=False))
    assert (report.rows, report.reused, report.encoded, report.removed) == (2, 2, 0, 3)
    with pytest.raises(InputError, match=r"expected images of .*c1, found .*c2"):
        lab.run(VideoSource([write_video(second, REGULAR)], 1, distinct=False))
