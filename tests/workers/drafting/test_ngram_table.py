"""The table in arrays finds what a few plain lines find that search each text from its end."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.configs.schema import NgramConfig
from outrider.workers.drafting.ngram_table import NgramTable

TWO = NgramConfig(min_match=2, max_match=4, max_candidates=2)
OCCURRENCES = 16  # looked at, the last tokens themselves included where they are text
Found = list[tuple[int, list[int]]]
Node = tuple[int, list[int], int]  # slot, draft tokens on its path, tokens wanted


def searched(text: list[int], path: list[int], max_length: int, config: NgramConfig) -> Found:
    """(match length, tokens that followed) of earlier occurrences of the last tokens, the longest match first."""
    whole, width = text + path, config.min_match
    if len(whole) < width or max_length < 1:
        return []
    ends = [e for e in range(width, len(text) + 1) if text[e - width : e] == whole[-width:]][-OCCURRENCES:]
    ranked = []
    for end in ends:
        match = 0
        while match < min(config.max_match, end) and text[end - 1 - match] == whole[-1 - match]:
            match += 1
        if end < len(whole):
            ranked.append((match, end))
    found: Found = []
    for match, end in sorted(ranked, reverse=True):
        period = text[end : end + max_length] + path
        follow = [period[i % len(period)] for i in range(max_length)]
        if all(follow != other for _, other in found):
            found.append((match, follow))
    return found[: config.max_candidates]


def looked_up(table: NgramTable, texts: dict[int, list[int]], nodes: list[Node], width: int) -> list[Found]:
    """What the table finds for all nodes at once; their tails have `width` places."""
    tails, lengths = np.full((len(nodes), width), 777), np.zeros(len(nodes), np.int64)
    for row, (slot, path, _) in enumerate(nodes):
        tail = (texts[slot] + path)[-width:]
        lengths[row] = len(tail)
        tails[row, width - len(tail) :] = tail
    found = table.look_up(
        np.array([slot for slot, _, _ in nodes]),
        tails,
        lengths,
        np.array([len(path) for _, path, _ in nodes]),
        np.array([wanted for _, _, wanted in nodes]),
    )
    result = []
    for row, (_, _, wanted) in enumerate(nodes):
        assert (found.tokens[row, :, wanted:] == -1).all()
        pairs = zip(found.match_lengths[row].tolist(), found.tokens[row, :, :wanted].tolist(), strict=True)
        result.append([(match, follow) for match, follow in pairs if match])
    return result


def table_of(texts: dict[int, list[int]], config: NgramConfig) -> NgramTable:
    table = NgramTable(config, max(texts) + 1)
    for slot, text in texts.items():
        table.start(slot, np.array(text, np.int64))
    return table


@pytest.mark.parametrize(
    ("text", "path", "max_length", "found"),
    [
        #  1 2 | 3 4 5 6 ... 1 2 | ?
        ([1, 2, 3, 4, 5, 6, 1, 2], [], 4, [(2, [3, 4, 5, 6])]),
        ([1, 2, 3, 2], [], 4, []),  # one token alone is too short a match
        ([], [], 4, []),
        ([1, 2], [], 4, []),
        #  9 1 2 | 3 3 3 ... 1 2 | 4 4 4 ... 9 1 2 | ?
        ([9, 1, 2, 3, 3, 3, 8, 1, 2, 4, 4, 4, 7, 9, 1, 2], [], 3, [(3, [3, 3, 3]), (2, [4, 4, 4])]),
        ([1, 2, 3, 8, 1, 2, 4, 9, 1, 2], [], 1, [(2, [4]), (2, [3])]),  # the most recent first
        ([1, 2, 3, 8, 1, 2, 3, 9, 1, 2], [], 1, [(2, [3])]),  # equal continuations are one
        ([1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6], [], 2, [(4, [7, 0])]),  # max_match tokens count
        ([7, 1, 1, 1], [], 4, [(2, [1, 1, 1, 1])]),  # a match that overlaps the end goes round
        ([1, 2, 3, 4, 5, 1], [2, 3], 2, [(3, [4, 5])]),  # a match that reaches from the path into the text
        ([4, 1, 2], [3, 1, 2], 5, [(2, [3, 1, 2, 3, 1])]),  # round through the path
    ],
)
def test_literal_texts(text: list[int], path: list[int], max_length: int, found: Found) -> None:
    assert looked_up(table_of({0: text}, TWO), {0: text}, [(0, path, max_length)], 4) == [found]
    assert searched(text, path, max_length, TWO) == found


CONFIGS = st.builds(
    lambda low, more, count: NgramConfig(low, low + more, count),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(1, 4),
)


@given(CONFIGS, st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 90))
def test_many_nodes_of_growing_texts_find_what_a_search_finds(
    config: NgramConfig, rng: random.Random, vocab_size: int, longest: int
) -> None:
    def some(at_most: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(0, at_most))]

    texts = {slot: some(longest) for slot in (0, 2, 3)}
    table = table_of(texts, config)
    for _ in range(3):
        grown = {slot: some(longest if rng.random() < 0.2 else 4) for slot in (3, 0)}
        table.extend(
            np.array(list(grown)),
            np.array([len(new) for new in grown.values()]),
            np.array([token for new in grown.values() for token in new], np.int64),
        )
        for slot, new in grown.items():
            texts[slot] += new
        table.finish(2)  # a shorter or longer text takes its place
        texts[2] = some(longest)
        table.start(2, np.array(texts[2], np.int64))
        nodes = [(rng.choice([0, 2, 3]), some(5), rng.randint(0, 5)) for _ in range(20)]
        expected = [searched(texts[slot], path, wanted, config) for slot, path, wanted in nodes]
        assert looked_up(table, texts, nodes, max(config.max_match, 5)) == expected


def test_thousands_of_different_tokens_share_a_table_that_grew() -> None:
    rng = random.Random(0)
    config = NgramConfig(min_match=1, max_match=3, max_candidates=2)
    texts = {slot: [rng.randrange(3000) for _ in range(5000)] for slot in range(2)}
    table = NgramTable(config, 2)
    for slot, text in texts.items():
        table.start(slot, np.array(text[:10]))
    for begin in range(10, 5000, 499):
        parts = [text[begin : begin + 499] for text in texts.values()]
        table.extend(np.arange(2), np.array([len(part) for part in parts]), np.concatenate(parts))
    nodes = [(slot, texts[slot][at - 1 : at + 1], 3) for slot in range(2) for at in range(50, 5000, 50)]
    found = looked_up(table, texts, nodes, 3)
    assert found == [searched(texts[slot], path, wanted, config) for slot, path, wanted in nodes]
    assert all(found)


def test_slots_without_a_text_find_nothing() -> None:
    table = table_of({1: [1, 1, 1]}, TWO)
    table.finish(1)
    table.finish(0)  # never started
    assert looked_up(table, {0: [1, 1, 1], 1: [1, 1, 1]}, [(0, [], 2), (1, [], 2)], 4) == [[], []]


def test_a_long_text_takes_two_megabytes_and_leaves_them_to_the_next() -> None:
    rng = np.random.default_rng(0)
    table = NgramTable(NgramConfig(), 2)
    for slot in (0, 1, 0):
        table.start(slot, rng.integers(0, 150_000, 131_072))
        table.finish(slot)
    assert table.num_bytes < 2.1e6
