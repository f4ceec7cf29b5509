"""Exported folders load in diffusers, and whole pipelines draw our pictures from the same noise."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from safetensors.torch import load_file, save_file
from test_conditioner import PilProcessor, picture
from tiny_models import CONFIG, random_model
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

from model.conditioner import Conditioner
from model.diffusers_io.config import locate, read_config
from model.diffusers_io.folder import load_transformer, read_weights, write_pipeline
from model.mmdit import MMDiT
from model.sampling.draw import Sampler
from model.sampling.schedule import FixedSchedule
from model.text_to_image import TextToImage, to_uint8
from training.loading import load
from vae.autoencoder import VAE

SAMPLER = Sampler(FixedSchedule(4))
JOINT = replace(CONFIG, joint_attention_dim=128)
PROMPTS, SIZES, SEEDS = ["a red circle", "two green stars on a table"], [(64, 96), (128, 48)], [3, 11]


@pytest.fixture(scope="module")
def export(components, tmp_path_factory):
    """Folders by pipeline class, and the model that was written."""
    model = random_model(replace(JOINT, zero_cond_t=True))
    folder = tmp_path_factory.mktemp("export")
    for name in ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        weights = dict(model.named_parameters())
        write_pipeline(folder / name, model.config, weights, components, name, max_shard_bytes=2**17)
    return folder


def processor(folder):
    return PilProcessor(
        Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
        Qwen2Tokenizer.from_pretrained(folder / "processor"),
    )


def picture_by_diffusers(pipe, seed, **arguments):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(negative_prompt=" ", num_inference_steps=4, generator=generator, output_type="np", **arguments).images[
        0
    ]


def same_picture(maker: TextToImage, latent: torch.Tensor, theirs: np.ndarray) -> None:
    ours = (next(maker.decode([latent])) / 2 + 0.5).permute(1, 2, 0).numpy()
    assert theirs.std() > 0.02
    assert np.abs(ours - theirs).max() < 1e-4


def test_text_to_image(export):
    folder = export / "QwenImagePipeline"
    maker = load(folder, sampler=SAMPLER)
    pipe = QwenImagePipeline.from_pretrained(folder)
    latents = maker.latents(maker.requests(PROMPTS, SIZES, SEEDS))
    for prompt, (height, width), seed, latent in zip(PROMPTS, SIZES, SEEDS, latents, strict=True):
        same_picture(maker, latent, picture_by_diffusers(pipe, seed, prompt=prompt, height=height, width=width))
    for latent, shown in zip(latents, maker.generate(PROMPTS, SIZES, SEEDS), strict=True):
        assert np.array_equal(shown, to_uint8(next(maker.decode([latent]))))


def test_edit(export, monkeypatch):
    folder = export / "QwenImageEditPipeline"
    area = 64 * 64  # the pipeline's own 1024 x 1024 would take minutes
    patch_areas(monkeypatch, "pipeline_qwenimage_edit", area)
    maker = TextToImage(*our_parts(folder, area), sampler=SAMPLER, reference_area=area)
    image = picture(100, 80)
    (latent,) = maker.latents(maker.requests(["make it red"], [(48, 64)], [5], [[image]]))
    pipe = QwenImageEditPipeline.from_pretrained(folder, processor=processor(folder))
    same_picture(maker, latent, picture_by_diffusers(pipe, 5, prompt="make it red", image=image, height=48, width=64))


def test_edit_plus(export, monkeypatch):
    folder = export / "QwenImageEditPlusPipeline"
    area = 64 * 64
    patch_areas(monkeypatch, "pipeline_qwenimage_edit_plus", area)
    maker = TextToImage(*our_parts(folder, area), sampler=SAMPLER, reference_area=area)
    images = [picture(100, 80), picture(60, 130, seed=1)]
    requests = maker.requests(["a red star", "swap them"], [(48, 64), (64, 64)], [5, 6], [[], images])
    latents = maker.latents(requests)
    pipe = QwenImageEditPlusPipeline.from_pretrained(folder, processor=processor(folder))
    theirs = picture_by_diffusers(pipe, 6, prompt="swap them", image=images, height=64, width=64)
    same_picture(maker, latents[1], theirs)


def our_parts(folder, area):
    """mrope=False: diffusers leaves pictures 1-D positions in the text encoder."""
    conditioner = Conditioner.from_folder(folder, picture_area=area, mrope=False)
    model = MMDiT(read_config(folder))
    load_transformer(folder, model)
    return model, conditioner, VAE.from_folder(folder)


def patch_areas(monkeypatch, module: str, area: int) -> None:
    import importlib

    pipeline = importlib.import_module(f"diffusers.pipelines.qwenimage.{module}")
    original = pipeline.calculate_dimensions
    monkeypatch.setattr(pipeline, "calculate_dimensions", lambda _, ratio: original(area, ratio))


def test_import_and_export_are_bit_identical(export, components, tmp_path):
    folder = export / "QwenImageEditPlusPipeline"
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    model = MMDiT(read_config(folder))
    load_transformer(folder, model)
    write_pipeline(tmp_path / "again", model.config, dict(model.named_parameters()), folder,
                   "QwenImageEditPlusPipeline", max_shard_bytes=2**17)  # fmt: skip
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / file.relative_to(folder)).read_bytes() == file.read_bytes(), file


def test_bfloat16_export_rounds_once(export, components, tmp_path):
    model = random_model(JOINT)
    write_pipeline(tmp_path / "out", JOINT, dict(model.named_parameters()), components, dtype=torch.bfloat16)
    for name, tensor in read_weights(tmp_path / "out"):
        assert torch.equal(tensor, model.get_parameter(name).to(torch.bfloat16))


def test_slices_are_read_into_tensor_parallel_shards(export):
    folder = export / "QwenImagePipeline"
    whole = dict(read_weights(folder))
    model = MMDiT(read_config(folder))
    linear = model.blocks[0].img.q
    linear.weight = torch.nn.Parameter(torch.empty(16, 32))
    linear.weight.tp_shard = (0, 1, 2)
    load_transformer(folder, model)
    assert torch.equal(linear.weight, whole["blocks.0.img.q.weight"][16:])


def test_foreign_and_damaged_folders_are_named(export, components, tmp_path):
    source = export / "QwenImagePipeline" / "transformer"
    config = json.loads((source / "config.json").read_text())

    def broken(change_config=None, change_weights=None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "transformer").mkdir(parents=True)
        values = config | (change_config or {})
        (folder / "transformer" / "config.json").write_text(json.dumps(values))
        weights = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
        (change_weights or (lambda w: None))(weights)
        save_file(weights, folder / "transformer" / "model.safetensors")
        return folder

    def read(folder):
        load_transformer(folder, MMDiT(read_config(folder)))

    read(broken())
    with pytest.raises(ValueError, match="describes a FluxTransformer2DModel"):
        read(broken({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="sets use_layer3d_rope"):
        read(broken({"use_layer3d_rope": True}))
    with pytest.raises(ValueError, match="lacks 1 weights, first proj_out.bias"):
        read(broken(change_weights=lambda w: w.pop("proj_out.bias")))
    with pytest.raises(ValueError, match="holds x_embedder.weight"):
        read(broken(change_weights=lambda w: w.update({"x_embedder.weight": torch.zeros(1)})))
    with pytest.raises(ValueError, match="img_in.weight does not fit"):
        read(broken(change_weights=lambda w: w.update({"img_in.weight": torch.zeros(3, 3)})))
    with pytest.raises(ValueError, match="which this config does not have"):
        read(broken({"num_layers": 1}))
    with pytest.raises(ValueError, match="no diffusers folder"):
        locate(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer/|has no scheduler/"):
        write_pipeline(tmp_path / "new", JOINT, {}, tmp_path)
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="choose another output"):
        write_pipeline(tmp_path / "precious", JOINT, {}, components)
    assert not list(tmp_path.glob(".tmp*"))
