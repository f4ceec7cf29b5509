"""Every weight is read in the forward pass of the module that owns it, where hooks that gather it late are met."""

import torch
from mixed_batch import CONFIG, fill, samples
from torch import nn

from model.mmdit import MMDiT
from training.flow_matching import VelocityMSE
from training.randomness import Randomness


def test_weights_are_there_only_while_their_own_module_runs():
    inputs, _ = VelocityMSE().prepare(samples(), Randomness(0), 16)
    model = fill(MMDiT(CONFIG))
    with torch.no_grad():
        expected = model(inputs)

    def gather(module: nn.Module, args) -> None:
        for name, param in module.named_parameters(recurse=False):
            param.data = module.away[name]

    def scatter(module: nn.Module, args, output) -> None:
        for param in module.parameters(recurse=False):
            param.data = torch.full_like(param, torch.nan)

    for module in model.modules():
        module.away = {name: param.data for name, param in module.named_parameters(recurse=False)}
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(scatter)
        scatter(module, None, None)
    with torch.no_grad():
        assert torch.equal(model(inputs), expected)
