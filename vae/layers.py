"""Layers of the causal video VAE (Wan 2.1, arXiv 2503.20314, section 4.2; names as in diffusers' files).

A picture is [B, C, H, W] and runs in 2D; a clip is [B, C, T, H, W]. With one frame and no past, every causal 3D
convolution sees zeros but for its last temporal tap, so Conv2d with that tap is the same function.

`past` lets a clip be processed in pieces: it holds the last frames that each temporal layer has seen. The first piece
has 1 + 4a frames (1 + a latent frames), later ones 4b (b); the result equals the whole clip at once. `past=None` is
the whole clip at once, with nothing kept.

Shape legend: B clips, C channels, T frames, H, W spatial sizes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = dict[nn.Module, Tensor]


class CausalConv3d(nn.Conv3d):
    """Convolution with zero padding in space and, in time, on the past side only; weight [O, I, kt, kh, kw]."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride_t: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride=(stride_t, 1, 1))
        self.border = (kernel[1] // 2, kernel[2] // 2)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if x.ndim == 4:
            return F.conv2d(x, self.weight[:, :, -1], self.bias, padding=self.border)
        if history := self.kernel_size[0] - 1:
            before = None if past is None else past.get(self)
            if before is None:
                before = x.new_zeros(*x.shape[:2], history, *x.shape[3:])
            x = torch.cat([before, x], dim=2)
            if past is not None:
                past[self] = x[:, :, -history:].clone()
        return F.conv3d(x, self.weight, self.bias, padding=(0, *self.border))


class RMSNorm(nn.Module):
    """x / rms(x) over channels, times `gamma`: [B, C, ...] -> same."""

    def __init__(self, dim: int, spatial_dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.flatten(), 1e-12).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1 = RMSNorm(in_dim, 3)
        self.conv1 = CausalConv3d(in_dim, out_dim, (3, 3, 3))
        self.norm2 = RMSNorm(out_dim, 3)
        self.conv2 = CausalConv3d(out_dim, out_dim, (3, 3, 3))
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), past)
        h = self.conv2(F.silu(self.norm2(h)), past)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention within each frame, with a residual."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if x.ndim == 5:
            return per_frame(self, x)
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width and, with `time`, the frames after the first."""

    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride_t=2) if time else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if x.ndim == 4:
            return self.resample(x)
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        conv, before = self.time_conv, None if past is None else past.get(self)
        if past is not None:
            past[self] = x[:, :, -1:].clone()
        if before is not None:
            return F.conv3d(torch.cat([before, x], dim=2), conv.weight, conv.bias, stride=conv.stride)
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], F.conv3d(x, conv.weight, conv.bias, stride=conv.stride)], dim=2)


class Upsample(nn.Module):
    """Double height and width, halve the channels and, with `time`, double the frames after the first."""

    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        if x.ndim == 4:
            return self.resample(x)
        if self.time_conv is not None:
            # The clip's first frame stays alone, and the frames after it do not see it here.
            alone = 0 if past is not None and self in past else 1
            if past is not None:
                past[self] = x.new_empty(0)
            first, x = x[:, :, :alone], x[:, :, alone:]
            if x.shape[2]:
                x = self.time_conv(x, past).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
            x = torch.cat([first, x], dim=2)
        return per_frame(self.resample, x)


def per_frame(function, x: Tensor) -> Tensor:
    """Apply a map of pictures to each frame of [B, C, T, H, W]."""
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
