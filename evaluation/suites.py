"""What is measured: prompts, a judge that scores pictures of them, and pictures whose score is known beforehand."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from command_line import UserError
from data_pipeline.synthesis import shapes_world
from evaluation.constant_pictures import RULES, best_constant
from evaluation.judge import Judge
from evaluation.leftovers import has_leftovers
from evaluation.ocr import Tesseract, score_text
from evaluation.prompts import Prompt, shapes_prompts
from evaluation.scoring import Found, Objects, group, score, score_strictly
from evaluation.text_prompts import text_prompts

if TYPE_CHECKING:
    from evaluation.geneval_detector import GenEvalDetector

Rows = dict[str, list[float]]
"""Numbers of pictures by measure."""
SHARE, GAP = (0.0, 1.0), (-1.0, 1.0)
"""Least and greatest value of a share, and of the difference of two."""


class Suite(Protocol):
    """One set of prompts and how pictures of them are scored."""

    name: str
    prompts: list[Prompt]
    primary: str
    """The measure that a claim is about."""
    bounds: dict[str, tuple[float, float]]
    """Least and greatest value of the measures that have them."""
    fingerprint: str
    """Changes whenever a score may: hash or version of the judge."""

    def score(self, images: list[np.ndarray], prompts: list[Prompt]) -> Rows:
        """Every measure of each uint8 [h, w, 3] picture of a prompt."""

    def truth(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray | None:
        """A picture of `size` (h, w) that shows what the prompt asks for, if one can be made without a model."""

    def other(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray | None:
        """A true picture of another prompt, that this prompt is not true of."""

    def sources(self, prompt: Prompt, size: tuple[int, int]) -> list[np.ndarray]:
        """Pictures that the prompt asks to edit."""

    def constants(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """The picture that gets the most of a measure if it is drawn for every prompt, of measures that know theirs."""


def generator(prompt: Prompt, purpose: str) -> np.random.Generator:
    """Random numbers that depend on the prompt and the purpose only."""
    digest = hashlib.blake2b(f"{purpose}/{prompt.id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def prompts_fingerprint(prompts: list[Prompt]) -> str:
    """Hash of all prompts and their metadata, in order."""
    lines = (json.dumps([p.id, p.text, p.stratum, p.metadata], sort_keys=True) for p in prompts)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def true_objects(placed: list[shapes_world.Placed]) -> Objects:
    """What a perfect detector finds."""
    return group([(p.shape, Found(_outline_box(p), 1.0, p.color)) for p in placed], 0.5)


def _outline_box(placed: shapes_world.Placed) -> tuple[float, float, float, float]:
    corners = placed.outline()
    return (*corners.min(0).tolist(), *corners.max(0).tolist())


def is_exactly(metadata: dict[str, Any], image: np.ndarray, objects: Objects) -> bool:
    """The strict verdict: the judge's `objects` are those asked for, and the picture shows nothing besides them."""
    return score_strictly(metadata, objects).correct and not has_leftovers(image, objects)


def reward_verdicts(images: list[np.ndarray], prompts: list[Prompt]) -> list[float]:
    """1 where the shapes reward gives its strict credit, else 0."""
    from rewards.shapes import ShapesReward

    scores = ShapesReward()(images, [p.text for p in prompts], [p.metadata for p in prompts])
    return scores["shapes"].tolist()


