// What sampling wants to know of rows of one rank's share of the vocabulary, all in one launch; a block per row. The
// row's penalties and bias are made before, and taken back behind it, so that the logits are what they were:
//  - the largest logit, and the sum of exp((logit - largest) / temperature);
//  - the best tokens by logit / temperature + Gumbel noise (temperature 0: by logit), ties to the smaller id, among
//    those that top-k, top-p and min-p keep;
//  - the likeliest tokens in order.
// A token is packed as its falling value and its column: an integer that sorts by falling logit, then by column (as
// `pack_tokens` does). What is kept, or likeliest, is all up to one such integer, which a search over them finds; sums
// are whole numbers of 2^-40, so no result depends on the order of anything.
#include "noise.cuh"
#include "sampled.cuh"

struct Edit {  // EDIT there: add `bias`, then the penalties
  int column;
  float bias, repetition, presence, frequency;
};
constexpr int MIDS = 3;  // places that a sweep of the search compares
constexpr int MAX_SWEEPS = 40;  // a quarter of 2^64 places is left after each
constexpr int NO_COLUMN = 0x7fffffff;
constexpr float UNIT = 0x1p40f;

// Over all threads of the block the sums of each; every thread gets them. partial: shared, [16][2 * MIDS + 2].
template <int n> DEVICE void add_over_block(u64* partial, u64 (&sums)[n]) {
  for (int i = 0; i < n; ++i)
    for (int step = 16; step > 0; step >>= 1) sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], step);
  __syncthreads();  // those before have been read
  const int warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
  if ((threadIdx.x & 31) == 0)
    for (int i = 0; i < n; ++i) partial[warp * n + i] = sums[i];
  __syncthreads();
  for (int i = 0; i < n; ++i) {
    sums[i] = 0;
    for (int w = 0; w < num_warps; ++w) sums[i] += partial[w * n + i];
  }
}
// The smallest of each, likewise.
template <int n> DEVICE void least_over_block(u64* partial, u64 (&least)[n]) {
  for (int i = 0; i < n; ++i)
    for (int step = 16; step > 0; step >>= 1) {
      const u64 other = __shfl_xor_sync(ALL_LANES, least[i], step);
      least[i] = other < least[i] ? other : least[i];
    }
  __syncthreads();
  const int warp = threadIdx.x >> 5, num_warps = blockDim.x >> 5;
  if ((threadIdx.x & 31) == 0)
    for (int i = 0; i < n; ++i) partial[warp * n + i] = least[i];
  __syncthreads();
  for (int i = 0; i < n; ++i)
    for (int w = 0; w < num_warps; ++w) least[i] = partial[w * n + i] < least[i] ? partial[w * n + i] : least[i];
}

DEVICE u32 falling(float x) {
  const int bits = __float_as_int(x + 0.f);  // -0 becomes 0
  return (u32)(bits ^ (~(bits >> 31) & 0x7fffffff));
}
DEVICE float value_of(u32 falling_bits) {
  const int bits = (int)falling_bits;
  return __int_as_float(bits ^ (~(bits >> 31) & 0x7fffffff));
}
DEVICE u64 packed(float x, int column) { return (u64)falling(x) << 32 | (u32)column; }
constexpr u64 ALL_COLUMNS = 0xffffffffull, ALL_TOKENS = ~0ull;

// The logits of a row as the law sees them, and what the block shares to look at them.
struct Law {
  const float* logits;
  int size;
  float largest;  // finite
  float factor;   // 1 / temperature
  u64* partial;   // shared
  int* counts;    // shared, [512]
  u64* tokens;    // shared, room for the longest list
};

DEVICE u64 weight(const Law& law, float logit) {
  return __float2ull_rn(expf((logit - law.largest) * law.factor) * UNIT);
}

DEVICE u64 mass_up_to(const Law& law, u64 cut) {
  u64 mass[1] = {0};
  for (int i = threadIdx.x; i < law.size; i += blockDim.x)
    if (packed(law.logits[i], i) <= cut) mass[0] += weight(law, law.logits[i]);
  add_over_block(law.partial, mass);
  return mass[0];
}

