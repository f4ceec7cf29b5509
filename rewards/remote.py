"""Remote reward: scores of a model that runs elsewhere, behind HTTP.

    POST url   {"images": [PNG in base64, ...], "prompts": [...], "metadata": [...]}
    answer     {"name": [a number for each picture], ...}

Pictures go in batches, several at a time. What may pass by (no connection, no answer in time, 408, 429, 5xx) is tried
again with growing pauses until the deadline; what won't (another status, an answer of another form) ends at once. A
token, if the server wants one, is read from an environment variable.
"""

import base64
import io
import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from torch import Tensor

from command_line import UserError
from rewards import checked


class RemoteReward:
    """remote(url=http://HOST:PORT/PATH). Raises UserError for no answer, ValueError for one of another form."""

    def __init__(
        self,
        url: str,
        score: str = "",
        batch: int = 16,
        concurrent: int = 4,
        connect_s: float = 5.0,
        timeout_s: float = 120.0,
        deadline_s: float = 600.0,
        pause_s: float = 0.5,
        token: str = "REWARD_TOKEN",
    ):
        """`score` names the one that counts (default: the server's first), `token` the variable that holds the token.

        A batch has at most `batch` pictures and waits `timeout_s` for an answer; `concurrent` batches are on their way
        at a time; `deadline_s` is for all that is asked together. Pauses between attempts begin with `pause_s`.
        """
        import httpx2

        if httpx2.URL(url).scheme not in ("http", "https") or not httpx2.URL(url).host:
            raise ValueError(f"url={url}: expected http://HOST:PORT/PATH")
        if min(batch, concurrent) < 1:
            raise ValueError(f"batch={batch}, concurrent={concurrent}: expected 1 or more")
        self.url, self.score, self.batch, self.concurrent = url, score, batch, concurrent
        self.connect_s, self.timeout_s, self.deadline_s, self.pause_s = connect_s, timeout_s, deadline_s, pause_s
        headers = {"Authorization": f"Bearer {secret}"} if (secret := os.environ.get(token)) else {}
        self.client = httpx2.Client(headers=headers, limits=httpx2.Limits(max_connections=concurrent))

    def __call__(self, images: list[np.ndarray], prompts: list[str], metadata: list[dict]) -> dict[str, Tensor]:
        """Every score of the server, fp32 [B], the one that counts first."""
        import torch

        rows = list(zip(images, prompts, metadata, strict=True))
        end, given_up = time.monotonic() + self.deadline_s, threading.Event()
        pool = ThreadPoolExecutor(self.concurrent, "remote reward")
        starts = range(0, len(rows), self.batch)
        asked = [pool.submit(self._ask, rows[i : i + self.batch], end, given_up) for i in starts]
        try:  # one batch that fails ends the others' waiting
            done, late = wait(asked, max(0.0, end - time.monotonic()) + 1, FIRST_EXCEPTION)
            answers = [future.result() for future in asked if future in done]
            if late:  # a server that sends a byte now and then
                raise UserError(f"{self.url} gave no scores within {self.deadline_s:g} s")
        finally:
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if odd := [a for a in answers if a.keys() != answers[0].keys()]:
            raise ValueError(f"{self.url} names other scores for other pictures: {[*answers[0]]} and {[*odd[0]]}")
        found = {name: torch.cat([a[name] for a in answers]) for name in answers[0]}
        first = self.score or next(iter(found), "")
        if first not in found:
            raise ValueError(f"{self.url} gives no score {first!r}, but {', '.join(found)}")
        return {first: found[first], **found}

    def _ask(self, rows: list[tuple], end: float, given_up: threading.Event) -> dict[str, Tensor]:
        """One batch, attempt after attempt."""
        import httpx2

        images, prompts, metadata = zip(*rows, strict=True)
        body = {"images": [_png(i) for i in images], "prompts": prompts, "metadata": metadata}
        attempts, problem = 0, "not asked"
        while (left := end - time.monotonic()) > 0 and not given_up.is_set():
            limits = httpx2.Timeout(min(self.timeout_s, left), connect=min(self.connect_s, left))
            try:
                reply = self.client.post(self.url, json=body, timeout=limits)
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__} {error}"
            else:
                if reply.is_success:
                    return self._scores(reply, len(rows))
                problem = f"{reply.status_code} {reply.reason_phrase} {_short(reply.text)}"
                if reply.status_code < 500 and reply.status_code not in (408, 429):
                    raise UserError(f"{self.url} refuses to score: {problem}")
            given_up.wait(max(0.0, min(self.pause_s * 2**attempts, end - time.monotonic())))
            attempts += 1
        raise UserError(f"{self.url} gave no scores within {self.deadline_s:g} s ({attempts} attempts, {problem})")

    def _scores(self, reply: Any, count: int) -> dict[str, Tensor]:
        try:
            return {name: checked(f"score {name}", values, count) for name, values in reply.json().items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.url} answered {_short(reply.text)}: no {{name: numbers}} ({error})") from None


def _png(image: np.ndarray) -> str:
    from PIL import Image

    Image.fromarray(image).save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _short(text: str) -> str:
    return " ".join(text[:100].split())
