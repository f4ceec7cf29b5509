"""What some filters need beyond the sample: a tokenizer, an OCR engine, networks."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tools:
    """Where they are; None for what there is not."""

    components: Path | None = None
    """Folder with tokenizer/."""
    weights: Path | None = None
    """Folder with clip/, siglip/, nsfw/, aesthetics/: models as transformers saves them, with their processors."""

    def missing(self, need: str) -> str | None:
        """Why filters that need `need` (tokenizer, ocr, or a folder of weights) cannot run; None if they can."""
        if need == "tokenizer":
            found = self.components is not None and (self.components / "tokenizer").is_dir()
            return None if found else "no tokenizer"
        if need == "ocr":
            return None if importlib.util.find_spec("rapidocr") else "rapidocr is not installed"
        return None if self.weights is not None and (self.weights / need).is_dir() else "no weights"


@cache
def tokenizer(components: Path) -> Any:
    """The text encoder's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(components / "tokenizer")
