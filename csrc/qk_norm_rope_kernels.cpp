#include "norm_rope_rows.h"
#include "qk_norm_rope.h"

namespace opensora::OPENSORA_CAPABILITY {

namespace {

int64_t num_tokens_of(const Heads& heads) {
  return heads.num_samples * heads.num_tokens;
}

int64_t most_tokens(const NormRopeCall& call) {
  const int64_t first = num_tokens_of(call.sides[0].x);
  const int64_t second = call.num_sides > 1 ? num_tokens_of(call.sides[1].x) : 0;
  return first > second ? first : second;
}

int64_t num_weights(const NormRopeCall& call) {
  return call.sides[0].form.is_token ? call.num_heads * call.head_size : call.head_size;
}

template <class X>
inline HeadGroup<X> group_of(const NormRopeCall& call, const Heads& heads, int64_t sample, int64_t token,
                             const Weight<X>& weight, const Angles& angles, float* row) {
  const X* x = sample_of<const X>(heads, sample) + token * heads.token_stride;
  return {x, heads.head_stride, call.num_heads, call.head_size, weight(), angles.cos(token), angles.sin(token), row};
}

template <class X, bool has_norm, bool has_rope, bool is_rope_first>
void forward_side(const NormRopeCall& call, const NormRopeCall::Side& side, const Angles& angles, int64_t begin,
                  int64_t end) {
  const int64_t num_tokens = side.x.num_tokens, size = call.head_size;
  const Weight<X> weight(side.form, num_weights(call));
  const Rows rows(1, call.num_heads * size);
  X* out = static_cast<X*>(side.out.data) + begin * call.num_heads * size;
  for (int64_t row = begin; row < end; ++row) {
    const auto token = group_of<X>(call, side.x, row / num_tokens, row % num_tokens, weight, angles, rows[0]);
    for_each_group(side.form, token, [&](const HeadGroup<X>& group, int64_t first_head) {
      X* target = out + first_head * size;
      fetch_ahead(group.x, side.x.token_stride, group.num_heads * size);
      norm_rope_group<X, has_norm, has_rope, is_rope_first>(
          side.form, group,
          [&](int64_t head, int64_t i, auto lanes, Vector value) { store(target + head * size + i, value, lanes); });
    });
    out += call.num_heads * size;
  }
}

template <class X, bool has_norm, bool has_rope, bool is_rope_first>
void backward_side(const NormRopeCall& call, const NormRopeCall::Side& side, const Angles& angles, int64_t block,
                   float* weight_sums) {
  const int64_t num_tokens = side.x.num_tokens, size = call.head_size, row_size = call.num_heads * size;
  const int64_t num_pairs = size / 2;
  if (weight_sums != nullptr) {
    std::memset(weight_sums, 0, sizeof(float) * num_weights(call));
  }
  const Weight<X> weight(side.form, num_weights(call));
  const Rows rows(1, 3 * row_size);
  const auto one_token = [&](int64_t sample, int64_t index) {
    ParameterSums sums{weight_sums, nullptr, nullptr};
    if (has_rope && call.angle_sums != nullptr) {
      sums.cos = call.angle_sums + index * num_pairs;
      sums.sin = call.angle_sums + (num_tokens + index) * num_pairs;
    }
    const auto token = group_of<X>(call, side.x, sample, index, weight, angles, rows[0]);
    const X* grad_out = sample_of<const X>(side.grad_out, sample) + index * side.grad_out.token_stride;
    X* grad_x = sample_of<X>(side.grad_x, sample) + index * side.grad_x.token_stride;
    for_each_group(side.form, token, [&](const HeadGroup<X>& group, int64_t first_head) {
      const X* grad = grad_out + first_head * side.grad_out.head_stride;
      X* target = grad_x + first_head * side.grad_x.head_stride;
      fetch_ahead(group.x, side.x.token_stride, group.num_heads * size);
      fetch_ahead(grad, side.grad_out.token_stride, group.num_heads * size);
      norm_rope_group_backward<X, has_norm, has_rope, is_rope_first>(
          side.form, group,
          [&](int64_t head, int64_t i, auto lanes) { return load(grad + head * side.grad_out.head_stride + i, lanes); },
          sums,
          [&](int64_t head, int64_t i, auto lanes, Vector value) {
            store(target + head * side.grad_x.head_stride + i, value, lanes);
          });
    });
  };
  if (call.angle_sums != nullptr) {
    for (int64_t sample = 0; sample < side.x.num_samples; ++sample) {
      one_token(sample, block);
    }
    return;
  }
  const int64_t all = num_tokens_of(side.x), end = (block + 1) * call.block_size;
  for (int64_t row = block * call.block_size; row < (end < all ? end : all); ++row) {
    one_token(row / num_tokens, row % num_tokens);
  }
}

// run.operator()<has_norm, has_rope, is_rope_first>() for the call's.
template <class Run>
inline void with_form(const NormRope& form, const Run& run) {
  if (!form.has_rope) {
    run.template operator()<true, false, false>();
  } else if (!form.has_norm) {
    run.template operator()<false, true, false>();
  } else if (form.is_rope_first) {
    run.template operator()<true, true, true>();
  } else {
    run.template operator()<true, true, false>();
  }
}

}  // namespace

void norm_rope_forward(const NormRopeCall& call) {
  const Angles angles(call.sides[0].form, call.sides[0].x.num_tokens, call.head_size);
  with_form(call.sides[0].form, [&]<bool has_norm, bool has_rope, bool is_rope_first>() {
    const int64_t row_elements = call.num_sides * call.num_heads * call.head_size;
    for_each_range(most_tokens(call), row_elements, [&](int64_t begin, int64_t end) {
      for (int index = 0; index < call.num_sides; ++index) {
        const NormRopeCall::Side& side = call.sides[index];
        const int64_t all = num_tokens_of(side.x), last = end < all ? end : all;
        if (side.x.is_narrow) {
          forward_side<BFloat16, has_norm, has_rope, is_rope_first>(call, side, angles, begin, last);
        } else {
          forward_side<float, has_norm, has_rope, is_rope_first>(call, side, angles, begin, last);
        }
      }
    });
  });
}

void norm_rope_backward(const NormRopeCall& call) {
  const Angles angles(call.sides[0].form, call.sides[0].x.num_tokens, call.head_size);
  with_form(call.sides[0].form, [&]<bool has_norm, bool has_rope, bool is_rope_first>() {
    const int64_t block_elements = call.block_size * call.num_sides * call.num_heads * call.head_size;
    for_each_block(call.num_blocks, block_elements, [&](int64_t block) {
      for (int index = 0; index < call.num_sides; ++index) {
        const NormRopeCall::Side& side = call.sides[index];
        float* sums = call.weight_sums;
        sums = sums == nullptr ? nullptr : sums + (index * call.num_blocks + block) * num_weights(call);
        if (side.x.is_narrow) {
          backward_side<BFloat16, has_norm, has_rope, is_rope_first>(call, side, angles, block, sums);
        } else {
          backward_side<float, has_norm, has_rope, is_rope_first>(call, side, angles, block, sums);
        }
      }
    });
  });
}

}  // namespace opensora::OPENSORA_CAPABILITY
