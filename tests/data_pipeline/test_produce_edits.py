"""Edit pairs through produce.py: their references are encoded too, and they train."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.dataset import EncodedDataset
from data_pipeline.encoding import Encoder
from data_pipeline.loader import Loader
from data_pipeline.pictures import fit
from data_pipeline.sample import RawSample
from data_pipeline.shards import read_encoded, read_raw, shard_name, write_raw
from data_pipeline.synthesis.kinds import Recipe
from model.conditioner import Conditioner
from model.config import PRESETS
from model.text_to_image import TextToImage
from training.engine.config import EngineConfig, OptimizerConfig
from training.engine.step import Engine
from training.flow_matching import VelocityMSE
from training.randomness import Randomness
from vae.autoencoder import VAE

PICTURE_AREA = 96 * 96
"""Small, so that the text encoder is quick."""


@pytest.fixture(scope="module")
def encoder(components: Path) -> Encoder:
    conditioner = Conditioner.from_folder(components, picture_area=PICTURE_AREA)
    return Encoder(conditioner, VAE.from_folder(components), res=64, batch_size=4)


@pytest.fixture(scope="module")
def edits() -> list[RawSample]:
    recipe = Recipe((("edit", 1.0),), size=64, seed=1)
    return [recipe.make(i) for i in range(3)]


def encode(encoder: Encoder, samples: list[RawSample], folder: Path) -> list:
    folder.mkdir()
    write_raw(folder / "raw.tar", samples)
    assert encoder.encode_shard(folder / "raw.tar", folder / shard_name(0), pytest.fail, lambda n: None) == len(samples)
    (folder / "raw.tar").unlink()
    return list(read_encoded(folder / shard_name(0)))


def test_references_and_instruction_are_encoded_as_the_sampler_does(edits: list, encoder: Encoder, tmp_path: Path):
    found = {s.key: s for s in encode(encoder, edits, tmp_path / "encoded")}
    maker = TextToImage(None, encoder.conditioner, encoder.vae, reference_area=64 * 64)
    for raw in edits:
        before = Image.open(io.BytesIO(raw.references[0]))
        (wanted,) = maker.encode([raw.meta["caption"]], [[before]])
        sample = found[raw.key]
        torch.testing.assert_close(sample.txt.float(), wanted.txt, atol=0.02, rtol=0.02)
        torch.testing.assert_close(sample.txt_empty.float(), wanted.txt_empty, atol=0.02, rtol=0.02)
        assert len(sample.references) == 1 and sample.references[0].shape == sample.latent.shape
        if fit(before, 64)[0].shape == (64, 64, 3):
            torch.testing.assert_close(sample.references[0], wanted.references[0], atol=1e-5, rtol=1e-5)
        assert not torch.equal(sample.references[0], sample.latent)
        assert sample.meta["edit"] == raw.meta["edit"]
    (without,) = encoder.conditioner.encode([edits[0].meta["caption"]])
    assert len(without) < len(found[edits[0].key].txt), "the instruction should be encoded with its picture"


def test_a_reference_is_cut_as_its_result_is(edits: list, encoder: Encoder, tmp_path: Path):
    """A wide pair is cut at the same places, so that what an edit leaves alone stays in place."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 110, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    same = replace(edits[0], image=file.getvalue(), references=[file.getvalue()] * 2)
    (sample,) = encode(encoder, [same], tmp_path / "encoded")
    assert len(sample.references) == 2
    for reference in sample.references:
        torch.testing.assert_close(reference, sample.latent, atol=1e-5, rtol=1e-5)


def test_other_samples_are_as_they_would_be_without_edits(edits: list, encoder: Encoder, make_raw, tmp_path: Path):
    plain = make_raw(5)
    mixed = {s.key: s for s in encode(encoder, [plain[0], *edits, *plain[1:]], tmp_path / "mixed")}
    for sample in encode(encoder, plain, tmp_path / "plain"):
        torch.testing.assert_close(mixed[sample.key].latent, sample.latent, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed[sample.key].txt, sample.txt, atol=2e-2, rtol=2e-2)
        assert not sample.references and sample.txt_empty is None and not mixed[sample.key].references


def test_a_broken_reference_leaves_its_sample_out(edits: list, encoder: Encoder, tmp_path: Path):
    broken = replace(edits[0], references=[edits[0].references[0][:100]])
    write_raw(tmp_path / "raw.tar", [broken, edits[1]])
    problems = []
    assert encoder.encode_shard(tmp_path / "raw.tar", tmp_path / "out.tar", problems.append, lambda n: None) == 1
    assert [(p.key, p.what[:27]) for p in problems] == [(broken.key, "its reference 0 cannot be d")]


def test_the_line_from_synthesis_over_curation_trains(
    run_entry, components: Path, encoder: Encoder, make_raw, tmp_path: Path
):
    raw, curated, out = (tmp_path / name for name in ("raw", "curated", "encoded"))
    flags = ("--kinds", "edit,shapes", "--count", 6, "--size", 64, "--workers", 1, "--out", raw)
    assert run_entry("data_pipeline/synthesize.py", *flags).returncode == 0
    done = run_entry("data_pipeline/curate.py", "--data", raw, "--stages", "3", "--workers", 1, "--out", curated)
    assert done.returncode == 0 and "kept 6 of 6" in done.stdout, done.stderr
    there, kept = ({s.key: s for s in read_raw(f / shard_name(0))} for f in (raw, curated))
    assert all((s.references, s.mask) == (there[key].references, there[key].mask) for key, s in kept.items())

    out.mkdir()
    encoder.write_description(out)
    encoder.encode_shard(curated / shard_name(0), out / shard_name(0), pytest.fail, lambda n: None)
    dataset = EncodedDataset(out)
    loader = Loader(dataset, batch_size=6)
    microbatches = next(loader)
    batch = [s for group in microbatches for s in group]
    assert sum(len(s.references) for s in batch) == 3 and all(s.txt_empty is not None for s in batch)
    engine = Engine(PRESETS["tiny"], EngineConfig(optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1)), total_steps=3)
    try:
        engine.initialize(seed=0)
        objective = VelocityMSE(condition_dropout=0.5)
        inputs, _ = objective.prepare(batch, Randomness(seed=0), engine.align)
        references = sum(r[0].numel() // 4 for s in batch for r in s.references)
        assert inputs.pack.n_target + references <= len(inputs.img)
        losses = [engine.step(objective, microbatches, Randomness(seed=0))["loss"] for _ in range(3)]
        assert losses[-1] < losses[0] and np.isfinite(losses).all()
    finally:
        loader.close()
        engine.close()
        dataset.close()
