"""The mean sample of a stage in which resolutions mix by shares of compute. Imports no torch."""

from collections.abc import Mapping

from data_pipeline.draws import Curve, height
from model.config import MMDiTConfig
from training.cost.step import sample_flops
from training.cost.weights import Weights
from training.plan import prompt_tokens

MOMENTS = 100


def tokens_and_flops(side_px: int, model: MMDiTConfig) -> tuple[int, int]:
    """Tokens of a sample of this area with a prompt of the assumed length, and FLOPs, forward and backward."""
    img, txt = (side_px // 16) ** 2, prompt_tokens(model)
    return img + txt, sum(sample_flops(Weights(model), img, txt)[:2])


def mean_sample(sides_px: Mapping[int, Curve], model: MMDiTConfig) -> tuple[float, float]:
    """The same of the mean over a stage, whose resolutions have shares of the FLOPs, and so fewer of the larger."""
    costs = {side: tokens_and_flops(side, model) for side in sides_px}
    tokens = flops = 0.0
    for moment in range(MOMENTS):
        shares = {side: height(points, (moment + 0.5) / MOMENTS) for side, points in sides_px.items()}
        samples = {side: share / costs[side][1] for side, share in shares.items()}
        tokens += sum(samples[side] * costs[side][0] for side in costs) / sum(samples.values())
        flops += sum(shares.values()) / sum(samples.values())
    return tokens / MOMENTS, flops / MOMENTS
