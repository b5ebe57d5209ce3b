"""The metrics of all replicas as one page: each sample says by `replica` whose it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

CONTENT_TYPE = CONTENT_TYPE_LATEST

_BY_FRONT = "outrider_refused_requests"


@dataclass(frozen=True)
class Page:
    """What a replica says, in Prometheus' text format."""

    replica: str
    text: str


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


def merged(pages: Sequence[Page], of_front: str) -> bytes:
    """of_front: of the front, which has seen every answer: errors are counted there, and its other counters are
    nobody's."""
    families: dict[str, Metric] = {}
    for page in (*pages, Page("front", of_front)):
        for family in text_string_to_metric_families(page.text):
            if (family.name == _BY_FRONT) != (page.replica == "front"):
                continue
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={**sample.labels, "replica": page.replica}))
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)
