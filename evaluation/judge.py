"""The judge of the shapes world: a small convolutional detector, frozen by hash before any reward was maximised.

It finds objects as peaks of one heat map per shape (CenterNet, arXiv 1904.07850), with colour and box read at the peak.
It was trained on domain-randomised pictures (judge_pictures.py, train_judge.py) and shares no code or method with the
reward's detector, which segments by colour and measures contours.

Shapes: B batch, h = H/4 and w = W/4 cells.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.judge_pictures import COLORS, OTHER, SHAPES
from evaluation.scoring import Found, Objects, group

SIDE = 96
"""Shorter side, in pixels, that pictures are scaled to."""
STRIDE = 4
THRESHOLD = 0.4
WEIGHTS = Path(__file__).with_name("judge.safetensors")
WEIGHTS_SHA256 = "4450752a2b1ff0421873a4770855351fb380e2f0e29419745c3f325700dbb325"
CHANNELS = (24, 48, 80, 112)


def _conv(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class JudgeNet(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] -> heat logits [B, 4, h, w], colour logits [B, 9, h, w], boxes [B, 4, h, w].

    A box is (dx, dy, log width, log height): the centre's offset from the cell's and sizes, all in cells.
    """

    def __init__(self):
        super().__init__()
        a, b, c, d = CHANNELS
        self.stem = _conv(3, a, 2)
        self.quarter = nn.Sequential(_conv(a, b, 2), _conv(b, b))
        self.eighth = nn.Sequential(_conv(b, c, 2), _conv(c, c))
        self.sixteenth = nn.Sequential(_conv(c, d, 2), _conv(d, d), _conv(d, d))
        self.up_eighth = _conv(d, c, size=1)
        self.merge_eighth = _conv(c, c)
        self.up_quarter = _conv(c, b, size=1)
        self.merge_quarter = _conv(b, b)
        self.head = _conv(b, b)
        self.out = nn.Conv2d(b, len(SHAPES) + OTHER + 1 + 4, 1)
        nn.init.constant_(self.out.bias[: len(SHAPES)], -math.log(99))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quarter = self.quarter(self.stem(x * 2 - 1))
        eighth = self.eighth(quarter)
        up = F.interpolate(self.up_eighth(self.sixteenth(eighth)), size=eighth.shape[-2:])
        up = F.interpolate(self.up_quarter(self.merge_eighth(eighth + up)), size=quarter.shape[-2:])
        return self.out(self.head(self.merge_quarter(quarter + up))).split([len(SHAPES), OTHER + 1, 4], 1)


def to_input(image: np.ndarray) -> Tensor:
    """uint8 [h, w, 3] of any size -> [3, H, W] in [0, 1], shorter side 96, sides multiples of 16."""
    scale = SIDE / min(image.shape[:2])
    size = [max(SIDE, round(s * scale / 16) * 16) for s in image.shape[:2]]
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    shrinks = scale < 1
    x = F.interpolate(x, size, mode="area" if shrinks else "bicubic", **({} if shrinks else {"align_corners": False}))
    return x[0].clamp(0, 1)


class Judge:
    """The frozen detector: `judge(images) -> objects of each`, in the form that `scoring.score` takes.

    Raises ValueError if the weights are not the frozen ones.
    """

    def __init__(self, weights: Path = WEIGHTS, sha256: str = WEIGHTS_SHA256):
        from safetensors.torch import load

        data = weights.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise ValueError(f"{weights} is not the frozen judge: its hash is {found[:16]}…, not {sha256[:16]}…")
        self.net = JudgeNet().eval().requires_grad_(False)
        self.net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load(data).items()})
        self.fingerprint = sha256

    def __call__(self, images: list[np.ndarray]) -> list[Objects]:
        """Objects of each picture, one by one, so that a verdict doesn't depend on the batch."""
        return [self._find(image) for image in images]

    @torch.no_grad()
    def _find(self, image: np.ndarray) -> Objects:
        heat, color, box = (o[0] for o in self.net(to_input(image)[None]))
        return group(decode(heat.sigmoid(), color, box, image.shape[:2]), THRESHOLD)


def decode(heat: Tensor, color: Tensor, box: Tensor, size: tuple[int, int]) -> list[tuple[str, Found]]:
    """Peaks of the maps of one picture of `size` (h, w), most confident first; one object per place."""
    best = heat.amax(0)
    peaks = (best == F.max_pool2d(best[None], 3, 1, 1)[0]) & (best > 0.05)
    unit = np.array([size[1] / best.shape[1], size[0] / best.shape[0]])
    found: list[tuple[str, Found]] = []
    for y, x in sorted(peaks.nonzero().tolist(), key=lambda p: -best[p[0], p[1]].item()):
        dx, dy, width, height = box[:, y, x].double().tolist()
        centre = np.array([x + 0.5 + dx, y + 0.5 + dy])
        half = np.exp(np.clip([width, height], -2, 4)) / 2
        corners = np.concatenate([(centre - half) * unit, (centre + half) * unit])
        if any(_overlap(corners, np.array(f.box)) > 0.5 for _, f in found):
            continue
        name = COLORS[i] if (i := int(color[:, y, x].argmax())) < OTHER else None
        shape = SHAPES[int(heat[:, y, x].argmax())]
        found.append((shape, Found(tuple(corners.tolist()), best[y, x].item(), name)))
    return found


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection of two boxes over the smaller one's area."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(np.prod(np.maximum(sides, 0)) / min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2])))
