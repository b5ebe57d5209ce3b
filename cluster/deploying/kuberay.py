"""Manifests for KubeRay (https://github.com/ray-project/kuberay).

A RayCluster has our server in a pod of its own; a RayJob runs a command; a RayService has the server in Ray Serve.
KubeRay adds what every container needs: `ray start`, probes of Ray itself, Ray's count of GPUs from the limits.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import yaml

from outrider.cluster.deploying.layout import (
    OBJECT_STORE_BYTES,
    check_layout,
    hugging_face_home,
    image,
    in_containers,
)
from outrider.cluster.serving.replicas.number import DEPLOYMENT, number_of_replicas
from outrider.configs.loader import config_to_yaml
from outrider.configs.schema import Config

Kind = Literal["RayCluster", "RayJob", "RayService"]
Manifest = dict[str, Any]

CONFIG_FOLDER = "/etc/outrider"
CONFIG_PATH = f"{CONFIG_FOLDER}/outrider.yaml"
"""The configuration in every container."""

_SECRETS_FOLDER = "/etc/outrider-secrets"
_OVERWRITE = "ray.io/overwrite-container-cmd"
_SERVER_OF = "outrider/server-of"
_WORKERS_OF = "outrider/workers-of"
_USER = 1000
_HEAD_SHARED_BYTES = 2**30
_PROBE_S = 10
_GRACE_S = 30  # for Ray's own processes, once the server has ended
# `KUBERAY_GEN_RAY_START_CMD` is what KubeRay would run; words must be split.
_START = "ulimit -n 65536; "
_RAY = f"{_START}exec $KUBERAY_GEN_RAY_START_CMD"
_RAY_AND_SERVER = (
    f"{_START}$KUBERAY_GEN_RAY_START_CMD & "
    "until wget -q -O /dev/null http://localhost:52365/api/local_raylet_healthz; do sleep 1; done; "
    f"exec python -m outrider serve {CONFIG_PATH}"
)
_JOB_KEPT_S = 3600


def manifests(config: Config, kind: Kind, command: Sequence[str]) -> list[Manifest]:
    """The documents of a file for `kubectl apply`, the configuration first.

    command: of a RayJob, whose configuration is `/etc/outrider/outrider.yaml`. Raises ValueError naming the key.
    """
    served = kind == "RayService"
    check_layout(config, num_in_serve=2 if served else 0)
    if (kind == "RayJob") != bool(command):
        raise ValueError("-- COMMAND must stand at the end with --kind RayJob, and with no other kind")
    if config.server.api_keys_file and not config.deploy.api_keys_secret:
        raise ValueError(
            "deploy.api_keys_secret must name a Secret, because server.api_keys_file is set; got ''"
        )
    if not config.server.port:
        raise ValueError("server.port must be fixed in a cluster, got 0")
    name = config.deploy.name
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config"},
        "data": {"outrider.yaml": config_to_yaml(in_containers(config, _api_keys_file(config)))},
    }
    match kind:
        case "RayCluster":
            cluster = _cluster(config, kind)
            return [settings, _custom(kind, name, cluster, {_OVERWRITE: "true"}), _service(config)]
        case "RayJob":
            job = {
                "entrypoint": shlex.join(command),
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": _JOB_KEPT_S,
                "rayClusterSpec": _cluster(config, kind),
            }
            return [settings, _custom(kind, name, job, {})]
        case "RayService":
            application = {
                "http_options": {"host": "0.0.0.0", "port": config.server.port},
                "applications": [
                    {
                        "name": "outrider",
                        "import_path": "outrider.cluster.serving.ray_serve:application",
                        "route_prefix": "/",
                        "args": {"config": CONFIG_PATH},
                        # As the configuration says; but changed here they are added or ended, and none is replaced.
                        "deployments": [{"name": DEPLOYMENT, **number_of_replicas(config)}],
                    }
                ],
            }
            service = {
                "serveConfigV2": to_yaml([application]),
                # After an upgrade the old cluster still answers what it has taken.
                "rayClusterDeletionDelaySeconds": math.ceil(config.server.max_request_s) + _GRACE_S,
                "rayClusterConfig": _cluster(config, kind),
            }
            return [settings, _custom(kind, name, service, {})]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such; what stands twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """As people write it."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _custom(kind: Kind, name: str, spec: Manifest, annotations: dict[str, str]) -> Manifest:
    metadata: Manifest = {"name": name}
    if annotations:
        metadata["annotations"] = annotations
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _cluster(config: Config, kind: Kind) -> Manifest:
    deploy = config.deploy
    commanded = kind == "RayCluster"  # all or none: KubeRay leaves commands to us, or us none
    http = [("serve", config.server.port)] if kind == "RayService" else []
    small = _Size(deploy.head_cpus, deploy.head_memory_bytes, _HEAD_SHARED_BYTES, 0)
    large = _Size(
        deploy.cpus_per_node, deploy.memory_per_node_bytes, deploy.shared_memory_bytes, deploy.gpus_per_node
    )
    ports = [("gcs-server", 6379), ("dashboard", 8265), ("client", 10001), *http]
    head = _pod(config, "ray-head", small, ports, {}, commanded)
    workers = _pod(config, "ray-worker", large, http, {_WORKERS_OF: deploy.name}, commanded)
    workers["spec"] |= _placed(config)
    replicas = config.replicas
    least, most = (number * deploy.num_nodes for number in (replicas.min_replicas, replicas.max_replicas))
    groups = [_group("workers", (least, most), workers, {})]
    if kind == "RayCluster":
        groups.append(_group("server", (1, 1), _server_pod(config, small), {"num-cpus": "0"}))
    return {
        "rayVersion": ray.__version__,
        # Replicas that Ray Serve adds wait for nodes, which Ray adds.
        **({"enableInTreeAutoscaling": True} if most > least else {}),
        "authOptions": {"mode": config.cluster.ray_auth},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", **_object_store()}, "template": head},
        "workerGroupSpecs": groups,
    }


