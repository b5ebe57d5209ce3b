"""Which deployment has read the beginning of a prompt already: digests of it, and what each has been sent.

A table says what a replica was sent, not what is left in its cache: its entries go as the replica's pages do, those
that were asked for longest ago first.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

BLOCK = 64  # characters, some 16 tokens: what is shorter is read in no time
_MOST_BLOCKS = 4096  # of one prompt
_DIGEST_BYTES = 8

Prefix = tuple[int, ...]
"""A digest for each beginning of a prompt that is whole blocks long, the shortest first."""


def prefix_of(path: str, body: bytes) -> Prefix:
    """Of a request's body; empty where there is no prompt, or where nobody can read it."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(asked, dict):
        return ()
    text = "".join(
        json.dumps(part, ensure_ascii=False, separators=(",", ":")) for part in _in_order(path, asked)
    )
    digests, digest = [], b""
    for begin in range(0, min(len(text) // BLOCK, _MOST_BLOCKS) * BLOCK, BLOCK):
        # Half of a surrogate pair is no UTF-8; the replica says what is wrong with it.
        block = text[begin : begin + BLOCK].encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(digest + block, digest_size=_DIGEST_BYTES).digest()
        digests.append(int.from_bytes(digest, "little"))
    return tuple(digests)


def _in_order(path: str, asked: dict[str, Any]) -> list[Any]:
    """What the model reads, as templates put it: tools, then messages, each by itself so that a conversation that
    goes on begins as it did."""
    match path:
        case "/v1/chat/completions":
            return [asked.get("tools"), *_as_list(asked.get("messages"))]
        case "/v1/completions":
            prompt = asked.get("prompt")
            if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
                return [prompt[0]]
            return [prompt]
        case "/v1/responses":
            return [asked.get("tools"), asked.get("instructions"), *_as_list(asked.get("input"))]
    return []


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class PrefixTable:
    """The beginnings of prompts that one replica was sent, `most` at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[int, None] = {}  # the one asked for last stands last

    def __len__(self) -> int:
        return len(self._known)

    def num_known(self, prefix: Prefix) -> int:
        """How many blocks of a prompt, from its beginning, were in one that was sent before."""
        number = 0
        while number < len(prefix) and prefix[number] in self._known:
            number += 1
        return number

    def add(self, prefix: Prefix) -> None:
        """A prompt was sent."""
        # A longer beginning is worth nothing without the shorter, so it is forgotten first.
        for digest in reversed(prefix):
            self._known.pop(digest, None)
            self._known[digest] = None
        while len(self._known) > self._most:
            del self._known[next(iter(self._known))]


def ranked(
    num_known: Sequence[int], queues: Sequence[float], sizes: Sequence[int], queue_lead: int
) -> list[int]:
    """Replicas, by index, in the order in which a request should be offered to them.

    num_known: of its blocks, by replica. queues: requests under way; infinite where a replica does not say. sizes:
    of the tables, so that prompts without relations are spread. First comes who knows most of the prompt among those
    that have at most `queue_lead` requests more than the idlest; the others by their queues.
    """
    least = min(queues, default=0.0)

    def rank(index: int) -> tuple[bool, float, float, int]:
        queue = queues[index]
        is_long = queue > least + queue_lead
        return is_long, 0 if is_long else -num_known[index], queue, sizes[index]

    return sorted(range(len(queues)), key=rank)
