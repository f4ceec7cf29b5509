"""What every entry script shares: flags from a frozen dataclass, `--config FILE.toml`, one-line errors, progress bars.

Imports no torch, so that `--help` answers at once. An entry is

    def main(config: Config) -> None: ...

    if __name__ == "__main__":
        run(main, Config)
"""

import ctypes
import dataclasses
import errno
import logging
import os
import signal
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn of what is of no concern here: where torchao is installed, of its kernels for other machines."""


class UserError(Exception):
    """Input that the user can mend; shown as one line. The message says what is wrong and what to do."""


def run(
    main: Callable[[T], None], config: type[T] | T | Callable[[list[str]], T], description: str | None = None
) -> None:
    """Parse flags into the dataclass `config` and call main.

    `config` is a type, an instance whose values are the defaults, or a function that finds them from the words of the
    command line, before which it sees what the file says as if they were words.

    `--config FILE.toml` replaces the defaults; flags go on top. UserError, ValueError and OSError end as one line on
    stderr with exit status 2 (set DEBUG=1 for the traceback), Ctrl-C with 130.
    """
    import tyro

    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        argv, file = _take_config_flag(sys.argv[1:])
        said = {} if file is None else read_toml(file)
        if isinstance(config, type):
            defaults = config()
        else:
            defaults = config if dataclasses.is_dataclass(config) else config([*_as_words(said), *argv])
        if file is not None:
            defaults = from_dict(type(defaults), said, defaults, str(file))
        doc = description or sys.modules[main.__module__].__doc__
        parsed = tyro.cli(
            type(defaults), default=defaults, args=argv, description=doc + "\n\n--config FILE.toml sets the defaults."
        )
        main(parsed)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("DEBUG"):
            raise
        raise SystemExit(_one_line(error)) from None


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when its parent dies, so that a killed run leaves nothing behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _one_line(error: BaseException) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = (
            f"no space left on the disk of {error.filename or 'the output folder'}; free some and run the same command"
        )
    elif isinstance(error, PermissionError):
        text = f"no permission for {error.filename}; choose another folder or change its rights"
    elif isinstance(error, FileNotFoundError) and error.filename:
        text = f"{error.filename} does not exist"
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 2


def _take_config_flag(argv: list[str]) -> tuple[list[str], Path | None]:
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise UserError("--config needs a file")
            return argv[:i] + argv[i + 2 :], Path(argv[i + 1])
        if word.startswith("--config="):
            return argv[:i] + argv[i + 1 :], Path(word.removeprefix("--config="))
    return argv, None


def _as_words(said: dict[str, Any]) -> list[str]:
    """Flags that say what a file says, without the names of its tables; of a list its first item."""
    words = []
    for name, value in said.items():
        if isinstance(value, dict):
            words += _as_words(value)
        elif not isinstance(value, list) or value:
            words += ["--" + name.replace("_", "-"), str(value[0] if isinstance(value, list) else value)]
    return words


def flag(argv: list[str], name: str) -> str | None:
    """The value of a flag among the words of a command line, before they are parsed; None if it isn't there."""
    values = [b for a, b in zip(argv, argv[1:], strict=False) if a == name]
    values += [a.split("=", 1)[1] for a in argv if a.startswith(f"{name}=")]
    return values[-1] if values else None


def load_named(name: str) -> Any:
    """What MODULE:NAME or FILE.py:NAME names. UserError if there is no such thing."""
    import importlib
    import importlib.util

    place, _, attribute = name.rpartition(":")
    if not place:
        raise UserError(f"{name!r} should be MODULE:CLASS or FILE.py:CLASS")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise UserError(f"{place} does not exist")
        spec = importlib.util.spec_from_file_location(f"user_{Path(place).stem}", place)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UserError(f"{name}: {error}") from None
    if not hasattr(module, attribute):
        raise UserError(f"{place} has no {attribute}")
    return getattr(module, attribute)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; UserError if it isn't one."""
    try:
        return tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def write_toml(config: Any, path: Path) -> None:
    """Write a (nested) dataclass as TOML, atomically; fields that are None are left out."""
    import tomli_w

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    from files import atomic_file

    with atomic_file(path) as file:
        file.write(tomli_w.dumps(plain(config)).encode())


def from_dict(cls: type[T], data: dict[str, Any], defaults: T | None = None, where: str = "config") -> T:
    """Build the (nested) dataclass `cls` from plain data over `defaults`; UserError for an unknown name."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - names):
        raise UserError(f"{where}: unknown name {', '.join(unknown)}; known are {', '.join(sorted(names))}")
    values = {} if defaults is None else {n: getattr(defaults, n) for n in names}
    for name, value in data.items():
        values[name] = _convert(hints[name], value, values.get(name), f"{where}.{name}")
    return cls(**values)


def _convert(hint: Any, value: Any, default: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        hint = next(a for a in args if a is not type(None))
        return _convert(hint, value, default, where)
    if origin is typing.Annotated:
        return _convert(args[0], value, default, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, default, where)
    if origin is tuple:
        hints = args[:1] * len(value) if args[-1] is ... else args
        return tuple(_convert(h, v, None, where) for h, v in zip(hints, value, strict=True))
    if origin is typing.Literal and value not in args:
        raise UserError(f"{where} should be one of {', '.join(map(str, args))}, is {value!r}")
    if hint is Path:
        return Path(value)
    if hint is float and isinstance(value, int):
        return float(value)
    if isinstance(hint, type) and hint is not dict and not isinstance(value, hint):
        raise UserError(f"{where} should be {hint.__name__}, is {value!r}")
    return value


def progress(total: int, label: str, unit: str, done: int = 0):
    """A tqdm bar with rate and ETA on stderr; silent on ranks other than 0."""
    from tqdm import tqdm

    quiet = os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, initial=done, desc=label, unit=unit, disable=quiet, dynamic_ncols=True, mininterval=0.5)
