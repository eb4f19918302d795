// Descriptions of tensors for the copy engine, encoded by the driver. The driver's function is asked for at run time,
// so that nothing links to libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace opensora {

// A tensor of two-byte elements and the box of it that one load brings: innermost axis first, strides in bytes from the
// second axis on. Rows of 128 bytes arrive with the 128-byte swizzle; what lies outside the tensor arrives as zeros.
template <int kAxes>
struct BoxedTensor {
  const void* data;
  bool is_bfloat16;
  cuuint64_t sizes[kAxes];
  cuuint64_t strides[kAxes - 1];
  cuuint32_t box[kAxes];
};

template <int kAxes>
cudaError_t encode_map(const BoxedTensor<kAxes>& tensor, CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    return error != cudaSuccess ? error : cudaErrorNotSupported;
  }
  cuuint32_t steps[kAxes];
  for (cuuint32_t& step : steps) {
    step = 1;
  }
  const CUresult encoded = reinterpret_cast<Encode>(found)(
      map, tensor.is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kAxes,
      const_cast<void*>(tensor.data), tensor.sizes, tensor.strides, tensor.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return encoded == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace opensora
