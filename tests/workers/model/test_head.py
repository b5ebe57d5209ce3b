import pytest
import torch

from outrider.workers.model.head import Head, LinearHead, LowRankHead
from outrider.workers.model.linear import Linear, make_linear
from outrider.workers.sequences.vocabulary import Vocabulary, VocabularyRange, VocabularyTable

CPU = torch.device("cpu")


def test_a_vocabulary_is_a_range_or_a_table() -> None:
    asked = torch.tensor([[4, 9, 7], [0, 12, 9]])
    vocabularies: list[Vocabulary] = [VocabularyRange(7, 10), VocabularyTable([4, 9, 12], CPU)]
    for vocabulary, kept in zip(vocabularies, ([7, 8, 9], [4, 9, 12]), strict=True):
        assert len(vocabulary) == 3
        assert vocabulary.ids(torch.arange(3)).tolist() == kept
        columns, here = vocabulary.columns(asked)
        assert here.tolist() == [[token in kept for token in row] for row in asked.tolist()]
        assert torch.equal(vocabulary.ids(columns)[here], asked[here])
        assert columns[~here].tolist() == [0] * int((~here).sum())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trimmed_and_a_low_rank_head_are_heads(packed: bool, dtype: torch.dtype) -> None:
    """A trimmed one keeps some rows of the matrix, a low-rank one is a product of two; both, of some rows of one."""
    generator = torch.Generator().manual_seed(0)
    down, up, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 16), (30, 4), (5, 16)))
    matrix, kept = (up.float() @ down.float()).to(dtype), [2, 3, 11, 29]

    def linear(weight: torch.Tensor) -> Linear:
        return make_linear(weight, torch.empty(0), packed)

    table, every = VocabularyTable(kept, CPU), VocabularyRange(0, 30)
    expected = x.float() @ down.float().T @ up.float().T
    heads: list[Head] = [
        LinearHead(linear(matrix), every),
        LinearHead(linear(matrix[kept]), table),
        LowRankHead(linear(down), linear(up), every),
        LowRankHead(linear(down), linear(up[kept]), table),
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 0.03 * float(expected.abs().max())
    for head in heads:
        logits = head(x)
        assert logits.dtype == torch.float32
        ids = head.vocabulary.ids(torch.arange(len(head.vocabulary)))
        torch.testing.assert_close(logits, expected[:, ids], atol=tolerance, rtol=0)


def test_a_head_has_a_row_for_each_of_its_tokens() -> None:
    matrix = make_linear(torch.zeros(4, 16), torch.empty(0), packed=False)
    with pytest.raises(AssertionError, match="a row for each token"):
        LinearHead(matrix, VocabularyTable([3, 5], CPU))
    with pytest.raises(AssertionError, match="the same rank"):
        LowRankHead(matrix, matrix, VocabularyRange(0, 4))
