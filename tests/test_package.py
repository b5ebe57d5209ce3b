"""The package that people install: what a wheel holds, and what an import of it costs and gives."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import outrider

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "kernels", "workers", "cluster")
PIP: list[str | Path] = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

USER_SCRIPT = """
from outrider import Engine, __version__, load_config

reveal_type(load_config("tiny-random").target.tp_size)
reveal_type(Engine.start(load_config("tiny-random")).generate)
reveal_type(__version__)
"""


@dataclass(frozen=True)
class Installed:
    """A clean environment with the wheel in it."""

    wheel: Path
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))

    def run(self, *command: str | Path) -> str:
        """Output of a command in an empty folder, with no way to this checkout."""
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        done = subprocess.run(command, cwd=elsewhere, env={}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    # A copy: building in the checkout leaves files there, and files of an earlier build would get in.
    source = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build: list[str | Path] = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        source / "dist",
        source,
    ]
    subprocess.run([*PIP, *build], check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    found = Installed(wheel, tmp_path_factory.mktemp("environment"))
    venv.create(found.folder)
    subprocess.run([*PIP, "--python", found.python, "install", "--no-deps", wheel], check=True)
    return found


def test_the_links_lead_to_the_top_folders() -> None:
    package = ROOT / "src" / "outrider"
    links = {path.name: path.readlink() for path in package.iterdir() if path.is_symlink()}
    assert links == {name: Path("../..", name) for name in FOLDERS}


def test_a_wheel_holds_every_file_of_the_four_folders(installed: Installed) -> None:
    files = {
        str(Path("outrider", path.relative_to(ROOT)))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {Path(name).suffix for name in files} >= {".py", ".cu", ".cuh", ".yaml", ".jsonl"}
    packed = set(zipfile.ZipFile(installed.wheel).namelist())
    packed = {name for name in packed if name.startswith("outrider/")}
    assert packed == files | {"outrider/__init__.py", "outrider/__main__.py", "outrider/py.typed"}


def test_mypy_follows_an_installed_wheel(installed: Installed) -> None:
    script = installed.folder / "script.py"
    script.write_text(USER_SCRIPT)
    mypy = (sys.executable, "-m", "mypy", "--ignore-missing-imports", "--python-executable")
    types = installed.run(*mypy, installed.python, script)
    assert 'Revealed type is "int"' in types
    assert "Completion]" in types
    assert 'Revealed type is "str"' in types


def test_an_installed_wheel_runs_without_the_checkout(installed: Installed) -> None:
    # The dependencies are those of this environment; a path file brings them, but no editable install.
    (installed.site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shown = installed.run(installed.folder / "bin" / "outrider", "config", "tiny-random", "target.tp_size=2")
    assert "tp_size: 2" in shown
    code = "import outrider; from outrider import Engine, load_config; print(Engine, outrider.__path__)"
    assert str(installed.site_packages) in installed.run(installed.python, "-c", code)


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, outrider; outrider.__version__; outrider.load_config('tiny-random');"
        "outrider.Client, outrider.AsyncClient;"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules);"
        # What a user waits for before the first line of output.
        "import outrider.cluster.cli.main, outrider.cluster.coordinator; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_start_without_transformers() -> None:
    """It takes a second of a processor to import, in each of them: grammars and judges bring it when they come."""
    code = (
        "import sys, outrider.workers.draft, outrider.workers.target, outrider.workers.stand_in;"
        "assert not {'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_heads_are_read_without_the_compiler_of_torch() -> None:
    """It is imported by the first of some operations on the meta device, and takes longer than torch."""
    code = (
        "import sys, outrider.workers.draft_heads.checkpoint as checkpoint; from outrider.configs import loader;"
        "checkpoint.read_eagle3(loader.HEADS_DIR / 'smollm2-eagle3');"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_coordinator_reads_what_it_needs_of_a_model_without_torch() -> None:
    """More than a second of a processor to import, before the first worker could begin to load."""
    code = (
        "import sys, outrider.cluster.coordinator; from outrider.cluster.admission import prepare_admission;"
        "from outrider.configs.loader import load_config;"
        "prepare_admission(load_config('tiny-random'), lambda stage, done, total: None).calibration();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in outrider.__all__:
        assert getattr(outrider, name)
    with pytest.raises(ImportError, match="cannot import name 'Motor'"):
        exec("from outrider import Motor")
