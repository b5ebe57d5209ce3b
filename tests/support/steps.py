"""Messages step by step, and scores that say little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from outrider.workers.link.messages import Scores, SequenceStep, Steps
from outrider.workers.sequences.rules import NodeScores
from outrider.workers.sequences.segments import starts_of
from outrider.workers.sequences.tree import Bools, Floats, Ints


def steps_in(steps: Steps) -> list[SequenceStep]:
    """What `Steps.of` was made of."""
    accepted, pages = starts_of(steps.num_accepted), starts_of(steps.num_new_pages)
    nodes = starts_of(steps.num_nodes)

    def part(flat: np.ndarray, starts: np.ndarray, counts: np.ndarray, b: int) -> tuple[int, ...]:
        return tuple(flat[starts[b] : starts[b] + counts[b]].tolist())

    return [
        SequenceStep(
            slot=int(steps.slots[b]),
            accepted=part(steps.accepted, accepted, steps.num_accepted, b),
            new_pages=part(steps.new_pages, pages, steps.num_new_pages, b),
            tokens=part(steps.tokens, nodes, steps.num_nodes, b),
            parents=part(steps.parents, nodes, steps.num_nodes, b),
            first_sampled=int(steps.first_sampled[b]),
            first_hidden=int(steps.first_hidden[b]),
        )
        for b in range(len(steps))
    ]


def node_scores(
    tokens: Ints,
    failed: Bools | None = None,
    child_laws: Floats | None = None,
    entropies: Floats | None = None,
    is_pushed_down: Bools | None = None,
    hidden: Mapping[int, torch.Tensor] | None = None,
) -> NodeScores:
    """Of trees; [B, K] each, zeros where nothing is given. The model's own law is the request's."""
    nowhere, zeros = np.zeros(tokens.shape, dtype=np.bool_), np.zeros(tokens.shape)
    laws = zeros if child_laws is None else child_laws
    return NodeScores(
        tokens=tokens,
        failed=nowhere if failed is None else failed,
        child_logprobs=laws,
        entropies=zeros if entropies is None else entropies,
        child_laws=laws,
        is_pushed_down=nowhere if is_pushed_down is None else is_pushed_down,
        draft_rows=torch.zeros(*tokens.shape, 0),
        has_draft_row=nowhere,
        hidden=hidden or {},
    )


def scores_of(round_id: int, tokens: Sequence[int] = (), forward_s: float = 0.0) -> Scores:
    """Scores with these sampled tokens."""
    nothing = np.zeros(0, dtype=np.float32)
    return Scores(
        round_id=round_id,
        tokens=np.array(tokens, dtype=np.int64),
        failed=np.zeros(len(tokens), dtype=bool),
        logprobs=nothing,
        top_ids=np.zeros((0, 0), dtype=np.int64),
        top_logprobs=nothing.reshape(0, 0),
        child_logprobs=nothing,
        child_laws=nothing,
        is_pushed_down=np.zeros(0, dtype=bool),
        entropies=nothing,
        commit_s=0.0,
        forward_s=forward_s,
        sample_s=0.0,
    )
