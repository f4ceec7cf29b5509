"""Flow-GRPO on a bandit: a small model, a linear decoder, and brightness as reward."""

from pathlib import Path

import pytest
import torch
from small_run import CONFIG, random_weights
from worlds import run_world

from model.text_to_image import TextToImage

GROUP, SIZE_PX = 16, 32
TXT, EMPTY = torch.ones(3, CONFIG.joint_attention_dim), -torch.ones(2, CONFIG.joint_attention_dim)


class LinearVAE:
    """Three channels of the latent are the colours, 8 x 8 pixels a cell."""

    def decode_latent(self, latent):
        return (latent[:, :3] / 3).clamp(-1, 1).repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


class OnePrompt:
    def encode(self, prompts, images=None):
        return [EMPTY if p == " " else TXT for p in prompts]


def brightness(images, prompts, metadata):
    return {"reward": torch.tensor([i.mean() / 255 for i in images], dtype=torch.float32)}


def learn(rank: int, folder: Path, lr: float, kind: str, cfg_scale: float) -> tuple[float, float, float]:
    """(brightness before, brightness after, KL at the end) of ODE pictures at seeds that training doesn't use."""
    from posttrain.objectives import FlowGRPO
    from posttrain.prompts import Prompt
    from posttrain.rollout import Rollouts
    from training.engine.config import EngineConfig, OptimizerConfig
    from training.engine.step import Engine
    from training.loop import LoopConfig, train
    from training.run_folder import RunFolder, read_metrics

    settings = EngineConfig(optimizer=OptimizerConfig(lr=lr, warmup_steps=0))
    engine = Engine(CONFIG, settings, 25)
    engine.load_weights(random_weights(engine.model.named_parameters(), scale=0.05))
    engine.snapshot("reference")
    artist = TextToImage(engine.model, OnePrompt(), LinearVAE(), align=engine.align)

    def score() -> float:
        pictures = artist.generate(["any"] * 16, [(SIZE_PX, SIZE_PX)] * 16, list(range(16)), 10, cfg_scale)
        return brightness(pictures, None, None)["reward"].mean().item()

    objective = FlowGRPO(clip=0.0256, beta=0.001)
    batches = Rollouts(
        engine=engine, artist=artist, reward=brightness, objective=objective, prompts=[Prompt("p", "any", {})],
        prompts_per_update=1, group=GROUP, size_px=SIZE_PX, steps=6, cfg_scale=cfg_scale, noise_level=0.7, kind=kind,
        window=0, max_tokens=10**6, advantage_std="group", updates_per_rollout=1, seed=0,
    )  # fmt: skip
    before = score()
    train(engine, objective, batches, LoopConfig(steps=25, save_every=25), RunFolder(folder, settings))
    after = score()
    return before, after, read_metrics(folder)[-1]["kl"]


@pytest.mark.parametrize("kind, cfg_scale", [("flow-grpo", 2.0), ("cps", 1.0)])
def test_reward_rises(kind, cfg_scale, tmp_path):
    before, after, kl = run_world(1, learn, tmp_path, 3e-3, kind, cfg_scale, deadline_s=400)[0]
    assert after > before + 0.08 and kl > 0


def test_without_a_learning_rate_nothing_rises(tmp_path):
    before, after, kl = run_world(1, learn, tmp_path, 0.0, "flow-grpo", 2.0, deadline_s=400)[0]
    assert after == before and kl == 0
