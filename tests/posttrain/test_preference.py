import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import SIZE_PX, run_entry
from worlds import run_world

from data_pipeline.encoding import Encoder
from data_pipeline.loader import Loader
from data_pipeline.sample import EncodedSample
from model.sampling.guidance import Condition
from posttrain.preference import ITEMS_PER_SHARD, PairDataset, PairDrawing, is_finished, list_judged, write_pairs
from posttrain.rollout.prompts import Prompt, read_prompts
from training.held_out import hold_out
from training.randomness import Randomness
from training.run_folder import read_metrics


@pytest.fixture(scope="module")
def encoder(components):
    from model.conditioner import Conditioner
    from vae.autoencoder import VAE

    return Encoder(Conditioner.from_folder(components), VAE.from_folder(components), SIZE_PX)


def engine(rank=0, size=1):
    return SimpleNamespace(
        rank=rank, dp_rank=rank, dp_size=size, layout=SimpleNamespace(speaks=True), barrier=lambda: None
    )


def make(items: list[int]):
    """Two samples for every item but each third."""
    for i in items:
        for name in ("win", "lose") if i % 3 else ():
            yield EncodedSample(
                f"{i:03d}-{name}",
                torch.full((16, 1, 4, 4), float(i)),
                torch.zeros(2 + i % 2, 128).bfloat16(),
                meta={"caption": "c"},
            )


def write(folder, wanted, encoder, items=range(100), settings=None):
    seen = []
    found = write_pairs(folder, settings or {"a": 1}, list(items), make, wanted, encoder, engine(), seen.append)
    return found, seen


def test_pairs_go_through_the_loader(tmp_path, encoder, one_process):
    found, seen = write(tmp_path / "pairs", 25, encoder)
    assert found == seen[-1] and 25 <= found < 25 + ITEMS_PER_SHARD
    dataset = PairDataset(tmp_path / "pairs", 25)
    assert len(dataset) == 25 and dataset.key(0) == "001"
    assert (dataset.tokens == [2 * (4 + 2 + int(dataset.key(i)) % 2) for i in range(25)]).all()
    loader = Loader(dataset, 10, max_tokens=40)
    keys = [p.key for _ in range(5) for group in next(loader) for p in group]
    assert sorted(keys) == sorted(2 * [dataset.key(i) for i in range(25)])
    loader.close()
    pair = dataset[3]
    assert pair.win.key == f"{pair.key}-win" and pair.lose.key == f"{pair.key}-lose"


def test_pairs_are_held_out_by_their_keys(tmp_path, encoder, one_process):
    write(tmp_path, 25, encoder)
    whole = PairDataset(tmp_path)
    parts = hold_out(whole, 7)
    keys = [[part.key(i) for i in range(len(part))] for part in parts]
    assert len(keys[1]) == 7 and sorted(sum(keys, [])) == sorted(whole.key(i) for i in range(len(whole)))
    for part in parts:
        assert [part[i].key for i in range(len(part))] == [part.key(i) for i in range(len(part))]
        assert [int(t) for t in part.tokens] == [2 * (4 + 2 + int(part.key(i)) % 2) for i in range(len(part))]
    for count in (0, len(whole)):
        with pytest.raises(ValueError, match="cannot be held out"):
            hold_out(whole, count)


