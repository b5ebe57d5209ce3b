"""Section `deploy` of a configuration: the machines that `outrider deploy` writes manifests for."""

import re
from dataclasses import dataclass

from outrider.configs.checks import require, require_at_least

_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_NODE_LABEL = re.compile(r"[^=\s]+=[^=\s]*")


@dataclass(frozen=True)
class DeployConfig:
    """A head, which computes nothing, and equal nodes for the workers. What a cluster has to be given a place."""

    name: str = "outrider"
    """Of the cluster, and how the names of all that belongs to it begin."""

    image: str = ""
    """The container image, as one of the repository's Dockerfile; `outrider deploy` wants one."""

    num_nodes: int = 1
    """Nodes for workers; with several `replicas`, for those of each."""

    gpus_per_node: int = 0
    """GPUs of each."""

    gpu_memory_bytes: int = 80 * 10**9
    """Memory of each GPU, in bytes, as torch counts it, for `outrider plan`. An H100 with 80 GB has 79 GiB."""

    cpus_per_node: int = 4
    """CPUs of each."""

    memory_per_node_bytes: int = 16 * 2**30
    """Memory of each, in bytes, `shared_memory_bytes` included."""

    shared_memory_bytes: int = 4 * 2**30
    """/dev/shm of each, in bytes: ranks and NCCL exchange rows there, Ray keeps its objects there."""

    head_cpus: int = 4
    """CPUs of the head, which runs Ray's own processes and a job's command; also of the node of the HTTP server."""

    head_memory_bytes: int = 16 * 2**30
    """Memory of the same, in bytes; 1 GiB of it is /dev/shm."""

    node_labels: tuple[str, ...] = ()
    """Kubernetes: labels, each `key=value`, that a machine must have to get workers."""

    cache_claim: str = ""
    """Kubernetes: a PersistentVolumeClaim that keeps models, for all pods (ReadWriteMany where they are on several
    machines); empty: each pod loads its own."""

    cache_dir: str = "/models"
    """Where models are kept: a folder of the containers, and with the cluster launcher of the hosts."""

    hugging_face_secret: str = ""
    """Kubernetes: a Secret whose key `token` is the token for Hugging Face; empty: none is sent."""

    api_keys_secret: str = ""
    """Kubernetes: a Secret whose key `api-keys` is the file that `server.api_keys_file` describes; empty: no file."""

    start_limit_s: float = 3600.0
    """Kubernetes: a server that does not answer so many seconds after its start is started anew: downloads count."""

    hosts: tuple[str, ...] = ()
    """Cluster launcher: addresses of machines that are there, `num_nodes` of them; the first is the head, too. Empty:
    machines are rented."""

    ssh_user: str = "ubuntu"
    """Cluster launcher: who logs in."""

    region: str = "us-west-2"
    """Cluster launcher: where AWS has the machines."""

    instance_type: str = "p5.48xlarge"
    """Cluster launcher: AWS's machine for workers."""

    head_instance_type: str = "m6i.xlarge"
    """Cluster launcher: AWS's machine for the head."""

    def __post_init__(self) -> None:
        label = "at most 40 of a-z, 0-9 and -, beginning with a letter"
        require(bool(_LABEL.fullmatch(self.name)), "deploy.name", self.name, label)
        require_at_least(self, "deploy", 1, "num_nodes", "cpus_per_node", "shared_memory_bytes", "head_cpus")
        require_at_least(self, "deploy", 1, "gpu_memory_bytes")
        require_at_least(self, "deploy", 0, "gpus_per_node")
        require_at_least(self, "deploy", self.shared_memory_bytes + 1, "memory_per_node_bytes")
        require_at_least(self, "deploy", 2 * 2**30, "head_memory_bytes")
        for index, text in enumerate(self.node_labels):
            key = f"deploy.node_labels[{index}]"
            require(bool(_NODE_LABEL.fullmatch(text)), key, text, "key=value")
        require(self.cache_dir.startswith("/"), "deploy.cache_dir", self.cache_dir, "an absolute path")
        require(self.start_limit_s > 0, "deploy.start_limit_s", self.start_limit_s, "more than 0")
        require(
            len(self.hosts) in (0, self.num_nodes),
            "deploy.hosts",
            self.hosts,
            f"deploy.num_nodes ({self.num_nodes}) addresses, or empty",
        )
