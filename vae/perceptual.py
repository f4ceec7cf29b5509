"""Perceptual distances: modules that map pictures x, y [N, 3, H, W] in [-1, 1] to [N], differentiable in x.

`gradient-pyramid` needs no weights: it compares edges at several scales and knows nothing of objects or letters.
`lpips:FILE` and `convnext:FOLDER` compare features of networks that were trained on photographs, from local files.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def perceptual(name: str) -> nn.Module:
    """The distance called `gradient-pyramid`, `lpips:FILE` or `convnext:FOLDER`.

    Raises ValueError for another name, and for weights that are missing, damaged or of another network.
    """
    kind, _, path = name.partition(":")
    if kind == "gradient-pyramid" and not path:
        return GradientPyramid()
    if kind in ("lpips", "convnext") and path:
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist; {kind} takes its weights from there, and downloads none")
        return {"lpips": LPIPS, "convnext": ConvNeXt}[kind](Path(path)).eval().requires_grad_(False)
    raise ValueError(f"no perceptual distance {name!r}; there are gradient-pyramid, lpips:FILE and convnext:FOLDER")


class GradientPyramid(nn.Module):
    """Mean absolute difference of the pictures' horizontal and vertical finite differences, averaged over octaves."""

    def __init__(self, octaves: int = 3):
        super().__init__()
        self.octaves = octaves

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        error, total = x - y, torch.zeros(len(x), device=x.device)
        for octave in range(self.octaves):
            error = F.avg_pool2d(error, 2) if octave else error
            for step in (error.diff(dim=-1), error.diff(dim=-2)):
                total = total + step.abs().flatten(1).mean(1)
        return total / (2 * self.octaves)


def feature_distance(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared difference of features [N, C, H, W], each position scaled to unit length, summed over channels (times
    `weight` [C]) and averaged over positions: [N] (Zhang et al., arXiv 1801.03924, equation 1)."""
    unit = lambda f: f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)  # noqa: E731
    squared = (unit(x) - unit(y)).square()
    if weight is not None:
        squared = squared * weight.view(1, -1, 1, 1)
    return squared.sum(1).mean((1, 2))


class LPIPS(nn.Module):
    """LPIPS v0.1 with VGG16 (arXiv 1801.03924).

    `file`: safetensors with torchvision's VGG16 weights (`features.0.weight` ...) and the package's linear ones
    (`lin0.model.1.weight` ...). ValueError if any is missing.
    """

    CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    """Indices within torchvision's `features`, by stage; stages are 2x2 max pooling apart."""

    def __init__(self, file: Path):
        super().__init__()
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is no safetensors file, or damaged: {error}") from None
        names = [f"features.{i}.{p}" for stage in self.CONVOLUTIONS for i in stage for p in ("weight", "bias")]
        names += [f"lin{i}.model.1.weight" for i in range(len(self.CONVOLUTIONS))]
        if missing := [n for n in names if n not in weights]:
            raise ValueError(f"{file} lacks {len(missing)} weights of VGG16 or LPIPS, the first is {missing[0]}")
        for name in names:
            self.register_buffer(name.replace(".", "_"), weights[name].float(), persistent=False)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def features(self, x: Tensor) -> Iterator[Tensor]:
        x = (x - self.shift) / self.scale
        for number, stage in enumerate(self.CONVOLUTIONS):
            x = F.max_pool2d(x, 2) if number else x
            for i in stage:
                weight, bias = getattr(self, f"features_{i}_weight"), getattr(self, f"features_{i}_bias")
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            yield x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = enumerate(zip(self.features(x), self.features(y), strict=True))
        return sum(feature_distance(a, b, getattr(self, f"lin{i}_model_1_weight").flatten()) for i, (a, b) in pairs)


class ConvNeXt(nn.Module):
    """Distance of the four stages' features of a ConvNeXt in transformers' format (a local folder).

    Raises ValueError if the folder holds something else, or not all weights.
    """

    def __init__(self, folder: Path):
        super().__init__()
        from safetensors import SafetensorError
        from transformers import ConvNextModel

        try:
            self.net, found = ConvNextModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no ConvNeXt that transformers can read: {error}") from None
        if found["missing_keys"]:
            raise ValueError(f"{folder} lacks weights of a ConvNeXt, the first is {min(found['missing_keys'])}")
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        x = ((x + 1) / 2 - self.mean) / self.std
        return self.net(x, output_hidden_states=True).hidden_states[1:]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.features(x), self.features(y), strict=True)
        return sum(feature_distance(a, b) for a, b in pairs)
