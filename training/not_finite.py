"""What is kept of a batch whose loss or gradient is not finite, so that the cause can be looked for: `training.replay`.

    rank_0.json, rank_0.safetensors ...   of each data-parallel rank: what the model was called with, the samples' keys,
                                          and the gradient that the loss gave for what the model returned
    checkpoint/                           the weights at that step, with all else that a checkpoint holds

With the loss's gradient beside it a batch can be replayed without the algorithm, its frozen policies and its data.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from files import write_json
from model.mmdit import MMDiT
from model.moving import moved
from model.packing import ModelInputs, Pack, SampleShape
from training.algorithm import Algorithm, Prepared
from training.randomness import Randomness

if TYPE_CHECKING:
    from training.engine.step import Engine

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Call:
    """A call of the model in a step."""

    keys: tuple[str, ...]
    """Of the microbatch's samples, where they have some."""
    inputs: ModelInputs
    gradient: Tensor
    """[n_target, C] of the microbatch's loss, with regard to the velocity that the model returned."""


def write_batch(
    engine: "Engine", algorithm: Algorithm, microbatches: Sequence[list[Any] | Prepared], rng: Randomness, folder: Path
) -> str:
    """Write what a step's replay takes into `folder`, and say how to replay it.

    Collective, just after the step, which changed no weight. Of a model that is no MMDiT nothing is written.
    """
    if not isinstance(engine.model, MMDiT):
        return "the weights are those of the step before them"
    folder.mkdir(parents=True, exist_ok=True)
    calls = list(_calls(engine, algorithm, microbatches, rng))
    if engine.layout.speaks:
        about = {
            "align": engine.align,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "calls": [_shapes(call) for call in calls],
        }
        tensors = {f"{i}.{name}": tensor for i, call in enumerate(calls) for name, tensor in _tensors(call).items()}
        save_file(tensors, folder / f"rank_{engine.dp_rank}.safetensors")
        write_json(folder / f"rank_{engine.dp_rank}.json", about)
    engine.save(folder / CHECKPOINT, {})
    return f"to find out where that begins: python -m training.replay {folder}"


def read_calls(about: Path, device: torch.device) -> Iterator[Call]:
    """The calls of a rank_N.json. ValueError if it and its tensors do not belong together."""
    noted, tensors = json.loads(about.read_text()), load_file(about.with_suffix(".safetensors"), str(device))
    for i, call in enumerate(noted["calls"]):
        img, txt, sigma, gradient = (tensors[f"{i}.{name}"] for name in ("img", "txt", "sigma", "gradient"))
        shapes = [SampleShape(n, tuple(size), tuple(map(tuple, refs))) for n, size, refs in call["shapes"]]
        pack = Pack.of(shapes, noted["align"])
        if (len(pack.txt_pos), len(pack.img_pos)) != (len(txt), len(img)):
            raise ValueError(f"{about} tells of other tokens than {about.with_suffix('.safetensors')} holds")
        rows = None if call["sigma_row"] is None else tuple(call["sigma_row"])
        yield Call(tuple(call["keys"]), ModelInputs(img, txt, sigma, pack.to(device), rows), gradient)


def _calls(
    engine: "Engine", algorithm: Algorithm, microbatches: Sequence[list[Any] | Prepared], rng: Randomness
) -> Iterator[Call]:
    """Every call of the model for these microbatches, made once more."""
    for batch in microbatches:
        ready = batch if isinstance(batch, Prepared) else engine.prepare(algorithm, batch, rng)
        inputs, aux = moved((ready.inputs, ready.aux), engine.device)
        made: list[tuple[ModelInputs, Tensor]] = []

        def model(inputs: ModelInputs, made: list = made) -> Tensor:
            engine.frozen.first_microbatch()
            with torch.no_grad():
                velocity = engine.model(inputs)
            made.append((inputs, velocity.requires_grad_()))
            return velocity

        loss, *_ = algorithm.loss(model, engine.frozen, inputs, aux)
        gradients = torch.autograd.grad(loss, [velocity for _, velocity in made], allow_unused=True)
        for (inputs, velocity), gradient in zip(made, gradients, strict=True):
            yield Call(ready.keys, inputs, torch.zeros_like(velocity) if gradient is None else gradient)


def _tensors(call: Call) -> dict[str, Tensor]:
    inputs = call.inputs
    found = {"img": inputs.img, "txt": inputs.txt, "sigma": inputs.sigma, "gradient": call.gradient}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}


def _shapes(call: Call) -> dict[str, Any]:
    shapes = [[s.txt, s.target, s.references] for s in call.inputs.pack.shapes]
    return {"keys": call.keys, "shapes": shapes, "sigma_row": call.inputs.sigma_row}
