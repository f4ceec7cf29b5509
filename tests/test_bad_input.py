"""Bad input gets one clear line and a non-zero exit; nothing half-written stays."""

import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def command(*words: object, limit: int | None = None, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run an entry; `limit` is the largest file, in bytes, that it may write."""

    def before():
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {k: v for k, v in os.environ.items() if k not in ("DEBUG", "PYTHONPATH")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *python, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=environment, preexec_fn=before,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """The command failed with one line that has these words in it."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ") or "Traceback" in line]
    assert done.returncode not in (0, None) and len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def picture(path: Path, seed: int = 0) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def photos(tmp_path):
    """A folder of three captioned pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        picture(folder / f"{i}.png", i)
        (folder / f"{i}.txt").write_text(f"picture number {i}")
    return folder


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and (p.name.startswith(".tmp") or p.suffix == ".tar")]


def ingest(data: Path, out: Path, **options) -> subprocess.CompletedProcess:
    return command("data_pipeline/ingest.py", "--data", data, "--out", out, **options)


def test_missing_path(tmp_path):
    refused(ingest(tmp_path / "nowhere", tmp_path / "out"), "nowhere", "does not exist")
    refused(command("demo/line.py", "--data", tmp_path / "nowhere"), "nowhere", "does not exist")


def test_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(ingest(tmp_path / "empty", tmp_path / "out"), "empty")
    assert not leftovers(tmp_path)


def test_missing_caption(photos, tmp_path):
    (photos / "1.txt").unlink()
    refused(ingest(photos, tmp_path / "out"), "1.png", "caption")
    assert not leftovers(tmp_path / "out")


def test_truncated_image(photos, tmp_path):
    whole = (photos / "2.png").read_bytes()
    (photos / "2.png").write_bytes(whole[: len(whole) // 2])
    refused(ingest(photos, tmp_path / "out"), "2.png")
    assert not leftovers(tmp_path / "out")


def test_tar_cut_in_the_middle(photos, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "a.tar", "w") as tar:
        for name in sorted(photos.iterdir()):
            tar.add(name, name.name)
    whole = (tars / "a.tar").read_bytes()
    (tars / "a.tar").write_bytes(whole[: len(whole) * 2 // 3])
    done = ingest(tars, tmp_path / "out")
    # what is whole is used, what is lost is named
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a.tar" in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "out").glob("*.tar"))


def test_disk_full(photos, tmp_path):
    """A file-size limit stands in for a full disk: the write fails midway, with errno EFBIG instead of ENOSPC."""
    refused(ingest(photos, tmp_path / "out", limit=20_000))
    assert not leftovers(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk needs root")
def test_disk_really_full(photos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a small disk")
    try:
        refused(ingest(photos, disk / "out"), "no space left")
        assert not leftovers(disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_no_write_permission(photos, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    target = closed / "out" if os.geteuid() else Path("/sys/kernel/out")  # root may write into any folder but these
    refused(ingest(photos, target), "permission")


def test_not_installed():
    for entry in ("pretrain/stage.py", "posttrain/dpo.py", "data_pipeline/ingest.py", "model/sample.py"):
        done = command(entry, "--help", python=("-I", "-S"))
        assert done.returncode == 1 and "not installed" in done.stderr and "make setup" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_config_file(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")
    refused(command("pretrain/stage.py", "--config", broken), "broken.toml", "TOML")
    broken.write_text("no_such_name = 3")
    refused(command("pretrain/stage.py", "--config", broken), "no_such_name")
    refused(command("pretrain/stage.py", "--config", tmp_path / "none.toml"), "none.toml", "does not exist")


def test_stage_refuses_what_is_not_there(tmp_path):
    refused(command("pretrain/stage.py", "--data", tmp_path / "none"), "none", "does not exist")
    refused(command("posttrain/dpo.py", "--init", tmp_path / "none", "--out", tmp_path / "out"), "none")
    refused(command("model/export.py", "--checkpoint", tmp_path / "none", "--output", tmp_path / "out"), "none")
    refused(command("model/sample.py", "--checkpoint", tmp_path / "none", "--prompt", "x"), "none")
    assert not leftovers(tmp_path)


def test_checkpoint_of_another_config(tmp_path):
    """A run that starts from, or resumes, a checkpoint of another architecture says how they differ."""
    import torch

    from data_pipeline.encoding import Encoder
    from data_pipeline.sample import RawSample
    from data_pipeline.shards import write_raw
    from model.conditioner import Conditioner
    from model.config import MMDiTConfig
    from model.diffusers_io.folder import write_pipeline
    from model.mmdit import MMDiT
    from model.tiny_components import write_tiny_components
    from vae.autoencoder import VAE
    from vae.config import PRESETS

    components, encoded, raw = tmp_path / "components", tmp_path / "encoded", tmp_path / "raw"
    write_tiny_components(components)
    torch.manual_seed(0)
    VAE(PRESETS["tiny"]).save(components)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    meta = {"caption": "red", "source": "user", "width": 64, "height": 64}
    for folder in (encoded, raw):
        folder.mkdir()
    write_raw(raw / "shard-000000.tar", [RawSample("a", buffer.getvalue(), "png", meta)])
    encoder = Encoder(Conditioner.from_folder(components), VAE.from_folder(components), res=64)
    encoder.write_description(encoded)
    encoder.encode_shard(raw / "shard-000000.tar", encoded / "shard-000000.tar", pytest.fail, lambda n: None)
    other = MMDiTConfig(2, 4, 48, joint_attention_dim=128, axes_dims_rope=(8, 20, 20))
    write_pipeline(tmp_path / "other", other, MMDiT(other).initialize(0).state_dict(), components)

    stage = ["pretrain/stage.py", "--preset", "tiny", "--data", encoded, "--out", tmp_path / "run"]
    refused(command(*stage, "--init", tmp_path / "other"), "num_layers")
    refused(command(*stage[:-1], tmp_path / "b", "--res", "640", "--init", "random"), "64 px", "96 px")
