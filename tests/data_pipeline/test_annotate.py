"""annotate.py against a real HTTP server that fails in every way, and with transformers' own model classes."""

import base64
import io
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import UserError
from data_pipeline.annotation import FIELDS, UNANSWERED, Annotator, Splits, read_annotation
from data_pipeline.claims import _machine
from data_pipeline.filters.table import FILTERS, LABELS
from data_pipeline.filters.view import View
from data_pipeline.sample import RawSample
from data_pipeline.shards import read_raw, shard_name, write_raw
from data_pipeline.stages import REPORT
from vlm.local import LocalConfig, LocalVLM

GOOD = {
    "caption": 'A wooden sign that reads "OPEN" hangs on a green door. Morning light falls on it from the left.',
    "caption_short": 'A wooden sign that reads "OPEN" on a green door.',
    "type": "Photograph",
    "style": "documentary",
    "domain": "nature",
    "category": "city/shop/sign",
    "watermarks": [],
    "abnormal_elements": ["QR code"],
}
SPLITS = ("--splits.raw", 1, "--splits.recaptioned", 1, "--splits.fused", 1)


def level(i: int) -> int:
    return 40 + 10 * i


def sample(i: int, **meta) -> RawSample:
    """A plain picture whose grey level says which it is."""
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (level(i),) * 3).save(file, "PNG")
    return RawSample(f"s{i}", file.getvalue(), "png", {"caption": f"picture number {i}", "source": "user"} | meta)


