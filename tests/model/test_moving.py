"""Values that hold tensors, on their way to another device; "meta" stands for one."""

from dataclasses import dataclass, fields

import torch

from model.moving import moved
from model.packing import ModelInputs, Pack, SampleShape


@dataclass(frozen=True)
class Held:
    one: torch.Tensor
    several: tuple
    named: dict
    name: str = "as it is"


def test_every_tensor_moves_and_nothing_else_changes():
    value = Held(torch.ones(2), (torch.ones(3), [torch.ones(4), None]), {"a": torch.ones(5), "b": 1})
    there = moved(value, "meta")
    found = [there.one, there.several[0], there.several[1][0], there.named["a"]]
    assert [len(x) for x in found] == [2, 3, 4, 5] and all(x.is_meta for x in found)
    assert there.several[1][1] is None and there.named["b"] == 1 and there.name == "as it is"
    assert moved(there, "meta") is there and moved(value, "cpu") is value


def test_inputs_of_the_model_move_whole():
    pack, _ = Pack.of([SampleShape(5, (1, 2, 2)), SampleShape(6, (1, 2, 2))]).evened
    inputs = ModelInputs(torch.ones(8, 4), torch.ones(16, 4), torch.ones(2), pack).to("meta")
    for holder in (inputs, inputs.pack, inputs.pack.even):
        assert all(v.is_meta for f in fields(holder) if isinstance(v := getattr(holder, f.name), torch.Tensor))
    assert inputs.pack.shapes is pack.shapes
