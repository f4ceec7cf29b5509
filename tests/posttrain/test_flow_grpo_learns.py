"""Flow-GRPO on a bandit: a small model, a linear decoder, and brightness as reward."""

from pathlib import Path

import pytest
import torch
from small_run import CONFIG, random_weights
from worlds import run_world

from model.sampling.draw import Sampler
from model.sampling.guidance import Condition
from model.sampling.schedule import FixedSchedule
from model.text_to_image import TextToImage

GROUP, SIZE_PX = 16, 32
TXT, EMPTY = torch.ones(3, CONFIG.joint_attention_dim), -torch.ones(2, CONFIG.joint_attention_dim)


class LinearVAE:
    """Three channels of the latent are the colours, 8 x 8 pixels a cell."""

    def decode_latent(self, latent):
        return (latent[:, :3] / 3).clamp(-1, 1).repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


def brightness(images, prompts, metadata):
    return {"reward": torch.tensor([i.mean() / 255 for i in images], dtype=torch.float32)}


def bandit_studio(engine):
    """A studio of one prompt, without a text encoder."""
    from training.studio import Studio

    class Bandit(Studio):
        vae, conditioner = LinearVAE(), None

        def conditions(self, texts):
            return [Condition(TXT, EMPTY)] * len(texts)

    return Bandit(engine, None, 10**6)


def learn(rank: int, folder: Path, lr: float, config, algorithm: str) -> tuple[float, float, dict]:
    """(brightness before, brightness after, last metrics) of ODE pictures at seeds that training doesn't use."""
    from command_line import load_named
    from posttrain.rollout.prompts import Prompt
    from training.engine.config import EngineConfig, OptimizerConfig
    from training.engine.step import Engine
    from training.loop import LoopConfig, train
    from training.run_folder import RunFolder, read_metrics

    settings = EngineConfig(optimizer=OptimizerConfig(lr=lr, warmup_steps=0))
    engine = Engine(CONFIG, settings, 25)
    engine.load_weights(random_weights(engine.model.named_parameters(), scale=0.05))
    trainer = load_named(algorithm)(config, bandit_studio(engine), brightness)
    trainer.prompts = [Prompt("p", "any", {})]
    for name, policy in trainer.frozen.items():
        engine.frozen.keep(name, policy)
    sampler = Sampler(FixedSchedule(10), cfg_scale=config.cfg_scale, align=engine.align)
    artist = TextToImage(engine.model, None, LinearVAE(), sampler=sampler)
    artist.encode = lambda prompts, images: [Condition(TXT, EMPTY)] * len(prompts)

    def score() -> float:
        pictures = artist.generate(["any"] * 16, [(SIZE_PX, SIZE_PX)] * 16, list(range(16)))
        return brightness(pictures, None, None)["reward"].mean().item()

    before = score()
    train(engine, trainer, trainer.batches(), LoopConfig(steps=25, save_every=25), RunFolder(folder, settings))
    return before, score(), read_metrics(folder)[-1]


def grpo(**settings):
    from posttrain.flow_grpo import Config

    return Config(
        prompts_per_update=1, group=GROUP, size_px=SIZE_PX, sampling_steps=6, window=0, beta=0.001, **settings
    )  # fmt: skip


GRPO = "posttrain.flow_grpo:FlowGRPO"


@pytest.mark.parametrize("kind, cfg_scale, starts", [("flow-grpo", 2.0, None), ("cps", 1.0, 1)])
def test_reward_rises(kind, cfg_scale, starts, tmp_path):
    config = grpo(sde=kind, cfg_scale=cfg_scale, starts=starts)
    before, after, metrics = run_world(1, learn, tmp_path, 3e-3, config, GRPO, deadline_s=400)[0]
    assert after > before + 0.08 and metrics["kl"] > 0


def drawn(rank: int, starts: int | None, steps: int) -> list[int]:
    """How many different pictures a group of a fresh rollout has, without and with random steps."""
    from command_line import load_named
    from model.sampling.draw import Sampler
    from posttrain.rollout.prompts import Prompt
    from training.engine.config import EngineConfig
    from training.engine.step import Engine

    engine = Engine(CONFIG, EngineConfig(), 1)
    engine.load_weights(random_weights(engine.model.named_parameters(), scale=0.05))
    trainer = load_named(GRPO)(grpo(starts=starts, cfg_scale=1.0), bandit_studio(engine), brightness)
    trainer.prompts = [Prompt("p", "any", {})]
    found = []
    for sampler in (Sampler(FixedSchedule(steps), cfg_scale=1.0), trainer.sampler(trainer.prompts[0], 0)):
        (group,), _ = trainer.batches().draw([(trainer.prompts[0], 0)], sampler)
        found.append(len({latent.numpy().tobytes() for latent in group.latents}))
    return found


@pytest.mark.parametrize("starts, different", [(None, GROUP), (1, 1), (2, 2)])
def test_pictures_of_a_group_begin_alike_as_far_as_asked_and_differ_by_their_steps(starts, different):
    assert run_world(1, drawn, starts, 6)[0] == [different, GROUP]


def test_without_a_learning_rate_nothing_rises(tmp_path):
    config = grpo(cfg_scale=2.0)
    before, after, metrics = run_world(1, learn, tmp_path, 0.0, config, GRPO, deadline_s=400)[0]
    assert after == before and metrics["kl"] == 0