class Model(BaseHTTPRequestHandler):
    """Speaks OpenAI's protocol; `behaviour` says how each picture (by its grey level) is answered."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, text = body["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        number = (Image.open(io.BytesIO(data)).getpixel((0, 0))[0] - 40) // 10
        with self.server.lock:
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
            times = self.server.asked[number]
            self.server.asked[number] += 1
            self.server.questions.append((number, text["text"], dict(self.headers)))
        time.sleep(0.01)
        reply = self.server.behaviour(number, times)
        with self.server.lock:
            self.server.under_way -= 1
        if reply == "hang":
            self.server.released.wait(20)
            return
        if isinstance(reply, int):
            self.send_error(reply)
            return
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as http:
        http.behaviour = lambda number, times: json.dumps(GOOD)
        http.asked, http.questions, http.lock, http.released = Counter(), [], threading.Lock(), threading.Event()
        http.under_way = http.most_under_way = 0
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.released.set()
        http.shutdown()


@pytest.fixture
def annotate(run_entry, server, tmp_path: Path):
    def call(*flags: object, data: Path = tmp_path / "raw", out: Path = tmp_path / "out"):
        where = ("--server.url", f"http://127.0.0.1:{server.server_port}/v1", "--server.model", "vlm")
        return run_entry("data_pipeline/annotate.py", "--data", data, "--out", out, *where, *SPLITS, *flags)

    return call


def write(folder: Path, *shards: list[RawSample]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, samples in enumerate(shards):
        write_raw(folder / shard_name(i), samples)
    return folder


def read(folder: Path) -> dict[str, RawSample]:
    return {s.key: s for shard in sorted(folder.glob("*.tar")) for s in read_raw(shard)}


def test_samples_get_captions_by_their_split_and_what_filters_read(server, annotate, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    drawn, edit = sample(18, source="text"), sample(19)
    edit.references.append(edit.image)
    originals = [*(sample(i) for i in range(18)), drawn, edit]
    write(tmp_path / "raw", originals[:10], originals[10:])
    done = annotate("--concurrency", 3)
    assert done.returncode == 0 and "annotated 18 of 20 samples in 2 shards" in done.stdout, done.stderr
    found = read(tmp_path / "out")
    assert list(found) == [s.key for s in originals] and server.most_under_way in (2, 3)
    assert set(server.asked) == set(range(18)), "drawn pictures and results of edits are not asked about"
    assert found["s18"].meta == drawn.meta and found["s19"].references == edit.references
    assert all(headers["Authorization"] == "Bearer secret" for _, _, headers in server.questions)
    splits = Counter()
    for i in range(18):
        record = found[f"s{i}"].meta
        splits[record["caption_split"]] += 1
        assert record["captions"] == {
            "raw": f"picture number {i}",
            "long": GOOD["caption"],
            "short": GOOD["caption_short"],
        }
        models = {GOOD["caption"], GOOD["caption_short"]}
        assert record["caption"] in ({f"picture number {i}"} if record["caption_split"] == "raw" else models)
        shown = any(f'"picture number {i}"' in text for number, text, _ in server.questions if number == i)
        assert shown == (record["caption_split"] == "fused")
        assert found[f"s{i}"].image == originals[i].image
        view = View(found[f"s{i}"])
        assert [LABELS[n](view) for n in ("caption_split", "domain", "category")] == [
            record["caption_split"],
            "nature",
            "city/shop/sign",
        ]
        assert FILTERS["abnormal_elements"](view) == 1
    assert len(splits) == 3
    assert not next(r for r in REPORT[4].rules if r.filter == "abnormal_elements").keeps(1)
    assert FILTERS["abnormal_elements"](View(originals[0])) is None
    questions = len(server.questions)
    assert "annotated 18 of 20" in annotate("--concurrency", 3).stdout
    assert len(server.questions) == questions, "a finished shard is not asked about again"


def test_what_another_holds_is_waited_for_and_taken_over_if_it_dies(annotate, tmp_path):
    write(tmp_path / "raw", *([sample(i)] for i in range(5)))
    claims = tmp_path / "out" / "claims"
    claims.mkdir(parents=True)
    (claims / "shard-000002.tar.claim").write_text(f"{_machine()} 999999999 x 0")
    done = annotate()
    assert done.returncode == 0 and "5 of 5 samples in 5 shards" in done.stdout, done.stderr
    assert list(read(tmp_path / "out")) == [f"s{i}" for i in range(5)] and not list(claims.iterdir())


def test_bad_answers_are_asked_for_again_and_failures_keep_the_sample(server, annotate, tmp_path):
    def behave(number: int, times: int):
        if number == 1:  # malformed, then without a field, then good, in a fence
            return ["{'caption': ...", json.dumps({"caption": "x"}), f"Here:\n```json\n{json.dumps(GOOD)}\n```"][times]
        if number == 2:
            return "I'm sorry, I can't help with that."
        if number == 3:
            return "hang"
        if number == 4:
            return 503 if times == 0 else json.dumps(GOOD)
        if number == 5:
            return 400
        return json.dumps(GOOD)

    server.behaviour = behave
    originals = [sample(i) for i in range(8)]
    originals[7].image = originals[7].image[:40]
    write(tmp_path / "raw", originals)
    begin = time.monotonic()
    done = annotate("--server.deadline-s", 2, "--server.timeout-s", 1, "--concurrency", 4)
    assert done.returncode == 0 and "annotated 4 of 8 samples" in done.stdout, done.stderr
    assert time.monotonic() - begin < 15, "the deadline was not kept"
    found = read(tmp_path / "out")
    assert [s.image for s in found.values()] == [s.image for s in originals], "nothing may be lost"
    assert {key for key, s in found.items() if "annotation" in s.meta} == {"s0", "s1", "s4", "s6"}
    assert all(found[f"s{i}"].meta == originals[i].meta for i in (2, 3, 5, 7))
    skipped = {
        p["key"]: p["what"] for p in json.loads((tmp_path / "out/shard-000000.record.json").read_text())["skipped"]
    }
    assert skipped.keys() == {"s2", "s3", "s5", "s7"}
    assert "no valid annotation in 3 answers: there is no JSON object" in skipped["s2"]
    assert "no answer within 2 s" in skipped["s3"] and "400" in skipped["s5"] and "its picture" in skipped["s7"]
    assert (server.asked[1], server.asked[2], server.asked[5], server.asked[7]) == (3, 3, 1, 0)
    again = [text for number, text, _ in server.questions if number == 1]
    assert len(set(again)) == 3 and "could not be used: it lacks" in again[2]
    assert "skipped shard-000000.tar/s2" in done.stdout


def test_a_server_that_is_gone_stops_the_run_and_the_next_one_goes_on(server, annotate, tmp_path):
    write(tmp_path / "raw", [sample(i) for i in range(4)], [sample(i) for i in range(4, 8)])
    server.behaviour = lambda number, times: json.dumps(GOOD) if number < 4 else 503
    flags = ("--server.deadline-s", 0.3, "--concurrency", 2)
    done = annotate(*flags)
    assert done.returncode == 2 and "the last 4 questions were not answered" in done.stderr.splitlines()[-1]
    assert [p.name for p in (tmp_path / "out").glob("*.tar")] == [shard_name(0)], "nothing half-written"
    assert not list((tmp_path / "out").glob(".tmp*"))
    server.behaviour = lambda number, times: json.dumps(GOOD)
    before = server.asked[0]
    assert "annotated 8 of 8 samples in 2 shards" in annotate(*flags).stdout
    assert server.asked[0] == before


def test_a_model_that_falls_silent_in_a_shard_is_not_asked_for_ever():
    def ask(question: str, images: list[np.ndarray]) -> str:
        if images[0][0, 0, 0] == level(0):
            return json.dumps(GOOD)
        raise UserError("no answer")

    samples, problems = [sample(i) for i in range(20)], []
    passed = []
    with pytest.raises(UserError, match=f"the last {UNANSWERED} questions"):
        passed.extend(Annotator(ask, Splits()).annotate_all(samples, 1, "shard", problems.append))
    assert len(problems) == UNANSWERED


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"type": "photo of a cat"}, '"type" must be one of'),
        ({"caption": ""}, '"caption" must be a text'),
        ({"caption": ["a"]}, '"caption" must be a text'),
        ({"caption": "I'm sorry, but I can't see the image."}, '"caption" says nothing'),
        ({"caption_short": "x" * 401}, '"caption_short" has 401 characters'),
        ({"watermarks": "none"}, '"watermarks" must be a list'),
        ({"abnormal_elements": [1]}, '"abnormal_elements" must be a list'),
        ({"domain": "animals"}, '"domain" must be one of'),
    ],
)
def test_what_an_annotation_must_be(change: dict, what: str):
    with pytest.raises(ValueError, match=re.escape(what)):
        read_annotation(json.dumps(GOOD | change))


def test_annotations_are_read_and_cleaned():
    extra = GOOD | {"confidence": 1, "watermarks": [" shutterstock ", ""], "type": " Photograph"}
    found = read_annotation(f"Sure! {json.dumps(extra)} Anything else?")
    assert found.keys() == {f.name for f in FIELDS} and found["type"] == "photograph"
    assert found["watermarks"] == ["shutterstock"]
    read_annotation(json.dumps(GOOD | {"caption": 'A card with the address "www.anaruiz.com" and "I am sorry" below.'}))
    for answer in ("", "no", "{", "[1]", '{"caption": NaN'):
        with pytest.raises(ValueError):
            read_annotation(answer)


def test_splits_hold_their_shares_and_depend_on_the_key_alone():
    splits = Splits(raw=1, recaptioned=2, fused=1, short=0.25)
    drawn = [splits.of(f"k{i}") for i in range(8000)]
    counts = Counter(split for split, _ in drawn)
    for name, share in {"raw": 0.25, "recaptioned": 0.5, "fused": 0.25}.items():
        assert abs(counts[name] / 8000 - share) < 0.02
    of_models = [short for split, short in drawn if split != "raw"]
    assert abs(np.mean(of_models) - 0.25) < 0.02 and not any(short for split, short in drawn if split == "raw")
    assert drawn[:9] == [splits.of(f"k{i}") for i in range(9)]
    with pytest.raises(ValueError):
        Splits(raw=0, recaptioned=0, fused=0)


def test_random_weights_of_qwen_are_recorded_as_failures(components: Path, run_entry, tmp_path: Path):
    """transformers' Qwen2.5-VL with tiny random weights babbles: every sample fails validation, none is lost."""
    originals = [sample(i) for i in range(2)]
    write(tmp_path / "raw", originals)
    flags = ("--local.folder", components, "--local.max-tokens", 8, "--attempts", 2)
    done = run_entry("data_pipeline/annotate.py", "--data", tmp_path / "raw", "--out", tmp_path / "out", *flags)
    assert done.returncode == 0 and "annotated 0 of 2 samples" in done.stdout, done.stderr
    assert {k: s.meta for k, s in read(tmp_path / "out").items()} == {s.key: s.meta for s in originals}
    record = json.loads((tmp_path / "out" / "shard-000000.record.json").read_text())
    assert [p["what"][:36] for p in record["skipped"]] == ["no valid annotation in 2 answers: th"] * 2


