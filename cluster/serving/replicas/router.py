"""Ray Serve's request router for our replicas: the one that knows the prompt's beginning, unless its queue is long.

Serve's own means to choose replicas: https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html
"""

import math
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from outrider.cluster.serving.replicas.forwarded import Forwarded
from outrider.cluster.serving.replicas.prefixes import Prefix, PrefixTable, ranked


class PrefixRouter(RequestRouter):
    """Offers a request, whose one argument is a Forwarded, to one replica after another, best first, until one has a
    place for it."""

    def initialize_state(self, queue_lead: int, prefix_blocks: int) -> None:  # type: ignore[override]
        """As in section `replicas` of the configuration."""
        self._queue_lead = queue_lead
        self._prefix_blocks = prefix_blocks
        self._tables: dict[ReplicaID, PrefixTable] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates, each a rank of its own."""
        if pending_request is not None:
            # Without a pause between attempts a full house would be asked all the time.
            pending_request.routing_context.should_backoff = True
        prefix = _prefix(pending_request)
        queues = await self._queues(candidate_replicas)
        tables = [self._table(replica.replica_id) for replica in candidate_replicas]
        order = ranked(
            [table.num_known(prefix) for table in tables],
            [queues[replica.replica_id] for replica in candidate_replicas],
            [len(table) for table in tables],
            self._queue_lead,
        )
        return [[candidate_replicas[index]] for index in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve says so once the replica has taken the request."""
        self._table(replica_id).add(_prefix(pending_request))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas came or went: what was remembered of the latter is forgotten."""
        super().update_replicas(replicas)
        there = {replica.replica_id for replica in replicas}
        self._tables = {one: table for one, table in self._tables.items() if one in there}

    def _table(self, replica_id: ReplicaID) -> PrefixTable:
        return self._tables.setdefault(replica_id, PrefixTable(self._prefix_blocks))

    async def _queues(self, replicas: list[RunningReplica]) -> dict[ReplicaID, float]:
        """Requests under way, as last heard; who has not been heard of for a while is asked."""
        heard = {
            replica.replica_id: self.replica_queue_len_cache.get(replica.replica_id) for replica in replicas
        }
        silent = [replica for replica in replicas if heard[replica.replica_id] is None]
        asked = await self._probe_queue_lens(silent, 0)
        heard |= {replica.replica_id: length for replica, length in asked}
        return {replica: math.inf if length is None else length for replica, length in heard.items()}


def _prefix(pending_request: PendingRequest | None) -> Prefix:
    if pending_request is None or not pending_request.args:
        return ()
    (forwarded,) = pending_request.args
    assert isinstance(forwarded, Forwarded)
    return forwarded.prefix
