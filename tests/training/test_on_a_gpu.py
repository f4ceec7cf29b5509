"""A training step on a CUDA device. `pytest -m gpu` runs these; elsewhere CUDA is hidden and they are skipped."""

import warnings

import pytest
import torch
from mixed_batch import CONFIG, fill, reference_gradients, samples

from training.flow_matching import VelocityMSE
from training.randomness import Randomness

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; pytest -m gpu")]


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def engine(request):
    from training.engine.config import EngineConfig
    from training.engine.step import Engine

    made = Engine(CONFIG, EngineConfig(dtype="float32", compile=request.param))
    fill(made.model)
    made.weights_changed()
    yield made
    made.close()


def test_gradients_are_those_of_one_cpu_process_in_fp64(engine):
    totals = engine.backward(VelocityMSE(), [samples()[:1], samples()[1:]], Randomness(7))
    for name, expected in reference_gradients().items():
        found = (engine.model.get_parameter(name).main_grad / totals["_weight"]).cpu().double()
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6, name


def test_a_step_waits_for_the_device_once(engine):
    batch = [samples()[:1], samples()[1:]]
    for _ in range(3):
        engine.step(VelocityMSE(), batch, Randomness(7))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            engine.step(VelocityMSE(), batch, Randomness(7))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in said) == 1
