// The binding of causal_conv3d's kernels to torch: checks, the choice of a kernel, workspaces; and the merging of
// statistics, which all of them need.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <vector>

#include "causal_conv3d.h"

namespace opensora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Triple = std::vector<int64_t>;

constexpr int kSlices = 8, kChannelsOfBlock = 32;

// Memory bound: reads the partial moments of a frame's tiles once.
__global__ void merge_kernel(const FrameStatistics merge) {
  __shared__ Moments found[kSlices][kChannelsOfBlock];
  const int64_t plane = blockIdx.x;
  const int channel = blockIdx.y * kChannelsOfBlock + threadIdx.x, slice = threadIdx.y;
  if (channel < merge.num_out) {
    found[slice][threadIdx.x] = moments_of_slice(merge, plane, channel, slice, kSlices);
  }
  __syncthreads();
  if (channel < merge.num_out && slice == 0) {
    Moments all = found[0][threadIdx.x];
    for (int other = 1; other < kSlices; ++other) {
      all = merged(all, found[other][threadIdx.x]);
    }
    float* statistics = merge.statistics + statistics_offset(merge, plane, channel);
    statistics[0] = all.mean;
    statistics[1] = all.squares;
  }
}

// The dispatcher comes here as soon as one tensor is on a GPU.
void check_device(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "causal_conv3d: ", name,
                  " must be on x's device");
}

void check_dense(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes, ScalarType type,
                 const Tensor& x) {
  check_device(name, tensor, x);
  STD_TORCH_CHECK(tensor.scalar_type() == type, "causal_conv3d: ", name, " must have the dtype that its kernel takes");
  bool agrees = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t axis = 0; agrees && axis < sizes.size(); ++axis) {
    agrees = tensor.size(axis) == sizes[axis];
  }
  STD_TORCH_CHECK(agrees, "causal_conv3d: ", name, " must have the sizes that the other tensors give it");
  STD_TORCH_CHECK(tensor.is_contiguous(), "causal_conv3d: ", name, " must be contiguous");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, "causal_conv3d: ", name,
                  " must be aligned to 16 bytes");
}

Clip clip_of(const char* name, const Tensor& clip, const Tensor& x) {
  check_device(name, clip, x);
  STD_TORCH_CHECK(clip.dim() == 5, "causal_conv3d: ", name, " must have shape (B, T, H, W, C), got ", clip.dim(),
                  " axes");
  STD_TORCH_CHECK(clip.scalar_type() == x.scalar_type(), "causal_conv3d: ", name, " must have the dtype of x");
  const int64_t dense[3] = {clip.size(3) * clip.size(4), clip.size(4), 1};
  for (int axis = 2; axis < 5; ++axis) {
    STD_TORCH_CHECK(clip.size(axis) == 1 || clip.stride(axis) == dense[axis - 2], "causal_conv3d: ", name,
                    " must have dense frames, channels last, got stride ", clip.stride(axis), " along axis ", axis);
  }
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(clip.size(axis) == 1 || (clip.stride(axis) > 0 && clip.stride(axis) % 8 == 0),
                    "causal_conv3d: ", name, " must have strides that are multiples of 8, got ", clip.stride(axis),
                    " along axis ", axis);
  }
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(clip.data_ptr()) % 16 == 0, "causal_conv3d: ", name,
                  " must be aligned to 16 bytes");
  return {clip.data_ptr(), static_cast<int>(clip.size(1)), clip.stride(0), clip.stride(1)};
}

struct Window {
  Triple kernel, step, dilation, start;
  bool replicates_front;
  int64_t space_padding;
};

ConvolutionShape shape_of(const Tensor& x, const Tensor& out, const Window& window) {
  const int64_t num_channels = x.size(4), num_out = out.size(4);
  STD_TORCH_CHECK(x.numel() > 0, "causal_conv3d: x must not be empty");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "causal_conv3d: x must be bfloat16 or float16");
  STD_TORCH_CHECK(num_channels % 8 == 0 && num_out % 8 == 0, "causal_conv3d: the channels must be multiples of 8, got ",
                  num_channels, " and ", num_out);
  ConvolutionShape shape{};
  shape.num_samples = static_cast<int>(x.size(0));
  shape.num_channels = static_cast<int>(num_channels);
  shape.num_out = static_cast<int>(num_out);
  shape.height = static_cast<int>(x.size(2));
  shape.width = static_cast<int>(x.size(3));
  shape.out_frames = static_cast<int>(out.size(1));
  shape.out_height = static_cast<int>(out.size(2));
  shape.out_width = static_cast<int>(out.size(3));
  for (const Triple* triple : {&window.kernel, &window.step, &window.dilation, &window.start}) {
    STD_TORCH_CHECK(triple->size() == 3, "causal_conv3d: kernel, step, dilation and start must be three numbers");
  }
  for (int axis = 0; axis < 3; ++axis) {
    shape.kernel[axis] = static_cast<int>(window.kernel[axis]);
    shape.step[axis] = static_cast<int>(window.step[axis]);
    shape.dilation[axis] = static_cast<int>(window.dilation[axis]);
    shape.start[axis] = static_cast<int>(window.start[axis]);
  }
  shape.replicates_front = window.replicates_front;
  shape.space_padding = static_cast<int>(window.space_padding);
  shape.is_bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  return shape;
}

