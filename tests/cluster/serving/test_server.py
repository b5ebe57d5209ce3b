"""Where the server listens."""

import pytest

from outrider.cluster.serving.server import address_of, bind, is_local
from outrider.configs.schema import ServerConfig


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    with bind(ServerConfig(port=0)) as here, bind(ServerConfig(host="0.0.0.0", port=0)) as everywhere:
        assert is_local(here)
        assert not is_local(everywhere)
        assert address_of(here).startswith("http://127.0.0.1:")


def test_an_address_that_cannot_be_had_is_one_line() -> None:
    with bind(ServerConfig(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"server.host and server.port must be a free address.* {port}: "
        ):
            bind(ServerConfig(port=port))
    with pytest.raises(ValueError, match=r"server\.host and server\.port must be a free address"):
        bind(ServerConfig(host="192.0.2.1", port=0))
