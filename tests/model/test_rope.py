"""Positions of the three schemes, and rotation with normalisation against plain formulas."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIG, case, random_model, relative, run_ours

from model.diffusers_io.folder import write_pipeline
from model.fused import norm_rotate
from model.rope import apply_rope, rope_table, sample_positions


def test_msrope_centres_images_and_lays_text_on_the_diagonal():
    text, (target, reference) = sample_positions(2, [(1, 4, 3), (1, 2, 2)], "msrope")
    assert text.tolist() == [[2, 2, 2], [3, 3, 3]]
    assert target[0].tolist() == [0, -2, -2] and target[-1].tolist() == [0, 1, 0]
    assert reference[0].tolist() == [1, -1, -1] and reference[-1].tolist() == [1, 0, 0]


def test_text_first_puts_images_behind_the_prompt():
    text, (target, reference) = sample_positions(2, [(1, 4, 3), (1, 2, 2)], "text-first")
    assert text.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert target[0].tolist() == [2, 2, 2] and target[-1].tolist() == [2, 5, 4]
    assert reference[0].tolist() == [3, 2, 2]


def test_scaling_makes_the_prompt_a_row():
    text, (target,) = sample_positions(2, [(1, 4, 6)], "scaling")
    assert text.tolist() == [[0, 0, 3], [0, 0, 4]]
    assert target[0].tolist() == [0, -2, -3]


@pytest.mark.parametrize("scheme", ["text-first", "scaling"])
def test_schemes_change_the_model_and_keep_packs_exact(scheme, components, tmp_path):
    config = replace(CONFIG, rope=scheme)
    model, plain = random_model(config), random_model()
    cases = [case(CONFIG, 9, (1, 4, 3), ((1, 2, 2),)), case(CONFIG, 3, (1, 2, 5), seed=1)]
    together = run_ours(model, cases)
    for c, v, other in zip(cases, together, run_ours(plain, cases), strict=True):
        assert relative(v, run_ours(model, [c])[0]) < 1e-5
        assert relative(v, other) > 1e-3
    with pytest.raises(ValueError, match="only msrope models can be exported"):
        write_pipeline(tmp_path / "out", config, dict(model.named_parameters()), components)


def test_images_past_the_table_are_refused():
    with pytest.raises(ValueError, match="end past position 4096"):
        sample_positions(4090, [(1, 8, 8)], "text-first")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norm_and_rotation_equal_the_plain_formula(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 700, 3, 48, generator=generator).to(dtype)
    weight = torch.randn(48, generator=generator).to(dtype)
    table = rope_table(torch.randint(-50, 50, (700, 3), generator=generator), (8, 20, 20))

    def run(function):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(a, w)
        y.backward(grad)
        return y, a.grad, w.grad

    ours = run(lambda a, w: norm_rotate(a, w, 1e-6, table))
    plain = run(lambda a, w: apply_rope(F.rms_norm(a.float(), (48,), w.float(), 1e-6), table).to(dtype))
    for mine, expected in zip(ours, plain, strict=True):
        assert mine.dtype == dtype and relative(mine.float(), expected.float()) < tolerance
