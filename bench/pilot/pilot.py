"""The pilot: how fast a tiny MMDiT learns the shapes world on one CPU core, by recipe.

    python bench/pilot/pilot.py --data FOLDER --components FOLDER --vae FOLDER --out FOLDER [settings]

trains `model.mmdit.MMDiT` on the latents of world.py for a number of samples and appends to OUT/log.jsonl: losses on
held-out pictures at fixed noise, by band of sigma (a line every --eval-every samples), and at the end the judge's
verdicts on validation prompts. Started again, it goes on from its last checkpoint with the same draws: every batch is a
function of seed and step. Seconds are the process's CPU time, which a busy machine disturbs least.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

try:
    from command_line import run
    from model.config import MMDiTConfig
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

BANDS = (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)
"""Edges of the bands of sigma in which the held-out loss is reported."""


@dataclass(frozen=True)
class Config:
    data: Path = Path("runs/pilot/data")
    """Folder of world.py."""
    components: Path = Path("runs/pilot/components")
    """Folder with tokenizer/ and text_encoder/."""
    vae: Path = Path("runs/pilot/vae")
    """Folder with the VAE that made the latents."""
    out: Path = Path("runs/pilot/run")
    samples: int = 24000
    """Samples to train on. A run that was started with more can be ended early by giving fewer."""
    batch_size: int = 64
    layers: int = 6
    heads: int = 4
    head_dim: int = 48
    optimizer: Literal["muon", "adamw"] = "muon"
    muon_lr: float = 0.02
    lr: float = 2e-3
    """AdamW's, for everything or for what Muon leaves."""
    warmup: int = 50
    """Steps."""
    decay: float = 1.0
    """Share of the samples, at the end, over which the learning rates follow the cosine; they are constant before."""
    full_captions: float = 0.5
    """Share of samples with the full caption instead of the prompt."""
    high_noise: float = 0.0
    """Share of samples whose sigma is uniform in [.8, 1]; the others' is today's shifted logit-normal."""
    stratified: bool = True
    """Spread the noise levels of a batch evenly over their density."""
    dropout: float = 0.1
    """Share of samples with the empty prompt."""
    ema: float = 0.998
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the matrix products; weights are fp32."""
    compile: bool = True
    init: Path | None = None
    """Start from this run's averaged weights (another resolution's, say)."""
    seed: int = 0
    eval_every: int = 8000
    """Samples between held-out losses."""
    save_every: int = 20000
    """Samples between checkpoints."""
    prompts: int = 200
    """Validation prompts that the judge sees at the end, 0 for none."""
    guidance: tuple[float, ...] = (1.0, 2.5, 4.0)
    sample_steps: int = 20
    rescale: bool = True
    """Guide as Qwen-Image does, every token's velocity brought back to the norm that it has with the prompt."""
    diagnose: bool = False
    """Only measure, on the run's weights, what prompts change in the velocity, by sigma."""

    @property
    def model(self) -> MMDiTConfig:
        axes = {48: (8, 20, 20), 64: (8, 28, 28), 32: (8, 12, 12)}[self.head_dim]
        return MMDiTConfig(self.layers, self.heads, self.head_dim, joint_attention_dim=128, axes_dims_rope=axes)


@dataclass
class Texts:
    """Hidden states of captions, encoded once, padded to one length."""

    components: Path
    cache: Path
    captions: list[str]
    index: dict[str, int] = field(init=False)

    def __post_init__(self):
        import torch
        from safetensors.torch import load_file, save_file

        captions = [" ", *sorted(set(self.captions) - {" "})]
        self.index = {c: i for i, c in enumerate(captions)}
        weights = (self.components / "text_encoder/model.safetensors").read_bytes()
        digest = hashlib.blake2b(weights + json.dumps(captions).encode(), digest_size=8).hexdigest()
        path = self.cache / f"texts-{digest}.safetensors"
        if not path.exists():
            hidden = self.conditioner.encode(captions)
            lengths = torch.tensor([len(h) for h in hidden])
            padded = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True).bfloat16()
            save_file({"hidden": padded, "lengths": lengths}, path)
        tensors = load_file(path)
        self.hidden, self.lengths = tensors["hidden"], tensors["lengths"]

    @cached_property
    def conditioner(self):
        from model.conditioner import Conditioner

        return Conditioner.from_folder(self.components)

    def __call__(self, rows):
        """Hidden states fp32 [B, Lt, J] and mask [B, Lt] of captions by their rows."""
        import torch

        return self.hidden[rows].float(), torch.arange(self.hidden.shape[1]) < self.lengths[rows][:, None]


