"""The sampler's noise as plain numbers, for whoever recomputes a choice outside a worker."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outrider.kernels.noise import gumbel


def token_noise(seed: int, position: int, tokens: Sequence[int]) -> list[float]:
    """G(seed, position, token) of each token: what the sampler adds to its log-probability.

    position: index in the sequence of the token being sampled.
    """
    return gumbel(seed, position, torch.tensor(list(tokens), dtype=torch.int64)).tolist()
