"""GenEval's detector (arXiv 2310.11513): Mask2Former finds objects, CLIP names their colours; local weights.

As the official code: instances of COCO classes above confidence .3 (.9 for counting); a colour is the nearest of ten by
zero-shot classification, over three templates, of the object cut out on gray. Mask2Former runs through transformers at
its processor's own size, where the official code runs mmdet's at 800 px.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from command_line import UserError
from evaluation.picture_measures import TwoTowers, file_stamp
from evaluation.scoring import Found, Objects, group

if TYPE_CHECKING:
    import torch

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""COCO's names that GenEval writes differently."""
GRAY = 0x99


class GenEvalDetector:
    """`detector(images, metadata) -> objects of each`, colours named where the metadata asks for them.

    Raises UserError for a folder that holds no such model.
    """

    def __init__(self, mask2former: Path, clip: Path, device: "torch.device | str"):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        if not mask2former.is_dir():
            raise UserError(f"no Mask2Former at {mask2former}")
        try:
            self.processor = AutoImageProcessor.from_pretrained(mask2former, local_files_only=True)
            model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{mask2former} holds no Mask2Former with its processor ({error})") from None
        self.model, self.device = model.eval().to(device), device
        self.names = {i: RENAMED.get(name, name) for i, name in model.config.id2label.items()}
        self.clip = TwoTowers(clip, device)
        self.fingerprint = str([file_stamp(mask2former), file_stamp(clip)])
        self._color_vectors: dict[str, torch.Tensor] = {}

    def __call__(self, images: list[np.ndarray], metadata: list[dict[str, Any]]) -> list[Objects]:
        """Objects of each uint8 [h, w, 3] picture, as its prompt's tag and colours demand."""
        return [self._find(image, m) for image, m in zip(images, metadata, strict=True)]

    def _find(self, image: np.ndarray, metadata: dict[str, Any]) -> Objects:
        segments, masks = self._segment(image)
        found = [(self.names[s["label_id"]], Found(_box(m), s["score"])) for s, m in zip(segments, masks, strict=True)]
        mask_of = {id(f): m for (_, f), m in zip(found, masks, strict=True)}
        objects = group(found, COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD)
        for name in {c["class"] for c in metadata["include"] if "color" in c} & set(objects):
            crops = [_cut_out(image, mask_of[id(f)], f.box) for f in objects[name]]
            colors = self.name_colors(crops, name)
            objects[name] = [Found(f.box, f.confidence, c) for f, c in zip(objects[name], colors, strict=True)]
        return objects

    def _segment(self, image: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Segments (label_id, score) and their masks, bool [n, h, w], without empty ones."""
        import torch

        inputs = self.processor(images=[image], return_tensors="pt").to(self.device)
        with torch.no_grad():
            outputs = self.model(**inputs)
        (result,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[image.shape[:2]], return_binary_maps=True
        )
        if not result["segments_info"]:
            return [], np.zeros((0, *image.shape[:2]), bool)
        return result["segments_info"], np.asarray(result["segmentation"].cpu()).astype(bool)

    def name_colors(self, crops: list[np.ndarray], name: str) -> list[str]:
        """The colour of each cut-out of an object of class `name`."""
        if name not in self._color_vectors:
            self._color_vectors[name] = self._vectors(name)
        similarity = self.clip.embed_images(crops) @ self._color_vectors[name].T
        return [COLORS[i] for i in similarity.argmax(1).tolist()]

    def _vectors(self, name: str) -> "torch.Tensor":
        import torch

        vectors = []
        for color in COLORS:
            mean = self.clip.embed_texts([t.format(color=color, name=name) for t in TEMPLATES]).mean(0)
            vectors.append(mean / mean.norm())
        return torch.stack(vectors)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _cut_out(image: np.ndarray, mask: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """The object on gray, cropped to its box."""
    x0, y0, x1, y1 = map(int, box)
    return np.where(mask[..., None], image, np.uint8(GRAY))[y0:y1, x0:x1]
