"""Scores of single pictures by public models, from local folders in transformers' layout: CLIP and its relatives.

Nothing is downloaded; a measure whose weights were not given is left out, with the reason.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from command_line import UserError
from evaluation.prompts import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BATCH = 16


@dataclass(frozen=True)
class PictureWeights:
    """Folders of models that score single pictures; those left out are not run."""

    clip: Path | None = None
    """CLIP (CVTG-2K and others: openai/clip-vit-large-patch14): 100 x cosine of picture and prompt, at least 0."""
    siglip: Path | None = None
    """SigLIP: the same."""
    pickscore: Path | None = None
    """PickScore_v1, with the processor's files of laion/CLIP-ViT-H-14: its scale x cosine (about 20 to 23)."""
    aesthetic: Path | None = None
    """LAION's aesthetic head as safetensors file: affine layers on ViT-L/14 embeddings, which `clip` must then be."""


class PictureMeasures:
    """All the measures that were given. Raises UserError for a folder that holds no such model."""

    def __init__(self, weights: PictureWeights, device: "torch.device | str"):
        self.device = device
        given = {f.name: Path(v) for f in fields(weights) if (v := getattr(weights, f.name)) is not None}
        self.absent = {f.name: f"no weights (--pictures.{f.name})" for f in fields(weights) if f.name not in given}
        if missing := [str(path) for path in given.values() if not path.exists()]:
            raise UserError(f"no weights at {', '.join(missing)}")
        if "aesthetic" in given and "clip" not in given:
            raise UserError("the aesthetic head needs the embeddings of --pictures.clip (ViT-L/14)")
        self._head = _read_layers(given["aesthetic"], device) if "aesthetic" in given else None
        self._models = {name: TwoTowers(path, device) for name, path in given.items() if name != "aesthetic"}
        self.fingerprint = json.dumps({name: file_stamp(path) for name, path in sorted(given.items())})

    def score(self, images: list[np.ndarray], prompts: list[Prompt]) -> dict[str, list[float]]:
        """{measure: number of each uint8 [h, w, 3] picture}."""
        rows: dict[str, list[float]] = {}
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            for name, values in self._score_batch(images[part], [p.text for p in prompts[part]]).items():
                rows.setdefault(name, []).extend(values)
        return rows

    def _score_batch(self, images: list[np.ndarray], texts: list[str]) -> dict[str, list[float]]:
        found = {}
        for name, model in self._models.items():
            pictures = model.embed_images(images)
            cosine = (pictures * model.embed_texts(texts)).sum(-1)
            found[name] = (model.scale * cosine if name == "pickscore" else 100 * cosine.clamp(min=0)).tolist()
            if name == "clip" and self._head is not None:
                value = pictures
                for weight, bias in self._head:
                    value = value @ weight.T + bias
                found["aesthetic"] = value[:, 0].tolist()
        return found


class TwoTowers:
    """A CLIP-like model: unit embeddings of pictures and texts."""

    def __init__(self, folder: Path, device: "torch.device | str"):
        from transformers import AutoModel, AutoProcessor

        try:
            self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no CLIP-like model with its processor ({error})") from None
        if not hasattr(self.model, "get_image_features"):
            raise UserError(f"{folder} holds a {type(self.model).__name__}, which embeds no pictures and texts")
        self.device, self.scale = device, self.model.logit_scale.exp().item()

    def embed_images(self, images: list[np.ndarray]) -> "Tensor":
        """[B, D], length 1."""
        return self._embed(self.model.get_image_features, images=list(images))

    def embed_texts(self, texts: list[str]) -> "Tensor":
        """[B, D], length 1; texts are cut at the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        return self._embed(
            self.model.get_text_features, text=texts, padding="max_length", truncation=True, max_length=length
        )

    def _embed(self, features, **inputs) -> "Tensor":
        import torch

        with torch.no_grad():
            found = features(**self.processor(**inputs, return_tensors="pt").to(self.device))
        found = getattr(found, "pooler_output", found).float()
        return found / found.norm(dim=-1, keepdim=True)


def _read_layers(file: Path, device: "torch.device | str") -> "list[tuple[Tensor, Tensor]]":
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a safetensors file; convert it with safetensors.torch.save_file")
    tensors = load_file(file, device=str(device))
    names = [name.removesuffix("weight") for name in tensors if name.endswith("weight")]
    order = sorted(names, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    return [(tensors[f"{n}weight"].float(), tensors[f"{n}bias"].float()) for n in order]


def file_stamp(path: Path) -> list:
    """Names and sizes of a model's files: what is needed to know it again."""
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())
    return [[p.name, p.stat().st_size] for p in files]
