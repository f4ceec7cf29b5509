"""Compositional text: written things set into photographs in perspective, with shadow and the scene's light."""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data_pipeline.synthesis.colors import RGB
from data_pipeline.synthesis.corpus import Corpus, language_of
from data_pipeline.synthesis.fonts import Face, choose_face
from data_pipeline.synthesis.line_breaking import has_chinese
from data_pipeline.synthesis.photos import View, draw_crop, installed_file, load_photo
from data_pipeline.synthesis.picture import Picture, draw_size, generator
from data_pipeline.synthesis.surfaces import SURFACES
from data_pipeline.synthesis.typesetting import Line, Style, fit_passage, shift

PLACES = Path(__file__).with_name("scenes.toml")
LEAST_PX = {"english": 13, "chinese": 16, "mixed": 16, "other": 16}
_SUPERSAMPLING = 2
_WHITE_PAINT: RGB = (244, 244, 240)
_MOST_HIDDEN = 0.1
"""Share of a place's `keep` box that may be covered."""


@dataclass(frozen=True)
class Place:
    """A photograph that written things can be set into."""

    view: View
    mounts: tuple[str, ...]
    """lying, standing, painted; drawn uniformly."""
    keep: tuple[int, int, int, int] | None
    """Box that must stay visible, in pixels of the photograph."""
    pitch: tuple[float, float]
    """How far the ground leans back, in degrees."""
    where: str
    chinese: str
    monochrome: bool


@dataclass(frozen=True)
class Scene:
    """Everything that decides a scene picture."""

    size: tuple[int, int]
    """(h, w)."""
    photo: Path
    crop: tuple[float, float, float, float]
    monochrome: bool
    mount: str
    surface: str
    """A name in SURFACES, or 'paint'."""
    flat: tuple[int, int]
    """(h, w) of the written thing before it is put in perspective, in supersampled pixels."""
    corners: np.ndarray
    """float64 [4, 2]: where its corners go, in supersampled pixels of the picture, clockwise from the upper left."""
    text: str
    style: Style
    least_px: int
    ink: RGB
    seed: int
    """Of texture and grain."""


def read_places(names: tuple[str, ...] | None = None) -> tuple[Place, ...]:
    """The places of `scenes.toml` whose photographs are installed and, if `names` are given, among these file names.

    Raises ValueError if there is none.
    """
    places = []
    for entry in tomllib.loads(PLACES.read_text(encoding="utf-8"))["scene"]:
        path = installed_file(entry["package"], entry["file"])
        if path is not None and (names is None or path.name in names):
            boxes = (tuple(entry[name]) if name in entry else None for name in ("subject", "within"))
            view = View(path, (), *boxes)
            pitch, monochrome = tuple(entry["pitch"]), entry.get("monochrome", False)
            keep = tuple(entry["keep"]) if "keep" in entry else None
            places.append(
                Place(view, tuple(entry["mounts"]), keep, pitch, entry["where"], entry["chinese"], monochrome)
            )
    if not places:
        of = "" if names is None else f" called {', '.join(names)}"
        raise ValueError(f"no photographs of scenes{of} found in scikit-image or scikit-learn")
    return tuple(places)


def make(
    rng: np.random.Generator, side: int, places: tuple[Place, ...], corpus: Corpus, faces: tuple[Face, ...]
) -> Picture:
    """A passage on something in a photograph; what no face covers or doesn't fit is dropped whole.

    Raises ValueError if nothing can be drawn.
    """
    for _ in range(1000):
        place = places[rng.integers(len(places))]
        scene = draw_scene(rng, side, place, corpus, faces)
        drawn = None if scene is None else render(scene)
        if drawn is not None:
            record = {"language": language_of(scene.text), "font": scene.style.face.name}
            record |= {"photo": scene.photo.name, "surface": scene.surface}
            return Picture(drawn[0], write_caption(rng, scene, place), drawn[1], record)
    raise ValueError(f"no font here draws any passage of the corpus that fits a scene at {side} px")


