"""The package as a wheel for the nodes of a cluster, whichever way it is installed here."""

import hashlib
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from zipfile import ZIP_STORED

_WHEEL = "Wheel-Version: 1.0\nGenerator: outrider\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path) -> Path:
    """Writes a wheel of the files that run here into `folder`; returns its path.

    It names no requirements: Ray would install them on every node (minutes and gigabytes with torch), over those that
    the node was set up with. Its build tag is a hash of its content: Ray tells wheels apart by their names alone, and
    keeps the first it was sent.
    """
    # `pip install 'outrider[cluster]'` brings it; whoever sends no jobs does without.
    from wheel.wheelfile import WheelFile

    package = Path(str(files("outrider")))
    release = version("outrider")
    contents = {f"outrider/{file.relative_to(package).as_posix()}": file for file in _files(package)}
    hashed = hashlib.sha256()
    for name, file in contents.items():
        content = file.read_bytes()
        hashed.update(f"{name} {len(content)} ".encode() + content)
    name = f"outrider-{release}"
    path = folder / f"{name}-0{hashed.hexdigest()[:16]}-py3-none-any.whl"
    # Stored as it is: most of it is weights, which do not shrink.
    with WheelFile(path, "w", ZIP_STORED) as wheel:
        for archived, file in contents.items():
            wheel.write(file, archived)
        metadata = f"Metadata-Version: 2.1\nName: outrider\nVersion: {release}\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", _WHEEL)
    return path


def _files(folder: Path) -> list[Path]:
    """In order, and through links, as a checkout has them: `Path.rglob` follows none."""
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.is_file():
            found.append(entry)
        elif entry.is_dir() and entry.name != "__pycache__":
            found += _files(entry)
    return found
