"""Parameter groups: what Muon updates, and whose learning rate follows the width.

AdamW moves every element by about its rate, so a sum over n inputs moves by n times that. For a rate found at one width
to hold at another, it must fall as 1 / n where n grows with the width, and stay where it does not (Tensor Programs V,
arXiv 2203.03466, table 3): biases, norms and the layers that read latents, text states and sinusoids keep it. The
output layer and modulation follow the width like hidden layers; that they begin at zero (adaLN-Zero) is within the
rule. Heads have a fixed width and normalised queries and keys, so that attention needs no other scale. Muon moves a
matrix [o, i] by a spectral norm of rate sqrt(max(1, o / i)), and o / i does not depend on the width: its rate holds
(arXiv 2310.17813). Initial weights are left alone, the time embedding's too, whose deviation is .02 at every width.
"""

from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from training.engine.config import OptimizerConfig
from training.engine.muon import MARK, is_matrix

READERS = ("img_in.", "txt_in.", "time.linear_1.")
"""Layers whose number of inputs does not depend on the width."""
RATE = "lr_mult"
"""Megatron's name of a group's learning rate over the run's; it tells groups apart in a checkpoint."""


def parameter_groups(
    config: MegatronConfig, settings: OptimizerConfig, width: int | None
) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's standard groups (weight decay or none), one with MARK for Muon's matrices, and one with the RATE of
    matrices that follow the width of the model. ValueError if a model without a width is to follow it."""
    groups, by_muon = get_standard_config_overrides(config), settings.muon_lr is not None
    if by_muon:
        key = ParamWithNamePredicate("Muon's matrices", lambda param, name: is_matrix(name, param))
        groups[ParamKey(with_name_predicate=key)] = {MARK: True}
    if settings.width_base is None:
        return groups
    if width is None:
        raise ValueError("a learning rate follows the width of an MMDiT only: leave width_base out")
    if width != settings.width_base:
        follows = lambda param, name: grows(name, param) and not (by_muon and is_matrix(name, param))  # noqa: E731
        key = ParamWithNamePredicate("matrices that grow with the width", follows)
        groups[ParamKey(with_name_predicate=key)] = {RATE: settings.width_base / width}
    return groups


def grows(name: str, param: Tensor) -> bool:
    """Whether a parameter is a matrix with more inputs in a wider model; Megatron's DDP calls the model `module`."""
    return param.ndim == 2 and not name.removeprefix("module.").startswith(READERS)
