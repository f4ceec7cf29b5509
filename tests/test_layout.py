"""The tree keeps its promises: who imports whom, what files may be called, how long they are, how fast --help is."""

import ast
import graphlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = [
    "model", "vae", "vlm", "data_pipeline", "training", "rewards", "evaluation", ("pretrain", "posttrain"), "demo",
]  # fmt: skip
"""From the ground up: a room's modules (not its entry scripts) import from the rooms before it and its own."""
FLOOR = {room: i for i, floor in enumerate(ROOMS) for room in ([floor] if isinstance(floor, str) else floor)}
PACKAGES = list(FLOOR)
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
ENTRIES = [p for p in SOURCES if '\nif __name__ == "__main__":' in p.read_text()]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in SOURCES if p not in ENTRIES], ids=name)
def test_import_directions(path):
    room = path.relative_to(ROOT).parts[0]
    above = {i for i in imports(path) if FLOOR.get(i.split(".")[0], -1) >= FLOOR[room] and i.split(".")[0] != room}
    assert not above, f"{name(path)} imports {sorted(above)}"


def test_there_is_no_circle():
    """No two modules import each other, by whatever way; imports inside functions and for type checkers count."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCES}
    graph = {m: {i for i in imports(p) if i in modules and i != m} for m, p in modules.items() if p not in ENTRIES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names them


def test_nobody_imports_an_entry():
    entries = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ENTRIES}
    for path in SOURCES:
        assert not (imports(path) & set(entries)), f"{name(path)} imports an entry script"


def test_only_the_engine_knows_megatron():
    for path in SOURCES:
        if "engine" in path.parts or path.name == "line.py":  # the demo's driver only warms imports up
            continue
        foreign = {i.split(".")[0] for i in imports(path)} & {
            "megatron",
            "transformer_engine",
            "bitsandbytes",
            "torchao",
        }
        assert not foreign, f"{name(path)} imports {foreign}"


def test_no_pickle():
    for path in SOURCES:
        assert not imports(path) & {"pickle", "dill", "cloudpickle"}, name(path)
        text = path.read_text()
        assert "torch.load(" not in text and "torch.save(" not in text, name(path)


def test_names_say_something():
    for path in SOURCES:
        assert path.stem not in {"util", "utils", "common", "helper", "helpers", "misc"}, name(path)


def test_entries_do_not_shadow_modules():
    """`python folder/entry.py` puts folder first on sys.path: nothing there may be named like another module."""
    third_party = set(importlib.metadata.packages_distributions())
    for folder in {p.parent for p in ENTRIES if p.name != "__main__.py"}:
        for path in [*folder.glob("*.py"), *(d for d in folder.iterdir() if (d / "__init__.py").exists())]:
            if path.stem != "__init__":
                taken = path.stem in sys.stdlib_module_names or path.stem in third_party - set(PACKAGES)
                assert not taken and path.stem not in PACKAGES, f"{name(path)} shadows module {path.stem}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", ENTRIES, ids=name)
def test_help_needs_no_heavy_import(path):
    """--help must not load torch: it is what makes it answer at once (timed by hand, not here)."""
    target = ["-m", path.parent.name] if path.name == "__main__.py" else [str(path)]
    probe = subprocess.run(
        [sys.executable, "-X", "importtime", *target, "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert probe.returncode == 0, probe.stderr[-500:]
    loaded = {line.rsplit("|", 1)[-1].strip() for line in probe.stderr.splitlines() if line.startswith("import time:")}
    heavy = loaded & {"torch", "transformers", "diffusers", "megatron.core", "cv2", "webdataset", "sklearn"}
    assert not heavy, f"{name(path)} --help imports {sorted(heavy)}"


@pytest.mark.parametrize("path", ENTRIES, ids=name)
def test_unknown_flag_is_refused_in_short(path):
    target = ["-m", path.parent.name] if path.name == "__main__.py" else [str(path)]
    probe = subprocess.run(
        [sys.executable, *target, "--no-such-flag"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert probe.returncode == 2
    assert "Traceback" not in probe.stderr and "no-such-flag" in probe.stdout + probe.stderr
