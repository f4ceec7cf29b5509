"""Steps of the engine, and the order of samples that both contestants take."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count

import torch
from diffusers import QwenImageTransformer2DModel

from command_line import UserError
from data_pipeline.dataset import EncodedDataset
from data_pipeline.loader import Loader
from data_pipeline.order import permutation
from data_pipeline.sample import EncodedSample
from model.config import MMDiTConfig
from model.diffusers_io.names import from_diffusers
from model.packing import ModelInputs
from training.engine.config import EngineConfig
from training.engine.step import Engine
from training.flow_matching import VelocityMSE
from training.randomness import Randomness


class FullBatches:
    """Samples, for ever, of which each `size` in a row have pictures of one size: a sampler by bucket.

    UserError if no bucket has as many.
    """

    first = None

    def __init__(self, dataset: EncodedDataset, size: int):
        self.size = size
        self.buckets = list(zip(dataset.column("height").tolist(), dataset.column("width").tolist(), strict=True))
        if max(Counter(self.buckets).values()) < size:
            raise UserError(f"no {size} pictures are of one size: lower --batch, or raise --samples")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (index, epoch); a bucket gives one out as soon as it is full."""
        waiting = defaultdict(list)
        for epoch in count():
            for index in permutation(len(self.buckets), "step", epoch).tolist():
                bucket = self.buckets[index]
                waiting[bucket].append((index, epoch))
                if len(waiting[bucket]) == self.size:
                    yield waiting.pop(bucket)

    def places(self, cursor: None, stop: object) -> Iterator[tuple[int, int, None]]:
        """The same as an order for the loader (`data_pipeline.order.Order`)."""
        return ((index, epoch, None) for batch in self for index, epoch in batch)


class Counted(VelocityMSE):
    """Counts the tokens that the model runs on."""

    tokens = 0

    def prepare(self, batch: list[EncodedSample], rng: Randomness, align: int) -> tuple[ModelInputs, torch.Tensor]:
        inputs, target = super().prepare(batch, rng, align)
        even = None if torch.cuda.is_available() else inputs.pack.evened
        pack = inputs.pack if even is None else even[0]
        self.tokens += len(pack.txt_pos) + len(pack.img_pos)
        return inputs, target


class Ours:
    """The engine on the loader's steps of `accumulate` batches of `batch` samples, over all ranks."""

    def __init__(
        self,
        shape: MMDiTConfig,
        settings: EngineConfig,
        dataset: EncodedDataset,
        batch: int,
        accumulate: int,
        max_tokens: int,
    ):
        self.engine = Engine(shape, settings)
        weights = diffusers_model(shape, self.engine.dtype).state_dict()
        self.engine.load_weights((from_diffusers(name), value) for name, value in weights.items())
        self.loader = Loader(
            dataset, batch * accumulate, self.engine.dp_rank, self.engine.dp_size, max_tokens=max_tokens,
            order=FullBatches(dataset, batch), width=shape.width,
        )  # fmt: skip
        self.algorithm, self.rng = Counted(), Randomness(0)
        self.losses: list[float] = []
        """Of each step, a picture's."""

    @property
    def tokens(self) -> int:
        """That the model ran on, on this rank, with tails and padding."""
        return self.algorithm.tokens

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.losses.append(self.engine.step(self.algorithm, next(self.loader), self.rng)["loss"])

    def close(self) -> None:
        self.loader.close()


def diffusers_model(shape: MMDiTConfig, dtype: torch.dtype) -> QwenImageTransformer2DModel:
    """With random weights, in fp32 of no more digits than dtype has."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**{name: value for name, value in asdict(shape).items() if name != "rope"})
    for param in model.parameters():
        param.data = param.data.to(dtype).float()
    return model
