// What the forward and the backward kernel of short attention share: heads as rows of fp32, and softmax.
#pragma once

#include "norm_rope_rows.h"
#include "short_attention.h"
#include "small_matrix.h"

namespace opensora::OPENSORA_CAPABILITY {

// Queries that are attended with at once: their scores for 128 keys are 16 KiB.
inline constexpr int64_t queries_at_once = 32;

// Which keys a sample has, and where.
struct Keys {
  int64_t sample, start, count;
};

inline Keys keys_of(const ShortAttentionCall& call, int64_t sample) {
  return {call.is_packed ? 0 : sample, call.key_starts == nullptr ? 0 : call.key_starts[sample],
          call.key_counts == nullptr ? call.k.num_tokens : call.key_counts[sample]};
}

inline int64_t most_keys(const ShortAttentionCall& call) {
  int64_t most = call.key_counts == nullptr ? call.k.num_tokens : 0;
  for (int64_t sample = 0; call.key_counts != nullptr && sample < call.q.num_samples; ++sample) {
    most = call.key_counts[sample] > most ? call.key_counts[sample] : most;
  }
  return most;
}

// One head of some tokens of a sample.
template <class X>
struct HeadRows {
  X* first;
  int64_t token_stride, first_token, count;
};

// How far the next head lies behind this one: in the same tokens, else in those of the next sample.
inline int64_t next_head(const ShortAttentionCall& call, const Heads& heads, int64_t sample, int64_t head) {
  if (head + 1 < call.num_heads) {
    return heads.head_stride;
  }
  if (sample + 1 >= heads.num_samples) {
    return 0;
  }
  return offset_of(heads, sample + 1) - offset_of(heads, sample) - head * heads.head_stride;
}

template <class X>
inline HeadRows<X> head_rows(const Heads& heads, int64_t sample, int64_t head, int64_t first_token, int64_t count) {
  X* first = sample_of<X>(heads, sample) + first_token * heads.token_stride + head * heads.head_stride;
  return {first, heads.token_stride, first_token, count};
}

template <class X>
inline void read_rows(const HeadRows<const X>& rows, int64_t ahead, int64_t head_size, const Rows& target) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const X* source = rows.first + row * rows.token_stride;
    float* values = target[row];
    fetch_ahead(source, ahead, head_size);
    for_each_vector(head_size, [&](int64_t i, auto lanes) { store(values + i, load(source + i, lanes), lanes); });
  }
}

// The rows normalised and rotated, then multiplied by `scale`, each rounded where the reference rounds.
template <class X, bool has_norm, bool has_rope, bool is_rope_first>
inline void read_normed_rows(const HeadRows<const X>& rows, int64_t ahead, const NormRope& form,
                             const Weight<X>& weight, const Angles& angles, int64_t head_size, float scale,
                             float* scratch, const Rows& target) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t token = rows.first_token + row;
    const X* x = rows.first + row * rows.token_stride;
    const HeadGroup<X> group{x, 0, 1, head_size, weight(), angles.cos(token), angles.sin(token), scratch};
    float* values = target[row];
    fetch_ahead(x, ahead, head_size);
    norm_rope_group<X, has_norm, has_rope, is_rope_first>(
        form, group, [&](int64_t, int64_t i, auto lanes, Vector value) {
          const Vector rounded = rounded_to<X>(value);
          store(values + i, scale == 1.0f ? rounded : rounded_to<X>(rounded * scale), lanes);
        });
  }
}

// Scores to weights, in place, 0 beyond the keys: not yet divided by their sums, whose inverses are returned in
// `inverses`, or divided if there are none.
inline void softmax_rows(const Rows& scores, int64_t num_rows, int64_t num_keys, float* inverses) {
  const int64_t last = (num_keys - 1) / num_lanes * num_lanes;
  const FirstLanes lanes{num_keys - last};
  for (int64_t row = 0; row < num_rows; ++row) {
    float* values = scores[row];
    const Vector tail = kept(load(values + last), lanes, -__builtin_inff());
    Vector most = tail;
    for (int64_t i = 0; i < last; i += num_lanes) {
      most = maximum(most, load(values + i));
    }
    const Vector top = splat(largest(most));
    Vector total = exponential(tail - top);
    store(values + last, total);
    for (int64_t i = 0; i < last; i += num_lanes) {
      const Vector weight = exponential(load(values + i) - top);
      total += weight;
      store(values + i, weight);
    }
    const float inverse = 1.0f / sum(total);
    if (inverses != nullptr) {
      inverses[row] = inverse;
      continue;
    }
    for (int64_t i = 0; i <= last; i += num_lanes) {
      store(values + i, load(values + i) * inverse);
    }
  }
}

// run.operator()<X, has_norm, has_rope, is_rope_first>() for the call's.
template <class Run>
inline void with_variant(const ShortAttentionCall& call, const Run& run) {
  const auto with_form = [&]<class X>() {
    const NormRope& form = call.q_form;
    if (!form.has_norm) {
      form.has_rope ? run.template operator()<X, false, true, false>()
                    : run.template operator()<X, false, false, false>();
    } else if (!form.has_rope) {
      run.template operator()<X, true, false, false>();
    } else if (form.is_rope_first) {
      run.template operator()<X, true, true, true>();
    } else {
      run.template operator()<X, true, true, false>();
    }
  };
  call.q.is_narrow ? with_form.template operator()<BFloat16>() : with_form.template operator()<float>();
}

}  // namespace opensora::OPENSORA_CAPABILITY
