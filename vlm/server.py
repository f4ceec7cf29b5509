"""A vision-language model behind an OpenAI-compatible server (vLLM, SGLang, ...), asked about pictures.

Every request has a timeout, every question a deadline; what may pass by (no connection, 429, 5xx, a cut answer) is
tried again with growing pauses, what won't (another 4xx) ends at once. The key, if the server wants one, is read from
OPENAI_API_KEY.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np

from command_line import UserError


@dataclass(frozen=True)
class ServerConfig:
    """Where the judging model answers."""

    url: str = ""
    """Up to and with the version, as http://localhost:8000/v1."""
    model: str = ""
    """Name under which the server knows the model."""
    timeout_s: float = 120.0
    """Longest wait for one answer."""
    deadline_s: float = 900.0
    """Longest wait for one question with all its attempts."""
    attempts: int = 6
    max_tokens: int = 512


class ChatServer:
    """Raises UserError if no server was given."""

    def __init__(self, config: ServerConfig):
        if not config.url.startswith(("http://", "https://")) or not config.model:
            raise UserError("no server to judge with: give --server.url http://HOST:PORT/v1 and --server.model NAME")
        self.config = config
        self.fingerprint = f"{config.model}, {config.max_tokens} tokens"

    def ask(self, question: str, images: list[np.ndarray]) -> str:
        """The answer, at temperature 0; UserError when the server refuses or the deadline passes."""
        body = json.dumps(
            {
                "model": self.config.model,
                "temperature": 0,
                "seed": 0,
                "max_tokens": self.config.max_tokens,
                "messages": [
                    {"role": "user", "content": [*map(_image_part, images), {"type": "text", "text": question}]}
                ],
            }
        ).encode()
        end = time.monotonic() + self.config.deadline_s
        problem = "no attempt was made"
        for attempt in range(self.config.attempts):
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                return self._post(body, min(self.config.timeout_s, left))
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 409, 429):
                    detail = error.read(300).decode(errors="replace")
                    raise UserError(f"{self.config.url} refuses the question: {problem} {detail}") from None
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__} {error}"
            time.sleep(max(0.0, min(0.5 * 2**attempt, end - time.monotonic())))
        raise UserError(f"{self.config.url} gave no answer within {self.config.deadline_s:g} s ({problem}); run again")

    def _post(self, body: bytes, timeout: float) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url = self.config.url.rstrip("/") + "/chat/completions"
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=timeout) as reply:
            content = json.loads(reply.read())["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise ValueError("the answer holds no text")
        return content


def _image_part(image: np.ndarray) -> dict[str, Any]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }
