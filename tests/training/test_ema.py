"""The moving average against torch's AveragedModel."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from training.ema import MovingAverage, ramped


def test_equals_torchs_averaged_model():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    ema = MovingAverage(dict(model.named_parameters()), ramped(0.4))
    decays = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 0.4, 0.4]

    def average(old: torch.Tensor, new: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        decay = decays[int(count) - 1]
        return decay * old + (1 - decay) * new

    theirs = AveragedModel(model, avg_fn=average)
    theirs.update_parameters(model)  # a copy
    for _ in decays:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        theirs.update_parameters(model)
        for name, p in theirs.module.named_parameters():
            torch.testing.assert_close(ema.average[name], p.detach(), rtol=1e-6, atol=1e-6)


def test_averages_lie_where_they_are_told_to():
    """A device without memory stands for another one than the weights'."""
    ema = MovingAverage({"w": torch.ones(2)}, ramped(0.9), device=torch.device("meta"))
    ema.update()
    assert ema.average["w"].device.type == "meta" and ema.updates == 1


def test_averages_low_precision_weights_in_fp32():
    weight = torch.ones(1, dtype=torch.bfloat16)
    ema = MovingAverage({"w": weight}, ramped(0.999))
    ema.updates = 10**6
    weight.fill_(1.0078125)  # the next bfloat16
    for _ in range(10):
        ema.update()
    assert ema.average["w"].item() == pytest.approx(1.0078125 - 0.0078125 * 0.999**10, abs=1e-6)


def test_reset_starts_over():
    weight = torch.zeros(2)
    ema = MovingAverage({"w": weight}, ramped(0.9))
    ema.update()
    weight.fill_(3.0)
    ema.reset()
    assert ema.updates == 0 and ema.average["w"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0])
def test_refuses_what_is_no_decay(decay: float):
    with pytest.raises(ValueError, match="lies in"):
        ramped(decay)
