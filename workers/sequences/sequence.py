"""Request: what a user asks. Sequence: its running state in the DraftWorker. TokenEvent: what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.pages import Prefix
from outrider.workers.sequences.params import SamplingParams


@dataclass(frozen=True)
class DraftOptions:
    """How one request is drafted. `max_nodes` = 0 is plain decoding: every tree is its root alone."""

    methods: tuple[str, ...]
    max_nodes: int  # draft tokens per round, at most
    max_depth: int  # draft tokens on one path, at most
    tree: bool = False  # whether every event tells the tree of its round


@dataclass(frozen=True)
class AcceptanceOptions:
    """By which rule the drafted tokens of one request are accepted. Fields of other rules than its own mean nothing.

    Attributes:
        rule: a key of `RULES`; all but `exact` change the text.
        epsilon, delta: of `typical`, see `TypicalRule`.
        judge: of `judge`, its name.
        threshold: of `judge`, the score above which a drafted token is kept; at 1 none is.
    """

    rule: str = "exact"
    epsilon: float = 0.09
    delta: float = 0.3
    judge: str = ""
    threshold: float = 1.0


EXACTLY = AcceptanceOptions()


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (nats) of one emitted token under the target's unprocessed law, and of the likeliest."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first


@dataclass(frozen=True)
class KeptAccount:
    """What a lossy rule cost: of the tokens that came out although `exact` would have refused them.

    A token's gap is how much less likely it is than the token that the target sampled there, in nats, under the
    target's unprocessed law; below 0 where the noise or an option made the target take the less likely one. Its score
    is the judge's; 0 under other rules.
    """

    num: int = 0
    gap_sum: float = 0.0
    worst_gap: float = 0.0  # the largest; 0 without tokens
    score_sum: float = 0.0
    least_score: float = 0.0  # 0 without tokens

    @property
    def mean_gap(self) -> float:
        return self.gap_sum / self.num if self.num else 0.0

    @property
    def mean_score(self) -> float:
        return self.score_sum / self.num if self.num else 0.0

    def plus(self, other: KeptAccount) -> KeptAccount:
        """Of both together."""
        if not self.num or not other.num:
            return other if other.num else self
        return KeptAccount(
            num=self.num + other.num,
            gap_sum=self.gap_sum + other.gap_sum,
            worst_gap=max(self.worst_gap, other.worst_gap),
            score_sum=self.score_sum + other.score_sum,
            least_score=min(self.least_score, other.least_score),
        )

    def summary(self) -> dict[str, float]:
        """As users read it."""
        return {
            "num": self.num,
            "mean_logprob_gap": self.mean_gap,
            "worst_logprob_gap": self.worst_gap,
            "mean_score": self.mean_score,
            "least_score": self.least_score,
        }


NONE_KEPT = KeptAccount()


@dataclass(frozen=True)
class RequestStats:
    """What speculation did for one request so far. Index d of the tuples is draft depth d + 1."""

    num_rounds: int = 0  # target steps that emitted at least one token
    num_drafted: int = 0
    num_accepted: int = 0  # kept ones included
    kept: KeptAccount = NONE_KEPT  # tokens that came out where the target sampled another one
    num_cached_prompt_tokens: int = 0  # prompt tokens taken from shared pages
    num_recomputed: int = 0  # times the pages were taken away and the sequence computed again
    depth_drafted: tuple[int, ...] = ()  # rounds that offered a token at this depth below accepted parents
    depth_accepted: tuple[int, ...] = ()

    @property
    def num_kept(self) -> int:
        return self.kept.num


@dataclass(frozen=True)
class Request:
    """One text to continue: from its prompt, or from where another DraftWorker had to leave it."""

    id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    draft: DraftOptions
    acceptance: AcceptanceOptions = EXACTLY
    output_tokens: tuple[int, ...] = ()  # that came out before, and do not come again
    stats: RequestStats = RequestStats()  # of these


@dataclass(frozen=True)
class RoundTree:
    """The tree of one request that one round verified. Node 0 is the text's last token before the round.

    Attributes:
        tokens: of every node.
        parents: of every node, an earlier one; 0 of node 0 itself.
        accepted: the drafted nodes that came out, in the order of the text.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


NO_TREE = RoundTree()


@dataclass(frozen=True)
class TokenEvent:
    """Tokens of one request that one round settled; the last event of a request has a finish reason."""

    request_id: str
    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]  # whose choice each token is
    logprobs: tuple[TokenLogprobs, ...]  # as many as tokens, or none when the request did not ask
    finish_reason: str  # "" while running, then "stop", "length", "cancelled" or "error"
    error: str
    stats: RequestStats
    tree: RoundTree = NO_TREE  # where the request asked for it and the round verified one


@dataclass
class Sequence:
    """A request that runs.

    The target's KV cache holds `num_committed` rows of `tokens`; the rest are known but not computed there:
    one token (the last) while decoding, more while the prompt is read or after the pages were taken away.
    """

    request: Request
    tokens: list[int]  # prompt, then output
    arrival: int = 0  # how many requests came before
    admission: int = 0  # how many times a sequence had been let run before
    waiting_since: int = 0  # the round in which it came, or since which it has read little of what it lacks
    slot: int = 0
    lane: int = 0
    pages: list[int] = field(default_factory=list)
    num_committed: int = 0
    num_pages_sent: int = 0  # the target knows this many of `pages`
    num_pages_freed: int = 0  # the first of `pages`, which no layer sees any more and others may hold
    remembered: Prefix = field(default_factory=Prefix)  # findable by other sequences
    pending_accepted: tuple[int, ...] = ()  # nodes of the last step that the next message commits
    started: bool = False  # the target knows the slot
    in_flight: bool = False
    cancelled: bool = False
    finish_reason: str = ""
    stats: RequestStats = field(default_factory=RequestStats)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt_tokens)

    @property
    def num_uncommitted(self) -> int:
        """Known tokens without a KV row; 1 while decoding."""
        return len(self.tokens) - self.num_committed

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.request.sampling.max_tokens - self.num_output