Clip state_of(const Tensor& x, const std::optional<Tensor>& state) {
  if (!state.has_value() || state->size(1) == 0) {
    return {nullptr, 0, 0, 0};
  }
  STD_TORCH_CHECK(state->size(0) == x.size(0) && state->size(2) == x.size(2) && state->size(3) == x.size(3) &&
                      state->size(4) == x.size(4),
                  "causal_conv3d: state must have x's sizes but for frames");
  return clip_of("state", *state, x);
}

// Kernels for sm_90a are compiled for that alone.
bool is_sm90() {
  int device = 0, major = 0, minor = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

// It takes every frame and position, and zeros around a frame.
bool serves_sm90a(const ConvolutionShape& shape) {
  const bool has_steps = shape.step[0] != 1 || shape.step[1] != 1 || shape.step[2] != 1;
  return is_sm90() && !has_steps && shape.space_padding == 0;
}

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

std::optional<Tensor> workspace_of(const Tensor& x, int64_t num_floats) {
  return num_floats == 0 ? std::nullopt
                         : std::optional<Tensor>(torch::stable::new_empty(x, {num_floats}, ScalarType::Float));
}

float* floats(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
}

void forward(const Tensor& x, const std::optional<Tensor>& state, const Tensor& weight,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, Triple kernel, Triple step,
             Triple dilation, Triple start, bool replicates_front, int64_t space_padding, const Tensor& out,
             const std::optional<Tensor>& statistics) {
  const ScalarType type = x.scalar_type();
  ConvolutionForward convolution{};
  convolution.x = clip_of("x", x, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  convolution.shape = shape_of(x, out, {kernel, step, dilation, start, replicates_front, space_padding});
  convolution.state = state_of(x, state);
  const int64_t num_out = out.size(4);
  const std::vector<int64_t> out_sizes(out.sizes().begin(), out.sizes().end());
  check_dense("out", out, out_sizes, type, x);
  check_dense("weight", weight, {kernel[0] * kernel[1] * kernel[2], num_out, x.size(4)}, type, x);
  convolution.weight = weight.const_data_ptr();
  convolution.out = out.mutable_data_ptr();
  if (bias.has_value()) {
    check_dense("bias", *bias, {num_out}, type, x);
    convolution.bias = bias->const_data_ptr();
  }
  if (residual.has_value()) {
    check_dense("residual", *residual, out_sizes, type, x);
    convolution.residual = residual->const_data_ptr();
  }
  if (statistics.has_value()) {
    check_dense("statistics", *statistics, {out.size(0), num_out, out.size(1), 2}, ScalarType::Float, x);
    convolution.statistics = floats(statistics);
  }
  if (out.numel() == 0) {
    return;
  }
  const bool is_sm90a = serves_sm90a(convolution.shape);
  const std::optional<Tensor> workspace = workspace_of(
      x, is_sm90a ? causal_conv3d_sm90a_workspace(convolution) : causal_conv3d_sm80_workspace(convolution));
  convolution.workspace = floats(workspace);
  STD_CUDA_CHECK(is_sm90a ? causal_conv3d_sm90a(convolution, current_stream(x))
                          : causal_conv3d_sm80(convolution, current_stream(x)));
}

void weight_gradient(const Tensor& x, const std::optional<Tensor>& state, const Tensor& grad, Triple kernel,
                     Triple step, Triple dilation, Triple start, bool replicates_front, int64_t space_padding,
                     const Tensor& grad_weight, const std::optional<Tensor>& grad_bias) {
  ConvolutionWeightGradient convolution{};
  convolution.x = clip_of("x", x, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  convolution.shape = shape_of(x, grad, {kernel, step, dilation, start, replicates_front, space_padding});
  convolution.state = state_of(x, state);
  check_dense("grad", grad, {grad.sizes().begin(), grad.sizes().end()}, x.scalar_type(), x);
  check_dense("grad_weight", grad_weight, {kernel[0] * kernel[1] * kernel[2], grad.size(4), x.size(4)},
              ScalarType::Float, x);
  convolution.grad = grad.const_data_ptr();
  convolution.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  if (grad_bias.has_value()) {
    check_dense("grad_bias", *grad_bias, {grad.size(4)}, ScalarType::Float, x);
    convolution.grad_bias = floats(grad_bias);
  }
  const std::optional<Tensor> workspace = workspace_of(x, causal_conv3d_weight_gradient_workspace(convolution));
  convolution.workspace = floats(workspace);
  STD_CUDA_CHECK(is_sm90() ? causal_conv3d_weight_gradient_sm90a(convolution, current_stream(x))
                           : causal_conv3d_weight_gradient_sm80(convolution, current_stream(x)));
}

}  // namespace

cudaError_t merge_frame_statistics(const FrameStatistics& merge, cudaStream_t stream) {
  const dim3 blocks(merge.num_samples * merge.num_frames, (merge.num_out + kChannelsOfBlock - 1) / kChannelsOfBlock);
  merge_kernel<<<blocks, dim3(kChannelsOfBlock, kSlices), 0, stream>>>(merge);
  return cudaGetLastError();
}

}  // namespace opensora

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CUDA, library) {
  library.impl("causal_conv3d_cuda_forward", TORCH_BOX(&opensora::forward));
  library.impl("causal_conv3d_cuda_weight_gradient", TORCH_BOX(&opensora::weight_gradient));
}
