"""Our MMDiT against diffusers' QwenImageTransformer2DModel: same weights, same threads, alternating in one process.

    one shape      forward + backward of equal samples in a batch
    mixed batch    forward + backward of 16 samples: 64-1024 image tokens, prompts of 8-512 tokens, 0-2 references;
                   diffusers pads them (which it cannot do rightly for mixed sizes: only its time counts) or loops
    sampling       20 Euler steps with guidance

Peak memory is that of a process that runs the case alone, above the process that only built the model.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from command_line import run
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    threads: int = 2
    repeats: int = 7
    """Alternations of ours and theirs; the table shows medians and the spread of the ratio."""
    only: str = ""
    """Run the cases whose name contains this."""
    memory: bool = True
    """Measure peak memory too, each contestant in a process of its own."""
    out: Path | None = None
    """Also write the rows as JSON."""
    alone: str = ""
    """Run CASE/CONTESTANT once and print the peak memory (how `memory` measures)."""


Contestants = dict[str, Callable[[], object]]


def main(config: Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(config.threads)
    cases = all_cases()
    if config.alone:
        return print_peak(cases, config.alone)
    print(f"torch {torch.__version__}, {config.threads} threads, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    rows = []
    for name, build in cases.items():
        if config.only in name:
            rows += measure(name, build(), config)
    if config.out:
        config.out.write_text(json.dumps(rows, indent=2) + "\n")


def measure(name: str, contestants: Contestants, config: Config) -> list[dict]:
    """Alternate the contestants; print and return one row for each against ours."""
    seconds = {who: [] for who in contestants}
    for repeat in range(config.repeats + 1):
        for who, work in contestants.items():
            start = time.perf_counter()
            work()
            if repeat:  # the first round warms up
                seconds[who].append(time.perf_counter() - start)
    peak = {who: peak_mib(name, who, config) for who in contestants} if config.memory else {}
    rows = []
    for who in contestants:
        ratios = sorted(t / o for t, o in zip(seconds[who], seconds["ours"], strict=True))
        row = {
            "case": name,
            "who": who,
            "median_s": statistics.median(seconds[who]),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "peak_mib": peak.get(who),
        }
        low, high = row["ratio_quartiles"]
        memory = f"{peak[who]:7.0f} MiB" if peak else ""
        print(
            f"{name:28} {who:20} {row['median_s']:8.3f} s  x{row['ratio']:.2f} [{low:.2f}, {high:.2f}] {memory}",
            flush=True,
        )
        rows.append(row)
    return rows


def peak_mib(name: str, who: str, config: Config) -> float:
    command = [sys.executable, __file__, "--alone", f"{name}/{who}", "--threads", str(config.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(cases: dict[str, Callable[[], Contestants]], which: str) -> None:
    """Peak memory in MiB of one contestant of a case."""
    from bench.gpu.measure import peak_mib

    name, who = which.rsplit("/", 1)
    print(peak_mib(cases[name]()[who]))


def all_cases() -> dict[str, Callable[[], Contestants]]:
    """Name -> what builds the case's contestants."""
    from model.config import PRESETS, MMDiTConfig

    tiny = PRESETS["tiny"]
    wide = MMDiTConfig(2, 8, 128, joint_attention_dim=1024)
    return {
        "one shape, tiny": lambda: one_shape(tiny, batch=4, side=16, txt=64),
        "one shape, width 1024": lambda: one_shape(wide, batch=1, side=32, txt=128),
        "mixed batch, tiny": lambda: mixed_batch(tiny),
        "mixed batch, tiny, bf16": lambda: mixed_batch(tiny, "bfloat16"),
        "mixed batch, width 1024": lambda: mixed_batch(wide),
        "sampling, tiny": lambda: sampling(tiny, side=16, txt=48),
        "sampling, width 1024": lambda: sampling(wide, side=16, txt=48),
    }


def models(config, dtype: str = "float32"):
    """Ours and diffusers', with the same random weights."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    from model.diffusers_io.names import to_diffusers
    from model.mmdit import MMDiT

    torch.manual_seed(0)
    ours = MMDiT(config)
    values = {k: v for k, v in asdict(config).items() if k != "rope"}
    theirs = QwenImageTransformer2DModel(**values)
    theirs.load_state_dict({to_diffusers(n): p.detach().clone() for n, p in ours.named_parameters()})
    return ours.to(getattr(torch, dtype)), torch.nn.Module.to(theirs, getattr(torch, dtype))


@dataclass(frozen=True)
class Shape:
    """A sample's size in tokens."""

    txt: int
    target: tuple[int, int, int]
    references: tuple[tuple[int, int, int], ...] = ()

    def tensors(self, config, dtype: str = "float32") -> tuple:
        """(target, prompt, references) with random numbers."""
        import torch

        draw = lambda *shape: torch.randn(*shape, dtype=getattr(torch, dtype))  # noqa: E731
        latent = lambda f, h, w: draw(config.out_channels, f, 2 * h, 2 * w)  # noqa: E731
        references = [latent(*r) for r in self.references]
        return latent(*self.target), draw(self.txt, config.joint_attention_dim), references


