"""Training of diffusers' QwenImageTransformer2DModel with accelerate, as diffusers' own examples write it.

A DataLoader's worker reads, draws and pads; a batch has pictures of one size and prompts of any length, with a mask;
fp32 weights under autocast; torch's fused AdamW without decay of biases and norms; diffusers' moving average.
"""

import os
from dataclasses import replace
from itertools import islice

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers import QwenImagePipeline
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from bench.loops.ours import FullBatches, diffusers_model
from data_pipeline.dataset import EncodedDataset
from data_pipeline.sample import EncodedSample
from model.config import MMDiTConfig
from training.engine.config import EngineConfig
from training.engine.step import DTYPES
from training.flow_matching import VelocityMSE
from training.randomness import Randomness


class Accelerated:
    """The loop, on steps of `accumulate` batches of `batch` samples, over all ranks."""

    def __init__(
        self, shape: MMDiTConfig, settings: EngineConfig, dataset: EncodedDataset, batch: int, accumulate: int
    ):
        world = int(os.environ.get("WORLD_SIZE", 1))
        self.accelerator = Accelerator(
            mixed_precision="bf16" if settings.dtype == "bfloat16" else "no",
            gradient_accumulation_steps=accumulate // world,
            cpu=not torch.cuda.is_available(),
            # nothing reads what the last block makes of the text
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] if world > 1 else [],
        )
        model = diffusers_model(shape, DTYPES[settings.dtype]).to(self.accelerator.device)
        if settings.compile:
            model.compile_repeated_blocks()
        self.adamw = settings.optimizer
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": self.adamw.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, self.adamw.lr, self.adamw.betas, self.adamw.eps, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.average = EMAModel(self.model.parameters(), decay=settings.ema_decay, foreach=True)
        self.dataset, self.draws, self.rng = dataset, VelocityMSE(), Randomness(0)
        mine = islice(FullBatches(dataset, batch), self.accelerator.process_index, None, world)
        cuda = torch.cuda.is_available()
        self.batches = iter(
            DataLoader(self, batch_sampler=mine, num_workers=1, collate_fn=self.collate, pin_memory=cuda)
        )
        self.losses: list[float] = []
        """Of each step, a picture's."""
        self.tokens = 0
        """That the model ran on, on this rank, with padding."""

    def __getitem__(self, place: tuple[int, int]) -> EncodedSample:
        """For the DataLoader: a sample by (index, epoch)."""
        return replace(self.dataset[place[0]], epoch=place[1])

    def collate(self, samples: list[EncodedSample]) -> dict[str, Tensor]:
        """A batch, with the draws that `VelocityMSE` makes of the same samples."""
        draws, rng = self.draws, self.rng
        dropped = [rng.uniform(s.key, s.epoch, "dropout") < draws.condition_dropout for s in samples]
        texts = [s.txt_empty if drop else s.txt for s, drop in zip(samples, dropped, strict=True)]
        lengths = torch.tensor([len(text) for text in texts])
        padded = {"mask": torch.arange(lengths.max()) < lengths[:, None]} if lengths.unique().numel() > 1 else {}
        return {
            "latent": torch.stack([s.latent for s in samples]),
            "noise": torch.stack([rng.normal(s.key, s.epoch, "noise", tuple(s.latent.shape)) for s in samples]),
            "sigma": torch.stack([draws.sigma(s, rng) for s in samples]),
            "text": pad_sequence(texts, batch_first=True),
            **padded,
        }

    def train(self, steps: int) -> None:
        accelerator = self.accelerator
        for _ in range(steps):
            losses = []
            for batch in islice(self.batches, accelerator.gradient_accumulation_steps):
                with accelerator.accumulate(self.model):
                    loss = self.loss(**{k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()})
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), self.adamw.clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
            self.average.step(self.model.parameters())
            self.losses.append(accelerator.reduce(torch.stack(losses).mean(), "mean").item())

    def loss(self, latent: Tensor, noise: Tensor, sigma: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """A picture's, the mean over the batch; latents [B, 16, 1, H, W], prompts [B, L, D]."""
        size, level = (1, latent.shape[-2] // 2, latent.shape[-1] // 2), sigma[:, None, None, None, None]
        velocity = self.model(
            hidden_states=tokens_of((1 - level) * latent + level * noise),
            encoder_hidden_states=text.float(),
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[[size]] * len(latent),
            return_dict=False,
        )[0]
        self.tokens += len(latent) * (velocity.shape[1] + text.shape[1])
        return ((velocity.float() - tokens_of(noise - latent)) ** 2).mean()

    def close(self) -> None:
        self.batches = iter(())


def tokens_of(latent: Tensor) -> Tensor:
    n, channels, _, height, width = latent.shape
    return QwenImagePipeline._pack_latents(latent, n, channels, height, width)
