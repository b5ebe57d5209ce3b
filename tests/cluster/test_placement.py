"""What is reserved for whom, and what is refused."""

import pytest

from outrider.cluster.placement import bundles, check_cpus, given_gpus
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
