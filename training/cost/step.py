"""A training step's FLOPs, a rank's memory, what it sends, and the seconds that this takes under stated assumptions."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

from model.config import MMDiTConfig
from training.cost.activations import FP32, Kept, Microbatch, Place, kept
from training.cost.cards import BETWEEN_NODES, GIB, NODE, Card
from training.cost.weights import AFTER_ATTENTION, STREAMS, Weights
from training.engine.config import EngineConfig

MFU, LINK_USE = 0.4, 0.7
"""Assumed: the shares of a card's bf16 rate that model FLOPs get, and of its links and memory that transfers get."""
HOST_LINK = 10e9
"""Assumed: bytes a second and GPU to the host's memory and through its update."""
QWEN_TEXT_ENCODER, QWEN_VAE = 7_747_169_280, 126_892_531
"""Parameters of Qwen2.5-VL-7B without the head that no prompt needs, and of Qwen-Image's VAE."""


@dataclass(frozen=True)
class Work:
    """What a step asks of the model, over all ranks; its samples are taken to be alike."""

    samples: int
    """Forward and backward passes of one sample each."""
    img: int
    """Tokens of a sample's picture."""
    txt: int
    """Tokens of its prompt, assumed."""
    unit: str = "samples"
    references: int = 0
    """Further forward passes of each sample, by frozen policies."""
    draws: int = 0
    """Forward passes of a sample each that draw pictures to learn from."""
    fixed: int = 0
    """Frozen copies of the trained weights."""
    following: int = 0
    """Copies that follow them, the moving average apart."""
    remembered: float = 0.0
    """Bytes that pictures drawn in a step take until the next, over all data-parallel ranks."""
    encodes: bool = True
    """Whether prompts are encoded beside the model."""


