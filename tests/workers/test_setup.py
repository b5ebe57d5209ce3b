"""What ranks agree on before they serve."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from outrider.configs.loader import load_config
from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.workers import setup
from outrider.workers import target as target_module
from outrider.workers.draft import DraftWorker
from outrider.workers.link.communicator import Communicator, SoloCommunicator, agreed
from outrider.workers.setup import (
    agreed_kernels,
    require_memory,
    target_row_step,
    torch_device,
    transport_for,
    with_draft_dtype,
)
from outrider.workers.target import TargetWorker
from outrider.workers.weights.progress import silent
from support.thread_group import run_ranks, thread_group

ALL = KernelSelection.of(ENTRIES)


def test_a_yes_is_one_of_every_rank() -> None:
    answers = ([True, True, False], [True, False, False], [True, True, True])
    assert run_ranks(3, lambda rank: agreed(rank, answers[rank.rank])) == [[True, False, False]] * 3
    assert agreed(SoloCommunicator(), [True, False]) == [True, False]


@pytest.mark.filterwarnings("ignore:.*will not be used")
def test_a_kernel_that_failed_on_one_rank_is_used_by_none() -> None:
    without_two = KernelSelection.of([e for e in ENTRIES if e not in ("tree_attention", "sample_shard")])
    selections = (ALL, without_two, KernelSelection.of([e for e in ENTRIES if e != "kv_commit"]))
    lost = {"tree_attention", "sample_shard", "kv_commit"}
    expected = KernelSelection.of([e for e in ENTRIES if e not in lost])
    assert run_ranks(3, lambda rank: agreed_kernels(selections[rank.rank], rank)) == [expected] * 3


def test_only_a_rank_that_loses_a_kernel_says_so() -> None:
    selections = (ALL, REFERENCES)
    with pytest.warns(UserWarning, match=f"{', '.join(ENTRIES)} will not be used: not every rank") as said:
        run_ranks(2, lambda rank: agreed_kernels(selections[rank.rank], rank))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agreed_kernels(ALL, SoloCommunicator()) == ALL


def test_rows_come_in_steps_where_packed_float32_on_a_cpu_computes_them_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "row_step", lambda dtype: 4 if dtype == torch.float32 else 1)

    def step(*overrides: str) -> int:
        return target_row_step(load_config("tiny-random", list(overrides)))

    assert step() == step("target.device=auto") == 4
    assert step("target.dtype=bfloat16") == step("target.packed_weights=false") == 1
    assert step("target.weights=int8") == 1
    assert step("target.device=auto", "cluster.num_gpus_per_target=1") == 1


GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "gpus", "usable", "expected"),
    [
        ("auto", (), True, CPU),  # there are GPUs, and none of them was given to this process
        ("auto", (1,), True, GPU),
        ("auto", (1, 0), True, GPU),
        ("cuda", (1,), True, GPU),
        ("cpu", (1,), True, CPU),
        (
            "cuda",
            (),
            True,
            r"target\.device must be auto or cpu where .* no GPU \(cluster\.num_gpus_per_target\)",
        ),
        ("auto", (1,), False, r"target\.device must be cpu where torch \(.*\) can use no GPU, got 'auto'"),
    ],
)
def test_a_process_computes_on_the_gpu_it_was_given(
    name: str, gpus: tuple[int, ...], usable: bool, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            torch_device("target", name, gpus)
        return
    assert torch_device("target", name, gpus) == expected


def test_every_thread_of_a_worker_computes_on_the_workers_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's current GPU is the first one, whatever other threads have set."""
    current: dict[int, torch.device] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.update({get_ident(): device}))
    monkeypatch.setattr("outrider.workers.target.connect_store", never)
    config = load_config("tiny-random", ["target.tp_size=2"])
    target, draft = TargetWorker(config, 1, (1,)), DraftWorker(config, (1,))
    target._weights = SimpleNamespace(device=GPU)  # type: ignore[assignment]
    draft._device = GPU
    draft._loop = draft._link = SimpleNamespace(run=never, close=lambda: None, send=never)  # type: ignore[assignment]
    monkeypatch.setattr(draft, "_time_target", never)
    target._communicator = SimpleNamespace(rank=1, broadcast=never, abort=lambda: None, close=lambda: None)  # type: ignore[assignment]

    def run_target() -> None:
        target._rank = SimpleNamespace(step=never)  # type: ignore[assignment]
        target.run()

    for call in (
        partial(target.connect, "host", 1, 1),
        run_target,
        partial(draft.profile, silent),
        draft.run,
    ):
        with ThreadPoolExecutor(1) as thread:
            ident = thread.submit(get_ident).result()
            with pytest.raises(RuntimeError, match="as far as it goes"):
                thread.submit(call).result()
        assert current.pop(ident) == GPU


