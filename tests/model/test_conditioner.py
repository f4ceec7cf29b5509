"""The condition encoder against diffusers' pipelines and transformers, offline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from model.conditioner import TEMPLATES, Conditioner, fit_area
from model.tiny_components import SPECIAL_TOKENS, write_tiny_components

PROMPTS = [
    "a red circle",
    " ",
    "two green stars above a photo that reads 'héllo 你好'",
    "a red circle",
    "a blue square",
]


class PilProcessor(Qwen2VLProcessor):
    """Qwen2VLProcessor without the video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        super(Qwen2VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    def check_argument_for_proper_class(self, name, argument):
        return type(argument)


@pytest.fixture(scope="module")
def parts(components: Path):
    tokenizer = Qwen2Tokenizer.from_pretrained(components / "tokenizer")
    return dict(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(components / "text_encoder"),
        vae=None,
        transformer=None,
        scheduler=None,
    ), PilProcessor(Qwen2VLImageProcessorPil(), tokenizer)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_template_prefixes_are_exactly_what_is_dropped(components):
    tokenizer = Conditioner.from_folder(components).tokenizer
    for template in TEMPLATES.values():
        prefix = template.text.split("{}")[0]
        assert len(tokenizer(prefix).input_ids) == template.drop
    ids = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    assert ids == list(range(ids[0], ids[0] + 14))  # in the real tokenizer's order


def test_text_equals_the_pipeline(components, parts):
    pipe = QwenImagePipeline(**parts[0])
    embeds, mask = pipe.encode_prompt(PROMPTS, device="cpu")
    ours = Conditioner.from_folder(components).encode(PROMPTS)
    for mine, theirs, valid in zip(ours, embeds, mask.bool(), strict=True):
        torch.testing.assert_close(mine, theirs[valid], rtol=0, atol=1e-5)


def test_long_prompts_are_cut_as_in_the_pipeline(components, parts):
    prompt = "a red circle " * 600
    embeds, _ = QwenImagePipeline(**parts[0]).encode_prompt([prompt], device="cpu", max_sequence_length=512)
    (ours,) = Conditioner.from_folder(components, max_length=512).encode([prompt])
    assert ours.shape == (512, 128)
    torch.testing.assert_close(ours, embeds[0], rtol=0, atol=1e-5)


def test_edit_equals_the_pipeline(components, parts):
    pipe = QwenImageEditPipeline(processor=parts[1], **parts[0])
    image = picture(150, 100)
    shown = pipe.image_processor.resize(image, *reversed(fit_area(150, 100, 1024 * 1024)))
    embeds, _ = pipe.encode_prompt(["make the sky green"], image=shown, device="cpu")
    conditioner = Conditioner.from_folder(components, edit_template="edit", mrope=False)
    (ours,) = conditioner.encode(["make the sky green"], [[image]])
    torch.testing.assert_close(ours, embeds[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="takes one picture, got 2"):
        conditioner.encode(["a"], [[image, image]])


def test_edit_plus_equals_the_pipeline(components, parts):
    pipe = QwenImageEditPlusPipeline(processor=parts[1], **parts[0])
    images = [picture(150, 100), picture(70, 200, 1)]
    shown = [pipe.image_processor.resize(i, *reversed(fit_area(*i.size, 384 * 384))) for i in images]
    embeds, _ = pipe.encode_prompt(["make the sky green"], image=shown, device="cpu")
    (ours,) = Conditioner.from_folder(components, mrope=False).encode(["make the sky green"], [images])
    torch.testing.assert_close(ours, embeds[0], rtol=0, atol=1e-5)


def test_pictures_get_three_axis_positions_by_default(components, parts):
    """With mm_token_type_ids, as transformers' own processor gives them; without, positions differ."""
    model, processor = parts[0]["text_encoder"], parts[1]
    image = picture(384, 384)
    text = TEMPLATES["edit_plus"].text.format(TEMPLATES["edit_plus"].picture.format(1) + "green")
    batch = processor(text=[text], images=[image], return_tensors="pt", return_mm_token_type_ids=True)
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state[0, 64:]
    (ours,) = Conditioner.from_folder(components).encode(["green"], [[image]])
    (flat,) = Conditioner.from_folder(components, mrope=False).encode(["green"], [[image]])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert (ours - flat).abs().max() > 1e-3


def test_results_do_not_depend_on_the_batch(components):
    conditioner = Conditioner.from_folder(components, batch_tokens=100)
    images = [[], [], [picture(64, 64)], [], []]
    for prompt, image, together in zip(PROMPTS, images, conditioner.encode(PROMPTS, images), strict=True):
        torch.testing.assert_close(conditioner.encode([prompt], [image])[0], together, rtol=0, atol=1e-5)
    assert len(conditioner.encode(PROMPTS, images)[2]) > len(conditioner.encode(PROMPTS)[2])


def test_tiny_components_are_a_function_of_the_seed(components, tmp_path):
    write_tiny_components(tmp_path, seed=0)
    for file in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        assert file.read_bytes() == (components / file.relative_to(tmp_path)).read_bytes(), file
    first = Conditioner.from_folder(tmp_path).fingerprint()
    assert first == Conditioner.from_folder(components).fingerprint()
    write_tiny_components(tmp_path, seed=1)
    second = Conditioner.from_folder(tmp_path).fingerprint()
    assert first[0] != second[0] and first[1] == second[1]
    assert Conditioner.from_folder(tmp_path, max_length=512).fingerprint()[1] != second[1]


def test_bad_input_is_named(components, tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer/"):
        Conditioner.from_folder(tmp_path)
    conditioner = Conditioner.from_folder(components)
    with pytest.raises(ValueError, match="must not contain <|image_pad|>"):
        conditioner.encode(["a <|image_pad|>"])
    with pytest.raises(ValueError, match="1 prompts, but pictures for 2"):
        conditioner.encode(["a"], [[], []])
