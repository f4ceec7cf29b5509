"""Steps of the engine, all weights training: some layers of the 20B width at 1328 px, with AdamW, moving average and
clipping, in a process group of one; peak memory beside what the plan counts."""

import statistics

import torch

from bench.gpu.measure import here, matmul_flops, timed
from data_pipeline.sample import EncodedSample
from model.config import PRESETS, MMDiTConfig
from training.engine.config import EngineConfig
from training.engine.step import Engine
from training.flow_matching import VelocityMSE
from training.randomness import Randomness

LAYERS, SIDE_PX, TXT, STEPS = 4, 1328, 256, 8


def case(tiny: bool) -> dict:
    shape = PRESETS["tiny"] if tiny else MMDiTConfig(num_layers=LAYERS)
    side, txt = (64, 16) if tiny else (SIDE_PX, TXT)
    engine = Engine(shape, EngineConfig(), STEPS)
    engine.initialize(0)
    sample = EncodedSample("k", torch.randn(16, 1, side // 8, side // 8), torch.randn(txt, shape.joint_attention_dim))
    rng, runs = Randomness(0), []
    for _ in range(2 if tiny else STEPS):
        runs.append(timed(lambda: engine.step(VelocityMSE(), [[sample]], rng)))
    seconds = statistics.median(s for s, _ in runs[len(runs) // 2 :])
    flops = 3 * shape.forward_flops((side // 16) ** 2, txt)
    dtype = torch.bfloat16 if here().type == "cuda" else torch.float32
    engine.close()
    return {
        "parameters": shape.num_parameters,
        "step_seconds": seconds,
        "mfu": flops / seconds / matmul_flops(dtype, 256 if tiny else 8192),
        "peak_gib": max(peak for _, peak in runs),
    }
