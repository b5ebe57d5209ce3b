"""`outrider plan`: every byte that a deployment will take, before a weight is fetched."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cluster.cli.options import ConfigName, Overrides
from outrider.configs.loader import load_config

if TYPE_CHECKING:
    from outrider.configs.schema import Config
    from outrider.workers.planning.deployment import MemoryPlan, Models

_HEADINGS = {
    "embedding": "embedding",
    "head": "head",
    "attention": "attention",
    "mlp": "MLP",
    "norms": "norms",
    "heads": "draft heads",
    "kv_cache": "KV cache",
    "graphs": "graphs",
    "activations": "activations",
    "communication": "NCCL",
    "context": "context",
}


def plan(
    config: ConfigName,
    overrides: Overrides = [],
    as_json: Annotated[bool, typer.Option("--json", help="Bytes, for machines.")] = False,
) -> None:
    """Print what each process will keep in which GPU, from config.json alone; what does not fit is refused."""
    from outrider.workers.planning.advice import proposals
    from outrider.workers.planning.deployment import plan_memory

    loaded = load_config(config, overrides)
    gpu_memory_bytes, said_by = _gpu_memory(loaded)
    planned = plan_memory(loaded, _models(loaded), gpu_memory_bytes)
    changes = []
    if not planned.fits:
        found = proposals(
            loaded, planned, gpu_memory_bytes, lambda model: _fp8_models(loaded, planned, model)
        )
        changes = [" ".join(proposal.overrides) for proposal in found]
    if as_json:
        typer.echo(json.dumps({**_record(planned), "would_fit": changes}, indent=1))
    else:
        typer.echo(_described(loaded, planned, gpu_memory_bytes, said_by))
    if planned.problems:
        would = f"; what would fit: {', or '.join(changes)}" if changes else ""
        raise ValueError(f"{config} does not fit: {'; '.join(planned.problems)}{would}")


def _models(config: "Config") -> "Models":
    from outrider.workers.planning.deployment import Models
    from outrider.workers.weights.shipped import describe_model

    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    target, target_from = describe_model(config.target.model, cache_dir, "target.model")
    if "model" not in config.draft.methods:
        return Models(target, target_from, None, "")
    return Models(target, target_from, *describe_model(config.draft.model, cache_dir, "draft.model"))


def _fp8_models(config: "Config", planned: "MemoryPlan", model: str) -> "Models | None":
    from outrider.workers.planning.advice import FP8_SUFFIX
    from outrider.workers.weights.shipped import shipped_config, shipped_models

    path = shipped_models().get(model + FP8_SUFFIX)
    if path is None:
        return None
    return replace(planned.models, target=shipped_config(path), target_from=model + FP8_SUFFIX)


def _gpu_memory(config: "Config") -> tuple[int, str]:
    """Of each GPU, and who says so: this machine, where the deployment will be here, else the configuration."""
    from outrider.workers.planning.gpus import smallest_gpu

    if config.cluster.ray_address == "local":
        here = smallest_gpu()
        if here[0]:
            return here
    return config.deploy.gpu_memory_bytes, "deploy.gpu_memory_bytes"


def _record(planned: "MemoryPlan") -> dict[str, Any]:
    devices = [
        {
            "name": device.name,
            "memory_bytes": device.memory_bytes,
            "used_bytes": device.used_bytes,
            "free_bytes": device.free_bytes,
            "processes": [
                {"name": process.name, "kv_tokens": process.kv_tokens, "bytes": dict(process.parts)}
                for process in device.processes
            ],
        }
        for device in planned.devices
    ]
    return {
        "fits": planned.fits,
        "problems": planned.problems,
        "devices": devices,
        "not_counted": planned.not_counted,
    }


def _described(config: "Config", planned: "MemoryPlan", gpu_memory_bytes: int, said_by: str) -> str:
    """As Markdown: the table, then what it stands for."""
    from outrider.workers.planning.deployment import MARGIN_FRACTION, gib

    parts = [name for name in _HEADINGS if any(process.parts[name] for process in planned.processes)]
    place = {process.name: device for device in planned.devices for process in device.processes}
    rows = [["GiB", "on", *(_HEADINGS[name] for name in parts), "all"]]
    for process in planned.processes:
        sizes = [_size(process.parts[name]) for name in parts]
        rows.append([process.name, place[process.name].name, *sizes, _size(process.total)])
    lines = _markdown(rows)
    on = [["", "has", "taken", f"free, {MARGIN_FRACTION:.0%} aside"]]
    on += [
        [device.name, _size(device.memory_bytes), _size(device.used_bytes), _size(device.free_bytes)]
        for device in planned.devices
    ]
    lines += ["", *_markdown(on), ""]
    ranks = [process for process in planned.processes if not process.name.startswith("draft")]
    weights = [process.weights.total for process in ranks]
    models = planned.models
    lines.append(
        f"Target: {models.target_from}, {sum(weights) / 1e9:.1f} GB of weights over {len(ranks)} ranks, the fullest "
        f"{max(weights) / (sum(weights) / len(ranks)):.3f} of the mean. Its KV cache holds "
        f"{min(process.kv_tokens for process in ranks):,} tokens."
    )
    drafters = planned.processes[len(ranks) :]
    if models.draft is not None:
        over = f" over {len(drafters)} ranks" if len(drafters) > 1 else ""
        lines.append(
            f"Drafter: {models.draft_from}, {sum(one.weights.total for one in drafters) / 1e9:.1f} GB of "
            f"weights{over}; its KV cache holds {drafters[0].kv_tokens:,} tokens."
        )
    if any(device.name != "CPU" for device in planned.devices):
        lines.append(
            f"A GPU has {gib(gpu_memory_bytes)} ({said_by}). Weights and caches are exact; graphs, NCCL and context "
            "are estimates."
        )
    lines += [f"Not counted: {line}." for line in planned.not_counted]
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}" if num_bytes else ""


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a table, the first one its head, columns of equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(w) if i < 1 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if i < 1 else ":") for i, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]