def test_an_interrupted_folder_goes_on_and_is_the_same(tmp_path, encoder, one_process):
    write(tmp_path / "whole", 25, encoder)

    def dies(items):
        if 20 in items:
            raise KeyboardInterrupt
        yield from make(items)

    with pytest.raises(KeyboardInterrupt):
        write_pairs(tmp_path / "cut", {"a": 1}, list(range(100)), dies, 25, encoder, engine(), lambda n: None)
    assert not is_finished(tmp_path / "cut", {"a": 1})
    write(tmp_path / "cut", 25, encoder)
    for path in sorted((tmp_path / "whole").glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert is_finished(tmp_path / "cut", {"a": 1})


@pytest.mark.parametrize("speaks", [True, False])
def test_peers_of_one_rank_ask_the_reward_once(speaks):
    """Tensor-parallel peers draw the same pictures; a reward server should get them from one."""
    asked = []

    def reward(images, prompts, metadata):
        asked.append(prompts)
        return {"reward": torch.tensor([0.2, 0.9, 0.5])}

    latent = torch.zeros(16, 1, 4, 4)
    painter = SimpleNamespace(
        device="cpu", latents=lambda requests: [latent + i for i in range(len(requests))],
        decode=lambda latents: [torch.zeros(3, SIZE_PX, SIZE_PX) for _ in latents],
    )  # fmt: skip
    studio = SimpleNamespace(
        painter=lambda sampler: painter, conditions=lambda texts: [Condition(torch.zeros(2, 128)) for _ in texts],
        engine=SimpleNamespace(layout=SimpleNamespace(speaks=speaks)),
    )  # fmt: skip
    drawing = PairDrawing(studio, None, reward, SIZE_PX, pictures=3, min_gap=0.1, rng=Randomness(0))
    found = [(sample.key, sample.latent.mean().item()) for sample in drawing.pairs([Prompt("a", "a cat", {})])]
    assert found == ([("a-win", 1), ("a-lose", 0)] if speaks else [])
    assert asked == ([["a cat"] * 3] if speaks else [])


def test_pairs_made_otherwise_are_not_taken(tmp_path, encoder, one_process):
    write(tmp_path, 5, encoder)
    with pytest.raises(ValueError, match="a: 1 there, 2 here"):
        is_finished(tmp_path, {"a": 2})


def judged_folder(folder, keys=("cat", "a.dog")):
    folder.mkdir()
    for i, key in enumerate(keys):
        for side in ("win", "lose"):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3)).astype(np.uint8)
            Image.fromarray(pixels if side == "win" else pixels // 2).save(folder / f"{key}.{side}.png")
        (folder / f"{key}.txt").write_text(f"a picture of {key}\n")
    return folder


def test_dpo_learns_from_judged_pictures(tmp_path, init, components):
    folder = judged_folder(tmp_path / "judged", ("cat", "a.dog", "bird"))
    settings = {"init": init, "out": tmp_path / "run", "pairs": folder, "batch_size": 2}
    settings |= {"held_out": 1, "validate_every": 1, "validation": None}
    run_world(1, dpo, 2, settings, deadline_s=400)
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["accuracy"] == 0.5 and rows[1]["grad_norm"] > 0
    pairs = PairDataset(tmp_path / "run" / "pairs")
    assert {pairs[i].key for i in range(3)} == {"cat", "a_dog", "bird"}
    held = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert held[0]["accuracy"] == 0.5 and held[0]["loss"] == pytest.approx(math.log(2)) != held[-1]["loss"]
    run_world(1, dpo, 3, settings | {"pairs": tmp_path / "run" / "pairs", "out": tmp_path / "other"}, deadline_s=400)
    assert read_metrics(tmp_path / "other")[:2] == rows


def dpo(rank, steps, settings):
    run_entry(rank, "dpo", steps, 10, **settings)


def test_judged_folders_that_are_not_whole_are_named(tmp_path):
    with pytest.raises(ValueError, match="KEY.win.png"):
        (tmp_path / "empty").mkdir()
        list_judged(tmp_path / "empty")
    folder = judged_folder(tmp_path / "judged")
    (folder / "cat.lose.png").unlink()
    (folder / "cat.txt").unlink()
    with pytest.raises(ValueError, match="cat.lose.png and cat.txt missing"):
        list_judged(folder)


def test_prompts_of_a_file_and_the_default(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a", "tag": "x"}) + "\n\n" + json.dumps({"prompt": "b"}) + "\n")
    prompts = read_prompts(file)
    assert [(p.key, p.text) for p in prompts] == [("prompt-000000", "a"), ("prompt-000001", "b")]
    assert prompts[0].metadata["tag"] == "x"
    for bad, says in (("{", "line 1: not JSON"), ('{"text": "a"}', 'line 1: expected {"prompt"'), ("", "no prompts")):
        file.write_text(bad)
        with pytest.raises(ValueError, match=says.replace("{", r"\{")):
            read_prompts(file)
    default = read_prompts(None)
    tags = [p.metadata["tag"] for p in default]
    assert all(tags.count(t) > len(tags) / 10 for t in set(tags)) and len(set(tags)) == 6
