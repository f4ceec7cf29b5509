"""A tiny Qwen2.5-VL that has learnt to read captions of the shapes world, as the real one has learnt to read.

Two losses on a caption's tokens: the next token, and everything said so far (shape, colour and count of each object,
relation, background), read by linear heads that are thrown away. A causal model can only know at a noun which colour
belongs to it by looking back: that is binding, which the MMDiT then need not learn from pictures.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command_line import progress
from data_pipeline.synthesis import shapes_world as world
from data_pipeline.synthesis.full_captions import full_caption
from model.conditioner import TEMPLATES, Conditioner

SLOTS: dict[str, tuple[str, ...]] = {
    "shape 1": world.SHAPES,
    "color 1": tuple(world.COLORS),
    "count 1": tuple(world.COUNTS.values()),
    "relation": tuple(r.split()[0] for r in world.RELATIONS),
    "shape 2": world.SHAPES,
    "color 2": tuple(world.COLORS),
    "background": tuple(world.BACKGROUNDS),
}
"""What a caption can say, with its values; class 0 is *not said yet*."""
CAPTIONS = 8000
BATCH_SIZE, LEARNING_RATE = 96, 2e-3
IGNORED = -100


def captions(rng: np.random.Generator, count: int) -> list[str]:
    """Prompts and full captions of training pictures, in equal shares."""
    found = []
    for i in range(count):
        metadata = world.sample_prompt(rng, "train")
        if i % 2:
            placed, background, _ = world.arrange(metadata, rng, (64, 64))
            found.append(full_caption(metadata, placed, background, rng))
        else:
            found.append(metadata["prompt"])
    return found


def said(caption: str) -> list[tuple[int, list[int]]]:
    """For each word, (offset of its end, class of every slot once it was read)."""
    state = dict.fromkeys(SLOTS, 0)
    at, number, words, behind = 0, 1, [], None
    for word in caption.split(" "):
        at = caption.index(word, at) + len(word)
        singular = word.removesuffix("s")
        if behind is not None:
            behind = f"{behind} {word}".strip().removeprefix("a ").removeprefix("a")
            if behind in world.BACKGROUNDS:
                state["background"] = 1 + SLOTS["background"].index(behind)
        elif word == "on":
            behind = ""
        elif word in world.COUNTS.values():
            state["count 1"] = 1 + SLOTS["count 1"].index(word)
        elif word in world.COLORS:
            state[f"color {number}"] = 1 + SLOTS["color 1"].index(word)
        elif word in SLOTS["relation"]:
            state["relation"] = 1 + SLOTS["relation"].index(word)
        elif singular in world.SHAPES:
            state[f"shape {number}"] = 1 + SLOTS["shape 1"].index(singular)
            number = 2
        words.append((at, list(state.values())))
    return words


@dataclass(frozen=True)
class Read:
    """Captions as the model reads them."""

    ids: list[Tensor]
    """Token ids [L_i] with the template around the caption."""
    labels: list[Tensor]
    """int [L_i - drop, slots]: what was said by each token behind the template's beginning."""

    @classmethod
    def of(cls, texts: list[str], conditioner: Conditioner) -> "Read":
        template = TEMPLATES["text"]
        prefix = template.text.index("{}")
        tokens = conditioner.tokenizer([template.text.format(t) for t in texts], return_offsets_mapping=True)
        labels = []
        for text, offsets in zip(texts, tokens["offset_mapping"], strict=True):
            words = [(0, [0] * len(SLOTS)), *said(text)]
            ends = [end - prefix for _, end in offsets[template.drop :]]
            labels.append([next(state for at, state in reversed(words) if at <= max(end, 0)) for end in ends])
        return cls([torch.tensor(r) for r in tokens["input_ids"]], [torch.tensor(r) for r in labels])

    def batches(self, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Random (ids [B, L], labels [B, L - drop, slots]), padded with IGNORED."""
        pad = nn.utils.rnn.pad_sequence
        while True:
            chosen = rng.integers(len(self.ids), size=BATCH_SIZE)
            yield (
                pad([self.ids[i] for i in chosen], True, IGNORED),
                pad([self.labels[i] for i in chosen], True, IGNORED),
            )


def losses(model: nn.Module, heads: nn.ModuleList, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(of the next token, of what was said so far: cross-entropies in nats, summed over the slots)."""
    drop = TEMPLATES["text"].drop
    hidden = model.model(input_ids=ids.clamp_min(0), use_cache=False).last_hidden_state[:, drop:]
    following = F.pad(ids[:, drop + 1 :], (0, 1), value=IGNORED)
    language = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), following.flatten(), ignore_index=IGNORED)
    meaning = torch.stack([
        F.cross_entropy(head(hidden).flatten(0, 1), labels[..., i].flatten(), ignore_index=IGNORED)
        for i, head in enumerate(heads)
    ])  # fmt: skip
    return language, meaning.sum()


def train_text_encoder(folder: Path, steps: int, seed: int = 0) -> float:
    """Train `text_encoder/` of a components folder in place; returns the last loss of what was said so far.

    The visual tower, which captions don't reach, stays as it is.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    conditioner = Conditioner.from_folder(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32).train()
    rng = np.random.default_rng([seed, 1])
    batches = Read.of(captions(rng, CAPTIONS), conditioner).batches(rng)
    torch.manual_seed(seed)
    heads = nn.ModuleList(nn.Linear(model.config.text_config.hidden_size, 1 + len(v)) for v in SLOTS.values())
    params = [p for n, p in model.named_parameters() if "visual" not in n] + list(heads.parameters())
    optimizer = torch.optim.AdamW(params, LEARNING_RATE, (0.9, 0.98), weight_decay=0.01, fused=True)
    rate = lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with progress(steps, "text encoder", "step") as bar:
        for _ in range(steps):
            language, meaning = losses(model, heads, *next(batches))
            optimizer.zero_grad()
            (0.5 * language + meaning).backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(next_token=f"{language.item():.3f}", said=f"{meaning.item():.4f}", refresh=False)
            bar.update()
    model.save_pretrained(folder / "text_encoder")
    return meaning.item()
