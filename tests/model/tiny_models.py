"""Tiny models with random weights: ours, and diffusers' own class carrying the same numbers."""

from dataclasses import asdict, dataclass, replace

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from model.config import MMDiTConfig
from model.diffusers_io.names import to_diffusers
from model.mmdit import MMDiT
from model.packing import Size, pack_inputs, patchify, token_size

CONFIG = MMDiTConfig(2, 2, 16, joint_attention_dim=24, axes_dims_rope=(4, 6, 6))
EDIT_2511 = replace(CONFIG, num_layers=3, zero_cond_t=True)
WIDER = MMDiTConfig(3, 3, 32, joint_attention_dim=40, axes_dims_rope=(8, 12, 12))


def random_model(config: MMDiTConfig = CONFIG, seed: int = 0) -> MMDiT:
    """An MMDiT in which every weight matters: nothing is initialised to zero."""
    model = MMDiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + name.endswith("norm.weight"))
    return model


def diffusers_twin(model: MMDiT) -> QwenImageTransformer2DModel:
    """diffusers' class with the weights of `model`."""
    theirs = QwenImageTransformer2DModel(**{k: v for k, v in asdict(model.config).items() if k != "rope"})
    theirs.load_state_dict({to_diffusers(n): p.detach().clone() for n, p in model.named_parameters()})
    return theirs


@dataclass
class Case:
    """One sample: a target at noise level sigma, a prompt, reference latents, and a direction to project on."""

    target: Tensor
    txt: Tensor
    sigma: float
    references: list[Tensor]
    direction: Tensor

    @property
    def size(self) -> Size:
        return token_size(self.target)


def case(config: MMDiTConfig, txt: int, size: Size, references: tuple[Size, ...] = (), seed: int = 0) -> Case:
    """A random sample; sizes are (frames, height, width) in tokens."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    latent = lambda f, h, w: normal(config.out_channels, f, 2 * h, 2 * w)  # noqa: E731
    target = latent(*size)
    sigma = torch.rand((), generator=generator).item()
    refs = [latent(*r) for r in references]
    return Case(target, normal(txt, config.joint_attention_dim), sigma, refs, normal(*patchify(target).shape))


def run_ours(model: MMDiT, cases: list[Case], align: int = 16) -> list[Tensor]:
    """Velocities [n_i, C] of the cases, in one pack."""
    inputs = pack_inputs(
        [c.target for c in cases],
        [c.txt for c in cases],
        torch.tensor([c.sigma for c in cases]),
        [c.references for c in cases],
        align,
    )
    return inputs.pack.split_targets(model(inputs))


def run_theirs(model: QwenImageTransformer2DModel, case: Case, pad_txt: int = 0) -> Tensor:
    """Velocity [n, C] by diffusers, optionally with the prompt padded by garbage and masked."""
    img = torch.cat([patchify(x) for x in (case.target, *case.references)])
    txt, mask = case.txt, None
    if pad_txt:
        mask = torch.arange(len(txt) + pad_txt)[None] < len(txt)
        txt = torch.cat([txt, torch.full((pad_txt, txt.shape[1]), 3.0)])
    out = model(
        hidden_states=img[None],
        encoder_hidden_states=txt[None],
        encoder_hidden_states_mask=mask,
        timestep=torch.tensor([case.sigma]),
        img_shapes=[[case.size, *map(token_size, case.references)]],
        return_dict=False,
    )[0]
    return out[0, : len(case.direction)]


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """Gradient of every parameter, by name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
