// How tree_attention's work is shared out: a function of the batch on the device, so that a captured graph, which
// was planned for the largest batch, launches blocks for the one that is there. Every block of tree_attention and
// every row of merge_splits computes it anew, with the same result.
//
// A unit is a tile of score rows of one request and KV head. The keys of a unit come in tiles, too, and are split so
// that about `wave` blocks have something to do and none has more than its share; see `tiles_per_split`.
#pragma once
#include "device.cuh"

constexpr int TILE_KEYS = 64;  // KEYS_PER_TILE in tree_attention.py

struct BatchWork {
  const int *query_indptr, *context_lens, *tree_lens;
  int num_requests, heads_per_kv, num_kv_heads, window;
  int tile_rows;                          // of tree_attention
  int wave, min_split_tiles, max_splits;  // chosen in tree_attention.py
};

// What a block or a row has to do with: a request (-1: nothing), how its keys are split, the block's number among
// those of the request, and the first slot of partial results that the request has where it is split.
struct Place {
  int request, num_splits, block, first_slot;
};

DEVICE int first_key_of(const BatchWork& work, int request) {
  return work.window > 0 ? max(0, work.context_lens[request] - work.window + 1) : 0;
}
DEVICE int num_row_tiles(const BatchWork& work, int request) {
  const int num_nodes = work.query_indptr[request + 1] - work.query_indptr[request];
  return (num_nodes * work.heads_per_kv + work.tile_rows - 1) / work.tile_rows;
}
DEVICE int num_key_tiles(const BatchWork& work, int request) {
  const int num_keys = work.context_lens[request] + work.tree_lens[request];
  return (num_keys + TILE_KEYS - 1) / TILE_KEYS - first_key_of(work, request) / TILE_KEYS;
}

DEVICE int ceil_div(u32 a, u32 b) { return a / b + (a % b != 0u); }

// Key tiles of a split at most, over all requests: the fewest with which the blocks are not more than a wave. With U
// units of n_u key tiles, C tiles a split make sum ceil(n_u / C) blocks, which is at least sum n_u / C and at most U
// more. So C lies between sum n_u / wave and sum n_u / (wave - U); a few halvings come close enough. Where units alone
// come near a wave, half of one is for splits: only requests much longer than the mean get some.
DEVICE int tiles_per_split(const BatchWork& work) {
  const int lane = threadIdx.x & 31;
  int num_units = 0;
  i64 num_tiles = 0;
  for (int request = lane; request < work.num_requests; request += 32) {
    int units = num_row_tiles(work, request) * work.num_kv_heads;
    num_units += units;
    num_tiles += (i64)units * num_key_tiles(work, request);
  }
  for (int step = 16; step > 0; step >>= 1) {
    num_units += __shfl_xor_sync(ALL_LANES, num_units, step);
    num_tiles += __shfl_xor_sync(ALL_LANES, num_tiles, step);
  }
  const u32 tiles = num_tiles < 0x7fffffff ? (u32)num_tiles : 0x7fffffffu;  // more than that is never split
  int low = max(ceil_div(tiles, work.wave), work.min_split_tiles);
  int high = max(ceil_div(tiles, max(max(work.wave - num_units, work.wave / 2), 1)), work.min_split_tiles);
  for (int halving = 0; halving < 3 && low < high; halving++) {
    const int middle = (low + high) / 2;
    int blocks = 0;
    for (int request = lane; request < work.num_requests; request += 32)
      blocks += num_row_tiles(work, request) * work.num_kv_heads * ceil_div(num_key_tiles(work, request), middle);
    for (int step = 16; step > 0; step >>= 1) blocks += __shfl_xor_sync(ALL_LANES, blocks, step);
    if (blocks <= work.wave) high = middle;
    else low = middle + 1;
  }
  return high;
}

DEVICE int num_splits_of(const BatchWork& work, int request, int split_tiles) {
  return min(max(ceil_div(num_key_tiles(work, request), split_tiles), 1), work.max_splits);
}

// Finds the first request of which `reached(request, blocks up to its last)` is true; it must stay true behind it.
template <typename Reached>
DEVICE Place place_of(const BatchWork& work, Reached reached) {
  const int lane = threadIdx.x & 31, split_tiles = tiles_per_split(work);
  int blocks_before = 0, slots_before = 0;
  for (int first = 0; first < work.num_requests; first += 32) {
    const int request = min(first + lane, work.num_requests - 1);
    const int num_splits = num_splits_of(work, request, split_tiles);
    const bool real = first + lane < work.num_requests;
    const int blocks = real ? num_row_tiles(work, request) * work.num_kv_heads * num_splits : 0;
    const int slots = num_splits > 1 ? blocks : 0;
    int blocks_to = blocks, slots_to = slots;  // of this lane's request and those of the lanes before
    for (int step = 1; step < 32; step <<= 1) {
      int more_blocks = __shfl_up_sync(ALL_LANES, blocks_to, step), more_slots = __shfl_up_sync(ALL_LANES, slots_to, step);
      if (lane >= step) { blocks_to += more_blocks; slots_to += more_slots; }
    }
    const u32 found = __ballot_sync(ALL_LANES, reached(request, blocks_before + blocks_to));
    if (found != 0u) {
      const int finder = 32 - __popc(found);
      return {first + finder, __shfl_sync(ALL_LANES, num_splits, finder),
              __shfl_sync(ALL_LANES, blocks_before + blocks_to - blocks, finder),
              __shfl_sync(ALL_LANES, slots_before + slots_to - slots, finder)};
    }
    blocks_before += __shfl_sync(ALL_LANES, blocks_to, 31);
    slots_before += __shfl_sync(ALL_LANES, slots_to, 31);
  }
  return {-1, 1, 0, 0};
}

// Of a block of tree_attention; none for surplus blocks. Blocks of a request: row tiles next to each other, which read
// the same keys, then KV heads, then splits.
DEVICE Place place_of_block(const BatchWork& work, int block) {
  Place place = place_of(work, [&](int request, int blocks_to) { return block < blocks_to; });
  place.block = block - place.block;
  return place;
}

// Of a query; none for padding behind the last request.
DEVICE Place place_of_query(const BatchWork& work, int query) {
  return place_of(work, [&](int request, int blocks_to) { return query < work.query_indptr[request + 1]; });
}
