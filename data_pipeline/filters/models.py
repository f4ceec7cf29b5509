"""Filters by pretrained networks, read from local transformers folders: alignment, safety, aesthetics."""

from functools import cache
from pathlib import Path
from typing import Any

from data_pipeline.filters.description import sample_filter
from data_pipeline.filters.record import caption_split
from data_pipeline.filters.view import View


@sample_filter(keeps="at least", title="cosine of CLIP's picture and caption", needs="clip")
def clip(view: View) -> float | None:
    """Cosine of CLIP's picture and caption embeddings; None for captions that a model wrote."""
    return _cosine(view, "clip")


@sample_filter(keeps="at least", title="cosine of SigLIP's picture and caption", needs="siglip")
def siglip(view: View) -> float | None:
    """Cosine of SigLIP's picture and caption embeddings; None for captions that a model wrote."""
    return _cosine(view, "siglip")


@sample_filter(keeps="at most", title="probability of the label nsfw", needs="nsfw")
def nsfw(view: View) -> float:
    """Probability that a picture classifier gives to its label "nsfw" (or "unsafe")."""
    import torch

    model, processor = _classifier(view.tools.weights / "nsfw")
    label = next((i for i, n in model.config.id2label.items() if n.lower() in ("nsfw", "unsafe")), None)
    if label is None:
        raise ValueError(f"{view.tools.weights / 'nsfw'} has no label nsfw or unsafe")
    with torch.no_grad():
        return model(**processor(images=view.image, return_tensors="pt")).logits.softmax(-1)[0, label].item()


@sample_filter(keeps="at least", title="aesthetic score", needs="aesthetics")
def aesthetics(view: View) -> float:
    """What a regression model of one output makes of the picture, on that model's scale."""
    import torch

    model, processor = _classifier(view.tools.weights / "aesthetics")
    with torch.no_grad():
        return model(**processor(images=view.image, return_tensors="pt")).logits.squeeze().item()


def _cosine(view: View, name: str) -> float | None:
    import torch

    if caption_split(view) != "raw":
        return None
    model, tokenizer, processor = _two_towers(view.tools.weights / name)
    padding = "max_length" if name == "siglip" else True  # SigLIP was trained on padded captions
    words = tokenizer([view.caption], padding=padding, truncation=True, return_tensors="pt")
    with torch.no_grad():
        picture = model.get_image_features(**processor(images=view.image, return_tensors="pt")).pooler_output
        text = model.get_text_features(**words).pooler_output
    return torch.cosine_similarity(picture, text).item()


@cache
def _two_towers(folder: Path) -> tuple[Any, Any, Any]:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


@cache
def _classifier(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    return model, AutoImageProcessor.from_pretrained(folder)
