"""What is reserved for whom, and what is refused."""

import pytest

from outrider.cluster.placement import Place, bundles, check_cpus, given_gpus, places
from outrider.configs.loader import load_config


def test_there_is_a_bundle_for_every_process() -> None:
    config = load_config("llama3-70b-h100x8")
    coordinator, draft, *targets = bundles(config)
    assert coordinator == {"CPU": 0.1}
    assert draft == {"CPU": 0.5, "GPU": 1.0}
    assert targets == [{"CPU": 1.0, "GPU": 1.0}] * 7


def test_drafts_by_lookup_need_no_gpu() -> None:
    _, draft, *targets = bundles(load_config("mellum2-12b-tp2"))
    assert draft == {"CPU": 2.0}
    assert targets == [{"CPU": 1.0, "GPU": 1.0}] * 2


ON_GPUS = ["cluster.num_gpus_per_target=1", "target.tp_size=4", "draft.tp_size=2"]


def on_one_node(num_bundles: int) -> dict[int, str]:
    return dict.fromkeys(range(num_bundles), "node")


def test_a_separate_drafter_has_a_bundle_and_a_gpu_for_each_rank() -> None:
    config = load_config("tiny-random", [*ON_GPUS, "cluster.num_gpus_per_draft=1"])
    wanted = bundles(config)
    assert [bundle.get("GPU", 0.0) for bundle in wanted] == [0, 1, 1, 1, 1, 1, 1]
    drafts, targets = places(config, on_one_node(len(wanted)))
    assert drafts == [Place(1, 0.4, 1.0), Place(2, 0.4, 1.0)]
    assert targets == [Place(bundle, 0.5, 1.0) for bundle in (3, 4, 5, 6)]


def test_a_drafter_that_shares_gpus_is_in_the_bundles_of_the_first_ranks_and_reserves_no_gpu_more() -> None:
    shared = ["draft.placement=shared", "cluster.num_gpus_per_draft=0.3"]
    config = load_config("tiny-random", [*ON_GPUS, *shared])
    wanted = bundles(config)
    assert wanted[1:] == [{"CPU": 0.9, "GPU": 1.0}] * 2 + [{"CPU": 0.5, "GPU": 1.0}] * 2
    drafts, targets = places(config, on_one_node(len(wanted)))
    assert drafts == [Place(1, 0.4, 0.3), Place(2, 0.4, 0.3)]
    # What the two ask for is what their bundle has.
    assert targets == [Place(1, 0.5, 0.7), Place(2, 0.5, 0.7), Place(3, 0.5, 1.0), Place(4, 0.5, 1.0)]


def test_ranks_of_one_node_are_side_by_side_and_rank_0_is_where_the_drafter_is() -> None:
    shared = ["draft.placement=shared", "cluster.num_gpus_per_draft=0.5"]
    config = load_config("tiny-random", [*ON_GPUS, *shared])
    drafts, targets = places(config, {0: "a", 1: "b", 2: "a", 3: "b", 4: "a"})
    assert [place.bundle for place in targets] == [1, 3, 2, 4]
    assert [place.bundle for place in drafts] == [1, 2]
    for place in targets:
        assert place.num_gpus == (0.5 if place.bundle in (1, 2) else 1.0)


def test_a_drafter_without_gpus_shares_no_bundle() -> None:
    config = load_config("tiny-random", ["draft.placement=shared", "target.tp_size=2", "draft.tp_size=2"])
    assert bundles(config) == [{"CPU": 0.1}, {"CPU": 0.4}, {"CPU": 0.4}, {"CPU": 0.5}, {"CPU": 0.5}]


def test_the_cpus_of_all_the_drafters_ranks_are_counted() -> None:
    check_cpus(load_config("tiny-random", ["draft.tp_size=3"]), num_cpus=2)
    with pytest.raises(ValueError, match=r"target\.tp_size must be at most 0 on 2 CPUs: .* the others 1\.7"):
        check_cpus(load_config("tiny-random", ["draft.tp_size=4"]), num_cpus=2)


def test_the_quickstart_fits_two_cpus_exactly() -> None:
    check_cpus(load_config("quickstart"), num_cpus=2)
    with pytest.raises(ValueError, match=r"target\.tp_size must be at most 0 on 1 CPUs"):
        check_cpus(load_config("quickstart"), num_cpus=1)


def test_more_ranks_than_cpus_are_refused_by_name() -> None:
    config = load_config("quickstart", ["target.tp_size=3"])
    with pytest.raises(ValueError, match=r"target\.tp_size must be at most 2 on 2 CPUs: .*; got 3"):
        check_cpus(config, num_cpus=2)


@pytest.mark.parametrize(
    ("ids", "visible", "expected"),
    [
        ([], None, ()),  # num_gpus 0: Ray gives none, and lets the process see all
        ([], "0,1,2,3", ()),
        (["3"], "3", (0,)),  # Ray has hidden the others
        ([3], None, (3,)),  # Ray was told not to hide any
        (["5"], "4,5,6,7", (1,)),
        (["GPU-b", "GPU-a"], "GPU-a,GPU-b", (1, 0)),
    ],
)
def test_the_gpus_that_ray_gave_are_found_among_those_that_are_seen(
    ids: list[int | str], visible: str | None, expected: tuple[int, ...]
) -> None:
    assert given_gpus(ids, visible) == expected
