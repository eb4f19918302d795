// Queries, keys and values as the CPU library's operators take them, and their norm and rotation.
#pragma once

#include <cmath>

#include "cpu_tensors.h"
#include "heads.h"

namespace opensora {

inline Heads heads_of(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  check_rows(op, name, tensor);
  const int64_t num_axes = tensor.dim() - 3;
  STD_TORCH_CHECK(num_axes >= 0 && num_axes <= Heads::most_axes, op, ": ", name,
                  " must have shape (*, L, N, D) with at most ", Heads::most_axes, " leading axes, got ", tensor.dim(),
                  " axes");
  Heads heads;
  heads.data = tensor.data_ptr();
  heads.is_narrow = is_narrow(tensor);
  heads.num_axes = num_axes;
  for (int64_t axis = 0; axis < num_axes; ++axis) {
    heads.sizes[axis] = tensor.size(axis);
    heads.strides[axis] = tensor.stride(axis);
    heads.num_samples *= tensor.size(axis);
  }
  heads.num_tokens = tensor.size(num_axes);
  heads.token_stride = tensor.stride(num_axes);
  heads.head_stride = tensor.stride(num_axes + 1);
  return heads;
}

// Options of the norm and the rotation, in words as the operators' schemas have them.
struct NormRopeOptions {
  bool has_norm;
  double eps;
  bool is_rope_first, is_interleaved, is_token;
};

inline NormRope norm_rope_of(const char* op, const torch::stable::Tensor& x, const OptionalTensor& weight,
                             const OptionalTensor& cos, const OptionalTensor& sin, const NormRopeOptions& options) {
  NormRope form;
  form.has_norm = options.has_norm;
  form.has_rope = cos.has_value();
  form.is_rope_first = options.is_rope_first;
  form.is_interleaved = options.is_interleaved;
  form.is_token = options.is_token && options.has_norm;
  form.eps = static_cast<float>(options.eps);
  if (weight) {
    check_rows(op, "weight", *weight);
    form.weight = weight->const_data_ptr();
    form.weight_is_narrow = is_narrow(*weight);
  }
  if (cos) {
    check_rows(op, "cos", *cos);
    check_rows(op, "sin", *sin);
    STD_TORCH_CHECK(cos->is_contiguous() && sin->is_contiguous(), op, ": cos and sin must be contiguous");
    STD_TORCH_CHECK(cos->scalar_type() == sin->scalar_type(), op, ": cos and sin must have one dtype");
    form.cos = cos->const_data_ptr();
    form.sin = sin->const_data_ptr();
    form.angles_are_narrow = is_narrow(*cos);
    form.rounds_products = form.angles_are_narrow && is_narrow(x);
  }
  return form;
}

}  // namespace opensora
