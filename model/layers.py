"""Layers of the MMDiT (Qwen-Image report, section 2.3): time embedding, one modality's stream, the dual-stream block.

Shape legend: S samples, L tokens of a stream on this rank, D width, H heads on this rank, K head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MMDiTConfig
from model.fused import EPS, Rows, add_gated, gelu, modulate
from model.ops import Ops
from model.packing import Pack


def sinusoid(sigma: Tensor, dim: int = 256) -> Tensor:
    """Timestep features [S, dim], fp32, cosines first, of sigma [S] in [0, 1] (scaled by 1000, max period 10000)."""
    half = torch.arange(dim // 2, dtype=torch.float32, device=sigma.device)
    angle = 1000.0 * (sigma.float()[:, None] * torch.exp(-math.log(10000.0) * half / (dim // 2)))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Noise level -> conditioning vector: Linear(SiLU(Linear(sinusoid)))."""

    def __init__(self, config: MMDiTConfig, ops: Ops):
        super().__init__()
        self.linear_1 = ops.vector(256, config.width)
        self.linear_2 = ops.vector(config.width, config.width)

    def forward(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid(sigma).to(dtype))))


class Stream(nn.Module):
    """One modality's half of a block: its modulation, attention projections and MLP."""

    def __init__(self, config: MMDiTConfig, ops: Ops):
        super().__init__()
        d, self.head_dim = config.width, config.attention_head_dim
        self.mod = ops.modulation(d, 6 * d)
        self.q, self.k, self.v = ops.column(d, d), ops.column(d, d), ops.column(d, d)
        self.q_norm, self.k_norm = ops.head_norm(self.head_dim, EPS), ops.head_norm(self.head_dim, EPS)
        self.out = ops.row(d, d)
        self.mlp_in, self.mlp_out = ops.column(d, 4 * d), ops.row(4 * d, d)

    def qkv(self, x: Tensor, shift: Tensor, scale: Tensor, rows: Rows, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (normalised, rotated) and values, each [L, H, K]."""
        x = modulate(x, shift, scale, rows)
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        return self.q_norm(q, rope), self.k_norm(k, rope), v

    def add_attention(self, x: Tensor, attention: Tensor, gate: Tensor, rows: Rows) -> Tensor:
        """Gated residual of the attention's heads [L, H, K]."""
        return add_gated(x, self.out(attention.flatten(1)), gate, rows)

    def add_mlp(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, rows: Rows) -> Tensor:
        """Gated residual of the MLP."""
        h = gelu(self.mlp_in(modulate(x, shift, scale, rows)))
        return add_gated(x, self.mlp_out(h), gate, rows)


class Block(nn.Module):
    """Dual-stream block: text and image have their own weights and meet in attention.

    After the attention of the last block (`last=True`) only targets are read: the text stream's output projection and
    MLP are kept for the checkpoint format, frozen and never run, and references end where the whole stream is at hand.
    """

    def __init__(self, config: MMDiTConfig, ops: Ops, last: bool = False):
        super().__init__()
        self.img, self.txt, self.last = Stream(config, ops), Stream(config, ops), last
        self.attention, self.tokens_to_end, self.whole = ops.attention, ops.tokens_to_end, ops.shards == 1
        if last:
            for module in (self.txt.out, self.txt.mlp_in, self.txt.mlp_out):
                module.requires_grad_(False)

    def forward(
        self, img: Tensor, txt: Tensor, img_temb: Tensor, txt_temb: Tensor, img_rows: Rows, txt_rows: Rows,
        img_rope: Tensor, txt_rope: Tensor, pack: Pack,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """img [L, D], txt [L, D]; *_temb = SiLU(time embedding) [R, D]; *_rows map tokens to them."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.img.mod(img_temb).chunk(6, dim=-1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.txt.mod(txt_temb).chunk(6, dim=-1)
        image = self.img.qkv(img, shift1, scale1, img_rows, img_rope)
        text = self.txt.qkv(txt, t_shift1, t_scale1, txt_rows, txt_rope)
        q, k, v = (torch.cat(pair) for pair in zip(text, image, strict=True))
        heads = self.attention(q, k, v, pack)
        text_heads, image_heads = heads.split((len(text[0]), len(image[0])))
        if self.last and self.whole:
            n = self.tokens_to_end(pack)
            img, image_heads, img_rows = img[:n], image_heads[:n], img_rows.prefix(n)
        img = self.img.add_attention(img, image_heads, gate1, img_rows)
        img = self.img.add_mlp(img, shift2, scale2, gate2, img_rows)
        if not self.last:
            txt = self.txt.add_attention(txt, text_heads, t_gate1, txt_rows)
            txt = self.txt.add_mlp(txt, t_shift2, t_scale2, t_gate2, txt_rows)
        return img, txt


class OutputLayer(nn.Module):
    """AdaLN and projection to the velocity of each token; this one's modulation is ordered (scale, shift)."""

    def __init__(self, config: MMDiTConfig, ops: Ops):
        super().__init__()
        self.mod = ops.modulation(config.width, 2 * config.width)
        self.proj = ops.replicated(config.width, config.in_channels)

    def forward(self, x: Tensor, temb: Tensor, rows: Rows) -> Tensor:
        scale, shift = self.mod(temb).chunk(2, dim=-1)
        return self.proj(modulate(x, shift, scale, rows))
