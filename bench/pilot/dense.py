"""The same MMDiT, fast for one case: a batch of equal pictures with short prompts, in one process on a CPU.

`Dense` runs the weights of a `model.mmdit.MMDiT` on padded batches, so that `torch.compile` sees one static shape and
fuses everything between the matrix products; weights and activations go into the products in bf16 if asked, while
weights, residual streams, norms and gradients stay fp32. `Muon` is the optimizer of the blocks' matrices.

Shape legend: B samples, Lt text tokens (padded), Li image tokens, D width, H heads, K head dim, C channels of a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import EPS, sinusoid
from model.mmdit import MMDiT
from model.rope import rope_table, sample_positions
from training.engine.muon import orthogonal


class Dense(nn.Module):
    """Velocity [B, Li, C] of square pictures of `tokens` x `tokens` tokens; equal to `MMDiT` up to rounding."""

    def __init__(self, model: MMDiT, tokens: int, text: int, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.model, self.dtype = model, dtype
        config = model.config
        text_at, (image_at,) = sample_positions(text, [(1, tokens, tokens)], config.rope)
        self.register_buffer("text_rope", rope_table(text_at, config.axes_dims_rope), persistent=False)
        self.register_buffer("image_rope", rope_table(image_at, config.axes_dims_rope), persistent=False)

    def forward(self, img: Tensor, txt: Tensor, mask: Tensor, sigma: Tensor) -> Tensor:
        """img [B, Li, C], txt [B, Lt, J], mask [B, Lt] (True where there is a token), sigma [B]."""
        m = self.model
        x = self.linear(m.img_in, img)
        t = self.linear(m.txt_in, F.rms_norm(txt, txt.shape[-1:], m.txt_norm.weight, EPS))
        temb = self.linear(m.time.linear_2, F.silu(self.linear(m.time.linear_1, sinusoid(sigma))))
        temb = F.silu(temb)
        seen = F.pad(mask, (0, img.shape[1]), value=True)[:, None, None]
        bias = torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, float("-inf"))
        rope = torch.cat([self.text_rope, self.image_rope])
        for block in m.blocks:
            x, t = self.block(block, x, t, temb, bias, rope)
        scale, shift = self.linear(m.output.mod, temb)[:, None].chunk(2, dim=-1)
        return self.linear(m.output.proj, modulate(x, shift, scale))

    def block(self, block: nn.Module, x: Tensor, t: Tensor, temb: Tensor, bias: Tensor, rope: Tensor):
        """One block: image stream x [B, Li, D] and text stream t [B, Lt, D]; the last one leaves the text as it is."""
        n = t.shape[1]
        i1, i2, i3, i4, i5, i6 = self.linear(block.img.mod, temb)[:, None].chunk(6, dim=-1)
        t1, t2, t3, t4, t5, t6 = self.linear(block.txt.mod, temb)[:, None].chunk(6, dim=-1)
        text, image = self.qkv(block.txt, modulate(t, t1, t2)), self.qkv(block.img, modulate(x, i1, i2))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, rope, self.dtype), rotate(k, rope, self.dtype), v))
        heads = self.attend(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x + i3 * self.linear(block.img.out, heads[:, n:])
        x = x + i6 * self.mlp(block.img, modulate(x, i4, i5))
        if not block.last:
            t = t + t3 * self.linear(block.txt.out, heads[:, :n])
            t = t + t6 * self.mlp(block.txt, modulate(t, t4, t5))
        return x, t

    def compile_blocks(self) -> "Dense":
        """Compile a block once for all (twice with the last): a sixth of the wait for a whole compiled model."""
        self.block = torch.compile(self.block)
        return self

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The layer's product in `dtype`, returned as fp32."""
        return F.linear(x.to(self.dtype), layer.weight.to(self.dtype), layer.bias.to(self.dtype)).float()

    def qkv(self, stream: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (normalised) in fp32, values in `dtype`, each [B, L, H, K].

        The channels that a rotation pairs are neighbours in the model. Here queries and keys have all first partners,
        then all second ones, which leaves their products alone and lets the rotation run on whole vectors.
        """
        k = stream.head_dim
        order = lambda w: w.unflatten(0, (-1, k // 2, 2)).transpose(1, 2).flatten(0, 2)  # noqa: E731
        weight = torch.cat([order(stream.q.weight), order(stream.k.weight), stream.v.weight]).to(self.dtype)
        bias = torch.cat([order(stream.q.bias), order(stream.k.bias), stream.v.bias]).to(self.dtype)
        q, key, v = F.linear(x.to(self.dtype), weight, bias).unflatten(-1, (3, -1, k)).unbind(2)
        norm = lambda y, w: F.rms_norm(y.float(), y.shape[-1:], order(w), EPS)  # noqa: E731
        return norm(q, stream.q_norm.weight), norm(key, stream.k_norm.weight), v

    def mlp(self, stream: nn.Module, x: Tensor) -> Tensor:
        return self.linear(stream.mlp_out, F.gelu(self.linear(stream.mlp_in, x), approximate="tanh"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Written out: at some tens of tokens the fused kernel costs more than it saves."""
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).float().softmax(-1).to(v.dtype) @ v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def rotate(x: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary embedding of x [B, L, H, K], partners K/2 apart, by table [L, K/2, 2]."""
    cos, sin = table[:, None].unbind(-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Keller Jordan, 2024), for matrices; equal shapes together.

    The step of a matrix [o, i] is lr * sqrt(max(1, o / i)) * orthogonal.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01,
                 dtype: torch.dtype = torch.bfloat16):  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for (o, i), params in shapes.items():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                lr = group["lr"]
                steps = orthogonal(update.to(self.dtype)).float() * (-lr * max(1, o / i) ** 0.5)
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, list(steps.unbind()))