def draw_scene(rng: np.random.Generator, side: int, place: Place, corpus: Corpus, faces) -> Scene | None:
    """A random scene at a place; None if no face covers the drawn passage."""
    photo = load_photo(place.view.path)
    size = draw_size(
        rng, side, lambda h, w: max(h, w) <= 2 * min(h, w) and draw_crop(rng, photo.size, place.view, w / h) is not None
    )
    height, width = size
    crop = draw_crop(rng, photo.size, place.view, width / height)
    mount = place.mounts[rng.integers(len(place.mounts))]
    able = [n for n, s in SURFACES.items() if mount in s.mounts and not (place.monochrome and "note" in n)]
    surface = "paint" if mount == "painted" else able[rng.integers(len(able))]
    pose = _draw_pose(rng, size, mount, place, crop)
    if pose is None:
        return None
    flat, corners = pose
    language = [n for n in ("english", "chinese", "mixed") if n in corpus.passages]
    language = language[rng.integers(len(language))] if language else next(iter(corpus.passages))
    least_px = round(LEAST_PX[language] * _SUPERSAMPLING * 1.1)
    largest = min(flat) * rng.uniform(0.2, 0.5)
    text = corpus.draw(rng, language, 0.5 * flat[0] * flat[1] / (max(least_px, 0.6 * largest) ** 2 * 1.3))
    face = choose_face(faces, text, rng) if text else None
    if face is None:
        return None
    align = "left" if surface in ("paper", "cardboard") and rng.random() < 0.6 else "center"
    style = Style(face, max(least_px, round(largest)), 1.3, align=align)
    inks = (_WHITE_PAINT,) if mount == "painted" else SURFACES[surface].inks
    ink, seed = inks[rng.integers(len(inks))], int(rng.integers(2**31))
    return Scene(
        size, place.view.path, crop, place.monochrome, mount, surface, flat, corners, text, style, least_px, ink, seed
    )


def _draw_pose(
    rng: np.random.Generator, size: tuple[int, int], mount: str, place: Place, crop: tuple[float, float, float, float]
) -> tuple[tuple[int, int], np.ndarray] | None:
    """Flat size and projected corners of a rectangle that stays inside the picture; None if none was found."""
    extent = np.array(size[::-1]) * _SUPERSAMPLING
    keep = None
    if place.keep is not None:
        keep = (np.reshape(place.keep, (2, 2)) - crop[:2]) / np.subtract(crop[2:], crop[:2]) * extent
    for _ in range(200):
        standing = mount == "standing"
        area, ratio = rng.uniform(0.14 if standing else 0.3, 0.5) * extent.prod(), rng.uniform(0.8, 2.4)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        roll = math.radians(rng.uniform(-3, 3) if standing else rng.uniform(-14, 14))
        yaw = math.radians(rng.uniform(-24, 24) if standing else rng.uniform(-6, 6))
        lean = math.radians(rng.uniform(-4, 4) if standing else rng.uniform(*place.pitch))
        center = rng.uniform((0.2, 0.45), (0.8, 0.75)) * extent
        corners = _project(w, h, center, roll, yaw, lean, 1.8 * extent.max())
        low, high = corners.min(0), corners.max(0)
        if (low < 0.03 * extent.min()).any() or (high > extent - 0.03 * extent.min()).any():
            continue
        if keep is not None:
            hidden = np.clip(np.minimum(high, keep[1]) - np.maximum(low, keep[0]), 0, None).prod()
            if hidden > _MOST_HIDDEN * (keep[1] - keep[0]).prod():
                continue
        return (round(h), round(w)), corners
    return None


