from dataclasses import dataclass
from pathlib import Path

import pytest

from training.curves import read_rows
from training.engine.config import EngineConfig, OptimizerConfig
from training.loop import LoopConfig
from training.run_folder import RunFolder
from training.source import named_by


def test_a_folder_that_a_run_names_is_found_from_elsewhere(tmp_path: Path, monkeypatch):
    run, components = tmp_path / "project" / "runs" / "demo" / "sft", tmp_path / "project" / "runs" / "demo" / "parts"
    for folder in (run, components):
        folder.mkdir(parents=True)
    assert named_by(run, "runs/demo/parts") == components
    assert named_by(run, components) == components
    assert named_by(run, "runs/demo/others") == Path("runs/demo/others")
    monkeypatch.chdir(tmp_path / "project")  # what is here comes first, by its short name
    assert named_by(Path("runs/demo/sft"), "runs/demo/parts") == Path("runs/demo/parts")


@dataclass(frozen=True)
class Settings:
    data: str = "a"
    loop: LoopConfig = LoopConfig()
    engine: EngineConfig = EngineConfig()


def test_a_run_that_goes_on_with_other_settings_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def goes_on(settings: Settings) -> None:
        run = RunFolder(tmp_path, settings)
        run.open(0)
        run.close()

    run = RunFolder(tmp_path, Settings())
    goes_on(Settings(data="b"))  # nothing has been learnt yet
    assert not capsys.readouterr().out
    (run.checkpoints / "step_00000001").mkdir()
    goes_on(Settings(data="b", loop=LoopConfig(steps=9)))  # longer: the same run
    assert not capsys.readouterr().out
    RunFolder(tmp_path, Settings(data="d"))  # refused before it could begin
    goes_on(Settings(data="c", engine=EngineConfig(optimizer=OptimizerConfig(lr=0.5))))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["data was b, is c", "engine.optimizer.lr was 0.0001, is 0.5"]


def test_rows_can_be_read_while_a_run_goes_on(tmp_path: Path):
    run = RunFolder(tmp_path, Settings())
    run.open(0)
    for step in range(1, 4):
        run.log(step, {"samples": 4.0}, {"seconds": 0.5})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["images"] for row in read_rows(tmp_path / "speed.jsonl")] == [4.0, 8.0, 12.0]
    run.close()
    again = RunFolder(tmp_path, Settings())  # it died after step 2 was saved
    again.open(2)
    again.log(3, {"samples": 4.0}, {"seconds": 0.5})
    assert read_rows(tmp_path / "speed.jsonl")[-1]["images"] == 12.0
    again.close()


def test_a_row_cut_by_a_full_disk_is_dropped(tmp_path: Path):
    run = RunFolder(tmp_path, Settings())
    run.open(0)
    run.log_scores("validation", 0, {"strict": 0.5})
    run.close()
    with (tmp_path / "validation.jsonl").open("a") as file:
        file.write('{"step": 0, "stri')
    again = RunFolder(tmp_path, Settings())
    again.open(0)
    again.close()
    assert not (tmp_path / "validation.jsonl").read_text()


def test_another_optimizer_has_no_state(tmp_path: Path):
    run = RunFolder(tmp_path, Settings())
    (run.checkpoints / "step_00000001").mkdir()
    for changed in (OptimizerConfig(muon_lr=0.1), OptimizerConfig(width_base=64)):
        with pytest.raises(ValueError, match="begun with AdamW alone, and its optimizer has no state for another"):
            RunFolder(tmp_path, Settings(engine=EngineConfig(optimizer=changed)))
    RunFolder(tmp_path, Settings())  # what it was begun with is still what is noted
