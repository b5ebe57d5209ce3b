"""The mask of the training-time test, as a matrix written out by hand; the fast path against all scores laid out."""

import torch

from outrider.workers.training import unrolled_attention as module
from outrider.workers.training.unrolled_attention import attention_by_reference, unrolled_attention

# Four anchors in their third step. Columns: keys of step 0 of anchors 0..3, then of step 1, then of step 2.
MASK = """
1 . . .   1 . . .   1 . . .
1 1 . .   . 1 . .   . 1 . .
1 1 1 .   . . 1 .   . . 1 .
1 1 1 1   . . . 1   . . . 1
"""


def test_a_row_sees_the_context_of_its_anchor_and_the_anchors_own_steps() -> None:
    wanted = torch.tensor([[int(cell == "1") for cell in line.split()] for line in MASK.split("\n") if line])
    T, steps = 4, 3
    # With scores of zero the output is the mean of the values seen; each value is a column of its own.
    values = torch.eye(T * steps).view(1, 1, steps, T, T * steps).unbind(2)
    zeros = torch.zeros(1, 1, T, T * steps)
    for attention in (unrolled_attention, attention_by_reference):
        out = attention(zeros, [zeros] * steps, list(values), 1.0)[0, 0]
        assert torch.equal((out > 0).int(), wanted.int())
        torch.testing.assert_close(out, wanted / wanted.sum(1, keepdim=True))


# The same with a window of 3: a row in its third step lies two behind its anchor.
WINDOWED = """
1 . . .   1 . . .   1 . . .
. 1 . .   . 1 . .   . 1 . .
. . 1 .   . . 1 .   . . 1 .
. . . 1   . . . 1   . . . 1
"""
# And in its second step, with a window of 2, it sees its own output before, and no more of the context.
NARROW = """
. . . .   1 . . .   1 . . .
. . . .   . 1 . .   . 1 . .
. . . .   . . 1 .   . . 1 .
. . . .   . . . 1   . . . 1
"""


def test_a_window_counts_the_steps_behind_the_anchor() -> None:
    T, steps = 4, 3
    values = torch.eye(T * steps).view(1, 1, steps, T, T * steps).unbind(2)
    zeros = torch.zeros(1, 1, T, T * steps)
    for window, mask in ((3, WINDOWED), (2, NARROW), (6, MASK), (0, MASK)):
        wanted = torch.tensor([[int(c == "1") for c in line.split()] for line in mask.split("\n") if line])
        out = unrolled_attention(zeros, [zeros] * steps, list(values), 1.0, window)[0, 0]
        torch.testing.assert_close(out, wanted / wanted.sum(1, keepdim=True))
    first = unrolled_attention(zeros, [zeros], list(values[:1]), 1.0, 2)[0, 0]
    assert (first[:, :T] > 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_the_first_step_is_plainly_causal() -> None:
    values = torch.eye(3)[None, None]
    out = unrolled_attention(torch.zeros(1, 1, 3, 3), [torch.zeros(1, 1, 3, 3)], [values], 1.0)[0, 0]
    torch.testing.assert_close(out, torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_joined_softmax_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 2, 4):
        q, gradient, *rest = torch.randn(2 + 2 * steps, 2, 3, 9, 16, generator=generator).unbind(0)
        inputs = [x.clone().requires_grad_() for x in (q, *rest)]
        found = []
        for attention in (unrolled_attention, attention_by_reference):
            out = attention(inputs[0], inputs[1 : 1 + steps], inputs[1 + steps :], 0.25)
            found.append([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
        for fast, slow in zip(*found, strict=True):
            # float32, sums in another order. Seen: up to 7e-7.
            torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_the_fast_path_is_there() -> None:
    """Private operators of torch: a release without them would train slowly, and nobody would know why."""
    assert module._HAS_FLASH
