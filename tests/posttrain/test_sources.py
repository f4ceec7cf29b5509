"""What lies at a path, as trainers and samplers take it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import CONFIG, SIZE_PX, run_entry
from worlds import run_world

from command_line import UserError
from training.loading import load
from training.source import look, preset_of


def test_a_run_and_its_checkpoint_are_one_model(init, components):
    run, (checkpoint,) = look(init), [look(p) for p in (init / "checkpoints").iterdir()]
    assert (run.kind, checkpoint.kind) == ("run", "checkpoint")
    assert run.model_config() == checkpoint.model_config() == CONFIG and preset_of(CONFIG) is None
    assert run.checkpoint() == checkpoint.path and run.components() == checkpoint.components() == components
    assert run.side_px() == SIZE_PX and run.fingerprint() == checkpoint.fingerprint() != run.fingerprint(ema=False)


def test_what_holds_no_model_is_refused(tmp_path, components):
    for path, says in ((tmp_path / "none", "does not exist"), (tmp_path, "holds no model"), (components, "no model")):
        with pytest.raises(UserError, match=says):
            look(path)
    assert look("Qwen/Qwen-Image").kind == "hub"
    (tmp_path / "adapter_model.safetensors").touch()
    assert look(tmp_path).kind == "lora"


def test_a_picture_to_edit_is_seen_at_the_size_of_training(init):
    maker = load(init)
    picture = Image.fromarray(np.zeros((200, 200, 3), np.uint8))
    assert maker.encode_reference(picture).shape[-2:] == (SIZE_PX // 8, SIZE_PX // 8)


def count_reads(rank: int, init: Path, out: Path) -> dict[str, int]:
    """How often a post-training run reads each file of what it starts from, to the end."""
    from training.engine import checkpoint

    counts, digest = {}, checkpoint.digest

    def counted(path: Path) -> str:
        counts[path.name] = counts.get(path.name, 0) + (init in path.parents)
        return digest(path)

    checkpoint.digest = counted
    run_entry(rank, "flow_grpo", 1, 1, init=init, out=out, prompts_per_update=1, group=2)
    return counts


def test_the_starting_weights_are_read_once_to_be_checked(init, tmp_path):
    (counts,) = run_world(1, count_reads, init, tmp_path / "grpo", deadline_s=400)
    assert set(counts.values()) == {1}
