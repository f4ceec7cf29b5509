"""Adapters compute and train like PEFT's, and their files go both ways."""

import pytest
import torch
from diffusers import QwenImagePipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from tiny_models import CONFIG, EDIT_2511, case, diffusers_twin, gradients, random_model, relative, run_ours, run_theirs

from model.config import LoRAConfig
from model.diffusers_io.lora_files import read_adapters, write_adapters
from model.diffusers_io.names import to_diffusers
from model.lora import add_adapters, load_adapters, merge, split_adapters

EVERYWHERE = ("q", "k", "v", "out", "mlp_in", "mlp_out", "mod", "img_in", "txt_in", "proj", "linear_1", "linear_2")
SAMPLE = dict(txt=7, size=(1, 4, 3), references=((1, 2, 3),))


def adapted(model, config, seed=3):
    """Add adapters and give B random numbers too."""
    layers = add_adapters(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in layers:
            b = model.get_submodule(name).lora.b.weight
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
    return split_adapters(dict(model.named_parameters()))[1]


def test_fresh_adapters_change_nothing_and_leave_the_base_frozen():
    sample, plain, model = case(CONFIG, **SAMPLE), random_model(), random_model()
    layers = add_adapters(model, LoRAConfig(rank=4, targets=EVERYWHERE))
    assert torch.equal(run_ours(model, [sample])[0], run_ours(plain, [sample])[0])
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora.{ab}.weight" for n in layers for ab in "ab"}
    assert not any(n.startswith(("blocks.1.txt.out", "blocks.1.txt.mlp")) for n in layers)
    names = dict(model.named_parameters())
    assert set(dict(plain.named_parameters())) <= set(names)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_outputs_and_gradients_equal_peft(rank_stabilised):
    model, sample = random_model(EDIT_2511), case(EDIT_2511, **SAMPLE)
    theirs = diffusers_twin(model)
    config = LoRAConfig(rank=4, alpha=6, rank_stabilised=rank_stabilised, targets=EVERYWHERE)
    adapters = adapted(model, config)
    targets = [to_diffusers(n) for n in adapters]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, use_rslora=rank_stabilised, target_modules=targets), theirs)
    params = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, pair in adapters.items():
            for half, value in zip("AB", pair, strict=True):
                params[f"{to_diffusers(name)}.lora_{half}.default.weight"].copy_(value)
    v, w = run_ours(model, [sample])[0], run_theirs(theirs, sample)
    assert relative(v, w) < 1e-5
    mine, peft = gradients(model, (v * sample.direction).mean()), gradients(theirs, (w * sample.direction).mean())
    for name in adapters:
        for ab in "ab":
            g = peft[f"{to_diffusers(name)}.lora_{ab.upper()}.default.weight"]
            assert relative(mine[f"{name}.lora.{ab}.weight"], g) < 1e-4, name


def test_merged_weights_compute_the_same():
    model, sample, config = (
        random_model(),
        case(CONFIG, **SAMPLE),
        LoRAConfig(4, 8.0, targets=("q", "mod", "img.mlp_in")),
    )
    adapters = adapted(model, config)
    base, _ = split_adapters(dict(model.named_parameters()))
    plain = random_model(seed=9)
    plain.load_state_dict(merge(base, adapters, config.scale))
    assert relative(run_ours(plain, [sample])[0], run_ours(model, [sample])[0]) < 1e-5


@pytest.mark.parametrize("format", ["diffusers", "peft", "comfyui"])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_files_round_trip(tmp_path, format, rank_stabilised):
    model, sample = random_model(), case(CONFIG, **SAMPLE)
    config = LoRAConfig(rank=4, alpha=6, rank_stabilised=rank_stabilised, targets=("q", "txt.v"))
    adapters = adapted(model, config)
    path = tmp_path / "adapter.safetensors" if format == "comfyui" else tmp_path / "adapter"
    write_adapters(path, adapters, config, format)
    again, read = read_adapters(path)
    assert again.scale == pytest.approx(config.scale) and set(read) == set(adapters)
    fresh = random_model()
    add_adapters(fresh, again)
    load_adapters(fresh, read)
    assert relative(run_ours(fresh, [sample])[0], run_ours(model, [sample])[0]) < 1e-6


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_diffusers_loads_our_files(tmp_path, format, rank_stabilised):
    model, sample = random_model(), case(CONFIG, **SAMPLE)
    config = LoRAConfig(rank=4, alpha=6, rank_stabilised=rank_stabilised)
    pipe = QwenImagePipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=diffusers_twin(model)
    )
    file = write_adapters(tmp_path / "adapter.safetensors", adapted(model, config), config, format)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    assert relative(run_ours(model, [sample])[0], run_theirs(pipe.transformer, sample)) < 1e-5


def test_we_load_what_peft_saves(tmp_path):
    model, sample = random_model(), case(CONFIG, **SAMPLE)
    settings = dict(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False)
    theirs = get_peft_model(diffusers_twin(model), LoraConfig(target_modules=["to_q", "to_add_out"], **settings))
    theirs.save_pretrained(tmp_path)
    config, adapters = read_adapters(tmp_path)
    assert "blocks.1.txt.out" in adapters  # nothing reads that layer's output: passed over
    assert config.rank == 4 and config.rank_stabilised
    add_adapters(model, config)
    load_adapters(model, adapters)
    assert relative(run_ours(model, [sample])[0], run_theirs(theirs, sample)) < 1e-5


def test_files_of_other_trainers(tmp_path):
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    key = "transformer_blocks.0.attn.to_q"
    save_file({f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(2.0)},
              tmp_path / "x.safetensors")  # fmt: skip
    config, adapters = read_adapters(tmp_path / "x.safetensors")
    assert config.scale == 0.5 and torch.equal(adapters["blocks.0.img.q"][1], b)


def test_bad_input_is_named(tmp_path):
    model = random_model()
    with pytest.raises(ValueError, match="no layer's name ends in 'to_q'"):
        add_adapters(model, LoRAConfig(targets=("to_q",)))
    with pytest.raises(ValueError, match="positive rank"):
        LoRAConfig(rank=0)
    config = LoRAConfig(rank=4, targets=("q",))
    adapters = adapted(model, config)
    with pytest.raises(ValueError, match="differ, first at blocks.0.img.q"):
        load_adapters(model, {k: v for k, v in adapters.items() if k != "blocks.0.img.q"})
    wrong = adapters | {"blocks.0.img.q": (torch.zeros(4, 5), torch.zeros(32, 4))}
    with pytest.raises(ValueError, match="blocks.0.img.q: an adapter of"):
        load_adapters(model, wrong)
    with pytest.raises(ValueError, match="holds no adapters"):
        read_adapters(tmp_path)
    file = write_adapters(tmp_path, adapters, config)
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "0.attn.to_q.lora_B" not in k}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="blocks.0.img.q lacks a half"):
        read_adapters(tmp_path / "half.safetensors")
    save_file({"unet.lora_A.weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="no adapter of a layer"):
        read_adapters(tmp_path / "foreign.safetensors")
