"""Imports go one way: configs <- kernels <- workers <- cluster; Ray, CUDA and process groups have one home each."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from outrider.configs import schema

ROOT = Path(schema.__file__).resolve().parent.parent  # whatever links lead there

ALLOWED_LAYERS = {
    "configs": {"configs"},
    "kernels": {"kernels"},
    "workers": {"configs", "kernels", "workers"},
    # The package itself only for its version, which the metadata of a distribution need not be there to say.
    "cluster": {"configs", "workers", "cluster", "", "__version__"},
}

ALLOWED_PACKAGES = {
    "configs": {"yaml"},
    "kernels": {"torch", "numpy", "cuda"},
    "workers": {
        "torch",
        "numpy",
        "scipy",
        "transformers",
        "safetensors",
        "gguf",
        "tokenizers",
        "huggingface_hub",
        "psutil",
        "datasketch",
        "deepspeed",
        "pydantic",
        "sklearn",
        "threadpoolctl",
        "peft",
        "llguidance",
    },
    "cluster": {
        "ray",
        "yaml",
        "jsonschema",
        "aiohttp",
        "typer",
        "rich",
        "matplotlib",
        "numpy",
        "scipy",
        "psutil",
        "transformers",
        "fastapi",
        "starlette",
        "pydantic",
        "pydantic_core",
        "typing_extensions",
        "uvicorn",
        "prometheus_client",
        "httpx",
        "llguidance",
    },
}

# Inside `workers`, from the ground up: folders, and modules that stand alone. Imports go down only.
FLOORS = (
    {"sequences", "weights", "memory", "trace", "last_resort", "routing"},
    {"link", "timing", "draft_heads", "answer"},
    {"model", "sampling", "judging"},
    {"capacity"},
    {"setup", "target_state"},
    {"drafting", "training", "target_rank"},
    {"rounds", "target"},
    {"draft_rank", "doctor", "baselines", "planning"},
    {"draft"},
    {"first_gpu", "host_time", "stand_in"},
)

STDLIB = __import__("sys").stdlib_module_names


def python_files() -> list[Path]:
    return sorted(path for layer in ALLOWED_LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module
            # `from torch import distributed` is an import of torch.distributed.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(path: Path) -> Iterator[str]:
    """Imports of a file that its layer may not have."""
    layer = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        package, _, rest = module.partition(".")
        if package == "outrider":
            allowed = rest.split(".")[0] in ALLOWED_LAYERS[layer]
        else:
            allowed = package in STDLIB or package in ALLOWED_PACKAGES[layer]
        if module.startswith("torch.distributed"):
            allowed = path == ROOT / "workers" / "link" / "distributed.py"
        if not allowed:
            yield f"{path.relative_to(ROOT)} imports {module}"


def test_modules_import_only_what_their_layer_may() -> None:
    assert [fault for path in python_files() for fault in faults(path)] == []


def test_imports_inside_workers_go_down_only() -> None:
    floor_of = {unit: number for number, floor in enumerate(FLOORS) for unit in floor}
    upwards = []
    for path in python_files():
        layer, unit, *_ = path.relative_to(ROOT).with_suffix("").parts
        for module in imported_modules(path) if layer == "workers" else ():
            if module.startswith("outrider.workers."):
                other = module.split(".")[2]
                if other != unit and floor_of[other] >= floor_of[unit]:
                    upwards.append(f"{path.relative_to(ROOT)} imports {module}")
    assert upwards == []


def test_the_folders_are_namespace_packages() -> None:
    # A kernels/__init__.py would shadow Hugging Face's `kernels` package in every process that starts here.
    assert not [path for path in python_files() if path.name == "__init__.py"]


def test_files_stay_under_400_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {path: length for path, length in lengths.items() if length >= 400} == {}


# Distributions whose modules go by another name.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "cuda": "cuda-core",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "prometheus_client": "prometheus-client",
    "pydantic_core": "pydantic-core",
    "typing_extensions": "typing-extensions",
}


def test_what_the_code_imports_is_installed_with_it() -> None:
    """No extra is needed to serve: a GPU without cuda-core would have no kernels."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.split(r"[>=;<]", line)[0] for line in project["dependencies"]}
    imported = set().union(*ALLOWED_PACKAGES.values())
    extras = project["optional-dependencies"]
    for_training = {re.split(r"[>=;<]", line)[0] for line in extras["train"]}
    for_jobs = {re.split(r"[>=;<]", line)[0] for line in extras["cluster"]}
    assert {DISTRIBUTIONS.get(name, name) for name in imported} <= installed | for_training | for_jobs
    assert extras.keys() == {"dev", "train", "cluster"}
    with_extras = (ROOT / "workers" / "training", ROOT / "cluster" / "jobs")
    without = {path for path in python_files() if not any(folder in path.parents for folder in with_extras)}
    serving = {module for path in without for module in imported_modules(path)}
    assert not {DISTRIBUTIONS.get(module.split(".")[0], module.split(".")[0]) for module in serving} & (
        for_training | for_jobs
    )
