"""The contract between stages: what a sample is, on disk and in memory.

On disk a sample is a group of webdataset tar members that share a key:

    raw       KEY.jpg|png   the picture as it came        KEY.json   its record (see `RawSample.meta`)
              KEY.reference.0.png ... and KEY.mask.png for a picture that is the result of an edit
    encoded   KEY.safetensors   tensors of `EncodedSample`   KEY.json   record, bucket

An encoded data set is a folder of such tars with `dataset.json` (see `Fingerprint`) and `empty.safetensors` (the empty
prompt's hidden states) beside them. Nothing is pickled.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RawSample:
    """A picture with its record."""

    key: str
    """Unique in the data set, without '.' or '/'."""
    image: bytes
    """The encoded file."""
    ext: str
    """jpg or png."""
    meta: dict
    """caption (str, required) · source (shapes, text, photo, user ...) · width, height (pixels) · scores {filter:
    number} · geneval (GenEval metadata, for pictures whose content is known) · lines [{text, box [x0, y0, x1, y1]}] ·
    edit {operation, of, before, after} · from annotation: captions {raw, long, short}, caption_split (raw, recaptioned,
    fused), domain, category, annotation {type, style, watermarks, abnormal_elements} · user {a user's fields that
    have these names and mean something else}. Fields of other names are kept as they are."""
    references: list[bytes] = field(default_factory=list)
    """PNG files of the pictures that an edit began with; `caption` is then its instruction."""
    mask: bytes | None = None
    """PNG file, one channel: 255 where the edit changes the first reference."""


@dataclass
class EncodedSample:
    """What training reads."""

    key: str
    latent: "Tensor"
    """fp32 [16, F, H, W]: the posterior's mode, normalised by the VAE's latent mean and std."""
    txt: "Tensor"
    """bf16 [L, D]: last hidden states of the text encoder after the template's prefix was dropped."""
    references: list["Tensor"] = field(default_factory=list)
    """Latents [16, 1, h, w] of the pictures to edit, each encoded alone."""
    txt_empty: "Tensor | None" = None
    """bf16 [L0, D] hidden states of the empty prompt (with this sample's references, if it has any)."""
    meta: dict = field(default_factory=dict)
    epoch: int = 0
    """Pass over the data in which this copy was drawn; randomness depends on it."""


def set_apart(meta: dict, *names: str) -> dict:
    """The record with those fields under "user" that have our names but not our form, and those called `names`.

    So a user's own "labels" or "source" neither breaks a stage nor is overwritten by one.
    """
    theirs = {n: v for n, v in meta.items() if n in names or (n in _FORMS and not _FORMS[n](v))}
    if not theirs:
        return meta
    ours = {n: v for n, v in meta.items() if n not in theirs}
    return ours | {"user": ours.get("user", {}) | theirs}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(value: Any) -> bool:
    box = value.get("box") if isinstance(value, dict) else None
    return isinstance(box, list) and len(box) == 4 and all(map(_number, box)) and isinstance(value.get("text"), str)


_FORMS: dict[str, Callable[[Any], bool]] = {
    "source": lambda v: isinstance(v, str),
    "width": _number,
    "height": _number,
    "scores": lambda v: isinstance(v, dict) and all(map(_number, v.values())),
    "labels": lambda v: isinstance(v, dict) and _texts(list(v.values())),
    "geneval": lambda v: isinstance(v, dict),
    "lines": lambda v: isinstance(v, list) and all(map(_line, v)),
    "edit": lambda v: isinstance(v, dict),
    "captions": lambda v: isinstance(v, dict) and _texts(list(v.values())),
    "caption_split": lambda v: v in ("raw", "recaptioned", "fused"),
    "domain": lambda v: isinstance(v, str),
    "category": lambda v: isinstance(v, str),
    "annotation": lambda v: isinstance(v, dict) and _texts(v.get("watermarks")) and _texts(v.get("abnormal_elements")),
    "bucket": lambda v: False,  # of encoded samples
    "crop": lambda v: False,
    "user": lambda v: isinstance(v, dict),
}
"""Whether a field of `RawSample.meta` has the form that our stages read."""


@dataclass(frozen=True)
class Fingerprint:
    """What an encoded data set was made with; two that differ must not be trained on together."""

    vae: str
    """Hash of the VAE encoder's weights and latent statistics."""
    text_encoder: str
    """Hash of the text encoder's config and weights."""
    template: str
    """Hash of the prompt template, its dropped prefix and the tokenizer."""
    resolution: int
    """Side, in pixels, of the square whose area pictures were resized to."""
    version: int = 0
    """Of the code that encodes (`data_pipeline.encoding.ENCODING_VERSION`); 0 of data from before it had one."""

    def require(self, other: "Fingerprint", where: str) -> None:
        """Raise ValueError naming every difference."""
        if other.version < self.version:
            raise ValueError(f"{where} was encoded by an earlier version of this code; produce it again")
        mine, theirs = asdict(self), asdict(other)
        bad = [f"{name}: {theirs[name]} there, {mine[name]} here" for name in mine if mine[name] != theirs[name]]
        if bad:
            raise ValueError(f"{where} was encoded with something else ({'; '.join(bad)}); produce it again")
