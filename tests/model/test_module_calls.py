"""What layers are given: their weights by their own forward pass, where hooks that gather late are met, and tokens."""

import torch
from mixed_batch import CONFIG, fill, samples
from torch import nn

from model.mmdit import MMDiT
from model.ops import Ops
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


def test_every_layer_of_tokens_is_given_a_multiple_of_them():
    inputs, _ = VelocityMSE().prepare(samples(), Randomness(0), 16)
    assert inputs.pack.n_target % 8  # the last block would read so many
    ops, given = Ops(), set()
    ops.token_multiple = 8
    model, plain = fill(MMDiT(CONFIG, ops)), fill(MMDiT(CONFIG))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "mod" not in name and "time" not in name:
            module.register_forward_pre_hook(lambda _, args: given.add(len(args[0])))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-5, atol=1e-5)
    assert len(given) == 3 and all(tokens % 8 == 0 for tokens in given)
