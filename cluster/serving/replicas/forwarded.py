"""What goes from the front to a replica, and what says by whom an answer is."""

from dataclasses import dataclass, field
from typing import Any

from outrider.cluster.serving.replicas.prefixes import Prefix

REPLICA_HEADER = b"x-outrider-replica"
"""In every answer: by which replica it is."""


@dataclass(frozen=True)
class Forwarded:
    """A request, of which a server has read the body. scope: as ASGI has it. prefix: what its prompt begins with."""

    scope: dict[str, Any]
    body: bytes
    prefix: Prefix = field(default=(), repr=False)
