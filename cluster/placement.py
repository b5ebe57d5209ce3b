"""Where processes go: one placement group with a bundle per process, so that all get a place or none.

Where drafter and target share GPUs a rank of each is in one bundle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from outrider.configs.processors import shares_gpus
from outrider.configs.schema import Config

COORDINATOR_BUNDLE = 0

CPUS_IN_SERVE = 0.1
"""CPUs that Ray Serve reserves for each replica, beside its deployment's processes, and for the front before them:
bookkeeping, of which it would take a whole one."""


@dataclass(frozen=True)
class Place:
    """Where a process goes, and what it asks for of the bundle there."""

    bundle: int
    num_cpus: float
    num_gpus: float


def bundles(config: Config) -> list[dict[str, float]]:
    """What processes reserve: the Coordinator, the drafter's ranks, then the target's.

    Ranks of the drafter on GPUs of the target have no bundles of their own: they are in the first of the target's.
    """
    cluster, num_drafts = config.cluster, config.draft.tp_size
    coordinator = _bundle(cluster.num_cpus_for_coordinator, 0.0)
    draft = _bundle(cluster.num_cpus_per_draft, cluster.num_gpus_per_draft)
    target = _bundle(cluster.num_cpus_per_target, cluster.num_gpus_per_target)
    if not shares_gpus(config.draft, cluster):
        return [coordinator, *_copies(draft, num_drafts), *_copies(target, config.target.tp_size)]
    both = {**target, "CPU": target["CPU"] + draft["CPU"]}
    return [coordinator, *_copies(both, num_drafts), *_copies(target, config.target.tp_size - num_drafts)]


def places(config: Config, nodes: Mapping[int, str]) -> tuple[list[Place], list[Place]]:
    """Of the drafter's ranks and of the target's; those of one node side by side.

    nodes: by bundle.
    """
    cluster, num_drafts = config.cluster, config.draft.tp_size
    shares = shares_gpus(config.draft, cluster)
    first_target = COORDINATOR_BUNDLE + 1 + (0 if shares else num_drafts)
    drafts = _side_by_side(range(COORDINATOR_BUNDLE + 1, COORDINATOR_BUNDLE + 1 + num_drafts), nodes)
    targets = _side_by_side(range(first_target, first_target + config.target.tp_size), nodes)
    part = cluster.num_gpus_per_draft
    gpus = {
        bundle: round(cluster.num_gpus_per_target - (part if bundle in drafts else 0.0), 4)
        for bundle in targets
    }
    return (
        [Place(bundle, cluster.num_cpus_per_draft, part) for bundle in drafts],
        [Place(bundle, cluster.num_cpus_per_target, gpus[bundle]) for bundle in targets],
    )


def check_cpus(config: Config, num_cpus: int) -> None:
    """Refuses a deployment that this machine's CPUs cannot hold, before anything starts (ValueError)."""
    cluster, target = config.cluster, config.target
    others = cluster.num_cpus_for_coordinator + config.draft.tp_size * cluster.num_cpus_per_draft
    # Ray counts in ten-thousandths; a sum of floats must not fail by less.
    free = num_cpus - others + 1e-4
    most = int(free / cluster.num_cpus_per_target)
    if target.tp_size > most:
        raise ValueError(
            f"target.tp_size must be at most {most} on {num_cpus} CPUs: a rank reserves "
            f"cluster.num_cpus_per_target = {cluster.num_cpus_per_target:g}, the others "
            f"{others:g}; got {target.tp_size}"
        )


def given_gpus(ids: Sequence[int | str], visible: str | None) -> tuple[int, ...]:
    """CUDA ordinals, in this process, of the GPUs that Ray gave it.

    Ray hides the others only from processes that it gives some: without one of its own a process sees all of them.

    Args:
        ids: what `ray.get_gpu_ids()` says.
        visible: CUDA_VISIBLE_DEVICES of this process, where it is set: by Ray, or by who started Ray.
    """
    names = [str(name) for name in ids]
    if visible is None:
        return tuple(int(name) for name in names)
    order = visible.split(",")
    return tuple(order.index(name) for name in names)


def reserve(config: Config) -> PlacementGroup:
    """Waits until Ray has a place for every process.

    Raises ValueError that says what is missing after `cluster.start_timeout_s`.
    """
    wanted = bundles(config)
    group = placement_group(wanted, strategy=config.cluster.placement)
    if group.wait(config.cluster.start_timeout_s):
        return group
    remove_placement_group(group)
    raise ValueError(_what_is_missing(config, wanted))


def places_in(group: PlacementGroup, config: Config) -> tuple[list[Place], list[Place]]:
    """`places` in a group that is reserved."""
    return places(config, ray.util.placement_group_table(group)["bundles_to_node_id"])


def _side_by_side(indices: range, nodes: Mapping[int, str]) -> list[int]:
    """Those on the node of the first one first."""
    order = list(dict.fromkeys(nodes[index] for index in indices))
    return sorted(indices, key=lambda index: (order.index(nodes[index]), index))


def _copies(bundle: dict[str, float], number: int) -> list[dict[str, float]]:
    return [dict(bundle) for _ in range(number)]


def _bundle(num_cpus: float, num_gpus: float) -> dict[str, float]:
    return {"CPU": num_cpus, "GPU": num_gpus} if num_gpus else {"CPU": num_cpus}


def _what_is_missing(config: Config, wanted: list[dict[str, float]]) -> str:
    resources: Mapping[str, float] = ray.cluster_resources()
    free: Mapping[str, float] = ray.available_resources()
    shortages = []
    for name in ("CPU", "GPU"):
        needed = sum(bundle.get(name, 0.0) for bundle in wanted)
        if needed > free.get(name, 0.0) + 1e-4:
            there = f"{free.get(name, 0.0):g} of {resources.get(name, 0.0):g} are free"
            shortages.append(f"{needed:g} {name}s are needed and {there}")
    if not shortages:
        shortages = [f"the free resources do not satisfy cluster.placement = {config.cluster.placement}"]
    return (
        f"target.tp_size = {config.target.tp_size} and draft.tp_size = {config.draft.tp_size} found no place within "
        f"cluster.start_timeout_s = {config.cluster.start_timeout_s:g} s: {'; '.join(shortages)}"
    )
