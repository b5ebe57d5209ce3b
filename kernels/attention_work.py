"""What the host chooses of tree_attention's work: tiles, and how many blocks are enough. What each block does is
worked out on the device, see `attention_work.cuh`."""

from dataclasses import dataclass

KEYS_PER_TILE = 64  # TILE_KEYS in attention_work.cuh
BLOCKS_PER_SM = {16: 2, 64: 2, 128: 1}  # as many as registers allow
# Long prompt chunks share keys among as many rows as they can; up to here small tiles waste less and overlap more.
MAX_ROWS_OF_64 = 2048
# A warp of merge_splits reads them one after the other. By what an H100 took for 8 rows behind 8k tokens
# (docs/gpu-report.md) a split costs a layer 0.34 us there, and a tile of keys 1.45 us in its block: 32 splits are
# better than 64 up to some 30k keys; further on blocks would have too many tiles. Neither was timed itself.
FEW_SPLITS, MANY_SPLITS = 32, 64
MAX_KEYS_OF_FEW_SPLITS = (32 << 10) + 512
MIN_KEYS_PER_SPLIT = 128


@dataclass(frozen=True)
class AttentionShape:
    """The choices of tree_attention that the host makes, from upper bounds: for a captured CUDA graph they are made
    once, for the capacity. How the keys are split is worked out on the device from the batch that is there
    (`attention_work.cuh`); surplus blocks return at once.

    Attributes:
        tile_rows: 16, 64 or 128 (node, head) pairs in a block.
        wave: blocks that keep the GPU busy: keys are split until there are about so many.
        min_split_tiles: tiles of `KEYS_PER_TILE` keys that are not divided.
        max_splits: of a request, see `FEW_SPLITS`.
        num_blocks: enough for every batch of these bounds.
        num_slots: tiles of partial results, enough as well; with 0 nothing may be split.
    """

    tile_rows: int
    wave: int
    min_split_tiles: int
    max_splits: int
    num_blocks: int
    num_slots: int


def attention_shape(
    max_query_len: int,
    max_keys: int,
    batch_size: int,
    num_queries: int,
    num_heads: int,
    num_kv_heads: int,
    num_sms: int,
) -> AttentionShape:
    """For batches of up to `batch_size` requests with `num_queries` queries in all."""
    rows = max_query_len * (num_heads // num_kv_heads)
    tile_rows = 16 if rows <= 16 else 64 if rows <= MAX_ROWS_OF_64 else 128
    bounds = (max_keys, batch_size, num_queries, num_heads, num_kv_heads)
    return shape_of_tiles(tile_rows, BLOCKS_PER_SM[tile_rows] * num_sms, MIN_KEYS_PER_SPLIT, *bounds)


def shape_of_tiles(
    tile_rows: int,
    wave: int,
    min_split_keys: int,
    max_keys: int,
    batch_size: int,
    num_queries: int,
    num_heads: int,
    num_kv_heads: int,
) -> AttentionShape:
    """With the tiles and the number of busy blocks given. The bounds are those of `tiles_per_split` on the device:
    with U units at most max(wave, wave / 2 + U) blocks, of which those of split requests are less than 2 * wave."""
    group = num_heads // num_kv_heads
    row_tiles = min(num_queries * -(-group // tile_rows), num_queries * group // tile_rows + batch_size)
    min_split_tiles = -(-min_split_keys // KEYS_PER_TILE)
    max_splits = FEW_SPLITS if max_keys <= MAX_KEYS_OF_FEW_SPLITS else MANY_SPLITS
    if max_keys <= min_split_tiles * KEYS_PER_TILE:
        return AttentionShape(tile_rows, wave, min_split_tiles, max_splits, row_tiles * num_kv_heads, 0)
    num_blocks = max(wave, wave // 2 + row_tiles * num_kv_heads)
    num_slots = min(num_blocks, 2 * wave)
    return AttentionShape(tile_rows, wave, min_split_tiles, max_splits, num_blocks, num_slots)
