// pack_shards and unpack_shards, and the push: packing whose shards go straight into the receive buffers of other GPUs.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "pack_shards_plan.h"

namespace opensora::shards {
namespace {

using torch::stable::Tensor;

template <int kVectorBytes, bool kIsPacking, typename Index>
__global__ void __launch_bounds__(kThreads) copy_shards_kernel(const __grid_constant__ Copy<Index> copy) {
  copy_vectors<kVectorBytes, kIsPacking>(copy, blockIdx.x, threadIdx.x);
}

int64_t element_size_of(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
}

Tensors describe(const std::vector<Tensor>& tensors, int64_t dim) {
  const auto sizes = tensors[0].sizes();
  Tensors found{{}, {}, {sizes.begin(), sizes.end()}, dim, element_size_of(tensors[0])};
  for (const Tensor& tensor : tensors) {
    const auto strides = tensor.strides();
    found.pointers.push_back(static_cast<char*>(tensor.data_ptr()));
    found.strides.emplace_back(strides.begin(), strides.end());
  }
  return found;
}

template <bool kIsPacking>
void launch(const char* op, const CopyPlan& plan, cudaStream_t stream) {
  const int64_t num_blocks = plan.num_blocks();
  STD_TORCH_CHECK(num_blocks < (int64_t{1} << 31), op, ": tensors must fit one launch, got ", num_blocks, " blocks");
  with_variant(plan, [&]<int kVectorBytes, typename Index>(const Copy<Index>& copy) {
    copy_shards_kernel<kVectorBytes, kIsPacking><<<static_cast<unsigned>(num_blocks), kThreads, 0, stream>>>(copy);
  });
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel did not launch: ", cudaGetErrorString(error));
}

// Between `tensors` and `packed`, or from `tensors` to one target for each shard.
template <bool kIsPacking>
void copy_shards(const char* op, std::vector<Tensor> tensors, char* packed, const std::vector<char*>& targets,
                 int64_t num_shards, int64_t dim) {
  const int32_t device = tensors[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  for (size_t first = 0; first < tensors.size(); first += kMaxTensors) {
    std::vector<Tensor> group(tensors.begin() + first, tensors.begin() + std::min(tensors.size(), first + kMaxTensors));
    std::optional<CopyPlan> plan = plan_copy(describe(group, dim), num_shards);
    if (!plan && kIsPacking) {  // strides of more axes than the kernel follows: a pass to make them dense
      for (Tensor& tensor : group) {
        tensor = torch::stable::contiguous(tensor);
      }
      plan = plan_copy(describe(group, dim), num_shards);
    }
    STD_TORCH_CHECK(plan.has_value(), op, ": tensors must be contiguous");
    place_packed(*plan, packed, targets, static_cast<int64_t>(first), static_cast<int64_t>(tensors.size()));
    launch<kIsPacking>(op, *plan, static_cast<cudaStream_t>(stream));
  }
}

Tensor pack_shards_cuda_forward(std::vector<Tensor> tensors, int64_t num_shards, int64_t dim) {
  const int64_t num_elements = static_cast<int64_t>(tensors.size()) * tensors[0].numel();
  Tensor packed = torch::stable::new_empty(tensors[0], {num_elements});
  if (num_elements > 0) {
    copy_shards<true>("pack_shards", std::move(tensors), static_cast<char*>(packed.mutable_data_ptr()), {}, num_shards,
                      dim);
  }
  return packed;
}

std::vector<Tensor> unpack_shards_cuda_forward(Tensor packed, std::vector<int64_t> shape, int64_t num_shards,
                                               int64_t dim, int64_t num_tensors) {
  STD_TORCH_CHECK(packed.is_contiguous(), "unpack_shards: packed must be contiguous");
  std::vector<Tensor> tensors;
  for (int64_t tensor = 0; tensor < num_tensors; ++tensor) {
    tensors.push_back(torch::stable::new_empty(packed, {shape.data(), shape.size()}));
  }
  if (packed.numel() > 0) {
    char* source = static_cast<char*>(const_cast<void*>(packed.const_data_ptr()));  // the kernel only reads it
    copy_shards<false>("unpack_shards", tensors, source, {}, num_shards, dim);
  }
  return tensors;
}

void pack_shards_cuda_push(std::vector<Tensor> tensors, int64_t num_shards, int64_t dim, std::vector<int64_t> targets) {
  STD_TORCH_CHECK(num_shards <= kMaxTargets && static_cast<int64_t>(targets.size()) == num_shards,
                  "pack_shards_push: targets must be one address for each of at most ", kMaxTargets, " shards, got ",
                  targets.size(), " for ", num_shards);
  if (tensors[0].numel() == 0) {
    return;
  }
  std::vector<char*> addresses;
  for (const int64_t target : targets) {
    addresses.push_back(reinterpret_cast<char*>(target));
  }
  copy_shards<true>("pack_shards_push", std::move(tensors), nullptr, addresses, num_shards, dim);
}

}  // namespace
}  // namespace opensora::shards

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CUDA, library) {
  library.impl("pack_shards_cuda_forward", TORCH_BOX(&opensora::shards::pack_shards_cuda_forward));
  library.impl("unpack_shards_cuda_forward", TORCH_BOX(&opensora::shards::unpack_shards_cuda_forward));
  library.impl("pack_shards_cuda_push", TORCH_BOX(&opensora::shards::pack_shards_cuda_push));
}
