"""The cluster of a manifest of `outrider deploy`, on this machine: a raylet per pod, by Ray's own test cluster.

Prints the address of its job server, and ends with its standard input. A process of its own: Ray reads its
authentication mode once.
"""

import os
import sys
from pathlib import Path

import yaml
from ray.cluster_utils import Cluster


def main(manifest: Path) -> None:
    job = next(one for one in yaml.safe_load_all(manifest.read_text()) if one["kind"] == "RayJob")
    cluster_spec = job["spec"]["rayClusterSpec"]
    os.environ["RAY_AUTH_MODE"] = cluster_spec["authOptions"]["mode"]
    head = cluster_spec["headGroupSpec"]["rayStartParams"]
    cluster = Cluster()
    try:
        cluster.add_node(
            num_cpus=int(head["num-cpus"]),
            object_store_memory=int(head["object-store-memory"]),
            include_dashboard=True,
            dashboard_port=0,
        )
        for group in cluster_spec["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for number in range(group["replicas"]):
                cluster.add_node(
                    num_cpus=int(limits["cpu"]),
                    object_store_memory=int(group["rayStartParams"]["object-store-memory"]),
                    # Raylets of one machine would put what they are sent in one place, and take it from each other.
                    runtime_env_dir_name=f"runtime_env_{group['groupName']}_{number}",
                )
        print(f"http://{cluster.webui_url}", flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
