"""A further rank of the drafter (`draft.tp_size`): it computes its part of the draft model as rank 0, which is the
DraftWorker's process, asks for it. It knows no request and no target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from outrider.configs.schema import Config
from outrider.workers.drafting.model_ranks import ModelRank, NoHead, follow, load_rank
from outrider.workers.link.distributed import connect_store, join_group
from outrider.workers.memory import peak_memory_bytes
from outrider.workers.setup import torch_device, transport_for, use_device, with_draft_dtype
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer
from outrider.workers.weights.progress import Progress

_PATIENCE_S = (
    365 * 86400.0
)  # between two steps nothing may be asked for long; whoever owns this process ends it


class OtherRanks(Protocol):
    """The further ranks of a drafter, as its DraftWorker sees them; whoever starts them stands behind it."""

    @property
    def host(self) -> str:
        """An address of this machine at which they find rank 0."""
        ...

    def wait_until_loaded(self) -> None:
        """Until all have returned from `DraftRank.load`. Raises what one raised, or RankLostError."""
        ...

    def follow(self, host: str, port: int) -> None:
        """Lets all begin `DraftRank.follow`; does not wait."""
        ...


class NoOtherRanks:
    """A drafter of one rank."""

    host = "127.0.0.1"

    def wait_until_loaded(self) -> None:
        pass

    def follow(self, host: str, port: int) -> None:
        pass


class DraftRank:
    """One process: `load`, then `follow`, which ends with rank 0."""

    def __init__(self, config: Config, rank: int, gpus: Sequence[int] = ()) -> None:
        """`gpus`: CUDA ordinals of the GPUs that this process was given."""
        assert rank > 0
        self.config = config
        self.rank = rank
        self._gpus = tuple(gpus)
        self._tracer = Tracer(f"draft {rank}", config.rounds.trace)

    def load(self, progress: Progress) -> None:
        """Read this rank's weights.

        Raises:
            ValueError: the checkpoint is missing or does not fit the configuration.
        """
        draft = self.config.draft
        torch.set_num_threads(draft.num_threads)
        self._device = torch_device("draft", draft.device, self._gpus)
        use_device(self._device)
        self.config = with_draft_dtype(self.config, self._device.type)
        head = NoHead() if draft.head else None
        self._loaded = load_rank(self.config, self.rank, self._device, progress, head)

    def follow(self, host: str, port: int) -> None:
        """Meet rank 0 at its store, and do what it does, until it says stop.

        Raises:
            PeerLostError: another rank is gone.
        """
        use_device(self._device)
        config, device = self.config, self._device
        store = connect_store(host, port, config.cluster.group_timeout_s)
        size = config.draft.tp_size
        transport = transport_for(config.draft.all_reduce, device, size, "draft")
        communicator = join_group(store, 0, self.rank, size, transport, _PATIENCE_S, device, "draft")
        try:
            rank = ModelRank(*self._loaded.built(config, communicator))
            stretches = Stretches(device, self._tracer)
            follow(rank, config.rounds.max_sequences, config.target.page_size, stretches)
        except BaseException:
            communicator.abort()
            raise
        finally:
            communicator.close()

    def stats(self) -> dict[str, Any]:
        """Seconds per kind of work since the start, and the peak memory of this process."""
        return {"busy_s": self._tracer.totals(), "peak_memory_bytes": peak_memory_bytes()}

    def trace_events(self) -> list[dict[str, Any]]:
        """Spans for a Chrome trace; empty unless `rounds.trace` is on."""
        return self._tracer.events()
