"""Learning rates: the schedule with a decay phase, and rates that follow the width of the model."""

from dataclasses import replace
from math import sqrt

import pytest
import torch
from given_gradients import update
from mixed_batch import CONFIG
from worlds import run_world

from model.mmdit import MMDiT
from training.engine.config import EngineConfig, OptimizerConfig

WIDER = replace(CONFIG, num_attention_heads=2 * CONFIG.num_attention_heads)
RATE, DECAY = 1e-2, 0.1


def test_wsd_warms_up_stays_and_falls():
    settings = OptimizerConfig(lr=2.0, warmup_steps=10, schedule="wsd", decay_share=0.25, final_lr_ratio=0.0)
    rates = [settings.learning_rate(step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert set(rates[10:76]) == {2.0}
    assert rates[75:] == pytest.approx([2 * (1 - sqrt(n / 25)) for n in range(26)])
    longer = [settings.learning_rate(step, 200) for step in range(151)]
    assert longer[:76] == rates[:76], "before it falls, a rate does not depend on the run's length"
    assert replace(settings, final_lr_ratio=0.1).learning_rate(100, 100) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="share of the run"):
        replace(settings, decay_share=0.0)


def moves(rank: int, config, muon_lr: float | None) -> dict[str, tuple[float, float]]:
    """{name: how far one update moves (an element of 0 by a gradient of 1, one of 1 by none)}"""
    from training.engine.step import Engine

    found = {}
    for weight in (0.0, 1.0):
        optimizer = OptimizerConfig(
            lr=RATE, muon_lr=muon_lr, eps=0.0 if weight == 0 else 1e-8, weight_decay=DECAY, clip=1e9, warmup_steps=0,
            schedule="wsd", decay_share=1.0, width_base=CONFIG.width,
        )  # fmt: skip
        engine = Engine(config, EngineConfig(optimizer=optimizer), total_steps=4)
        params = {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
        for param in params.values():
            param.detach().fill_(weight)
            param.main_grad.fill_(1 - weight)
        engine.weights_changed()
        update(engine)
        for name, param in params.items():
            found.setdefault(name, []).append((weight - param.detach().flatten()[0]).item())
    return found


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_rates_follow_the_width_where_the_inputs_do(muon_lr: float | None):
    with torch.device("meta"):
        narrow, wide = (dict(MMDiT(config).named_parameters()) for config in (CONFIG, WIDER))
    by_muon = {n for n in wide if muon_lr and "blocks." in n and ".mod." not in n and wide[n].ndim == 2}
    same, double = (run_world(1, moves, config, muon_lr)[0] for config in (CONFIG, WIDER))
    grown = {n for n in wide if wide[n].ndim == 2 and wide[n].shape[1] == 2 * narrow[n].shape[1]}
    assert len(grown) > 10 and {n for n in wide if wide[n].ndim == 2} - grown
    for name, (updated, decayed) in double.items():
        decays = narrow[name].ndim == 2
        if name in by_muon:
            assert decayed == pytest.approx(muon_lr * DECAY, rel=1e-3), name
        else:
            assert same[name][0] == pytest.approx(RATE, rel=1e-4)
            assert updated == pytest.approx(RATE / 2 if name in grown else RATE, rel=1e-4), name
            assert decayed == pytest.approx(RATE * DECAY if decays else 0, rel=1e-3), name
        assert decayed == pytest.approx(same[name][1], rel=1e-3)


def test_what_has_no_width_does_not_follow_it():
    with pytest.raises(ValueError, match="do not follow the width"):
        EngineConfig(optimizer=OptimizerConfig(width_base=96), lora_rank=4)
