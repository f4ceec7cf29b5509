"""CLIP-like measures, GenEval's detector, FID and KID, with tiny random weights of the real classes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import linalg
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from command_line import UserError
from evaluation import geneval_detector
from evaluation.distribution import distances
from evaluation.geneval_detector import GenEvalDetector
from evaluation.picture_measures import PictureMeasures, PictureWeights
from evaluation.prompts import Prompt
from evaluation.scoring import score


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    end = words.index("<|endoftext|>")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(words),
        "max_position_embeddings": 20,
        "eos_token_id": end,
        "bos_token_id": end - 1,
    }
    vision = {**tower, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        id2label={0: "cat", 1: "mouse", 2: "dog"},
        label2id={"cat": 0, "mouse": 1, "dog": 2},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (40, 48, 3), np.uint8) for _ in range(n)]


def test_scores_are_those_of_the_model_itself(clip, tmp_path):
    head = {"layers.0.weight": torch.randn(8, 16), "layers.0.bias": torch.randn(8)}
    head |= {"layers.2.weight": torch.randn(1, 8), "layers.2.bias": torch.randn(1)}
    save_file(head, tmp_path / "head.safetensors")
    measures = PictureMeasures(PictureWeights(clip, pickscore=clip, aesthetic=tmp_path / "head.safetensors"), "cpu")
    images = pictures(20)
    prompts = [Prompt(str(i), "a cat on a mat" if i % 2 else "dog", "", {}) for i in range(20)]
    rows = measures.score(images, prompts)
    assert set(rows) == {"clip", "pickscore", "aesthetic"} and set(measures.absent) == {"siglip"}
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=[prompts[3].text], images=[images[3]], return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model(**inputs)
    assert rows["pickscore"][3] == pytest.approx(outputs.logits_per_image.item(), rel=1e-4)
    cosine = outputs.logits_per_image.item() / model.logit_scale.exp().item()
    assert rows["clip"][3] == pytest.approx(100 * max(cosine, 0), rel=1e-4, abs=1e-4)
    embedding = outputs.image_embeds[0]
    hidden = head["layers.0.weight"] @ embedding + head["layers.0.bias"]
    expected = head["layers.2.weight"] @ hidden + head["layers.2.bias"]
    assert rows["aesthetic"][3] == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def test_missing_weights_are_reasons_and_wrong_ones_errors(clip, mask2former, tmp_path):
    nothing = PictureMeasures(PictureWeights(), "cpu")
    assert nothing.score(pictures(1), [Prompt("0", "x", "", {})]) == {}
    assert set(nothing.absent) == {"clip", "siglip", "pickscore", "aesthetic"}
    with pytest.raises(UserError, match="no weights at"):
        PictureMeasures(PictureWeights(tmp_path / "none"), "cpu")
    with pytest.raises(UserError, match="needs the embeddings"):
        PictureMeasures(PictureWeights(aesthetic=clip / "vocab.json"), "cpu")
    with pytest.raises(UserError, match="no CLIP-like model|embeds no pictures"):
        PictureMeasures(PictureWeights(mask2former), "cpu")


def test_detector_finds_segments_and_names_colours(clip, mask2former, monkeypatch):
    monkeypatch.setattr(geneval_detector, "THRESHOLD", 0.0)
    detector = GenEvalDetector(mask2former, clip, "cpu")
    image = pictures(1)[0]
    metadata = {"tag": "colors", "include": [{"class": "computer mouse", "count": 1, "color": "red"}]}
    (objects,) = detector([image], [metadata])
    assert objects and set(objects) <= {"cat", "computer mouse", "dog"}
    for name, found in objects.items():
        confidences = [f.confidence for f in found]
        assert confidences == sorted(confidences, reverse=True)
        for f in found:
            assert 0 <= f.box[0] < f.box[2] <= 48 and 0 <= f.box[1] < f.box[3] <= 40
            assert (f.color in geneval_detector.COLORS) == (name == "computer mouse")
    score(metadata, objects)
    (counted,) = detector([image], [{"tag": "counting", "include": [{"class": "cat", "count": 1}]}])
    assert counted == {}
    with pytest.raises(UserError, match="no Mask2Former"):
        GenEvalDetector(clip / "nowhere", clip, "cpu")


def test_colour_is_the_nearest_mean_of_templates(clip, mask2former):
    detector = GenEvalDetector(mask2former, clip, "cpu")
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    image = pictures(1)[0]
    best, chosen = -2.0, None
    with torch.no_grad():
        pixels = processor(images=[image], return_tensors="pt")
        picture = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
        for color in geneval_detector.COLORS:
            texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"]
            tokens = processor(text=texts, return_tensors="pt", padding="max_length", truncation=True, max_length=20)
            vectors = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            value = torch.nn.functional.cosine_similarity(picture, vectors.mean(0, keepdim=True)).item()
            best, chosen = max((best, chosen), (value, color))
    assert detector.name_colors([image], "cup") == [chosen]


class FakeInception(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool) -> torch.Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return torch.cat([small, torch.zeros(small.shape[0], 2048 - 48)], 1)


def test_fid_and_kid_are_those_of_the_features(tmp_path):
    pytest.importorskip("torchmetrics")
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception.pt"))
    rng = np.random.default_rng(0)
    real = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(80)]
    drawn = [rng.integers(60, 256, (16, 16, 3), np.uint8) for _ in range(70)]
    found = distances(drawn, real, tmp_path / "inception.pt", "cpu")

    net = FakeInception()
    a, b = (
        net(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2), True)[:, :48].double().numpy() for x in (real, drawn)
    )
    covariances = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found["fid"]["value"] == pytest.approx(expected, rel=1e-3) and found["fid"]["n"] == 70
    assert found["kid"]["low"] < found["kid"]["value"] < found["kid"]["high"]
    same = distances(real[:40], real[40:], tmp_path / "inception.pt", "cpu")
    assert same["kid"]["value"] < found["kid"]["value"] / 5


def test_the_interval_of_kid_is_as_wide_as_it_scatters(tmp_path):
    pytest.importorskip("torchmetrics")
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception.pt"))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(16):
        real = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(40)]
        drawn = [rng.integers(100, 256, (8, 8, 3), np.uint8) for _ in range(40)]
        found.append(distances(drawn, real, tmp_path / "inception.pt", "cpu")["kid"])
    scatter = np.std([f["value"] for f in found], ddof=1)
    told = np.mean([(f["high"] - f["low"]) / 2 / 1.96 for f in found])
    assert 0.6 < told / scatter < 1.7


def test_fid_says_what_is_missing(tmp_path):
    pytest.importorskip("torchmetrics")
    with pytest.raises(UserError, match="no Inception network"):
        distances([], [], tmp_path / "x.pt", "cpu")
    (tmp_path / "x.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no TorchScript"):
        distances([], [], tmp_path / "x.pt", "cpu")
    torch.jit.script(FakeInception()).save(str(tmp_path / "x.pt"))
    with pytest.raises(UserError, match="four pictures"):
        distances(pictures(1), pictures(3), tmp_path / "x.pt", "cpu")
