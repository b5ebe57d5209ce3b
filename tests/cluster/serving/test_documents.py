"""What is written about the server, and the dashboard, name what there is."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from outrider.cluster.api import Piece
from outrider.cluster.serving.metrics import AnswerTimes, ServerMetrics
from outrider.cluster.serving.protocol import ChatRequest, CompletionRequest, Only, Speculative, Wire
from outrider.cluster.serving.replicas.metrics import Page, merged
from outrider.cluster.serving.responses_request import ResponsesRequest
from outrider.workers.sequences.sequence import RequestStats

DOCS = Path(__file__).parents[3] / "docs"
STATS = {
    "draft": {
        "num_running": 1,
        "num_pages": 4,
        "num_available_pages": 2,
        "busy_s": {"forward": 1.0},
        "peak_memory_bytes": 5,
    },
    "coordinator": {"num_open_requests": 1, "num_restarts": 1},
}


def page() -> str:
    """What a server in use says."""
    metrics = ServerMetrics("m")
    times = AnswerTimes(metrics, 1)
    stats = RequestStats(depth_drafted=(1,), depth_accepted=(1,))
    times.add(0, Piece(tokens=(1,), finish_reason="stop", num_prompt_tokens=1, stats=stats))
    metrics.refused(400)
    return metrics.render(STATS).decode()


def exported(text: str) -> dict[str, set[str]]:
    """Labels of all series by their names, those of histograms without their endings; as a scraper reads them."""
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = re.sub(r"_(bucket|sum|count)$", "", sample.name)
            if not name.endswith("_created"):
                labels.setdefault(name, set()).update(sample.labels)
    return labels


def test_every_metric_is_described_and_none_that_there_is_not() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:vllm:|outrider_)\w+)`", text)) == exported(page()).keys()


def test_the_dashboards_queries_name_what_is_exported() -> None:
    series = exported(merged([Page("r0", page()), Page("r1", page())], page()).decode())
    board = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    assert len(targets) > 20
    for target in targets:
        query = target["expr"]
        found = re.findall(r"((?:vllm:|outrider_)\w+)(.*?})", query)
        named = [name.removesuffix("_bucket") for name, _ in found]
        assert query.count("(") == query.count(")")
        # Series without a label have it empty, which is how one server answers to all replicas.
        for _, chosen in found:
            assert re.match(r'{model_name=~"\$model_name",replica=~"\$replica(\|front)?"[,}]', chosen), query
        used = re.findall(r"(\w+)!?=", query) + re.findall(r"{{(\w+)}}", target["legendFormat"])
        used += [label for by in re.findall(r"by \((.*?)\)", query) for label in by.split(", ")]
        assert set(used) <= {"le"}.union(*(series[name] for name in named)), query
    variables = board["templating"]["list"][1:]
    for variable in variables:
        name, label = re.findall(r"label_values\((\w+).*, (\w+)\)", variable["query"])[0]
        assert label in series[name]
        assert label == variable["name"]
    assert [variable["name"] for variable in variables] == ["model_name", "replica"]
    assert variables[1]["allValue"] == ".*"


def followed(body: type[Wire]) -> set[str]:
    """Fields that have an effect."""
    fields = body.model_fields.items()
    return {name for name, field in fields if not any(isinstance(mark, Only) for mark in field.metadata)}


def test_every_field_that_has_an_effect_is_described() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    for body in (ChatRequest, CompletionRequest, ResponsesRequest, Speculative):
        missing = {name for name in followed(body) if f"`{name}`" not in text}
        assert not missing, body
