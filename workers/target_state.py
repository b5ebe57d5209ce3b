"""What a target rank remembers of the sequences in its slots, and the rows it computes for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from outrider.workers.link.messages import Draft, Steps
from outrider.workers.model.batch import TreeRows, ancestor_masks, depths_of, num_mask_words
from outrider.workers.sampling.confinement import NO_WORDS, Confinement
from outrider.workers.sampling.context import PenaltyState, SampledRows
from outrider.workers.sampling.grammars import NO_GRAMMARS, Grammars
from outrider.workers.sampling.logprobs import NO_QUESTIONS, LawQuestions
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.segments import Int64Array, places_in, starts_of


@dataclass
class SlotState:
    """What a slot's sequence asks for, and what its output was so far where that matters."""

    sampling: SamplingParams
    prompt_length: int
    confinement: Confinement | None  # None: the text forbids nothing
    penalties: PenaltyState = field(default_factory=lambda: PenaltyState(()))
    num_counted: int = 0  # tokens that `penalties` and `confinement` know, those of the prompt included


class TargetSequences:
    """All slots of a rank. Every rank applies the same messages, so all ranks hold the same state.

    Which token each cache row was computed from is kept beside the cache: a sequence that takes shared pages
    learns its tokens from them, and they need not travel again.

    Attributes:
        tables: the pages of each slot.
    """

    def __init__(
        self, num_slots: int, num_pages: int, page_size: int, grammars: Grammars = NO_GRAMMARS
    ) -> None:
        """grammars: over the target's tokens."""
        self._grammars = grammars
        self.tables = PageTables(num_slots, page_size)
        self._states: dict[int, SlotState] = {}
        self._context_lens = np.zeros(num_slots, dtype=np.int64)  # committed rows
        self._wants_logprobs = np.zeros(num_slots, dtype=bool)
        self._needs_children = np.zeros(num_slots, dtype=bool)
        self._needs_entropy = np.zeros(num_slots, dtype=bool)
        self._row_tokens = np.zeros(num_pages * page_size, dtype=np.int64)

    def apply(self, draft: Draft) -> tuple[torch.Tensor, torch.Tensor]:
        """Free and fill slots, hand out pages, accept last round's paths.

        Returns source and target cache slots (int64 [M] each) of the rows that have to move.
        """
        for slot in draft.released_slots:
            del self._states[slot]
            self.tables.clear(slot)
        for start in draft.starts:
            assert start.slot not in self._states
            confinement = Confinement(start.sampling, self._grammars) if start.sampling.is_confined else None
            self._states[start.slot] = SlotState(start.sampling, start.prompt_length, confinement)
            self._context_lens[start.slot] = start.num_shared_tokens
            self._wants_logprobs[start.slot] = start.sampling.logprobs
            self._needs_children[start.slot] = start.needs.child_logprobs
            self._needs_entropy[start.slot] = start.needs.entropy
        sources, targets = self._accept(draft.steps)
        self._append_pages(draft.steps)
        return torch.from_numpy(sources), torch.from_numpy(targets)

    def rows(self, steps: Steps) -> TreeRows:
        """The steps' nodes as rows of a forward, written behind the committed ones."""
        slots_of_rows = steps.slots.repeat(steps.num_nodes)
        context_lens = self._context_lens[steps.slots]
        kv_rows = self.tables.kv_rows(slots_of_rows, context_lens.repeat(steps.num_nodes) + steps.places)
        self._row_tokens[kv_rows] = steps.tokens
        parents = steps.parents + starts_of(steps.num_nodes).repeat(steps.num_nodes)
        ancestors = ancestor_masks(parents, steps.places, num_mask_words(steps.num_nodes))
        return TreeRows(
            slots=steps.slots,
            context_lens=context_lens,
            tree_lens=steps.num_nodes,
            query_lens=steps.num_nodes,
            tokens=steps.tokens,
            tree_rows=steps.places,
            depths=depths_of(ancestors),
            ancestors=ancestors,
        )

    def sampled(self, steps: Steps, rows: TreeRows) -> list[SampledRows]:
        """What the laws of the sampled nodes depend on besides the logits, of each step that has any."""
        positions = (rows.context_lens + 1).repeat(rows.query_lens) + rows.depths
        groups, end = [], 0
        segments = zip(
            steps.slots.tolist(), steps.num_nodes.tolist(), steps.num_sampled.tolist(), strict=True
        )
        for b, (slot, num_nodes, num_sampled) in enumerate(segments):
            start, end = end, end + num_nodes
            if num_sampled:
                state = self._states[slot]
                paths = self._paths(state, steps, b, start) if state.sampling.follows_text else ()
                allowed = state.confinement.words(paths) if state.confinement else NO_WORDS
                groups.append(
                    SampledRows(
                        state.sampling, positions[end - num_sampled : end], state.penalties, paths, allowed
                    )
                )
        return groups

    def follow_texts(self, steps: Steps) -> bool:
        """Whether the law of any sampled node depends on the tokens before it."""
        slots = steps.slots[steps.num_sampled > 0].tolist()
        return any(self._states[slot].sampling.follows_text for slot in slots)

    def asking(self, steps: Steps) -> npt.NDArray[np.bool_]:
        """Which of the sampled nodes belong to sequences that ask for log-probabilities, bool [M]."""
        return self._wants_logprobs[steps.slots].repeat(steps.num_sampled)

    def questions(self, steps: Steps) -> LawQuestions:
        """What the rules of the sequences need of the laws; rows are counted among the sampled nodes."""
        about_children = self._needs_children[steps.slots]
        about_entropies = self._needs_entropy[steps.slots]
        if not np.count_nonzero(about_children) and not np.count_nonzero(about_entropies):
            return NO_QUESTIONS
        per_node = partial(np.repeat, repeats=steps.num_nodes)
        drafted = np.flatnonzero((steps.places > per_node(steps.first_sampled)) & per_node(about_children))
        parents = steps.parents + per_node(starts_of(steps.num_nodes))
        return LawQuestions(
            rows=np.searchsorted(steps.sampled_rows, parents[drafted]),
            tokens=steps.tokens[drafted],
            entropy_rows=np.flatnonzero(np.repeat(about_entropies, steps.num_sampled)),
        )

    def _accept(self, steps: Steps) -> tuple[Int64Array, Int64Array]:
        slots = steps.slots.repeat(steps.num_accepted)
        context_lens = self._context_lens[slots]
        sources = self.tables.kv_rows(slots, context_lens + steps.accepted)
        targets = self.tables.kv_rows(slots, context_lens + places_in(steps.num_accepted))
        self._row_tokens[targets] = self._row_tokens[sources]
        self._context_lens[steps.slots] += steps.num_accepted
        moving = sources != targets
        return sources[moving], targets[moving]

    def _append_pages(self, steps: Steps) -> None:
        end = 0
        for slot, count in zip(steps.slots.tolist(), steps.num_new_pages.tolist(), strict=True):
            if count:
                self.tables.append(slot, steps.new_pages[end : end + count])
                end += count

    def _tokens(self, slot: int, first: int, end: int) -> list[int]:
        """Tokens of a sequence whose rows are computed or about to be."""
        rows = np.arange(first, end)
        tokens: list[int] = self._row_tokens[self.tables.kv_rows(np.full(len(rows), slot), rows)].tolist()
        return tokens

    def _paths(self, state: SlotState, steps: Steps, b: int, start: int) -> list[tuple[int, ...]]:
        """Output tokens before each sampled node of a step that the state does not know; it learns committed ones.

        The chain completes the prompt, wherever its chunks end. `start`: where the step's nodes begin.
        """
        slot, first = int(steps.slots[b]), int(steps.first_sampled[b])
        context_len = int(self._context_lens[slot])
        if state.num_counted == 0:
            if state.sampling.uses_context:
                state.penalties = PenaltyState(self._tokens(slot, 0, state.prompt_length))
            state.num_counted = state.prompt_length
        known = self._tokens(slot, state.num_counted, context_len + first + 1)
        num_committed = max(0, context_len - state.num_counted)
        for token in known[:num_committed]:
            state.penalties.add(token)
        if state.confinement:
            state.confinement.advance(known[:num_committed])
        state.num_counted += num_committed
        paths = {first: tuple(known[num_committed:])}
        nodes = slice(start + first + 1, start + int(steps.num_nodes[b]))
        tokens, parents = steps.tokens[nodes].tolist(), steps.parents[nodes].tolist()
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True), first + 1):
            paths[node] = (*paths[parent], token)
        return list(paths.values())
