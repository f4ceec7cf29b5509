"""Train the demo's tiny VAE on, encoder and decoder, on whole small pictures of the shapes world.

The demo's VAE sees 600 steps of 16 crops of 32 pixels and blurs what is small: at 64 pixels it halves a true picture's
chance to be judged right. Noise of a tenth of a channel's spread is added to the latents that are decoded, so that
neighbouring latents look alike and the MMDiT's small errors do not show.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    components: Path = Path("runs/quick/components")
    """Folder with the VAE to start from."""
    out: Path = Path("runs/pilot/vae")
    side: int = 64
    batch_size: int = 24
    lr: float = 2e-3
    noise: float = 0.1
    """Noise on the latents, in units of each channel's standard deviation."""
    decoder_only: bool = False
    """Keep the encoder and the latents' statistics, so that what was trained on the latents stays valid."""
    minutes: float = 8.0
    """Length; the learning rate falls to zero over it."""
    seed: int = 100


def pictures(rng: np.random.Generator, n: int, side: int) -> torch.Tensor:
    """True pictures of training prompts, [n, 3, 1, side, side] in [-1, 1]."""
    from data_pipeline.synthesis import shapes_world

    drawn = [shapes_world.render(shapes_world.sample_prompt(rng, "train"), rng, (side, side)) for _ in range(n)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def main(config: Config) -> None:
    from dataclasses import replace

    from vae.autoencoder import VAE
    from vae.losses import balanced, per_sample_mean
    from vae.perceptual import GradientPyramid

    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    vae = VAE.from_folder(config.components).train()
    vae.video_decoder = vae.video_post_quant_conv = None
    parts = ("decoder.", "post_quant_conv.") if config.decoder_only else ("",)
    params = [p for n, p in vae.named_parameters() if "time_conv" not in n and n.startswith(parts)]
    frozen = {id(p) for p in vae.parameters()} - {id(p) for p in params}
    for p in vae.parameters():
        p.requires_grad_(id(p) not in frozen)
    optimizer = torch.optim.AdamW(params, config.lr, (0.9, 0.99), weight_decay=0.0, fused=True)
    averaged = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    perceptual, start, step, psnr = GradientPyramid(), time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * config.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        x = pictures(rng, config.batch_size, config.side)
        mean, _ = vae.moments(x)
        spread = mean.detach().std((0, 2, 3, 4), keepdim=True)
        y = vae.reconstruct(mean + config.noise * spread * torch.randn_like(mean))
        error = y - x
        terms = per_sample_mean(error.abs()) + per_sample_mean(error.square())
        loss = balanced(terms, perceptual(y[:, :, 0], x[:, :, 0]), 0.2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        averaged.update_parameters(vae)
        psnr = 0.95 * psnr + 0.05 * -10 * math.log10(error.detach().square().mean().item() / 4)
        step += 1
        if step % 50 == 0:
            row = {"step": step, "seconds": round(time.monotonic() - start), "psnr": round(psnr / (1 - 0.95**step), 2)}
            print(json.dumps(row), flush=True)
    vae = averaged.module.eval()
    if config.decoder_only:
        return vae.save(config.out)
    with torch.no_grad():
        z = torch.cat([vae.moments(pictures(rng, 32, config.side))[0] for _ in range(16)]).double()
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    vae.config = replace(vae.config, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    vae.save(config.out)


if __name__ == "__main__":
    run(main, Config)
