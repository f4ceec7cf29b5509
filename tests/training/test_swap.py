"""Blocks that visit the device compute as those that live there, two at a time."""

from dataclasses import replace
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from mixed_batch import CONFIG, fill, samples, with_adapters
from worlds import run_world

needs_torchao = pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
DEEP = replace(CONFIG, num_layers=6)


def trained(settings: dict, steps: int = 2) -> tuple[list[torch.Tensor], list[int]]:
    """The adapters after some steps with a frozen policy beside, and the blocks in the order of their visits."""
    from training.engine.config import EngineConfig, OptimizerConfig
    from training.engine.step import Engine
    from training.engine.swap import Swap
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    visits, fetch = [], Swap._fetch

    def noted(swap, block, room):
        visits.append(block)
        fetch(swap, block, room)

    with mock.patch.object(Swap, "_fetch", noted):
        config = EngineConfig(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0), quantize="int8", **settings)
        engine = Engine(DEEP, config, build=with_adapters)
        fill(engine.model)
        engine.weights_changed()
        for _ in range(steps):
            engine.step(VelocityMSE(), [samples()], Randomness(7))
        seen = list(visits)
        inputs, _ = VelocityMSE().prepare(samples(), Randomness(7), engine.align)
        drawn = engine.frozen["ema"](inputs)
        fill(engine.model)  # what the device holds is out of date
        engine.weights_changed()
        again = engine.frozen["ema"](inputs)
    adapters = [p.detach().clone() for p in engine.model.parameters() if p.requires_grad]
    return [*adapters, drawn, again], seen


def against_resident(rank: int) -> dict:
    plain, _ = trained({})
    found = {}
    for settings in ({"swap_blocks": 4}, {"swap_blocks": 6, "recompute": "block"}, {"swap_blocks": 1}):
        values, visits = trained(settings)
        key = settings["swap_blocks"]
        found[key] = (all(torch.equal(a, b) for a, b in zip(values, plain, strict=True)), visits)
    return found


@needs_torchao
def test_swapped_blocks_change_no_bit_and_each_comes_when_it_is_next():
    (found,) = run_world(1, against_resident)
    assert all(same for same, _ in found.values())
    there, back = [2, 3], [1, 0]
    assert found[4][1] == [0, 1, *there, *back, *there, *back]
    there, back = [2, 3, 4, 5], [3, 2, 1, 0]
    assert found[6][1] == [0, 1, *there, *back, *there, *back]
    assert found[1][1] == [0]


def places(rank: int) -> dict[str, bool]:
    from training.engine.config import EngineConfig
    from training.engine.quantized import quantized_layers
    from training.engine.step import Engine

    engine = Engine(DEEP, EngineConfig(quantize="int8", swap_blocks=3), build=with_adapters)
    layers = list(quantized_layers(engine.model))
    swapped = {int(name.split(".")[1]) for name, layer in layers if layer.swap is not None}
    swap = next(layer.swap for _, layer in layers if layer.swap is not None)
    block = sum(p.nbytes for name, layer in layers if name.startswith("blocks.1.") for p in layer.stored())
    parts = [part for room in swap._parts for parts in room for part in parts]
    rooms = sum(part.nbytes for part in parts)
    padded = sum(room.nbytes for room in swap._rooms) - rooms
    messages = []
    for build, blocks in ((with_adapters, 7), (lambda config, ops: torch.nn.Linear(2, 2), 1)):
        try:
            Engine(DEEP, EngineConfig(quantize="int8", swap_blocks=blocks), build=build)
        except ValueError as error:
            messages.append(str(error))
    two = rooms == 2 * block and 0 <= padded < 256 * len(parts)
    return {"spread": swapped == {1, 3, 5}, "two rooms": two, "refused": messages}


@needs_torchao
def test_two_of_the_swapped_blocks_have_room_on_the_device():
    (found,) = run_world(1, places)
    assert found["spread"] and found["two rooms"]
    assert found["refused"] == [f"{n} blocks cannot be swapped: the model has {m}" for n, m in ((7, 6), (1, 0))]


class Stream:
    """Notes what is asked of it."""

    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} done")
        return f"{self.name} {len(self.log)}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def asked_of_streams(rank: int) -> list[str]:
    """What is asked of CUDA's streams when the first of three blocks is needed; its memory is the host's here."""
    from training.engine.config import ParallelConfig
    from training.engine.device import megatron_region, start
    from training.engine.quantized import QuantizedOps
    from training.engine.swap import Swap

    ops, log = QuantizedOps("int8", start(ParallelConfig()), torch.float32), []
    blocks = [torch.nn.Sequential(ops.column(4, 8)) for _ in range(3)]
    for i, (layer,) in enumerate(blocks):
        layer.load_weight(torch.full((8, 4), float(i)))
    streams = {"side": Stream("side", log), "main": Stream("main", log)}
    fakes = {
        "Stream": lambda device: streams["side"],
        "current_stream": lambda: streams["main"],
        "stream": lambda stream: mock.MagicMock(),
    }
    runtime = mock.Mock(cudaHostRegister=lambda address, size, flags: log.append(f"{size} pinned") or 0)
    fakes["cudart"] = lambda: runtime
    with mock.patch.multiple("torch.cuda", **fakes), megatron_region():
        Swap(blocks, 3, torch.device("cuda"))
        assert not blocks[0][0].dequantised(torch.float32).any()
        assert (blocks[1][0].dequantised(torch.float32) - 1).abs().max() < 0.01
    return log


@needs_torchao
def test_streams_wait_for_each_other():
    (log,) = run_world(1, asked_of_streams)
    assert log[:3] == ["512 pinned"] * 3  # 32 weights and 8 scales, each from a multiple of 256 bytes on
    first = ["side waits for main", "side done", "main waits for side 5"]
    ahead = ["side waits for main", "side done", "main waits for side 8", "side waits for main", "side done"]
    assert log[3:] == first + ahead


def test_swapping_needs_a_frozen_base():
    from training.engine.config import EngineConfig

    for settings in ({"swap_blocks": 2}, {"swap_blocks": -1, "quantize": "nf4"}):
        with pytest.raises(ValueError, match="--swap-blocks N with --quantize"):
            EngineConfig(**settings)
