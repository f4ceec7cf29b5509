"""Shapes of the MMDiT (Qwen-Image report, arXiv 2508.02324, Table 1). Imports no torch: `--help` reads it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MMDiTConfig:
    """Architecture of one MMDiT; field names and defaults are those of diffusers' `config.json`.

    Raises ValueError where the numbers cannot form a model.
    """

    num_layers: int = 60
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    joint_attention_dim: int = 3584
    """Width of the text encoder's hidden states."""
    in_channels: int = 64
    """Channels of one image token: latent channels x patch_size^2."""
    out_channels: int = 16
    patch_size: int = 2
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    """Head channels that encode (frame, height, width)."""
    zero_cond_t: bool = False
    """Modulate reference tokens as clean images, t = 0 (Qwen-Image-Edit-2511)."""

    rope: Literal["msrope", "text-first", "scaling"] = "msrope"
    """Positions of text and images (see `model/rope.py`); only msrope is Qwen-Image's, the others are for ablations."""

    def __post_init__(self):
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        if min(self.num_layers, self.num_attention_heads, self.attention_head_dim, self.joint_attention_dim) < 1:
            raise ValueError(f"every size of an MMDiT must be positive: {self}")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(a % 2 for a in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} must be even and add up to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if self.in_channels != self.out_channels * self.patch_size**2:
            raise ValueError(f"in_channels {self.in_channels} must be out_channels {self.out_channels} x patch_size^2")

    @property
    def width(self) -> int:
        """Channels of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters, those of the last text branch included."""
        d, layers = self.width, self.num_layers
        linear = lambda i, o: i * o + o  # noqa: E731
        stream = linear(d, 6 * d) + 4 * linear(d, d) + 2 * self.attention_head_dim + linear(d, 4 * d) + linear(4 * d, d)
        ends = linear(self.in_channels, d) + self.joint_attention_dim + linear(self.joint_attention_dim, d)
        time = linear(256, d) + linear(d, d)
        out = linear(d, 2 * d) + linear(d, self.in_channels)
        return layers * 2 * stream + ends + time + out

    def forward_flops(self, img_tokens: int, txt_tokens: int, samples: int = 1) -> int:
        """Multiply-adds x 2 of one forward pass over `samples` equal samples (matrix products only)."""
        d, length = self.width, img_tokens + txt_tokens
        per_token = 12 * d * d
        block = samples * length * per_token * 2 + samples * 2 * 6 * d * d * 2 + samples * 4 * length * length * d
        ends = samples * 2 * d * (2 * img_tokens * self.in_channels + txt_tokens * self.joint_attention_dim)
        return self.num_layers * block + ends


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters: y = W x + scale * B A x (arXiv 2106.09685)."""

    rank: int = 64
    alpha: float = 128.0
    rank_stabilised: bool = False
    """scale = alpha / sqrt(rank) (arXiv 2312.03732) in place of alpha / rank."""
    targets: tuple[str, ...] = ("q", "k", "v", "out")
    """Layers with an adapter, by the end of their name: `q` (both streams), `img.mlp_in`, `mod`, `blocks.0.txt.k`."""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or not self.targets:
            raise ValueError(f"adapters need a positive rank and at least one target: {self}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


PRESETS: dict[str, MMDiTConfig] = {
    "tiny": MMDiTConfig(6, 4, 48, joint_attention_dim=128, axes_dims_rope=(8, 20, 20)),
    "mini": MMDiTConfig(4, 8, 48, joint_attention_dim=128, axes_dims_rope=(8, 20, 20)),
    "small": MMDiTConfig(10, 8, 64, joint_attention_dim=3584, axes_dims_rope=(8, 28, 28)),
    "qwen-image": MMDiTConfig(),
}
