"""The MMDiT equals diffusers' QwenImageTransformer2DModel: outputs and the gradient of every parameter."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    CONFIG,
    EDIT_2511,
    WIDER,
    case,
    diffusers_twin,
    gradients,
    random_model,
    relative,
    run_ours,
    run_theirs,
)

from model.config import PRESETS
from model.diffusers_io.names import from_diffusers, to_diffusers
from model.mmdit import MMDiT
from model.packing import patchify

CASES = {
    "text-to-image": (CONFIG, dict(txt=7, size=(1, 4, 6))),
    "odd sizes, long prompt": (WIDER, dict(txt=80, size=(1, 5, 3))),
    "one reference": (CONFIG, dict(txt=5, size=(1, 3, 4), references=((1, 2, 5),))),
    "three references": (WIDER, dict(txt=9, size=(1, 4, 4), references=((1, 7, 2), (1, 3, 3), (1, 4, 6)))),
    "zero_cond_t": (EDIT_2511, dict(txt=6, size=(1, 4, 3), references=((1, 2, 3), (1, 5, 4)))),
    "zero_cond_t without references": (EDIT_2511, dict(txt=6, size=(1, 4, 3))),
    "video frames": (WIDER, dict(txt=6, size=(3, 2, 4))),
    "video with a reference": (CONFIG, dict(txt=6, size=(2, 2, 4), references=((1, 3, 3),))),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_every_gradient(name):
    config, shapes = CASES[name]
    ours = random_model(config)
    theirs = diffusers_twin(ours)
    sample = case(config, **shapes)
    (v_ours,), v_theirs = run_ours(ours, [sample]), run_theirs(theirs, sample)
    assert relative(v_ours, v_theirs) < 1e-5

    compare_gradients(ours, (v_ours * sample.direction).mean(), theirs, (v_theirs * sample.direction).mean())


def compare_gradients(ours, loss_ours, theirs, loss_theirs):
    """Every parameter's gradient is the same, or absent on both sides."""
    g_ours, g_theirs = gradients(ours, loss_ours), gradients(theirs, loss_theirs)
    for name, g in g_theirs.items():
        mine = g_ours[from_diffusers(name)]
        if g is None or mine is None:
            assert g is mine is None, f"{name} has a gradient on one side only"
        else:
            assert relative(mine, g) < 1e-4, name


@pytest.mark.parametrize("config", [CONFIG, WIDER], ids=["two layers", "three layers"])
def test_padded_and_masked_prompt(config):
    ours = random_model(config)
    theirs = diffusers_twin(ours)
    sample = case(config, txt=5, size=(1, 4, 4), references=((1, 3, 2),))
    (v_ours,), v_theirs = run_ours(ours, [sample]), run_theirs(theirs, sample, pad_txt=11)
    assert relative(v_ours, v_theirs) < 1e-5
    compare_gradients(ours, (v_ours * sample.direction).mean(), theirs, (v_theirs * sample.direction).mean())


def test_batch_of_masked_prompts():
    """Pictures of one size, prompts of three lengths: all that diffusers can batch."""
    ours = random_model()
    theirs = diffusers_twin(ours)
    samples = [case(CONFIG, txt=n, size=(1, 4, 4), seed=n) for n in (3, 12, 7)]
    mask = torch.arange(12) < torch.tensor([[len(s.txt)] for s in samples])
    padded = torch.stack([F.pad(s.txt, (0, 0, 0, 12 - len(s.txt)), value=3.0) for s in samples])
    v_theirs = theirs(
        hidden_states=torch.stack([patchify(s.target) for s in samples]),
        encoder_hidden_states=padded,
        encoder_hidden_states_mask=mask,
        timestep=torch.tensor([s.sigma for s in samples]),
        img_shapes=[[s.size] for s in samples],
        return_dict=False,
    )[0]
    v_ours = torch.stack(run_ours(ours, samples))
    assert relative(v_ours, v_theirs) < 1e-5
    directions = torch.stack([s.direction for s in samples])
    compare_gradients(ours, (v_ours * directions).mean(), theirs, (v_theirs * directions).mean())


def test_parameters_that_nothing_reads_are_frozen():
    frozen = {n for n, p in random_model().named_parameters() if not p.requires_grad}
    last = "blocks.1.txt."
    assert frozen == {f"{last}{m}.{p}" for m in ("out", "mlp_in", "mlp_out") for p in ("weight", "bias")}


def test_names_are_a_bijection():
    names = [n for n, _ in random_model().named_parameters()]
    there = [to_diffusers(n) for n in names]
    assert len(set(there)) == len(names)
    assert [from_diffusers(n) for n in there] == names
    with pytest.raises(KeyError):
        to_diffusers("blocks.0.img.nothing.weight")


def test_twenty_billion_parameters_exactly():
    with torch.device("meta"):
        model = MMDiT(PRESETS["qwen-image"])
    count = sum(p.numel() for p in model.parameters())
    assert count == 20_430_401_088 == PRESETS["qwen-image"].num_parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_of_presets(preset):
    with torch.device("meta"):
        model = MMDiT(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == PRESETS[preset].num_parameters
