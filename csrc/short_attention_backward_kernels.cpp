#include "short_attention.h"
#include "short_attention_rows.h"

namespace opensora::OPENSORA_CAPABILITY {

namespace {

// From the gradients of a head's normalised and rotated rows to those of the rows in memory.
template <class X, bool has_norm, bool has_rope, bool is_rope_first>
void write_gradient(const HeadRows<const X>& rows, const NormRope& form, const Weight<X>& weight, const Angles& angles,
                    int64_t head_size, float* scratch, const Rows& grads, ParameterSums sums,
                    const HeadRows<X>& target) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t token = rows.first_token + row;
    const X* x = rows.first + row * rows.token_stride;
    const HeadGroup<X> group{x, 0, 1, head_size, weight(), angles.cos(token), angles.sin(token), scratch};
    const float* grad = grads[row];
    X* out = target.first + row * target.token_stride;
    if constexpr (!has_norm && !has_rope) {
      for_each_vector(head_size, [&](int64_t i, auto lanes) { store(out + i, load(grad + i, lanes), lanes); });
      continue;
    }
    ParameterSums of_token = sums;
    if (sums.cos != nullptr) {
      of_token.cos += token * (head_size / 2);
      of_token.sin += token * (head_size / 2);
    }
    norm_rope_group_backward<X, has_norm, has_rope, is_rope_first>(
        form, group, [&](int64_t, int64_t i, auto lanes) { return load(grad + i, lanes); }, of_token,
        [&](int64_t, int64_t i, auto lanes, Vector value) { store(out + i, value, lanes); });
  }
}

// grads = weights * (grads - sum(weights * grads)): through softmax, to the scores. 0 beyond the keys.
inline void softmax_backward(const Rows& weights, int64_t num_rows, int64_t num_keys, const Rows& grads) {
  const int64_t padded = Rows::padded(num_keys);
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* weight = weights[row];
    float* grad = grads[row];
    const Vector total = splat(
        sum_of_row(num_keys, [&](int64_t i, auto lanes) { return load(weight + i, lanes) * load(grad + i, lanes); }));
    for (int64_t i = 0; i < padded; i += num_lanes) {
      store(grad + i, load(weight + i) * (load(grad + i) - total));
    }
  }
}

