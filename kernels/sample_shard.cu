// The sampled token of each row over this rank's share of the vocabulary: argmax of logit / temperature + Gumbel
// noise (temperature 0: of the logit), ties to the smaller id; and, for log-probabilities, the largest
// logit / temperature and the sum of exp(logit / temperature - largest). One block per row.
#include "noise.cuh"

struct Best {
  float score;
  i64 token;
};
DEVICE bool beats(float score, i64 token, const Best& best) {
  return score > best.score || (score == best.score && token < best.token);
}
DEVICE void warp_best(Best& best) {
  for (int step = 16; step > 0; step >>= 1) {
    float score = __shfl_xor_sync(ALL_LANES, best.score, step);
    i64 token = __shfl_xor_sync(ALL_LANES, best.token, step);
    if (beats(score, token, best)) best = {score, token};
  }
}
// Adds (largest, sum) of some logits to that of others.
DEVICE void add_exponentials(float& largest, float& sum, float other_largest, float other_sum) {
  float common = fmaxf(largest, other_largest);
  if (common == NEGATIVE_INFINITY) return;  // nothing on either side
  sum = sum * expf(largest - common) + other_sum * expf(other_largest - common);
  largest = common;
}
DEVICE void warp_exponentials(float& largest, float& sum) {
  for (int step = 16; step > 0; step >>= 1) {
    float other_largest = __shfl_xor_sync(ALL_LANES, largest, step);
    float other_sum = __shfl_xor_sync(ALL_LANES, sum, step);
    add_exponentials(largest, sum, other_largest, other_sum);
  }
}

// keys: two 32-bit halves per row, each in an int64, from (seed, position); table: the token id of each column,
// ascending, or null where they are vocab_offset, vocab_offset + 1, ... Noise and result go by token ids.
KERNEL(512, 1)
sample_shard(const float* logits, const i64* keys, const float* temperatures, const i64* table, float* scores,
             i64* tokens, float* largest_logits, float* exponential_sums, int vocab_size, i64 vocab_offset,
             i64 row_stride) {
  constexpr float MAX_GUMBEL = 22.875f;    // -log(-log(1 - 2^-33)) = 33 ln 2 = 22.874
  constexpr float ESTIMATE_ERROR = 1e-4f;  // far above that of the estimate (see the test), far below what matters
  DYNAMIC_SHARED(shared);
  Best* warp_bests = reinterpret_cast<Best*>(shared);             // [16]
  float* warp_largest = reinterpret_cast<float*>(warp_bests + 16);  // [16]
  float* warp_sums = warp_largest + 16;                           // [16]
  const int row = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, num_warps = blockDim.x >> 5;
  const u32 key0 = (u32)keys[2 * row], key1 = (u32)keys[2 * row + 1];
  const float temperature = temperatures[row];
  const bool greedy = temperature == 0.f;
  const float* row_logits = logits + row * row_stride;

  Best best = {NEGATIVE_INFINITY, 0x7fffffffffffffffll};
  float largest = NEGATIVE_INFINITY, sum = 0.f;
  for (int i = threadIdx.x; i < vocab_size; i += blockDim.x) {
    const float logit = greedy ? row_logits[i] : row_logits[i] / temperature;
    add_exponentials(largest, sum, logit, 1.f);
    if (!greedy && logit + MAX_GUMBEL < best.score) continue;
    const i64 token = table ? table[i] : vocab_offset + i;
    float score = logit;
    if (!greedy) {
      const float uniform = uniform_noise(key0, key1, (u32)token);
      const float slack = ESTIMATE_ERROR + 1e-6f * fabsf(logit);  // of the estimate, and of rounding the sum
      if (logit + gumbel_estimate(uniform) + slack < best.score) continue;
      score = logit + gumbel_noise(uniform);
    }
    if (beats(score, token, best)) best = {score, token};
  }
  warp_best(best);
  warp_exponentials(largest, sum);
  if (lane == 0) {
    warp_bests[warp] = best;
    warp_largest[warp] = largest;
    warp_sums[warp] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
  best = lane < num_warps ? warp_bests[lane] : Best{NEGATIVE_INFINITY, 0x7fffffffffffffffll};
  largest = lane < num_warps ? warp_largest[lane] : NEGATIVE_INFINITY;
  sum = lane < num_warps ? warp_sums[lane] : 0.f;
  warp_best(best);
  warp_exponentials(largest, sum);
  if (lane == 0) {
    scores[row] = best.score;
    tokens[row] = best.token;
    largest_logits[row] = largest;
    exponential_sums[row] = sum;
  }
}
