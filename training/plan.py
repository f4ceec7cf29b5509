"""What a run will cost, as `--dry-run` prints it: counted, and where seconds are named, predicted. Imports no torch."""

import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from model.config import LoRAConfig, MMDiTConfig
from training.cost.cards import CARDS, GIB, NODE, Card, in_this_machine, named
from training.cost.step import LINK_USE, MFU, Setting, Work, component_bytes, fits, flops, memory, seconds, traffic
from training.engine.config import EngineConfig, ParallelConfig
from training.loop import LoopConfig
from training.source import LARGE_PARAMETERS, TOY_PARAMETERS

MARGIN = 0.08
"""Share of a GPU's memory that a layout leaves free: for what is not counted."""
ROWS = 8
"""Layouts that are listed, at most."""
TXT_TOKENS = {True: 24, False: 256}
"""Assumed length of a prompt, by whether the model is a toy."""


class Planned(Protocol):
    """What of a run's config decides its cost."""

    max_tokens: int
    gpu: str | None
    components: Path | None
    engine: EngineConfig
    loop: LoopConfig

    @property
    def model(self) -> MMDiTConfig: ...

    def work(self) -> Work: ...

    def summary(self) -> str: ...


def prompt_tokens(model: MMDiTConfig) -> int:
    """Assumed length of a prompt for a model."""
    return TXT_TOKENS[model.num_parameters < TOY_PARAMETERS]


def plan(config: Planned) -> str:
    """The lines that `--dry-run` prints; of processes that do not divide into the layout, the layouts that would do.

    ValueError for such processes on CPUs.
    """
    world, card = machine(config)
    try:
        setting = setting_of(config, world, card)
    except ValueError as error:
        if card is None:
            raise
        unsplit = replace(config, engine=replace(config.engine, parallel=ParallelConfig()))
        return "\n".join([f"{error}; what would do:", *_layouts(setting_of(unsplit, world, card), card)])
    lines = [*textwrap.wrap(config.summary(), 116), *_step(setting, config.loop.steps, card), *_memory(setting, card)]
    return "\n".join(lines if card is None else lines + _layouts(setting, card))


def before_a_run(config: Planned) -> str | None:
    """What is said before a run on GPUs starts: the memory it will take, and if that is too much, what to change.

    None on a machine without GPUs that plans know.
    """
    here = in_this_machine()
    if here is None:
        return None
    world, card = int(os.environ.get("WORLD_SIZE", 1)), here[1]
    if world % (config.engine.parallel.tp * config.engine.parallel.cp):
        return None  # the engine refuses
    setting = setting_of(config, world, card)
    needed = memory(setting)
    most = f"{needed.total / GIB:.1f} GiB of {card.gib:.1f}"
    line = f"memory a GPU, counted: {most}, at its fullest while {needed.fullest}"
    if needed.total <= card.gib * GIB:
        return line
    best = next(layouts(setting, card), None)
    would = [_flags(best)] if best is not None else remedies(setting, card)
    return f"{line}: TOO MUCH. Would fit: {'; '.join(would) or 'nothing that plans know'}"


def machine(config: Planned) -> tuple[int, Card | None]:
    """(processes, their GPU) to plan for: what --gpu names, or what is here, or eight H100 for a large model, one for
    a small one; None for the CPU, where toys train."""
    if config.gpu is not None:
        return named(config.gpu)
    here, told = in_this_machine(), os.environ.get("WORLD_SIZE")
    parallel, size = config.engine.parallel, config.model.num_parameters
    if here is not None:
        return int(told or here[0]), here[1]
    if size < TOY_PARAMETERS:
        return max(int(told or 1), parallel.tp * parallel.cp), None
    return int(told or (NODE if size >= LARGE_PARAMETERS else 1)), CARDS["H100"]


def setting_of(config: Planned, world: int, card: Card | None) -> Setting:
    """A run's step on `world` processes. ValueError if these do not divide into its layout."""
    device = "cpu" if card is None else "cuda"
    setting = Setting(config.model, config.engine, config.work(), world, config.max_tokens, device)
    return replace(setting, components=component_bytes(config.components, setting.size))


def layouts(setting: Setting, card: Card) -> Iterator[Setting]:
    """The ways to split a step over these GPUs that fit, fastest first; of each split the fastest way to keep less."""
    fitting: dict[Any, tuple[float, Setting]] = {}
    for other in _variants(setting):
        if not fits(other, card, MARGIN):
            continue
        key, time = (other.engine.parallel, other.weights.quantize), sum(seconds(other, card).values())
        if key not in fitting or time < fitting[key][0]:
            fitting[key] = (time, other)
    yield from (other for _, other in sorted(fitting.values(), key=lambda found: found[0]))


def _variants(setting: Setting) -> Iterator[Setting]:
    heads, engine = setting.model.num_attention_heads, setting.engine
    sizes = [n for n in (1, 2, 4, 8, 16) if setting.world % n == 0]
    splits = [(tp, cp) for tp in sizes for cp in sizes if tp <= NODE and heads % (tp * cp) == 0]
    kinds = ("none", "nf4", "int8", "fp8") if engine.lora else ("none",)
    for tp, cp in splits:
        if setting.world % (tp * cp) or setting.world // (tp * cp) > setting.work.samples:
            continue
        for sp in (True, False) if tp > 1 else (False,):
            for again in ("none", "block") if tp > 1 or engine.compile else ("none", "selective", "block"):
                for host in (False, True):
                    for kind in kinds if tp == 1 else ("none",):
                        split = dict(parallel=ParallelConfig(tp, cp, sp), quantize=kind)
                        split["swap_blocks"] = engine.swap_blocks if kind != "none" else 0
                        other = replace(engine, recompute=again, average_on_host=host, **split)
                        yield replace(setting, engine=other)


