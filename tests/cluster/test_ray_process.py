"""What surrounds Ray in this process; Ray itself is left out."""

import threading
from pathlib import Path

import pytest

from outrider.cluster.ray_process import Keeper, keep_token_private


def test_ray_is_started_by_a_thread_that_outlives_the_one_that_asked() -> None:
    started_by: list[threading.Thread] = []
    keepers: list[Keeper] = []
    asking = threading.Thread(
        target=lambda: keepers.append(Keeper(lambda: started_by.append(threading.current_thread())))
    )
    asking.start()
    asking.join()
    assert started_by[0].is_alive()
    keepers[0].release()
    started_by[0].join(timeout=20)
    assert not started_by[0].is_alive()


def test_what_keeps_ray_from_starting_reaches_the_one_that_asked() -> None:
    def refuse() -> None:
        raise ConnectionError("nobody is there")

    with pytest.raises(ConnectionError, match="nobody is there"):
        Keeper(refuse)


@pytest.mark.parametrize("exists", [True, False])
def test_the_token_is_for_its_owner_alone(exists: bool, tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    if exists:
        token.parent.mkdir()
        token.write_text("secret")
        token.chmod(0o644)
    keep_token_private(tmp_path)
    assert token.stat().st_mode & 0o777 == 0o600
    assert (token.read_text() == "secret") == exists
    assert len(token.read_text()) > 5


def test_a_home_without_room_for_a_token_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".ray").write_text("no folder")
    with pytest.raises(
        ValueError, match=r"cluster\.ray_auth = token keeps its token in .*: Not a directory$"
    ):
        keep_token_private(tmp_path)
