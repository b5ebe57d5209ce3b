"""What was expected of one H100 before anybody had run this on one: arithmetic, not measurement.

A round of a 70B in bfloat16 over seven ranks: one sequence of 33 nodes behind 1k tokens, many (32) sequences of 8
nodes behind 2k, and one behind 8k.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """Milliseconds: as the code is, and the least that the hardware allows; 0 where nobody has worked it out."""

    planned_ms: float = 0.0
    least_ms: float = 0.0


# Add with norm and SiLU with product in one launch each: three launches of 80 layers less, at 2.5 us each 0.6 ms.
UNKNOWN = Figure()
ONE = {
    "matrix products": Figure(8.0, 6.0),
    "attention": Figure(0.8, 0.2),
    "all-reduces": Figure(3.2, 1.5),
    "norms, adds, SiLU": Figure(1.2, 0.7),
    "host before the replay": Figure(0.5, 0.05),
    "sampling, greedy": Figure(0.4, 0.05),
    "sampling, top-p": Figure(3.7, 0.05),
}
MANY = {
    "matrix products": Figure(9.5, 7.0),
    "attention": Figure(2.4, 1.8),
    "all-reduces": Figure(8.0, 5.0),
    "norms, adds, SiLU": Figure(1.4, 0.7),
    "host before the replay": Figure(2.5, 0.05),
    "sampling, greedy": Figure(1.0, 0.1),
    "sampling, top-p": Figure(26.0, 0.1),
}
# Five or six tiles of 64 keys for each of 260 blocks, two on a multiprocessor, at a microsecond or two a tile; start
# and merge cost as much again. The rest of the round is that of `ONE`.
ONE_LONG = {**ONE, "attention": Figure(1.2, 0.2)}

# Tokens a round of part 12's drafters, as its full sizes gave on a CPU, in float32.
TOKENS_PER_ROUND = {
    "medusa": 2.66,
    "eagle3": 2.00,
    "mtp": 4.32,
    "parallel": 3.98,
    "all of them and ngram": 2.72,
    "typical acceptance, all": 3.50,
}

OUT_OF_REACH = (
    (
        "sums across ranks on several GPUs",
        f"needs two GPUs; planned {ONE['all-reduces'].planned_ms} ms a round of one sequence, "
        f"{MANY['all-reduces'].planned_ms} of many",
    ),
    ("peer-to-peer access and NVLink", "needs two GPUs"),
    ("death of a rank during a replay", "needs two GPUs; what should happen: docs/gpu.md"),
    ("overlap of target and drafter", "needs two GPUs; on one they take turns"),
)
