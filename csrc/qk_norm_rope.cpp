#include "qk_norm_rope.h"

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu_heads.h"

namespace opensora {

namespace {

using torch::stable::Tensor;

constexpr const char* op = "qk_norm_rope";

// Blocks to sum gradients of weights in, and the fewest tokens of one.
constexpr int64_t most_blocks = 128;
constexpr int64_t smallest_block = 16;

NormRopeCall call_of(const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_weight,
                     const OptionalTensor& k_weight, const OptionalTensor& cos, const OptionalTensor& sin,
                     const NormRopeOptions& options) {
  NormRopeCall call{};
  call.num_heads = q.size(q.dim() - 2);
  call.head_size = q.size(q.dim() - 1);
  call.num_sides = k ? 2 : 1;
  call.sides[0].x = heads_of(op, "q", q);
  call.sides[0].form = norm_rope_of(op, q, q_weight, cos, sin, options);
  if (k) {
    call.sides[1].x = heads_of(op, "k", *k);
    call.sides[1].form = norm_rope_of(op, *k, k_weight, cos, sin, options);
  }
  return call;
}

// q and, if given, k normalised and rotated: contiguous, in their own dtypes.
std::vector<Tensor> qk_norm_rope_cpu_forward(const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_weight,
                                             const OptionalTensor& k_weight, const OptionalTensor& cos,
                                             const OptionalTensor& sin, bool has_norm, double eps, bool is_rope_first,
                                             bool is_interleaved, bool is_token) {
  NormRopeCall call =
      call_of(q, k, q_weight, k_weight, cos, sin, {has_norm, eps, is_rope_first, is_interleaved, is_token});
  std::vector<Tensor> outs;
  int64_t num_elements = 0;
  for (int index = 0; index < call.num_sides; ++index) {
    const Tensor& x = index == 0 ? q : *k;
    outs.push_back(torch::stable::new_empty(x, x.sizes()));
    call.sides[index].out = heads_of(op, "out", outs.back());
    num_elements += x.numel();
  }
  if (num_elements > 0) {
    OPENSORA_RUN_KERNEL(norm_rope_forward, call);
  }
  return outs;
}

// Gradients of q and k, in memory as they are, and in fp32 those of the weights (2, W) and of cos and sin (2, L, D/2),
// of size 0 where they are not wanted.
std::vector<Tensor> qk_norm_rope_cpu_backward(const Tensor& grad_q_out, const OptionalTensor& grad_k_out,
                                              bool wants_weights, bool wants_angles, const Tensor& q,
                                              const OptionalTensor& k, const OptionalTensor& q_weight,
                                              const OptionalTensor& k_weight, const OptionalTensor& cos,
                                              const OptionalTensor& sin, bool has_norm, double eps, bool is_rope_first,
                                              bool is_interleaved, bool is_token) {
  NormRopeCall call =
      call_of(q, k, q_weight, k_weight, cos, sin, {has_norm, eps, is_rope_first, is_interleaved, is_token});
  std::vector<Tensor> found;
  int64_t most_tokens = 0;
  for (int index = 0; index < call.num_sides; ++index) {
    const Tensor& x = index == 0 ? q : *k;
    NormRopeCall::Side& side = call.sides[index];
    side.grad_out = heads_of(op, "grad", index == 0 ? grad_q_out : *grad_k_out);
    found.push_back(gradient_like(x));
    side.grad_x = heads_of(op, "grad_x", found.back());
    most_tokens = std::max(most_tokens, side.x.num_samples * side.x.num_tokens);
  }
  const int64_t num_weights = is_token ? call.num_heads * call.head_size : call.head_size;
  const std::vector<int64_t> weight_sizes = {wants_weights ? 2 : 0, num_weights};
  const std::vector<int64_t> angle_sizes = {wants_angles ? 2 : 0, call.sides[0].x.num_tokens, call.head_size / 2};
  for (const std::vector<int64_t>& sizes : {weight_sizes, angle_sizes}) {
    found.push_back(torch::stable::new_empty(q, sizes, torch::headeronly::ScalarType::Float));
    torch::stable::zero_(found.back());
  }
  if (most_tokens == 0 || call.num_heads == 0 || call.head_size == 0) {
    return found;
  }
  float* angle_sums = static_cast<float*>(found.back().mutable_data_ptr());
  float* weight_totals = static_cast<float*>(found[found.size() - 2].mutable_data_ptr());
  call.angle_sums = wants_angles ? angle_sums : nullptr;
  call.block_size = std::max(smallest_block, (most_tokens + most_blocks - 1) / most_blocks);
  call.num_blocks = (most_tokens + call.block_size - 1) / call.block_size;
  if (wants_angles) {  // every sum of a token's angles within one block
    call.num_blocks = call.sides[0].x.num_tokens;
    call.block_size = call.sides[0].x.num_samples;
  }
  const int64_t num_sums = wants_weights ? call.num_sides * call.num_blocks * num_weights : 0;
  const std::unique_ptr<float[]> partial(new float[num_sums]);
  call.weight_sums = wants_weights ? partial.get() : nullptr;
  OPENSORA_RUN_KERNEL(norm_rope_backward, call);
  for (int64_t row = 0; wants_weights && row < call.num_sides * call.num_blocks; ++row) {
    float* total = weight_totals + row / call.num_blocks * num_weights;
    for (int64_t i = 0; i < num_weights; ++i) {
      total[i] += partial[row * num_weights + i];
    }
  }
  return found;
}

}  // namespace

}  // namespace opensora

STABLE_TORCH_LIBRARY_FRAGMENT(opensora_kernels, library) {
  library.def(
      "qk_norm_rope_cpu_forward(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
      "bool has_norm, float eps, bool is_rope_first, bool is_interleaved, bool is_token) -> Tensor[]");
  library.def(
      "qk_norm_rope_cpu_backward(Tensor grad_q_out, Tensor? grad_k_out, bool wants_weights, bool wants_angles, "
      "Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, bool has_norm, float eps, "
      "bool is_rope_first, bool is_interleaved, bool is_token) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CPU, library) {
  library.impl("qk_norm_rope_cpu_forward", TORCH_BOX(&opensora::qk_norm_rope_cpu_forward));
  library.impl("qk_norm_rope_cpu_backward", TORCH_BOX(&opensora::qk_norm_rope_cpu_backward));
}
