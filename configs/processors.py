"""What must hold between models and the processors that their ranks are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outrider.configs.checks import require
from outrider.configs.cluster import ClusterConfig
from outrider.configs.replicas import ReplicasConfig

if TYPE_CHECKING:
    from outrider.configs.schema import DraftConfig, TargetConfig


def shares_gpus(draft: DraftConfig, cluster: ClusterConfig) -> bool:
    """Whether ranks of the drafter are on GPUs of the target's ranks, of which they are given a part."""
    return draft.placement == "shared" and cluster.num_gpus_per_draft > 0


def check_processors(
    target: TargetConfig, draft: DraftConfig, cluster: ClusterConfig, replicas: ReplicasConfig
) -> None:
    """Raises ValueError that names a key which does not fit the others."""
    shares = shares_gpus(draft, cluster)
    for role, device in (("target", target.device), ("draft", draft.device)):
        given = getattr(cluster, f"num_gpus_per_{role}")
        allowed = f"more than 0, because {role}.device is cuda"
        require(device != "cuda" or given > 0, f"cluster.num_gpus_per_{role}", given, allowed)
    if draft.placement == "shared":
        allowed = f"at most target.tp_size ({target.tp_size}), because draft.placement is shared"
        require(draft.tp_size <= target.tp_size, "draft.tp_size", draft.tp_size, allowed)
    if shares:
        given, whole = cluster.num_gpus_per_draft, cluster.num_gpus_per_target
        # Ray gives out parts of one GPU, not of several.
        allowed = "above 0 and at most 1, because draft.placement is shared"
        require(0 < whole <= 1, "cluster.num_gpus_per_target", whole, allowed)
        allowed = f"below cluster.num_gpus_per_target ({whole:g}), of which it is a part"
        require(given < whole, "cluster.num_gpus_per_draft", given, allowed)
    for role, model in (("target", target), ("draft", draft)):
        on_gpu = model.device != "cpu" and getattr(cluster, f"num_gpus_per_{role}") > 0
        if model.tp_size > 1 and on_gpu:
            allowed = "auto, nccl or gloo, because ranks compute on GPUs"
            require(model.all_reduce != "shm", f"{role}.all_reduce", model.all_reduce, allowed)
            key = "num_gpus_per_target" if shares else f"num_gpus_per_{role}"
            given = getattr(cluster, key)
            allowed = (
                f"more than 0.5, because nccl wants a GPU for each rank ({role}.all_reduce gloo does not)"
            )
            require(model.all_reduce == "gloo" or given > 0.5, f"cluster.{key}", given, allowed)
    if replicas.max_replicas > 1:
        # Ray fills a GPU with fractions of whoever comes.
        for key in ("num_gpus_per_target", *(() if shares else ("num_gpus_per_draft",))):
            given = getattr(cluster, key)
            allowed = "a whole number, because replicas.max_replicas is more than 1 and replicas share no GPU"
            require(given == int(given), f"cluster.{key}", given, allowed)
