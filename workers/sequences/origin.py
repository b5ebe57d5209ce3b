"""Whose choice a token is. Clients read it too, so it stands where nothing heavy is imported."""

from __future__ import annotations

from enum import IntEnum


class Origin(IntEnum):
    """Whose choice an emitted token is."""

    TARGET = 0  # sampled by the target where no draft was accepted
    DRAFT = 1  # drafted, and what the target samples there
    KEPT = 2  # drafted, and kept by a rule although the target samples another token

    @property
    def label(self) -> str:
        """As clients read it: `target`, `draft` or `kept`."""
        return self.name.lower()
