"""A base stored in four or eight bits computes nearly what its weights do, and its adapters train as beside them."""

import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_batch import ADAPTERS, CONFIG, fill, samples, with_adapters
from torch import Tensor
from worlds import run_world

from model.config import MMDiTConfig

KINDS = ("nf4", "int8", "fp8")
CASES = [("nf4", "float32"), ("int8", "float32"), *((kind, "bfloat16") for kind in KINDS)]
WIDE = replace(CONFIG, num_attention_heads=8, attention_head_dim=128, axes_dims_rope=(16, 56, 56))

pytestmark = pytest.mark.skipif(
    not (find_spec("bitsandbytes") and find_spec("torchao")), reason="bitsandbytes or torchao is not installed"
)


def engine_with_adapters(**settings):
    from training.engine.config import EngineConfig
    from training.engine.step import Engine

    engine = Engine(CONFIG, EngineConfig(**settings), build=with_adapters)
    fill(engine.model)
    engine.weights_changed()
    return engine


def gradients(engine) -> dict[str, Tensor]:
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    engine.backward(VelocityMSE(), [samples()], Randomness(7))
    return {n: p.main_grad.clone() for n, p in engine.model.named_parameters() if p.requires_grad}


def multiplied_out(engine, **settings):
    """A plain engine over the weights that a quantised one's stand for."""
    from training.engine.quantized import quantized_layers

    plain = engine_with_adapters(**settings)
    with torch.no_grad():
        for name, layer in quantized_layers(engine.model):
            plain.model.get_submodule(name).weight.copy_(layer.dequantised(engine.dtype))
    plain.weights_changed()
    return plain


