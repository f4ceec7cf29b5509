"""A tiny tokenizer and text encoder, built offline: for the CPU line, and for tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from model.conditioner import DESCRIBE, EDIT

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
"""Ids 151643 and on of the real tokenizer, in their order."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = """ a an the one two three four five six and with of on in to is at above below left right next photo picture
 red green blue yellow orange purple pink brown black white gray cyan circle square triangle star circles squares
 triangles stars background color shape small large big paper sign page slide poster screen text that says reads
 make change replace remove add move sky cube table word title line navy beige pale""".replace("\n", "")


def write_tiny_components(folder: Path | str, seed: int = 0) -> None:
    """Write `tokenizer/`, `text_encoder/`, `processor/` and `scheduler/` of a tiny model, replacing what is there.

    The tokenizer is byte-level BPE with the real special tokens, trained on the templates' words, so that templates
    drop exactly 34 and 64 tokens; the text encoder is a random Qwen2.5-VL of width 128, as the `tiny` preset wants.
    A function of `seed` alone.
    """
    from transformers import Qwen2VLImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tiny_tokenizer()
    write = {
        "tokenizer": tokenizer.save_pretrained,
        "text_encoder": _tiny_text_encoder(tokenizer, seed).save_pretrained,
        "processor": lambda to: (tokenizer.save_pretrained(to), Qwen2VLImageProcessorPil().save_pretrained(to)),
        "scheduler": _write_scheduler,
    }
    for part, save in write.items():
        temporary, final = Path(folder) / f".tmp-{part}", Path(folder) / part
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)


def _tiny_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import Qwen2Tokenizer

    tok = Tokenizer(BPE())
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [f"system\n{DESCRIBE}", f"system\n{EDIT}", "user\n", "assistant\n", "Picture 1: ", _WORDS]
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, show_progress=False, initial_alphabet=alphabet)
    tok.train_from_iterator(corpus, trainer)
    bpe = json.loads(tok.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=bpe["vocab"] | {t: len(bpe["vocab"]) + i for i, t in enumerate(SPECIAL_TOKENS)},
        merges=[tuple(m) for m in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=131072,
    )


def _tiny_text_encoder(tokenizer: Any, seed: int) -> torch.nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer) + -len(tokenizer) % 64, hidden_size=128, intermediate_size=256,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
            bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6]),
        ),
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=128, patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1],
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)


SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 8192, "max_shift": 0.9,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "stochastic_sampling": False,
    "time_shift_type": "exponential", "use_beta_sigmas": False, "use_dynamic_shifting": True,
    "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip
"""`scheduler/scheduler_config.json` of Qwen-Image; `flow.schedule` is its closed form."""


def _write_scheduler(folder: Path) -> None:
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
