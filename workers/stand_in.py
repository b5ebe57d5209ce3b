"""Who drives the token loop while there is no DraftWorker: a DraftWorker without a drafter, in rank 0's process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from outrider.configs.schema import AcceptanceConfig, Config
from outrider.workers.draft import DraftWorker
from outrider.workers.sequences.rules import RULES


class StandIn(DraftWorker):
    """Decodes plainly, with the same texts: it holds no weights, and is there as soon as it is wanted.

    Takes requests of every rule: where nothing is drafted all of them are `exact`.
    """

    def __init__(self, config: Config) -> None:
        draft = replace(
            config.draft, methods=(), tp_size=1, device="cpu", num_threads=config.target.num_threads
        )
        super().__init__(replace(config, draft=draft, acceptance=AcceptanceConfig()))
        self._one_loads = threading.Lock()
        self._is_loaded = False

    def load(self, progress: Callable[[str, int, int], None]) -> None:
        """Nothing is read but what the target is. May be called again."""
        with self._one_loads:
            if not self._is_loaded:
                super().load(progress)
                self._rules = dict.fromkeys(("judge", *RULES), RULES["exact"])
                self._is_loaded = True
