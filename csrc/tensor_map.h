// Tensor maps: what the tensor memory accelerator (TMA) must know of a tensor to copy boxes of it into shared memory.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace opensora {

// Found at run time, so that the library needs no symbol of the driver and loads where there is none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found);
    STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess && address != nullptr,
                    "the CUDA driver has no cuTensorMapEncodeTiled: it must be of CUDA 12.0 or newer");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(address);
  }();
  return encoder;
}

// The swizzle whose pattern is `span_bytes` wide: 16-byte pieces change places within so many bytes.
inline CUtensorMapSwizzle swizzle_of(int span_bytes) {
  switch (span_bytes) {
    case 128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    case 64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case 32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

// A map of a 16-bit tensor whose first axis is dense. `extents` and `box` begin with that axis; `strides`, in elements,
// with the second. What a box covers beyond the extents reads as zero. `op` begins the message of an error.
template <int kRank>
CUtensorMap tensor_map(const char* op, const void* data, bool is_bfloat16, const int64_t (&extents)[kRank],
                       const int64_t (&strides)[kRank - 1], const int (&box)[kRank], int span_bytes) {
  cuuint64_t sizes[kRank];
  cuuint64_t bytes[kRank - 1];
  cuuint32_t box_sizes[kRank];
  cuuint32_t steps[kRank];
  for (int axis = 0; axis < kRank; ++axis) {
    sizes[axis] = static_cast<cuuint64_t>(extents[axis]);
    box_sizes[axis] = static_cast<cuuint32_t>(box[axis]);
    steps[axis] = 1;
    if (axis > 0) {
      // the stride of an axis of size one means nothing, but must be a multiple of 16 bytes all the same
      bytes[axis - 1] = extents[axis] == 1 ? 16 : static_cast<cuuint64_t>(strides[axis - 1]) * 2;
    }
  }
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank,
      const_cast<void*>(data), sizes, bytes, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(span_bytes),
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, op, ": the driver refused a tensor map with error ",
                  static_cast<int>(result));
  return map;
}

}  // namespace opensora
