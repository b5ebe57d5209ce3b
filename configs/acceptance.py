"""The section `acceptance`: how lossy requests may be, and the judges that they may name."""

from dataclasses import dataclass
from typing import Literal

from outrider.configs.checks import require

RuleName = Literal["exact", "typical", "judge"]


@dataclass(frozen=True)
class JudgeConfig:
    """A judge that requests may name."""

    name: str
    """How requests call it."""

    model: str
    """Its checkpoint: a directory with judge.json, a Hugging Face id, or `shipped:NAME`. It belongs to one target."""

    def __post_init__(self) -> None:
        for key in ("name", "model"):
            require(bool(getattr(self, key)), f"acceptance.judges {key}", getattr(self, key), "a text")


@dataclass(frozen=True)
class AcceptanceConfig:
    """How drafted tokens may be accepted: never lossier than this. A request gets `exact`, which changes no token,
    unless it asks for another rule; one that asks for more than is allowed here is refused."""

    rules: tuple[RuleName, ...] = ("exact",)
    """Rules that requests may ask for."""

    judges: tuple[JudgeConfig, ...] = ()
    """Judges of rule `judge`, all of them loaded."""

    min_epsilon: float = 0.09
    """Least epsilon of rule `typical`; smaller ones keep more."""

    min_delta: float = 0.3
    """Least delta of rule `typical`; smaller ones keep more."""

    min_threshold: float = 0.5
    """Least threshold of rule `judge`; smaller ones keep more."""

    def __post_init__(self) -> None:
        require("exact" in self.rules, "acceptance.rules", self.rules, "a list with exact")
        distinct = len(set(self.rules)) == len(self.rules)
        require(distinct, "acceptance.rules", self.rules, "without repetition")
        names = [judge.name for judge in self.judges]
        require(len(set(names)) == len(names), "acceptance.judges", names, "judges of distinct names")
        allowed = "at least one judge if acceptance.rules has judge, else none"
        require(("judge" in self.rules) == bool(names), "acceptance.judges", names, allowed)
        for key in ("min_epsilon", "min_delta", "min_threshold"):
            value = getattr(self, key)
            require(0 < value <= 1, f"acceptance.{key}", value, "more than 0 and at most 1")