def remedies(setting: Setting, card: Card) -> list[str]:
    """What would make a step fit that does not in any layout."""
    found = []
    for times in (2, 4, 8, 16):
        more = _unsplit(setting, setting.world * times)
        if (best := next(layouts(more, card), None)) is not None:
            found.append(f"{more.world} x {card.name} ({_flags(best)}, {memory(best).total / GIB:.0f} GiB)")
            break
    if setting.engine.lora is None:
        adapted = _unsplit(setting, setting.world)
        adapted = replace(adapted, engine=adapted.engine.with_lora(LoRAConfig()))
        if (best := next(layouts(adapted, card), None)) is not None:
            found.append(f"--lora-rank {LoRAConfig().rank} {_flags(best)} ({memory(best).total / GIB:.0f} GiB)")
    elif setting.engine.quantize != "none" and setting.engine.swap_blocks < setting.model.num_layers:
        away = replace(setting.engine, swap_blocks=setting.model.num_layers)
        if (best := next(layouts(replace(setting, engine=away), card), None)) is not None:
            found.append(f"--swap-blocks {away.swap_blocks} {_flags(best)} ({memory(best).total / GIB:.0f} GiB)")
    each = setting.work.img + setting.work.txt
    if setting.max_tokens > each and any(layouts(replace(setting, max_tokens=each), card)):
        found.append(f"--max-tokens {each}")
    return found


def _unsplit(setting: Setting, world: int) -> Setting:
    return replace(setting, world=world, engine=replace(setting.engine, parallel=ParallelConfig()))


def _flags(setting: Setting) -> str:
    """A layout as the flags that choose it."""
    engine, parallel = setting.engine, setting.engine.parallel
    words = [f"--tp {parallel.tp}"] if parallel.tp > 1 else []
    words += ["--sp"] * setting.place.sp + [f"--cp {parallel.cp}"] * (parallel.cp > 1)
    words += [f"--recompute {engine.recompute}"] * (engine.recompute != "none")
    words += ["--average-on-host"] * engine.average_on_host
    words += [f"--quantize {engine.quantize}"] * (engine.quantize != "none")
    words += [f"--swap-blocks {engine.swap_blocks}"] * (engine.swap_blocks > 0)
    return " ".join(words) or "no flags"


def _step(setting: Setting, steps: int, card: Card | None) -> list[str]:
    work, w, counted = setting.work, setting.weights, flops(setting)
    where = ("process" if setting.world == 1 else "processes") if card is None else f"x {card.name}"
    parallel = setting.engine.parallel
    split = f"tp {parallel.tp}{' with sp' if setting.place.sp else ''} x cp {parallel.cp} x dp {setting.dp}"
    lines = [
        ("layout", f"{setting.world} {where} = {split}, microbatches of {setting.batch.samples} {work.unit}"),
        ("trained", f"{w.trained():,.0f} of {w.number():,.0f} parameters"),
        ("a step", f"{work.samples:,} {work.unit} of {work.img} image + about {work.txt} text tokens; {steps:,} steps"),
        ("FLOPs", f"{counted.total():.3g} a step: {_sum(counted, counted.total() / 100, ' %')}"),
    ]
    if card is not None:
        times, sent = seconds(setting, card), traffic(setting)
        rate, links = f"{MFU:.0%} of the GPU's bf16 rate", f"{LINK_USE:.0%} of its links' and memory's"
        if setting.world > 1:
            lines.append(("sent", f"{_number(sent.total() / GIB)} GiB a GPU and step: {_sum(sent, GIB)}"))
        lines += [
            ("time", f"{_number(sum(times.values()))} s a step: {_sum(times, 1)}"),
            ("", f"assumed, not measured: {rate}, {links}"),
        ]
    return _aligned(lines)


def _memory(setting: Setting, card: Card | None) -> list[str]:
    needed = memory(setting)
    unit, scale = ("GiB", GIB) if needed.total >= GIB else ("MiB", 2**20)
    total = f"{needed.total / scale:.1f} {unit}"
    if card is not None:
        total += f" of {card.gib:.1f}"
    total += f" a process at its fullest, while {needed.fullest}"
    if card is not None and not fits(setting, card, MARGIN):
        total += f": does not fit with {MARGIN:.0%} free"
    return _aligned([("memory", total), ("", _sum(needed.parts, scale))])


def _layouts(setting: Setting, card: Card) -> list[str]:
    rows = list(islice(layouts(setting, card), ROWS))
    if not rows:
        would = "; ".join(remedies(setting, card)) or "nothing that plans know"
        return [f"no layout fits on {setting.world} x {card.name}. Would fit: {would}"]
    head = f"layouts that leave {MARGIN:.0%} of the memory free, by predicted seconds a step:"
    times = [_number(sum(seconds(s, card).values())) for s in rows]
    return [head] + [
        f"  {time:>7} s {memory(s).total / GIB:6.1f} GiB  dp {s.dp:<3} {_flags(s)}"
        for s, time in zip(rows, times, strict=True)
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _sum(parts: Mapping[str, float], scale: float, unit: str = "") -> str:
    return " + ".join(f"{_number(value / scale)}{unit} {name}" for name, value in parts.items() if value)


def _aligned(lines: list[tuple[str, str]]) -> list[str]:
    wrapped = [(name, textwrap.wrap(text, 106)) for name, text in lines]
    return [f"{name if i == 0 else '':8}  {text}" for name, texts in wrapped for i, text in enumerate(texts)]
