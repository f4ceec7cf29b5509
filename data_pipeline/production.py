"""Raw shards to an encoded data set, by any number of processes on any number of machines that see its folder.

A process claims one shard after another; each is made once, in order, whoever makes it. Imports no torch at the top,
for `--help`.
"""

import os
import secrets
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from command_line import UserError, progress
from data_pipeline.buckets import buckets
from data_pipeline.stages import chosen_stages

ROOM = 1.2
"""Memory that encoding takes, in that of the text encoder's weights."""


@dataclass(frozen=True)
class Production:
    """What is encoded, by what, into what."""

    data: str = "runs/quick/data/curated"
    """Folder of raw shards, or URLs as in s3://bucket/shard-{0000..0099}.tar or http://host/*.tar."""
    deadline_s: float = 600.0
    """Seconds that fetching one remote shard may take."""
    components: Path = Path("runs/quick/components")
    """Folder with tokenizer/, text_encoder/ and vae/, as diffusers writes it."""
    out: Path = Path("runs/quick/data/encoded-256")
    """Folder for the encoded shards."""
    res: int = 64
    """Side, in pixels, of the square whose area pictures are resized to; a multiple of 16."""
    batch_size: int = 16
    """Pictures encoded at once."""
    decode_threads: int = 2
    recipe: Literal["toy", "report"] = "toy"
    """Whose --stages (data_pipeline/stages.py)."""
    stages: str = ""
    """Filters to apply to each sample before it is encoded, by stage, as 1-3 or 1,3: those of curate.py that look at
    one sample alone."""
    filters: tuple[str, ...] = ()
    """More of them: NAME=THRESHOLD, or FILE.py:NAME=THRESHOLD of your own; LOW..HIGH for scores that lie between."""
    weights: Path | None = None
    """Folder with clip/, siglip/, nsfw/, aesthetics/ for the filters that need networks."""
    ahead: int = 0
    """Shards that may wait to be trained on; then producers pause. 0 for any number."""
    dry_run: bool = False
    """Say what would be done, do nothing."""


def produce(config: Production) -> None:
    """Encode until the set is whole, beside whoever else does. UserError for what cannot be read or does not fit."""
    sizes = buckets(config.res)
    for folder, what in ((config.data, "--data"), (config.components, "--components")):
        if "://" not in str(folder) and not str(folder).startswith("pipe:") and not Path(folder).is_dir():
            raise UserError(f"{folder} does not exist; give {what}, or make the demo's with `make quick`")
    if config.out.resolve() == Path(config.data).resolve():
        raise UserError(f"the output folder {config.out} is the input folder; choose another")
    from data_pipeline.shard_stage import ShardStage, say_skipped
    from data_pipeline.sources import find_sources

    sources = find_sources(config.data, config.deadline_s)
    inputs = {name: source.stamp for name, source in sources.items()}
    stages = stages_of(config)
    if config.dry_run:
        print(f"{len(inputs)} shards of {config.data} -> {config.out}")
        print("buckets (width x height): " + ", ".join(f"{w}x{h}" for w, h in dict.fromkeys(sizes)))
        for stage in stages:
            print(f"stage {stage.number}, {stage.name}: {'; '.join(map(str, stage.rules))}")
        return

    from data_pipeline.claims import Claims
    from data_pipeline.live import Plan, announce, seal, within

    encoder, filters = load_encoder(config), inline_filters(config, stages)
    fingerprint = encoder.fingerprint()
    networks = encoder.conditioner.text_encoder
    settings = {"batch_size": config.batch_size, "on": f"{networks.device.type} {networks.dtype}"}
    settings |= {} if filters is None else {"filters": filters.settings()}
    stage = ShardStage(config.out, inputs, asdict(fingerprint) | settings)
    config.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(fingerprint, settings, inputs)
    may_begin = within(config.out, config.ahead) if config.ahead else lambda number: True
    claims = Claims(config.out / "claims")
    try:
        claims.take(f"producer-{secrets.token_hex(4)}")  # others see that somebody is at work, also while it pauses
        announce(stage, plan, claims, lambda: encoder.write_empty_prompt(config.out))
        failed = encode_shards(stage, claims, may_begin, sources, replace(encoder, filters=filters), config.deadline_s)
        records = stage.records()
        say_skipped(records, config.out)
        if cut := sum(record.get("cut", 0) for record in records):
            limit = encoder.conditioner.max_length
            print(f"{cut} captions (edits not counted) have {limit} tokens or more; what is beyond was cut")
        samples = sum(record["samples"] for record in records)
        if failed:
            raise UserError(f"{len(failed)} shards could not be made; run this again for them. The first: {failed[0]}")
        if not samples:
            raise UserError(f"no sample of {config.data} could be encoded")
        seal(stage, plan, claims)
    finally:
        claims.close()
    dropped = sum(sum(record.get("dropped", {}).values()) for record in records)
    told = f", {dropped} dropped by filters" if dropped else ""
    print(f"{samples} samples in {len(records)} shards{told}: {config.out}")