// The last place up to `last` before which there are fewer than `num` tokens, and less than `limit` of mass.
DEVICE u64 cut_at(const Law& law, u64 last, u64 num, u64 limit) {
  u64 first = 0, num_before = 0, mass_before = 0;
  for (int sweep = 0; sweep < MAX_SWEEPS; ++sweep) {
    const u64 step = (last - first) >> 2;
    u64 found[2 * MIDS + 1] = {};  // tokens, and mass, from `first` to before each place between; tokens to `last`
    u64 ends[2] = {ALL_TOKENS, ALL_TOKENS};  // the first token that is there, and the last with all bits turned
    for (int i = threadIdx.x; i < law.size; i += blockDim.x) {
      const u64 token = packed(law.logits[i], i);
      if (token < first || token > last) continue;
      ends[0] = token < ends[0] ? token : ends[0];
      ends[1] = ~token < ends[1] ? ~token : ends[1];
      const u64 mass = limit == ALL_TOKENS ? 0 : weight(law, law.logits[i]);
      for (int mid = 0; mid < MIDS; ++mid)
        if (token < first + step * (mid + 1) + 1) {
          found[mid] += 1;
          found[MIDS + mid] += mass;
        }
      found[2 * MIDS] += 1;
    }
    add_over_block(law.partial, found);
    least_over_block(law.partial, ends);
    u64 up_to_last = found[2 * MIDS], tokens = 0, mass = 0, start = first;
    for (int mid = 0; mid < MIDS; ++mid) {
      if (num_before + found[mid] < num && mass_before + found[MIDS + mid] < limit) {
        tokens = found[mid];
        mass = found[MIDS + mid];
        start = first + step * (mid + 1) + 1;
      } else {
        up_to_last = found[mid];
        last = first + step * (mid + 1);
        break;
      }
    }
    if (up_to_last - tokens <= 1) return last;  // the first from `start` on is kept
    first = ends[0] > start ? ends[0] : start;
    last = ~ends[1] < last ? ~ends[1] : last;
    num_before += tokens;
    mass_before += mass;
  }
  return last;  // not reached
}

// The `num` likeliest in order, or as many as there are, to `list`.
DEVICE void write_likeliest(const Law& law, int num, u64* list) {
  const u64 end = cut_at(law, ALL_TOKENS, num, ALL_TOKENS);
  int count = 0, place = 0, total = 0;
  for (int i = threadIdx.x; i < law.size; i += blockDim.x) count += packed(law.logits[i], i) <= end;
  law.counts[threadIdx.x] = count;
  __syncthreads();
  for (int t = 0; t < (int)blockDim.x; ++t) {
    place += t < (int)threadIdx.x ? law.counts[t] : 0;
    total += law.counts[t];
  }
  for (int i = threadIdx.x; i < law.size; i += blockDim.x) {
    const u64 token = packed(law.logits[i], i);
    if (token <= end && place < num) law.tokens[place++] = token;
  }
  __syncthreads();
  total = total < num ? total : num;
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    int rank = 0;
    for (int j = 0; j < total; ++j) rank += law.tokens[j] < law.tokens[i];
    list[rank] = law.tokens[i];
  }
  __syncthreads();  // the next list begins
}

// The largest of a row; NaN where a logit is.
DEVICE float largest_of(const Law& law) {
  float largest = NEGATIVE_INFINITY;
  u64 num_nan[1] = {0};
  for (int i = threadIdx.x; i < law.size; i += blockDim.x) {
    largest = fmaxf(largest, law.logits[i]);
    num_nan[0] += law.logits[i] != law.logits[i];
  }
  add_over_block(law.partial, num_nan);
  u64 first[1] = {falling(largest)};
  least_over_block(law.partial, first);
  return num_nan[0] ? __int_as_float(0x7fc00000) : value_of((u32)first[0]);
}
// What is subtracted from logits; a row of removed tokens has no mass.
DEVICE float finite(float largest) { return fmaxf(largest, -3.4028234663852886e38f); }

// The last place that min-p keeps.
DEVICE u64 min_p_cut(float largest, double temperature, double log_min_p) {
  u32 first = falling(largest), last = 0xffffffffu;
  while (first < last) {
    const u32 middle = last - (last - first) / 2;
    const bool is_kept = (double)(value_of(middle) - largest) / temperature >= log_min_p;
    if (is_kept) first = middle; else last = middle - 1;
  }
  return (u64)first << 32 | ALL_COLUMNS;
}

