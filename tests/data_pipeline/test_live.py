"""Training on a set that is still being made: batches are those of the whole one; producers share the work."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.claims import Claims, _machine
from data_pipeline.dataset import LIVE, EncodedDataset, MixedData
from data_pipeline.encoding import Encoder
from data_pipeline.live import LiveDataset, Plan, announce, is_live, open_dataset, seal, within
from data_pipeline.loader import Loader, flops
from data_pipeline.order import AsReady, ByShard, Mixture
from data_pipeline.shard_stage import ShardStage, shards_as_inputs
from data_pipeline.shards import shard_name, write_raw
from model.conditioner import Conditioner
from vae.autoencoder import VAE

SHARDS = 5


@pytest.fixture(scope="module")
def encoder(components: Path) -> Encoder:
    return Encoder(Conditioner.from_folder(components), VAE.from_folder(components), res=64, batch_size=4)


@pytest.fixture
def raw(tmp_path: Path, make_raw) -> Path:
    (tmp_path / "raw").mkdir()
    for i in range(SHARDS):
        write_raw(tmp_path / "raw" / shard_name(i), make_raw(6, seed=i))
    return tmp_path / "raw"


def stage_of(raw: Path, out: Path, encoder: Encoder) -> ShardStage:
    return ShardStage(out, shards_as_inputs(raw, out), asdict(encoder.fingerprint()) | {"batch_size": 4})


class Making:
    """A set made shard by shard, as the test says."""

    def __init__(self, raw: Path, out: Path, encoder: Encoder):
        out.mkdir()
        self.raw, self.out, self.encoder = raw, out, encoder
        self.claims = Claims(out / "claims", beat_s=0.05, dead_s=0.5)
        self.stage = stage_of(raw, out, encoder)
        self.plan = Plan(encoder.fingerprint(), {"batch_size": 4}, self.stage.inputs)
        announce(self.stage, self.plan, self.claims, lambda: encoder.write_empty_prompt(out))

    def make(self, name: str) -> None:
        n = self.encoder.encode_shard(self.raw / name, self.out / name, pytest.fail, lambda n: None)
        self.stage.finish(name, {"samples": n, "skipped": []})

    def seal(self) -> None:
        seal(self.stage, self.plan, self.claims)
        self.claims.close()


def taken(loader: Loader, steps: int) -> list:
    found = [[[(s.key, s.epoch, s.latent.sum().item()) for s in b] for b in next(loader)] for _ in range(steps)]
    loader.close()
    return found


def test_a_growing_set_gives_the_batches_of_the_whole_one(raw, tmp_path, encoder):
    making = Making(raw, tmp_path / "out", encoder)
    dataset = open_dataset((making.out,))
    assert isinstance(dataset, LiveDataset) and is_live(making.out)
    loader, found = Loader(dataset, 4, seed=3), []
    reader = threading.Thread(target=lambda: found.extend(taken(loader, 11)))  # one pass is 30 samples: into the second
    reader.start()
    time.sleep(0.3)
    assert not found and dataset.made() == 0
    for name in making.stage.inputs:
        making.make(name)
    making.seal()
    reader.join(30)
    whole = open_dataset((making.out,))
    assert isinstance(whole, EncodedDataset) and whole.identity == dataset.identity
    assert taken(Loader(whole, 4, seed=3), 11) == found and dataset.waited_s > 0.3


def test_a_cursor_of_the_growing_set_is_one_of_the_whole_set_and_of_no_other(raw, tmp_path, encoder, make_raw):
    making = Making(raw, tmp_path / "out", encoder)
    for name in list(making.stage.inputs):
        making.make(name)
    live = Loader(LiveDataset(making.out), 7, seed=1)
    taken(live, 2)
    state = json.loads(json.dumps(live.state_dict()))
    making.seal()
    rest = Loader(EncodedDataset(making.out), 7, seed=1)
    rest.load_state_dict(state)
    assert taken(rest, 2) == taken(Loader(EncodedDataset(making.out), 7, seed=1), 4)[2:]
    write_raw(raw / shard_name(SHARDS), make_raw(6, seed=99))
    more = Making(raw, tmp_path / "more", encoder)
    for name in list(more.stage.inputs):
        more.make(name)
    more.seal()
    with pytest.raises(ValueError, match=r"stopped at \[0, 14\] in other data"):
        Loader(EncodedDataset(more.out), 7, seed=1).load_state_dict(state)


def test_nobody_is_waited_for_for_ever(raw, tmp_path, encoder):
    making = Making(raw, tmp_path / "out", encoder)
    with pytest.raises(ValueError, match=f"nobody has worked on {making.out} for 2 s and shard-000000.tar is not made"):
        LiveDataset(making.out, patience_s=2.0).rows(0)


def test_waiting_takes_no_processor_time_and_ends_at_once_when_it_should(raw, tmp_path, encoder):
    making = Making(raw, tmp_path / "out", encoder)
    loader = Loader(LiveDataset(making.out), 4)
    threading.Thread(target=lambda: pytest.raises(StopIteration, next, loader), daemon=True).start()
    time.sleep(0.5)
    before = time.process_time()
    time.sleep(2.0)
    assert time.process_time() - before < 0.1
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 1.0


def test_producers_pause_when_too_much_waits_to_be_trained_on(raw, tmp_path, encoder):
    making = Making(raw, tmp_path / "out", encoder)
    may_begin = within(making.out, 2)
    assert [may_begin(k) for k in range(3)] == [True, True, True]
    making.make(shard_name(1))
    making.make(shard_name(2))
    assert [may_begin(k) for k in range(4)] == [True, False, False, False], "the first is what training waits for"
    making.make(shard_name(0))
    dataset = LiveDataset(making.out)
    dataset.rows(0)
    assert not may_begin(3), "two of three are not opened yet"
    dataset.rows(1)
    assert may_begin(3) and may_begin(4)


def test_a_plan_gives_way_to_changed_data_but_not_under_anothers_hands(raw, tmp_path, encoder, make_raw):
    making = finished(Making(raw, tmp_path / "out", encoder))
    write_raw(raw / shard_name(SHARDS), make_raw(6, seed=99))
    stage, mine = stage_of(raw, making.out, encoder), Claims(making.out / "claims", beat_s=0.05, dead_s=0.5)
    other = Claims(making.out / "claims", beat_s=0.05, dead_s=0.5)
    assert other.take(shard_name(2))
    plan = Plan(encoder.fingerprint(), {"batch_size": 4}, stage.inputs)
    with pytest.raises(ValueError, match="is being made of other inputs .shard-000002.tar is at work"):
        announce(stage, plan, mine, pytest.fail)
    other.close()
    (making.out / "claims" / "shard-000001.tar.claim").write_text(f"{_machine()} 999999999 x 0")  # of the dead
    announce(stage, plan, mine, lambda: None)
    assert is_live(making.out) and len(json.loads((making.out / LIVE).read_text())["inputs"]) == SHARDS + 1
    with pytest.raises(ValueError, match="no encoded data set"):
        EncodedDataset(making.out)
    with pytest.raises(ValueError, match="is being made of other data by now"):
        seal(making.stage, making.plan, mine)
    mine.close()


def test_a_set_is_never_made_anew_with_other_settings_unasked(raw, tmp_path, encoder):
    making = finished(Making(raw, tmp_path / "out", encoder))
    before = {p.name: p.read_bytes() for p in making.out.iterdir() if p.is_file()}
    claims = Claims(making.out / "claims", beat_s=0.05, dead_s=0.5)
    other = Plan(encoder.fingerprint(), {"batch_size": 8}, making.stage.inputs)
    with pytest.raises(ValueError, match=r"made with other settings \(batch_size: 4 there, 8 here\): delete it"):
        announce(making.stage, other, claims, pytest.fail)
    claims.close()
    assert {p.name: p.read_bytes() for p in making.out.iterdir() if p.is_file()} == before


def test_a_plan_of_others_who_have_made_nothing_yet_stands(raw, tmp_path, encoder):
    making = Making(raw, tmp_path / "out", encoder)
    assert making.claims.take("producer-1")
    mine = Claims(making.out / "claims", beat_s=0.05, dead_s=0.5)
    with pytest.raises(ValueError, match="made with other settings"):
        announce(making.stage, Plan(encoder.fingerprint(), {"batch_size": 8}, making.stage.inputs), mine, pytest.fail)
    making.claims.close()
    mine.close()


def test_shards_that_went_missing_are_missed(raw, tmp_path, encoder):
    out = finished(Making(raw, tmp_path / "out", encoder)).out
    (out / shard_name(3)).unlink()
    with pytest.raises(ValueError, match="1 shards of .* are gone, shard-000003.tar among them"):
        EncodedDataset(out)


def test_shards_of_an_earlier_plan_are_not_taken_for_those_of_this_one(raw, tmp_path, encoder, make_raw):
    making = finished(Making(raw, tmp_path / "out", encoder))
    write_raw(raw / shard_name(1), make_raw(4, seed=50))
    claims = Claims(making.out / "claims", beat_s=0.05, dead_s=0.5)
    stage = stage_of(raw, making.out, encoder)
    announce(stage, Plan(encoder.fingerprint(), {"batch_size": 4}, stage.inputs), claims, lambda: None)
    claims.close()
    dataset = LiveDataset(making.out)
    assert [dataset.ready(k) for k in range(SHARDS)] == [True, False, True, True, True]


def test_a_claim_has_one_holder_and_outlives_no_process(tmp_path):
    one, other = Claims(tmp_path, beat_s=0.05, dead_s=0.5), Claims(tmp_path, beat_s=0.05, dead_s=0.5)
    assert one.take("a") and not other.take("a") and other.take("b")
    time.sleep(0.8)
    assert not other.take("a"), "its holder is alive"
    code = "import os, sys; from pathlib import Path; from data_pipeline.claims import Claims"
    code += "; Claims(Path(sys.argv[1])).take('c'); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False, cwd=Path(__file__).parents[2])
    assert (tmp_path / "c.claim").exists() and other.take("c"), "a process of this machine that is gone"
    one.release("a")
    assert other.take("a")
    one.close()
    other.close()
    assert not list(tmp_path.iterdir())


def test_a_holder_elsewhere_is_dead_once_it_is_silent_by_our_own_clock(tmp_path):
    here = Claims(tmp_path, dead_s=0.4)
    (tmp_path / "a.claim").write_text("elsewhere 1 x 7")
    os.utime(tmp_path / "a.claim", (1, 1))  # its clock is years behind
    assert not here.take("a")
    time.sleep(0.3)
    (tmp_path / "a.claim").write_text("elsewhere 1 x 8")
    assert not here.take("a")
    time.sleep(0.3)
    assert not here.take("a"), "it was heard of less than .4 s ago"
    time.sleep(0.3)
    assert here.take("a")
    here.close()


def test_of_many_who_claim_at_once_one_succeeds(tmp_path):
    (tmp_path / "dead.claim").write_text(f"{_machine()} 999999999 x 0")
    claims, won = [Claims(tmp_path) for _ in range(16)], []
    barrier = threading.Barrier(16)

    def run(mine: Claims) -> None:
        barrier.wait()
        for name in ("dead", *map(str, range(20))):
            if mine.take(name):
                won.append(name)

    threads = [threading.Thread(target=run, args=(c,)) for c in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(["dead", *map(str, range(20))]) and np.unique(won).size == 21
    for mine in claims:
        mine.close()


def test_what_is_ready_first_can_come_first_and_does_so_again_after_a_resume(raw, tmp_path, encoder):
    making = Making(raw, tmp_path / "out", encoder)
    log = tmp_path / "order.jsonl"

    def loader(decides: bool = True) -> Loader:
        dataset = open_dataset((making.out,))
        return Loader(dataset, 5, max_tokens=10**6, order=AsReady(dataset, 1, log, decides, mixed=2))

    begun, follower, found, followed = loader(), loader(decides=False), [], []
    threads = [threading.Thread(target=lambda: found.extend(taken(begun, 9)))]
    threads += [threading.Thread(target=lambda: followed.extend(taken(follower, 9)))]
    for thread in threads:
        thread.start()
    for number in (3, 0, 4, 1, 2):
        making.make(shard_name(number))
        time.sleep(0.3)
    making.seal()
    for thread in threads:
        thread.join(60)
    about, *chosen = [json.loads(row) for row in log.read_text().splitlines()]
    assert about == {"data": open_dataset((making.out,)).identity, "seed": 1}
    assert chosen[0] == [3] and sorted(sum(chosen, [])) == [0, 1, 2, 3, 4]
    assert {key for batch in found[0] for key, _, _ in batch} <= {f"s3-{i:03d}" for i in range(6)}
    again = loader()
    assert found == followed == taken(again, 9), "the whole set, by the log, gives what the growing one gave"
    first = [key for step in found[:6] for batch in step for key, epoch, _ in batch]
    assert len(set(first)) == 30, "a pass sees every sample once"


def finished(making: Making) -> Making:
    for name in making.stage.inputs:
        making.make(name)
    making.seal()
    return making


def test_shares_of_a_mixture_move_and_hold_in_every_stretch_and_go_on_after_a_resume(raw, tmp_path, encoder):
    folders = [finished(Making(raw, tmp_path / name, encoder)).out for name in ("a", "b", "c")]
    mixed = MixedData([EncodedDataset(f) for f in folders], Mixture.SOURCE)

    def loader() -> Loader:
        orders = [ByShard(part, 5) for part in mixed.parts]
        return Loader(mixed, 10, order=Mixture(orders, (0.8, 0.2, 0), (0, 0.2, 0.8), 600), max_tokens=10**6)

    places = loader().order.places(loader().order.first, threading.Event())
    drawn = [next(places)[0] // Mixture.SOURCE for _ in range(600)]
    for first in range(0, 600, 60):
        at = (first + 30) / 600
        counts = np.bincount(drawn[first : first + 60], minlength=3)
        assert np.abs(counts - 60 * np.array([0.8 * (1 - at), 0.2, 0.8 * at])).max() <= 1.5
    whole = taken(loader(), 20)
    keys = [key for step in whole for batch in step for key, _, _ in batch]
    assert {key.partition("@")[2] for key in keys} == {"", "1", "2"}, "equal keys of two folders draw different noise"
    begun = loader()
    taken(begun, 7)
    state = json.loads(json.dumps(begun.state_dict()))
    rest = loader()
    rest.load_state_dict(state)
    assert taken(rest, 13) == whole[7:]


def test_ranks_get_equal_flops_where_attention_counts(raw, tmp_path, encoder):
    class Mixed:
        tokens = np.array([4096] * 4 + [256] * 64)

        def __len__(self):
            return 68

        def key(self, index):
            return str(index)

    ranks = [Loader(Mixed(), 68, rank, 4, max_tokens=8192, width=128) for rank in range(4)]
    step = [(i, 0) for i in range(68)]
    shares = [[Mixed.tokens[i] for group in loader.share(step) for i, _ in group] for loader in ranks]
    costs = [sum(flops(int(t), 128) for t in share) for share in shares]
    assert max(costs) / min(costs) < 1.05 and all(sum(t == 4096 for t in share) == 1 for share in shares)


def test_a_broken_sample_costs_itself_and_is_named(raw, tmp_path, encoder, capsys):
    out = finished(Making(raw, tmp_path / "out", encoder)).out
    dataset = EncodedDataset(out)
    index = int(dataset.rows(1)[2])
    at, key = int(dataset._tables[0].columns["offset"][index]), dataset.key(index)
    with open(out / shard_name(1), "rb+") as file:  # bytes on a bad disk: its latent becomes NaN
        file.seek(at + int(dataset._tables[0].columns["size"][index]) - 64)
        file.write(b"\xff" * 64)
    loader = Loader(EncodedDataset(out), 30, max_tokens=10**6)
    (batch,) = next(loader)
    loader.close()
    assert len(batch) == 29 and key not in {s.key for s in batch} and loader.passed_over >= 1
    assert f"passed over: {out}/{shard_name(1)}/{key}" in capsys.readouterr().err
