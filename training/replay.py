"""Look for the cause of a step whose loss or gradient was not finite: run its batch again, name where that begins.

    python -m training.replay runs/sft/nan/step_00000123

One process does, whatever layout trained: forward and backward pass of every microbatch of every rank, in the run's
precision, by the weights of that step.
"""

try:
    from dataclasses import dataclass
    from pathlib import Path
    from typing import TYPE_CHECKING

    import tyro

    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if TYPE_CHECKING:
    from torch import Tensor, nn

    from training.not_finite import Call


@dataclass(frozen=True)
class Config:
    folder: tyro.conf.Positional[Path] = Path("nan")
    """Folder that a run has left, OUT/nan/step_N."""


def main(config: Config) -> None:
    for line in replay(config.folder):
        print(line, flush=True)


def replay(folder: Path) -> list[str]:
    """A line for each microbatch in which something is not finite, or one that says that there is none.

    UserError if `folder` holds no batch.
    """
    import json

    import torch

    from training.loading import empty_model, whole_weights
    from training.not_finite import CHECKPOINT, read_calls
    from training.source import look

    ranks = sorted(folder.glob("rank_*.json"), key=lambda path: int(path.stem.removeprefix("rank_")))
    if not ranks:
        raise UserError(f"{folder} holds no batch of a step that was not finite; give OUT/nan/step_N of a run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model_config, weights = whole_weights(look(folder / CHECKPOINT), ema=False)
    model = empty_model(model_config, device, getattr(torch, json.loads(ranks[0].read_text())["dtype"]))
    model.load_state_dict(weights)
    lines = []
    for about in ranks:
        for i, call in enumerate(read_calls(about, device)):
            if (found := first_not_finite(model, call)) is not None:
                lines.append(f"rank {about.stem.removeprefix('rank_')}, microbatch {i}: {found}")
    return lines or ["everything is finite here: the cause lies in how the step was run (layout, kernels, device)"]


def first_not_finite(model: "nn.Module", call: "Call") -> str | None:
    """Where a call's forward pass, loss or backward pass is first not finite, and why if that can be seen."""
    outputs: list[str] = []
    gradients: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name or "the model", outputs, gradients))
        for name, module in model.named_modules()
    ]
    try:
        model.zero_grad()
        velocity = model(call.inputs)
        if outputs:
            return f"the output of {outputs[0]} is the first that is not finite; {_why(model, outputs[0], call)}"
        if not call.gradient.isfinite().all():
            which = _samples(call, call.inputs.pack.split_targets(call.gradient))
            return f"the model's output is finite, the loss of {which} is not: look at its targets and weights"
        velocity.backward(call.gradient.to(velocity.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    if gradients:
        return f"the gradient for the output of {gradients[0]} is the first that is not finite"
    weights = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient for {', '.join(weights)} is not finite" if weights else None


def _watch(name: str, outputs: list[str], gradients: list[str]):
    """A hook that notes a module: in `outputs` if its output is not finite, in `gradients` if the gradient for that is
    not."""
    from torch import Tensor

    def hook(module: "nn.Module", args: tuple, output: "Tensor | tuple[Tensor, ...]") -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if not tensor.isfinite().all():
                outputs.append(name)
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: None if grad.isfinite().all() else gradients.append(name))

    return hook


def _why(model: "nn.Module", name: str, call: "Call") -> str:
    """What of a module, or of what the model was given, is not finite."""
    module = model.get_submodule("" if name == "the model" else name)
    bad = [n for n, p in module.named_parameters() if not p.isfinite().all()]
    if bad:
        return f"its {', '.join(bad)} is not"
    inputs, pack = call.inputs, call.inputs.pack
    texts = inputs.txt[: sum(pack.text_lengths)].split(pack.text_lengths)
    given = {"image tokens": pack.split_targets(inputs.img), "text states": texts, "noise level": inputs.sigma.split(1)}
    found = [
        f"the {what} of {_samples(call, parts)} are not finite"
        for what, parts in given.items()
        if any(not part.isfinite().all() for part in parts)
    ]
    return "; ".join(found) or "what goes into it, and its weights, are finite"


def _samples(call: "Call", parts: "list[Tensor]") -> str:
    """The samples whose part is not finite."""
    bad = [i for i, part in enumerate(parts) if not part.isfinite().all()]
    names = [call.keys[i % len(call.keys)] if call.keys else f"number {i}" for i in bad]
    return f"sample {', '.join(names)}" if names else "no sample"


if __name__ == "__main__":
    run(main, Config)
