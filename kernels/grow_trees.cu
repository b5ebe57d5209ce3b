// Draft trees grow by a level without the host: behind `sample_shard`, which gave the best proposals below every row of
// a drafter's step, this kernel works out what each is worth and makes the rows of the next step of those that are
// worth most: of all that this drafting has proposed and not expanded. A block has a sequence.
#include "sampled.cuh"

struct Grown {  // of a sequence; GROWN in grow_trees.py
  Row row;           // what its rows ask, but for key and source
  u64 seed;          // of the noise
  float least_value; // below which a node is not worth a row
  int is_greedy;
  int first_row, num_rows;  // of the first step
  int context_len, num_known;  // rows that are committed; rows of the first step that belong to known tokens
  int tree_len;      // rows behind the committed ones when the first step is computed
  int max_depth;     // nodes at it are not expanded
  int most_rows;     // of all steps after the first
  int root_position; // of its token in the text
};

constexpr int NUM_RANKS = 5, NUM_EDGES = 8, NUM_KINDS = NUM_RANKS * (NUM_EDGES + 1);
constexpr float PRIOR_WEIGHT = 6.f, LEAST = 0.001f, MOST = 0.995f, MAX_LOGIT = 1e36f;

DEVICE int num_edges_up_to(float log_prob) {
  const float edges[NUM_EDGES] = {-5.f, -3.5f, -2.2f, -1.3f, -0.7f, -0.3f, -0.1f, -0.02f};
  int count = 0;
  for (int i = 0; i < NUM_EDGES; ++i) count += edges[i] <= log_prob;
  return count;
}

// log p of a winner of a row; -infinity where the law has removed it, or there is no law.
DEVICE float log_prob_of(const Winner& winner, const Sums& sums, float temperature) {
  if (!(fabsf(sums.maximum) <= MAX_LOGIT) || winner.score == NEGATIVE_INFINITY) return NEGATIVE_INFINITY;
  return (winner.logit - sums.maximum) / temperature - (float)log(sums.kept_sum);
}

// How likely the proposal of a rank is accepted, its parent being so; `first`: log p of the best proposal there.
// seen: of each kind [2]: how many were accepted, of how many.
DEVICE float acceptance(int rank, float log_prob, float first, bool is_greedy, const float* seen) {
  const float p = expf(fminf(log_prob, 0.f)), miss = 1.f - expf(fminf(first, 0.f));
  float prior;
  if (is_greedy) {
    const float first_miss = __fmul_rn(miss, sqrtf(miss));
    prior = rank == 0 ? 1.f - first_miss : fminf(p * (0.85f / rank), first_miss * exp2f(-(float)rank));
  } else {
    prior = rank == 0 ? 0.35f + 0.6f * p : fminf(0.35f, 0.02f + 0.8f * p) / rank;
  }
  const float* kind = seen + 2 * (min(rank, NUM_RANKS - 1) * (NUM_EDGES + 1) + NUM_EDGES - num_edges_up_to(log_prob));
  return fminf(fmaxf((PRIOR_WEIGHT * prior + kind[0]) / (kind[1] + PRIOR_WEIGHT), LEAST), MOST);
}

