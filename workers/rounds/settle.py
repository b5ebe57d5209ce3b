"""What one round's scores mean for one sequence: tokens out, KV rows to keep, or the end."""

from __future__ import annotations

from dataclasses import replace

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.link.messages import StepScores
from outrider.workers.rounds.scheduler import PlannedStep
from outrider.workers.sequences.rules import Verdict, verify_exact
from outrider.workers.sequences.sequence import RequestStats, Sequence, TokenEvent, TokenLogprobs
from outrider.workers.sequences.tree import DraftTree


def settle_step(step: PlannedStep, scores: StepScores, drafting: DraftEngine) -> TokenEvent:
    """Accept, extend the sequence, note which KV rows the next message commits, re-root the draft tree.

    The event is empty while a prompt is being read. A sequence that finishes keeps its tree and pages; the
    caller frees them.
    """
    sequence, chain = step.sequence, step.chain_length
    if sequence.cancelled:
        return _event(sequence, (), (), (), "cancelled")
    if not step.reaches_end:
        _keep_rows(sequence, tuple(range(chain)))
        return _event(sequence, (), (), (), "")
    tree = sequence.sent_tree
    verdict = verify_exact(tree, scores.tokens)
    emitted, finish_reason = _until_end(sequence, verdict.emitted(tree))
    _keep_rows(sequence, (*range(chain), *(chain - 1 + node for node in verdict.path[1:])))
    sequence.tokens += emitted
    sequence.stats = _count(sequence.stats, tree, verdict)
    num_accepted = len(verdict.path) - 1
    from_draft = tuple(i < num_accepted for i in range(len(emitted)))
    logprobs = _logprobs(scores, verdict, len(emitted)) if scores.logprobs else ()
    if not finish_reason:
        drafting.settle(sequence, verdict)
    return _event(sequence, tuple(emitted), from_draft, logprobs, finish_reason)


def _until_end(sequence: Sequence, emitted: list[int]) -> tuple[list[int], str]:
    """The tokens up to a stop token (included) or the length limit, and why the text ends there, if it does."""
    sampling = sequence.request.sampling
    emitted = emitted[: sequence.num_remaining]
    for index, token in enumerate(emitted):
        if token in sampling.stop_token_ids:
            return emitted[: index + 1], "stop"
    return emitted, "length" if len(emitted) == sequence.num_remaining else ""


def _keep_rows(sequence: Sequence, nodes: tuple[int, ...]) -> None:
    sequence.pending_accepted = nodes
    sequence.num_committed += len(nodes)


def _count(stats: RequestStats, tree: DraftTree, verdict: Verdict) -> RequestStats:
    depths = tree.depths()
    path = set(verdict.path)
    num_levels = max(len(stats.depth_drafted), max(depths))
    drafted = list(stats.depth_drafted) + [0] * (num_levels - len(stats.depth_drafted))
    accepted = list(stats.depth_accepted) + [0] * (num_levels - len(stats.depth_accepted))
    offered = {depths[n] for n in range(1, len(depths)) if tree.parents[n] in path}
    for depth in offered:
        drafted[depth - 1] += 1
    for depth in range(1, len(verdict.path)):
        accepted[depth - 1] += 1
    return replace(
        stats,
        num_rounds=stats.num_rounds + 1,
        num_drafted=stats.num_drafted + tree.num_drafted,
        num_accepted=stats.num_accepted + len(verdict.path) - 1,
        depth_drafted=tuple(drafted),
        depth_accepted=tuple(accepted),
    )


def _logprobs(scores: StepScores, verdict: Verdict, count: int) -> tuple[TokenLogprobs, ...]:
    """Token i of the output was sampled after node i of the accepted path."""
    found = []
    for node in verdict.path[:count]:
        top: tuple[tuple[int, float], ...] = ()
        if scores.top_ids:
            top = tuple(zip(scores.top_ids[node], scores.top_logprobs[node], strict=True))
        found.append(TokenLogprobs(scores.logprobs[node], top))
    return tuple(found)


def _event(
    sequence: Sequence,
    tokens: tuple[int, ...],
    from_draft: tuple[bool, ...],
    logprobs: tuple[TokenLogprobs, ...],
    finish_reason: str,
) -> TokenEvent:
    return TokenEvent(sequence.id, tokens, from_draft, logprobs, finish_reason, "", sequence.stats)
