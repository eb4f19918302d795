// causal_conv3d on tensor cores by mma.sync: serves sm_80 and every later architecture, every stride, dilation and
// border. The steps of the kernel are in causal_conv3d_sm80_steps.h.

#include "causal_conv3d.h"
#include "causal_conv3d_sm80_steps.h"
#include "mma_sm80.h"
#include "shared_memory.h"

namespace opensora {
namespace {

using namespace sm80;

template <class Type, int kTileOut>
__global__ void __launch_bounds__(kNumThreads, kBlocksOfMultiprocessor)
    forward_kernel(const __grid_constant__ Operands operands, const __grid_constant__ Geometry geometry) {
  using Layout = ForwardLayout<kTileOut>;
  extern __shared__ __align__(128) char shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const ForwardBlock block = forward_block(static_cast<int>(blockIdx.x), geometry, kTileOut);
  ForwardCopies<kTileOut> copies(thread, shared, block, operands, geometry);
  const uint32_t shared_bytes = shared_address(shared);
  Warp<Type> warp{shared_bytes, thread / 32, thread % 32};
  typename Warp<Type>::Sums sums[Layout::kMatricesX][2 * Layout::kMatricesOut];

  __syncthreads();
  run_pipeline(
      copies.num_steps(),
      [&](int, int slot) {
        copies.step(
            slot * Layout::kSlotBytes,
            [&](int byte, const void* source, bool is_read) { copy_through_l1(shared_bytes + byte, source, is_read); },
            [&](int byte, const void* source, bool is_read) { copy_past_l1(shared_bytes + byte, source, is_read); });
      },
      [] { commit_copies(); },
      [] {
        wait_for_copies<kNumStages - 2>();
        __syncthreads();
      },
      [&](int slot) { multiply_forward<kTileOut>(warp, slot * Layout::kSlotBytes, sums); });

  __syncthreads();  // the ring becomes the staging area; no copy is on its way, since the last steps fetch none
  stage_forward<Type, kTileOut>(warp, sums, shared, block, operands, geometry);
  __syncthreads();
  store_forward<Type, kTileOut>(thread, shared, block, operands, geometry);
  if (operands.partials == nullptr) {
    return;
  }
  const int num_rows = num_rows_of(block, geometry);
  __syncthreads();
  sum_tile<Type, kTileOut>(thread, num_rows, shared);
  __syncthreads();
  sum_deviations<Type, kTileOut>(thread, num_rows, shared);
  __syncthreads();
  store_statistics<kTileOut>(thread, num_rows, shared, block, operands, geometry);
}

template <class Type, int kTileOut>
cudaError_t launch(const Operands& operands, const Geometry& geometry, cudaStream_t stream) {
  constexpr int kBytes = ForwardLayout<kTileOut>::kBytes;
  const int64_t num_blocks = num_forward_blocks(geometry, kTileOut);
  if (num_blocks > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t error = allow_shared_memory<forward_kernel<Type, kTileOut>, kBytes>();
  if (error != cudaSuccess) {
    return error;
  }
  forward_kernel<Type, kTileOut>
      <<<static_cast<unsigned>(num_blocks), kNumThreads, kBytes, stream>>>(operands, geometry);
  return cudaGetLastError();
}

template <class Type>
cudaError_t launch(int tile_out, const Operands& operands, const Geometry& geometry, cudaStream_t stream) {
  switch (tile_out) {
    case 64:
      return launch<Type, 64>(operands, geometry, stream);
    case 96:
      return launch<Type, 96>(operands, geometry, stream);
    default:
      return launch<Type, 128>(operands, geometry, stream);
  }
}

Geometry geometry_of(const ConvolutionForward& convolution) {
  const Clip &x = convolution.x, &state = convolution.state;
  return sm80::geometry_of(convolution.shape, {x.num_frames, x.sample_stride, x.frame_stride},
                           {state.num_frames, state.sample_stride, state.frame_stride});
}

bool has_results(const Geometry& g) {
  return g.num_samples > 0 && g.num_frames > 0 && g.num_positions > 0 && g.num_out > 0;
}

}  // namespace

int64_t causal_conv3d_sm80_workspace(const ConvolutionForward& convolution) {
  const Geometry g = geometry_of(convolution);
  return convolution.statistics == nullptr
             ? 0
             : static_cast<int64_t>(g.num_samples) * g.num_frames * num_tiles_of_frame(g) * g.num_out * 2;
}

cudaError_t causal_conv3d_sm80(const ConvolutionForward& convolution, cudaStream_t stream) {
  const Geometry geometry = geometry_of(convolution);
  if (!has_results(geometry)) {
    return cudaSuccess;
  }
  if (!is_served(geometry)) {
    return cudaErrorInvalidValue;
  }
  const Operands operands{
      static_cast<const uint16_t*>(convolution.x.data),
      static_cast<const uint16_t*>(convolution.state.data),
      static_cast<const uint16_t*>(convolution.weight),
      static_cast<const uint16_t*>(convolution.bias),
      static_cast<const uint16_t*>(convolution.residual),
      static_cast<uint16_t*>(convolution.out),
      convolution.statistics == nullptr ? nullptr : convolution.workspace,
  };
  const int tile_out = tile_out_of(geometry.num_out);
  const cudaError_t error = convolution.shape.is_bfloat16 ? launch<BFloat16>(tile_out, operands, geometry, stream)
                                                          : launch<Float16>(tile_out, operands, geometry, stream);
  if (error != cudaSuccess || convolution.statistics == nullptr) {
    return error;
  }
  return merge_frame_statistics({convolution.workspace, convolution.statistics, geometry.num_samples,
                                 geometry.num_frames, geometry.num_out, 1, geometry.num_positions, 1, kTilePositions},
                                stream);
}

}  // namespace opensora
