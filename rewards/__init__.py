"""Rewards: what post-training maximises, by name. Heavy libraries are imported when a reward is made, not before.

A reward is a callable `(images: list of uint8 [H, W, 3], prompts, metadata) -> {name: fp32 tensor [B]}`. A reward is
never the judge of what it trained (see evaluation/). On the command line it is

    NAME            of the list below
    FILE.py:CLASS   of your own
    TERM(key=value, ...)   with settings, arguments of the class
    TERM=WEIGHT     in a sum
"""

import re
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from command_line import load_named

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Reward = Callable[[list[np.ndarray], list[str], list[dict]], dict[str, Tensor]]

REWARDS = {
    "shapes": "rewards.shapes:ShapesReward",
    "shapes_soft": "rewards.shapes:ShapesReward",
    "ocr": "rewards.ocr:OCRReward",
    "remote": "rewards.remote:RemoteReward",
}
"""name of a score -> the class that gives it."""
DEADLINE_S = 900.0
"""Longest that a reward may think about the pictures of one rollout."""

_TERM = re.compile(r"(?P<name>[^(=]+?)(?:\((?P<settings>.*)\))?(?:=(?P<weight>[^()=]*))?")


def make_reward(term: str) -> "Reward":
    """The reward of a term without a weight. ValueError or UserError if there is none."""
    match = _TERM.fullmatch(term)
    if match is None or match["weight"] is not None:
        raise ValueError(f"{term!r} is no NAME, FILE.py:CLASS or either with (key=value, ...)")
    name = match["name"].strip()
    if name not in REWARDS and ":" not in name:
        raise ValueError(f"unknown reward {name!r}; known are {', '.join(REWARDS)}, or your own as FILE.py:CLASS")
    try:
        return load_named(REWARDS.get(name, name))(**_settings(match["settings"] or ""))
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


class WeightedRewards:
    """Weighted sum of scores; {"reward": the sum, and every score under its own name, if that is another}.

    A reward of which several terms take scores, with the same settings, is asked once.
    Of a reward of the list, the score of that name counts; of one's own, the first that it gives. A reward that gives
    another number of scores than there are pictures, or one that is not finite, or none in time, ends the run with a
    line that names it.
    """

    def __init__(self, terms: Iterable[str], deadline_s: float = DEADLINE_S):
        self.deadline_s = deadline_s
        self.terms: list[tuple[str, float, Reward]] = []
        made: dict[tuple[str, str | None], Reward] = {}
        for term in terms:
            match = _TERM.fullmatch(term)
            if match is None:
                raise ValueError(
                    f"--rewards {term}: expected NAME, FILE.py:CLASS or either with (key=value) or =WEIGHT"
                )
            try:
                weight = float(match["weight"]) if match["weight"] is not None else 1.0
                name = match["name"].strip()
                which = REWARDS.get(name, name), match["settings"]
                if which not in made:
                    made[which] = make_reward(term if match["weight"] is None else term.rpartition("=")[0])
            except ValueError as error:
                raise ValueError(f"--rewards {term}: {error}") from None
            self.terms.append((name, weight, made[which]))
        if not self.terms:
            raise ValueError(f"no reward given; known are {', '.join(REWARDS)}")

    def __call__(self, images: "list[np.ndarray]", prompts: list[str], metadata: list[dict]) -> "dict[str, Tensor]":
        total, scores, answers = 0.0, {}, {}
        for name, weight, reward in self.terms:
            if id(reward) not in answers:
                found = _within(self.deadline_s, name, reward, images, prompts, metadata)
                found = {score: checked(f"reward {name}, score {score}", v, len(images)) for score, v in found.items()}
                if not found:
                    raise ValueError(f"reward {name} gives no score")
                answers[id(reward)] = found
            found = answers[id(reward)]
            total = total + weight * found.get(name, next(iter(found.values())))
            scores |= found
        scores.pop("reward", None)  # a server's own score of that name; ours is the sum, and first
        return {"reward": total} | scores


def checked(name: str, values: Any, count: int) -> "Tensor":
    """Scores as fp32 [count]; ValueError that names those of another shape or not finite."""
    import torch

    values = torch.as_tensor(values, dtype=torch.float32).cpu()
    if values.shape != (count,):
        raise ValueError(f"{name}: {count} pictures got scores of shape {tuple(values.shape)}")
    if bad := int((~values.isfinite()).sum()):
        raise ValueError(f"{name}: {bad} of {count} scores are NaN or infinite")
    return values


def _within(deadline_s: float, name: str, reward: "Reward", *arguments: Any) -> "dict[str, Tensor]":
    """reward(*arguments) in a thread that is not waited for beyond the deadline; what it raises is raised here."""
    answer: dict[str, Any] = {}

    def work() -> None:
        try:
            answer["value"] = reward(*arguments)
        except BaseException as error:
            answer["error"] = error

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if not answer:
        raise ValueError(f"reward {name} gave no answer within {deadline_s:g} s")
    if "error" in answer:
        raise answer["error"]
    return answer["value"]


def _settings(text: str) -> dict[str, Any]:
    """key=value pairs between commas; values as in TOML, or bare words."""
    import tomllib

    settings = {}
    for pair in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"settings are key=value, not {pair!r}")
        try:
            settings[key.strip()] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            settings[key.strip()] = value.strip()
    return settings
