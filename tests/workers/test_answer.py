from dataclasses import fields

import pytest

from outrider.workers.answer import PER_TOKEN, Completion, Output, output_fields
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.sequence import RequestStats, TokenEvent


def test_what_a_worker_says_of_a_request_is_what_every_output_says() -> None:
    """A field that is added to one of them alone would be lost on its way."""
    assert {entry.name for entry in fields(TokenEvent)} == {
        "request_id",
        *(entry.name for entry in fields(Output)),
    }
    event = TokenEvent("a", (5, 6), (Origin.TARGET, Origin.DRAFT), (), "stop", "", RequestStats(num_rounds=1))
    assert Output(**output_fields(event)) == Output(
        tokens=(5, 6),
        origins=(Origin.TARGET, Origin.DRAFT),
        finish_reason="stop",
        stats=RequestStats(num_rounds=1),
    )
    assert set(PER_TOKEN) <= set(output_fields(event))


def test_decoding_is_what_comes_after_the_first_tokens() -> None:
    answer = Completion(
        tokens=(1, 2, 3, 4, 5), token_times_s=(2.0, 2.0, 2.5, 2.5, 4.0), stats=RequestStats(num_rounds=2)
    )
    assert (answer.num_decoded, answer.decode_s) == (3, 2.0)
    assert answer.tokens_per_s == pytest.approx(1.5)
    assert answer.acceptance_length == 2.5


@pytest.mark.parametrize("times", [(), (2.0, 2.0)], ids=["nothing", "all at once"])
def test_an_answer_without_decoding_has_no_speed(times: tuple[float, ...]) -> None:
    answer = Completion(tokens=(1,) * len(times), token_times_s=times)
    assert (answer.tokens_per_s, answer.acceptance_length) == (0.0, 0.0)
