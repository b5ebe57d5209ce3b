"""The draft model's rows: after any history of verdicts they are what a fresh forward over the same path gives."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from outrider.workers.sequences.params import SamplingParams
from support.drafted import GREEDY, answer, node_at, paths_of
from support.drafting_model import VOCAB, Drafting, fresh_logits


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("page_size", "num_pages"), [(4, 150), (1, 600), (16, 40), (4, 34)], ids=["4", "1", "16", "scarce"]
)
def test_rows_are_those_of_a_fresh_forward_after_any_history(
    seed: int, page_size: int, num_pages: int
) -> None:
    rng = random.Random(seed)
    drafting = Drafting(num_pages, page_size, rows_per_sequence=rng.choice([1, 3, 6]))
    stems = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(2)]

    def newcomer() -> None:
        prompt = rng.choice(stems)[: rng.randint(1, 60)] + [rng.randrange(VOCAB) for _ in range(3)]
        methods = rng.choice([("model",), ("ngram", "model"), ("ngram",), ("ngram", "model")])
        drafting.start(prompt, replace(GREEDY, temperature=rng.choice([0.0, 0.8])), methods)

    newcomer()
    for _ in range(15):
        if len(drafting.running) < 4 and rng.random() < 0.3:
            newcomer()
        slots = np.array(drafting.running)
        drafting.engine.look_up(slots)
        for _ in range(rng.randint(0, 3)):
            drafting.step()
        limits = np.array([rng.randint(0, 8) for _ in slots])
        offers = drafting.trees.offers(slots, np.full(len(slots), 4), limits)
        sent = drafting.trees.cut(slots, offers, (offers.values > 0.0).sum(axis=1))
        drafting.engine.read(drafting.model, slots)
        for _ in range(rng.randint(0, 2)):
            drafting.step()  # ahead of the verdict
        said = [
            {
                node: rng.choice(drafting.children(slot, node) or [5])
                for node in sent.growing_nodes[row, : sent.counts[row]].tolist()
                if rng.random() < 0.8
            }
            for row, slot in enumerate(drafting.running)
        ]
        answer(drafting.engine, drafting.running, sent, said)
        if len(slots) > 1 and rng.random() < 0.15:
            drafting.finish(rng.choice(drafting.running))
    assert drafting.num_rows_checked > (10 if num_pages == 34 else 15)
    assert drafting.forward.num_calls > 10
    for slot in list(drafting.running):
        drafting.finish(slot)
    assert drafting.pool.num_available == num_pages


def test_a_step_expands_the_root_first() -> None:
    drafting = Drafting()
    drafting.start([3, 1, 4, 1, 5])
    assert drafting.step()
    assert drafting.children(0) == fresh_logits([[3, 1, 4, 1, 5]])[0].topk(3).indices.tolist()


def test_what_survives_a_verdict_is_not_computed_again() -> None:
    drafting = Drafting()
    drafting.start([3, 1, 4, 1, 5])
    for _ in range(3):
        drafting.step()
    first = drafting.children(0)[0]
    below = drafting.children(0, node_at(drafting.trees, 0, [first]))
    assert below  # the likeliest child has been expanded
    assert drafting.verdict(0, [], {0: first}) == [first]
    assert drafting.children(0) == below
    drafting.step()
    assert all(row.paths[0] for _, row in drafting.sampler.proposed)  # the new root was not among them


def test_tokens_that_were_not_proposed_are_read_with_the_next_step() -> None:
    drafting = Drafting()
    drafting.start([3, 1, 4, 1, 5])
    drafting.step()
    unlikely = next(token for token in range(VOCAB) if token not in drafting.children(0))
    drafting.verdict(0, [], {0: unlikely})
    assert paths_of(drafting.trees, 0) == []
    assert drafting.step()  # compares with a fresh forward
    assert drafting.children(0)


def test_a_long_prompt_is_read_in_chunks_before_it_is_drafted() -> None:
    drafting = Drafting()
    drafting.start([7, 8, 9])
    drafting.start(list(range(1, 90)))
    both = np.array([0, 1])
    assert not drafting.step(1)
    for missing in (88, 64, 40):
        assert drafting.engine.unread(drafting.model, both).tolist() == [missing]
        before = drafting.pool.num_available
        assert drafting.engine.read(drafting.model, both) == 24
        assert before - drafting.pool.num_available == 24 // 4
    assert drafting.engine.unread(drafting.model, both).tolist() == []
    assert drafting.engine.read(drafting.model, both) == 0
    assert drafting.step(1)  # the other 16 come along


def test_a_chunk_is_shared_between_those_that_lag() -> None:
    drafting = Drafting(num_pages=99)
    for first in (0, 50, 20):
        drafting.start([first, *range(1, 41)])
    reads = [drafting.engine.read(drafting.model, np.array([2, 0, 1])) for _ in range(4)]
    # 40 tokens are missing of each; once fewer than 32 are, a step reads them.
    assert reads == [24, 24, 24, 0]
    assert drafting.step()
    assert {row.params.seed for _, row in drafting.sampler.proposed} == {0, 1, 2}


def test_prompts_that_begin_alike_share_pages() -> None:
    drafting = Drafting()
    drafting.start(list(range(1, 30)))
    drafting.step()
    before = drafting.pool.num_available
    drafting.start([*range(1, 25), 90, 91])
    assert drafting.pool.num_available == before
    drafting.step(1)
    assert before - drafting.pool.num_available <= 2  # 24 of 26 tokens were there
    drafting.finish(0)
    for _ in range(3):
        drafting.step(1)


def test_without_pages_nothing_is_proposed_and_nothing_fails() -> None:
    drafting = Drafting(num_pages=3, page_size=4)
    drafting.start([3, 1, 4, 1, 5, 9, 2])
    assert drafting.step(0)
    drafting.start([2, 7, 1, 8, 2])
    assert not drafting.step(1)
    assert paths_of(drafting.trees, 1) == []
    assert drafting.verdict(1, [], {0: 7}) == [7]
    drafting.start(list(range(50)))
    long = np.array([2])
    assert drafting.engine.read(drafting.model, long) == 0
    assert drafting.engine.forecasts(long) == []
    assert drafting.engine.unread(drafting.model, long).tolist() == [49]  # all but the root
    assert drafting.survival(2, []) == 0.0
    drafting.finish(0)
    assert drafting.step(1)  # there is room again


def test_a_step_for_many_does_what_there_is_room_for() -> None:
    drafting = Drafting(num_pages=3, page_size=4, max_rows=2)
    for first in (1, 11, 21):
        drafting.start([first, first + 1])
    assert drafting.step()
    assert sorted(len(paths_of(drafting.trees, slot)) for slot in range(3)) == [0, 3, 3]


def test_nothing_is_drafted_that_could_not_be_used() -> None:
    drafting = Drafting()
    drafting.start([3, 1, 4], replace(GREEDY, max_tokens=1))
    assert drafting.engine.forecasts(np.array([0])) == []
    assert not drafting.step(0)  # the target's own token will be the last one
    drafting.start([3, 1, 4], replace(GREEDY, max_tokens=3))
    while drafting.step(1):
        pass
    assert max(len(path) for path in paths_of(drafting.trees, 1)) == 2


def test_the_tree_grows_no_deeper_than_this_round_and_the_next_can_use() -> None:
    drafting = Drafting(num_pages=400)
    drafting.start([3, 1, 4], max_depth=2)
    while drafting.step():
        pass
    assert 2 < max(len(path) for path in paths_of(drafting.trees, 0)) <= 2 * 2 + 1
    assert drafting.engine.forecasts(np.array([0])) == []


def test_no_node_is_expanded_whose_children_do_not_fit() -> None:
    drafting = Drafting(num_pages=400, rows_per_sequence=6)
    drafting.start([3, 1, 4], max_depth=40)
    drafting.model._yields[:] = 0.9  # everything promises much
    while drafting.step():
        drafting.model._yields[:] = 0.9
    assert drafting.trees.capacity - 3 < drafting.trees.num_nodes[0] <= drafting.trees.capacity
    expanded = {tuple(path[:-1]) for path in paths_of(drafting.trees, 0)}
    assert drafting.num_rows_checked == len(expanded)
    assert len(paths_of(drafting.trees, 0)) == 3 * len(expanded)
    # A verdict makes room, and what is left goes on growing.
    drafting.verdict(0, [], {0: drafting.children(0)[0]})
    drafting.model._yields[:] = 0.9
    assert drafting.step()


def test_a_node_that_had_all_its_proposals_before_is_expanded_once() -> None:
    drafting = Drafting(max_children=1, rows_per_sequence=1)
    drafting.start([3, 1, 4])
    best = int(fresh_logits([[3, 1, 4]])[0].argmax())
    # Surer than the model is, and yet the model promises more.
    drafting.trees.add_children(*(np.array([value]) for value in (0, 0, best, 0.4, 0)))
    assert drafting.step()
    assert paths_of(drafting.trees, 0) == [[best]]
    drafting.step()
    assert [row.paths[0] for _, row in drafting.sampler.proposed] == [[best]]


def test_ids_of_a_padded_vocabulary_are_not_proposed() -> None:
    every, half = Drafting(), Drafting(num_target_tokens=VOCAB // 2)
    for slot, prompt in enumerate(([3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8])):
        for drafting in (every, half):
            drafting.start(prompt)
            drafting.step(slot)
        assert half.children(slot) == [token for token in every.children(slot) if token < VOCAB // 2]


def test_tokens_that_the_request_excludes_are_not_proposed() -> None:
    drafting = Drafting()
    drafting.start([3, 1, 4], SamplingParams(temperature=0.8, top_k=2, max_tokens=100))
    drafting.step()
    assert len(drafting.children(0)) == 2


def test_the_first_proposal_is_what_the_target_would_sample_with_these_logits() -> None:
    # Same noise, same penalties: a drafter that equals its target is always right, at any temperature.
    drafting = Drafting()
    drafting.start([9, 9])
    drafting.finish(0)
    drafting.start(
        [3, 1, 4, 1, 5], SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.3, max_tokens=1000)
    )
    for _ in range(12):
        for _ in range(3):
            drafting.step()
        for logits, row in drafting.sampler.proposed:
            with torch.inference_mode():
                (sampled,) = drafting.sampler.sample(logits[None], [row]).tokens.tolist()
            assert drafting.children(0, node_at(drafting.trees, 0, row.paths[0]))[0] == sampled
        drafting.verdict(0, [], {0: drafting.children(0)[0]})


def test_a_step_ahead_spares_one_only_below_what_is_verified_now() -> None:
    drafting = Drafting(rows_per_sequence=1)
    drafting.start([3, 1, 4, 1, 5])
    assert drafting.survival(0, []) == 0.0  # the root itself is with the target
    drafting.step()
    best = int(drafting.trees.values[0, 1:].argmax()) + 1
    assert drafting.survival(0, []) == drafting.trees.values[0, best]
    assert drafting.survival(0, [best]) == 0.0


def test_yields_follow_what_the_proposals_turned_out_to_be_worth() -> None:
    """One step over three roots: two greedy ones, and one that is sampled."""
    drafting = Drafting(max_rows=3)
    for temperature in (0.0, 0.0, 0.8):
        drafting.start([3, 1, len(drafting.running)], replace(GREEDY, temperature=temperature))
    first = 0.5 / 4.0 ** np.arange(3)
    assert (
        drafting.engine.root_gains(drafting.model, [drafting.engine.slots.sequence(0)]).tolist()
        == first.tolist()
    )
    assert drafting.step()
    worth = drafting.trees.acceptances[:3, 1:4]
    # The sampled kind moves a twentieth of the way; the greedy kind as if one came after the other.
    sampled = first + 0.05 * (worth[2] - first)
    greedy = first + (1.0 - 0.95**2) * (worth[:2].mean(axis=0) - first)
    assert drafting.model._yields[:2] == pytest.approx(np.stack([sampled, greedy]))
    assert (drafting.model._yields[2:] == first).all()  # under other rules nothing was seen


def test_ranks_that_the_request_excludes_teach_no_yield_and_what_a_padded_vocabulary_adds_does() -> None:
    drafting = Drafting()
    first = drafting.model._yields[0].copy()
    drafting.start([3, 1, 4], SamplingParams(temperature=0.8, top_k=1, max_tokens=100))
    drafting.step()
    assert drafting.model._yields[0, 0] != first[0]
    assert drafting.model._yields[0, 1:].tolist() == first[1:].tolist()
    padded = Drafting(num_target_tokens=1)
    padded.start([3, 1, 4])
    assert padded.step()
    assert padded.children(0) in ([], [0])
    assert padded.model._yields[1, 1:] == pytest.approx(0.95 * first[1:])


def test_measuring_a_step_leaves_nothing_behind() -> None:
    drafting = Drafting(num_pages=3)
    assert drafting.model.time_step(5) > 0.0
    assert drafting.model.time_step(50) > 0.0  # as many as there are pages for
    assert drafting.pool.num_available == 3
    drafting.start([3, 1, 4])
    assert drafting.step()
