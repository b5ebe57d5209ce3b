"""Imports go one way: configs <- kernels <- workers <- cluster; Ray, CUDA and process groups have one home each."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.configs import schema

ROOT = Path(schema.__file__).parent.parent

ALLOWED_LAYERS = {
    "configs": {"configs"},
    "kernels": {"kernels"},
    "workers": {"configs", "kernels", "workers"},
    "cluster": {"configs", "workers", "cluster"},
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
    },
    "cluster": {"ray", "typer", "rich", "matplotlib", "numpy", "scipy", "psutil", "transformers"},
}

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


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    relative = path.relative_to(ROOT)
    layer = relative.parts[0]
    for module in imported_modules(path):
        package, _, rest = module.partition(".")
        if package == "outrider":
            assert rest.split(".")[0] in ALLOWED_LAYERS[layer], f"{relative} imports {module}"
        elif package not in STDLIB:
            assert package in ALLOWED_PACKAGES[layer], f"{relative} imports {module}"
        if module.startswith("torch.distributed"):
            assert str(relative) == "workers/link/distributed.py", f"{relative} imports {module}"


@pytest.mark.parametrize("layer", sorted(ALLOWED_LAYERS))
def test_the_folders_are_namespace_packages(layer: str) -> None:
    # A kernels/__init__.py would shadow Hugging Face's `kernels` package in every process that starts here.
    assert not list((ROOT / layer).rglob("__init__.py"))


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_under_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


def test_every_package_is_listed_for_wheels() -> None:
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for path in python_files()}
    for folder in folders:
        assert f'"outrider.{".".join(folder.parts)}"' in listed, folder
