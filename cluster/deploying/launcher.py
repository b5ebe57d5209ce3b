"""A file for Ray's cluster launcher (`ray up`): machines that are there, or rented ones of AWS."""

from typing import Any

from outrider.cluster.deploying.layout import OBJECT_STORE_BYTES, check_layout, hugging_face_home, image
from outrider.configs.schema import Config

_HEAD = "head"
_NODE = "node"
_HEAD_IP = "$RAY_HEAD_IP"
_TOKEN = "~/.ray/auth_token"


def launcher_file(config: Config) -> dict[str, Any]:
    """The whole file. Raises ValueError naming the key."""
    check_layout(config)
    deploy = config.deploy
    files = {}
    if config.cluster.ray_auth == "token":
        files[_TOKEN] = _TOKEN
    if config.server.api_keys_file:
        files[config.server.api_keys_file] = config.server.api_keys_file
    rented = not deploy.hosts
    file: dict[str, Any] = {
        "cluster_name": deploy.name,
        "provider": _rented(config) if rented else _there(config),
        "auth": {"ssh_user": deploy.ssh_user},
        "docker": {
            "image": image(config),
            "container_name": deploy.name,
            "pull_before_run": True,
            "run_options": _run_options(config),
            "disable_shm_size_detection": True,
        },
        "file_mounts": files,
        # A rented head computes nothing. Whoever has machines has one of them be the head, too.
        "head_start_ray_commands": [
            "ray stop",
            _ray_start(config, "--head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml"),
        ],
        "worker_start_ray_commands": ["ray stop", _ray_start(config, f"--address={_HEAD_IP}:6379")],
    }
    if rented:
        file |= _node_types(config)
    else:
        num_workers = len(deploy.hosts) - 1
        file |= {"min_workers": num_workers, "max_workers": num_workers}
    return file


def _rented(config: Config) -> dict[str, Any]:
    return {"type": "aws", "region": config.deploy.region, "cache_stopped_nodes": False}


def _there(config: Config) -> dict[str, Any]:
    head, *workers = config.deploy.hosts
    return {"type": "local", "head_ip": head, "worker_ips": workers}


def _node_types(config: Config) -> dict[str, Any]:
    deploy = config.deploy
    node: dict[str, Any] = {
        "CPU": deploy.cpus_per_node,
        "GPU": deploy.gpus_per_node,
        "memory": deploy.memory_per_node_bytes,
    }
    return {
        "max_workers": deploy.num_nodes,
        "head_node_type": _HEAD,
        "available_node_types": {
            _HEAD: {"resources": {"CPU": 0}, "node_config": {"InstanceType": deploy.head_instance_type}},
            _NODE: {
                "resources": node,
                "node_config": {"InstanceType": deploy.instance_type},
                "min_workers": deploy.num_nodes,
                "max_workers": deploy.num_nodes,
            },
        },
    }


def _run_options(config: Config) -> list[str]:
    deploy = config.deploy
    return [
        f"--shm-size={deploy.shared_memory_bytes}",
        "--ulimit nofile=65536:65536",
        f"--volume {deploy.cache_dir}:{deploy.cache_dir}",
        f"--env HF_HOME={hugging_face_home(config)}",
        # Without a value: that of the host's own environment, which stays out of this file.
        "--env HF_TOKEN",
        *(["--gpus all"] if deploy.gpus_per_node and deploy.hosts else []),
    ]


def _ray_start(config: Config, what: str) -> str:
    return (
        f"RAY_AUTH_MODE={config.cluster.ray_auth} ray start {what} --object-manager-port=8076 "
        f"--object-store-memory={OBJECT_STORE_BYTES}"
    )
