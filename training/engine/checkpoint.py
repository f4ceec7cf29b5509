"""Checkpoints on disk: which are whole, what is in them, and reading their weights in one process.

A checkpoint is a folder `step_00001000`:

    __0_0.distcp ...  .metadata  common.pt  metadata.json   torch.distributed.checkpoint, as Megatron writes it
    state.json       step, model config, data cursor
    manifest.json    size and digest of every other file

It is written under a temporary name, fsynced and renamed, so that a folder with this name is complete; the manifest
catches what a disk or a person did to it later. Tensors are `model.NAME` (weights), `ema.NAME` (their fp32 moving
average) and `optimizer.state.*`, whole and under the model's own names, so that any parallel layout can load them.
Where adapters train, their weights alone are there, and state.json has their settings.

`.metadata` is a pickle (torch's format): load checkpoints from places you trust.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files import fsync
from model.config import LoRAConfig, MMDiTConfig

if TYPE_CHECKING:
    from torch import Tensor

STATE, MANIFEST = "state.json", "manifest.json"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Name of the checkpoint of a step."""
    return checkpoints / f"step_{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints of a folder, newest first."""
    found = [p for p in checkpoints.glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(folder.name.removeprefix("step_"))


def digest(path: Path) -> str:
    """BLAKE2b of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def describe_files(files: list[Path]) -> dict[str, list]:
    """Manifest entries {name: [bytes, digest]}, each file fsynced."""
    entries = {}
    for file in files:
        fsync(file)
        entries[file.name] = [file.stat().st_size, digest(file)]
    return entries


def damage(folder: Path, part: int = 0, parts: int = 1, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None; of `parts` readers this one checks every parts-th file.

    Unless `thorough`, files are not read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, (size, expected) in sorted(manifest.items())[part::parts]:
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            if thorough and digest(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError):
        return f"{MANIFEST} cannot be read"
    return None


def candidates(source: Path) -> list[Path]:
    """Checkpoints, newest first, that a run folder, its checkpoints folder or a checkpoint folder stands for."""
    source = Path(source)
    if (source / STATE).exists() or re.fullmatch(r"step_\d{8,}", source.name):
        return [source]
    return list_checkpoints(source / "checkpoints" if (source / "checkpoints").is_dir() else source)


def passed_over(folder: Path, problem: str) -> str:
    """The line that says why a checkpoint is not used."""
    return f"checkpoint {folder} is damaged ({problem}), so it is passed over"


def resolve(source: Path, thorough: bool = True) -> Path:
    """The newest intact checkpoint of `candidates(source)`; ValueError if there is none.

    Unless `thorough`, only sizes are looked at: for those that read the state of what they load in full later.
    """
    if not Path(source).exists():
        raise ValueError(f"{source} does not exist")
    for folder in (found := candidates(source)):
        if (problem := damage(folder, thorough=thorough)) is None:
            return folder
        print(passed_over(folder, problem), flush=True)
    raise ValueError(no_checkpoint(source, found))


def no_checkpoint(source: Path, damaged: list[Path]) -> str:
    """The line that says why there is nothing to load."""
    return f"every checkpoint in {source} is damaged" if damaged else f"{source} holds no checkpoint"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint: step, model (config), extra (data cursor, ...)."""
    return json.loads((checkpoint / STATE).read_text())


def require_same_model(checkpoint: Path, model_config: Any, lora: LoRAConfig | None) -> None:
    """Raise ValueError, naming every field that differs, if the checkpoint is of another model or other adapters."""
    state = read_state(checkpoint)
    if ("lora" in state) != (lora is not None):
        kinds = ("all weights", "adapters")
        there, here = kinds["lora" in state], kinds[lora is not None]
        raise ValueError(f"checkpoint {checkpoint} is of {there}, and {here} are to be trained here")
    there, here = state["model"], plain(model_config)
    if lora is not None:
        there, here = {**there, **state["lora"]}, {**here, **plain(lora)}
    if there != here:
        names = [n for n in {**there, **here} if there.get(n) != here.get(n)]
        differences = "; ".join(f"{n} is {there.get(n)} there, {here.get(n)} here" for n in names)
        raise ValueError(f"checkpoint {checkpoint} is of another model: {differences}")


def read_tensors(checkpoint: Path, ema: bool = True) -> "dict[str, Tensor]":
    """Whole weights by name, on the CPU; with `ema` the moving average (fp32) of each weight that has one."""
    return dict(each_tensor(checkpoint, ema, math.inf))


def each_tensor(checkpoint: Path, ema: bool = True, at_once_bytes: float = 2**28) -> Iterator["tuple[str, Tensor]"]:
    """What `read_tensors` reads, with no more than `at_once_bytes` of it, or one tensor, in memory."""
    import torch
    import torch.distributed.checkpoint as torch_checkpoint
    from torch.distributed.checkpoint import FileSystemReader

    reader = FileSystemReader(checkpoint)
    stored = {k: v for k, v in reader.read_metadata().state_dict_metadata.items() if hasattr(v, "size")}
    names = [k.removeprefix("model.") for k in stored if k.startswith("model.")]
    key = {n: f"ema.{n}" if ema and f"ema.{n}" in stored else f"model.{n}" for n in names}
    groups, used = [[]], 0
    for name in names:
        about = stored[key[name]]
        size = about.size.numel() * about.properties.dtype.itemsize
        if groups[-1] and used + size > at_once_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    for group in groups:
        tensors = {key[n]: torch.empty(stored[key[n]].size, dtype=stored[key[n]].properties.dtype) for n in group}
        with warnings.catch_warnings():  # that one process reads alone is meant
            warnings.simplefilter("ignore")
            torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
        yield from ((n, tensors[key[n]]) for n in group)


def read_weights(source: Path, ema: bool = True) -> "tuple[MMDiTConfig, dict[str, Tensor]]":
    """(config, whole weights by our names) of an MMDiT's run folder or checkpoint, without any process group.

    Raises ValueError if there is no intact checkpoint or it is not of an MMDiT.
    """
    checkpoint = resolve(source)
    model = read_state(checkpoint)["model"]
    if unknown := set(model) - {f.name for f in dataclasses.fields(MMDiTConfig)}:
        raise ValueError(f"checkpoint {checkpoint} is not of an MMDiT: its config has {', '.join(sorted(unknown))}")
    return MMDiTConfig(**model), read_tensors(checkpoint, ema)


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place, durably, replacing one of that name."""
    fsync(temporary)
    remove(final)
    os.rename(temporary, final)
    fsync(final.parent)


def prune(checkpoints: Path, keep: int, keep_every: int = 0, best: Path | None = None) -> None:
    """Delete checkpoints but the newest `keep`, those of every `keep_every` steps and `best`, and what an interrupted
    save or delete left."""
    for folder in list_checkpoints(checkpoints)[max(1, keep) :]:
        if folder != best and (not keep_every or step_of(folder) % keep_every):
            remove(folder)
    for leftover in checkpoints.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no half of it ever has a checkpoint's name."""
    if folder.exists():
        doomed = folder.with_name(f".tmp-old-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
