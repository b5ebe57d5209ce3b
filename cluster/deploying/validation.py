"""Whether what we write is what Kubernetes and Ray read, unknown keys forbidden; no cluster is asked."""

import contextlib
import copy
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match
from ray.autoscaler._private.util import prepare_config, validate_config

_SCHEMA = Path(__file__).with_name("kuberay.json")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """A RayCluster, RayJob or RayService against KubeRay's definitions (release v1.7), with Kubernetes' own of pods.

    Rules that only a server of Kubernetes follows (CEL) are not looked at. Raises ValueError naming the field.
    """
    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    kind = manifest.get("kind")
    kinds = sorted(name for name in schema["$defs"] if name.startswith("Ray"))
    if kind not in kinds or manifest.get("apiVersion") != "ray.io/v1":
        raise ValueError(f"a manifest must be of ray.io/v1 and one of {', '.join(kinds)}, got {kind!r}")
    error = best_match(Draft202012Validator({**schema, "$ref": f"#/$defs/{kind}"}).iter_errors(manifest))
    if error is not None:
        raise ValueError(f"{kind} {error.json_path}: {error.message}")


def check_launcher(launcher: Mapping[str, Any]) -> None:
    """A file for `ray up` against the installed Ray's own schema. Raises ValueError naming the field."""
    try:
        logging.getLogger("ray.autoscaler._private.util").setLevel(
            logging.WARNING
        )  # it talks while it completes
        with contextlib.redirect_stdout(io.StringIO()):
            validate_config(prepare_config(copy.deepcopy(dict(launcher))))
    except ValidationError as error:
        raise ValueError(f"launcher {error.json_path}: {error.message}") from error
