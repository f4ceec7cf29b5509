"""Qwen2.5-VL through transformers in this process: questions about pictures, answered in words."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""The model's own chat template."""


@dataclass(frozen=True)
class LocalConfig:
    """A model that answers in this process."""

    folder: Path | None = None
    """Qwen2.5-VL as transformers saves it, or a components folder, whose text encoder is one."""
    max_tokens: int = 1024
    """Longest answer."""
    timeout_s: float = 300.0
    """After so many seconds an answer is cut."""


class LocalVLM:
    """Answers greedily, on this process's GPU (in bf16) or on the CPU. ValueError if the folder holds no such model."""

    def __init__(self, config: LocalConfig):
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = config.folder
        parts = [folder / p if (folder / p).is_dir() else folder for p in ("text_encoder", "tokenizer", "processor")]
        if not (parts[0] / "config.json").is_file():
            raise ValueError(f"{folder} holds no Qwen2.5-VL: neither config.json nor text_encoder/config.json")
        cuda = torch.cuda.is_available()
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
        dtype = torch.bfloat16 if cuda else torch.float32
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(parts[0], dtype=dtype).to(device).eval()
        self.tokenizer = Qwen2Tokenizer.from_pretrained(parts[1])
        has_processor = (parts[2] / "preprocessor_config.json").is_file()
        self.processor: Any = (
            Qwen2VLImageProcessorPil.from_pretrained(parts[2]) if has_processor else Qwen2VLImageProcessorPil()
        )
        self.config = config
        weights = sorted(parts[0].glob("*.safetensors"))
        self.fingerprint = f"{folder.resolve()} {[(p.name, p.stat().st_size) for p in weights]}, {config.max_tokens}"

    def ask(self, question: str, images: list[np.ndarray]) -> str:
        """The answer to a question about pictures uint8 [h, w, 3], as far as it goes within the limits."""
        import torch

        pixels = self.processor(images=images, return_tensors="pt")
        counts = (pixels["image_grid_thw"].prod(dim=1) // self.processor.merge_size**2).tolist()
        pictures = "".join(PICTURE.replace("<|image_pad|>", "<|image_pad|>" * n) for n in counts)
        prompt = CHAT.format(pictures + question.replace("<|", "< |"))  # a caption must not spell special tokens
        inputs = self.tokenizer(prompt, return_tensors="pt")
        is_picture = (inputs.input_ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        given = {**inputs, **pixels, "mm_token_type_ids": is_picture}
        with torch.no_grad():
            ids = self.model.generate(
                **{name: tensor.to(self.model.device) for name, tensor in given.items()},
                max_new_tokens=self.config.max_tokens,
                max_time=self.config.timeout_s,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        return self.tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
