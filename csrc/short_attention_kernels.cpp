#include "short_attention.h"
#include "short_attention_rows.h"

namespace opensora::OPENSORA_CAPABILITY {

namespace {

template <class X, bool has_norm, bool has_rope, bool is_rope_first>
void forward_range(const ShortAttentionCall& call, const Angles& angles, int64_t begin, int64_t end) {
  const int64_t size = call.head_size, num_queries = call.q.num_tokens, num_keys_most = most_keys(call);
  const int64_t num_parts = (num_queries + queries_at_once - 1) / queries_at_once;
  const Weight<X> q_weight(call.q_form, size), k_weight(call.k_form, size);
  const Rows keys(Rows::padded(num_keys_most), size), transposed_keys(Rows::padded(size), num_keys_most);
  const Rows values(num_keys_most, size), inverses(1, queries_at_once);
  const Rows queries(queries_at_once, size), scores(queries_at_once, num_keys_most), outs(queries_at_once, size);
  const Rows scratch(1, size);
  int64_t here = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / num_parts / call.num_heads, head = item / num_parts % call.num_heads;
    const Keys of_sample = keys_of(call, sample);
    if (here != item / num_parts) {
      here = item / num_parts;
      read_normed_rows<X, has_norm, has_rope, is_rope_first>(
          head_rows<const X>(call.k, of_sample.sample, head, of_sample.start, of_sample.count),
          next_head(call, call.k, of_sample.sample, head), call.k_form, k_weight, angles, size, 1.0f, scratch[0], keys);
      transpose(keys, of_sample.count, size, transposed_keys);
      read_rows(head_rows<const X>(call.v, of_sample.sample, head, of_sample.start, of_sample.count),
                next_head(call, call.v, of_sample.sample, head), size, values);
    }
    const int64_t first = item % num_parts * queries_at_once;
    const int64_t count = num_queries - first < queries_at_once ? num_queries - first : queries_at_once;
    read_normed_rows<X, has_norm, has_rope, is_rope_first>(head_rows<const X>(call.q, sample, head, first, count),
                                                           next_head(call, call.q, sample, head), call.q_form, q_weight,
                                                           angles, size, call.scale, scratch[0], queries);
    multiply(count, of_sample.count, size, {queries[0], queries.stride(), 1}, transposed_keys[0],
             transposed_keys.stride(), scores[0], scores.stride());
    if (of_sample.count > 0) {
      softmax_rows(scores, count, of_sample.count, inverses[0]);
    } else {
      std::memset(inverses[0], 0, sizeof(float) * count);  // not what another sample left, which may be NaN
    }
    multiply(count, size, of_sample.count, {scores[0], scores.stride(), 1}, values[0], values.stride(), outs[0],
             outs.stride());
    const HeadRows<X> target = head_rows<X>(call.out, sample, head, first, count);
    for (int64_t row = 0; row < count; ++row) {
      X* out = target.first + row * target.token_stride;
      const Vector inverse = splat(inverses[0][row]);
      for_each_vector(size,
                      [&](int64_t i, auto lanes) { store(out + i, load(outs[row] + i, lanes) * inverse, lanes); });
    }
  }
}

}  // namespace

void short_attention_forward(const ShortAttentionCall& call) {
  const Angles angles(call.q_form, call.q.num_tokens, call.head_size);
  const int64_t num_queries = call.q.num_tokens;
  const int64_t num_parts = (num_queries + queries_at_once - 1) / queries_at_once;
  const int64_t part_size = num_queries < queries_at_once ? num_queries : queries_at_once;
  with_variant(call, [&]<class X, bool has_norm, bool has_rope, bool is_rope_first>() {
    // a product of matrices takes about as long as a pass over an eighth of its multiplications
    const int64_t work = part_size * call.head_size * (4 + most_keys(call) / 4);
    for_each_range(call.q.num_samples * call.num_heads * num_parts, work, [&](int64_t begin, int64_t end) {
      forward_range<X, has_norm, has_rope, is_rope_first>(call, angles, begin, end);
    });
  });
}

}  // namespace opensora::OPENSORA_CAPABILITY
