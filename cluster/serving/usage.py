"""What a request used, as its answer says it."""

from functools import reduce
from typing import Any

from outrider.cluster.api import Piece
from outrider.cluster.serving.jobs import Job
from outrider.workers.sequences.sequence import KeptAccount, RequestStats


class Tally:
    """Counts over the choices of one request."""

    def __init__(self, job: Job) -> None:
        self._num_per_prompt = job.num_per_prompt
        self._rule = job.requests[0].acceptance.get("rule", "exact")
        self._num_prompt_tokens = [0] * len(job.requests)
        self._stats = [RequestStats()] * len(job.requests)
        self.num_tokens = 0
        """Tokens of all choices."""

    def add(self, index: int, piece: Piece) -> None:
        """The next piece of a choice has come."""
        self.num_tokens += len(piece.tokens)
        self._stats[index] = piece.stats
        self._num_prompt_tokens[index] = piece.num_prompt_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts; one that has several choices counts once."""
        prompts = zip(*[iter(self._num_prompt_tokens)] * self._num_per_prompt, strict=True)
        return sum(max(choices) for choices in prompts)

    def speculation(self) -> dict[str, Any]:
        """What speculation did, by which rule; and, where that may keep tokens against the target, what it cost."""
        said: dict[str, Any] = {
            "rule": self._rule,
            "rounds": sum(stats.num_rounds for stats in self._stats),
            "drafted": sum(stats.num_drafted for stats in self._stats),
            "accepted": sum(stats.num_accepted for stats in self._stats),
            "kept": sum(stats.num_kept for stats in self._stats),
        }
        if self._rule != "exact":
            account = reduce(KeptAccount.plus, (stats.kept for stats in self._stats))
            said |= {f"kept_{name}": value for name, value in account.summary().items() if name != "num"}
        return said

    def usage(self) -> dict[str, Any]:
        """In OpenAI's shape, with `speculative` beside it."""
        num_prompt, num_cached = self.num_prompt_tokens, sum(s.num_cached_prompt_tokens for s in self._stats)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_tokens,
            "total_tokens": num_prompt + self.num_tokens,
            # Choices of one prompt share its pages: each may have found all of it.
            "prompt_tokens_details": {"cached_tokens": min(num_cached, num_prompt)},
            "speculative": self.speculation(),
        }
