import torch

from outrider.workers.model.head import LinearHead
from outrider.workers.model.linear import make_linear
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


def test_a_trimmed_and_a_low_rank_head_are_heads() -> None:
    """A trimmed one keeps some rows of the matrix, a low-rank one is a product of two: neither needs a new class."""
    generator = torch.Generator().manual_seed(0)
    down, up, x = (torch.randn(shape, generator=generator) for shape in ((4, 16), (30, 4), (5, 16)))
    matrix, no_bias = up @ down, torch.empty(0)
    full = LinearHead(make_linear(matrix, no_bias, packed=False), VocabularyRange(0, 30))(x)
    kept = [2, 3, 11, 29]
    trimmed = LinearHead(make_linear(matrix[kept], no_bias, packed=False), VocabularyTable(kept, CPU))
    torch.testing.assert_close(trimmed(x), full[:, trimmed.vocabulary.ids(torch.arange(4))])

    class LowRank:
        in_features, out_features, pads = 16, 30, False
        parts = tuple(make_linear(weight, no_bias, packed=False) for weight in (down, up))

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts[1](self.parts[0](x))

    torch.testing.assert_close(LinearHead(LowRank(), VocabularyRange(0, 30))(x), full, atol=1e-4, rtol=1e-4)
