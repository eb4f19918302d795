// Softmax attention on Hopper, forward: the operator around the kernel in attention_sm90a.cuh.
//
// The backward pass is Triton's, from the same log-sum-exp. Sequences of up to 128 tokens have no kernel here:
// Triton's, of qk_norm_attention, reads packed q, k and v once and writes the result once, which is all the traffic
// there must be. Neither has been measured.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "attention_sm90a.cuh"
#include "shared_memory.h"
#include "tensor_map.h"

namespace opensora::attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// q, k, v are (O, P, L or K, N, D); packed keys and values (1, 1, K, N, D).

void check(const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), "attention: ", name,
                  " must be on q's CUDA device");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), "attention: ", name, " must have q's dtype");
  STD_TORCH_CHECK(x.dim() == 5 && x.size(3) == q.size(3) && x.size(4) == q.size(4), "attention: ", name,
                  " must have five axes, and q's heads and head size");
  STD_TORCH_CHECK(x.numel() > 0, "attention: ", name, " must not be empty");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(4) == 1, "attention: ", name,
                  " must be aligned to 16 bytes, and its last axis dense");
  for (int axis = 0; axis < 4; ++axis) {
    STD_TORCH_CHECK(x.size(axis) <= INT32_MAX, "attention: ", name, " must have shorter axes, got ", x.size(axis));
    STD_TORCH_CHECK(x.size(axis) == 1 || (x.stride(axis) > 0 && x.stride(axis) % 8 == 0), "attention: ", name,
                    " must have strides that are multiples of 8, got ", x.stride(axis));
  }
}

const int64_t* checked_lengths(const char* name, const std::optional<Tensor>& x, const Tensor& q) {
  if (!x.has_value()) {
    return nullptr;
  }
  STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == q.get_device_index() && x->is_contiguous() &&
                      x->scalar_type() == ScalarType::Long && x->numel() == q.size(0) * q.size(1),
                  "attention: ", name, " must be one int64 for each sample, contiguous, on q's device");
  return static_cast<const int64_t*>(x->const_data_ptr());
}

CUtensorMap map_of(const Tensor& x, int num_columns, int num_rows) {
  return tensor_map<5>("attention", x.const_data_ptr(), x.scalar_type() == ScalarType::BFloat16,
                       {x.size(4), x.size(2), x.size(3), x.size(1), x.size(0)},
                       {x.stride(2), x.stride(3), x.stride(1), x.stride(0)}, {num_columns, num_rows, 1, 1, 1},
                       num_columns * 2);
}

template <int kHeadSize, typename Element>
void launch(const Tensor& q, const Tensor& k, const Tensor& v, Arguments arguments) {
  using T = Tile<kHeadSize>;
  constexpr int kTail = T::kTailColumns > 0 ? T::kTailColumns : kWideColumns;  // a map that no thread uses
  const Maps maps = {map_of(q, kWideColumns, T::kBlockQueries), map_of(q, kTail, T::kBlockQueries),
                     map_of(k, kWideColumns, kBlockKeys), map_of(k, kTail, kBlockKeys),
                     map_of(v, kWideColumns, kBlockKeys)};
  arguments.num_blocks = (arguments.num_queries + T::kBlockQueries - 1) / T::kBlockQueries;
  const int64_t num_tiles = q.size(0) * q.size(1) * q.size(3) * arguments.num_blocks;
  const int32_t device = q.get_device_index();
  int num_multiprocessors = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess,
                  "attention: the number of multiprocessors of device ", device, " is unknown");
  STD_TORCH_CHECK(num_tiles <= INT32_MAX - num_multiprocessors, "attention: q must have fewer tiles of queries than ",
                  INT32_MAX, ", got ", num_tiles);
  arguments.num_tiles = static_cast<int>(num_tiles);
  constexpr auto kernel = attention_forward_kernel<kHeadSize, Element>;
  STD_TORCH_CHECK((allow_shared_memory<kernel, T::kSharedBytes>() == cudaSuccess), "attention: the device must give ",
                  T::kSharedBytes, " bytes of shared memory, as Hopper's do");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  // each program takes tile after tile, so that it copies the next one's while it ends the last one
  const int num_programs = arguments.num_tiles < num_multiprocessors ? arguments.num_tiles : num_multiprocessors;
  kernel<<<num_programs, T::kNumThreads, T::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(maps, arguments);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "attention: the kernel did not launch: ", cudaGetErrorString(error));
}

template <int kHeadSize>
void launch(const Tensor& q, const Tensor& k, const Tensor& v, const Arguments& arguments) {
  if (q.scalar_type() == ScalarType::BFloat16) {
    launch<kHeadSize, __nv_bfloat16>(q, k, v, arguments);
  } else {
    launch<kHeadSize, __half>(q, k, v, arguments);
  }
}

void attention_cuda_forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> lengths,
                            std::optional<Tensor> ends, double scale, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
                  "attention: q must be bfloat16 or float16");
  check("q", q, q);
  check("k", k, q);
  check("v", v, q);
  STD_TORCH_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
                  "attention: v must have k's shape");
  const bool is_packed = ends.has_value();
  STD_TORCH_CHECK(
      is_packed ? lengths.has_value() && k.size(0) * k.size(1) == 1 : k.size(0) == q.size(0) && k.size(1) == q.size(1),
      "attention: k must have q's leading axes, or lengths and ends");
  STD_TORCH_CHECK(out.is_contiguous() && out.numel() == q.numel() && out.scalar_type() == q.scalar_type(),
                  "attention: out must be contiguous, of q's size and dtype");
  STD_TORCH_CHECK(lse.is_contiguous() && lse.numel() == q.numel() / q.size(4) && lse.scalar_type() == ScalarType::Float,
                  "attention: lse must be contiguous, one float32 for each query of each head");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Arguments arguments = {checked_lengths("lengths", lengths, q),
                               checked_lengths("ends", ends, q),
                               out.mutable_data_ptr(),
                               static_cast<float*>(lse.mutable_data_ptr()),
                               0,
                               0,
                               static_cast<int>(q.size(3)),
                               static_cast<int>(q.size(1)),
                               static_cast<int>(q.size(2)),
                               static_cast<int>(k.size(2)),
                               static_cast<float>(scale * 1.4426950408889634)};
  switch (q.size(4)) {
    case 64:
      return launch<64>(q, k, v, arguments);
    case 72:
      return launch<72>(q, k, v, arguments);
    case 96:
      return launch<96>(q, k, v, arguments);
    case 128:
      return launch<128>(q, k, v, arguments);
    default:
      STD_TORCH_CHECK(false, "attention: q must have heads of 64, 72, 96 or 128 elements, got ", q.size(4));
  }
}

}  // namespace
}  // namespace opensora::attention

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CUDA, library) {
  library.impl("attention_cuda_forward", TORCH_BOX(&opensora::attention::attention_cuda_forward));
}
