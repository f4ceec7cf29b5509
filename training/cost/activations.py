"""What autograd keeps of a forward pass, counted from the code of `model/` operation by operation.

Counted is the eager form: compiled blocks keep about as much, or less. Tests compare with what torch keeps.
Shape legend: D width, W = D / tp the part of it in a tensor-parallel region, R rows of a modulation table.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from training.cost.weights import STREAMS, Weights
from training.engine.config import ParallelConfig

SHORT_RUN = 128
"""Tokens with one modulation row below which rows are spread over tokens (`model.fused.MIN_RUN`)."""
LONGEST_PRODUCT = 2048
"""Tokens up to which bf16 attention on a CPU keeps its weights (`model.attention.LONGEST_PRODUCT`)."""
FP32 = 4


@dataclass(frozen=True)
class Microbatch:
    """A pack of samples that are all alike: tokens of image (references included) and of text of each."""

    samples: int
    img: int
    txt: int

    @property
    def tokens(self) -> int:
        return self.samples * (self.img + self.txt)

    def of(self, stream: str) -> int:
        """Tokens of a stream."""
        return self.samples * getattr(self, stream)


@dataclass(frozen=True)
class Place:
    """Where a forward pass runs."""

    device: Literal["cpu", "cuda"]
    size: int
    """Bytes of an activation: 2 in bf16, 4 in fp32."""
    parallel: ParallelConfig = ParallelConfig()

    @property
    def tp(self) -> int:
        return self.parallel.tp

    @property
    def sp(self) -> bool:
        return self.parallel.sp and self.tp > 1

    def whole(self, tokens: float) -> float:
        """Tokens that a rank holds in the tensor-parallel regions."""
        return tokens / self.parallel.cp

    def own(self, tokens: float) -> float:
        """Tokens that it holds between them."""
        return self.whole(tokens) / (self.tp if self.sp else 1)

    def multiplies(self, batch: Microbatch) -> bool:
        """Whether attention is written as two products, which keep its weights."""
        return self.device == "cpu" and self.size == 2 and batch.img + batch.txt <= LONGEST_PRODUCT

    def rows(self, batch: Microbatch, stream: Literal["img", "txt", "out"]) -> Literal["samples", "runs", "product"]:
        """How a stream takes its modulation rows: see `model.fused.Rows` (each, runs, one_hot)."""
        if self.sp or self.parallel.cp > 1:
            return "product"
        if (batch.txt if stream == "txt" else batch.img) >= SHORT_RUN:
            return "runs"
        return "samples" if self.device == "cpu" and batch.samples > 1 else "product"


@dataclass(frozen=True)
class Kept:
    """Bytes by part, of one microbatch on one rank."""

    blocks: Counter
    """From the end of the forward pass until the backward pass reaches each block."""
    ends: Counter
    """Likewise, before the first and after the last block."""
    again: float
    """What recomputation makes of one block, on top of what was kept of it."""
    working: float
    """About what the backward pass of one block takes for itself."""

    @property
    def forward(self) -> float:
        """After the forward pass."""
        return self.blocks.total() + self.ends.total()

    @property
    def peak(self) -> float:
        return self.forward + self.again + self.working


def kept(weights: Weights, batch: Microbatch, place: Place, recompute: str = "none") -> Kept:
    """What one pass over `batch` keeps, with blocks recomputed as `EngineConfig.recompute` says."""
    blocks, again = Counter(), 0.0
    for number in range(weights.model.num_layers):
        number = _like(weights, number)
        everything = here = _block(weights, batch, place, number)
        if recompute != "none":
            here = Counter(residual=place.size * weights.model.width * place.own(batch.tokens))
        if recompute == "selective":
            here = here + _selected(weights, batch, place, number)
        blocks += here
        again = max(again, everything.total() - here.total())
    return Kept(blocks, _ends(weights, batch, place), again, _working(weights, batch, place))


def _like(weights: Weights, number: int) -> int:
    """The first block that keeps what this one does."""
    named = weights.lora is not None and any(t.startswith("blocks.") for t in weights.lora.targets)
    return number if named or number == weights.model.num_layers - 1 else min(number, 1)


@dataclass
class _Stream:
    """One stream of one block, as its operations keep bytes; arguments say what has gradients."""

    weights: Weights
    batch: Microbatch
    place: Place
    number: int
    name: str
    found: Counter = field(default_factory=Counter)

    def __post_init__(self):
        tokens = self.batch.of(self.name)
        self.own, self.whole = self.place.own(tokens), self.place.whole(tokens)
        self.width = self.weights.model.width
        self.wide, self.heads = self.width / self.place.tp, self.weights.model.num_attention_heads / self.place.tp
        self.rows = self.place.rows(self.batch, self.name)
        self.tables = self.trains("mod") or self.weights.first_adapted < 0
        """Whether modulation has gradients."""
        self.ends = self.number == self.weights.model.num_layers - 1 and self.name == "txt"
        """Whether it ends at attention."""

    def trains(self, *layers: str) -> bool:
        return any(self.weights.trains(f"blocks.{self.number}.{self.name}.{layer}") for layer in layers)

    def adapted(self, *layers: str) -> int:
        return 0 if self.weights.lora is None else sum(self.trains(layer) for layer in layers)

    def keep(self, part: str, elements: float, size: int | None = None) -> None:
        self.found[part] += elements * (size or self.place.size)

    def modulate(self, x: bool, *layers: str) -> bool:
        """LayerNorm and modulation of x before `layers`; whether the result has gradients."""
        if x or (self.rows == "runs" and self.tables):
            self.keep("residual", self.own * self.width)
            self.keep("modulate", 2 * self.own, FP32)  # mean and 1 / std
        if self.rows != "runs" and self.tables:
            self.keep("modulate", self.own * self.width)  # the normalised tokens
        if self.rows == "product" and x:
            self.keep("modulate", self.own * self.width)  # 1 + scale of each token
        elif self.rows != "product" and (x or self.tables):
            self.keep("modulate", self.batch.samples * self.width)  # 1 + scale
        if self.trains(*layers):
            self.keep("linears", self.own * self.width)
        if self.adapted(*layers):
            self.keep("adapters", self.own * self.weights.lora.rank * self.adapted(*layers))
        return x or self.tables

    def norm_rotate(self, x: bool) -> None:
        if x:
            self.keep("norm_rotate", self.whole * self.wide)
            self.keep("norm_rotate", self.whole * self.heads, FP32)  # 1 / root of the mean square

    def gate(self, y: bool) -> None:
        """The gated residual of y, which an output projection gives."""
        if self.tables:
            self.keep("gates", self.own * self.width)  # y
        if self.rows == "product" and y:
            self.keep("gates", self.own * self.width)  # the gate of each token


@cache
def _block(weights: Weights, batch: Microbatch, place: Place, number: int) -> Counter:
    """Bytes by part that the forward pass of one block keeps."""
    streams = [_Stream(weights, batch, place, number, name) for name in STREAMS]
    behind, attends = number > weights.first_adapted, False
    for s in streams:
        if s.rows != "product" and (behind or s.tables):
            s.keep("modulate", batch.samples * 6 * s.width)  # the table
        x = s.modulate(behind, "q", "k", "v")
        for layer in ("q", "k"):
            s.norm_rotate(x or s.trains(layer))
        attends = attends or x or s.trains("q", "k", "v")
    if attends:
        streams[0].found += _attention(weights, batch, place)
    joined = place.device == "cpu" and batch.samples == 1 and batch.txt % 16 == 0 and place.parallel.cp == 1
    joined = joined and not place.multiplies(batch)
    if any(s.trains("out") for s in streams) and not joined:  # of both streams, permuted
        streams[0].keep("linears", place.whole(batch.tokens) * streams[0].wide)
    for s in streams:
        if s.ends:
            continue
        y = attends or s.trains("out")
        s.gate(y)
        h = s.modulate(behind or y or s.tables, "mlp_in") or s.trains("mlp_in")
        if h:
            s.keep("gelu", s.whole * 4 * s.wide)
        if s.trains("mlp_out"):
            s.keep("linears", s.whole * 4 * s.wide)
        if adapted := s.adapted("out", "mlp_out"):
            s.keep("adapters", s.own * weights.lora.rank * adapted)
        s.gate(h or s.trains("mlp_out"))
    return sum((s.found for s in streams), Counter())


def _attention(weights: Weights, batch: Microbatch, place: Place) -> Counter:
    """Queries, keys, values; the result and, for each token and head, the logarithm of a sum: or attention's weights,
    where a single sample's queries, keys and values lie in memory of twice their size."""
    heads, tokens = weights.model.num_attention_heads / place.tp, place.whole(batch.tokens)
    channels = heads * weights.model.attention_head_dim
    if place.multiplies(batch):
        qkv = 3 * channels * (2 if batch.samples == 1 else 1)
        return Counter(attention=place.size * tokens * (qkv + heads * (batch.img + batch.txt)))
    return Counter(attention=tokens * (place.size * 4 * channels + FP32 * heads))


