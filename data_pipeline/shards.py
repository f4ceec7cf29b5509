"""Shards: webdataset tars of raw or encoded samples (see `data_pipeline.sample`).

Writing the same samples gives the same bytes. A shard appears whole or not at all. Reading passes over what is damaged
and reports it. Nothing is pickled, and nothing is ever unpickled.
"""

import filecmp
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.pictures import decode
from data_pipeline.sample import EncodedSample, RawSample, set_apart
from data_pipeline.tar_index import BLOCK, Entry, TarIndex, index_path, keep_index, read_member, scan, tar_index
from files import atomic_file, remove_leftovers

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

IMAGE_EXTENSIONS = ("jpg", "png")


@dataclass(frozen=True)
class Problem:
    """Something that a reader passed over."""

    shard: str
    """File name of the tar."""
    key: str
    """Sample, or '' for the tar as a whole."""
    what: str

    def __str__(self) -> str:
        return f"{self.shard}{'/' if self.key else ''}{self.key}: {self.what}"


OnProblem = Callable[[Problem], None]


def shard_name(index: int) -> str:
    """File name of the `index`-th shard of a folder."""
    return f"shard-{index:06d}.tar"


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder by name. ValueError if there is no such folder or no shard in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of shards")
    shards = sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))
    if not shards:
        raise ValueError(f"{folder} holds no .tar shards")
    return shards


def write_raw(path: Path, samples: Iterable[RawSample]) -> int:
    """Write a shard of raw samples; returns their number. ValueError for a bad key, extension or record."""
    return len(_write(path, (_raw_members(s) for s in samples)))


def write_encoded(path: Path, samples: Iterable[EncodedSample]) -> int:
    """Write a shard of encoded samples, and its index beside it; returns their number."""
    shapes = []

    def members() -> Iterator[dict]:
        for sample in samples:
            shapes.append({name: tuple(tensor.shape) for name, tensor in _tensors(sample).items()})
            yield _encoded_members(sample)

    written = _write(path, members())
    remove_leftovers(index_path(path))
    keep_index(path, TarIndex(tuple(replace(e, shapes=s) for e, s in zip(written, shapes, strict=True))))
    return len(written)


def read_raw(path: Path, on_problem: OnProblem | None = None) -> Iterator[RawSample]:
    """The raw samples of one shard, in order.

    Damage (a cut tar, a broken record, a missing member) and what no shard may hold (a key with '/' or that came
    before, NaN in a record) goes to `on_problem` and is passed over; without it the first one raises ValueError.
    Pictures are not decoded, so a truncated picture is the caller's to find.
    """
    report = on_problem or _refuse
    seen: set[str] = set()
    for members in read_members(path, report, _is_raw):
        key = members["__key__"]
        try:
            sample = _raw_sample(key, members)
            if key in seen:
                raise ValueError("its key came before")
        except ValueError as error:
            report(Problem(path.name, key, str(error)))
        else:
            seen.add(key)
            yield sample


def read_encoded(path: Path, on_problem: OnProblem | None = None) -> Iterator[EncodedSample]:
    """The encoded samples of one shard, in order; damage is treated as by `read_raw`."""
    report = on_problem or _refuse
    for members in read_members(path, report, lambda ext: ext in ("safetensors", "json")):
        try:
            yield encoded_sample(members["__key__"], members.get("safetensors"), members.get("json"))
        except ValueError as error:
            report(Problem(path.name, members["__key__"], str(error)))


def raw_sample(path: Path, entry: Entry) -> RawSample:
    """One sample of a raw shard's index. ValueError says what is wrong with it."""
    with open(path, "rb") as file:
        members = {ext: read_member(file.fileno(), entry, ext) for ext in entry.members if _is_raw(ext)}
    return _raw_sample(entry.key, members)


def raw_picture(path: Path, key: str) -> "Image | None":
    """The picture of one sample of a raw shard, without reading the others; None if it is broken or not there."""
    entry = next((e for e in tar_index(path).entries if e.key == key), None)
    ext = next((x for x in IMAGE_EXTENSIONS if entry and x in entry.members), None)
    if ext is None:
        return None
    with open(path, "rb") as file:
        try:
            return decode(read_member(file.fileno(), entry, ext))
        except ValueError:
            return None


