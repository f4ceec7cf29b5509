"""A reward behind HTTP, against a real server that fails in every way before it answers."""

import base64
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from command_line import UserError
from rewards import WeightedRewards
from rewards.remote import RemoteReward


class Server:
    """Scores pictures by their brightness and notes what it was asked; `script` says how its first answers fail."""

    def __init__(self, script=(), seconds: float = 0.0, scores=None):
        self.script, self.seconds, self.scores = list(script), seconds, scores
        self.asked, self.headers, self.times, self.busy, self.busiest = [], [], [], 0, 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    failure = server.script.pop(0) if server.script else None
                    server.asked.append(body)
                    server.headers.append(dict(self.headers))
                    server.times.append(time.monotonic())
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                time.sleep(server.seconds)
                with lock:
                    server.busy -= 1
                self.fail(failure) if failure else self.answer(200, json.dumps(server.score(body)).encode())

            def fail(self, failure):
                if failure == "cut":
                    self.close_connection = True
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
                elif failure == "hang up":
                    self.close_connection = True
                elif failure == "sleep":
                    time.sleep(1.0)
                    self.close_connection = True
                elif failure == "trickle":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
                    for _ in range(40):
                        self.wfile.write(b" ")
                        time.sleep(0.1)
                elif isinstance(failure, int):
                    self.answer(failure, b"busy,\n come again")
                else:
                    self.answer(200, failure)

            def answer(self, status, body):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def score(self, body):
        if self.scores is not None:
            return self.scores
        light = [float(np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))).mean()) / 255 for i in body["images"]]
        return {"light": light, "words": [len(p.split()) for p in body["prompts"]]}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def pictures(n: int) -> tuple[list[np.ndarray], list[str], list[dict]]:
    images = [np.full((8, 6, 3), 25 * i, np.uint8) for i in range(n)]
    return images, ["word " * (i + 1) for i in range(n)], [{"tag": "x", "number": i} for i in range(n)]


def test_it_is_named_and_weighted_like_any_reward():
    with Server() as server:
        rewards = WeightedRewards([f"remote(url={server.url}, score=words, batch=2)=0.5"])
        scores = rewards(*pictures(5))
    assert list(scores) == ["reward", "words", "light"] and scores["words"].tolist() == [1, 2, 3, 4, 5]
    assert scores["reward"].tolist() == [0.5, 1, 1.5, 2, 2.5]
    assert scores["light"].tolist() == pytest.approx([25 * i / 255 for i in range(5)])
    assert sorted(len(a["images"]) for a in server.asked) == [1, 2, 2]
    for asked in server.asked:
        for prompt, metadata in zip(asked["prompts"], asked["metadata"], strict=True):
            assert metadata == {"tag": "x", "number": len(prompt.split()) - 1}


def test_all_that_may_pass_by_is_tried_again_with_growing_pauses():
    script = [500, 503, 429, 408, "hang up", "cut", "sleep"]
    with Server(script) as server:
        reward = RemoteReward(server.url, timeout_s=0.5, pause_s=0.01)
        scores = reward(*pictures(3))
        assert scores["light"].tolist() == pytest.approx([0, 25 / 255, 50 / 255]) and not server.script
    assert len(server.asked) == len(script) + 1 and all(a == server.asked[0] for a in server.asked)
    pauses = np.diff(server.times)
    assert all(pause >= 0.01 * 2**i for i, pause in enumerate(pauses))


def test_a_server_that_is_not_there_yet_is_waited_for():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(UserError, match=r"gave no scores within 0.5 s \(\d+ attempts, ConnectError .*refused"):
            RemoteReward(url, deadline_s=0.5, pause_s=0.05)(*pictures(1))
        assert time.monotonic() - start < 5


def test_the_deadline_holds_whatever_the_server_does():
    for failure in ("sleep", "trickle", 503):
        with Server([failure] * 100) as server:
            start = time.monotonic()
            with pytest.raises(UserError, match="gave no scores within 0.6 s") as caught:
                RemoteReward(server.url, deadline_s=0.6, pause_s=0.05)(*pictures(1))
            assert time.monotonic() - start < 3.5 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "failure, error, says",
    [
        (401, UserError, "refuses to score: 401 Unauthorized busy, come again"),
        (404, UserError, "404 Not Found"),
        (302, UserError, "302"),
        (b"<html>\n not JSON", ValueError, "answered <html> not JSON: no {name: numbers}"),
        (b"[1, 2]", ValueError, "no {name: numbers}"),
        (b'{"light": [1]}', ValueError, "score light: 2 pictures got scores of shape"),
        (b'{"light": [1, NaN]}', ValueError, "score light: 1 of 2 scores are NaN"),
        (b'{"light": ["a", "b"]}', ValueError, "no {name: numbers}"),
        (b'{"light": null}', ValueError, "no {name: numbers}"),
    ],
)
def test_what_will_not_pass_ends_at_once_in_one_line(failure, error, says):
    with Server([failure]) as server:
        with pytest.raises(error) as caught:
            RemoteReward(server.url)(*pictures(2))
        assert says in str(caught.value) and "\n" not in str(caught.value) and len(server.asked) == 1


def test_one_bad_batch_ends_the_waiting_of_the_others():
    with Server([503, 404, 503, 503]) as server:
        start = time.monotonic()
        with pytest.raises(UserError, match="404"):
            RemoteReward(server.url, batch=1, pause_s=30)(*pictures(4))
        assert time.monotonic() - start < 10


def test_batches_are_on_their_way_together_but_not_too_many():
    with Server(seconds=0.2) as server:
        RemoteReward(server.url, batch=2, concurrent=3)(*pictures(10))
    assert len(server.asked) == 5 and server.busiest == 3


def test_the_token_comes_from_the_environment(monkeypatch):
    with Server() as server:
        monkeypatch.delenv("REWARD_TOKEN", raising=False)
        RemoteReward(server.url)(*pictures(1))
        monkeypatch.setenv("REWARD_TOKEN", "one")
        monkeypatch.setenv("MY_TOKEN", "two")
        RemoteReward(server.url)(*pictures(1))
        RemoteReward(server.url, token="MY_TOKEN")(*pictures(1))
    assert [h.get("Authorization") for h in server.headers] == [None, "Bearer one", "Bearer two"]


def test_bad_settings_are_named():
    for term, says in (
        ("remote", "missing 1 required positional argument: 'url'"),
        ("remote(url=127.0.0.1:8000)", "expected http://HOST:PORT/PATH"),
        ("remote(url=http://h/, batch=0)", "batch=0"),
        ("remote(url=http://h/, speed=3)", "unexpected keyword argument 'speed'"),
    ):
        with pytest.raises(ValueError) as caught:
            WeightedRewards([term])
        assert says in str(caught.value)
    with Server() as server, pytest.raises(ValueError, match="gives no score 'beauty', but light, words"):
        RemoteReward(server.url, score="beauty")(*pictures(1))
    with Server(scores={}) as server, pytest.raises(ValueError):
        RemoteReward(server.url)(*pictures(1))
