"""LoRA as a user trains it: by every trainer, from a model, a run or a file, to a file that diffusers loads."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from small_run import CONFIG, SIZE_PX, run_entry
from test_posttrain_runs import DEADLINE_S, DPO, GRPO, NFT, assert_same_run, killed
from worlds import run_world

from command_line import UserError, from_dict, read_toml
from evaluation.__main__ import Config as Evaluation
from evaluation.__main__ import main as evaluate
from model import export
from model.diffusers_io.lora_files import read_adapters, write_adapters
from model.sampling.draw import Sampler
from model.sampling.schedule import FixedSchedule
from posttrain.sft import Config
from training.engine.checkpoint import read_weights, resolve
from training.engine.config import EngineConfig
from training.loading import load, whole_weights
from training.run_folder import read_metrics
from training.source import look

LORA = EngineConfig(lora_rank=2, lora_targets=("q", "v", "mlp_in"))
PROMPTS, SIZES, SEEDS = ["noise 1", "a red circle"], [(SIZE_PX, SIZE_PX)] * 2, [0, 1]


def entry(rank, name, steps, save_every, settings):
    run_entry(rank, name, steps, save_every, **settings)


def train(name: str, out: Path, init: Path, steps: int = 2, **settings) -> Path:
    settings = {"engine": LORA, **settings, "init": init, "out": out}
    run_world(1, entry, name, steps, 2, settings, deadline_s=DEADLINE_S)
    return out


@pytest.fixture(scope="module")
def pictures(make_captioned, tmp_path_factory) -> Path:
    """A folder as a user has one."""
    return make_captioned(tmp_path_factory.mktemp("pictures"), 12)


@pytest.fixture(scope="module")
def make_captioned():
    """make_captioned(folder, count): pictures of noise with captions beside them."""
    from PIL import Image

    def make(folder: Path, count: int) -> Path:
        rng = np.random.default_rng(0)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (48, 40 + 8 * (i % 3), 3), np.uint8)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"noise {i}")
        return folder

    return make


@pytest.fixture(scope="module")
def tuned(init, pictures, tmp_path_factory) -> Path:
    """A LoRA run on a folder of pictures."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    return train("sft", out, init, 4, pictures=pictures, batch_size=4, held_out=2)


def test_a_folder_of_pictures_becomes_adapters(tuned, init):
    assert [row["step"] for row in read_metrics(tuned)] == [1, 2, 3, 4]
    config, weights = read_weights(tuned, ema=False)
    assert config == CONFIG and weights and all(".lora." in name for name in weights)
    assert any(w.any() for name, w in weights.items() if name.endswith("lora.b.weight"))
    found = look(tuned)
    assert found.lora.rank == 2 and found.base.path.resolve() == resolve(init).resolve()
    assert found.fingerprint() != look(init).fingerprint()
    assert found.side_px() == SIZE_PX and found.components() == look(init).components()
    assert len(json.loads((tuned / "data" / "pictures.json").read_text())["files"]) == 24


