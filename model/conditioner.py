"""The condition encoder: Qwen2.5-VL's last hidden states of a templated prompt (Qwen-Image report, section 2.2).

Templates are those of diffusers' QwenImagePipeline (`text`), QwenImageEditPipeline (`edit`) and
QwenImageEditPlusPipeline (`edit_plus`); the first `drop` tokens, the system prompt, are left out of the result.
Shape legend: L tokens of a prompt (its pictures' included), D width of the text encoder.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import cpu_math  # noqa: F401

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_PAD = "<|image_pad|>"
_PICTURE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
_CHAT = "<|im_start|>system\n%s<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)


@dataclass(frozen=True)
class Template:
    """How a prompt is worded for the text encoder."""

    text: str
    drop: int
    """Leading tokens that are not part of the condition."""
    picture: str = ""
    """What stands for the i-th picture, before the prompt."""
    area: int = 0
    """Pixels that a picture is resized to before the text encoder sees it."""


TEMPLATES = {
    "text": Template(_CHAT % DESCRIBE, drop=34),
    "edit": Template(_CHAT % EDIT, drop=64, picture=_PICTURE, area=1024 * 1024),
    "edit_plus": Template(_CHAT % EDIT, drop=64, picture="Picture {}: " + _PICTURE, area=384 * 384),
}


REFERENCE_SIDE_PX = 1024
"""Side of the square whose area pictures to edit have at most before the VAE sees them, as in the edit pipelines."""


def fit_area(width: int, height: int, area: int) -> tuple[int, int]:
    """(width, height) of about `area` pixels with this aspect ratio, both multiples of 32 as in the edit pipelines."""
    ratio = width / height
    w = math.sqrt(area * ratio)
    return max(32, round(w / 32) * 32), max(32, round(w / ratio / 32) * 32)


class Conditioner:
    """Prompts, with or without pictures, to hidden states. Build it with `Conditioner.from_folder`."""

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: torch.nn.Module,
        image_processor: Any,
        edit_template: Literal["edit", "edit_plus"] = "edit_plus",
        max_length: int = 1024,
        mrope: bool = True,
        batch_tokens: int = 16384,
        picture_area: int | None = None,
    ):
        """`text_encoder` is a transformers Qwen2_5_VLModel (no LM head).

        Prompts are cut to `max_length` tokens, pictures' tokens not counted. `mrope` gives picture tokens their 3-D
        positions; diffusers' edit pipelines leave them 1-D under transformers 5 (its issue 14194), which `mrope=False`
        reproduces. Prompts run together, at most `batch_tokens` tokens at once. `picture_area` replaces
        the pixels that the template resizes pictures to.
        """
        self.tokenizer, self.text_encoder, self.image_processor = tokenizer, text_encoder.eval(), image_processor
        self.edit_template, self.max_length, self.mrope = edit_template, max_length, mrope
        self.batch_tokens = batch_tokens
        self.picture_area = picture_area or TEMPLATES[edit_template].area

    @classmethod
    def from_folder(
        cls, components: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **settings
    ) -> "Conditioner":
        """Load `tokenizer/`, `text_encoder/` and, if there, `processor/` of a diffusers folder.

        `settings` are those of `Conditioner`; the edit template is by default the one of the folder's pipeline. Raises
        ValueError if a part is missing.
        """
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = Path(components)
        for part in ("tokenizer", "text_encoder"):
            if not (folder / part).is_dir():
                raise ValueError(f"{folder} has no {part}/; give a diffusers folder or write_tiny_components' folder")
        tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype).model
        processor = Qwen2VLImageProcessorPil()
        if (folder / "processor" / "preprocessor_config.json").is_file():
            processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
        index = folder / "model_index.json"
        pipeline = json.loads(index.read_text())["_class_name"] if index.is_file() else ""
        settings = {"edit_template": "edit" if pipeline == "QwenImageEditPipeline" else "edit_plus"} | settings
        return cls(tokenizer, model.to(device), processor, **settings)

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device

    @torch.no_grad()
    def encode(self, prompts: list[str], images: "list[list[Image]] | None" = None) -> list[Tensor]:
        """Hidden states [L_i, D] of each prompt, unpadded; `images` gives each prompt's pictures, of any size.

        A prompt without pictures uses the text-to-image template. A result depends on its own prompt alone. Raises
        ValueError for a prompt that spells a picture's placeholder, and for hidden states that are not finite.
        """
        images = images or [[] for _ in prompts]
        if len(images) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but pictures for {len(images)}")
        out: list[Tensor | None] = [None] * len(prompts)
        texts: dict[tuple[int, ...], list[int]] = {}
        for i, (prompt, pictures) in enumerate(zip(prompts, images, strict=True)):
            self.require(prompt, len(pictures))
            if pictures:
                out[i] = self._encode_with_pictures(prompt, pictures)
            else:
                texts.setdefault(self._tokenize(TEMPLATES["text"], prompt), []).append(i)
        for ids, hidden in self._encode_texts(sorted(texts, key=len)):
            for i in texts[ids]:
                out[i] = hidden
        for prompt, hidden in zip(prompts, out, strict=True):
            if not hidden.isfinite().all():
                raise ValueError(f"the text encoder gives NaN or infinite values for {prompt!r}: its weights are bad")
        return out

    def require(self, prompt: str, pictures: int) -> None:
        """ValueError if a prompt with so many pictures cannot be encoded."""
        if IMAGE_PAD in prompt:
            raise ValueError(f"a prompt must not contain {IMAGE_PAD}: {prompt!r}")
        if self.edit_template == "edit" and pictures > 1:
            raise ValueError(f"the edit template takes one picture, got {pictures}; use edit_plus")

    def _tokenize(self, template: Template, prompt: str, pictures: str = "", extra: int = 0) -> tuple[int, ...]:
        limit = template.drop + self.max_length + extra
        return tuple(self.tokenizer(template.text.format(pictures + prompt)).input_ids[:limit])

    def _encode_texts(self, token_lists: list[tuple[int, ...]]):
        """Yield (ids, hidden states) for lists of token ids sorted by length.

        Shorter prompts are padded on the right: attention is causal, so no token sees what stands behind it.
        """
        drop, start = TEMPLATES["text"].drop, 0
        while start < len(token_lists):
            stop = start + 1
            while stop < len(token_lists) and (stop + 1 - start) * len(token_lists[stop]) <= self.batch_tokens:
                stop += 1
            batch, start = token_lists[start:stop], stop
            length, pad = len(batch[-1]), self.tokenizer.pad_token_id
            ids = torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in batch], device=self.device)
            hidden = self.text_encoder(input_ids=ids, use_cache=False).last_hidden_state
            yield from ((ids, states[drop : len(ids)].clone()) for ids, states in zip(batch, hidden, strict=True))

    def _encode_with_pictures(self, prompt: str, pictures: "list[Image]") -> Tensor:
        from PIL.Image import Resampling

        template = TEMPLATES[self.edit_template]
        resized = [p.convert("RGB").resize(fit_area(*p.size, self.picture_area), Resampling.LANCZOS) for p in pictures]
        pixels = self.image_processor(images=resized, return_tensors="pt")
        grid = pixels["image_grid_thw"]
        counts = (grid.prod(dim=1) // self.image_processor.merge_size**2).tolist()
        worded = "".join(template.picture.format(i + 1).replace(IMAGE_PAD, IMAGE_PAD * n) for i, n in enumerate(counts))
        overhead = len(self.tokenizer(worded).input_ids)
        ids = torch.tensor([self._tokenize(template, prompt, worded, extra=overhead)], device=self.device)
        is_picture = (ids == self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)).int()
        return (
            self.text_encoder(
                input_ids=ids,
                pixel_values=pixels["pixel_values"].to(self.device),
                image_grid_thw=grid.to(self.device),
                mm_token_type_ids=is_picture if self.mrope else None,
                use_cache=False,
            )
            .last_hidden_state[0, template.drop :]
            .clone()
        )

    def fingerprint(self) -> tuple[str, str]:
        """Hashes of (the text encoder's config and weights, the templates with tokenizer and settings).

        Weights count as bf16, as which hidden states are kept, whatever they are stored or run in.
        """
        encoder = hashlib.blake2b(digest_size=16)
        encoder.update(
            json.dumps(_architecture(self.text_encoder.config.to_dict()), sort_keys=True, default=str).encode()
        )
        for name, tensor in sorted(self.text_encoder.state_dict().items()):
            encoder.update(f"{name}{tuple(tensor.shape)}".encode())
            encoder.update(tensor.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy().data)
        template = hashlib.blake2b(digest_size=16)
        template.update(json.dumps({name: asdict(t) for name, t in TEMPLATES.items()}, sort_keys=True).encode())
        template.update(f"{self.edit_template} {self.max_length} {self.mrope} {self.picture_area}".encode())
        template.update(self.tokenizer.backend_tokenizer.to_str().encode())
        return encoder.hexdigest(), template.hexdigest()


def _architecture(config: dict) -> dict:
    """The config without what says who wrote it and when."""
    noise = {"transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path", "use_cache"}
    return {k: _architecture(v) if isinstance(v, dict) else v for k, v in config.items() if k not in noise}
