"""Which token is the label of which row at which step, on sequences written out; and what a server would compute."""

from dataclasses import replace

import torch

from outrider.configs.training import Eagle3Config
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.training.eagle3 import Eagle3Training, drafter_shape
from outrider.workers.training.feature_batch import FeatureBatch
from outrider.workers.training.losses import LOSSES, eager_loss
from outrider.workers.training.medusa1 import plan_heads
from outrider.workers.training.unrolled import plan_steps
from outrider.workers.training.vocabulary_loss import SoftTargets
from support.eagle3_reference import logits_along
from support.tensor_source import tiny_config

# Two texts back to back; capitals are labels.
TEXTS = ["abCDEF", "uvwXY"]
TOKENS = "".join(TEXTS)
IS_LABEL = torch.tensor([token.isupper() for token in TOKENS])


def test_rows_of_an_unrolled_drafter() -> None:
    """As in the picture at the top of unrolled.py: "anchor: token read -> token guessed"."""
    found = []
    for step in plan_steps([6, 5], IS_LABEL, 4):
        anchors = [index for index in range(len(TOKENS)) if TOKENS[index] not in "au"]
        guesses = {}
        for number, row in enumerate(step.rows.tolist()):
            read = int(step.read_tokens[number])
            place = (step.learned == number).nonzero()
            law = int(step.laws[place]) if len(place) else None
            assert law is None or law == read  # the law at the token read is that of the token after it
            guesses[TOKENS[anchors[row]]] = TOKENS[read] + (f"->{TOKENS[law + 1]}" if law is not None else "")
        found.append(guesses)
    assert found == [
        # Step 0 keeps rows that guess no label, too: others attend to them.
        {
            "b": "b->C", "C": "C->D", "D": "D->E", "E": "E->F", "F": "F",
            "v": "v", "w": "w->X", "X": "X->Y", "Y": "Y",
        },
        {"b": "C->D", "C": "D->E", "D": "E->F", "w": "X->Y"},
        {"b": "D->E", "C": "E->F"},
        {"b": "E->F"},
    ]  # fmt: skip


def test_positions_are_those_of_a_server() -> None:
    """The row of the token at position p has rotary position p - 1, k steps later p + k - 1."""
    steps = plan_steps([6, 5], IS_LABEL, 3)
    assert steps[0].positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert steps[1].positions.tolist() == [1, 2, 3, 2]  # b C D, w
    assert steps[2].positions.tolist() == [2, 3]  # b C
    assert steps[1].kept.tolist() == [0, 1, 2, 6]
    assert steps[2].kept.tolist() == [0, 1]


def test_rows_of_medusa_heads() -> None:
    found = [
        [f"{TOKENS[read]}->{TOKENS[label]}" for read, label in zip(*(x.tolist() for x in head), strict=True)]
        for head in plan_heads([6, 5], IS_LABEL, 4)
    ]
    # The token after the one read is the target's own, and has to be a label as well: nobody drafts inside a prompt.
    assert found == [["b->D", "C->E", "D->F", "w->Y"], ["b->E", "C->F"], ["b->F"], []]


def test_the_trainer_computes_what_a_server_computes() -> None:
    """Loss of the whole unrolled batch against losses of logits that were made text by text, row by row, by what the
    server's drafter is compared with as well (tests/e2e/test_eagle3_rows.py)."""
    torch.manual_seed(0)
    target = replace(tiny_config("llama", num_heads=4, num_kv_heads=2), vocab_size=40)
    hidden, ids = target.hidden_size, torch.arange(0, 40, 2)
    shape = drafter_shape(target, LmHeadShape(hidden, len(ids), 6), norm_before_residual=False)
    drafter = Eagle3Drafter(replace(shape, taps=(0, 1)), ids)
    embedding = torch.randn(40, hidden)
    config = Eagle3Config(unrolled_steps=3, step_decay=0.5)
    training = Eagle3Training(drafter, embedding, config, torch.float32)
    lengths, first_label = [7, 5], 3
    N = sum(lengths)
    columns = torch.rand(N, len(ids)).topk(4).indices
    batch = FeatureBatch(
        lengths=lengths,
        tokens=torch.randint(0, 40, (N,)),
        is_label=torch.cat([torch.arange(length) >= first_label for length in lengths]),
        taps=torch.randn(N, 2 * hidden),
        normed=torch.empty(N, 0),
        greedy=torch.where(torch.arange(N) % 4 == 1, 1, ids[columns[:, 0]]),  # 1 is no token of the head
        soft=SoftTargets(columns, torch.log_softmax(torch.randn(N, len(ids)), -1).topk(4).values),
    )
    totals = training.count_labels(batch)
    loss, counts = training(batch, totals, measure=True)

    sums, labels, right = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        tokens, taps = batch.tokens[part].tolist(), batch.taps[part]
        for context in range(first_label, length):
            path = tokens[context : min(context + 2, length - 1)]
            chain = logits_along(drafter, embedding, taps, tokens[:context], path)[context - 2 :]
            assert len(chain) == min(3, length - context)
            for step, logits in enumerate(chain.split(1)):
                at = start + context - 1 + step
                if batch.greedy[at] % 2 == 0:
                    soft = batch.soft.at(torch.tensor([at]))
                    sums[step] += eager_loss(
                        logits, soft.columns, soft.log_probs, torch.ones(1), LOSSES["kl"]
                    ).detach()
                    labels[step] += 1
                    right[step] += ids[logits.argmax()] == batch.greedy[at]
        start += length
    assert totals.tolist() == labels.tolist()
    torch.testing.assert_close(counts.sums[:, 2], sums, atol=1e-4, rtol=1e-4)
    assert counts.sums[:, 4].tolist() == right.tolist()
    torch.testing.assert_close(
        loss.detach(), (torch.tensor([1.0, 0.5, 0.25]) * sums / labels).sum(), atol=1e-4, rtol=1e-4
    )