@cache
def _selected(weights: Weights, batch: Microbatch, place: Place, number: int) -> Counter:
    """Results that selective recomputation keeps of a block (`training.engine.blocks`), torch's layers assumed."""
    found = Counter()
    for s in (_Stream(weights, batch, place, number, name) for name in STREAMS):
        column = dict(q=s.wide, k=s.wide, v=s.wide) | ({} if s.ends else dict(mlp_in=4 * s.wide))
        row = {} if s.ends else dict(out=s.width, mlp_out=s.width)  # not yet summed over ranks: all tokens of a region
        s.keep("linears", s.whole * sum((column | row).values()) + batch.samples * 6 * s.wide)
        if s.rows == "product":
            s.keep("modulate", s.own * s.width * (2 if s.ends else 6))
        for layer, outputs in (column | row).items():
            if s.adapted(layer):
                a, b = (s.whole, s.own) if layer in row else (s.own, s.whole)
                s.keep("adapters", a * weights.lora.rank + b * outputs)
        found += s.found
    if not place.multiplies(batch):
        tokens, model = place.whole(batch.tokens), weights.model
        found["attention"] += tokens / place.tp * (place.size * model.width + FP32 * model.num_attention_heads)
    return found


def _ends(weights: Weights, batch: Microbatch, place: Place) -> Counter:
    """Bytes outside of the blocks: both input layers, the output layer, the tables of rotations and rows."""
    model, size, trains = weights.model, place.size, weights.trains
    img, txt = (place.own(batch.of(stream)) for stream in STREAMS)
    found = Counter(rotations=FP32 * model.attention_head_dim * place.whole(batch.tokens))
    cast = size < FP32  # into bf16; in fp32 what is kept is what was given
    if trains("img_in"):
        found["linears"] += size * img * model.in_channels * cast
    if trains("txt_in"):  # the states and the normalised states
        found["linears"] += size * txt * model.joint_attention_dim * (1 + cast)
    found["residual"] += img * (size * model.width + 2 * FP32)
    product = place.rows(batch, "out") == "product"
    normalised = trains("output.mod") and place.rows(batch, "out") != "runs"
    found["modulate"] += size * img * model.width * (product + normalised)
    if trains("output.proj"):
        found["linears"] += size * img * model.width
    for stream in STREAMS:
        if place.rows(batch, stream) == "product":
            found["modulate"] += size * place.own(batch.of(stream)) * batch.samples
    return found


def _working(weights: Weights, batch: Microbatch, place: Place) -> float:
    """About the largest set of temporaries of a block's backward pass: gradients of the MLP, or of a rotation in fp32.

    Under sequence parallelism also the gathered tokens and their gradient, with quantised weights one of them unpacked.
    """
    tokens = max(batch.of(stream) for stream in STREAMS)
    width, wide = weights.model.width, place.whole(tokens) * weights.model.width / place.tp
    mlp = place.size * (4 * wide + 5 * place.own(batch.tokens) * width)
    rotation = 6 * FP32 * wide if place.device == "cuda" else 0
    gathered = 2 * place.size * place.whole(tokens) * width if place.sp else 0
    unpacked = 0 if weights.quantize == "none" else place.size * 4 * width**2 / place.tp
    return max(mlp, rotation) + gathered + unpacked
