"""What a job's processes import as `outrider`."""

import zipfile
from importlib.resources import files
from pathlib import Path


def package_folder(wheel: Path | None, scratch: Path) -> Path:
    """The folder of the package: the one that runs here, or that of a wheel, taken out of it into `scratch`.

    Ray gets a folder even where there is a wheel. It would install a wheel with all that it requires (minutes and
    gigabytes with torch, on every node), tell it from others by its name alone, and fail where two processes with
    different environments begin on one node at a time, or one after the other: the second runs pip on what the first
    has left (Ray 2.60; https://github.com/ray-project/ray/issues/49059).

    Raises ValueError for a file that is no wheel of this package.
    """
    if wheel is None:
        return Path(str(files("outrider")))
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("outrider/")]
            if "outrider/__main__.py" not in names:
                raise ValueError(f"--wheel must be one of outrider, got {str(wheel)!r}")
            archive.extractall(scratch, names)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"--wheel must be a wheel, got {str(wheel)!r}: {error}") from error
    return scratch / "outrider"
