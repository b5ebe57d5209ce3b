"""A process of the target: one tensor-parallel rank of the large model, scoring whole trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from outrider.configs.schema import Config
from outrider.workers.drafting.registry import layers_needed
from outrider.workers.last_resort import ABORT_GRACE_S, Interruptible
from outrider.workers.link.communicator import (
    Communicator,
    SoloCommunicator,
    broadcast_message,
)
from outrider.workers.link.distributed import Link, connect_store, join_group, open_store
from outrider.workers.link.link import DraftReceiver
from outrider.workers.link.lost import LinkLostError, PeerLostError
from outrider.workers.link.messages import Draft, Scores, Steps, decode_draft, encode_draft
from outrider.workers.memory import peak_memory_bytes
from outrider.workers.model.fp8_cache import read_cache_scales
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.sizes import weight_bytes
from outrider.workers.model.transformer import Transformer
from outrider.workers.setup import (
    agreed_kernels,
    cache_dtype,
    counting,
    kernels_for,
    kernels_with_cache,
    load_model,
    quick_dtype,
    require_memory,
    target_cache,
    target_cache_bytes,
    target_grammars,
    torch_device,
    torch_dtype,
    transport_for,
    use_device,
)
from outrider.workers.target_rank import TargetRank, serve_rounds
from outrider.workers.trace import Tracer

PAUSE = Draft(0, (), (), Steps.of([]), pause=True)
_NOTHING = torch.empty(0, dtype=torch.int32)


class TargetWorker:
    """One process of the target: loads its slices, joins the group, serves rounds until told to stop.

    Rank 0 alone talks to the DraftWorker; the others get each round from rank 0.
    """

    def __init__(self, config: Config, rank: int, gpus: Sequence[int] = ()) -> None:
        """`gpus`: CUDA ordinals of the GPUs that this process was given."""
        self.config = config
        self.rank = rank
        self._gpus = tuple(gpus)
        self._tracer = Tracer(f"target {rank}", config.rounds.trace)
        self._communicator: Communicator = SoloCommunicator()
        self._interruptible = Interruptible()
        self._wake: list[Callable[[], None]] = []
        self._rank: TargetRank | None = None  # once connected
        self._lost_link = ""  # why rank 0 no longer hears of its DraftWorker

    def load(self, progress: Callable[[str, int, int], None]) -> list[str]:
        """Read this rank's weights. `progress(what, done_bytes, total_bytes)`.

        Returns:
            What users should be told.

        Raises:
            ValueError: the checkpoint is missing or does not fit the configuration.
        """
        target = self.config.target
        torch.set_num_threads(target.num_threads)
        device, dtype = torch_device("target", target.device, self._gpus), torch_dtype(target.dtype)
        use_device(device)
        self._transport = transport_for(target.all_reduce, device, target.tp_size)
        source = load_model(self.config, "target", progress)
        self._grammars = target_grammars(self.config, source.config, progress)
        plan = ShardPlan(source.config, self.rank, target.tp_size)
        share = weight_bytes(plan, dtype, device.type == "cuda").total
        require_memory(device, share + target_cache_bytes(self.config, plan), self.rank)
        counted = counting(progress, share)
        kernels = kernels_for(self.config, source.config, device, dtype)
        self._kernels = kernels_with_cache(kernels, cache_dtype(self.config, source.config))
        self._cache_scales = read_cache_scales(source)
        self._weights = load_weights(plan, source, dtype, device, target.packed_weights, counted)
        is_slow = target.dtype == "bfloat16" and quick_dtype(device.type) == "float32"
        if is_slow and source.config.quantization is None:
            return [
                "this CPU has no instructions for bfloat16: target.dtype=float32 reads prompts several times as fast"
            ]
        return []

    def open_store(self, host: str) -> tuple[str, int]:
        """Rank 0: open the meeting point of all groups on a free port; returns its host and port."""
        self._store = open_store(host, self.config.cluster.group_timeout_s)
        return host, self._store.port

    def connect(self, host: str, port: int, epoch: int) -> None:
        """Join the target group, build the model and its KV cache, and on rank 0 open the link to the DraftWorker.

        Every process must call it. A rank whose group broke may call it again, for a new store and another epoch:
        it keeps its weights.

        Raises:
            PeerLostError: another process has not come within `cluster.group_timeout_s`.
        """
        with self._interruptible.working():
            self._connect(host, port, epoch)

    def relink(self, epoch: int) -> None:
        """Where `run` has paused: forget the sequences, and on rank 0 open the link to another DraftWorker.

        Every rank must call it; the DraftWorker calls `connect` with the old store and this epoch.
        """
        assert self._rank is not None
        self._rank.forget_sequences()
        if self.rank == 0:
            with self._interruptible.working():
                self._open_link(epoch)

    def _connect(self, host: str, port: int, epoch: int) -> None:
        self._rank = None  # the cache of an earlier group, before there is another
        use_device(self._weights.device)
        timeout_s = self.config.cluster.group_timeout_s
        if self.rank != 0:
            self._store = connect_store(host, port, timeout_s)
        target = self.config.target
        self._communicator = join_group(
            self._store, epoch, self.rank, target.tp_size, self._transport, timeout_s, self._weights.device
        )
        self._wake = [self._communicator.abort]
        kernels = agreed_kernels(self._kernels, self._communicator)
        weights = self._weights
        cache = target_cache(self.config, weights, self._cache_scales, kernels)
        self._rank = TargetRank(
            Transformer(weights, self._communicator, kernels),
            cache,
            self.config.rounds.max_sequences,
            self.config.target.max_context,
            self._tracer,
            layers_needed(self.config, weights.plan.config),
            self._grammars,
        )
        if self.rank == 0:
            self._open_link(epoch)

    def _open_link(self, epoch: int) -> None:
        device, timeout_s = self._weights.device, self.config.cluster.group_timeout_s
        use_device(device)
        link = Link(self._store, epoch, True, device, timeout_s)
        self._link = DraftReceiver(link)
        self._wake = [self._communicator.abort, link.abort]

    def run(self) -> None:
        """Serve rounds until the DraftWorker says stop. Any failure wakes the other ranks and is raised.

        The loss of the DraftWorker is no failure of theirs: all ranks pause, rank 0 raises LinkLostError, the others
        return, and `relink` lets them go on.
        """
        with self._interruptible.working():
            self._run()

    def abort(self, grace_s: float = ABORT_GRACE_S) -> None:
        """Another process of the deployment is lost: end `connect` or `run`, which may wait for it, with an error.

        Called by who knows, from another thread than theirs. Where they have not ended after `grace_s` seconds this
        process ends itself.
        """
        self._interruptible.end(self._wake, grace_s)

    def _run(self) -> None:
        assert self._rank is not None
        use_device(self._weights.device)
        self._lost_link = ""
        # On a CPU planning takes the time of the round that it would hide behind.
        early = self._early_draft if self._weights.device.type == "cuda" else None
        try:
            draft = serve_rounds(self._rank, self._next_draft, early, self._answer)
        except BaseException:
            self._communicator.abort()
            self._communicator.close()
            raise
        finally:
            if self.rank == 0:
                self._link.close()
        if draft.stop:
            self._communicator.close()
        elif self.rank == 0:
            raise LinkLostError(self._lost_link)

    def _next_draft(self) -> Draft:
        with self._tracer.span("wait"):
            message = broadcast_message(self._communicator, self._received() if self.rank == 0 else _NOTHING)
        with self._tracer.span("communicate"):
            return decode_draft(message)

    def _early_draft(self) -> Draft | None:
        """The next draft, if it has come. Every rank calls this at the same places; rank 0 knows."""
        with self._tracer.span("communicate"):
            is_here = self.rank == 0 and self._link.poll()
            message = broadcast_message(self._communicator, self._received() if is_here else _NOTHING)
            return decode_draft(message) if len(message) else None

    def _received(self) -> torch.Tensor:
        """Rank 0: the next message, or PAUSE where no more will come."""
        try:
            return self._link.receive_message()
        except PeerLostError as error:
            self._lost_link = str(error)
            return encode_draft(PAUSE)

    def _answer(self, scores: Scores) -> None:
        if self.rank == 0:
            # Of a loss the next draft's absence says, too.
            with self._tracer.span("communicate"), suppress(PeerLostError):
                self._link.send(scores)

    def stats(self) -> dict[str, Any]:
        """Seconds per kind of work since the start, and the peak memory of this process."""
        return {"busy_s": self._tracer.totals(), "peak_memory_bytes": peak_memory_bytes()}

    def trace_events(self) -> list[dict[str, Any]]:
        """Spans for a Chrome trace; empty unless `rounds.trace` is on."""
        return self._tracer.events()
