"""A user's videos as clips: each video is a row of windows of equal length, read by PyAV (FFmpeg's libraries).

Frames come at the video's own rate, turned as its metadata says. A window is found by its timestamps and read from the
key frame before it, so that any window can be had without the ones before.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

EXTENSIONS = ("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "ts", "wmv", "flv", "gif")


@dataclass(frozen=True)
class Video:
    """A file and the timestamps of its frames, in order."""

    path: Path
    times: tuple[int, ...]

    def windows(self, length: int) -> list[int]:
        """First frames of consecutive windows of `length` frames; the last one ends with the video.

        Raises ValueError if the video is shorter than that.
        """
        if len(self.times) < length:
            raise ValueError(f"{self.path}: has {len(self.times)} frames, a clip takes {length}")
        last = len(self.times) - length
        return [*range(0, last, length), last]

    def read(self, start: int, length: int) -> "np.ndarray":
        """`length` frames from frame `start` on, uint8 [length, h, w, 3]; ValueError if they cannot be decoded."""
        import av
        import numpy as np

        frames: list[np.ndarray] = []
        try:
            with av.open(str(self.path)) as container:
                container.seek(self.times[start], stream=container.streams.video[0])
                for frame in container.decode(video=0):
                    if _time(frame) >= self.times[start]:
                        frames.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
                        if len(frames) == length:
                            return np.stack(frames)
        except (av.FFmpegError, ValueError) as error:
            raise ValueError(f"{self.path}: broken after frame {start + len(frames)} ({error}); remove it") from None
        raise ValueError(f"{self.path}: ends after frame {start + len(frames)} of {len(self.times)}; remove it")


def find_videos(folder: Path) -> list[Path]:
    """The video files in a folder and the folders below it, by path."""
    visible = lambda p: not any(part.startswith(".") for part in p.relative_to(folder).parts)  # noqa: E731
    return sorted(p for p in folder.rglob("*") if p.suffix[1:].lower() in EXTENSIONS and p.is_file() and visible(p))


def open_video(path: Path) -> Video:
    """Index a video without decoding it. Raises ValueError, one line, if it holds no video or is broken or empty."""
    try:
        import av
    except ModuleNotFoundError:
        raise ValueError('videos are read by PyAV: pip install -c constraints.txt -e ".[video]"') from None

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video")
            times = sorted(_time(packet) for packet in container.demux(video=0) if packet.size)
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read as a video ({error.strerror})") from None
    if not times:
        raise ValueError(f"{path}: holds no frames")
    return Video(path, tuple(times))


def _time(item) -> int:
    """Presentation time of a frame or packet; the decoding time where a format has no other."""
    time = item.pts if item.pts is not None else item.dts
    if time is None:
        raise ValueError("has no timestamps; copy it to .mkv")
    return time
