"""Wheels for a machine that has torch and a GPU but no network: downloaded here, installed there.

python bench/gpu/kit.py --out kit --python 3.12         # here
pip install --no-deps --no-index --target lib kit/core/*.whl kit/quant/*.whl && export PYTHONPATH=lib:.     # there
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    from command_line import UserError, run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

PARTS = {
    "core": [
        "megatron-core", "diffusers", "tyro", "docstring_parser", "typeguard", "webdataset", "braceexpand", "tomli_w",
        "importlib_metadata", "zipp",
    ],
    "quant": ["torchao", "bitsandbytes"],
}  # fmt: skip
"""Packages that such a machine lacks; it has torch, transformers, safetensors, numpy and pillow."""
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
MIB = 2**20
LARGEST_CORE_MIB = 20


@dataclass(frozen=True)
class Config:
    out: Path = Path("kit")
    """Folder of the wheels, a folder in it for each part."""
    python: str = "3.12"
    """The other machine's."""
    parts: tuple[str, ...] = tuple(PARTS)
    dry_run: bool = False
    """Print the commands, run nothing."""


def main(config: Config) -> None:
    if unknown := sorted(set(config.parts) - set(PARTS)):
        raise UserError(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for part in config.parts:
        command = download(part, config)
        if config.dry_run:
            print(" ".join(map(str, command)))
            continue
        subprocess.run(command, check=True)
        size = sum(p.stat().st_size for p in (config.out / part).glob("*.whl")) / MIB
        print(f"{config.out / part}: {size:.1f} MiB")
        if part == "core" and size > LARGEST_CORE_MIB:
            raise UserError(f"{config.out / part} has more than {LARGEST_CORE_MIB} MiB")


def download(part: str, config: Config) -> list[object]:
    """pip's command for a part."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in (28, 24, 17)] + ["manylinux2014_x86_64"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    return [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-c", CONSTRAINTS,
        "--python-version", config.python, "--implementation", "cp", *platforms, "-d", config.out / part, *PARTS[part],
    ]  # fmt: skip


if __name__ == "__main__":
    run(main, Config)