def _project(w: float, h: float, center: np.ndarray, roll: float, yaw: float, pitch: float, focal: float) -> np.ndarray:
    """Corners of a w x h rectangle, turned in space about its middle and seen by a pinhole camera."""
    x, y = np.array([-w, w, w, -w]) / 2, np.array([-h, -h, h, h]) / 2
    x, y = x * math.cos(roll) - y * math.sin(roll), x * math.sin(roll) + y * math.cos(roll)
    x, z = x * math.cos(yaw), x * math.sin(yaw)
    y, z = y * math.cos(pitch), z - y * math.sin(pitch)
    return center + np.stack([x, y], 1) * (focal / (focal + z))[:, None]


def render(scene: Scene) -> tuple[np.ndarray, tuple[Line, ...]] | None:
    """The picture, uint8 [h, w, 3], and its lines with the boxes of their pixels; None if the passage doesn't fit.

    Without text the thing is blank.
    """
    rng = generator(scene.seed, 0, "texture")
    h, w = scene.flat
    margin = round((0.03 if scene.mount == "painted" else SURFACES[scene.surface].margin) * min(h, w))
    block = fit_passage(scene.text, scene.style, w - 2 * margin, h - 2 * margin, scene.least_px)
    if block is None:
        return None
    rows, columns = block.coverage.shape
    x = margin if scene.style.align == "left" else (w - columns) // 2
    block = shift(block, x, (h - rows) // 2)
    ink = np.zeros((h, w), np.float32)
    ink[(h - rows) // 2 : (h - rows) // 2 + rows, x : x + columns] = block.coverage / 255
    height, width = (v * _SUPERSAMPLING for v in scene.size)
    view = cv2.getPerspectiveTransform(_corners_of(w, h), scene.corners.astype(np.float32))
    warp = lambda image: cv2.warpPerspective(image, view, (width, height), flags=cv2.INTER_LINEAR)  # noqa: E731
    photo = load_photo(scene.photo).resize((width, height), Image.Resampling.BICUBIC, box=scene.crop)
    image = np.asarray(photo, dtype=np.float64)
    if scene.mount == "painted":
        image = _paint(image, warp(ink), scene.ink)
    else:
        surface = SURFACES[scene.surface]
        flat = surface.paint(rng, h, w)
        flat += 0.93 * ink[:, :, None] * (np.array(scene.ink) - flat)
        image = _set_in(scene, image, warp(flat), warp(np.ones((h, w), np.float32)), surface.lit)
    if scene.monochrome:
        image = (image @ np.array([0.299, 0.587, 0.114]))[:, :, None].repeat(3, 2)
    image = cv2.resize(image, scene.size[::-1], interpolation=cv2.INTER_AREA)
    image += 1.5 * rng.standard_normal((*scene.size, 1))
    lines = []
    for line in block.lines:
        x0, y0, x1, y1 = line.box
        alone = np.zeros_like(ink)
        alone[y0:y1, x0:x1] = ink[y0:y1, x0:x1]
        seen = cv2.resize(warp(alone), scene.size[::-1], interpolation=cv2.INTER_AREA) > 0.12
        (top, *_, bottom), (left, *_, right) = (np.flatnonzero(seen.any(axis)) for axis in (1, 0))
        lines.append(Line(line.text, (int(left), int(top), int(right) + 1, int(bottom) + 1)))
    return np.clip(np.round(image), 0, 255).astype(np.uint8), tuple(lines)


def _corners_of(w: int, h: int) -> np.ndarray:
    return np.array([[0, 0], [w, 0], [w, h], [0, h]], dtype=np.float32)


def _paint(image: np.ndarray, ink: np.ndarray, color: RGB) -> np.ndarray:
    """Paint that lets the ground's relief through."""
    gray = image.mean(2, keepdims=True)
    relief = np.clip(gray / max(gray.mean(), 1), 0.4, 1.6) ** 0.5
    return image + 0.9 * ink[:, :, None] * (np.array(color) * np.minimum(relief, 1.1) - image)


def _set_in(scene: Scene, image: np.ndarray, carrier: np.ndarray, cover: np.ndarray, lit: bool) -> np.ndarray:
    """Blend the warped carrier into the photograph under the photograph's light."""
    unit = min(image.shape[:2])
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
    light = cv2.resize(cv2.GaussianBlur(small, (0, 0), 6), image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    tint = image.mean((0, 1))
    bright = tint.mean()
    if not lit:
        local = np.clip(light.mean(2, keepdims=True) / max(bright, 1), 0.5, 1.6) ** 0.4
        carrier = carrier * local * (0.45 + 0.55 * min(1.0, bright / 110)) * (1 + 0.25 * (tint / max(bright, 1) - 1))
    if scene.mount == "standing":
        image = _add_post(image, scene.corners, bright)
    else:
        moved = np.float32([[1, 0, 0.012 * unit], [0, 1, 0.018 * unit]])
        shadow = cv2.warpAffine(cover, moved, cover.shape[::-1])
        image = image * (1 - 0.5 * cv2.GaussianBlur(shadow, (0, 0), 0.012 * unit))[:, :, None]
    cover = cv2.GaussianBlur(cover, (0, 0), 0.8)[:, :, None] * (cover > 0)[:, :, None]
    return image + cover * (carrier - image)


def _add_post(image: np.ndarray, corners: np.ndarray, bright: float) -> np.ndarray:
    """A gray post from behind the sign down to the picture's edge."""
    height, width = image.shape[:2]
    x, half = corners[2:, 0].mean(), 0.018 * min(height, width)
    top = corners[2:, 1].min() - 2
    across = (np.arange(width) - x) / half
    tone = (70 + 60 * np.clip(1 - np.abs(across + 0.3), 0, 1)) * (0.4 + 0.6 * min(1.0, bright / 110))
    cover = np.clip(half * (1 - np.abs(across)), 0, 1)[None, :, None] * (np.arange(height) >= top)[:, None, None]
    return image + cover * (tone[None, :, None] - image)


def name_carrier(scene: Scene) -> tuple[str, str]:
    """What the passage is on, in English with 'the' and in Chinese."""
    if scene.mount == "painted":
        return "the surface", "表面"
    surface = SURFACES[scene.surface]
    english = _without_color(surface.phrase, scene.monochrome).removeprefix("a ")
    return f"the {english}", _without_color(surface.chinese, scene.monochrome).removeprefix("一张").removeprefix("一块")


def write_caption(rng: np.random.Generator, scene: Scene, place: Place) -> str:
    """A caption that quotes the passage and says what it is on and where."""
    photo = "black and white photograph" if scene.monochrome else "photograph"
    if has_chinese(scene.text) and rng.random() < 0.5:
        kind = "黑白照片：" if scene.monochrome else ""
        if scene.mount == "painted":
            return f"{kind}{place.chinese}用白漆写着“{scene.text}”。"
        thing = _without_color(SURFACES[scene.surface].chinese, scene.monochrome)
        return f"{kind}{place.chinese}，{thing}上写着“{scene.text}”。"
    if scene.mount == "painted":
        forms = (
            f'A {photo} of "{scene.text}" painted in white {place.where}',
            f'The words "{scene.text}" in white paint {place.where}',
        )
    else:
        thing = _without_color(SURFACES[scene.surface].phrase, scene.monochrome)
        stand = " on a post" if scene.mount == "standing" else ""
        forms = (
            f'{thing.capitalize()}{stand} {place.where}. It reads "{scene.text}".',
            f'A {photo} of {thing}{stand} with the text "{scene.text}", {place.where}',
            f'"{scene.text}" written on {thing} {place.where}',
        )
    return forms[rng.integers(len(forms))]


def _without_color(phrase: str, monochrome: bool) -> str:
    if monochrome:
        for color in (
            "blue ",
            "green ",
            "yellow ",
            "white ",
            "pink ",
            " with a red edge",
            "蓝色",
            "绿色",
            "黄色",
            "红边白色",
        ):
            phrase = phrase.replace(color, "")
    return phrase
