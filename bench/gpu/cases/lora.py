"""LoRA of a model of Qwen-Image's size on a base in nf4, with recomputation and random weights, a picture a step:
seconds and peak memory at 1024 and 1328 px. On a card of 24 GB it has to fit."""

import statistics

import torch

from bench.gpu.measure import timed
from data_pipeline.sample import EncodedSample
from model.config import PRESETS
from training.engine.config import EngineConfig
from training.engine.quantized import quantized_layers
from training.engine.step import Engine
from training.flow_matching import VelocityMSE
from training.randomness import Randomness

TXT, STEPS = 256, 4


def case(tiny: bool) -> dict:
    shape = PRESETS["tiny" if tiny else "qwen-image"]
    config = EngineConfig(lora_rank=8 if tiny else 64, quantize="nf4", recompute="block", compile=False)
    engine = Engine(shape, config, STEPS)
    fill_at_random(engine)
    found = {"trained": sum(p.numel() for p in engine.model.parameters() if p.requires_grad)}
    rng = Randomness(0)
    for side in (64,) if tiny else (1024, 1328):
        latent = torch.randn(16, 1, side // 8, side // 8)
        sample = EncodedSample("k", latent, torch.randn(16 if tiny else TXT, shape.joint_attention_dim))
        runs = [timed(lambda s=sample: engine.step(VelocityMSE(), [[s]], rng)) for _ in range(2 if tiny else STEPS)]
        found[f"{side} px seconds"] = statistics.median(s for s, _ in runs[1:])
        found[f"{side} px peak_gib"] = max(peak for _, peak in runs)
    engine.close()
    return found


@torch.no_grad()
def fill_at_random(engine: Engine) -> None:
    """Weights of a plausible size, made on the device."""
    for layer in (layer for _, layer in quantized_layers(engine.model)):
        layer.load_weight(torch.randn(layer.shape, device=layer.bias.device) * 0.02)
    for name, param in engine.model.named_parameters():
        if param.is_floating_point() and ".lora." not in name:
            param.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02)
    engine.initialize_adapters(0)
