"""Shapes of the VAE (Wan 2.1, arXiv 2503.20314; Qwen-Image report, arXiv 2508.02324); imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VAEConfig:
    """Architecture and latent statistics; field names and defaults are those of diffusers' `AutoencoderKLQwenImage`.

    Raises ValueError where the numbers cannot form a VAE.
    """

    base_dim: int = 96
    """Channels at full resolution."""
    z_dim: int = 16
    """Channels of the latent."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level, in units of base_dim; levels are 2x apart in space."""
    num_res_blocks: int = 2
    """Residual blocks of each level of the encoder; the decoder has one more."""
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    """Which of the encoder's downsamplings also halve time (spelt as in the files)."""
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def __post_init__(self):
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.base_dim, self.z_dim, self.num_res_blocks, *self.dim_mult) < 1:
            raise ValueError(f"every size of a VAE must be positive: {self}")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(f"temperal_downsample needs {len(self.dim_mult) - 1} entries, one a downsampling")
        if any(self.base_dim * m % 2 for m in self.dim_mult[1:]):
            raise ValueError("the decoder halves the channels of every level but the first: they must be even")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim or min(self.latents_std) <= 0:
            raise ValueError(f"latents_mean and latents_std need {self.z_dim} entries each, the stds positive")

    @property
    def spatial(self) -> int:
        """Pixels per latent cell along height and width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal(self) -> int:
        """Frames per latent frame, after the first, which stands alone."""
        return 2 ** sum(self.temperal_downsample)


PRESETS: dict[str, VAEConfig] = {
    "tiny": VAEConfig(8, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16),
    "small": VAEConfig(16, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16),
    "qwen-image": VAEConfig(),
}
