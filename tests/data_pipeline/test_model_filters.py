"""Filters that need a tokenizer or networks: against transformers' own forward passes, with tiny random weights."""

import io
import json
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
import transformers
from PIL import Image

from data_pipeline.curation import score
from data_pipeline.filters.table import FILTERS
from data_pipeline.filters.tools import Tools
from data_pipeline.filters.view import View
from data_pipeline.sample import RawSample
from data_pipeline.shards import read_raw, shard_name, write_raw
from data_pipeline.stages import Rule, Stage
from model.conditioner import Conditioner

CAPTIONS = ["a red circle above a blue square", "one cat", "两只猫", "a photo of " + "very " * 90 + "many things"]
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def weights(components: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, siglip/, nsfw/ and aesthetics/ as transformers' own classes save them."""
    hf = transformers
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    size, eyes = {"height": 32, "width": 32}, dict(image_size=32, patch_size=16)
    tokenizer = hf.AutoTokenizer.from_pretrained(components / "tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    words = dict(vocab_size=len(tokenizer), eos_token_id=end, bos_token_id=end, pad_token_id=0)
    clip = hf.CLIPConfig(
        text_config=TOWER | words | {"max_position_embeddings": 77}, vision_config=TOWER | eyes, projection_dim=16
    )
    siglip = hf.SiglipConfig(text_config=TOWER | words | {"max_position_embeddings": 64}, vision_config=TOWER | eyes)
    nsfw = hf.ViTConfig(**TOWER, **eyes, id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1})
    models = {
        "clip": (hf.CLIPModel(clip), hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)),
        "siglip": (hf.SiglipModel(siglip), hf.SiglipImageProcessorPil(size=size)),
        "nsfw": (hf.ViTForImageClassification(nsfw), hf.ViTImageProcessorPil(size=size)),
        "aesthetics": (
            hf.ViTForImageClassification(hf.ViTConfig(**TOWER, **eyes, num_labels=1)),
            hf.ViTImageProcessorPil(size=size),
        ),
    }
    for name, (model, processor) in models.items():
        model.eval().save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    for name, longest in (("clip", 77), ("siglip", 64)):
        tokenizer.model_max_length = longest
        tokenizer.save_pretrained(folder / name)
    return folder


def sample(i: int, **meta) -> RawSample:
    pixels = planted.crops(8, seed=5)[i]
    return RawSample(f"s{i}", planted.jpeg(pixels), "jpg", {"caption": CAPTIONS[i % 4], "source": "photo"} | meta)


def decoded(sample: RawSample) -> Image.Image:
    return Image.open(io.BytesIO(sample.image)).convert("RGB")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_alignment_is_the_cosine_of_transformers_forward(name: str, weights: Path):
    """The models' own logits are scale · cosine + bias, computed along another path than the features."""
    tools = Tools(weights=weights)
    model = transformers.AutoModel.from_pretrained(weights / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights / name)
    processor = transformers.AutoImageProcessor.from_pretrained(weights / name)
    found = []
    for i in range(4):
        one = sample(i)
        padding = "max_length" if name == "siglip" else False
        words = tokenizer([one.meta["caption"]], padding=padding, truncation=True, return_tensors="pt")
        pixels = processor(images=decoded(one), return_tensors="pt")
        with torch.no_grad():
            logit = model(**words, **pixels).logits_per_image.item()
        cosine = (logit - (model.logit_bias.item() if name == "siglip" else 0)) / model.logit_scale.exp().item()
        found.append(FILTERS[name](View(one, tools)))
        assert found[-1] == pytest.approx(cosine, abs=2e-5)
    assert len({round(x, 4) for x in found}) == 4, "scores should depend on picture and caption"
    assert FILTERS[name](View(sample(0, caption_split="recaptioned"), tools)) is None


def test_classifiers_agree_with_transformers_pipeline(weights: Path):
    tools = Tools(weights=weights)
    for name, label in (("nsfw", "nsfw"), ("aesthetics", "LABEL_0")):
        processor = transformers.AutoImageProcessor.from_pretrained(weights / name)
        judge = transformers.pipeline("image-classification", str(weights / name), image_processor=processor)
        apply = "none" if name == "aesthetics" else "softmax"
        for i in range(3):
            (wanted,) = [r["score"] for r in judge(decoded(sample(i)), function_to_apply=apply) if r["label"] == label]
            assert FILTERS[name](View(sample(i), tools)) == pytest.approx(wanted, abs=2e-5)


def test_a_classifier_without_the_label_is_refused(weights: Path, tmp_path: Path):
    folder = tmp_path / "nsfw"
    folder.mkdir()
    for file in (weights / "nsfw").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "cat", "1": "dog"}, {"cat": 0, "dog": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no label nsfw or unsafe"):
        FILTERS["nsfw"](View(sample(0), Tools(weights=tmp_path)))


def test_tokens_are_counted_as_the_conditioner_counts_them(components: Path):
    conditioner, tools = Conditioner.from_folder(components), Tools(components=components)
    ending = len(conditioner.encode([""])[0])
    for caption in [*CAPTIONS, "The sign reads “开放 OPEN”, 50 % off", "a\n\nb  c"]:
        (hidden,) = conditioner.encode([caption])
        counted = FILTERS["token_length"](View(RawSample("k", b"", "jpg", {"caption": caption}), tools))
        assert counted == len(hidden) - ending
    rule = Rule("token_length", most=20)
    lengths = [FILTERS["token_length"](View(sample(i), tools)) for i in range(4)]
    assert [rule.keeps(n) for n in lengths] == [True, True, True, False]


def test_rules_of_networks_drop_and_are_said_when_they_cannot_run(
    weights: Path, components: Path, run_entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from data_pipeline import stages

    samples = [sample(i) for i in range(6)]
    names = ("clip", "siglip", "nsfw", "aesthetics", "token_length")
    tools = Tools(components, weights)
    every = (Stage(1, "networks", tuple(Rule(name, least=-1e9) for name in names)),)
    scores = [score(s, every, tools)[0].scores for s in samples]
    assert all(s.keys() == set(names) for s in scores)
    middle = {name: float(np.median([s[name] for s in scores])) for name in names}
    monkeypatch.setitem(
        stages.RECIPES, "toy", tuple(Stage(i + 1, n, (Rule(n, most=middle[n]),)) for i, n in enumerate(names))
    )
    raw = tmp_path / "raw"
    raw.mkdir()
    write_raw(raw / shard_name(0), samples)
    flags = ("--data", raw, "--stages", "1-5", "--workers", 1, "--out")
    with_tools = run_entry(
        "data_pipeline/curate.py", *flags, tmp_path / "with", "--weights", weights, "--components", components
    )
    kept = {s.key: s.meta["scores"] for s in read_raw(tmp_path / "with" / shard_name(0))}
    wanted = [s.key for s, x in zip(samples, scores, strict=True) if all(x[n] <= middle[n] for n in names)]
    assert list(kept) == wanted and len(wanted) < 6 and "not run" not in with_tools.stdout, with_tools.stderr
    without = run_entry("data_pipeline/curate.py", *flags, tmp_path / "without")
    for name in names[:4]:
        assert f"{name}: not run: no weights" in without.stdout
    assert "token_length: not run: no tokenizer" in without.stdout and "kept 6 of 6" in without.stdout
