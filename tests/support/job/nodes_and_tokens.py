"""A job: prints, as JSON, where the package is, the nodes of the ranks, and a drafted and a plain answer."""

import json

import outrider
from outrider import Engine, GenerationRequest, load_config

PROMPT = "a b a b"

with Engine.start(load_config("outrider.yaml")) as engine:
    nodes = {name: stats["node"] for name, stats in engine.stats().items() if "node" in stats}
    requests = [GenerationRequest(PROMPT), GenerationRequest(PROMPT, {}, {"max_nodes": 0})]
    drafted, plain = engine.generate(requests)
print(
    json.dumps(
        {"package": outrider.__file__, "nodes": nodes, "drafted": drafted.tokens, "plain": plain.tokens}
    )
)
