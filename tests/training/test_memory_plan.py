"""The plan's figures against what torch, Megatron and others' models count."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from held_bytes import NARROW, WIDE, Alive, built, held_after_forward, packed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from worlds import run_world

from command_line import UserError
from model.config import PRESETS, LoRAConfig, MMDiTConfig
from posttrain import dpo
from training.cost.activations import Microbatch, Place, kept
from training.cost.cards import CARDS, GIB, named
from training.cost.step import Setting, Work, component_bytes, memory, sample_flops, seconds
from training.cost.weights import QUANTIZED_BYTES, Weights
from training.engine.config import EngineConfig, ParallelConfig
from training.plan import MARGIN, before_a_run, layouts, plan, remedies, setting_of
from training.source import BASE

ADAPTERS = {
    "none": None,
    "attention": LoRAConfig(rank=8),
    "all": LoRAConfig(rank=4, targets=("q", "k", "v", "out", "mlp_in", "mlp_out", "mod")),
}
HUB = Path("Qwen/Qwen-Image")

CASES = {  # what CUDA does with long samples, with short ones; what a CPU does with samples that are alike
    "long": (Microbatch(2, 264, 132), False, "cuda"),
    "longer than products": (Microbatch(2, 2160, 144), False, "cuda"),
    "short": (Microbatch(5, 60, 25), False, "cuda"),
    "one": (Microbatch(1, 512, 128), True, "cpu"),
    "alike": (Microbatch(6, 64, 24), True, "cpu"),
}


COUNTED = [
    (case, config, dtype)
    for case, (batch, _, device) in CASES.items()
    for config in (NARROW, WIDE)
    for dtype in (torch.float32, torch.bfloat16)
    # a CPU multiplies short attention out in bf16; CUDA does as the CPU in fp32
    if (device == "cpu" or (dtype == torch.float32) == (batch.img < 2048)) and (batch.img < 2048 or config is NARROW)
]


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("case, config, dtype", COUNTED)
def test_activations_are_those_that_torch_keeps(case: str, config: MMDiTConfig, dtype: torch.dtype, recompute: str):
    batch, alike, device = CASES[case]
    model, inputs = built(config, dtype, None, recompute), packed(batch, config, alike)
    counted = kept(Weights(config), batch, Place(device, dtype.itemsize), recompute)
    assert counted.forward == pytest.approx(held_after_forward(model, inputs), rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("case", ["long", "alike"])
def test_activations_are_those_that_autograd_saves(case: str, recompute: str):
    batch, alike, device = CASES[case]
    model, inputs, saved = built(WIDE, torch.float32, None, recompute), packed(batch, WIDE, alike), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs)
    found = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert kept(Weights(WIDE), batch, Place(device, 4), recompute).forward == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("case", ["long", "short", "alike"])
@pytest.mark.parametrize("adapters", ["attention", "all"])
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_activations_under_adapters(case: str, adapters: str, recompute: str):
    (batch, alike, device), lora = CASES[case], ADAPTERS[adapters]
    model, inputs = built(WIDE, torch.float32, lora, recompute), packed(batch, WIDE, alike)
    counted = kept(Weights(WIDE, lora), batch, Place(device, 4), recompute)
    assert counted.forward == pytest.approx(held_after_forward(model, inputs), rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_a_backward_pass_takes_no_more_than_counted(recompute: str):
    batch, alike, device = CASES["long"]
    model, inputs = built(NARROW, torch.float32, None, recompute), packed(batch, NARROW, alike)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    grads = [p.grad for p in model.parameters()]
    held_after_forward(model, inputs)  # what is made once
    with Alive([*model.parameters(), *grads, inputs.img, inputs.txt, inputs.sigma], peaks=True) as alive:
        model(inputs).square().mean().backward()
    counted = kept(Weights(model.config), batch, Place(device, 4), recompute)
    assert 0.9 * counted.peak < alive.peak < 1.01 * counted.peak


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_parameters_are_those_of_the_model(adapters: str):
    model = built(WIDE, torch.float32, ADAPTERS[adapters])
    params = {n: p for n, p in model.named_parameters() if not (".lora." in n and n.endswith("bias"))}  # zero, frozen
    weights = Weights(WIDE, ADAPTERS[adapters])
    assert weights.number() == sum(p.numel() for p in params.values())
    assert weights.trained() == sum(p.numel() for p in params.values() if p.requires_grad)
    assert Weights(WIDE).number() == WIDE.num_parameters


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_flops_are_those_that_torch_counts(adapters: str):
    model, batch = built(WIDE, torch.float32, ADAPTERS[adapters]), Microbatch(1, 256, 144)
    found = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            out = model(packed(batch, WIDE, True))
        found.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        found.append(counter.get_total_flops())
    forward, backward, _ = sample_flops(Weights(WIDE, ADAPTERS[adapters]), batch.img, batch.txt)
    assert [forward, backward] == pytest.approx(found, rel=0.005)


LAYOUTS = [(ParallelConfig(tp=2, sp=True), "float32"), (ParallelConfig(cp=2), "bfloat16")]


def measured(rank: int, batch: Microbatch) -> list[dict[str, float]]:
    """Bytes that an engine holds, and that a forward pass of it leaves behind, in each layout."""
    return [measured_in(parallel, dtype, batch) for parallel, dtype in LAYOUTS]


def measured_in(parallel: ParallelConfig, dtype: str, batch: Microbatch) -> dict[str, float]:
    from megatron.core.parallel_state import get_global_memory_buffer

    from training.engine.step import Engine
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    engine = Engine(WIDE, EngineConfig(parallel=parallel, dtype=dtype))
    engine.initialize(0)
    inputs = packed(batch, WIDE, False)
    with torch.no_grad():
        engine.model(inputs)
    buffers = get_global_memory_buffer().buffer.values()
    activations = held_after_forward(engine.model, inputs, *buffers)
    (samples, rng), optimizer = (some_samples(), Randomness(0)), engine.optimizer.optimizer
    engine.step(VelocityMSE(), [samples], rng)
    params = list(engine.model.parameters())
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {p.untyped_storage().data_ptr() for p in params}
    states = [t for state in optimizer.state.values() for t in state.values()]
    states += [m for m in masters if m.untyped_storage().data_ptr() not in own]
    return {
        "weights": sum(p.nbytes for p in params),
        "gradients": sum(p.main_grad.nbytes for p in params if p.requires_grad),
        "optimizer": sum(t.nbytes for t in states),
        "moving averages": sum(t.nbytes for t in engine.frozen.averages["ema"].average.values()),
        "activations": activations,
    }


def some_samples() -> list:
    from data_pipeline.sample import EncodedSample

    return [EncodedSample(f"{i}", torch.randn(16, 1, 8, 8), torch.randn(8, 64)) for i in range(2)]


def test_a_rank_holds_what_is_counted():
    batch = Microbatch(2, 180, 90)
    ranks = run_world(2, measured, batch)
    for (parallel, dtype), *found in zip(LAYOUTS, *ranks, strict=True):
        engine = EngineConfig(parallel=parallel, dtype=dtype)
        counted = memory(Setting(WIDE, engine, Work(2, batch.img, batch.txt), 2, 10**4, "cpu", (0.0, 0.0))).always
        for name in ("weights", "gradients"):
            assert counted[name] == pytest.approx(found[0][name], rel=1e-6), name
        for name in ("optimizer", "moving averages"):  # slices are equal but for padding
            assert counted[name] * 2 == pytest.approx(sum(rank[name] for rank in found), rel=1e-3), name
        place = Place("cpu", 4, parallel) if dtype == "float32" else Place("cuda", 2, parallel)
        assert kept(Weights(WIDE), batch, place).forward == pytest.approx(found[0]["activations"], rel=0.1)


@pytest.mark.parametrize("gpu", ["8xH100", "8xA100"])
@pytest.mark.parametrize("name", ["sft", "dpo", "flow_grpo", "nft"])
def test_the_recipe_of_the_large_model_fits_eight_gpus_of_80_gb(name: str, gpu: str, tmp_path: Path):
    trainer = importlib.import_module(f"posttrain.{name}").Config
    given = trainer.defaults(["--init", str(HUB), "--out", str(tmp_path)])
    data = {"data": (tmp_path,)} if name == "sft" else {}
    config = replace(given, init=HUB, out=tmp_path, dry_run=True, gpu=gpu, **data).completed()
    number, card = named(gpu)
    setting = setting_of(config, number, card)
    assert setting.model == PRESETS["qwen-image"] and setting.components[0] > 15e9  # the text encoder is there
    assert memory(setting).total < (1 - MARGIN) * card.gib * GIB
    told = plan(config).splitlines()
    assert len(told) <= 25 and max(map(len, told)) <= 120 and "does not fit" not in "".join(told)


def test_a_run_on_gpus_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = replace(dpo.Config.defaults(["--init", str(HUB)]), init=HUB, out=tmp_path, dry_run=True).completed()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert before_a_run(config) is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "echo NVIDIA H100 80GB HBM3, 81559\n" * 8)
    tool.chmod(0o755)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert before_a_run(config).endswith("GiB of 79.6, at its fullest while training")
    as_it_was = replace(config, engine=replace(config.engine, parallel=ParallelConfig(tp=4, sp=True)))
    assert "TOO MUCH. Would fit: --tp 8 --sp" in before_a_run(as_it_was)


def setting(world: int, card: str, **engine) -> tuple[Setting, object]:
    config = EngineConfig(**engine)
    made = Setting(PRESETS["qwen-image"], config, Work(512, 4096, 256), world, 16384)
    return made, CARDS[card]


def test_layouts_fit_and_the_fastest_comes_first():
    given, card = setting(8, "H100")
    found = list(layouts(given, card))
    assert found and all(memory(s).total <= (1 - MARGIN) * card.gib * GIB for s in found)
    times = [sum(seconds(s, card).values()) for s in found]
    assert times == sorted(times)
    more, roomy = setting(8, "H200")
    assert len(list(layouts(more, roomy))) > len(found)


def test_what_fits_in_no_layout_is_told_what_would_do():
    given, card = setting(2, "H100")
    assert not list(layouts(given, card))
    assert any(remedy.startswith("8 x H100 (") for remedy in remedies(given, card))


def test_adapters_on_a_quantised_base_fit_where_all_weights_do_not():
    given, card = setting(1, "RTX4090")
    given = replace(given, max_tokens=4352, work=replace(given.work, encodes=False))
    adapted = replace(given, engine=EngineConfig(lora_rank=64, quantize="nf4"))
    assert not list(layouts(given, card))
    fitting = {s.weights.quantize for s in layouts(adapted, card)}
    assert "nf4" in fitting and "none" not in fitting
    assert not list(layouts(replace(adapted, work=replace(given.work, encodes=True)), card))  # the text encoder, too
    away = replace(adapted, engine=replace(adapted.engine, swap_blocks=32))
    assert memory(away).total < memory(adapted).total - 4 * 2**30
    assert memory(adapted).always["weights"] == pytest.approx(0.516 * 20.43e9 + 0.28e9, rel=0.02)


def test_nf4_takes_the_bytes_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1024, 512, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert QUANTIZED_BYTES["nf4"] * weight.numel() == found


def test_more_processes_share_the_memory():
    def total(world: int) -> float:
        given, _ = setting(world, "H100", parallel=ParallelConfig(tp=4, sp=True))
        return memory(given).total

    assert total(4) > total(16) > total(128)
    with pytest.raises(ValueError, match="6 processes do not divide over tp 4"):
        total(6)


@pytest.mark.parametrize("gpu, found", [("8xH100", (8, "H100")), ("b200", (1, "B200"))])
def test_cards_by_name(gpu: str, found: tuple[int, str]):
    number, card = named(gpu)
    assert (number, card.name) == found


@pytest.mark.parametrize("gpu", ["0xH100", "H1000", "eight H100", "8x"])
def test_cards_that_are_none(gpu: str):
    with pytest.raises(UserError, match="8xH100"):
        named(gpu)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_bytes_of_components_are_those_of_their_networks():
    from model.conditioner import Conditioner
    from vae.autoencoder import VAE

    encoder, vae = Conditioner.from_folder(BASE).text_encoder, VAE.from_folder(BASE)
    assert component_bytes(BASE, 4) == (4 * parameters(encoder), 4 * parameters(vae))


@pytest.mark.slow
def test_the_bytes_of_the_published_components():
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    text = dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    text |= dict(intermediate_size=18944, vocab_size=152064)
    seen = dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=3584)
    with torch.device("meta"):
        published = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=seen)), AutoencoderKLQwenImage()
    assert component_bytes(HUB, 2) == tuple(2 * parameters(module) for module in published)