@pytest.mark.parametrize("name, settings", [("dpo", DPO), ("flow_grpo", GRPO), ("nft", NFT)])
def test_every_trainer_trains_adapters(name, settings, init, tmp_path):
    run = train(name, tmp_path / "run", init, **settings)
    weights = read_weights(run, ema=False)[1]
    assert all(".lora." in n for n in weights)
    assert any(w.any() for n, w in weights.items() if n.endswith("lora.b.weight"))


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(init, pictures, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = dict(init=init, pictures=pictures, batch_size=4, engine=LORA, held_out=2)
    run_world(1, entry, "sft", 6, 2, settings | {"out": whole}, deadline_s=DEADLINE_S)
    rows = lambda: len((cut / "metrics.jsonl").read_bytes().splitlines()) if (cut / "metrics.jsonl").exists() else 0  # noqa: E731
    begun = lambda: (cut / "data" / "raw").exists()  # noqa: E731
    killed("sft", 6, settings | {"out": cut}, [begun, lambda: rows() >= 1, lambda: rows() >= 3])
    run_world(1, entry, "sft", 6, 2, settings | {"out": cut}, deadline_s=DEADLINE_S)
    assert_same_run(whole, cut)


@pytest.mark.parametrize("format", ["diffusers", "peft", "comfyui"])
def test_its_file_draws_in_diffusers_what_we_draw(format, tuned, init, components, tmp_path):
    ours = load(tuned, ema=False, sampler=Sampler(FixedSchedule(4)))
    with pytest.raises(UserError, match="--lora"):
        export.main(export.Config(init, tmp_path / "no", lora="diffusers"))
    export.main(export.Config(init, tmp_path / "base", components=components))
    export.main(export.Config(tuned, tmp_path / "lora", lora=format, ema=False))
    assert "base_model:" in (tmp_path / "lora" / "README.md").read_text()
    pipe = QwenImagePipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    before = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    if format == "peft":
        pipe.transformer = load_peft(pipe.transformer, tmp_path / "lora")
    else:
        pipe.load_lora_weights(tmp_path / "lora", weight_name=file.name)
    assert len(dict(pipe.transformer.named_parameters())) > len(before)
    latents = ours.latents(ours.requests(PROMPTS, SIZES, SEEDS))
    for prompt, seed, latent in zip(PROMPTS, SEEDS, latents, strict=True):
        drawn = pipe(
            prompt, negative_prompt=" ", width=SIZE_PX, height=SIZE_PX, true_cfg_scale=ours.sampler.cfg_scale,
            num_inference_steps=4, generator=torch.Generator().manual_seed(seed), output_type="np",
        ).images[0]  # fmt: skip
        shown = (next(ours.decode([latent])) / 2 + 0.5).permute(1, 2, 0).numpy()
        assert drawn.std() > 0.02 and np.abs(shown - drawn).max() < 1e-4


def load_peft(transformer, folder: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(transformer, folder).base_model.model


def test_adapters_go_on_from_a_run_and_from_a_file(tuned, init, tmp_path):
    settings = dict(data=(tuned / "data" / f"encoded-{SIZE_PX}",), batch_size=4, held_out=2)
    file = tmp_path / "lora"
    export.main(export.Config(tuned, file, lora="diffusers"))
    first = [
        read_metrics(train("sft", tmp_path / f"from-{where.name}", where, engine=EngineConfig(), **settings))[0]["loss"]
        for where in (tuned, file)
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert first[0] != read_metrics(train("sft", tmp_path / "fresh", init, **settings))[0]["loss"]
    assert look(tmp_path / "from-lora").lora.scale == 2.0
    with pytest.raises(AssertionError, match="holds other adapters"):
        train("sft", tmp_path / "other", tuned, engine=replace(LORA, lora_rank=4), **settings)


def test_a_file_of_another_trainer_needs_its_base_named(tuned, init, tmp_path):
    config, adapters = (look(tuned).lora, read_adapters_of(tuned))
    file = write_adapters(tmp_path / "foreign.safetensors", adapters, config, "comfyui")
    assert read_adapters(file)[0].scale == config.scale
    with pytest.raises(UserError, match="name it by --base"):
        look(file).model_config()
    found = look(file, base=init)
    weights, expected = whole_weights(found)[1], whole_weights(look(tuned))[1]
    assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in weights)
    size = {"height": 64, "width": 64, "steps": 2, "images_per_prompt": 1, "limit": 2}
    evaluation = Evaluation(str(file), init, split="validation", output=tmp_path / "evaluation", **size)
    evaluate(evaluation)
    (found,) = (tmp_path / "evaluation").glob("*/scores.json")
    assert "shapes/validation" in json.loads(found.read_text())["suites"]


def read_adapters_of(run: Path):
    from training.loading import adapters

    return adapters(look(run))


def test_a_base_that_is_gone_is_named(tuned, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tuned, copy)
    note = json.loads((copy / "init.json").read_text())
    (copy / "init.json").write_text(json.dumps(note | {"base": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone does not exist"):
        load(copy)


def test_its_config_takes_the_run_back(tuned):
    config = from_dict(Config, read_toml(tuned / "config.toml"))
    assert config.pictures is not None and config.data
    assert replace(config, dry_run=True).completed().data == config.data
    assert replace(config, dry_run=True, out=tuned / "other").completed().data != config.data
    with pytest.raises(UserError, match="stands in place of --data"):
        replace(config, dry_run=True, data=(tuned,)).completed()
