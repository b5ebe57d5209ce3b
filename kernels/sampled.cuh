// What sampling is asked of rows, and what it answers; the records of sample_shard.py.
#pragma once
#include "device.cuh"

struct Row {  // of what is asked; ROW there
  double top_p;      // 1: no limit
  double log_min_p;  // -infinity: no limit
  float temperature;
  u32 key0, key1;    // halves of the noise's key
  int source;        // the row of the logits; -1: nothing is asked
  int top_k;         // 0: no limit
  int num_best;      // of the winners that are asked for; the others are not written
  int first_edit, end_edit;
  int likeliest, raw_likeliest;  // the lists for the likeliest tokens, edited and not; -1: not asked for
  int wants_sum, wants_raw;
};
struct Sums {  // SUMS there
  double sum, kept_sum, raw_sum;  // of exp; of the tokens that are kept; of logits as they came, at temperature 1
  float maximum, raw_maximum;     // NaN where a logit is
};
struct Winner {  // WINNER there
  float score, logit, raw_logit;
  int column;
};
