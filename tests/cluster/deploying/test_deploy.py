"""`outrider deploy`: what it writes says what the configuration says, and passes the checks that refuse mistakes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from outrider.cluster.cli.main import app
from outrider.cluster.deploying.kuberay import CONFIG_PATH
from outrider.cluster.deploying.validation import check_launcher, check_manifest
from outrider.configs.loader import config_from_dict, preset_names

Manifest = dict[str, Any]
IMAGE = "deploy.image=registry/outrider:1"
JOB = [
    "--",
    "outrider",
    "batch",
    CONFIG_PATH,
    "--input",
    "/models/a b.jsonl",
    "--output",
    "/models/out.jsonl",
]
LARGE = "llama3-70b-h100x8"


def deploy(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["deploy", *arguments])


def written(folder: Path, *arguments: str, behind: list[str] | None = None) -> list[Manifest]:
    out = folder / "out.yaml"
    result = deploy(*arguments, IMAGE, "--out", str(out), *(behind or []))
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(out.read_text()))


def kuberay(folder: Path, kind: str, *arguments: str) -> list[Manifest]:
    behind = JOB if kind == "RayJob" else []
    return written(folder, *arguments, "--to", "kuberay", "--kind", kind, behind=behind)


def cluster_of(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def application_of(service: Manifest) -> Manifest:
    """What Ray Serve is told of."""
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return application


def containers(manifest: Manifest) -> dict[str, Manifest]:
    """By group."""
    cluster = cluster_of(manifest)
    templates = {"head": cluster["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {name: template["spec"]["containers"][0] for name, template in templates.items()}


def volumes(manifest: Manifest, group: str) -> dict[str, Manifest]:
    (template,) = (one for one in cluster_of(manifest)["workerGroupSpecs"] if one["groupName"] == group)
    return {volume["name"]: volume for volume in template["template"]["spec"]["volumes"]}


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_every_preset_becomes_manifests_with_a_configuration_that_loads(
    preset: str, kind: str, tmp_path: Path
) -> None:
    settings, manifest, *_ = kuberay(tmp_path, kind, preset)
    assert manifest["kind"] == kind
    config = config_from_dict(yaml.safe_load(settings["data"]["outrider.yaml"]))
    assert config.cluster.ray_address == "auto"
    assert (config.server.host, config.server.api_keys_file) == ("0.0.0.0", "")
    (workers,) = (one for one in cluster_of(manifest)["workerGroupSpecs"] if one["groupName"] == "workers")
    assert workers["replicas"] == config.deploy.num_nodes
    limits = containers(manifest)["workers"]["resources"]["limits"]
    assert int(limits.get("nvidia.com/gpu", 0)) == config.deploy.gpus_per_node
    assert "nvidia.com/gpu" not in containers(manifest)["head"]["resources"]["limits"]


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_becomes_a_launcher_file(preset: str, tmp_path: Path) -> None:
    (file,) = written(tmp_path, preset, "--to", "ray")
    assert file["docker"]["image"] == "registry/outrider:1"
    node = file["available_node_types"]["node"]
    assert node["min_workers"] == node["max_workers"] == file["max_workers"]
    assert file["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_shared_memory_models_and_secrets_are_mounted(tmp_path: Path) -> None:
    settings, manifest, service = kuberay(
        tmp_path,
        "RayCluster",
        LARGE,
        "deploy.shared_memory_bytes=3GiB",
        "deploy.cache_claim=claim",
        "deploy.hugging_face_secret=hugging",
        "deploy.api_keys_secret=keys",
        "deploy.node_labels=[gpu=h100]",
    )
    for name, container in containers(manifest).items():
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"] == "shared-memory", name
        assert mounts["/models"] == "models"
        environment = {one["name"]: one for one in container["env"]}
        assert environment["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hugging", "key": "token"}}
    of_workers = volumes(manifest, "workers")
    assert of_workers["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "3072Mi"}
    assert of_workers["models"]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert of_workers["api-keys"]["secret"] == {"secretName": "keys"}
    inside = yaml.safe_load(settings["data"]["outrider.yaml"])
    keys_folder = next(
        mount["mountPath"]
        for mount in containers(manifest)["server"]["volumeMounts"]
        if mount["name"] == "api-keys"
    )
    assert inside["server"]["api_keys_file"] == f"{keys_folder}/api-keys"
    workers = cluster_of(manifest)["workerGroupSpecs"][0]["template"]["spec"]
    assert workers["nodeSelector"] == {"gpu": "h100"}
    assert service["spec"]["ports"] == [{"name": "http", "port": 8000, "targetPort": 8000}]


def test_the_server_is_probed_and_found_where_it_listens(tmp_path: Path) -> None:
    _, manifest, service = kuberay(
        tmp_path, "RayCluster", LARGE, "server.port=9000", "deploy.start_limit_s=600"
    )
    server = containers(manifest)["server"]
    paths = {name: probe["httpGet"] for name, probe in server.items() if name.endswith("Probe")}
    assert paths == {
        "startupProbe": {"path": "/health", "port": 9000},
        "livenessProbe": {"path": "/health", "port": 9000},
        "readinessProbe": {"path": "/ready", "port": 9000},
    }
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 600
    group = cluster_of(manifest)["workerGroupSpecs"][1]
    assert service["spec"]["selector"].items() <= group["template"]["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == 9000
    # KubeRay leaves all commands to us, or none.
    assert manifest["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}
    for container in containers(manifest).values():
        assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]


def test_a_job_runs_its_command_and_a_service_its_application(tmp_path: Path) -> None:
    _, job = kuberay(tmp_path, "RayJob", LARGE)
    assert job["spec"]["entrypoint"] == (
        f"outrider batch {CONFIG_PATH} --input '/models/a b.jsonl' --output /models/out.jsonl"
    )
    _, service = kuberay(tmp_path, "RayService", LARGE, "server.port=9000")
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert served["http_options"]["port"] == 9000
    assert served["applications"][0]["args"] == {"config": CONFIG_PATH}
    assert {"name": "serve", "containerPort": 9000} in containers(service)["workers"]["ports"]
    for manifest in (job, service):
        assert all("command" not in container for container in containers(manifest).values())


def test_replicas_have_nodes_of_their_own_and_outlive_what_they_took(tmp_path: Path) -> None:
    nodes = ["deploy.num_nodes=2", "replicas.min_replicas=2"]
    _, service = kuberay(tmp_path, "RayService", LARGE, *nodes, "replicas.max_replicas=4")
    (workers,) = cluster_of(service)["workerGroupSpecs"]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 4, 8]
    assert cluster_of(service)["enableInTreeAutoscaling"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > 600
    (deployment,) = application_of(service)["deployments"]
    assert (deployment["name"], deployment["autoscaling_config"]["max_replicas"]) == ("Replica", 4)
    _, fixed = kuberay(tmp_path, "RayService", LARGE, *nodes, "replicas.max_replicas=2")
    assert "enableInTreeAutoscaling" not in cluster_of(fixed)
    assert application_of(fixed)["deployments"] == [{"name": "Replica", "num_replicas": 2}]


@pytest.mark.parametrize(
    ("placement", "rule"),
    [
        ("STRICT_SPREAD", "requiredDuringSchedulingIgnoredDuringExecution"),
        ("SPREAD", "preferredDuringSchedulingIgnoredDuringExecution"),
    ],
)
def test_what_ray_spreads_is_on_different_machines(placement: str, rule: str, tmp_path: Path) -> None:
    spread = [f"cluster.placement={placement}", "deploy.num_nodes=9"]
    _, manifest, _ = kuberay(tmp_path, "RayCluster", LARGE, *spread)
    affinity = cluster_of(manifest)["workerGroupSpecs"][0]["template"]["spec"]["affinity"]
    assert list(affinity["podAntiAffinity"]) == [rule]


def test_a_drafter_on_the_targets_gpus_needs_no_gpu_more(tmp_path: Path) -> None:
    sharing = ["draft.placement=shared", "cluster.num_gpus_per_draft=0.2", "draft.tp_size=8"]
    _, manifest, _ = kuberay(tmp_path, "RayCluster", LARGE, *sharing, "target.tp_size=8")
    container = cluster_of(manifest)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_machines_that_are_there_are_launched_with_the_first_as_head(tmp_path: Path) -> None:
    hosts = ["deploy.num_nodes=2", "deploy.hosts=[10.0.0.1,10.0.0.2]", "server.api_keys_file=/keys"]
    (file,) = written(tmp_path, LARGE, *hosts, "--to", "ray")
    assert file["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    assert "--gpus all" in file["docker"]["run_options"]
    assert file["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token", "/keys": "/keys"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deploy.gpus_per_node=4"], "deploy.gpus_per_node must be at least 8, because a node holds all"),
        (
            ["deploy.gpus_per_node=4", "cluster.placement=PACK"],
            "deploy.num_nodes must be at least 2: 8 GPUs and 7.6 CPUs are needed (cluster.placement = PACK), and a "
            "node has 4 and 64; got 1",
        ),
        (["cluster.placement=STRICT_SPREAD"], "deploy.num_nodes must be at least 9"),
        (["draft.tp_size=2"], "deploy.gpus_per_node must be at least 9, because a node holds all"),
        (
            [
                "target.tp_size=9",
                "draft.tp_size=8",
                "draft.placement=shared",
                "cluster.num_gpus_per_draft=0.2",
            ],
            "deploy.gpus_per_node must be at least 9, because a node holds all",
        ),
        (["deploy.image="], "deploy.image must be a container image"),
        (["server.port=0"], "server.port must be fixed in a cluster"),
        (["server.api_keys_file=/keys"], "deploy.api_keys_secret must name a Secret"),
        (["--kind", "RayJob"], "-- COMMAND must stand at the end with --kind RayJob"),
        (["--", "sleep", "1"], "-- COMMAND must stand at the end with --kind RayJob"),
        (
            ["replicas.max_replicas=2"],
            "replicas.max_replicas must be 1 unless --to kuberay --kind RayService",
        ),
        (
            ["--kind", "RayService", "deploy.cpus_per_node=8", "cluster.num_cpus_for_coordinator=0.4"],
            "deploy.num_nodes must be at least 2: 8 GPUs and 8.1 CPUs are needed",
        ),
        (["--to", "ray", "--kind", "RayJob"], "--kind and -- COMMAND must be left out with --to ray"),
    ],
)
def test_what_cannot_be_deployed_is_refused_in_a_line(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.yaml"
    result = deploy(LARGE, IMAGE, "--to", "kuberay", "--out", str(out), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def spoiled(document: Manifest, path: list[str | int], value: object) -> Manifest:
    """With one value put in, or changed."""
    changed = copy.deepcopy(document)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "rayVersoin"], "2"),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),  # values are texts
        (["spec", "workerGroupSpecs", 0, "replicas"], "1"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "prots"], []),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limit"], {}),
        (["spec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "readinessProbe", "path"], "/"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0, "emptyDir", "size"], "1Gi"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "securityContext", "fsGroup"], "1000"),
        (["spec", "authOptions", "mode"], "password"),
        (["kind"], "RayClusters"),
    ],
)
def test_mistakes_in_a_manifest_are_found(path: list[str | int], value: object, tmp_path: Path) -> None:
    _, manifest, _ = kuberay(tmp_path, "RayCluster", LARGE)
    check_manifest(manifest)
    with pytest.raises(ValueError, match=r"\$|must be of ray.io/v1"):
        check_manifest(spoiled(manifest, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["max_wokers"], 1),
        (["docker", "images"], "x"),
        (["head_node_type"], "nobody"),
        (["available_node_types", "node", "min_workers"], 5),  # more than max_workers
        (["available_node_types", "node", "resources", "GPU"], 0.5),
    ],
)
def test_mistakes_in_a_launcher_file_are_found(path: list[str | int], value: object, tmp_path: Path) -> None:
    (file,) = written(tmp_path, LARGE, "--to", "ray")
    check_launcher(file)
    with pytest.raises(ValueError, match=r"."):
        check_launcher(spoiled(file, path, value))


def test_the_schema_says_where_it_is_from() -> None:
    schema = json.loads((Path(__file__).parents[3] / "cluster/deploying/kuberay.json").read_text())
    assert "https://github.com/ray-project/kuberay, Apache-2.0" in schema["$comment"]
