from pathlib import Path

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
