"""Adapters beside frozen weights: what they learn, what their checkpoints hold, in which layouts they go on."""

import json
from pathlib import Path

import pytest
import torch
from mixed_batch import CONFIG, fill, samples
from torch.distributed.checkpoint import FileSystemReader
from worlds import run_world

from model.config import LoRAConfig
from model.lora import adapters_of, add_adapters, merge, split_adapters
from model.mmdit import MMDiT

LORA = dict(lora_rank=4, lora_alpha=8.0, lora_targets=("q", "k", "v", "out", "img.mlp_in", "mod"))


def make_engine(layout: tuple[int, int, bool] = (1, 1, False), steps: int = 9, rates: dict | None = None, **settings):
    from training.engine.config import EngineConfig, OptimizerConfig, ParallelConfig
    from training.engine.step import Engine

    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=0, **(rates or {"eps": 1e-4}))
    config = EngineConfig(ParallelConfig(*layout), optimizer, ema_decay=0.5, **{**LORA, **settings})
    engine = Engine(CONFIG, config, total_steps=steps)
    fill(engine.model)
    engine.initialize_adapters(3)
    return engine


def step(engine, epoch: int) -> dict[str, float]:
    from training.flow_matching import VelocityMSE
    from training.randomness import Randomness

    return engine.step(VelocityMSE(), [samples(epoch)[engine.dp_rank :: engine.dp_size]], Randomness(0))


def train_and_save(rank: int, folder: Path, layout: tuple[int, int, bool]) -> list[dict[str, float]]:
    """Two steps, a checkpoint, one step more, another checkpoint."""
    engine = make_engine(layout)
    metrics = [step(engine, 0), step(engine, 1)]
    engine.save(folder / "step_00000002", {})
    metrics.append(step(engine, 2))
    engine.save(folder / "step_00000003", {})
    return metrics


def go_on(rank: int, source: Path, target: Path, layouts: dict[str, tuple]) -> dict[str, dict[str, float]]:
    """Load the second step's checkpoint in each layout and make the third."""
    metrics = {}
    for name, layout in layouts.items():
        engine = make_engine(layout)
        engine.load(source / "step_00000002")
        metrics[name] = step(engine, 2)
        engine.save(target / name / "step_00000003", {})
    return metrics


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, list[dict[str, float]]]:
    """A run in one process."""
    folder = tmp_path_factory.mktemp("one")
    return folder, run_world(1, train_and_save, folder, (1, 1, False))[0]


def test_a_resumed_run_is_the_same_bit_for_bit(one, tmp_path):
    from training.engine.checkpoint import read_tensors

    folder, metrics = one
    again = run_world(1, go_on, folder, tmp_path, {"again": (1, 1, False)})[0]["again"]
    assert again == metrics[2]
    for ema in (True, False):
        a, b = (read_tensors(p / "step_00000003", ema) for p in (folder, tmp_path / "again"))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_checkpoint_is_the_adapters_and_their_optimizer(one):
    from training.engine.checkpoint import read_state, read_tensors

    folder = one[0] / "step_00000003"
    weights = read_tensors(folder, ema=False)
    assert all(".lora." in name and name.endswith("weight") for name in weights)
    assert read_state(folder)["lora"]["rank"] == 4
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata.values()
    numbers = sum(m.size.numel() for m in stored if hasattr(m, "size"))
    assert numbers == 5 * sum(w.numel() for w in weights.values())  # weights, masters, average, two moments


@pytest.mark.parametrize(
    "size, layouts", [(2, {"dp2": (1, 1, False), "tp2": (2, 1, False), "tp2 sp": (2, 1, True), "cp2": (1, 2, False)})]
)
def test_ranks_train_as_one_process_does(size, layouts, one, tmp_path):
    folder, metrics = one
    for name, layout in layouts.items():
        found = run_world(size, train_and_save, tmp_path / name, layout)[0]
        for theirs, ours in zip(found, metrics, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6), name
    later = run_world(size, go_on, folder, tmp_path / "later", layouts)[0]
    back = run_world(1, go_on, tmp_path / "tp2", tmp_path / "back", {"one": (1, 1, False)})[0]["one"]
    for name, theirs in {**later, "from tp2 to one": back}.items():
        assert theirs == pytest.approx(metrics[2], rel=1e-5, abs=1e-6), name


class Imitation:
    """Learn another model's velocity."""

    frozen = {}

    def __init__(self, model: MMDiT):
        self.model = model

    def prepare(self, batch, rng, align):
        from training.flow_matching import VelocityMSE

        inputs, _ = VelocityMSE(condition_dropout=0.0).prepare(batch, rng, align)
        with torch.no_grad():
            return inputs, self.model(inputs)

    def loss(self, model, frozen, inputs, target):
        from training.flow_matching import per_sample_mean

        loss = per_sample_mean((model(inputs) - target) ** 2, inputs).sum()
        return loss, float(inputs.pack.n_samples), {"loss": loss.detach()}


def recover(rank: int, steps: int) -> dict[str, float]:
    """Train adapters of rank 2 to do what planted ones do; how far what they add is from it, a layer."""
    from training.randomness import Randomness

    lora = LoRAConfig(2, 4.0, targets=("img.mlp_in",))
    planted = fill(MMDiT(CONFIG))
    add_adapters(planted, lora, seed=5)
    generator = torch.Generator().manual_seed(6)
    for adapter in adapters_of(planted).values():
        adapter.b.weight.data.copy_(torch.randn(adapter.b.weight.shape, generator=generator) * 0.1)
    rates = dict(schedule="cosine", final_lr_ratio=0.01, weight_decay=0.0)
    engine = make_engine(steps=steps, rates=rates, lora_rank=2, lora_alpha=4.0, lora_targets=lora.targets)
    algorithm, rng = Imitation(planted), Randomness(0)
    for epoch in range(steps):
        engine.step(algorithm, [samples(epoch)], rng)
    added = []
    for model in (planted, engine.model):
        _, adapters = split_adapters(dict(model.named_parameters()))
        zeros = {f"{n}.weight": torch.zeros(len(b), a.shape[1]) for n, (a, b) in adapters.items()}
        added.append(merge(zeros, adapters, lora.scale))
    return {n: ((added[1][n] - w).norm() / w.norm()).item() for n, w in added[0].items()}


def test_a_planted_update_is_recovered():
    distances = run_world(1, recover, 400, deadline_s=300)[0]
    assert len(distances) == CONFIG.num_layers
    assert max(distances.values()) < 0.05, distances


def refuse(rank: int, folder: Path) -> list[str]:
    """What an engine says to checkpoints that are not its own."""
    from training.engine.config import EngineConfig
    from training.engine.step import Engine

    said = []
    for engine in (Engine(CONFIG, EngineConfig()), make_engine(lora_rank=2)):
        with pytest.raises(ValueError) as error:
            engine.load(folder)
        said.append(str(error.value))
    return said


def test_other_adapters_and_all_weights_are_refused(one):
    whole, other = run_world(1, refuse, one[0] / "step_00000003")[0]
    assert "is of adapters, and all weights are to be trained here" in whole
    assert "rank is 4 there, 2 here" in other
    assert json.loads((one[0] / "step_00000003" / "state.json").read_text())["lora"]["alpha"] == 8.0