def _server_pod(config: Config, size: "_Size") -> Manifest:
    """Not the head's: workers find the head by a Service that waits for its pod, and the server waits for workers."""
    name = config.deploy.name
    pod = _pod(config, "ray-worker", size, [("http", config.server.port)], {_SERVER_OF: name}, True)
    pod["spec"]["containers"][0] |= {"args": [_RAY_AND_SERVER], **_probes(config)}
    pod["spec"]["terminationGracePeriodSeconds"] = math.ceil(config.server.shutdown_s) + _GRACE_S
    return pod


def _group(name: str, num_nodes: tuple[int, int], pod: Manifest, parameters: dict[str, str]) -> Manifest:
    """num_nodes: least and most."""
    least, most = num_nodes
    return {
        "groupName": name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {**parameters, **_object_store()},
        "template": pod,
    }


def _object_store() -> dict[str, str]:
    return {"object-store-memory": str(OBJECT_STORE_BYTES)}


def _pod(
    config: Config,
    name: str,
    size: "_Size",
    ports: Sequence[tuple[str, int]],
    labels: Mapping[str, str],
    commanded: bool,
) -> Manifest:
    deploy = config.deploy
    volumes = [
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": _bytes(size.shared_bytes)},
        },
        {"name": "config", "configMap": {"name": f"{deploy.name}-config"}},
        {"name": "models", "persistentVolumeClaim": {"claimName": deploy.cache_claim}}
        if deploy.cache_claim
        else {"name": "models", "emptyDir": {}},
    ]
    mounts: list[Manifest] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "models", "mountPath": deploy.cache_dir},
    ]
    environment: list[Manifest] = [{"name": "HF_HOME", "value": hugging_face_home(config)}]
    if deploy.hugging_face_secret:
        reference = {"name": deploy.hugging_face_secret, "key": "token"}
        environment.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}})
    if deploy.api_keys_secret:
        volumes.append({"name": "api-keys", "secret": {"secretName": deploy.api_keys_secret}})
        mounts.append({"name": "api-keys", "mountPath": _SECRETS_FOLDER, "readOnly": True})
    container: Manifest = {
        "name": name,
        "image": image(config),
        "resources": _resources(size),
        "env": environment,
        "volumeMounts": mounts,
    }
    if ports:
        container["ports"] = [{"name": label, "containerPort": port} for label, port in ports]
    if commanded:
        container.update({"command": ["/bin/bash", "-c"], "args": [_RAY]})
    # Volumes belong to the user that the image runs as.
    spec = {"securityContext": {"fsGroup": _USER}, "containers": [container], "volumes": volumes}
    return {"metadata": {"labels": dict(labels)}, "spec": spec}


def _probes(config: Config) -> Manifest:
    """Of the server's container: alive if /health says so, addressed if /ready does."""

    def probe(path: str, failures: int) -> Manifest:
        return {
            "httpGet": {"path": path, "port": config.server.port},
            "periodSeconds": _PROBE_S,
            "timeoutSeconds": _PROBE_S // 2,
            "failureThreshold": failures,
        }

    return {
        "startupProbe": probe("/health", math.ceil(config.deploy.start_limit_s / _PROBE_S)),
        "livenessProbe": probe("/health", 3),
        "readinessProbe": probe("/ready", 1),
    }


def _placed(config: Config) -> Manifest:
    """On which machines the workers' pods are put."""
    placed: Manifest = {
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if config.deploy.gpus_per_node
        else []
    }
    if config.deploy.node_labels:
        placed["nodeSelector"] = dict(text.split("=", 1) for text in config.deploy.node_labels)
    apart = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {_WORKERS_OF: config.deploy.name}},
    }
    # For Ray a pod is a node; that two are on two machines is Kubernetes' matter.
    match config.cluster.placement:
        case "STRICT_SPREAD":
            rule: Manifest = {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}
            placed["affinity"] = {"podAntiAffinity": rule}
        case "SPREAD":
            wish = [{"weight": 100, "podAffinityTerm": apart}]
            rule = {"preferredDuringSchedulingIgnoredDuringExecution": wish}
            placed["affinity"] = {"podAntiAffinity": rule}
    return placed


def _service(config: Config) -> Manifest:
    port = config.server.port
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{config.deploy.name}-server"},
        "spec": {
            "selector": {_SERVER_OF: config.deploy.name},
            "ports": [{"name": "http", "port": port, "targetPort": port}],
        },
    }


@dataclass(frozen=True)
class _Size:
    """What a pod is given."""

    num_cpus: int
    memory_bytes: int
    shared_bytes: int
    num_gpus: int


def _resources(size: _Size) -> Manifest:
    amounts: Manifest = {"cpu": str(size.num_cpus), "memory": _bytes(size.memory_bytes)}
    if size.num_gpus:
        amounts["nvidia.com/gpu"] = str(size.num_gpus)
    return {"limits": amounts, "requests": dict(amounts)}


def _bytes(number: int) -> str:
    """As Kubernetes writes them."""
    return f"{number >> 20}Mi" if number % 2**20 == 0 else str(number)


def _api_keys_file(config: Config) -> str:
    return f"{_SECRETS_FOLDER}/api-keys" if config.deploy.api_keys_secret else ""
