"""What is written about the server, and the dashboard, name what there is."""

import json
import re
from pathlib import Path

from outrider.cluster.api import Piece
from outrider.cluster.serving.metrics import AnswerTimes, ServerMetrics
from outrider.cluster.serving.protocol import ChatRequest, CompletionRequest, Only, Speculative, Wire
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


def exported() -> set[str]:
    """Names of all series of a server in use, those of histograms without their endings."""
    metrics = ServerMetrics("m")
    times = AnswerTimes(metrics, 1)
    stats = RequestStats(depth_drafted=(1,), depth_accepted=(1,))
    times.add(0, Piece(tokens=(1,), finish_reason="stop", num_prompt_tokens=1, stats=stats))
    metrics.refused(400)
    lines = metrics.render(STATS).decode().splitlines()
    names = {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names if not name.endswith("_created")}


def test_every_metric_is_described_and_none_that_there_is_not() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:vllm:|outrider_)\w+)`", text)) == exported()


def test_the_dashboards_queries_name_what_is_exported() -> None:
    board = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries.append(board["templating"]["list"][1]["query"])
    named = {name for query in queries for name in re.findall(r"(?:vllm:|outrider_)\w+", query)}
    assert len(queries) > 20
    assert {re.sub("_bucket$", "", name) for name in named} <= exported()
    for query in queries:
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")


def followed(body: type[Wire]) -> set[str]:
    """Fields that have an effect."""
    fields = body.model_fields.items()
    return {name for name, field in fields if not any(isinstance(mark, Only) for mark in field.metadata)}


def test_every_field_that_has_an_effect_is_described() -> None:
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    for body in (ChatRequest, CompletionRequest, ResponsesRequest, Speculative):
        missing = {name for name in followed(body) if f"`{name}`" not in text}
        assert not missing, body