def test_the_local_model_continues_its_chat_template(components: Path, monkeypatch: pytest.MonkeyPatch):
    """The prompt is the one of Qwen2.5-VL's own template, and a caption cannot spell its special tokens."""
    model = LocalVLM(LocalConfig(components, max_tokens=4))
    given = {}
    monkeypatch.setattr(model.model, "generate", lambda **inputs: given.update(inputs) or given["input_ids"])
    model.ask("Say <|im_end|>", [np.zeros((56, 84, 3), np.uint8)])
    text = model.tokenizer.decode(given["input_ids"][0])
    pictures = int(given["image_grid_thw"].prod()) // 4
    assert pictures == 6 and text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * 6
        + "<|vision_end|>Say < |im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert given["mm_token_type_ids"].sum() == 6 and not given["do_sample"]


def test_bad_requests_end_in_one_line(annotate, run_entry, components: Path, tmp_path: Path):
    raw = write(tmp_path / "raw", [sample(0)])
    out = ("--out", tmp_path / "out")
    for flags, message in [
        ((), "give one model"),
        (("--local.folder", tmp_path / "none"), "holds no Qwen2.5-VL"),
        (("--server.url", "ftp://x"), "--server.url http://"),
    ]:
        done = run_entry("data_pipeline/annotate.py", "--data", raw, *out, *flags)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert annotate("--local.folder", components).returncode == 2
    assert annotate("--concurrency", 0).returncode == 2
    assert "1 shards" in annotate("--dry-run").stdout and not (tmp_path / "out").exists()
