"""A deployment over Ray's own test cluster, in a process of its own: Ray reads its authentication mode once.

Prints as JSON: the nodes of the workers, and the tokens of a drafted and of a plain answer.
"""

import json
import os

from ray.cluster_utils import Cluster

from outrider.cluster.api import GenerationRequest
from outrider.cluster.engine import Engine
from outrider.configs.loader import load_config

PROMPT = "a b a b"
NUM_NODES = 4


def main() -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"  # of the raylets that Cluster starts
    cluster = Cluster()
    try:
        for _ in range(NUM_NODES):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        spread = [
            f"cluster.ray_address={cluster.address}",
            "cluster.ray_auth=disabled",
            "cluster.placement=STRICT_SPREAD",
            "target.tp_size=2",
            "target.all_reduce=gloo",
        ]
        with Engine.start(load_config("tiny-random", spread)) as engine:
            nodes = [stats["node"] for stats in engine.stats().values() if "node" in stats]
            requests = [GenerationRequest(PROMPT), GenerationRequest(PROMPT, {}, {"max_nodes": 0})]
            drafted, plain = engine.generate(requests)
        print(json.dumps({"nodes": nodes, "drafted": drafted.tokens, "plain": plain.tokens}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
