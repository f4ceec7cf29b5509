import hashlib
import itertools

import pytest

from command_line import UserError
from data_pipeline.synthesis import shapes_world as world
from evaluation import prompts
from evaluation.prompts import geneval_prompts, shapes_prompts

SIZES = {"validation": 200, "test-iid": 400, "test-compositional": 300}


@pytest.mark.parametrize("split", SIZES)
def test_frozen_prompts_are_the_first_of_each_tag_in_hash_order_tags_in_turn(split):
    def order(m):
        return hashlib.sha256(("order/" + world.canonical(m) + m["prompt"]).encode()).hexdigest()

    queues = [sorted(world.catalogue(split)[tag], key=order) for tag in world.TAGS if tag in world.catalogue(split)]
    turns = (m for m in itertools.chain.from_iterable(itertools.zip_longest(*queues)) if m is not None)
    frozen = shapes_prompts(split)
    assert [p.metadata for p in frozen] == list(itertools.islice(turns, SIZES[split]))
    assert all(world.split_of(p.metadata) == split and p.text == p.metadata["prompt"] for p in frozen)
    assert len({p.id for p in frozen}) == SIZES[split]


def test_changed_prompts_are_refused(monkeypatch):
    monkeypatch.setitem(prompts.SHAPES_SHA256, "validation", "0" * 64)
    with pytest.raises(ValueError, match="not the frozen split"):
        shapes_prompts("validation")


def test_bad_prompt_files_are_named_with_their_line(tmp_path):
    file = tmp_path / "mine.jsonl"
    with pytest.raises(UserError, match="no prompts at"):
        geneval_prompts(file)
    file.write_text('{"tag": "a", "prompt": "b", "include": []}\n{"tag": "a"}\n')
    with pytest.raises(UserError, match=r"line 2: no prompt, include"):
        geneval_prompts(file)
    file.write_text("{}\n[broken\n")
    with pytest.raises(UserError, match="line 1: no tag"):
        geneval_prompts(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        geneval_prompts(file)
