#include "short_attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu_heads.h"

namespace opensora {

namespace {

using torch::stable::Tensor;

constexpr const char* op = "attention";

// Blocks to sum gradients of weights and angles in.
constexpr int64_t most_blocks = 256;

// Where each sample's keys begin and how many it has, within the keys that there are.
class KeyLengths {
 public:
  KeyLengths(const OptionalTensor& lengths, bool is_packed, int64_t num_keys) {
    if (!lengths) {
      return;
    }
    STD_TORCH_CHECK(lengths->scalar_type() == torch::headeronly::ScalarType::Long && lengths->is_contiguous(), op,
                    ": key_lengths must be contiguous int64");
    const int64_t* given = static_cast<const int64_t*>(lengths->const_data_ptr());
    int64_t next = 0;
    for (int64_t sample = 0; sample < lengths->numel(); ++sample) {
      const int64_t begin = std::clamp<int64_t>(next, 0, num_keys);
      const int64_t end = std::clamp<int64_t>(next + given[sample], begin, num_keys);
      starts_.push_back(begin);
      counts_.push_back(end - begin);
      next = is_packed ? next + given[sample] : 0;
    }
  }

  void set(ShortAttentionCall& call) const {
    call.key_starts = starts_.empty() ? nullptr : starts_.data();
    call.key_counts = counts_.empty() ? nullptr : counts_.data();
  }

 private:
  std::vector<int64_t> starts_, counts_;
};

struct Parameters {
  const OptionalTensor &q_weight, &k_weight, &cos, &sin;
  NormRopeOptions options;
};

ShortAttentionCall call_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                           const Parameters& parameters) {
  const bool is_packed = k.dim() < q.dim();
  STD_TORCH_CHECK(!parameters.options.is_token, op, ": a mean over all heads is not taken here");
  ShortAttentionCall call{};
  call.num_heads = q.size(q.dim() - 2);
  call.head_size = q.size(q.dim() - 1);
  call.scale = static_cast<float>(scale);
  call.is_packed = is_packed;
  call.q = heads_of(op, "q", q);
  call.k = heads_of(op, "k", k);
  call.v = heads_of(op, "v", v);
  const auto& [q_weight, k_weight, cos, sin, options] = parameters;
  call.q_form = norm_rope_of(op, q, q_weight, cos, sin, options);
  call.k_form = norm_rope_of(op, k, k_weight, cos, sin, options);
  return call;
}

// softmax(scale q k^T) v of the normalised and rotated q and k: contiguous, in q's dtype.
Tensor attention_cpu_forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_lengths,
                             double scale, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                             const OptionalTensor& cos, const OptionalTensor& sin, bool has_norm, double eps,
                             bool is_rope_first, bool is_interleaved, bool is_token) {
  ShortAttentionCall call =
      call_of(q, k, v, scale, {q_weight, k_weight, cos, sin, {has_norm, eps, is_rope_first, is_interleaved, is_token}});
  const KeyLengths lengths(key_lengths, call.is_packed, call.k.num_tokens);
  lengths.set(call);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  call.out = heads_of(op, "out", out);
  if (q.numel() > 0) {
    OPENSORA_RUN_KERNEL(short_attention_forward, call);
  }
  return out;
}

void add_blocks(const float* partial, int64_t num_blocks, int64_t size, float* total) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t i = 0; i < size; ++i) {
      total[i] += partial[block * size + i];
    }
  }
}

// Gradients of q, k and v, in memory as they are, and in fp32 those of the weights (2, D) and of cos and sin
// (2, L, D/2), of size 0 where they are not wanted.
std::vector<Tensor> attention_cpu_backward(const Tensor& grad_out, bool wants_weights, bool wants_angles,
                                           const Tensor& q, const Tensor& k, const Tensor& v,
                                           const OptionalTensor& key_lengths, double scale,
                                           const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                           const OptionalTensor& cos, const OptionalTensor& sin, bool has_norm,
                                           double eps, bool is_rope_first, bool is_interleaved, bool is_token) {
  ShortAttentionCall call =
      call_of(q, k, v, scale, {q_weight, k_weight, cos, sin, {has_norm, eps, is_rope_first, is_interleaved, is_token}});
  const KeyLengths lengths(key_lengths, call.is_packed, call.k.num_tokens);
  lengths.set(call);
  call.grad_out = heads_of(op, "grad_out", grad_out);
  std::vector<Tensor> found;
  Heads* grads[] = {&call.grad_q, &call.grad_k, &call.grad_v};
  for (const Tensor* x : {&q, &k, &v}) {
    found.push_back(gradient_like(*x));
    if (key_lengths || q.numel() == 0) {  // keys that no sample attends to
      torch::stable::zero_(found.back());
    }
    *grads[found.size() - 1] = heads_of(op, "grad", found.back());
  }
  const int64_t num_weights = call.head_size, num_angles = call.q.num_tokens * (call.head_size / 2);
  const std::vector<int64_t> weight_sizes = {wants_weights ? 2 : 0, call.head_size};
  const std::vector<int64_t> angle_sizes = {wants_angles ? 2 : 0, call.q.num_tokens, call.head_size / 2};
  for (const std::vector<int64_t>& sizes : {weight_sizes, angle_sizes}) {
    found.push_back(torch::stable::new_empty(q, sizes, torch::headeronly::ScalarType::Float));
    torch::stable::zero_(found.back());
  }
  if (q.numel() == 0) {
    return found;
  }
  const int64_t num_items = call.q.num_samples * call.num_heads;
  call.block_size = (num_items + most_blocks - 1) / most_blocks;
  call.num_blocks = (num_items + call.block_size - 1) / call.block_size;
  const int64_t num_weight_sums = wants_weights ? call.num_blocks * 2 * num_weights : 0;
  const int64_t num_angle_sums = wants_angles ? call.num_blocks * 2 * num_angles : 0;
  const std::unique_ptr<float[]> partial(new float[num_weight_sums + num_angle_sums]);
  call.weight_sums = wants_weights ? partial.get() : nullptr;
  call.angle_sums = wants_angles ? partial.get() + num_weight_sums : nullptr;
  OPENSORA_RUN_KERNEL(short_attention_backward, call);
  if (wants_weights) {
    add_blocks(call.weight_sums, call.num_blocks, 2 * num_weights, static_cast<float*>(found[3].mutable_data_ptr()));
  }
  if (wants_angles) {
    add_blocks(call.angle_sums, call.num_blocks, 2 * num_angles, static_cast<float*>(found[4].mutable_data_ptr()));
  }
  return found;
}

}  // namespace

}  // namespace opensora

STABLE_TORCH_LIBRARY_FRAGMENT(opensora_kernels, library) {
  library.def(
      "attention_cpu_forward(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, float scale, Tensor? q_weight, "
      "Tensor? k_weight, Tensor? cos, Tensor? sin, bool has_norm, float eps, bool is_rope_first, bool is_interleaved, "
      "bool is_token) -> Tensor");
  library.def(
      "attention_cpu_backward(Tensor grad_out, bool wants_weights, bool wants_angles, Tensor q, Tensor k, Tensor v, "
      "Tensor? key_lengths, float scale, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, bool has_norm, "
      "float eps, bool is_rope_first, bool is_interleaved, bool is_token) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CPU, library) {
  library.impl("attention_cpu_forward", TORCH_BOX(&opensora::attention_cpu_forward));
  library.impl("attention_cpu_backward", TORCH_BOX(&opensora::attention_cpu_backward));
}
