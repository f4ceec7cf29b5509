"""The VAE of Qwen-Image: one causal encoder for pictures and video, a decoder for each (arXiv 2508.02324, section 2.2).

8x8 pixels and, after the first frame, 4 frames make one latent of 16 channels. Parameter names and shapes are those
of diffusers' `AutoencoderKLQwenImage` and `AutoencoderKLWan`, whose files load unchanged; latents outside this file
are normalised per channel, (z - mean) / std, with the statistics in the config.

Shape legend: B clips, T = 1 + 4k frames, F = 1 + k latent frames, H, W pixels, h = H / 8, w = W / 8.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpu_math  # noqa: F401
from vae.config import PRESETS, VAEConfig
from vae.diffusers_folder import load_weights, read_vae_folder, write_vae_folder
from vae.initial import initialize
from vae.layers import Attention, CausalConv3d, Downsample, Past, ResidualBlock, RMSNorm, Upsample
from vae.tiling import Tiles

if TYPE_CHECKING:
    from vae.crops import Crops

__all__ = ["PRESETS", "VAE", "Tiles", "VAEConfig"]


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.resnets[0](x, past)
        return self.resnets[1](self.attentions[0](x), past)


class Encoder(nn.Module):
    """Pixels [B, 3, (T,) H, W] -> moments before `quant_conv` [B, 2 z_dim, (F,) h, w]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(3, dims[0], (3, 3, 3))
        blocks: list[nn.Module] = []
        for level, dim in enumerate(dims[1:]):
            blocks += [ResidualBlock(dim if i else dims[level], dim) for i in range(config.num_res_blocks)]
            if level < len(config.temperal_downsample):
                blocks.append(Downsample(dim, time=config.temperal_downsample[level]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.conv_in(x, past)
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        return self.conv_out(F.silu(self.norm_out(x)), past)


class UpBlock(nn.Module):
    """Residual blocks of one level, then upsampling to the next."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsample: Upsample | None):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(out_dim if i else in_dim, out_dim) for i in range(num_res_blocks)])
        self.upsamplers = nn.ModuleList([upsample]) if upsample else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for block in [*self.resnets, *(self.upsamplers or ())]:
            x = block(x, past)
        return x


class Decoder(nn.Module):
    """Latent after `post_quant_conv` [B, z_dim, (F,) h, w] -> pixels [B, 3, (T,) H, W], not clamped."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        times = config.temperal_downsample[::-1]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.mid_block = MidBlock(dims[0])
        blocks = []
        for level, dim in enumerate(dims[1:]):
            upsample = Upsample(dim, time=times[level]) if level < len(times) else None
            in_dim = dims[level] // 2 if level else dims[0]
            blocks.append(UpBlock(in_dim, dim, config.num_res_blocks + 1, upsample))
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out = RMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 3, (3, 3, 3))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = self.mid_block(self.conv_in(x, past), past)
        for block in self.up_blocks:
            x = block(x, past)
        return self.conv_out(F.silu(self.norm_out(x)), past)


class VAE(nn.Module):
    """Encoder, picture decoder and, after `split_decoders`, a video decoder of its own.

    Without one (a plain Wan 2.1 VAE), `decoder` serves pictures and clips. `state_dict()` has the names of the
    diffusers class; the video decoder's come on top as `video_decoder.*` and `video_post_quant_conv.*`. With `tiles`,
    what is larger than a tile is encoded and decoded tile by tile.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        z = config.z_dim
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, (1, 1, 1))
        self.post_quant_conv = CausalConv3d(z, z, (1, 1, 1))
        self.decoder = Decoder(config)
        self.video_post_quant_conv: CausalConv3d | None = None
        self.video_decoder: Decoder | None = None
        self.tiles: Tiles | None = None

    def normalise(self, z: Tensor) -> Tensor:
        """(z - mean) / std per channel, fp32, of raw latents [B, 16, F, h, w]."""
        mean, std = self._statistics(z)
        return (z.float() - mean) / std

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of `normalise`, in the model's dtype."""
        mean, std = self._statistics(latent)
        return (latent.float() * std + mean).to(self.quant_conv.weight.dtype)

    def _statistics(self, like: Tensor) -> list[Tensor]:
        both = (self.config.latents_mean, self.config.latents_std)
        return [torch.tensor(x, device=like.device).view(1, -1, 1, 1, 1) for x in both]

    def split_decoders(self) -> None:
        """Keep the present decoder for video and go on with a copy of it for pictures."""
        if self.video_decoder is None:
            self.video_post_quant_conv = copy.deepcopy(self.post_quant_conv)
            self.video_decoder = copy.deepcopy(self.decoder)

    def initialize(self, seed: int) -> "VAE":
        """Fill all weights as `vae.initial` says, a function of the seed."""
        initialize(self, seed)
        return self

    def forward(self, inputs: "Crops") -> list[tuple[Tensor, Tensor, Tensor]]:
        """Training pass: (mean, log-variance, reconstruction) of each tensor of `inputs.pixels`.

        Decodes mean + std * noise. Parameters that only clips use take part with weight 0, because a gradient reduction
        that overlaps the backward pass waits for every parameter.
        """
        idle = sum(p.sum() for n, p in self.named_parameters() if "time_conv" in n and p.requires_grad)
        results = []
        for pixels, noise in zip(inputs.pixels, inputs.noise, strict=True):
            mean, logvar = self.moments(pixels.to(self.quant_conv.weight.dtype))
            z = mean + noise.to(mean.dtype) * (0.5 * logvar).exp()
            results.append((mean, logvar, self.reconstruct(z) + 0 * idle))
        return results

    # Without statistics: what training sees.

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, 16, F, h, w] of the posterior of [B, 3, T, H, W]; differentiable."""
        one = pixels.shape[2] == 1
        x = self.quant_conv(self.encoder(as_picture(pixels) if one else pixels))
        mean, logvar = (x[:, :, None] if one else x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def reconstruct(self, z: Tensor, decoder: Literal["image", "video"] | None = None) -> Tensor:
        """Pixels [B, 3, T, H, W], not clamped, of raw latents [B, 16, F, h, w]; differentiable."""
        post_quant_conv, net = self._decoder(z.shape[2], decoder)
        if z.shape[2] == 1:
            return net(post_quant_conv(as_picture(z)))[:, :, None]
        return net(post_quant_conv(z))

    def _decoder(self, latent_frames: int, name: str | None) -> tuple[CausalConv3d, Decoder]:
        name = name or ("image" if latent_frames == 1 else "video")
        if name == "video" and self.video_decoder is not None:
            return self.video_post_quant_conv, self.video_decoder
        return self.post_quant_conv, self.decoder

    # With statistics: what everyone else uses.

    @torch.no_grad()
    def encode_latent(self, pixels: Tensor, other_lengths: Literal["refuse", "pad"] = "refuse") -> Tensor:
        """Normalised posterior mode [B, 16, F, h, w] of pixels [B, 3, T, H, W] in [-1, 1].

        H and W that are no multiples of 8 are padded by repeating the border (give `decode_latent` the size to crop
        back). T other than 4k + 1 raises ValueError, or with "pad" is filled up with the last frame.
        """
        self._check_pixels(pixels)
        if self.tiles is not None and max(pixels.shape[-2:]) > self.tiles.side:
            return self.tiles.apply(lambda tile: self.encode_latent(tile, other_lengths), pixels, 8, 1)
        over = (pixels.shape[2] - 1) % self.config.temporal
        if over and other_lengths == "refuse":
            raise ValueError(
                f"{pixels.shape[2]} frames are not 1 + a multiple of {self.config.temporal}: cut the clip, or pass "
                'other_lengths="pad" to repeat its last frame'
            )
        if over:
            last = pixels[:, :, -1:]
            pixels = torch.cat([pixels, last.expand(-1, -1, self.config.temporal - over, -1, -1)], dim=2)
        if pixels.shape[2] == 1:
            return self.normalise(self.moments(self._padded(pixels))[0])
        return torch.cat(list(self.encode_stream([pixels])), dim=2)

    @torch.no_grad()
    def decode_latent(
        self,
        latent: Tensor,
        size: tuple[int, int, int] | None = None,
        decoder: Literal["image", "video"] | None = None,
    ) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] of normalised latents [B, 16, F, h, w].

        `size` (T, H, W) crops off what `encode_latent` padded. One latent frame goes through the image decoder and
        more through the video decoder, unless `decoder` says otherwise.
        """
        self._check_latent(latent)
        if self.tiles is not None and max(latent.shape[-2:]) > self.tiles.side // 8:
            pixels = self.tiles.apply(lambda tile: self.decode_latent(tile, decoder=decoder), latent, 1, 8)
        elif latent.shape[2] == 1:
            pixels = self.reconstruct(self.denormalise(latent), decoder).float().clamp(-1.0, 1.0)
        else:
            pixels = torch.cat(list(self.decode_stream([latent], decoder)), dim=2)
        if size is None:
            return pixels
        cells = (self.config.temporal, self.config.spatial, self.config.spatial)
        if len(size) != 3 or any(not 0 <= p - s < c for s, p, c in zip(size, pixels.shape[2:], cells, strict=True)):
            raise ValueError(f"size {size} (T, H, W) cannot have been padded to {tuple(pixels.shape[2:])}")
        return pixels[:, :, : size[0], : size[1], : size[2]]

    @torch.no_grad()
    def encode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode one long clip in memory that does not grow with its length.

        Takes consecutive pieces [B, 3, any T, H, W] and yields normalised latents [B, 16, 1, h, w] as soon as their
        frames are there. Raises ValueError at the end if the frames were none, or not 4k + 1.
        """
        past: Past = {}
        take, waiting = 1, None
        for piece in pieces:
            self._check_pixels(piece)
            waiting = piece if waiting is None else torch.cat([waiting, piece], dim=2)
            while waiting.shape[2] >= take:
                frames, waiting = waiting[:, :, :take], waiting[:, :, take:]
                yield self.normalise(self.quant_conv(self.encoder(self._padded(frames), past)).chunk(2, dim=1)[0])
                take = self.config.temporal
        if waiting is None or waiting.shape[2]:
            raise ValueError(f"a clip has 1 + a multiple of {self.config.temporal} frames, one or more")

    @torch.no_grad()
    def decode_stream(
        self, pieces: Iterable[Tensor], decoder: Literal["image", "video"] | None = "video"
    ) -> Iterator[Tensor]:
        """Decode one long clip, latents [B, 16, any F, h, w], frame by latent frame: yields [B, 3, 1, H, W], then
        [B, 3, 4, H, W] each, in [-1, 1], in memory that does not grow with the clip's length."""
        post_quant_conv, net = self._decoder(2, decoder)
        past: Past = {}
        for piece in pieces:
            self._check_latent(piece)
            for latent in piece.split(1, dim=2):
                yield net(post_quant_conv(self.denormalise(latent)), past).float().clamp(-1.0, 1.0)

    def _padded(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.quant_conv.weight.dtype)
        height, width = pixels.shape[-2:]
        pad = (0, -width % self.config.spatial, 0, -height % self.config.spatial)
        return F.pad(pixels, (*pad, 0, 0), mode="replicate") if any(pad) else pixels

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 5 or pixels.shape[1] != 3 or not pixels.is_floating_point() or not pixels.numel():
            raise ValueError(f"pixels must be floats [B, 3, T, H, W] T >= 1, are {pixels.dtype} {tuple(pixels.shape)}")
        low, high = pixels.aminmax()
        if not (low >= -1.001 and high <= 1.001):
            raise ValueError(f"pixels must be in [-1, 1] and not NaN, are in [{low.item():g}, {high.item():g}]")

    def _check_latent(self, latent: Tensor) -> None:
        if latent.ndim != 5 or latent.shape[1] != self.config.z_dim or not latent.numel():
            raise ValueError(f"latents must be [B, {self.config.z_dim}, F, h, w], are {tuple(latent.shape)}")
        if not latent.isfinite().all():
            raise ValueError("latents hold NaN or infinite values")

    # Files.

    def fingerprint(self) -> str:
        """Hash of what a latent depends on: the encoder's weights, as bf16 whatever they are run in, and the latent
        statistics."""
        digest = hashlib.sha256(repr((self.config.latents_mean, self.config.latents_std)).encode())
        for name, weight in sorted(self.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                digest.update(f"{name} {tuple(weight.shape)} ".encode())
                digest.update(weight.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @classmethod
    def from_folder(cls, folder: str | Path, device: str | torch.device = "cpu", dtype=torch.float32) -> "VAE":
        """Read a components folder (`vae/`, and `vae_video/` if it is there) or one diffusers VAE folder.

        Raises ValueError if the files are of another architecture, or if the two folders have different encoders.
        """
        folder = Path(folder)
        config, weights = read_vae_folder(folder / "vae" if (folder / "vae").is_dir() else folder)
        vae = cls(config)
        load_weights(vae, weights, folder)
        if (video := folder / "vae_video").is_dir():
            video_config, video_weights = read_vae_folder(video)
            if video_config != config:
                raise ValueError(f"{video} has another config than {folder / 'vae'}: they do not belong together")
            vae.split_decoders()
            own = ("decoder.", "post_quant_conv.")
            if not all(torch.equal(w, weights[n]) for n, w in video_weights.items() if not n.startswith(own)):
                raise ValueError(f"{video} has another encoder than {folder / 'vae'}: they do not belong together")
            renamed = {f"video_{n}": w for n, w in video_weights.items() if n.startswith(own)}
            load_weights(vae, {**weights, **renamed}, video)
        return vae.to(device, dtype).eval()

    def save(self, folder: str | Path) -> None:
        """Write `vae/` (AutoencoderKLQwenImage) and, if there is a video decoder, `vae_video/` (AutoencoderKLWan)."""
        weights = self.state_dict()
        image = {n: w for n, w in weights.items() if not n.startswith("video_")}
        if self.video_decoder is not None:
            video = image | {n.removeprefix("video_"): w for n, w in weights.items() if n.startswith("video_")}
            write_vae_folder(Path(folder) / "vae_video", "AutoencoderKLWan", self.config, video)
        write_vae_folder(Path(folder) / "vae", "AutoencoderKLQwenImage", self.config, image)


def as_picture(x: Tensor) -> Tensor:
    """[B, C, 1, H, W] -> [B, C, H, W], channels last in memory, which convolutions are fastest in."""
    return x[:, :, 0].contiguous(memory_format=torch.channels_last)