@dataclass(frozen=True)
class Setting:
    """A step of `work` by `engine` over `world` processes, with at most `max_tokens` in a microbatch."""

    model: MMDiTConfig
    engine: EngineConfig
    work: Work
    world: int
    max_tokens: int
    device: str = "cuda"
    components: tuple[float, float] = (2.0 * QWEN_TEXT_ENCODER, 2.0 * QWEN_VAE)
    """Bytes of text encoder and VAE."""

    def __post_init__(self):
        parallel = self.engine.parallel
        if self.world % (parallel.tp * parallel.cp):
            raise ValueError(f"{self.world} processes do not divide over tp {parallel.tp} x cp {parallel.cp}")

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.model, self.engine.lora, self.engine.quantize, self.engine.swap_blocks)

    @property
    def dp(self) -> int:
        return self.world // (self.engine.parallel.tp * self.engine.parallel.cp)

    @property
    def size(self) -> int:
        """Bytes of weights and activations."""
        bf16 = self.engine.dtype == "bfloat16" or (self.engine.dtype == "auto" and self.device == "cuda")
        return 2 if bf16 else FP32

    @property
    def place(self) -> Place:
        return Place(self.device, self.size, self.engine.parallel)

    @property
    def mine(self) -> int:
        """Samples of the rank with the most."""
        return ceil(self.work.samples / self.dp)

    @property
    def batch(self) -> Microbatch:
        """The largest microbatch."""
        each = self.work.img + self.work.txt
        return Microbatch(max(1, min(self.mine, self.max_tokens // each)), self.work.img, self.work.txt)

    @cached_property
    def kept(self) -> Kept:
        return kept(self.weights, self.batch, self.place, self.engine.recompute)


def flops(setting: Setting) -> Counter:
    """FLOPs of a step by part, over all ranks, multiply-adds counted twice: products of matrices and attention."""
    work, (forward, backward, blocks) = setting.work, sample_flops(setting.weights, setting.work.img, setting.work.txt)
    again = blocks if setting.engine.recompute == "block" else 0
    parts = {
        "forward": work.samples * forward,
        "backward": work.samples * backward,
        "recomputation": work.samples * again,
        "frozen policies": work.samples * work.references * forward,
        "drawing": work.draws * forward,
    }
    return Counter({name: value for name, value in parts.items() if value})


@cache
def sample_flops(w: Weights, img: int, txt: int) -> tuple[int, int, int]:
    """FLOPs of one sample: (forward, backward, that part of forward that blocks do).

    A layer's backward pass is a product for its input's gradient and one for its weight's; frozen weights need none of
    the latter, and what lies before the first adapter neither.
    """
    forward = backward = blocks = 0
    for name, layer in w.linears.items():
        if name in w.unread:
            continue
        rows, reached = _rows(name, img, txt), _reached(w, name)
        here = product = 2 * layer.inputs * layer.outputs * rows
        backward += product * (reached + (w.lora is None))
        if name in w.adapted:
            a, b = (2 * w.lora.rank * n * rows for n in (layer.inputs, layer.outputs))
            here += a + b
            backward += a * (1 + reached) + 2 * b
        forward += here
        blocks += here if name.startswith("blocks.") else 0
    attention = 4 * (img + txt) ** 2 * w.model.width
    for number in range(w.model.num_layers):
        forward, blocks = forward + attention, blocks + attention
        backward += 2 * attention * (number > w.first_adapted or bool(_before_attention(number) & w.adapted))
    return forward, backward, blocks


def policy_work(w: Weights | None, inputs: Any) -> tuple[int, int]:
    """Tokens of a pack of samples, its tails apart, and FLOPs of one forward and backward pass of it.

    Of a model that is no MMDiT, what its inputs say: 0 and `flops`, if they have any.
    """
    if w is None:
        return 0, getattr(inputs, "flops", 0)
    sizes = [(s.joint - s.txt, s.txt) for s in inputs.pack.shapes]
    return sum(map(sum, sizes)), sum(sum(sample_flops(w, *size)[:2]) for size in sizes)


def _rows(name: str, img: int, txt: int) -> int:
    """Rows that a layer multiplies for one sample."""
    if name.endswith("mod") or name.startswith("time."):
        return 1
    return txt if ".txt." in name or name == "txt_in" else img


def _before_attention(block: int) -> set[str]:
    return {f"blocks.{block}.{stream}.{layer}" for stream in STREAMS for layer in ("q", "k", "v", "mod")}


def _reached(w: Weights, name: str) -> bool:
    """Whether the input of a layer has gradients."""
    if name in ("img_in", "time.linear_1") or (name == "txt_in" and w.lora is not None):
        return False
    if w.first_adapted < 0:
        return True
    if name.endswith("mod") or name.startswith("time."):
        return False
    if not name.startswith("blocks."):
        return w.first_adapted < w.model.num_layers
    _, block, stream, layer = name.split(".")
    if int(block) > w.first_adapted or layer in ("q", "k", "v"):
        return int(block) > w.first_adapted or f"blocks.{block}.{stream}.mod" in w.adapted
    before = AFTER_ATTENTION.index(layer)
    own = {f"blocks.{block}.{stream}.{x}" for x in AFTER_ATTENTION[:before]}
    return bool((own | _before_attention(int(block))) & w.adapted)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part: what is always there, and what comes on top of it at one moment or another."""

    always: dict[str, float]
    moments: dict[str, dict[str, float]]

    @property
    def fullest(self) -> str:
        """The moment at which there is most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """What is there at that moment."""
        return self.always | self.moments[self.fullest]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory(setting: Setting) -> Memory:
    """What a rank holds.

    Gradients are a buffer of fp32 for all weights of the rank that train, whatever the data-parallel size (Megatron's
    DDP with its distributed optimizer); masters, moments and averages are in slices over data- and context-parallel
    ranks. Left out: the driver's and the libraries' own memory, fragments, activations of the VAE and text encoder.
    """
    w, work, engine = setting.weights, setting.work, setting.engine
    tp, slices, size = engine.parallel.tp, setting.dp * engine.parallel.cp, setting.size
    trained = w.trained(tp)
    average = 0.0 if engine.average_on_host and setting.device == "cuda" else FP32 * trained / slices
    encoder, vae = setting.components
    drawn = {"drawn pictures": work.remembered / setting.dp}
    always = {
        "weights": w.stored_bytes(tp, size),
        "gradients": FP32 * trained,
        "optimizer": (2 * FP32 + (FP32 if size < FP32 else 0)) * trained / slices,
        "moving averages": (1 + work.following) * average,
        "fixed copies": work.fixed * size * trained,
        "VAE": vae,
    }
    found = setting.kept
    there = drawn | {"copies that follow": work.following * size * trained}
    training = there | {
        "activations": found.forward,
        "one block's backward pass": found.again + found.working,
    }
    update = {"weights before an update": FP32 * trained / slices}  # by which some are measured (engine/health.py)
    if engine.optimizer.muon_lr is not None:  # slices, and whole ones of as many
        update["Muon's matrices"] = (2 if setting.world > 1 else 1) * size * trained / slices
    moments = {
        "training": training,
        "updating": there | update,
        "sampling": drawn | {"moving average, whole": size * trained, "activations": forward_only(setting)},
        "encoding prompts": {"text encoder": encoder},
    }
    if not work.encodes:
        del moments["encoding prompts"]
    return Memory(_there(always), {name: _there(parts) for name, parts in moments.items()})


def _there(parts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if value}


def forward_only(setting: Setting) -> float:
    """About the temporaries of a forward pass that keeps nothing: both streams, and the widest operation's."""
    place, tokens = setting.place, min(setting.max_tokens, setting.batch.tokens)
    own, whole, d = place.own(tokens), place.whole(tokens), setting.model.width
    return setting.size * d * (4 * own + 8 * whole / place.tp + (whole if place.sp else 0))


def traffic(setting: Setting) -> Counter:
    """Bytes that a rank sends in a step, by what for."""
    w, parallel, size = setting.weights, setting.engine.parallel, setting.size
    d, layers, slices = setting.model.width, setting.model.num_layers, setting.dp * parallel.cp
    tokens = setting.mine * (setting.work.img + setting.work.txt) / parallel.cp
    trained, found, others = w.trained(parallel.tp), Counter(), lambda n: (n - 1) / n
    found["gradients"] = FP32 * trained * others(slices)
    found["updated weights"] = size * trained * others(slices)
    if setting.engine.optimizer.muon_lr is not None:  # slices to where matrices are whole, and back
        found["Muon"] = 2 * size * trained / slices * others(setting.world)
    again = setting.engine.recompute == "block"
    forward = 1 + again + setting.work.references + setting.work.draws / setting.work.samples
    one = size * tokens * d * layers * others(parallel.tp)  # a gathering, or a scattering, of all tokens
    if setting.place.sp:  # q, k, v and MLP gather, two sums scatter; then the same again, and for weights once more
        found["tensor parallel"] = one * (6 * forward + (10 if w.lora is None else 6))
    else:  # a sum over ranks is a scattering and a gathering
        found["tensor parallel"] = one * 2 * (2 * forward + 4)
    heads = size * tokens * 4 * d / parallel.tp * layers * others(parallel.cp)  # q, k, v there, the result back
    found["context parallel"] = heads * (forward + 1)
    return found


def seconds(setting: Setting, card: Card) -> dict[str, float]:
    """Predicted seconds of a step by part: MFU and LINK_USE are assumed. Reducing gradients hides behind the last
    microbatch's backward pass; nothing else hides."""
    counted, sent = flops(setting), traffic(setting)
    share = setting.mine * setting.dp / setting.work.samples / setting.world  # the slowest rank's, of all FLOPs
    products = counted.total() * share / (card.flops * MFU)
    link = card.link * LINK_USE
    across = (card.link if setting.world <= NODE else min(card.link, BETWEEN_NODES)) * LINK_USE
    last = counted["backward"] * share / (card.flops * MFU) * setting.batch.samples / setting.mine
    w, parallel = setting.weights, setting.engine.parallel
    updated = w.trained(parallel.tp) / (setting.dp * parallel.cp)
    touched = updated * (11 * FP32 + setting.size) + FP32 * w.trained(parallel.tp) * 2
    return {
        "products": products,
        "tensor and context parallel": (sent["tensor parallel"] + sent["context parallel"]) / link,
        "data parallel": max(0.0, sent["gradients"] / across - last)
        + (sent["updated weights"] + sent["Muon"]) / across,
        "optimizer": touched / (card.bandwidth * LINK_USE),
        "averages on the host": FP32 * updated / HOST_LINK if setting.engine.average_on_host else 0.0,
    }


def fits(setting: Setting, card: Card, margin: float) -> bool:
    """Whether a rank's memory fits on a card of which the share `margin` stays free."""
    return memory(setting).total <= (1 - margin) * card.gib * GIB


def component_bytes(folder: Path | None, size: int) -> tuple[float, float]:
    """Bytes of the text encoder and the VAE of a components folder, `size` for each of their parameters; of a folder
    that is not here, a hub id, those of Qwen-Image."""
    if folder is None:
        return 0.0, 0.0
    if not Path(folder).is_dir():
        return float(size * QWEN_TEXT_ENCODER), float(size * QWEN_VAE)
    return size * _parameters(Path(folder) / "text_encoder"), size * _parameters(Path(folder) / "vae")


def _parameters(folder: Path) -> float:
    """Parameters in the safetensors files of a folder, by their headers; the head for next tokens is not loaded."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        total += sum(prod(shape) for name, shape in shapes.items() if not name.startswith("lm_head."))
    return float(total)
