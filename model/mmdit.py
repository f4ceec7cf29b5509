"""The MMDiT of Qwen-Image: v = MMDiT(x_sigma, text, sigma), the velocity of the flow at noise level sigma.

Source: Qwen-Image report (arXiv 2508.02324), section 2.3; exact against diffusers' QwenImageTransformer2DModel.
Shape legend: S samples, Lt / Li tokens of the text / image stream, D width, C channels of a token.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpu_math  # noqa: F401
from model.config import MMDiTConfig
from model.fused import EPS, Rows
from model.layers import Block, OutputLayer, TimeEmbedding
from model.ops import Ops, fill_weight, whole_shape
from model.packing import ModelInputs
from model.rope import rope_table


class MMDiT(nn.Module):
    """Dual-stream diffusion transformer over packed batches.

    `ops` supplies the layers: plain torch by default, Megatron / Transformer-Engine from `training.engine.ops`.
    Weights are uninitialised in a known way until `initialize` or a loader fills them.
    """

    def __init__(self, config: MMDiTConfig, ops: Ops | None = None):
        super().__init__()
        self.config, self.ops = config, ops or Ops()
        if config.num_attention_heads % self.ops.heads_divisor:
            raise ValueError(
                f"{config.num_attention_heads} heads do not divide over "
                f"{self.ops.heads_divisor} tensor x context parallel ranks"
            )
        self.img_in = self.ops.replicated(config.in_channels, config.width)
        self.txt_norm = self.ops.token_norm(config.joint_attention_dim, EPS)
        self.txt_in = self.ops.replicated(config.joint_attention_dim, config.width)
        self.time = TimeEmbedding(config, self.ops)
        self.blocks = nn.ModuleList(
            Block(config, self.ops, last=i == config.num_layers - 1) for i in range(config.num_layers)
        )
        self.output = OutputLayer(config, self.ops)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: that of its norms, for linear layers may be stored in another."""
        return self.txt_norm.weight.dtype

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Velocity [n_target, C] of the target tokens, sample after sample (see `Pack.split_targets`)."""
        ops, dtype = self.ops, self.dtype
        if inputs.img.shape[-1] != self.config.in_channels or inputs.txt.shape[-1] != self.config.joint_attention_dim:
            raise ValueError(
                f"image tokens of {inputs.img.shape[-1]} and text of {inputs.txt.shape[-1]} channels; this model takes "
                f"{self.config.in_channels} and {self.config.joint_attention_dim}"
            )
        if ops.shards == 1 and inputs.img.device.type == "cpu":
            inputs = inputs.evened()
        pack = inputs.pack
        img = self.img_in(ops.shard_tokens(inputs.img).to(dtype))
        txt = self.txt_in(self.txt_norm(ops.shard_tokens(inputs.txt).to(dtype)))

        temb = txt_temb = F.silu(self.time(inputs.sigma, dtype))
        if self.config.zero_cond_t:  # references are modulated by the rows of sigma = 0
            temb = torch.cat([temb, F.silu(self.time(torch.zeros_like(inputs.sigma), dtype))])
        img_rows, txt_rows, out_rows = self._rows(inputs, temb)
        txt_pos, img_pos = pack.positions(self.config.rope)
        img_rope, txt_rope = (ops.shard_context(rope_table(p, self.config.axes_dims_rope)) for p in (img_pos, txt_pos))
        for block in self.blocks:
            img, txt = block(img, txt, temb, txt_temb, img_rows, txt_rows, img_rope, txt_rope, pack)

        if ops.shards == 1:
            img = img[: ops.tokens_to_end(pack)]
        velocity = self.output(img, txt_temb, out_rows)
        return ops.gather_tokens(velocity)[: pack.n_target]

    def _rows(self, inputs: ModelInputs, like: Tensor) -> tuple[Rows, Rows, Rows]:
        """Modulation rows of this rank's image tokens, text tokens and output tokens."""
        pack, levels = inputs.pack, len(inputs.sigma)
        own = list(inputs.sigma_row or range(pack.n_samples))
        clean = [row + levels for row in own] if self.config.zero_cond_t else own
        n_img, n_txt = len(inputs.img), len(inputs.txt)
        whole = self.ops.shards == 1
        n_out = self.ops.tokens_to_end(pack) if whole else n_img
        rows = (
            Rows.of(pack.target_lengths + pack.reference_lengths, own + clean, n_img, len(like), like, whole),
            Rows.of(pack.text_lengths, own, n_txt, levels, like, whole),
            Rows.of(pack.target_lengths, own, n_out, levels, like, whole),
        )
        if whole:
            return rows
        return tuple(Rows(self.ops.shard_tokens(r.one_hot), None) for r in rows)

    @torch.no_grad()
    def initialize(self, seed: int) -> "MMDiT":
        """Fill all weights: Xavier-uniform linears, N(0, .02) time embedding, zero modulation and output (adaLN-Zero).

        Each tensor depends on (seed, its name) alone and every rank takes its slice of the same whole, so a model
        starts alike in every parallel layout. Adapters keep their own initialisation.
        """
        for name, _ in self.named_parameters():
            if ".lora." in name:
                continue
            shape, generator = whole_shape(self, name), named_generator(seed, name)
            if name.endswith("norm.weight"):
                full = torch.ones(shape)
            elif name.endswith("bias") or ".mod." in name or name.startswith("output."):
                full = torch.zeros(shape)
            elif name.startswith("time."):
                full = torch.randn(shape, generator=generator) * 0.02
            else:
                bound = (6 / sum(shape)) ** 0.5
                full = (torch.rand(shape, generator=generator) * 2 - 1) * bound
            fill_weight(self, name, full)
        return self


def named_generator(seed: int, name: str) -> torch.Generator:
    """Source of random numbers for one tensor, a function of (seed, its name)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