// `noise_key` of noise.py.
DEVICE u64 noise_key(u64 seed, int position) {
  u64 z = seed + 0x9e3779b97f4a7c15ull * (u64)(position + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// The largest of the block's numbers, for all threads. shared: [warps].
DEVICE u64 largest_over_block(u64 x, u64* shared) {
  for (int step = 16; step > 0; step >>= 1) {
    const u64 other = __shfl_xor_sync(ALL_LANES, x, step);
    x = other > x ? other : x;
  }
  __syncthreads();  // those before have been read
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = x;
  __syncthreads();
  for (int warp = 0; warp < (int)(blockDim.x >> 5); ++warp) x = shared[warp] > x ? shared[warp] : x;
  return x;
}

// Arrays over steps hold NUM_STEPS of them, one after the other, with `max_rows` rows each. A proposal's place is
// (step * max_rows + row) * num_best + rank.
//   header: [2]: sequences, rows that each has in a step after the first.
//   first_values, first_depths, first_masks: of the rows of the first step; the value of a known token's is 0.
//   num_done [*]: steps, and rows of steps after the first, that each sequence has had.
//   values: of every proposal that may be expanded, 0 of others; masks [.., mask_words], depths: of rows.
//   history: of each step [max_rows, num_best] columns and log p, [max_rows] the proposal that a row stands for.
//   The rest is the next step: its rows, what they read and write of the features, what sampling is asked of them.
KERNEL(128, 1)
grow_trees(const int* header, const Grown* sequences, const float* all_seen, const float* first_values,
           const int* first_depths, const u64* first_masks, const Sums* sums, const Winner* winners, const i64* table,
           const int* page_table, int* num_done, float* values, u64* masks, int* depths, int* history,
           float* row_values, i64* tokens, i64* positions, i64* kv_rows, u64* next_masks, int* next_depths,
           int* tree_lens, int* query_indptr, i64* reads, i64* writes, Row* rows, int is_first, int max_rows,
           int num_best, int num_steps, int mask_words, int page_size, int max_pages, i64 vocab_offset,
           i64 num_target_tokens, i64 first_feature, i64 nobodys_feature) {
  DYNAMIC_SHARED(shared);
  u64* of_warps = reinterpret_cast<u64*>(shared);            // [4]
  int* chosen = reinterpret_cast<int*>(of_warps + 4);        // [max_rows]
  float* worth = reinterpret_cast<float*>(chosen + max_rows);  // [max_rows]
  const int b = blockIdx.x, num_sequences = header[0], num_each = header[1];
  const int step = is_first || b >= num_sequences ? 0 : num_done[2 * b];
  const int num_before = is_first || b >= num_sequences ? 0 : num_done[2 * b + 1];
  if (b == 0) {
    if (threadIdx.x == 0) query_indptr[0] = 0;
    for (int r = num_sequences * num_each + threadIdx.x; r < max_rows; r += blockDim.x) {
      tokens[r] = positions[r] = 0;
      kv_rows[r] = -1;
      reads[r] = writes[r] = nobodys_feature;
      rows[r].source = -1;
      next_depths[r] = 0;
      row_values[r] = 0.f;
      for (int w = 0; w < mask_words; ++w) next_masks[(i64)r * mask_words + w] = 0;
    }
  }
  if (threadIdx.x == 0) {
    query_indptr[b + 1] = min(b + 1, num_sequences) * num_each;
    if (b >= num_sequences) tree_lens[b] = 0;
  }
  if (b >= num_sequences) return;

  const Grown grown = sequences[b];
  const float* seen = all_seen + (i64)b * 2 * NUM_KINDS;
  const float temperature = grown.row.temperature == 0.f ? 1.f : grown.row.temperature;
  const int begin = is_first ? grown.first_row : b * num_each, num_rows = is_first ? grown.num_rows : num_each;
  const i64 step_rows = (i64)step * max_rows;
  int* columns = history + step_rows * (2 * num_best + 1);
  float* log_probs = reinterpret_cast<float*>(columns + max_rows * num_best);
  for (int i = threadIdx.x; i < num_rows * num_best; i += blockDim.x) {
    const int r = begin + i / num_best, rank = i % num_best, at = r * num_best + rank;
    const float value = is_first ? first_values[r] : row_values[r];
    const int depth = is_first ? first_depths[r] : depths[step_rows + r];
    int column = -1;
    float log_prob = NEGATIVE_INFINITY, worth_of_it = 0.f;
    if (value > 0.f) {
      const Winner winner = winners[at];
      log_prob = log_prob_of(winner, sums[r], temperature);
      column = winner.column;
      const float first = log_prob_of(winners[r * num_best], sums[r], temperature);
      const i64 token = table ? table[column] : vocab_offset + column;
      const bool may_grow = log_prob > NEGATIVE_INFINITY && token < num_target_tokens && depth + 1 < grown.max_depth;
      if (may_grow) {
        worth_of_it = __fmul_rn(value, acceptance(rank, log_prob, first, grown.is_greedy, seen));
        if (!(worth_of_it > grown.least_value)) worth_of_it = 0.f;
      }
    }
    columns[at] = column;
    log_probs[at] = log_prob;
    values[step_rows * num_best + at] = worth_of_it;
  }
  if (is_first)
    for (int i = threadIdx.x; i < num_rows; i += blockDim.x) {
      depths[begin + i] = first_depths[begin + i];
      for (int w = 0; w < mask_words; ++w)
        masks[(i64)(begin + i) * mask_words + w] = first_masks[(i64)(begin + i) * mask_words + w];
    }
  __syncthreads();
  if (step + 1 == num_steps) return;

  // The best of what is left, one after the other; of equal ones that which was proposed first.
  const int num_first = grown.num_rows * num_best, num_later = num_each * num_best;
  const int num_proposals = num_first + step * num_later, num_wanted = min(num_each, grown.most_rows - num_before);
  int num_chosen = 0;
  for (int j = 0; j < num_each; ++j) {
    u64 best = 0;
    for (int i = threadIdx.x; j < num_wanted && i < num_proposals; i += blockDim.x) {
      const int later = i - num_first;
      const int place = later < 0 ? grown.first_row * num_best + i
                                  : ((later / num_later + 1) * max_rows + b * num_each) * num_best + later % num_later;
      const u64 packed = (u64)(u32)__float_as_int(values[place]) << 32 | (u32)~place;
      best = packed > best ? packed : best;
    }
    best = largest_over_block(best, of_warps);
    const float value = __int_as_float((int)(best >> 32));
    const int place = (int)~(u32)best;
    const bool is_there = value > 0.f;
    num_chosen += is_there;
    if (threadIdx.x == 0) {
      chosen[j] = is_there ? place : -1;
      worth[j] = is_there ? value : 0.f;
      if (is_there) values[place] = 0.f;
    }
    __syncthreads();
  }

  const i64 next_rows = step_rows + max_rows;
  int* stands_for = history + next_rows * (2 * num_best + 1) + 2 * max_rows * num_best;
  for (int j = threadIdx.x; j < num_each; j += blockDim.x) {
    const int r = b * num_each + j, place = chosen[j], tree_row = grown.tree_len + step * num_each + j;
    const int parent = place < 0 ? 0 : place / num_best;  // over all steps
    const int index = grown.context_len + tree_row;
    int depth = 0;
    i64 token = 0;
    if (place >= 0) {
      depth = depths[parent] + 1;
      const int at_step = parent / max_rows;
      const int column = history[(i64)at_step * max_rows * (2 * num_best + 1) + place - at_step * max_rows * num_best];
      token = table ? table[column] : vocab_offset + column;
    }
    // A row of nothing computes something, too, so that what it leaves in the cache is a number.
    tokens[r] = token;
    positions[r] = grown.context_len + grown.num_known + depth;
    kv_rows[r] = (i64)page_table[(i64)b * max_pages + index / page_size] * page_size + index % page_size;
    next_depths[r] = grown.num_known + depth;
    for (int w = 0; w < mask_words; ++w) {
      u64 mask = place < 0 ? 0 : masks[(i64)parent * mask_words + w];
      if (w == tree_row / 64) mask |= 1ull << (tree_row % 64);
      next_masks[(i64)r * mask_words + w] = masks[(next_rows + r) * mask_words + w] = mask;
    }
    depths[next_rows + r] = depth;
    row_values[r] = worth[j];
    stands_for[r] = place;
    reads[r] = first_feature + (place < 0 ? grown.first_row : parent);
    writes[r] = place < 0 ? nobodys_feature : first_feature + next_rows + r;
    Row row = grown.row;
    const u64 key = noise_key(grown.seed, grown.root_position + depth + 1);
    row.key0 = (u32)key;
    row.key1 = (u32)(key >> 32);
    row.source = place < 0 ? -1 : r;
    rows[r] = row;
  }
  if (threadIdx.x == 0) {
    tree_lens[b] = grown.tree_len + (step + 1) * num_each;
    num_done[2 * b] = step + 1;
    num_done[2 * b + 1] = num_before + num_chosen;
  }
}
