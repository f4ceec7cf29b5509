"""One batch through the whole system, tar to diffusers: the README's "follow one batch", step by step."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.dataset import EncodedDataset
from data_pipeline.encoding import Encoder
from data_pipeline.loader import Loader
from data_pipeline.sample import RawSample
from data_pipeline.shards import read_raw, write_raw
from data_pipeline.synthesis.shapes_world import prompt_of, render, sample_prompt
from model.conditioner import Conditioner
from model.config import PRESETS
from model.diffusers_io.folder import write_pipeline
from model.mmdit import MMDiT
from model.packing import token_size
from model.sampling.draw import Request, Sampler
from model.sampling.guidance import Condition
from model.sampling.schedule import FixedSchedule
from model.tiny_components import write_tiny_components
from training.engine.checkpoint import read_weights
from training.engine.config import EngineConfig, OptimizerConfig
from training.engine.step import Engine
from training.flow_matching import VelocityMSE
from training.randomness import Randomness
from vae.autoencoder import VAE
from vae.config import PRESETS as VAE_PRESETS


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_one_batch(tmp_path):
    # 1. Pictures and captions in a tar: true renders of the shapes world, of several sizes.
    rng = np.random.default_rng(0)
    raw = []
    for i, size in enumerate([(64, 64), (48, 96), (96, 48), (64, 80)]):
        metadata = sample_prompt(rng, "train")
        image, caption = png(render(metadata, rng, size)), prompt_of(metadata)
        meta = {"caption": caption, "source": "shapes", "width": size[1], "height": size[0], "geneval": metadata}
        raw.append(RawSample(f"shape-{i}", image, "png", meta))
    tar = tmp_path / "raw" / "shard-000000.tar"
    tar.parent.mkdir()
    write_raw(tar, raw)
    assert [s.key for s in read_raw(tar)] == [s.key for s in raw]

    # 2, 3. Producers: VAE latents in aspect-ratio buckets, hidden states of templated prompts.
    components = tmp_path / "components"
    write_tiny_components(components, seed=0)
    torch.manual_seed(0)
    VAE(VAE_PRESETS["tiny"]).save(components)
    conditioner, vae = Conditioner.from_folder(components), VAE.from_folder(components)
    encoder = Encoder(conditioner, vae, res=64)
    encoded = tmp_path / "encoded"
    encoded.mkdir()
    encoder.write_description(encoded)
    assert encoder.encode_shard(tar, encoded / tar.name, pytest.fail, lambda n: None) == 4

    # 4. The loader: one global order; this rank's microbatches of one step.
    loader = Loader(EncodedDataset(encoded), batch_size=4, dp_rank=0, dp_size=1, seed=0, max_tokens=60)
    microbatches = next(loader)
    batch = [s for microbatch in microbatches for s in microbatch]
    assert sorted(s.key for s in batch) == [s.key for s in raw] and len(microbatches) > 1
    assert len({token_size(s.latent) for s in batch}) > 1, "aspect ratios should differ"
    prompts = {s.key: s.meta["caption"] for s in raw}
    for s in batch:
        (alone,) = conditioner.encode([prompts[s.key]])
        torch.testing.assert_close(s.txt.float(), alone, atol=0.02, rtol=0.01)  # stored as bf16

    # 5, 6. The algorithm: noise and sigma by sample key, packed without padding.
    objective, randomness = VelocityMSE(), Randomness(seed=0)
    engine = Engine(PRESETS["tiny"], EngineConfig(optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1)), total_steps=3)
    try:
        engine.initialize(seed=0)
        inputs, target = objective.prepare(batch, randomness, engine.align)
        n_target = sum(np.prod(token_size(s.latent)) for s in batch)
        assert inputs.pack.n_target == n_target and target.shape == (n_target, 64)
        assert len(inputs.img) % engine.align == 0 and len(inputs.img) - n_target < engine.align

        # 7, 8. The model and the engine: three updates on this batch lower its loss.
        losses = [engine.step(objective, microbatches, randomness)["loss"] for _ in range(3)]
        assert losses[-1] < losses[0] and np.isfinite(losses).all()

        # 9. A checkpoint, read back in one process.
        engine.save(tmp_path / "step_00000003", {"batches": loader.state_dict()})
    finally:
        loader.close()
        engine.close()
    config, weights = read_weights(tmp_path / "step_00000003", ema=False)
    model = MMDiT(config)
    model.load_state_dict(weights)
    assert json.loads((tmp_path / "step_00000003" / "state.json").read_text())["model"]["num_layers"] == 6

    # 10. Out to diffusers, which draws what our sampler draws from the same noise.
    folder = tmp_path / "export"
    write_pipeline(folder, config, weights, components)
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompt = prompts["shape-0"]
    txt, empty = conditioner.encode([prompt, " "])
    noise = torch.randn(16, 1, 8, 12, generator=torch.Generator().manual_seed(7))
    (latent,) = Sampler(FixedSchedule(4), cfg_scale=4.0).draw(model, [Request(Condition(txt, empty), noise)]).latents
    with torch.no_grad():
        ours = (vae.decode_latent(latent[None])[0, :, 0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    theirs = pipeline(
        prompt, negative_prompt=" ", true_cfg_scale=4.0, height=64, width=96, num_inference_steps=4,
        generator=torch.Generator().manual_seed(7), output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(ours - theirs).max() < 1e-4