class RawPictures:
    """All pictures of folders of raw shards, each to be had by its number; `problems` are what was passed over."""

    def __init__(self, folders: Iterable[Path]):
        self.problems: list[Problem] = []
        self._found: list[tuple[Path, Entry, str]] = []
        for shard in (s for folder in folders for s in list_shards(folder)):
            index = tar_index(shard)
            if index.problem:
                self.problems.append(Problem(str(shard), "", index.problem))
            for entry in index.entries:
                ext = next((x for x in IMAGE_EXTENSIONS if x in entry.members), None)
                if ext is None:
                    self.problems.append(Problem(str(shard), entry.key, "no picture"))
                else:
                    self._found.append((shard, entry, ext))

    def __len__(self) -> int:
        return len(self._found)

    def key(self, number: int) -> str:
        return self._found[number][1].key

    def __getitem__(self, number: int) -> "Image":
        """Decode one picture; ValueError names a broken one."""
        shard, entry, ext = self._found[number]
        with open(shard, "rb") as file:
            try:
                return decode(read_member(file.fileno(), entry, ext))
            except ValueError as error:
                raise ValueError(f"{shard}/{entry.key}: {error}; drop it with data_pipeline/curate.py") from None


def encoded_sample(key: str, tensors: bytes | None, record: bytes | None) -> EncodedSample:
    """Build an encoded sample from its two members; ValueError if one is missing or broken (see `require_sound`)."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if tensors is None or record is None:
        raise ValueError(f"no {'safetensors' if tensors is None else 'json'} member")
    meta = read_record(record)
    try:
        found = load(tensors)
        references = [found[f"reference.{i}"] for i in range(sum(name.startswith("reference.") for name in found))]
        sample = EncodedSample(key, found["latent"], found["txt"], references, found.get("txt_empty"), meta)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"broken safetensors: {error}") from None
    require_sound(sample)
    return sample


def require_sound(sample: EncodedSample) -> None:
    """ValueError if a tensor has another dtype or shape than `EncodedSample` says, or holds NaN or infinity."""
    import torch

    for name, tensor in _tensors(sample).items():
        dtype = torch.bfloat16 if name.startswith("txt") else torch.float32
        if tensor.dtype != dtype:
            raise ValueError(f"its {name} is {tensor.dtype}, not {dtype}")
        if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():  # a sum is quick, but may overflow
            raise ValueError(f"its {name} holds NaN or infinity")
    if problem := shape_problem({name: tuple(tensor.shape) for name, tensor in _tensors(sample).items()}):
        raise ValueError(problem)


def shape_problem(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """What is wrong with the shapes of an encoded sample's tensors; None if nothing is."""
    for name, shape in shapes.items():
        if name.startswith("txt"):
            wanted, good = "[tokens, width]", len(shape) == 2 and shape[1:] == shapes["txt"][1:]
        else:
            wanted = "[16, frames, height, width] of even sides"
            good = len(shape) == 4 and shape[0] == 16 and not shape[2] % 2 and not shape[3] % 2
        if not (good and all(shape)):
            return f"its {name} has shape {list(shape)}, not {wanted}"
    return None


def token_count(shapes: dict[str, tuple[int, ...]], patch: int = 2) -> int:
    """Tokens of an encoded sample in joint attention (prompt, target, references), from its tensors' shapes."""
    pictures = [shape for name, shape in shapes.items() if name == "latent" or name.startswith("reference.")]
    return shapes["txt"][0] + sum(math.prod(shape[1:]) for shape in pictures) // patch**2


def _is_raw(ext: str) -> bool:
    """Whether a member belongs to a raw sample."""
    return ext in (*IMAGE_EXTENSIONS, "json", "mask.png") or ext.startswith("reference.")


def _refuse(problem: Problem) -> None:
    raise ValueError(str(problem))


