"""How cluster/deploying/kuberay.json came about: `python tests/support/trim_crds.py FOLDER` with KubeRay's CRDs.

FOLDER holds ray.io_rayclusters.yaml, ray.io_rayjobs.yaml and ray.io_rayservices.yaml of its helm chart
(helm-chart/kuberay-operator/crds). Kept is version v1 of each, without descriptions, defaults and what only a
cluster's API server follows; what occurs in several places is written once; unknown keys are forbidden, as
`kubectl apply --validate=strict` forbids them.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
KEPT = {
    "type",
    "properties",
    "required",
    "items",
    "additionalProperties",
    "anyOf",
    "pattern",
    "enum",
    "minimum",
    "minLength",
    "maxLength",
    "minItems",
}
WORTH_SHARING = 200  # characters
COMMENT = (
    "From the custom resource definitions of KubeRay, https://github.com/ray-project/kuberay, Apache-2.0, changed: "
    "trimmed by tests/support/trim_crds.py of this repository."
)


def trimmed(schema: Any) -> Any:
    """What a validator needs of a node of a schema."""
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key in KEPT}
    if "anyOf" in kept:
        kept["anyOf"] = [trimmed(one) for one in kept["anyOf"]]
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return below(kept, "", lambda part, name: trimmed(part))


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """One schema that has a `$defs` for each kind, and for what occurs more than once."""
    seen: set[str] = set()
    names: dict[str, str] = {}

    def find(schema: Any, name: str) -> Any:
        text = json.dumps(schema, sort_keys=True)
        if len(text) > WORTH_SHARING and text in seen:
            names.setdefault(text, f"{name}{len(names)}")
        else:
            seen.add(text)
            below(schema, name, find)
        return schema

    def refer(schema: Any, name: str) -> Any:
        shared_name = names.get(json.dumps(schema, sort_keys=True))
        return {"$ref": f"#/$defs/{shared_name}"} if shared_name else below(schema, name, refer)

    for kind, schema in schemas.items():
        find(schema, kind)
    definitions = {kind: below(schema, kind, refer) for kind, schema in schemas.items()}
    definitions |= {name: below(json.loads(text), name, refer) for text, name in names.items()}
    return {"$comment": COMMENT, "$defs": definitions}


def below(schema: Any, name: str, change: Callable[[Any, str], Any]) -> Any:
    """A schema whose parts are changed; a property may have the name of a keyword."""
    if not isinstance(schema, dict):
        return schema
    changed = dict(schema)
    for key in ("items", "additionalProperties"):
        if key in schema:
            changed[key] = change(schema[key], name)
    if "properties" in schema:
        changed["properties"] = {one: change(part, one) for one, part in schema["properties"].items()}
    return changed


def main(folder: Path, out: Path) -> None:
    schemas = {}
    for kind, plural in KINDS.items():
        crd = yaml.safe_load((folder / f"ray.io_{plural}.yaml").read_text(encoding="utf-8"))
        (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
        schemas[kind] = trimmed(version["schema"]["openAPIV3Schema"])
        schemas[kind]["properties"].pop("status")
    out.write_text(
        json.dumps(shared(schemas), separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parents[2] / "cluster" / "deploying" / "kuberay.json")
