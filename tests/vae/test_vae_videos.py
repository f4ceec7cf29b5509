"""Users' videos: files written here by PyAV, read back window by window, trained on, and refused when broken."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.sample import RawSample
from data_pipeline.shards import shard_name, write_raw
from vae.train import Sources
from vae.videos import find_videos, open_video

av = pytest.importorskip("av")
ROOT = Path(__file__).parents[2]


def frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that each differ from all others: a bright column that moves over a slope."""
    slope = np.linspace(0, 100, width, dtype=np.uint8)
    video = np.broadcast_to(slope[None, None, :, None], (count, height, width, 3)).copy()
    for i in range(count):
        video[i, :, 2 * i : 2 * i + 4] = 250
        video[i, : height // 4] //= 2
    return video


def write_video(path: Path, pixels: np.ndarray, codec: str = "mpeg4", rotation: int = 0, **options) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt, stream.bit_rate, stream.gop_size = "yuv420p", 4_000_000, 7
        if rotation:
            stream.set_display_rotation(rotation)
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name,codec", [("a.mp4", "libx264"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx-vp9")])
def test_any_window_shows_its_frames(tmp_path, name, codec):
    pixels = frames(23)
    video = open_video(write_video(tmp_path / name, pixels, codec))
    assert len(video.times) == 23
    assert video.windows(9) == [0, 9, 14] and video.windows(23) == [0]
    for start in (14, 0, 9, 3):  # 3 lies between key frames
        read = video.read(start, 9).astype(int)
        assert read.shape == (9, 48, 64, 3)
        error = np.abs(read[:, None] - pixels[None].astype(int)).mean((2, 3, 4))  # of each frame to each
        assert error.argmin(1).tolist() == list(range(start, start + 9)) and error.min(1).max() < 8


def test_metadata_turns_frames(tmp_path):
    pixels = frames(6)
    turned = open_video(write_video(tmp_path / "a.mp4", pixels, "libx264", rotation=90)).read(0, 5)
    assert turned.shape == (5, 64, 48, 3)
    upright = np.rot90(pixels[:5], 1, axes=(1, 2)).astype(int)
    assert np.abs(turned - upright).mean() < 8


def test_broken_and_empty_videos_are_named(tmp_path):
    whole = write_video(tmp_path / "whole.mkv", frames(40)).read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "cut.mp4").write_bytes(write_video(tmp_path / "x.mp4", frames(9)).read_bytes()[:-300])
    for name in ("empty.mp4", "noise.mp4", "cut.mp4"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as a video") as caught:
            open_video(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has 9 frames, a clip takes 17"):
        open_video(tmp_path / "x.mp4").windows(17)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(ValueError, match="holds no video"):
        open_video(tmp_path / "sound.wav")

    damaged = tmp_path / "damaged.mkv"
    damaged.write_bytes(whole)
    video = open_video(damaged)
    damaged.write_bytes(whole[: len(whole) // 2])  # cut after it was indexed
    with pytest.raises(ValueError, match=r"damaged.mkv: (broken|ends) after frame"):
        video.read(30, 9)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Six pictures as a raw shard, and a folder with a video of 23 frames, a short one and a broken one."""
    pictures, videos = tmp_path / "pictures", tmp_path / "videos"
    pictures.mkdir()
    (videos / "more").mkdir(parents=True)
    files = [io.BytesIO() for _ in range(6)]
    for image, file in zip(frames(6), files, strict=True):
        Image.fromarray(image).save(file, "PNG")
    samples = [RawSample(f"k{i}", file.getvalue(), "png", {"caption": ""}) for i, file in enumerate(files)]
    write_raw(pictures / shard_name(0), samples)
    write_video(videos / "more" / "long.mp4", frames(23), "libx264")
    write_video(videos / "short.mp4", frames(3), "libx264")
    (videos / "broken.mp4").write_bytes(b"not a video" * 100)
    (videos / "notes.txt").write_text("no video")
    return pictures, videos


def test_clips_come_from_videos_in_the_share_asked_for(folders):
    pictures, videos = folders
    assert [p.name for p in find_videos(videos)] == ["broken.mp4", "long.mp4", "short.mp4"]
    few = Sources((pictures,), (videos,), 9, 0.1)  # three windows are more than a tenth: pictures are taken again
    assert (few.tokens == 1).sum() == 27 and (few.tokens == 9).sum() == 3
    many = Sources((pictures,), (videos,), 9, 0.5)
    assert (many.tokens == 1).sum() == (many.tokens == 9).sum() == 6
    for sources in (few, many):
        read = [sources[i] for i in range(len(sources))]
        assert len({s.key for s in read}) == len(read)
        assert all(len(s.frames) == s.length for s in read)
    assert few.problems == [
        f"{videos}/broken.mp4: cannot be read as a video (Invalid data found when processing input)",
        f"{videos}/short.mp4: has 3 frames, a clip takes 9",
    ]
    without = Sources((pictures,), (), 9, 0.25)
    assert (without.tokens == 9).sum() == 2 and len(without[7].frames) == 1


def run_training(out: Path, *flags: object) -> subprocess.CompletedProcess:
    argv = [sys.executable, str(ROOT / "vae/train.py"), "--preset", "tiny", "--out", str(out), *map(str, flags)]
    argv += "--size 32 --crop 16 --batch-size 4 --steps 2 --frames 5 --clip-share 0.5 --statistics-samples 4".split()
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_training_takes_videos_and_names_broken_ones(folders, tmp_path):
    pictures, videos = folders
    done = run_training(tmp_path / "run", "--data", pictures, "--videos", videos)
    assert done.returncode == 0, done.stderr
    assert f"passed over {videos}/broken.mp4: cannot be read as a video" in done.stderr
    assert (tmp_path / "run" / "vae" / "config.json").exists()

    (videos / "more" / "long.mp4").unlink()
    done = run_training(tmp_path / "none", "--data", pictures, "--videos", videos)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "broken.mp4: cannot be read" in done.stderr and not (tmp_path / "none").exists()