def _write(path: Path, samples: Iterable[dict]) -> list[Entry]:
    """Write samples of members {"__key__": key, extension: bytes}; says where each lies."""
    from webdataset import TarWriter

    remove_leftovers(path)
    written: dict[str, Entry] = {}
    with atomic_file(path) as file:
        with TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for members in samples:
                key = members.pop("__key__")
                if key in written:
                    raise ValueError(f"{path.name}: the key {key} comes twice")
                written[key] = Entry(key, {})
                for ext, data in sorted(members.items()):
                    tar.write({"__key__": key, ext: data})
                    padded = -(-len(data) // BLOCK) * BLOCK
                    written[key].members[ext] = (tar.tarstream.offset - padded, len(data))
        file.flush()
        if path.exists() and filecmp.cmp(path, file.name, shallow=False):  # the same file, so of the same time
            times = path.stat()
            os.utime(file.name, ns=(times.st_atime_ns, times.st_mtime_ns))
    return list(written.values())


def _record(key: str, meta: dict) -> bytes:
    _require_good_key(key)
    if not isinstance(meta.get("caption"), str):
        raise ValueError(f"{key}: its record has no caption")
    try:
        return record_bytes(meta)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def key_problem(key: str) -> str | None:
    """What is wrong with a sample's key; None if nothing is."""
    if not key or set(key) & set("./"):
        return f"the key {key!r} must be a name without '.' and '/'; data_pipeline/ingest.py makes such"
    return None


def _require_good_key(key: str) -> None:
    if problem := key_problem(key):
        raise ValueError(problem)


def record_bytes(meta: dict) -> bytes:
    """A record as JSON; ValueError for what JSON or UTF-8 cannot say: NaN, infinity, half a surrogate pair."""
    try:
        return json.dumps(meta, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("its record holds half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its record is no JSON ({error})") from None


def read_record(data: bytes) -> dict:
    """The JSON object in a record's bytes; ValueError if there is none, or it could not be written again."""
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken record: {error}") from None
    if not isinstance(meta, dict):
        raise ValueError("broken record: not an object")
    record_bytes(meta)
    return meta


def _raw_members(sample: RawSample) -> dict:
    if sample.ext not in IMAGE_EXTENSIONS:
        raise ValueError(f"{sample.key}: pictures are jpg or png, not {sample.ext}")
    members = {"__key__": sample.key, sample.ext: sample.image, "json": _record(sample.key, sample.meta)}
    members |= {f"reference.{i}.png": reference for i, reference in enumerate(sample.references)}
    return members if sample.mask is None else members | {"mask.png": sample.mask}


def _tensors(sample: EncodedSample) -> "dict[str, Tensor]":
    tensors = {"latent": sample.latent, "txt": sample.txt}
    tensors |= {f"reference.{i}": reference for i, reference in enumerate(sample.references)}
    return tensors if sample.txt_empty is None else tensors | {"txt_empty": sample.txt_empty}


def _encoded_members(sample: EncodedSample) -> dict:
    from safetensors.torch import save

    data = save({name: tensor.contiguous().cpu() for name, tensor in _tensors(sample).items()})
    return {"__key__": sample.key, "safetensors": data, "json": _record(sample.key, sample.meta)}


def _raw_sample(key: str, members: dict) -> RawSample:
    ext = next((x for x in IMAGE_EXTENSIONS if x in members), None)
    if ext is None:
        raise ValueError("no jpg or png member")
    if "json" not in members:
        raise ValueError("no json member")
    _require_good_key(key)
    meta = read_record(members["json"])
    if not isinstance(meta.get("caption"), str):
        raise ValueError("its record has no caption")
    references = [members.get(f"reference.{i}.png") for i in range(sum(n.startswith("reference.") for n in members))]
    if None in references:
        raise ValueError("a reference is missing")
    return RawSample(key, members[ext], ext, set_apart(meta), references, members.get("mask.png"))


def read_members(path: Path, report: OnProblem, wanted: Callable[[str], bool] = lambda ext: True) -> Iterator[dict]:
    """The samples of a tar, up to the damage if there is any: {"__key__": key, extension: bytes}.

    Reads where the headers say and nothing else: no decompression, no links, no names of files are followed.
    """
    index = scan(path)
    if index.problem:
        report(Problem(path.name, "", index.problem))
    with open(path, "rb") as file:
        for entry in index.entries:
            try:
                members = {x: read_member(file.fileno(), entry, x) for x in entry.members if wanted(x)}
                yield {"__key__": entry.key} | members
            except ValueError as error:
                report(Problem(path.name, entry.key, str(error)))
