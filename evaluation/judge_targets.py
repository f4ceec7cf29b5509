"""What the judge is trained towards: heat maps, colours and boxes of labelled pictures, and their loss."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.judge import SIDE, STRIDE
from evaluation.judge_pictures import SHAPES, Labelled, draw_labelled

Targets = tuple[Tensor, Tensor, Tensor, Tensor]


def training_batch(seed: int, step: int, size: int) -> tuple[Tensor, Targets]:
    """Pictures [B, 3, SIDE, SIDE] in [0, 1] and targets, a function of (seed, step)."""
    drawn = [draw_labelled(np.random.default_rng([seed, step, i]), SIDE) for i in range(size)]
    images = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2).float() / 255
    return images, targets_of(drawn)


def targets_of(drawn: list[Labelled]) -> Targets:
    """(heat [B, 4, h, w], cells [N, 3] (picture, row, column), colours [N], boxes [N, 4]) of N objects in all."""
    cells = SIDE // STRIDE
    centres = torch.arange(cells) + 0.5
    heat = torch.zeros(len(drawn), len(SHAPES), cells, cells)
    where, colors, boxes = [], [], []
    for i, labels in enumerate(drawn):
        for shape, color, (x0, y0, x1, y1) in zip(labels.classes, labels.colors, labels.boxes, strict=True):
            cx, cy, width, height = (v / STRIDE for v in ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
            row, column = min(int(cy), cells - 1), min(int(cx), cells - 1)
            spread = 0.14 * (width + height) / 2 + 0.3
            distance = (centres[None] - column - 0.5) ** 2 + (centres[:, None] - row - 0.5) ** 2
            heat[i, shape] = torch.maximum(heat[i, shape], torch.exp(-distance / (2 * spread**2)))
            where.append((i, row, column))
            colors.append(color)
            boxes.append((cx - column - 0.5, cy - row - 0.5, math.log(width), math.log(height)))
    return heat, torch.tensor(where).reshape(-1, 3), torch.tensor(colors), torch.tensor(boxes).reshape(-1, 4)


def loss_of(net: nn.Module, images: Tensor, targets: Targets) -> tuple[Tensor, dict[str, str]]:
    """Penalty-reduced focal loss of the heat (CornerNet, arXiv 1808.01244, Eq. 1), cross-entropy, L1; and its parts."""
    heat, (picture, row, column), colors, boxes = targets[0], targets[1].unbind(1), targets[2], targets[3]
    logits, color, box = net(images.contiguous(memory_format=torch.channels_last))
    objects = max(len(colors), 1)
    p = logits.sigmoid()
    peak = heat == 1
    found = -((1 - p) ** 2 * F.logsigmoid(logits))[peak].sum()
    empty = -((1 - heat) ** 4 * p**2 * F.logsigmoid(-logits))[~peak].sum()
    heat_loss = (found + empty) / objects
    color_loss = F.cross_entropy(color[picture, :, row, column], colors, reduction="sum") / objects
    box_loss = F.l1_loss(box[picture, :, row, column], boxes, reduction="sum") / objects
    parts = {"heat": heat_loss, "color": color_loss, "box": box_loss}
    return heat_loss + color_loss + box_loss, {k: f"{v.item():.3f}" for k, v in parts.items()}
