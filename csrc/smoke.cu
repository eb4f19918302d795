// The build's smoke test on a GPU: one kernel, launched on torch's current stream through the C shim.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::stable::Tensor;

__global__ void smoke_kernel(const float* source, float* target, int64_t num_elements) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < num_elements) {
    target[index] = source[index] + 1.0f;
  }
}

// x + 1 for a contiguous fp32 tensor.
Tensor smoke_cuda(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float, "smoke: x must be float32");
  STD_TORCH_CHECK(x.is_contiguous(), "smoke: x must be contiguous");
  Tensor out = torch::stable::empty_like(x);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const int64_t num_elements = x.numel();
  if (num_elements > 0) {
    const unsigned num_blocks = static_cast<unsigned>((num_elements + 255) / 256);
    smoke_kernel<<<num_blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), num_elements);
    STD_TORCH_CHECK(cudaGetLastError() == cudaSuccess, "smoke: the kernel did not launch");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CUDA, library) {
  library.impl("smoke", TORCH_BOX(&smoke_cuda));
}