// With weights P = softmax(scale q k^T) and out = P v: grad_v = P^T g; of the scores, G = P (g v^T - delta) with
// delta = sum(P g v^T) for each query; of the normalised and rotated q and k, scale G k and G^T (scale q).
template <class X, bool has_norm, bool has_rope, bool is_rope_first>
void backward_block(const ShortAttentionCall& call, const Angles& angles, int64_t block) {
  const int64_t size = call.head_size, num_queries = call.q.num_tokens, num_keys_most = most_keys(call);
  const Weight<X> q_weight(call.q_form, size), k_weight(call.k_form, size);
  const int64_t padded_keys = Rows::padded(num_keys_most), padded_size = Rows::padded(size);
  const Rows keys(padded_keys, size), transposed_keys(padded_size, num_keys_most), grad_keys(num_keys_most, size);
  const Rows values(padded_keys, size), transposed_values(padded_size, num_keys_most), grad_values(num_keys_most, size);
  const Rows queries(queries_at_once, size), grad_queries(queries_at_once, size), grad_outs(queries_at_once, size);
  const Rows weights(queries_at_once, num_keys_most), grad_scores(queries_at_once, num_keys_most);
  const Rows scratch(1, 3 * size);
  ParameterSums q_sums, k_sums;
  if (call.weight_sums != nullptr) {
    q_sums.weight = call.weight_sums + block * 2 * size;
    k_sums.weight = q_sums.weight + size;
    std::memset(q_sums.weight, 0, sizeof(float) * 2 * size);
  }
  if (call.angle_sums != nullptr) {
    const int64_t num_angles = num_queries * (size / 2);
    q_sums.cos = k_sums.cos = call.angle_sums + block * 2 * num_angles;
    q_sums.sin = k_sums.sin = q_sums.cos + num_angles;
    std::memset(q_sums.cos, 0, sizeof(float) * 2 * num_angles);
  }
  const int64_t num_items = call.q.num_samples * call.num_heads, end = (block + 1) * call.block_size;
  for (int64_t item = block * call.block_size; item < (end < num_items ? end : num_items); ++item) {
    const int64_t sample = item / call.num_heads, head = item % call.num_heads;
    const Keys of_sample = keys_of(call, sample);
    const int64_t num_keys = of_sample.count;
    const auto k_rows = head_rows<const X>(call.k, of_sample.sample, head, of_sample.start, num_keys);
    read_normed_rows<X, has_norm, has_rope, is_rope_first>(k_rows, next_head(call, call.k, of_sample.sample, head),
                                                           call.k_form, k_weight, angles, size, 1.0f, scratch[0], keys);
    transpose(keys, num_keys, size, transposed_keys);
    read_rows(head_rows<const X>(call.v, of_sample.sample, head, of_sample.start, num_keys),
              next_head(call, call.v, of_sample.sample, head), size, values);
    transpose(values, num_keys, size, transposed_values);
    std::memset(grad_keys[0], 0, sizeof(float) * num_keys * grad_keys.stride());
    std::memset(grad_values[0], 0, sizeof(float) * num_keys * grad_values.stride());
    for (int64_t first = 0; first < num_queries; first += queries_at_once) {
      const int64_t count = num_queries - first < queries_at_once ? num_queries - first : queries_at_once;
      const auto q_rows = head_rows<const X>(call.q, sample, head, first, count);
      read_normed_rows<X, has_norm, has_rope, is_rope_first>(q_rows, next_head(call, call.q, sample, head), call.q_form,
                                                             q_weight, angles, size, call.scale, scratch[0], queries);
      read_rows(head_rows<const X>(call.grad_out, sample, head, first, count),
                next_head(call, call.grad_out, sample, head), size, grad_outs);
      multiply(count, num_keys, size, {queries[0], queries.stride(), 1}, transposed_keys[0], transposed_keys.stride(),
               weights[0], weights.stride());
      if (num_keys > 0) {
        softmax_rows(weights, count, num_keys, nullptr);
      }
      multiply<true>(num_keys, size, count, {weights[0], 1, weights.stride()}, grad_outs[0], grad_outs.stride(),
                     grad_values[0], grad_values.stride());
      multiply(count, num_keys, size, {grad_outs[0], grad_outs.stride(), 1}, transposed_values[0],
               transposed_values.stride(), grad_scores[0], grad_scores.stride());
      softmax_backward(weights, count, num_keys, grad_scores);
      multiply<true>(num_keys, size, count, {grad_scores[0], 1, grad_scores.stride()}, queries[0], queries.stride(),
                     grad_keys[0], grad_keys.stride());
      multiply(count, size, num_keys, {grad_scores[0], grad_scores.stride(), 1}, keys[0], keys.stride(),
               grad_queries[0], grad_queries.stride());
      for (int64_t row = 0; row < count; ++row) {
        float* grad = grad_queries[row];
        for (int64_t i = 0; i < size; i += num_lanes) {
          store(grad + i, load(grad + i) * call.scale);
        }
      }
      write_gradient<X, has_norm, has_rope, is_rope_first>(q_rows, call.q_form, q_weight, angles, size, scratch[0],
                                                           grad_queries, q_sums,
                                                           head_rows<X>(call.grad_q, sample, head, first, count));
    }
    write_gradient<X, has_norm, has_rope, is_rope_first>(
        k_rows, call.k_form, k_weight, angles, size, scratch[0], grad_keys, k_sums,
        head_rows<X>(call.grad_k, of_sample.sample, head, of_sample.start, num_keys));
    const auto target = head_rows<X>(call.grad_v, of_sample.sample, head, of_sample.start, num_keys);
    for (int64_t row = 0; row < num_keys; ++row) {
      X* out = target.first + row * target.token_stride;
      for_each_vector(size, [&](int64_t i, auto lanes) { store(out + i, load(grad_values[row] + i, lanes), lanes); });
    }
  }
}

}  // namespace

void short_attention_backward(const ShortAttentionCall& call) {
  const Angles angles(call.q_form, call.q.num_tokens, call.head_size);
  with_variant(call, [&]<class X, bool has_norm, bool has_rope, bool is_rope_first>() {
    const int64_t work = call.block_size * call.q.num_tokens * call.head_size * (8 + most_keys(call));
    for_each_block(call.num_blocks, work,
                   [&](int64_t block) { backward_block<X, has_norm, has_rope, is_rope_first>(call, angles, block); });
  });
}

}  // namespace opensora::OPENSORA_CAPABILITY
