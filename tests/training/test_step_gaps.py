"""A step keeps the device busy: one read of it, no copy that waits, no weight from an earlier step."""

from collections import Counter

import pytest
import torch
from mixed_batch import CONFIG, fill, samples
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import run_world

from model.mmdit import MMDiT
from model.moving import moved
from training.flow_matching import VelocityMSE
from training.randomness import Randomness

READS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "unique", "masked_select", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip
"""Functions of torch for which the host waits until the device has the answer."""
COPIES = {"tensor", "as_tensor", "asarray"}
"""Functions that copy numbers of the host to a device, if they are given one, and wait."""


class Waits(TorchFunctionMode):
    """Notes each call that makes the host wait for the device."""

    def __init__(self):
        self.found: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in READS or (name in COPIES and kwargs.get("device") is not None):
            self.found.append(name)
        return function(*args, **kwargs)


def make_engine(build=MMDiT, **settings):
    from training.engine.config import EngineConfig, OptimizerConfig
    from training.engine.step import Engine

    engine = Engine(CONFIG, EngineConfig(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0), **settings), 9, build)
    fill(engine.model)
    engine.weights_changed()
    return engine


def reads_of_a_step(rank: int, settings: dict) -> tuple[list[str], int, list[str]]:
    """What waits in a step after the first: by name, by torch's profiler, and in `any_rank`."""
    engine, algorithm, rng = make_engine(**settings), VelocityMSE(), Randomness(0)
    batch = samples()[engine.dp_rank :: engine.dp_size]
    for _ in range(2):
        engine.step(algorithm, [batch[:1], batch[1:]], rng)
    ready = [engine.prepare(algorithm, part, rng) for part in (batch[:1], batch[1:])]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, Waits() as waits:
        engine.step(algorithm, ready, rng)
    calls = Counter(event.name for event in profile.events() if not of_fused_adam(event))
    return waits.found, calls["aten::_local_scalar_dense"] + calls["aten::nonzero"], calls["aten::_foreach_norm"]


def of_fused_adam(event) -> bool:
    """Whether torch's fused AdamW called it, whose CPU kernel reads a number that the CUDA kernel does not."""
    while event is not None:
        if event.name == "aten::_fused_adamw_":
            return True
        event = event.cpu_parent
    return False


@pytest.mark.parametrize("settings", [{}, {"recompute": "block"}], ids=str)
def test_a_step_reads_the_device_once(settings: dict):
    assert run_world(1, reads_of_a_step, settings) == [(["tolist"], 0, 1)]


def test_a_step_of_one_rank_of_two_reads_the_device_once():
    assert run_world(2, reads_of_a_step, {}) == [(["tolist"], 0, 1)] * 2


class CopiesFromHost(TorchDispatchMode):
    """Notes whether each copy from the CPU to the device "meta" is one that nobody waits for."""

    def __init__(self):
        self.waits: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (
            isinstance(out, Tensor)
            and out.is_meta
            and any(isinstance(a, Tensor) and a.device.type == "cpu" for a in args)
        ):
            if function is torch.ops.aten._to_copy.default or function is torch.ops.aten.copy_.default:
                self.waits.append(not (kwargs or {}).get("non_blocking", False))
        return out


@pytest.mark.parametrize("batch", [samples(), samples()[:1], [samples()[0]] * 3], ids=["mixed", "one", "alike"])
def test_forward_and_backward_wait_for_no_copy_and_read_nothing(batch: list):
    with torch.device("meta"):
        model = MMDiT(CONFIG)
    ready = VelocityMSE().prepare(batch, Randomness(0), 16)
    for _ in range(2):  # the first makes tables that stay
        with CopiesFromHost() as copies, Waits() as waits:
            inputs, target = moved(ready, "meta")
            loss, *_ = VelocityMSE().loss(model, {}, inputs, target)  # reading a meta tensor would be an error
            loss.backward()
    assert len(copies.waits) > 5 and not any(copies.waits)
    assert not waits.found


def norms(rank: int) -> tuple[float, float, bool]:
    """(our norm, Megatron's, whether both clip alike)."""
    from training.engine import clipping, device

    engine = make_engine()
    engine.backward(VelocityMSE(), [samples()[engine.dp_rank :: 2]], Randomness(0))
    with device.megatron_region():
        engine.optimizer.prepare_grads()
        squared, bad, *_ = clipping.squared_norms(engine.optimizer, torch.zeros(()), engine.health.member())
        before = [p.grad.clone() for p in engine.optimizer.get_parameters()]
        theirs = engine.optimizer.clip_grad_norm(0.5)
    clipped = [p.grad.clone() for p in engine.optimizer.get_parameters()]
    for p, grad in zip(engine.optimizer.get_parameters(), before, strict=True):
        p.grad.copy_(grad)
    clipping.clip(engine.optimizer, 0.5, theirs)
    same = all(torch.equal(p.grad, c) for p, c in zip(engine.optimizer.get_parameters(), clipped, strict=True))
    assert theirs > 0.5 and not bad
    return squared.item() ** 0.5, theirs, same


def test_the_gradients_norm_is_megatrons():
    for ours, theirs, same in run_world(2, norms):
        assert ours == pytest.approx(theirs, rel=1e-6) and same


class Keeps(nn.Linear):
    """Uses what it kept of its weight until it is told of a first microbatch, as Transformer Engine's layers in fp8."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_first_microbatch, self.made = True, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first_microbatch:
            self.kept, self.is_first_microbatch = self.weight.detach().clone(), False
            self.made += 1
        assert torch.equal(self.kept, self.weight), "the weight is another"
        return super().forward(x)


def kept_weights(rank: int) -> list[int]:
    """How often a layer made what it keeps: two steps of two microbatches, a frozen forward pass, and one more step."""

    def build(config, ops):
        model = MMDiT(config, ops)
        model.img_in = Keeps(config.in_channels, config.width)
        return model

    engine, counts = make_engine(build, ema_decay=0.9), []
    batch = [samples()[:2], samples()[2:]]
    inputs, _ = VelocityMSE().prepare(samples(), Randomness(0), 16)
    for act in ("step", "step", "ema", "policy", "step"):
        if act == "step":
            engine.step(VelocityMSE(), batch, Randomness(0))
        else:
            engine.frozen["ema"](inputs) if act == "ema" else engine.model(inputs)
        counts.append(engine.model.img_in.made)
    return counts


def test_a_layer_that_keeps_its_weight_is_told_when_it_changes():
    assert run_world(1, kept_weights) == [[1, 2, 3, 4, 5]]
