"""Components with a tiny Qwen2.5-VL that was trained to understand captions of the shapes world, for some minutes.

Two losses on the prompt's tokens: the next token, and, by linear heads that are thrown away, everything said so far
(shape, colour and count of each object, relation, background). A causal model can only know at a noun which colour
belongs to it by looking back: binding, which the MMDiT then needs not learn. The class, the template and the folder's
layout are those of the real text encoder; the tokenizer has the nine backgrounds' words whole.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

try:
    from command_line import run
    from data_pipeline.synthesis import shapes_world as world
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None


@dataclass(frozen=True)
class Config:
    data: Path = Path("runs/pilot/data")
    """Folder of world.py, whose captions are learned."""
    out: Path = Path("runs/pilot/components")
    seed: int = 0
    minutes: float = 3.0
    """0 leaves the random weights."""
    batch_size: int = 96
    lr: float = 2e-3


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


def said(caption: str) -> list[tuple[int, list[int]]]:
    """For each word, (offset of its end, class of every slot once it was read)."""
    state = dict.fromkeys(SLOTS, 0)
    at, number, words, behind = 0, 1, [], None
    for word in caption.split(" "):
        at = caption.index(word, at) + len(word)
        singular = word.removesuffix("s")
        if behind is not None:
            behind = f"{behind} {word}".strip()
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
        if behind == "a":
            behind = ""
        words.append((at, list(state.values())))
    return words


def main(config: Config) -> None:
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers import Qwen2_5_VLForConditionalGeneration

    from model import conditioner, tiny_components

    torch.set_num_threads(1)
    tiny_components._WORDS += " navy beige pale"
    tiny_components.write_tiny_components(config.out, config.seed)
    c = conditioner.Conditioner.from_folder(config.out)
    if not config.minutes:
        return
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.out / "text_encoder", dtype=torch.float32)
    captions = sorted({c for pair in json.loads((config.data / "train/captions.json").read_text()) for c in pair})
    template = conditioner.TEMPLATES["text"]
    prefix = template.text.index("{}")
    tokens = c.tokenizer([template.text.format(c) for c in captions], return_offsets_mapping=True)
    labels = []
    for caption, offsets in zip(captions, tokens["offset_mapping"], strict=True):
        words = [(0, [0] * len(SLOTS)), *said(caption)]
        ends = [end - prefix for _, end in offsets[template.drop :]]
        labels.append([next(state for at, state in reversed(words) if at <= max(end, 0)) for end in ends])
    torch.manual_seed(config.seed)
    heads = nn.ModuleList(nn.Linear(128, 1 + len(values)) for values in SLOTS.values())
    params = [p for n, p in model.named_parameters() if "visual" not in n] + list(heads.parameters())
    optimizer = torch.optim.AdamW(params, config.lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    rows, start, step, pad = [torch.tensor(r) for r in tokens["input_ids"]], time.monotonic(), 0, -100
    while (done := (time.monotonic() - start) / (60 * config.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        chosen = torch.randint(len(rows), (config.batch_size,)).tolist()
        ids = nn.utils.rnn.pad_sequence([rows[i] for i in chosen], True, pad)
        target = nn.utils.rnn.pad_sequence([torch.tensor(labels[i]) for i in chosen], True, pad)
        hidden = model.model(input_ids=ids.clamp_min(0), use_cache=False).last_hidden_state[:, template.drop :]
        following = F.pad(ids[:, template.drop + 1 :], (0, 1), value=pad)
        language = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), following.flatten(), ignore_index=pad)
        # The slot's class at each token; the output is normalised, so heads read what the MMDiT will read.
        meaning = sum(
            F.cross_entropy(head(hidden).flatten(0, 1), target[..., i].flatten(), ignore_index=pad)
            for i, head in enumerate(heads)
        )
        optimizer.zero_grad()
        (0.5 * language + meaning).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            row = {"step": step, "seconds": round(time.monotonic() - start), "next token": round(language.item(), 3)}
            print(json.dumps(row | {"said so far": round(meaning.item(), 4)}), flush=True)
    model.save_pretrained(config.out / "text_encoder")


if __name__ == "__main__":
    run(main, Config)
