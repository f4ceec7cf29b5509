"""What validation, evaluation and rewards know of a model: that it draws pictures."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class Generator(Protocol):
    """Prompts, sizes, seeds and pictures to edit in, pictures out: a diffusion model, an autoregressive one, a file."""

    def generate(
        self,
        prompts: list[str],
        sizes_px: list[tuple[int, int]],
        seeds: list[int],
        images: "list[list[Image]] | None" = None,
    ) -> "list[np.ndarray]":
        """One uint8 picture [H, W, 3] of (height, width) pixels for each prompt; `images` are pictures to edit.

        A picture is a function of its own prompt, size, seed and pictures, whatever else is drawn. A generator may also
        have `reconstruct(picture) -> picture`, the best that its decoder can do: evaluation then shows that ceiling.
        """
