// The build's smoke test on the CPU: proves that a stable-ABI library loads into this torch and that its operators run.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::stable::Tensor;

// x + 1 for a contiguous fp32 tensor.
Tensor smoke_cpu(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float, "smoke: x must be float32");
  STD_TORCH_CHECK(x.is_contiguous(), "smoke: x must be contiguous");
  Tensor out = torch::stable::empty_like(x);
  const float* source = static_cast<const float*>(x.const_data_ptr());
  float* target = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) {
    target[i] = source[i] + 1.0f;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CPU, library) {
  library.impl("smoke", TORCH_BOX(&smoke_cpu));
}