def train_ours(model, packs: list[list[tuple]]) -> Callable[[], None]:
    import torch

    from model.packing import pack_inputs

    def work() -> None:
        model.zero_grad()
        for samples in packs:
            targets, texts, references = map(list, zip(*samples, strict=True))
            inputs = pack_inputs(targets, texts, torch.full((len(samples),), 0.5), references)
            model(inputs).square().mean().backward()

    return work


def train_theirs(model, batches: list[dict]) -> Callable[[], None]:
    def work() -> None:
        model.zero_grad()
        for batch in batches:
            n = batch.pop("n_target")
            model(**batch, return_dict=False)[0][:, :n].square().mean().backward()
            batch["n_target"] = n

    return work


def their_batch(samples: list[tuple], pad: bool = False) -> dict:
    """Inputs of diffusers' model for samples of one shape, or of several padded to the largest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from model.packing import patchify, token_size

    images = [torch.cat([patchify(t), *map(patchify, refs)]) for t, _, refs in samples]
    texts = [txt for _, txt, _ in samples]
    largest = max(samples, key=lambda s: s[0].numel() + sum(r.numel() for r in s[2]))
    mask = pad_sequence([torch.ones(len(t), dtype=torch.bool) for t in texts], batch_first=True) if pad else None
    return dict(
        hidden_states=pad_sequence(images, batch_first=True),
        encoder_hidden_states=pad_sequence(texts, batch_first=True),
        encoder_hidden_states_mask=mask,
        timestep=torch.full((len(samples),), 0.5),
        img_shapes=[[token_size(largest[0]), *map(token_size, largest[2])]] * len(samples),
        n_target=max(len(patchify(t)) for t, _, _ in samples),
    )


def one_shape(config, batch: int, side: int, txt: int) -> Contestants:
    ours, theirs = models(config)
    samples = [Shape(txt, (1, side, side)).tensors(config) for _ in range(batch)]
    return {"ours": train_ours(ours, [samples]), "diffusers": train_theirs(theirs, [their_batch(samples)])}


def mixed_shapes() -> list[Shape]:
    """16 samples: 64-1024 image tokens, prompts of 8-512 tokens, 0-2 references."""
    sides = [(8, 8), (32, 32), (16, 16), (12, 20), (24, 24), (16, 24), (8, 16), (28, 20)] * 2
    prompts = [8, 120, 40, 512, 77, 16, 240, 64, 30, 350, 12, 90, 25, 180, 55, 8]
    references = [(), (), ((1, 16, 16),), (), ((1, 12, 12), (1, 16, 8)), (), (), ((1, 20, 20),)] * 2
    return [Shape(txt, (1, *side), refs) for txt, side, refs in zip(prompts, sides, references, strict=True)]


def mixed_batch(config, dtype: str = "float32") -> Contestants:
    ours, theirs = models(config, dtype)
    samples = [shape.tensors(config, dtype) for shape in mixed_shapes()]
    return {
        # little more than the largest sample (1144 tokens), so that neither side holds more at a time
        "ours": train_ours(ours, packed(samples, max_tokens=1280)),
        "ours, one pack": train_ours(ours, [samples]),
        "diffusers, loop": train_theirs(theirs, [their_batch([s]) for s in samples]),
        "diffusers, padded": train_theirs(theirs, [their_batch(samples, pad=True)]),
    }


def packed(samples: list[tuple], max_tokens: int) -> list[list[tuple]]:
    """Consecutive samples in packs of at most so many tokens, as a training step's microbatches are."""
    packs, used = [[]], 0
    for target, txt, references in samples:
        tokens = len(txt) + sum(x.shape[1] * x.shape[2] * x.shape[3] // 4 for x in (target, *references))
        if packs[-1] and used + tokens > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append((target, txt, references))
        used += tokens
    return packs


def sampling(config, side: int, txt: int, steps: int = 20) -> Contestants:
    import torch

    from model.packing import patchify
    from model.sampling.draw import Request, Sampler
    from model.sampling.guidance import Condition
    from model.sampling.schedule import FixedSchedule, noise_levels

    ours, theirs = models(config)
    noise, prompt, _ = Shape(txt, (1, side, side)).tensors(config)
    empty = torch.randn(6, config.joint_attention_dim)

    def work_ours() -> None:
        Sampler(FixedSchedule(steps)).draw(ours, [Request(Condition(prompt, empty), noise)])

    @torch.no_grad()
    def work_theirs() -> None:  # the loop of QwenImagePipeline.__call__
        x, sigmas = patchify(noise)[None], noise_levels(steps, side * side)
        common = dict(img_shapes=[[(1, side, side)]], return_dict=False)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            t = sigma.expand(1)
            pos = theirs(hidden_states=x, encoder_hidden_states=prompt[None], timestep=t, **common)[0]
            neg = theirs(hidden_states=x, encoder_hidden_states=empty[None], timestep=t, **common)[0]
            both = neg + 4.0 * (pos - neg)
            v = both * (pos.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True))
            x = x + (sigma_next - sigma) * v

    return {"ours": work_ours, "diffusers": work_theirs}


if __name__ == "__main__":
    run(main, Config)
