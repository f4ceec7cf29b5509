"""Raw shards from elsewhere: HTTP and other file systems, slow or broken ones, addresses that are none."""

import http.server
import threading
import time
from pathlib import Path

import pytest

from command_line import UserError
from data_pipeline import sources
from data_pipeline.shards import read_encoded, shard_name, write_raw
from data_pipeline.sources import find_sources, within


@pytest.fixture
def raw(tmp_path: Path, make_raw) -> Path:
    (tmp_path / "raw").mkdir()
    for i in range(3):
        write_raw(tmp_path / "raw" / shard_name(i), make_raw(4, seed=i))
    return tmp_path / "raw"


@pytest.fixture
def serve(raw: Path):
    """serve(delay): an HTTP server of the raw shards, which waits before each answer; returns its address."""
    servers = []

    def begin(delay_s: float = 0.0, cut: bool = False) -> str:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(raw))

            def do_GET(self):
                time.sleep(delay_s)
                if cut:
                    size = (raw / self.path.strip("/")).stat().st_size
                    self.send_response(200)
                    self.send_header("Content-Length", str(size))
                    self.end_headers()
                    self.wfile.write(b"0" * (size // 2))
                    return
                super().do_GET()

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_set_made_over_http_is_that_made_from_a_folder(raw, serve, run_entry, components, tmp_path):
    url = f"{serve()}/shard-{{000000..000002}}.tar"
    for data, out in ((raw, "here"), (url, "there")):
        done = run_entry(
            "data_pipeline/produce.py", "--data", data, "--components", components, "--out", tmp_path / out
        )
        assert done.returncode == 0 and "12 samples in 3 shards" in done.stdout, done.stderr
    for i in range(3):
        here, there = ((tmp_path / out / shard_name(i)).read_bytes() for out in ("here", "there"))
        assert here == there
    assert not (tmp_path / "there" / "fetched").exists()
    assert sum(1 for _ in read_encoded(tmp_path / "there" / shard_name(0))) == 4


def test_other_file_systems_are_listed_and_read(raw):
    import fsspec

    memory = fsspec.filesystem("memory")
    for shard in raw.iterdir():
        memory.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    found = find_sources("memory://bucket/*.tar", 5)
    assert list(found) == [shard_name(i) for i in range(3)] and all(s.remote for s in found.values())
    with found[shard_name(1)].local(raw.parent / "spool", 5) as path:
        assert path.read_bytes() == (raw / shard_name(1)).read_bytes()
    assert not path.exists()


def test_what_is_slow_or_cut_is_given_up_in_time(raw, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PAUSE_S", 0.01)
    stamp = {"size": (raw / shard_name(0)).stat().st_size}
    for address, why in ((serve(delay_s=30), "no answer within 0.3 s"), (serve(cut=True), "")):
        source = sources.Source(f"{address}/{shard_name(0)}", stamp, remote=True)
        begin = time.monotonic()
        with (
            pytest.raises(ValueError, match=f"{shard_name(0)} could not be fetched: .*{why}"),
            source.local(tmp_path / "spool", 0.3),
        ):
            pass
        assert time.monotonic() - begin < 10 and not list((tmp_path / "spool").iterdir())
    with pytest.raises(TimeoutError, match="no answer within 0.05 s"):
        within(0.05, lambda: time.sleep(5))


@pytest.mark.parametrize(
    "data, why",
    [
        ("pipe:cat shard.tar", "never from commands"),
        ("http://host/a.tar|sh", "never from commands"),
        ("memory://bucket/none-*.tar", "names no shards"),
        ("memory://bucket/.hidden.tar", "a shard's name has letters"),
        ("memory://a;b.tgz", "a shard's name has letters"),
        ("nosuchscheme://x/a.tar", "nosuchscheme"),
        ("memory://bucket/missing.tar", "missing.tar"),
    ],
)
def test_addresses_that_are_none_are_refused_in_a_line(data, why):
    with pytest.raises(UserError, match=why):
        find_sources(data, 2.0)
