"""What the server takes on at a time, and from whom."""

import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outrider.cluster.serving.errors import ApiError, overloaded
from outrider.configs.schema import ServerConfig


class Places:
    """Counts what is under way, and refuses what would be more than there is room for. Belongs to one event loop."""

    def __init__(self, most: int, refusal: str) -> None:
        self._most = most
        self._refusal = refusal
        self.num_taken = 0

    def take(self, count: int) -> None:
        """Raises ApiError, and takes nothing, where so many are not free."""
        if self.num_taken + count > self._most:
            raise overloaded(self._refusal)
        self.num_taken += count

    def give_back(self, count: int) -> None:
        self.num_taken -= count
        assert self.num_taken >= 0, self.num_taken

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Inside the block."""
        self.take(count)
        try:
            yield
        finally:
            self.give_back(count)


def choice_places(config: ServerConfig) -> Places:
    """For answers under way."""
    return Places(
        config.max_concurrent,
        f"server.max_concurrent = {config.max_concurrent} answers are under way: come again when some have ended",
    )


def byte_places(config: ServerConfig) -> Places:
    """For bodies of requests under way."""
    return Places(
        config.max_buffered_bytes,
        f"bodies of {config.max_buffered_bytes} bytes (server.max_buffered_bytes) are under way: come again when "
        "some have ended",
    )


class ApiKeys:
    """The keys of a file. Without a file everybody is let in."""

    def __init__(self, path: str) -> None:
        """Raises ValueError for a file that cannot be read or has no key."""
        self._digests: list[bytes] = []
        self._open = not path
        if self._open:
            return
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"server.api_keys_file must be a file of text, got {path!r}: {error}") from error
        keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not keys:
            raise ValueError(f"server.api_keys_file must have a key on a line, got none in {path!r}")
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, authorization: bytes) -> None:
        """`authorization`: the header's value. Raises ApiError unless it has one of the keys."""
        if self._open:
            return
        scheme, _, key = authorization.partition(b" ")
        sent = _digest(key.strip())
        # All keys are compared, and digests of one length: how long it takes says nothing of a key.
        known = [hmac.compare_digest(sent, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(known):
            message = (
                "an API key must be sent as Authorization: Bearer KEY, and this one is none of the server's"
            )
            raise ApiError(401, message, code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
