"""The tiny text encoder learns what captions say."""

import numpy as np
import pytest

from data_pipeline.synthesis import shapes_world as world
from demo import text_encoder as te
from model.conditioner import Conditioner
from model.tiny_components import write_tiny_components


def meaning(caption: str) -> list[dict[str, str]]:
    """What was said after each word, by name."""
    return [
        {slot: te.SLOTS[slot][i - 1] for slot, i in zip(te.SLOTS, state, strict=True) if i}
        for _, state in te.said(caption)
    ]


def test_what_was_said_by_each_word():
    *_, last = meaning("a red star above an orange circle on a pale blue background")
    assert last == {
        "shape 1": "star", "color 1": "red", "relation": "above", "shape 2": "circle", "color 2": "orange",
        "background": "pale blue",
    }  # fmt: skip
    assert meaning("three green squares on a black background")[2] == {
        "count 1": "three", "color 1": "green", "shape 1": "square",
    }  # fmt: skip
    for split in world.SPLITS:
        for group in world.catalogue(split).values():
            for metadata in group[::50]:
                said = meaning(metadata["prompt"])[-1]
                assert said.get("background") == metadata.get("background")
                shapes = [said[f"shape {i + 1}"] for i in range(len(metadata["include"]))]
                assert sorted(shapes) == sorted(c["class"] for c in metadata["include"])


def test_it_learns_to_read(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(te, "CAPTIONS", 1000)
    monkeypatch.setattr(te, "BATCH_SIZE", 32)
    write_tiny_components(tmp_path)
    before = Conditioner.from_folder(tmp_path).fingerprint()
    assert te.train_text_encoder(tmp_path, 2) > 8
    assert te.train_text_encoder(tmp_path, 100) < 4
    after = Conditioner.from_folder(tmp_path).fingerprint()
    assert before[0] != after[0] and before[1] == after[1], "the weights change, tokenizer and template don't"


def test_captions_are_those_of_training_pictures():
    texts = te.captions(np.random.default_rng(0), 400)
    held_out = {m["prompt"] for s in world.SPLITS[1:] for group in world.catalogue(s).values() for m in group}
    assert not held_out & set(texts) and len(set(texts)) > 300