// logits: [*, row_stride], as they were at the end; table: the token id of each column, ascending, or null where they
// are vocab_offset, vocab_offset + 1, ... Noise goes by token ids. edits of a row: distinct columns; originals: room
// for a logit of each edit.
KERNEL(512, 1)
sample_shard(float* logits, const Row* rows, const Edit* edits, float* originals, const i64* table, Sums* all_sums,
             Winner* all_winners, u64* lists, u64* raw_lists, int vocab_size, int max_best, int list_size,
             int raw_list_size, i64 vocab_offset, i64 row_stride) {
  constexpr float MAX_GUMBEL = 22.875f;    // -log(-log(1 - 2^-33)) = 33 ln 2 = 22.874
  constexpr float ESTIMATE_ERROR = 1e-4f;  // far above that of the estimate (see the test), far below what matters
  DYNAMIC_SHARED(shared);
  const Row row = rows[blockIdx.x];
  if (row.source < 0) return;
  float* row_logits = logits + row.source * row_stride;
  Winner* winners = all_winners + (i64)blockIdx.x * max_best;
  Sums sums = {};

  u64* partial = reinterpret_cast<u64*>(shared);
  int* counts = reinterpret_cast<int*>(partial + 16 * (2 * MIDS + 2));
  Law law = {row_logits, vocab_size, 0.f, 1.f, partial, counts, reinterpret_cast<u64*>(counts + 512)};
  if (row.wants_raw) {
    sums.raw_maximum = largest_of(law);
    law.largest = finite(sums.raw_maximum);
    sums.raw_sum = (double)mass_up_to(law, ALL_TOKENS) * 0x1p-40;
  }
  if (row.raw_likeliest >= 0)
    write_likeliest(law, raw_list_size, raw_lists + (i64)row.raw_likeliest * raw_list_size);

  for (int e = row.first_edit + threadIdx.x; e < row.end_edit; e += blockDim.x) {
    const Edit edit = edits[e];
    const float original = row_logits[edit.column], biased = original + edit.bias;
    originals[e] = original;
    row_logits[edit.column] =
        (biased < 0.f ? __fmul_rn(biased, edit.repetition) : biased / edit.repetition) - edit.presence - edit.frequency;
  }
  __syncthreads();
  sums.maximum = largest_of(law);
  law.largest = finite(sums.maximum);
  const bool greedy = row.temperature == 0.f;
  law.factor = greedy ? 1.f : 1.f / row.temperature;
  u64 mass = 0;
  if (row.wants_sum || row.top_p < 1.0) {
    mass = mass_up_to(law, ALL_TOKENS);
    sums.sum = sums.kept_sum = (double)mass * 0x1p-40;
  }
  u64 cut = ALL_TOKENS;
  if (row.top_k > 0) {
    cut = cut_at(law, cut, row.top_k, ALL_TOKENS) | ALL_COLUMNS;  // all that are as likely as the last stay
    mass = mass_up_to(law, cut);
  }
  const u64 likely = row.log_min_p > -1e300 ? min_p_cut(law.largest, row.temperature, row.log_min_p) : ALL_TOKENS;
  cut = likely < cut ? likely : cut;
  if (row.top_p < 1.0) cut = cut_at(law, cut, ALL_TOKENS, (u64)ceil(row.top_p * (double)mass));
  if (cut != ALL_TOKENS) sums.kept_sum = (double)mass_up_to(law, cut) * 0x1p-40;
  if (row.likeliest >= 0) write_likeliest(law, list_size, lists + (i64)row.likeliest * list_size);

  float last_score = __int_as_float(0x7f800000);  // of the winner before; those of its score go by column
  int last_column = -1;
  for (int place = 0; place < row.num_best; ++place) {
    float best = NEGATIVE_INFINITY;
    int best_column = NO_COLUMN;
    for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) {
      if (row_logits[i] == NEGATIVE_INFINITY || packed(row_logits[i], i) > cut) continue;
      const float logit = greedy ? row_logits[i] : row_logits[i] / row.temperature;
      float score = logit;
      if (!greedy) {
        if (logit + MAX_GUMBEL < best) continue;
        const float uniform = uniform_noise(row.key0, row.key1, table ? (u32)table[i] : (u32)(vocab_offset + i));
        const float slack = ESTIMATE_ERROR + 1e-6f * fabsf(logit);  // of the estimate, and of rounding the sum
        if (logit + gumbel_estimate(uniform) + slack < best) continue;
        score = logit + gumbel_noise(uniform);
      }
      const bool is_left = score < last_score || (score == last_score && i > last_column);
      if (is_left && score > best) best = score, best_column = i;  // columns of a thread ascend
    }
    u64 winner[1] = {packed(best, best_column)};
    least_over_block(partial, winner);
    last_score = value_of((u32)(winner[0] >> 32));
    last_column = (int)(u32)winner[0];
    const bool is_there = last_column != NO_COLUMN;
    if (threadIdx.x == 0) {
      const float logit = is_there ? row_logits[last_column] : NEGATIVE_INFINITY;
      winners[place] = {last_score, logit, logit, is_there ? last_column : 0};
    }
    __syncthreads();
    for (int e = row.first_edit + threadIdx.x; e < row.end_edit; e += blockDim.x)
      if (edits[e].column == last_column) winners[place].raw_logit = originals[e];
  }
  for (int e = row.first_edit + threadIdx.x; e < row.end_edit; e += blockDim.x)
    row_logits[edits[e].column] = originals[e];
  if (threadIdx.x == 0) all_sums[blockIdx.x] = sums;
}