def never(*arguments: object) -> None:
    raise RuntimeError("this is as far as it goes")


@pytest.mark.parametrize(
    ("all_reduce", "device", "tp_size", "expected"),
    [
        ("auto", GPU, 2, "nccl"),
        ("auto", CPU, 2, "auto"),
        ("gloo", GPU, 2, "gloo"),
        ("shm", CPU, 2, "shm"),
        ("shm", GPU, 1, "shm"),  # nothing is summed
        ("shm", GPU, 2, r"target\.all_reduce must be auto, nccl or gloo where ranks .* on GPUs, got 'shm'"),
        (
            "nccl",
            CPU,
            2,
            r"target\.all_reduce must be auto, gloo or shm where ranks .* on the CPU, got 'nccl'",
        ),
    ],
)
def test_ranks_sum_in_a_way_that_their_devices_can(
    all_reduce: str, device: torch.device, tp_size: int, expected: str
) -> None:
    if "must be" not in expected:
        assert transport_for(all_reduce, device, tp_size) == expected
        return
    with pytest.raises(ValueError, match=expected):
        transport_for(all_reduce, device, tp_size)


@pytest.mark.parametrize("worker", [lambda c: TargetWorker(c, 0), DraftWorker], ids=["target", "draft"])
def test_workers_that_were_given_no_gpu_use_none(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray lets a process without a GPU of its own see all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = worker(load_config("tiny-random", ["target.device=auto", "draft.device=auto"]))
    made.load(silent)
    assert (made._weights.device if isinstance(made, TargetWorker) else made._device) == CPU


@pytest.mark.parametrize(
    ("has_bfloat16", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float32")]
)
def test_a_target_says_that_a_processor_has_no_instructions_for_its_numbers(
    has_bfloat16: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"architecture": "x86_64", "avx512_bf16": has_bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    told = TargetWorker(load_config("tiny-random", [f"target.dtype={dtype}"]), 0).load(silent)
    assert [text for text in told if "target.dtype=float32" in text] == told
    assert len(told) == (dtype == "bfloat16" and not has_bfloat16)


@pytest.mark.filterwarnings("ignore:.*will not be used")
def test_target_workers_use_what_all_of_them_may(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny-random", ["target.tp_size=2"])
    workers = [TargetWorker(config, rank) for rank in range(2)]
    for worker, selection in zip(workers, (ALL, KernelSelection.of(["gather_rows"])), strict=True):
        monkeypatch.setattr(target_module, "kernels_for", lambda *_, chosen=selection: chosen)
        worker.load(silent)
    monkeypatch.setattr(target_module, "Link", lambda *_: SimpleNamespace(abort=never))
    monkeypatch.setattr(target_module, "connect_store", lambda *_: None)

    def join(store: object, epoch: int, rank: int, *_: object) -> Communicator:
        return communicators[rank]

    monkeypatch.setattr(target_module, "join_group", join)
    communicators = thread_group(2)
    host, port = workers[0].open_store("127.0.0.1")
    run_ranks(2, lambda rank: workers[rank.rank].connect(host, port, 1))
    for worker in workers:
        assert worker._rank.model.kernels == KernelSelection.of(["gather_rows"])
        assert not worker._rank._cache.use_kernel


def test_a_rank_that_would_not_fit_is_told_so_before_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 << 30, 80 << 30))
    require_memory(GPU, 60 << 30, 3)
    require_memory(CPU, 1 << 50, 3)
    with pytest.raises(ValueError, match=r"the weights of rank 3 take 61\.0 GiB, cuda:1 has 60\.0 GiB free"):
        require_memory(GPU, 61 << 30, 3)


@pytest.mark.parametrize(
    ("capabilities", "device", "options", "expected"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False}, "cpu", {}, "float32"),
        ({"architecture": "x86_64", "avx512_bf16": True}, "cpu", {}, "bfloat16"),
        ({"architecture": "x86_64", "amx_bf16": True}, "cpu", {}, "bfloat16"),
        ({"architecture": "aarch64"}, "cpu", {}, "bfloat16"),
        ({"architecture": "x86_64", "avx512_bf16": False}, "cuda", {}, "bfloat16"),
        ({"architecture": "x86_64", "avx512_bf16": False}, "cpu", {"tp_size": 2}, "bfloat16"),
        ({"architecture": "x86_64", "avx512_bf16": True}, "cpu", {"dtype": "float32"}, "float32"),
    ],
)
def test_a_draft_dtype_of_auto_is_what_the_processor_multiplies(
    capabilities: dict[str, object],
    device: str,
    options: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    config = load_config("tiny-random")
    asked = replace(config, draft=replace(config.draft, **{"dtype": "auto", **options}))
    assert with_draft_dtype(asked, device).draft.dtype == expected