class Pilot:
    """One run: model, data, optimizers, and where it stands."""

    def __init__(self, config: Config):
        import torch
        from dense import Dense, Muon

        from evaluation.prompts import shapes_prompts
        from model.mmdit import MMDiT

        self.config, self.step = config, 0
        self.latents = np.load(config.data / "train/latents.npy", mmap_mode="r")
        self.held_out = torch.from_numpy(np.load(config.data / "held-out/latents.npy").astype(np.float32))
        pairs = {s: json.loads((config.data / s / "captions.json").read_text()) for s in ("train", "held-out")}
        self.prompts = shapes_prompts("validation")[: config.prompts]
        every = {c for p in pairs.values() for pair in p for c in pair} | {p.text for p in shapes_prompts("validation")}
        self.texts = Texts(config.components, config.data, sorted(every))
        rows = {s: torch.tensor([[self.texts.index[c] for c in pair] for pair in p]) for s, p in pairs.items()}
        self.caption_rows, self.held_out_rows = rows["train"], rows["held-out"][:, 0]
        self.tokens = self.latents.shape[-1] // 2
        self.model = MMDiT(config.model).initialize(config.seed)
        self.dense = Dense(self.model, self.tokens, self.texts.hidden.shape[1], getattr(torch, config.dtype))
        if config.compile:
            self.dense.compile_blocks()
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        inner = lambda n, p: p.ndim == 2 and n.startswith("blocks") and ".mod." not in n  # noqa: E731
        muon = [p for n, p in named if config.optimizer == "muon" and inner(n, p)]
        others = [p for n, p in named if config.optimizer != "muon" or not inner(n, p)]
        self.params = [p for _, p in named]
        adamw = torch.optim.AdamW(others, config.lr, (0.9, 0.95), weight_decay=0.01, fused=True)
        self.optimizers = [adamw]
        if muon:
            self.optimizers.append(Muon(muon, config.muon_lr, dtype=getattr(torch, config.dtype)))
        if config.init is not None:
            self.load_weights(config.init)
        self.averaged = [p.detach().clone() for p in self.params]

    # Batches: functions of (seed, step).

    def batch(self, step: int):
        import torch

        c, n = self.config, self.config.batch_size
        rng = np.random.default_rng([c.seed, 7, step])
        at = np.arange(step * n, (step + 1) * n)
        epochs = {e: np.random.default_rng([c.seed, 8, e]).permutation(len(self.latents)) for e in
                  {int(e) for e in at // len(self.latents)}}  # fmt: skip
        index = np.array([epochs[int(i // len(self.latents))][i % len(self.latents)] for i in at])
        order = np.argsort(index)
        index = index[order]
        x0 = tokens_of(torch.from_numpy(self.latents[index].astype(np.float32)))
        full = torch.from_numpy((rng.random(n) < c.full_captions).astype(np.int64))
        rows = self.caption_rows[torch.from_numpy(index), full]
        rows = torch.where(torch.from_numpy(rng.random(n) < c.dropout), 0, rows)
        sigma = torch.from_numpy(self.noise_levels(rng, n)).float()
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
        return x0, noise, sigma, rows

    def noise_levels(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Sigmas of a batch. Quantiles come from one uniform number a sample, evenly spread if `stratified`."""
        from scipy.special import ndtri

        c = self.config
        u = (rng.permutation(n) + rng.random(n)) / n if c.stratified else rng.random(n)
        high = u < c.high_noise
        rest = np.clip((u - c.high_noise) / (1 - c.high_noise), 1e-6, 1 - 1e-6)
        sigma = 1 / (1 + np.exp(-ndtri(rest)))
        mu = self.shift
        sigma = math.exp(mu) * sigma / (1 + (math.exp(mu) - 1) * sigma)
        return np.where(high, 0.8 + 0.2 * u / max(c.high_noise, 1e-6), sigma)

    @property
    def shift(self) -> float:
        from model.flow import resolution_mu

        return resolution_mu(self.tokens**2)

    # Training.

    def train_step(self) -> float:
        import torch

        c = self.config
        steps = c.samples // c.batch_size
        x0, noise, sigma, rows = self.batch(self.step)
        txt, mask = self.texts(rows)
        level = sigma[:, None, None]
        out = self.dense((1 - level) * x0 + level * noise, txt, mask, sigma)
        loss = (out - (noise - x0)).square().mean()
        for p in self.params:
            p.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        fallen = max(0.0, (self.step / steps - 1 + c.decay) / c.decay)
        factor = min(1, (self.step + 1) / c.warmup) * 0.5 * (1 + math.cos(math.pi * fallen))
        for optimizer, lr in zip(self.optimizers, (c.lr, c.muon_lr), strict=False):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
        self.step += 1
        decay = min(c.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averaged, [p.detach() for p in self.params], 1 - decay)
        return loss.item()

    def with_average(self, function, *args):
        """Call a function while the model holds the averaged weights."""
        live = [p.detach().clone() for p in self.params]
        for p, a in zip(self.params, self.averaged, strict=True):
            p.data.copy_(a)
        try:
            return function(*args)
        finally:
            for p, value in zip(self.params, live, strict=True):
                p.data.copy_(value)

    # Measures.

    def held_out_loss(self) -> dict[str, Any]:
        """Mean squared velocity error of the average, by band at fixed draws, and weighted by today's density."""
        import torch

        rng = np.random.default_rng(99)
        x0, by_band = tokens_of(self.held_out), []
        for low, high in zip(BANDS, BANDS[1:], strict=False):
            sigma = torch.from_numpy(rng.uniform(low, high, len(x0))).float()
            noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
            by_band.append(self.errors(x0, noise, sigma, self.held_out_rows).mean().item())
        levels = todays_levels(self)
        share = np.histogram(levels, BANDS)[0] / len(levels)
        return {"loss": round(float(share @ by_band), 4), "bands": [round(b, 4) for b in by_band]}

    def errors(self, x0, noise, sigma, rows):
        import torch

        n, out = self.config.batch_size, []
        for i in range(0, len(x0), n):
            part = slice(i, i + n)
            level = sigma[part, None, None]
            txt, mask = self.texts(rows[part])
            v = self.velocity((1 - level) * x0[part] + level * noise[part], txt, mask, sigma[part])
            out.append((v - (noise - x0)[part]).square().mean((1, 2)))
        return torch.cat(out)

    def velocity(self, x, txt, mask, sigma):
        """The model on any number of samples, padded to the batch that it was compiled for.

        With gradients on, although none is wanted: a forward pass without them would be compiled once more.
        """
        import torch

        n = self.config.batch_size
        fill = lambda y: torch.cat([y, y[:1].expand(n - len(y), *y.shape[1:])]) if len(y) < n else y  # noqa: E731
        return self.dense(*map(fill, (x, txt, mask, sigma)))[: len(x)].detach()

    def draw(self, rows, guidance: float, seed: int = 1000, rescale: bool = True):
        """Token latents [n, Li, C] of captions by rows, by the project's sampler's rules."""
        import torch

        from model.sampling.schedule import noise_levels

        n, half = len(rows), self.config.batch_size // 2
        sigmas = noise_levels(self.config.sample_steps, self.tokens**2)
        noise = [torch.randn(16, self.tokens * 2, self.tokens * 2, generator=torch.Generator().manual_seed(seed + i))
                 for i in range(n)]  # fmt: skip
        drawn = []
        for i in range(0, n, half):
            x = tokens_of(torch.stack(noise[i : i + half]))
            own = rows[i : i + half]
            txt, mask = self.texts(torch.cat([own, torch.zeros_like(own)]))
            for now, then in zip(sigmas, sigmas[1:], strict=False):
                level = now.expand(2 * len(x))
                if guidance > 1:
                    pos, neg = self.velocity(torch.cat([x, x]), txt, mask, level).chunk(2)
                    v = neg + guidance * (pos - neg)
                    if rescale:
                        v = v * (pos.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True))
                else:
                    v = self.velocity(x, txt[: len(x)], mask[: len(x)], level[: len(x)])
                x = x + (then - now) * v
            drawn.append(x)
        return torch.cat(drawn)

    def judged(self, guidance: float, rescale: bool = True) -> dict[str, Any]:
        """Draw the validation prompts and judge the pictures; writes a sheet of the first 64."""
        import torch

        rows = torch.tensor([self.texts.index[p.text] for p in self.prompts])
        pictures = self.decode(self.draw(rows, guidance, rescale=rescale))
        name = f"{guidance:g}{'' if rescale else '-plain'}"
        sheet(pictures[:64], self.config.out / f"sheet-{self.step * self.config.batch_size}-{name}.png")
        return {"guidance": guidance, "rescale": rescale} | verdicts(pictures, self.prompts)

    def decode(self, x) -> list[np.ndarray]:
        import torch

        from model.packing import unpatchify
        from model.text_to_image import to_uint8
        from vae.autoencoder import VAE

        vae = VAE.from_folder(self.config.vae)
        latents = torch.stack([unpatchify(t, (1, self.tokens, self.tokens)) for t in x])
        return [to_uint8(p[:, 0]) for part in latents.split(16) for p in vae.decode_latent(part)]

    def diagnosis(self) -> list[dict[str, float]]:
        """How much the velocity changes without the prompt, and with the colours of two-coloured prompts exchanged."""
        import torch

        x0, rows, rng = tokens_of(self.held_out), self.held_out_rows, np.random.default_rng(98)
        known = {v: k for k, v in self.texts.index.items()}
        swapped = torch.tensor([self.texts.index.get(swap_colors(known[int(r)]), -1) for r in rows])
        both, out = swapped >= 0, []
        for level in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
            sigma = torch.full((len(x0),), level)
            noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))

            def run(r, sigma=sigma, noise=noise, level=level):
                n, v = self.config.batch_size, []
                for i in range(0, len(r), n):
                    part = slice(i, i + n)
                    v.append(self.velocity(((1 - level) * x0 + level * noise)[part], *self.texts(r[part]), sigma[part]))
                return torch.cat(v)

            v, empty, other = run(rows), run(torch.zeros_like(rows)), run(swapped.clamp_min(0))
            ratio = lambda a, b: (a - b).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)  # noqa: E731
            error = lambda y: (y - (noise - x0)).square().mean((1, 2))  # noqa: B023, E731
            out.append({
                "sigma": level, "no prompt": ratio(v, empty).mean().item(),
                "colours swapped": ratio(v, other)[both].mean().item(), "pairs": int(both.sum()),
                "loss": error(v).mean().item(), "loss without prompt": error(empty).mean().item(),
                "loss of pairs": error(v)[both].mean().item(), "swapped": error(other)[both].mean().item(),
            })  # fmt: skip
        return out

    # Files.

    def save(self) -> None:
        from safetensors.torch import save_file

        tensors = {n: p.detach() for n, p in self.model.named_parameters()}
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        tensors |= {f"average.{n}": a for n, a in zip(trained, self.averaged, strict=True)}
        for i, optimizer in enumerate(self.optimizers):
            for j, p in enumerate(optimizer.param_groups[0]["params"]):
                tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in optimizer.state[p].items()}
        temporary = self.config.out / ".tmp-checkpoint.safetensors"
        save_file(tensors, temporary, {"step": str(self.step)})
        temporary.rename(self.config.out / "checkpoint.safetensors")

    def load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.config.out / "checkpoint.safetensors", "pt") as file:
            self.step = int(file.metadata()["step"])
            for n, p in self.model.named_parameters():
                p.data.copy_(file.get_tensor(n))
            trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
            self.averaged = [file.get_tensor(f"average.{n}") for n in trained]
            for key in file.keys():
                if key.startswith("optimizer."):
                    _, i, j, name = key.split(".")
                    optimizer = self.optimizers[int(i)]
                    optimizer.state[optimizer.param_groups[0]["params"][int(j)]][name] = file.get_tensor(key)

    def load_weights(self, folder: Path) -> None:
        """The averaged weights of another run."""
        from safetensors import safe_open

        with safe_open(folder / "checkpoint.safetensors", "pt") as file:
            for n, p in self.model.named_parameters():
                p.data.copy_(file.get_tensor(f"average.{n}" if p.requires_grad else n))

    def log(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        with (self.config.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(self.config.out.name, line, flush=True)


def todays_levels(pilot: Pilot) -> np.ndarray:
    """Many noise levels of today's density at this resolution, whatever the run trains with."""
    plain = Pilot.__new__(Pilot)
    plain.config, plain.tokens = replace(pilot.config, high_noise=0.0, stratified=True), pilot.tokens
    return plain.noise_levels(np.random.default_rng(0), 20000)


def tokens_of(latents):
    """[B, 16, h, w] -> [B, h w / 4, 64], as `model.packing.patchify` does for one."""
    b, c, h, w = latents.shape
    x = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, h * w // 4, 4 * c)


def swap_colors(caption: str) -> str:
    """The caption with its two colours exchanged, '' if it has not two."""
    from data_pipeline.synthesis.shapes_world import COLORS

    head, _, tail = caption.partition(" on a ")
    found = [w for w in head.split() if w in COLORS]
    if len(found) != 2:
        return ""
    words = [found[1] if w == found[0] else found[0] if w == found[1] else w for w in head.split()]
    for i, w in enumerate(words):
        if w in ("a", "an"):
            words[i] = "an" if words[i + 1][0] in "aeiou" else "a"
    return " ".join(words) + (f" on a {tail}" if tail else "")


def verdicts(pictures: list[np.ndarray], prompts: list[Any]) -> dict[str, Any]:
    """The judge's official and strict verdicts with 95 % intervals, and both by tag."""
    from evaluation.intervals import Scores, estimate
    from evaluation.suites import ShapesSuite

    scored = ShapesSuite("validation").score(pictures, prompts)
    rows = {rule: scored[rule] for rule in ("strict", "official")}
    strata, out = [p.stratum for p in prompts], {"n": len(prompts)}
    for name, values in rows.items():
        e = estimate(Scores(values, [p.id for p in prompts], strata), (0.0, 1.0))
        out[name] = [round(x, 3) for x in (e.value, e.low, e.high)]
        tags = {t: [v for v, s in zip(values, strata, strict=True) if s == t] for t in dict.fromkeys(strata)}
        out[f"{name} by tag"] = {t: round(sum(v) / len(v), 3) for t, v in tags.items()}
    return out


def sheet(pictures: list[np.ndarray], path: Path, columns: int = 16) -> None:
    """Pictures in rows, in order."""
    from PIL import Image

    side = pictures[0].shape[0] + 2
    canvas = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(Image.fromarray(picture), (i % columns * side, i // columns * side))
    canvas.save(path)


def main(config: Config) -> None:
    import torch

    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    pilot = Pilot(config)
    if (config.out / "checkpoint.safetensors").exists():
        pilot.load()
    else:
        pilot.log({"config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}})
    if config.diagnose:
        for row in pilot.with_average(pilot.diagnosis):
            pilot.log({"diagnosis": {k: round(v, 4) for k, v in row.items()}})
        return
    n, wall, cpu, shown, since = config.batch_size, time.monotonic(), time.process_time(), 0.0, 0

    def status() -> dict[str, Any]:
        return {"samples": pilot.step * n, "cpu_s": round(cpu_used, 1), "wall_s": round(time.monotonic() - wall, 1)}

    cpu_used = 0.0
    while pilot.step < config.samples // n:
        cpu = time.process_time()
        shown += pilot.train_step()
        since += 1
        cpu_used += time.process_time() - cpu
        done = pilot.step * n
        last = pilot.step == config.samples // n
        if done % config.eval_every < n or last:
            pilot.log(status() | {"train": round(shown / since, 4)} | pilot.with_average(pilot.held_out_loss))
            shown, since = 0.0, 0
        if done % config.save_every < n or last:
            pilot.save()
    for guidance in config.guidance if config.prompts else ():
        pilot.log(status() | {"judge": pilot.with_average(pilot.judged, guidance, config.rescale)})


if __name__ == "__main__":
    run(main, Config)