def stages_of(config: Production) -> tuple:
    """The stages whose filters look at each sample first."""
    if not config.filters:
        return chosen_stages(config.recipe, config.stages)
    from data_pipeline.filters.table import rule_of

    return chosen_stages(config.recipe, config.stages, tuple(map(rule_of, config.filters)))


def load_encoder(config: Production):
    """The networks on this process's GPU (text encoder in bf16), or on the CPU in fp32.

    A text encoder for which the GPU has no room stays on the CPU, in bf16 as well.
    """
    import torch

    from data_pipeline.encoding import Encoder
    from model.conditioner import Conditioner
    from vae.autoencoder import VAE

    cuda = torch.cuda.is_available()
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}" if cuda else "cpu"
    reads_on = device
    if cuda and not has_room(config.components / "text_encoder", torch.cuda.mem_get_info(device)[0]):
        print(f"no room on {device} for the text encoder of {config.components}: captions are encoded on the CPU")
        reads_on = "cpu"
    conditioner = Conditioner.from_folder(config.components, reads_on, torch.bfloat16 if cuda else torch.float32)
    vae = VAE.from_folder(config.components, device)
    return Encoder(conditioner, vae, config.res, config.batch_size, config.decode_threads)


def has_room(network: Path, free_bytes: int) -> bool:
    """Whether a network, as it is stored in a folder, fits into so many bytes with room to compute."""
    return ROOM * sum(file.stat().st_size for file in network.glob("*.safetensors")) < free_bytes


def inline_filters(config: Production, stages: tuple):
    """The filters of the stages that look at one sample alone; says which do not run. None without stages."""
    if not stages:
        return None
    from data_pipeline.filters.judge import InlineFilters
    from data_pipeline.filters.tools import Tools

    filters = InlineFilters(stages, Tools(config.components, config.weights))
    for name, why in filters.left_out().items():
        print(f"{name}: not run: {why}")
    return filters


def count_cut(shard: Path, limit: int) -> int:
    """Samples of an encoded shard whose texts fill all tokens that a prompt without pictures may have."""
    from data_pipeline.tar_index import tar_index

    shapes = (entry.shapes for entry in tar_index(shard).entries)
    return sum(shape.get("txt", (0,))[0] >= limit and "reference.0" not in shape for shape in shapes)


def encode_shards(stage, claims, may_begin, sources, encoder, deadline_s: float) -> list[str]:
    """Encode shards until all are there, with a progress bar over the samples that were not; returns why some could
    not be read."""
    from data_pipeline.live import FETCHED
    from data_pipeline.shards import Problem
    from data_pipeline.sources import Unreachable
    from data_pipeline.tar_index import scan

    left = stage.pending()
    first = next((scan(Path(sources[name].address)) for name in left if not sources[name].remote), None)
    each = 1 if first is None else len(first.entries)  # a guess: to look into all shards takes long where they are many
    expected = dict.fromkeys(left, each)
    failed: list[str] = []
    with progress(len(left) * each, f"produce {stage.out.name}", "sample") as bar:
        for name in stage.work(claims, may_begin):
            problems: list[Problem] = []
            dropped: Counter[str] = Counter()
            drop = lambda rule: dropped.update([rule])  # noqa: E731, B023
            try:
                with sources[name].local(stage.out / FETCHED, deadline_s) as shard:
                    n = encoder.encode_shard(shard, stage.target(name), problems.append, bar.update, drop)
            except Unreachable as error:
                failed.append(str(error))
                continue
            bar.total += n - expected.pop(name, 0)
            record = {"samples": n, "skipped": [asdict(p) for p in problems]}
            if cut := count_cut(stage.target(name), encoder.conditioner.max_length):
                record["cut"] = cut
            stage.finish(name, record | ({"dropped": dict(sorted(dropped.items()))} if encoder.filters else {}))
        bar.update(max(0, bar.total - bar.n))  # what others have made meanwhile
    return failed
