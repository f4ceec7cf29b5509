"""GPUs that plans know, from their makers' data sheets, and which of them are in this machine."""

import os
import re
import subprocess
from dataclasses import dataclass, replace
from itertools import takewhile

from command_line import UserError

GIB = 2**30
NODE = 8
"""GPUs that a node's fast links join."""
BETWEEN_NODES = 50e9
"""Bytes a second and GPU between nodes: 400 Gb/s."""


@dataclass(frozen=True)
class Card:
    """A GPU, as its maker describes it."""

    name: str
    flops: float
    """bf16, dense, with fp32 accumulation, a second."""
    gib: float
    """Memory that programs see."""
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To the other GPUs of its node, bytes a second and direction."""


CARDS = {
    card.name: card
    for card in (
        Card("A100", 312e12, 79.2, 2.04e12, 300e9),  # 80 GB, SXM
        Card("H100", 989e12, 79.2, 3.35e12, 450e9),  # SXM
        Card("H200", 989e12, 139.8, 4.8e12, 450e9),
        Card("B200", 2250e12, 178.4, 8.0e12, 900e9),
        Card("L40S", 362e12, 44.5, 0.86e12, 32e9),  # PCIe 4.0, as those below
        Card("RTX4090", 165e12, 23.6, 1.01e12, 25e9),
        Card("RTX4080", 97e12, 15.7, 0.72e12, 25e9),
        Card("RTX3090", 71e12, 23.6, 0.94e12, 25e9),
        Card("RTX3060", 25e12, 11.7, 0.36e12, 25e9),
    )
}


def named(text: str) -> tuple[int, Card]:
    """(number, card) of "8xH100", or of "H100" for one. UserError for what is none."""
    match = re.fullmatch(r"(?:(\d+)\s*[xX]\s*)?(\w+)", text.strip())
    if match is None or match[2].upper() not in CARDS or match[1] == "0":
        raise UserError(f"--gpu {text}: give a number and a card as in 8xH100; cards are {', '.join(CARDS)}")
    return int(match[1] or 1), CARDS[match[2].upper()]


def recognised(name: str, gib: float) -> Card | None:
    """The card that a driver calls `name` and that has so much memory; None if plans do not know it."""
    plain = re.sub(r"\W", "", name).upper()
    found = next((card for card in CARDS.values() if card.name in plain), None)
    return None if found is None else replace(found, gib=gib)


def in_this_machine() -> tuple[int, Card] | None:
    """(number, card) of this machine's GPUs, as nvidia-smi tells; None without any that plans know."""
    rows = [row.rsplit(",", 1) for row in _told("name,memory.total")]
    card = recognised(rows[0][0], float(rows[0][1]) / 1024) if rows else None
    return None if card is None else (len(rows), card)


def count_gpus() -> int:
    """How many GPUs a process sees here, whether plans know them or not."""
    here, seen = len(_told("name")), os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return here
    return min(here, len(list(takewhile(lambda name: name.strip() not in ("", "-1"), seen.split(",")))))


def _told(fields: str) -> list[str]:
    """A line from nvidia-smi for each GPU; none without it."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
