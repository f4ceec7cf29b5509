"""Edits in the shapes world: recolour, move, remove or add one shape."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from data_pipeline.synthesis import shapes_world as world
from data_pipeline.synthesis.edit import Edit
from data_pipeline.synthesis.picture import draw_size
from data_pipeline.synthesis.shapes_world import Placed

OPERATIONS = ("recolor", "move", "remove", "add")
ZONES = {
    "upper left corner": (0, 0),
    "upper right corner": (0, 1),
    "lower left corner": (1, 0),
    "lower right corner": (1, 1),
}
"""Quarters of the picture: (row, column)."""
HELD_OUT_SHARE = 0.1
_CHINESE = dict(
    zip(
        (*world.COLORS, *world.SHAPES, *ZONES),
        "红色 橙色 黄色 绿色 蓝色 紫色 粉色 棕色 圆形 正方形 三角形 五角星 左上角 右上角 左下角 右下角".split(),
        strict=True,
    )
)


def draw_edit(rng: np.random.Generator, side: int) -> Edit:
    """A picture of two or three different shapes, and the same picture with one of them edited, for training.

    Neither shows a pair of colour and shape that is held out of training, nor a set of objects that is.
    """
    return _draw(rng, False, lambda: draw_size(rng, side, lambda h, w: max(h, w) <= 2 * min(h, w) and min(h, w) >= 32))


def draw_held_out_edit(rng: np.random.Generator, size: tuple[int, int]) -> Edit:
    """An edit to measure with: a picture of `size` (h, w) with a set of objects that no training edit shows."""
    return _draw(rng, True, lambda: size)


def is_held_out(objects: list[Placed]) -> bool:
    """Whether training edits don't show these objects together: a tenth of all sets of two or more, by a hash."""
    digest = hashlib.sha256(" and ".join(sorted(map(_name, objects))).encode()).digest()
    return len(objects) > 1 and int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def _draw(rng: np.random.Generator, held_out: bool, new_size: Callable[[], tuple[int, int]]) -> Edit:
    operation = OPERATIONS[rng.integers(len(OPERATIONS))]
    while True:
        size = new_size()
        objects = _draw_objects(rng, size)
        if is_held_out(objects) != held_out:
            continue
        edited = _edit(rng, operation, objects, size)
        if edited is not None and (held_out or not is_held_out(edited[0])):
            break
    after, english, chinese = edited
    name = list(world.BACKGROUNDS)[rng.integers(len(world.BACKGROUNDS))]
    ground = world.BACKGROUNDS[name]
    record = {
        "operation": operation,
        "of": "shapes",
        "before": _describe(objects, name),
        "after": _describe(after, name),
    }
    pictures = (world.draw(shapes, ground, size) for shapes in (objects, after))
    return Edit(*pictures, chinese if rng.random() < 0.25 else english, record)


def _describe(objects: list[Placed], ground: str) -> str:
    return (
        " and ".join(f"a {_name(o)}".replace("a orange", "an orange") for o in objects) + f" on a {ground} background"
    )


def _name(item: Placed) -> str:
    return f"{item.color} {item.shape}"


def _chinese_name(item: Placed) -> str:
    return f"{_CHINESE[item.color]}{_CHINESE[item.shape]}"


def _draw_objects(rng: np.random.Generator, size: tuple[int, int]) -> list[Placed]:
    pairs = [(c, s) for c in world.COLORS for s in world.SHAPES if (c, s) not in world.HELD_OUT_PAIRS]
    chosen = rng.choice(len(pairs), rng.integers(2, 4), replace=False)
    include = [{"class": pairs[i][1], "count": 1, "color": pairs[i][0]} for i in chosen]
    return world.layout({"include": include}, rng, size)


def _edit(
    rng: np.random.Generator, operation: str, objects: list[Placed], size: tuple[int, int]
) -> tuple[list[Placed], str, str] | None:
    """The shapes after the operation, and the instruction in English and Chinese; None if there is no room."""
    i = int(rng.integers(len(objects)))
    item, others = objects[i], objects[:i] + objects[i + 1 :]
    if operation == "remove":
        return others, f"Remove the {_name(item)}", f"去掉{_chinese_name(item)}"
    if operation == "recolor":
        taken = {(o.color, o.shape) for o in objects} | world.HELD_OUT_PAIRS
        free = [c for c in world.COLORS if (c, item.shape) not in taken]
        color = free[rng.integers(len(free))]
        forms = (f"Make the {_name(item)} {color}", f"Change the color of the {_name(item)} to {color}")
        new = replace(item, color=color, rgb=world.COLORS[color])
        chinese = f"把{_chinese_name(item)}改成{_CHINESE[color]}"
        return [*objects[:i], new, *objects[i + 1 :]], forms[rng.integers(2)], chinese
    zone = list(ZONES)[rng.integers(len(ZONES))]
    if operation == "move":
        moved = _put(rng, item, others, size, zone)
        if moved is None or np.hypot(moved.x - item.x, moved.y - item.y) < 0.3 * min(size):
            return None
        english, chinese = f"Move the {_name(item)} to the {zone}", f"把{_chinese_name(item)}移到{_CHINESE[zone]}"
        return [*objects[:i], moved, *objects[i + 1 :]], english, chinese
    (new,) = _draw_objects(rng, size)[:1]
    added = _put(rng, replace(new, radius=item.radius), objects, size, zone)
    if added is None or any((o.color, o.shape) == (new.color, new.shape) for o in objects):
        return None
    article = "an" if new.color == "orange" else "a"
    return (
        [*objects, added],
        f"Add {article} {_name(new)} in the {zone}",
        f"在{_CHINESE[zone]}加一个{_chinese_name(new)}",
    )


def _reach(item: Placed) -> float:
    return float(np.hypot(*(item.outline() - (item.x, item.y)).T).max())


def _put(
    rng: np.random.Generator, item: Placed, others: list[Placed], size: tuple[int, int], zone: str
) -> Placed | None:
    """The shape at a free place in the outer part of a corner; None if there is none."""
    height, width = size
    row, column = ZONES[zone]
    reach = _reach(item) + 0.02 * min(size)
    for _ in range(50):
        y, x = rng.uniform(reach, max(reach + 1, 0.36 * height)), rng.uniform(reach, max(reach + 1, 0.36 * width))
        new = replace(item, y=height - y if row else y, x=width - x if column else x)
        gap = 0.03 * min(size)
        if all(np.hypot(new.x - o.x, new.y - o.y) > _reach(new) + _reach(o) + gap for o in others):
            return new
    return None
