"""What became of a sample in curation."""

from dataclasses import dataclass, replace

from data_pipeline.stages import Rule


@dataclass(frozen=True)
class Verdict:
    """What became of a sample."""

    key: str
    source: str
    caption: str
    size: tuple[int, int]
    """Width and height in pixels; (0, 0) if the picture is broken."""
    scores: dict[str, float]
    labels: dict[str, str]
    dropped_by: str | None = None
    """Name of the first filter that dropped it; None if it is kept."""
    stage: int = 0
    """Number of that filter's stage."""
    why: str = ""

    def noted(self, meta: dict) -> dict:
        """A sample's record with these scores and labels."""
        meta = meta | {"scores": meta.get("scores", {}) | self.scores}
        return meta | {"labels": meta.get("labels", {}) | self.labels} if self.labels else meta

    def scored(self, rule: Rule, stage: int, score: float | None, why: str = "") -> "Verdict":
        """This verdict with one more score, which may drop the sample."""
        scores = self.scores if score is None else self.scores | {rule.name: round(score, 5)}
        if self.dropped_by or rule.keeps(scores.get(rule.name)):
            return replace(self, scores=scores)
        return replace(self, scores=scores, dropped_by=rule.name, stage=stage, why=why)
