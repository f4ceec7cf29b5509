"""The tiny model through the engine on this device: steps, a checkpoint, a resume, pictures; on a GPU compiled, too."""

import math
import tempfile
from pathlib import Path

import torch

from data_pipeline.sample import EncodedSample
from model.config import PRESETS
from model.sampling.draw import Request, Sampler
from model.sampling.guidance import Condition
from model.sampling.schedule import FixedSchedule
from training.engine.config import EngineConfig
from training.engine.step import Engine
from training.flow_matching import VelocityMSE
from training.randomness import Randomness

STEPS = 3


def case(tiny: bool) -> dict:
    shape, rng, found = PRESETS["tiny"], Randomness(0), {}
    generator = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    samples = [
        EncodedSample(f"k{i}", normal(16, 1, 8, 8 + 2 * i), normal(5 + i, shape.joint_attention_dim)) for i in range(4)
    ]
    kinds = {"eager": False} if tiny else {"eager": False, "compiled": True}
    for name, compiled in kinds.items():
        engine = Engine(shape, EngineConfig(compile=compiled), 2 * STEPS)
        engine.initialize(0)
        losses = [engine.step(VelocityMSE(), [samples], rng)["loss"] for _ in range(STEPS)]
        if not all(map(math.isfinite, losses)):
            raise ValueError(f"{name}: losses {losses}")
        with tempfile.TemporaryDirectory() as folder:
            engine.save_step(Path(folder), {}, 1)
            then = engine.step(VelocityMSE(), [samples], rng)["loss"]
            engine.resume(Path(folder))
            again = engine.step(VelocityMSE(), [samples], rng)["loss"]
        if abs(again - then) > 1e-3 * abs(then):
            raise ValueError(f"{name}: after a resume the loss is {again}, not {then}")
        requests = [Request(Condition(s.txt, s.txt, ()), s.latent).to(engine.device) for s in samples]
        latents = Sampler(FixedSchedule(4), align=engine.align).draw(engine.frozen["ema"], requests).latents
        if not all(latent.isfinite().all() for latent in latents):
            raise ValueError(f"{name}: pictures that are not finite")
        found[f"loss, {name}"] = losses[-1]
        engine.close()
    if max(found.values()) > 1.02 * min(found.values()):
        raise ValueError(f"compiled and eager differ: {found}")
    return found
