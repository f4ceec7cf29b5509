"""The shipped base: whole, small, and it draws what it is asked for."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command_line import UserError
from demo import line, report
from demo.components import Config, main
from evaluation.suites import ShapesSuite
from model.conditioner import Conditioner
from model.sampling.draw import Sampler
from model.sampling.schedule import FixedSchedule
from training.loading import load
from training.source import BASE
from vae.autoencoder import VAE


def test_it_is_small_and_draws_what_it_is_asked_for():
    assert sum(p.stat().st_size for p in BASE.rglob("*") if p.is_file()) < 20e6
    suite = ShapesSuite("validation")
    singles = [p for p in suite.prompts if p.stratum in ("single_object", "colors")]
    painter = load(BASE, sampler=Sampler(FixedSchedule(12), cfg_scale=2.5))
    pictures = painter.generate([p.text for p in singles], [(64, 64)] * len(singles), list(range(len(singles))))
    assert np.mean(suite.score(pictures, singles)["strict"]) >= 0.6
    others = singles[1:] + singles[:1]
    assert np.mean(suite.score(pictures, others)["strict"]) <= 0.2


@pytest.mark.parametrize("side", [64, 96])
def test_true_pictures_survive_the_vae(side: int):
    suite, vae = ShapesSuite("validation"), VAE.from_folder(BASE)
    prompts = suite.prompts[:: len(suite.prompts) // 50]
    true = np.stack([suite.truth(p, (side, side)) for p in prompts])
    x = torch.from_numpy(true).permute(0, 3, 1, 2).float()[:, :, None] / 127.5 - 1
    with torch.no_grad():
        y = torch.cat([vae.decode_latent(vae.encode_latent(part)) for part in x.split(10)]).clamp(-1, 1)
    decoded = list(((y[:, :, 0].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy())
    assert np.mean(suite.score(decoded, prompts)["strict"]) >= 0.94


def test_a_copy_is_stored_in_one_type(tmp_path):
    """Else diffusers would load parts of a pipeline in different types; a copy of the copy is the same once more."""
    main(Config(copy=BASE, out=tmp_path / "first"))
    main(Config(copy=tmp_path / "first", out=tmp_path / "components"))
    for path in (tmp_path / "components").rglob("*.safetensors"):
        assert {str(w.dtype) for w in load_file(path).values()} == {"torch.float32"}, path
    (theirs,) = Conditioner.from_folder(BASE).encode(["a red star"])
    (copied,) = Conditioner.from_folder(tmp_path / "components").encode(["a red star"])
    assert torch.equal(theirs, copied)
    config = json.loads((tmp_path / "components/text_encoder/config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float32"


def test_nothing_but_components_is_replaced(tmp_path):
    run, parts = tmp_path / "run", tmp_path / "parts"
    for folder in (run / "checkpoints", *(parts / part for part in ("vae", "tokenizer", "text_encoder"))):
        folder.mkdir(parents=True)
    for out, holds in ((run, "checkpoints"), (parts, "what --copy names")):
        with pytest.raises(UserError, match=f"holds {holds}, which this would delete"):
            main(Config(copy=parts, out=out))
    assert (run / "checkpoints").is_dir() and len(list(parts.iterdir())) == 3


def test_half_a_folder_is_refused_and_base_takes_no_data(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match="no tokenizer and no text_encoder"):
        main(Config(copy=tmp_path, out=tmp_path / "out"))
    with pytest.raises(UserError, match="draws its own pictures"):
        line.main(line.Config("base", data=tmp_path, dry_run=True))


def test_its_card_names_the_pictures_that_pages_show():
    card = (BASE / "README.md").read_text()
    for _, address, sha256 in report.base_sheets():
        assert sha256 in card and address.startswith("data:image/png;base64,")