@dataclass
class ShapesSuite:
    """The shapes world: is exactly what a prompt asks for in the picture, and nothing else?

    Measures: "strict", the judge's verdict by the strict rule, with nothing left over beside the objects; "official",
    its verdict by GenEval's rule, which lets other objects pass; "reward", the reward's own strict verdict; their gap.
    """

    split: str
    judge: Judge = field(default_factory=Judge)
    primary = "strict"
    bounds = {**dict.fromkeys(("strict", "official", "reward"), SHARE), "reward - judge": GAP}

    def __post_init__(self):
        self.name = f"shapes/{self.split}"
        self.prompts = shapes_prompts(self.split)
        self.fingerprint = self.judge.fingerprint

    def score(self, images: list[np.ndarray], prompts: list[Prompt]) -> Rows:
        distinct = {id(image): image for image in images}
        found = dict(zip(distinct, self.judge(list(distinct.values())), strict=True))
        judged = [(image, prompt, found[id(image)]) for image, prompt in zip(images, prompts, strict=True)]
        rows = {
            "strict": [float(is_exactly(p.metadata, i, objects)) for i, p, objects in judged],
            "official": [float(score(p.metadata, objects).correct) for _, p, objects in judged],
            "reward": reward_verdicts(images, prompts),
        }
        gap = [r - s for r, s in zip(rows["reward"], rows["strict"], strict=True)]
        return {**rows, "reward - judge": gap}

    def truth(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray:
        return shapes_world.render(prompt.metadata, generator(prompt, "truth"), size)

    def other(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray:
        rng = generator(prompt, "other")
        while True:
            chosen = self.prompts[rng.integers(len(self.prompts))].metadata
            placed = shapes_world.layout(chosen, rng, size)
            if not score(prompt.metadata, true_objects(placed)).correct:
                background = shapes_world.BACKGROUNDS[chosen["background"] or "white"]
                return shapes_world.draw(placed, background, size)

    def sources(self, prompt: Prompt, size: tuple[int, int]) -> list[np.ndarray]:
        return []

    def constants(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        return {rule: best_constant(self.split, rule, size) for rule in RULES}


@dataclass
class GenEvalSuite:
    """GenEval's own prompts, or others in its format, judged by GenEval's own detector."""

    prompts: list[Prompt]
    detector: "GenEvalDetector"
    name = "geneval"
    primary = "geneval"
    bounds = {"geneval": SHARE}

    def __post_init__(self):
        self.fingerprint = self.detector.fingerprint

    def score(self, images: list[np.ndarray], prompts: list[Prompt]) -> Rows:
        found = self.detector(images, [p.metadata for p in prompts])
        return {"geneval": [float(score(p.metadata, o).correct) for p, o in zip(prompts, found, strict=True)]}

    def truth(self, prompt: Prompt, size: tuple[int, int]) -> None:
        return None

    def other(self, prompt: Prompt, size: tuple[int, int]) -> None:
        """None: the model's own pictures of other prompts serve."""

    def sources(self, prompt: Prompt, size: tuple[int, int]) -> list[np.ndarray]:
        return []

    def constants(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        return {}


@dataclass
class TextSuite:
    """Text in pictures, read by Tesseract; by rapidocr, the reward's engine, beside it where that is installed."""

    prompts: list[Prompt]
    name: str = "text"
    primary = "accuracy"
    bounds = {**dict.fromkeys(("accuracy", "similarity", "reward accuracy"), SHARE), "reward - judge": GAP}

    def __post_init__(self):
        self.engine = Tesseract(tuple(sorted({p.metadata["language"] for p in self.prompts})))
        self.reward = _reward_reader()
        self.fingerprint = f"{self.engine.fingerprint}, reward {self.reward is not None}"

    def score(self, images: list[np.ndarray], prompts: list[Prompt]) -> Rows:
        rows: Rows = {}
        for image, prompt in zip(images, prompts, strict=True):
            m = prompt.metadata
            values = score_text(self.engine.read(image, m["protocol"], m["language"]), m)
            if self.reward is not None:
                values["reward accuracy"] = score_text(self.reward(image), m)["accuracy"]
                values["reward - judge"] = values["reward accuracy"] - values["accuracy"]
            for name, value in values.items():
                rows.setdefault(name, []).append(value)
        return rows

    def truth(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray | None:
        return _typeset(prompt, size)

    def other(self, prompt: Prompt, size: tuple[int, int]) -> np.ndarray | None:
        rng = generator(prompt, "other")
        wanted = prompt.metadata["text"]
        chosen = next(p for p in rng.permutation(self.prompts) if p.metadata["text"] != wanted)
        return _typeset(chosen, size)

    def sources(self, prompt: Prompt, size: tuple[int, int]) -> list[np.ndarray]:
        return []

    def constants(self, size: tuple[int, int]) -> dict[str, np.ndarray]:
        return {}


def _typeset(prompt: Prompt, size: tuple[int, int]) -> np.ndarray | None:
    """The prompt's text on a plain page; None if it doesn't fit."""
    from data_pipeline.synthesis import pure
    from data_pipeline.synthesis.corpus import read_corpus
    from data_pipeline.synthesis.fonts import find_faces

    rng = generator(prompt, "truth")
    corpus, faces = read_corpus(None), find_faces()
    for _ in range(30):
        page, _ = pure.draw_page(rng, size, corpus, faces, " ".join(prompt.metadata["text"]))
        drawn = None if page is None or page.style.vertical else pure.render(page)
        if drawn is not None:
            return drawn[0]
    return None


def _reward_reader() -> Callable[[np.ndarray], str] | None:
    from rewards.ocr import OCRReward

    try:
        reward = OCRReward()
    except ValueError:
        return None
    return lambda image: " ".join(reward.engine(np.ascontiguousarray(image[:, :, ::-1]), use_cls=False).txts or ())


def shapes_suites(split: str) -> list[Suite]:
    """The shapes world's suite of a split; "test" names both of its test suites."""
    judge = Judge()
    return [ShapesSuite(s, judge) for s in (["test-iid", "test-compositional"] if split == "test" else [split])]


def text_suite(path: Any) -> Suite:
    """Text prompts of the user's file or folder, or the embedded ones."""
    prompts = text_prompts(path)
    if len({tuple(p.metadata["text"]) for p in prompts}) < 2:
        raise UserError("the text suite needs prompts with at least two different texts")
    return TextSuite(prompts)