def kept_for_backward(engine) -> list[Tensor]:
    """Every tensor that a step's graph keeps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()) or t, lambda t: t):
        gradients(engine)
    return kept


def weights_among(kept: list[Tensor], weights: list[Tensor]) -> int:
    """How many of the tensors are one of the weights, either way round."""
    either = [w for weight in weights for w in (weight, weight.T)]
    return sum(any(t.shape == w.shape and torch.equal(t.to(w.dtype), w) for w in either) for t in kept)


def beside_the_weights(rank: int) -> dict[tuple[str, str], dict[str, float]]:
    return {case: _beside(*case) for case in CASES}


def _beside(kind: str, dtype: str) -> dict[str, float]:
    from training.engine.quantized import quantized_layers
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    engine = engine_with_adapters(dtype=dtype, quantize=kind)
    plain = multiplied_out(engine, dtype=dtype)
    found, expected = gradients(engine), gradients(plain)
    assert found.keys() == expected.keys() and all(".lora." in name for name in found) and len(found) > 50
    weights = [layer.dequantised(engine.dtype) for _, layer in quantized_layers(engine.model)]
    inputs, _ = VelocityMSE().prepare(samples(), Randomness(7), engine.align)
    recomputed = {}
    for recompute in ("selective", "block"):
        again = gradients(engine_with_adapters(dtype=dtype, quantize=kind, recompute=recompute))
        recomputed[recompute] = all(torch.equal(again[n], g) for n, g in found.items())
    return {
        "error": max(((found[n] - g).norm() / g.norm().clamp_min(1e-30)).item() for n, g in expected.items()),
        "frozen": torch.equal(engine.frozen["ema"](inputs), engine.model(inputs)),
        "kept": weights_among(kept_for_backward(engine), weights),
        "kept by plain layers": weights_among(kept_for_backward(plain), weights),
        **recomputed,
    }


def test_adapters_train_as_over_the_weights_multiplied_out():
    (cases,) = run_world(1, beside_the_weights)
    for case, found in cases.items():
        assert found["error"] < 1e-3, case
        assert found["frozen"] and found["selective"] and found["block"], case
        assert found["kept"] == 0 < found["kept by plain layers"], case


def over_ranks(rank: int, cp: int) -> dict[str, np.ndarray]:
    from training.engine.config import ParallelConfig

    found = gradients(engine_with_adapters(quantize="nf4", parallel=ParallelConfig(cp=cp)))
    return {name: gradient.numpy() for name, gradient in found.items()}


def test_context_parallel_ranks_agree_with_one():
    (alone,), (first, second) = run_world(1, over_ranks, 1), run_world(2, over_ranks, 2)
    for name, expected in alone.items():
        assert np.array_equal(first[name], second[name])
        assert np.abs(first[name] - expected).max() <= 1e-5 * np.abs(expected).max(), name


def against_the_unquantised(rank: int, config: MMDiTConfig) -> dict[str, tuple[float, float]]:
    """Relative error and cosine of the velocity by each kind."""
    from model.mmdit import MMDiT
    from model.ops import fill_weight
    from training.engine.config import ParallelConfig
    from training.engine.device import start
    from training.engine.ops import MegatronOps
    from training.engine.quantized import QuantizedOps
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    layout = start(ParallelConfig())
    inputs, _ = VelocityMSE().prepare(samples(), Randomness(7), 16)
    plain = fill(MMDiT(config, MegatronOps(layout, torch.float32)))
    found = {}
    with torch.no_grad():
        expected = plain(inputs)
        for kind in KINDS:
            model = MMDiT(config, QuantizedOps(kind, layout, torch.float32))
            for name, full in plain.named_parameters():
                fill_weight(model, name, full)
            velocity = model(inputs)
            error = (velocity - expected).norm() / expected.norm()
            cosine = torch.cosine_similarity(velocity.flatten(), expected.flatten(), dim=0)
            found[kind] = (error.item(), cosine.item())
    print(found)
    return found


@pytest.mark.parametrize("config", [CONFIG, pytest.param(WIDE, marks=pytest.mark.slow)], ids=["64", "1024"])
def test_it_computes_nearly_what_the_whole_weights_do(config: MMDiTConfig):
    (found,) = run_world(1, against_the_unquantised, config)
    assert 0 < found["int8"][0] < 0.03, found
    assert 0 < found["fp8"][0] < 0.06, found
    assert 0.98 < found["nf4"][1] < 1, found


def ways_to_fill(rank: int, folder: Path) -> dict[str, dict[str, bool]]:
    from training.engine.config import EngineConfig
    from training.engine.step import Engine
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    base = Engine(CONFIG, EngineConfig())
    fill(base.model)
    base.weights_changed()
    base.step(VelocityMSE(), [samples()], Randomness(7))
    base.save(folder / "step_00000001", {})
    return {kind: _filled(kind, folder / "step_00000001") for kind in KINDS}


def _filled(kind: str, folder: Path) -> dict[str, bool]:
    from training.engine import checkpoint
    from training.engine.quantized import quantized_layers

    def same() -> bool:
        found = [p for _, m in quantized_layers(engine.model) for p in m.stored()]
        return all(torch.equal(x.float(), y.float()) for x, y in zip(found, expected, strict=True))

    engine, weights = engine_with_adapters(quantize=kind), checkpoint.read_tensors(folder)
    layers = list(quantized_layers(engine.model))
    expected = [p for name, m in layers for p in m.format.quantise(weights[f"{name}.weight"])]
    found = {}
    engine.load_weights(weights.items())
    found["by name"] = same()
    engine.initialize(0)
    dense = {n: m.dequantised(torch.float32) for n, m in layers}
    finite = all(w.isfinite().all() and (not w.any()) == n.endswith(".mod") for n, w in dense.items())
    found["at random"] = finite and not same()
    engine.load_run(folder)
    found["from a checkpoint"] = same()
    state = {n: t.clone() for n, t in engine.model.state_dict().items()}
    engine.initialize(0)
    engine.model.load_state_dict(state)
    found["from its own state"] = same()
    with pytest.raises(ValueError, match="a weight of shape .3, 4."):
        layers[0][1].load_weight(torch.zeros(3, 4))
    return found


def test_weights_are_stored_as_they_are_loaded(tmp_path: Path):
    (kinds,) = run_world(1, ways_to_fill, tmp_path)
    for kind, found in kinds.items():
        assert all(found.values()), (kind, found)


def stored_bytes(rank: int) -> dict[str, tuple[int, int]]:
    """Bytes as counted, and of the storage of a model that was moved and filled."""
    from training.engine.quantized import resident_bytes

    found = {}
    for kind in KINDS:
        engine = engine_with_adapters(quantize=kind, dtype="bfloat16")
        engine.model.to("cpu", torch.float16).to(engine.dtype)
        tensors = [*engine.model.parameters(), *engine.model.buffers()]
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        found[kind] = (resident_bytes(CONFIG, kind, ADAPTERS), sum(storages.values()))
    return found


def test_bytes_are_counted_as_they_are():
    (found,) = run_world(1, stored_bytes)
    for kind, (counted, real) in found.items():
        assert counted == real, kind


def test_bytes_are_those_of_the_formats():
    from training.engine.quantized import resident_bytes

    config = MMDiTConfig(num_layers=3)
    d, streams = config.width, 2 * config.num_layers
    weights, channels, layers = 18 * d * d * streams, 15 * d * streams, 7 * streams
    rest = 2 * (config.num_parameters - weights)
    assert resident_bytes(config) == 2 * weights + rest
    assert resident_bytes(config, "int8") == resident_bytes(config, "fp8") == weights + 4 * channels + rest
    assert resident_bytes(config, "nf4") == weights // 2 + weights // 64 + 4 * (weights // 64 // 256 + layers) + rest


def loading(rank: int, kind: str, config: MMDiTConfig, folder: Path) -> tuple[int, int]:
    """How far this process's peak memory rises while a folder fills a model, and the model's bytes."""
    from resource import RUSAGE_SELF, getrusage

    from model.diffusers_io.folder import load_transformer
    from model.mmdit import MMDiT
    from training.engine.config import ParallelConfig
    from training.engine.device import start
    from training.engine.quantized import QuantizedOps, resident_bytes

    model = MMDiT(config, QuantizedOps(kind, start(ParallelConfig()), torch.bfloat16))
    before = getrusage(RUSAGE_SELF).ru_maxrss
    load_transformer(folder, model)
    return (getrusage(RUSAGE_SELF).ru_maxrss - before) * 1024, resident_bytes(config, kind)


@pytest.mark.slow
def test_memory_never_holds_the_model(tmp_path: Path):
    from safetensors.torch import save_file

    from model.diffusers_io.names import to_diffusers
    from model.mmdit import MMDiT

    config = MMDiTConfig(num_layers=8, num_attention_heads=12)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MMDiT(config).named_parameters()}
    folder = tmp_path / "transformer"
    folder.mkdir()
    for part in sorted({name.partition(".img.")[0].partition(".txt.")[0] for name in shapes}):  # a file a block
        of_part = {n: s for n, s in shapes.items() if n.startswith(part)}
        tensors = {to_diffusers(n): torch.randn(s, dtype=torch.bfloat16) for n, s in of_part.items()}
        save_file(tensors, folder / f"{part}.safetensors")
    file = max(f.stat().st_size for f in folder.iterdir())
    largest = max(s.numel() for s in shapes.values()) * 4
    for kind in KINDS:
        ((risen, stored),) = run_world(1, loading, kind, config, tmp_path, deadline_s=300)
        print(f"{kind}: {risen / 1e6:.0f} MB to store {stored / 1e6:.0f} MB")
        assert risen < stored + file + 5 * largest < 2 * config.num_parameters  # the file is mapped while it is read
    shutil.rmtree(folder)


@pytest.mark.parametrize(("kind", "library"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("fp8", "torchao")])
def test_a_missing_library_is_named(kind: str, library: str, monkeypatch):
    from training.engine.quantized import FORMATS

    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"needs {library}: pip install"):
        FORMATS[kind]().library  # noqa: B018


def test_tensor_parallelism_is_refused():
    from training.engine.device import CPU, Layout
    from training.engine.quantized import QuantizedOps

    with pytest.raises(ValueError, match="--tp 1"):
        QuantizedOps("int8", Layout(CPU, 0, 2, 0, 1, 0, 2, 0, 1, False, *[None] * 6), torch.float32)
