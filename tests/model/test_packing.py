"""A pack of anything equals its samples one by one; its tails are nobody's business."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIG, EDIT_2511, case, gradients, random_model, relative, run_ours

from model.attention import joint_attention, padded_attention
from model.packing import ModelInputs, Pack, SampleShape, pack_inputs, patchify, unpatchify

MIXED = [
    dict(txt=1, size=(1, 4, 6)),
    dict(txt=512, size=(1, 3, 3), references=((1, 2, 5),)),
    dict(txt=37, size=(1, 8, 8)),
    dict(txt=8, size=(3, 2, 4)),
    dict(txt=8, size=(1, 4, 6), references=((1, 5, 2), (1, 4, 4), (1, 1, 7))),
    dict(txt=20, size=(1, 1, 1), references=((1, 3, 3), (1, 3, 3))),
    dict(txt=1, size=(1, 4, 6)),
]


@pytest.mark.parametrize("config", [CONFIG, EDIT_2511], ids=["plain", "zero_cond_t"])
def test_mixed_batch_equals_singles(config):
    model = random_model(config)
    cases = [case(config, **shapes, seed=i) for i, shapes in enumerate(MIXED)]
    loss = lambda outputs: sum((v * c.direction).mean() for v, c in zip(outputs, cases, strict=True))  # noqa: E731

    together = run_ours(model, cases)
    g_together = gradients(model, loss(together))
    alone = [run_ours(model, [c], align=1)[0] for c in cases]
    g_alone = gradients(model, loss(alone))

    for a, b in zip(together, alone, strict=True):
        assert relative(a, b) < 1e-5
    for name, g in g_alone.items():
        assert (g is None) == (g_together[name] is None)
        if g is not None:
            assert relative(g_together[name], g) < 1e-5, name


def test_tails_have_no_influence():
    model = random_model()
    cases = [case(CONFIG, **shapes, seed=i) for i, shapes in enumerate(MIXED)]
    inputs = pack_inputs(
        [c.target for c in cases],
        [c.txt for c in cases],
        torch.tensor([c.sigma for c in cases]),
        [c.references for c in cases],
        align=64,
    )
    n_img = sum(len(patchify(x)) for c in cases for x in (c.target, *c.references))
    n_txt = sum(len(c.txt) for c in cases)
    assert len(inputs.img) > n_img and len(inputs.txt) > n_txt
    img, txt = inputs.img.clone(), inputs.txt.clone()
    img[n_img:], txt[n_txt:] = 1e3, -1e3
    direction = torch.cat([c.direction for c in cases])

    clean = model(inputs)
    g_clean = gradients(model, (clean * direction).mean())
    dirty = model(replace(inputs, img=img, txt=txt))
    g_dirty = gradients(model, (dirty * direction).mean())
    assert torch.equal(clean, dirty)
    for name, g in g_clean.items():
        assert g is None or relative(g_dirty[name], g) < 1e-5, name


@pytest.mark.parametrize("align", [1, 16, 48])
def test_alignment_changes_nothing(align):
    model = random_model()
    cases = [case(CONFIG, **shapes, seed=i) for i, shapes in enumerate(MIXED[2:5])]
    for a, b in zip(run_ours(model, cases, align), run_ours(model, cases, 16), strict=True):
        assert relative(a, b) < 1e-5


def test_shared_noise_levels_may_share_a_row():
    model = random_model(EDIT_2511)
    cases = [replace(case(EDIT_2511, **shapes, seed=i), sigma=[0.25, 0.75][i % 2]) for i, shapes in enumerate(MIXED)]
    inputs = pack_inputs(
        [c.target for c in cases],
        [c.txt for c in cases],
        torch.tensor([c.sigma for c in cases]),
        [c.references for c in cases],
    )
    row = tuple(i % 2 for i in range(len(cases)))
    shared = replace(inputs, sigma=torch.tensor([0.25, 0.75]), sigma_row=row)
    assert relative(model(shared), model(inputs)) < 1e-6


def test_padded_attention_is_the_same_and_tails_take_no_part():
    pack = Pack.of([SampleShape(c["txt"], c["size"], c.get("references", ())) for c in MIXED], align=64)
    groups, slots = pack.padded
    assert 1 < len(groups) < len(MIXED) and len(set(slots.tolist())) == len(slots)
    real = torch.zeros(len(slots), dtype=torch.bool)
    real[pack.joint_order[: sum(s.joint for s in pack.shapes)]] = True
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(len(slots), 2, 8, generator=generator)  # noqa: E731
    q, k, v, direction = draw(), draw(), draw(), draw()
    results = []
    for attention in (joint_attention, padded_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, pack)
        (out * direction)[real].sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for one, padded in zip(*results, strict=True):
        assert relative(padded[real], one[real]) < 1e-5
        assert (padded[~real] == 0).all()
    dirty = [torch.where(real[:, None, None], x, 1e3) for x in (q, k, v)]
    assert torch.equal(padded_attention(*dirty, pack)[real], results[1][0][real])


@pytest.mark.parametrize("config", [CONFIG, EDIT_2511], ids=["plain", "zero_cond_t"])
@pytest.mark.parametrize("shared", [False, True], ids=["own levels", "shared levels"])
def test_texts_padded_to_one_length_change_nothing(config, shared, monkeypatch):
    model = random_model(config)
    cases = [case(config, txt=txt, size=(1, 3, 4), seed=txt) for txt in (7, 12, 9, 8)]
    sigma = torch.tensor([0.3, 0.8] if shared else [0.3, 0.8, 0.3, 0.5])
    inputs = pack_inputs([c.target for c in cases], [c.txt for c in cases], torch.rand(4))
    inputs = replace(inputs, sigma=sigma, sigma_row=(1, 0, 0, 1) if shared else None)
    pack, places = inputs.pack.evened
    assert (pack.even.text, pack.even.image, len(places)) == (12, 12, 36)
    assert torch.equal(inputs.evened().txt[places], inputs.txt[:36])
    direction = torch.cat([c.direction for c in cases])
    results = []
    for even in (True, False):
        if not even:
            monkeypatch.setattr(ModelInputs, "evened", lambda self: self)
        out = model(inputs)
        results.append({"": out.detach()} | gradients(model, (out * direction).mean()))
    for name, value in results[1].items():
        if value is not None:
            assert relative(results[0][name], value) < 1e-5, name


def test_unlike_samples_are_not_evened():
    even = lambda *shapes: Pack.of([SampleShape(*s) for s in shapes]).evened is not None  # noqa: E731
    assert even((7, (1, 4, 4)), (8, (1, 4, 4)))
    assert not even((7, (1, 4, 4)))
    assert not even((7, (1, 4, 4)), (8, (1, 4, 5)))
    assert not even((7, (1, 4, 4)), (80, (1, 4, 4)))
    assert not even((7, (1, 4, 4)), (7, (1, 4, 4), ((1, 2, 2),)))


def test_joint_order_is_sample_by_sample():
    pack = Pack.of([SampleShape(2, (1, 1, 3), ((1, 1, 2),)), SampleShape(1, (1, 2, 1))], align=8)
    # text stream: a a b + 5 of tail; image stream from 8 on: a a a b b, references a a, 1 of tail
    assert pack.joint_order.tolist() == [0, 1, 8, 9, 10, 13, 14, 2, 11, 12, 3, 4, 5, 6, 7, 15]
    assert pack.cu_seqlens.tolist() == [0, 7, 10, 16]
    assert pack.joint_order[pack.inverse_order].tolist() == list(range(16))


@pytest.mark.parametrize("cp", [2, 4])
def test_rank_major_order_finds_the_same_tokens(cp):
    pack = Pack.of([SampleShape(5, (1, 2, 3), ((1, 1, 2),)), SampleShape(3, (1, 3, 3))], align=16)
    ids = torch.arange(len(pack.joint_order))
    txt, img = ids[: len(pack.txt_pos)], ids[len(pack.txt_pos) :]
    arrived = torch.cat([t for pair in zip(txt.chunk(cp), img.chunk(cp), strict=True) for t in pair])
    order, inverse = pack.rank_major(cp)
    assert torch.equal(arrived[order], pack.joint_order)
    assert torch.equal(arrived[order][inverse], arrived)
    with pytest.raises(ValueError, match="do not divide over 7"):
        pack.rank_major(7)


def test_patchify_orders_channels_as_the_reference():
    from diffusers import QwenImagePipeline

    latent = torch.randn(16, 1, 6, 4)
    theirs = QwenImagePipeline._pack_latents(latent[None], 1, 16, 6, 4)[0]
    assert torch.equal(patchify(latent), theirs)
    assert torch.equal(unpatchify(theirs, (1, 3, 2)), latent)


def test_bad_input_is_named():
    ok = torch.zeros(16, 1, 4, 4)
    with pytest.raises(ValueError, match="at least one sample"):
        Pack.of([])
    with pytest.raises(ValueError, match="at least one text token"):
        Pack.of([SampleShape(0, (1, 2, 2))])
    with pytest.raises(ValueError, match="5 x 4 does not divide"):
        patchify(torch.zeros(16, 1, 5, 4))
    with pytest.raises(ValueError, match="2 targets, 1 prompts"):
        pack_inputs([ok, ok], [torch.zeros(3, 24)], torch.zeros(2))
    with pytest.raises(ValueError, match="ends past position 4096"):
        Pack.of([SampleShape(4096, (1, 4, 4))])
    with pytest.raises(ValueError, match="exceed the RoPE range"):
        Pack.of([SampleShape(4, (1, 1, 9000))])
    with pytest.raises(ValueError, match="this model takes 64 and 24"):
        random_model()(pack_inputs([ok], [torch.zeros(3, 20)], torch.zeros(1)))
