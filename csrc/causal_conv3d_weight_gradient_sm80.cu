// The weight gradient of causal_conv3d by mma.sync, for sm_80 and every later architecture. Blocks sum shares of the
// positions in fp32; a second kernel adds the shares in a fixed order, so that results do not differ from run to run.

#include "causal_conv3d.h"
#include "causal_conv3d_sm80_gradient_steps.h"
#include "causal_conv3d_weight_gradient.h"
#include "mma_sm80.h"
#include "shared_memory.h"

namespace opensora {
namespace {

using namespace sm80;

template <class Type, int kTileOut>
__global__ void __launch_bounds__(kNumThreads, kBlocksOfMultiprocessor)
    weight_gradient_kernel(const __grid_constant__ GradientOperands operands, const __grid_constant__ Geometry geometry,
                           int num_steps_in_all) {
  using Layout = GradientLayout<kTileOut>;
  extern __shared__ __align__(128) char shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const int split = static_cast<int>(blockIdx.y), num_splits = static_cast<int>(gridDim.y);
  const GradientBlock block = gradient_block(static_cast<int>(blockIdx.x), geometry, kTileOut);
  const int first_step = first_step_of_split(split, num_splits, num_steps_in_all);
  const int num_steps = first_step_of_split(split + 1, num_splits, num_steps_in_all) - first_step;
  GradientCopies<kTileOut> copies(thread, block, first_step, operands, geometry);
  const uint32_t shared_bytes = shared_address(shared);
  Warp<Type> warp{shared_bytes, thread / 32, thread % 32};
  typename Warp<Type>::Sums sums[Layout::kMatricesOut][2 * Layout::kMatricesX];
  typename Warp<Type>::Sums bias_sums;
  const bool sums_bias = warp_sums_bias<kTileOut>(warp.index, block, operands);

  run_pipeline(
      num_steps,
      [&](int step, int slot) {
        copies.step(step, slot * Layout::kSlotBytes, [&](int byte, const void* source, bool is_read) {
          copy_past_l1(shared_bytes + byte, source, is_read);
        });
      },
      [] { commit_copies(); },
      [] {
        wait_for_copies<kNumStages - 2>();
        __syncthreads();
      },
      [&](int slot) { multiply_gradient<kTileOut>(warp, slot * Layout::kSlotBytes, sums_bias, sums, bias_sums); });

  store_gradient<kTileOut>(warp, sums, bias_sums, block, split, operands, geometry);
}

// Adds the shares, the first one first. Four floats a thread.
__global__ void merge_kernel(const float* sums, int num_splits, int64_t split_stride, int64_t num_weights,
                             float* grad_weight, float* grad_bias) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (index >= split_stride) {
    return;
  }
  float4 total = *reinterpret_cast<const float4*>(sums + index);
  for (int split = 1; split < num_splits; ++split) {
    const float4 share = *reinterpret_cast<const float4*>(sums + split * split_stride + index);
    total.x += share.x;
    total.y += share.y;
    total.z += share.z;
    total.w += share.w;
  }
  float* target = index < num_weights ? grad_weight + index : grad_bias + (index - num_weights);
  *reinterpret_cast<float4*>(target) = total;
}

template <class Type, int kTileOut>
cudaError_t launch_kernel(const GradientLaunch& launch, cudaStream_t stream) {
  constexpr int kBytes = GradientLayout<kTileOut>::kBytes;
  const cudaError_t error = allow_shared_memory<weight_gradient_kernel<Type, kTileOut>, kBytes>();
  if (error != cudaSuccess) {
    return error;
  }
  weight_gradient_kernel<Type, kTileOut>
      <<<launch.grid<kTileOut>(), kNumThreads, kBytes, stream>>>(launch.operands, launch.geometry, launch.num_steps);
  return cudaGetLastError();
}

template <class Type>
cudaError_t launch_kernel(const GradientLaunch& launch, cudaStream_t stream) {
  switch (launch.tile_out) {
    case 64:
      return launch_kernel<Type, 64>(launch, stream);
    case 96:
      return launch_kernel<Type, 96>(launch, stream);
    default:
      return launch_kernel<Type, 128>(launch, stream);
  }
}

Geometry geometry_of(const ConvolutionWeightGradient& convolution) {
  const Clip &x = convolution.x, &state = convolution.state;
  return sm80::geometry_of(convolution.shape, {x.num_frames, x.sample_stride, x.frame_stride},
                           {state.num_frames, state.sample_stride, state.frame_stride});
}

int64_t num_weights_of(const Geometry& g) {
  return static_cast<int64_t>(num_gradient_vectors(g)) * kVector * g.num_out;
}

// The shares of the weight and, behind them, of the bias.
int64_t split_stride_of(const ConvolutionWeightGradient& convolution, const Geometry& g) {
  return num_weights_of(g) + (convolution.grad_bias == nullptr ? 0 : g.num_out);
}

cudaError_t weight_gradient(const ConvolutionWeightGradient& convolution,
                            cudaError_t (*launch_one)(const GradientLaunch&, cudaStream_t), cudaStream_t stream) {
  const Geometry geometry = geometry_of(convolution);
  const int64_t num_weights = num_weights_of(geometry), num_steps = num_gradient_steps(geometry);
  const int64_t split_stride = split_stride_of(convolution, geometry);
  if (num_weights == 0) {
    return cudaSuccess;
  }
  if (!is_served(geometry) || num_steps > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const int num_splits = num_splits_of(geometry);  // without positions one, of no steps, which writes zeros
  const bool has_shares = num_splits > 1;
  float* bias_shares = has_shares ? convolution.workspace + num_weights : convolution.grad_bias;
  const GradientOperands operands{
      static_cast<const uint16_t*>(convolution.x.data),
      static_cast<const uint16_t*>(convolution.state.data),
      static_cast<const uint16_t*>(convolution.grad),
      has_shares ? convolution.workspace : convolution.grad_weight,
      convolution.grad_bias == nullptr ? nullptr : bias_shares,
      split_stride,
  };
  const int tile_out = tile_out_of(geometry.num_out);
  const cudaError_t error = launch_one(
      {operands, geometry, tile_out, num_splits, static_cast<int>(num_steps), convolution.shape.is_bfloat16}, stream);
  if (error != cudaSuccess || !has_shares) {
    return error;
  }
  const int64_t num_blocks = (split_stride / 4 + kNumThreads - 1) / kNumThreads;
  merge_kernel<<<static_cast<unsigned>(num_blocks), kNumThreads, 0, stream>>>(
      convolution.workspace, num_splits, split_stride, num_weights, convolution.grad_weight, convolution.grad_bias);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_weight_gradient_sm80(const GradientLaunch& launch, cudaStream_t stream) {
  return launch.is_bfloat16 ? launch_kernel<BFloat16>(launch, stream) : launch_kernel<Float16>(launch, stream);
}

int64_t causal_conv3d_weight_gradient_workspace(const ConvolutionWeightGradient& convolution) {
  const Geometry g = geometry_of(convolution);
  const int num_splits = num_splits_of(g);
  return num_splits < 2 ? 0 : num_splits * split_stride_of(convolution, g);
}

cudaError_t causal_conv3d_weight_gradient_sm80(const ConvolutionWeightGradient& convolution, cudaStream_t stream) {
  return weight_gradient(convolution, launch_weight_gradient_sm80, stream);
}

cudaError_t causal_conv3d_weight_gradient_sm90a(const ConvolutionWeightGradient& convolution, cudaStream_t stream) {
  return weight_gradient(convolution, launch_weight_gradient_sm90a, stream);
}

}  // namespace opensora
