// Tensors as the CPU library's operators take them: fp32 or bf16, the last axis dense, other axes with any strides.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace opensora {

using OptionalTensor = std::optional<torch::stable::Tensor>;

inline bool is_narrow(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16;
}

inline void check_rows(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::BFloat16, op,
                  ": ", name, " must be float32 or bfloat16");
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1 || tensor.numel() == 0, op, ": ", name,
                  " must have its last axis dense, got stride ", tensor.stride(last));
}

// Memory for the gradient of x: in x's order of axes, unless that of an expanded x leaves gaps in the last one.
inline torch::stable::Tensor gradient_like(const torch::stable::Tensor& x) {
  torch::stable::Tensor found = torch::stable::empty_like(x);
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || found.stride(last) == 1 ? found : torch::stable::new_empty(x, x.sizes());
}

}  // namespace opensora
