// The weight gradient of causal_conv3d by wgmma, for sm_90a. See causal_conv3d_sm90_gradient_steps.h.

#include "causal_conv3d_sm90_gradient_steps.h"
#include "causal_conv3d_weight_gradient.h"
#include "hopper.h"
#include "hopper_products.h"
#include "mma_sm80.h"
#include "shared_memory.h"

namespace opensora {
namespace {

using namespace sm90;

constexpr int kAlignment = 1024;  // of the swizzle's pattern

template <class Type, int kTileOut>
struct DeviceGroup {
  uint32_t shared;  // address of byte 0
  int index;

  __device__ __forceinline__ void multiply(float (&sums)[kTileOut / 2], int x_byte, int grad_byte) const {
    hopper::multiply_transposed(Type(), sums, transposed_operand(shared + x_byte),
                                transposed_operand(shared + grad_byte));
  }
};

// Two blocks for each SM, so that one multiplies while the other waits at its barrier.
template <class Type, int kTileOut>
__global__ void __launch_bounds__(kNumThreads, 2)
    weight_gradient_kernel(const __grid_constant__ GradientOperands operands, const __grid_constant__ Geometry geometry,
                           int num_steps_in_all) {
  using Layout = GradientLayout<kTileOut>;
  extern __shared__ char unaligned[];
  const uint32_t shared = (shared_address(unaligned) + kAlignment - 1) / kAlignment * kAlignment;
  const int thread = static_cast<int>(threadIdx.x);
  const int split = static_cast<int>(blockIdx.y), num_splits = static_cast<int>(gridDim.y);
  const GradientBlock block = gradient_block(static_cast<int>(blockIdx.x), geometry, kTileOut);
  const int first_step = first_step_of_split(split, num_splits, num_steps_in_all);
  const int num_steps = first_step_of_split(split + 1, num_splits, num_steps_in_all) - first_step;
  GradientCopies<kTileOut> copies(thread, block, first_step, operands, geometry);
  const Warp<Type> warp{shared, thread / 32, thread % 32};
  const DeviceGroup<Type, kTileOut> group{shared, thread / kGroupThreads};
  float sums[kTileOut / 2] = {};
  typename Warp<Type>::Sums bias_sums;
  const bool sums_bias = sm90::warp_sums_bias<kTileOut>(warp.index, block, operands);

  run_pipeline<true>(
      num_steps,
      [&](int step, int slot) {
        copies.step(step, slot * Layout::kSlotBytes,
                    [&](int byte, const void* source, bool is_read) { copy_past_l1(shared + byte, source, is_read); });
      },
      [] { commit_copies(); },
      [&] {
        hopper::products_wait<0>();  // the slot that they read is filled next
        hopper::pin(sums);
        wait_for_copies<kNumStages - 2>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what this thread's copies wrote
        __syncthreads();
      },
      [&](int slot) {
        hopper::products_fence();
        sm90::multiply_gradient<kTileOut>(group, slot * Layout::kSlotBytes, sums);
        hopper::products_commit();
        if (sums_bias) {
          multiply_bias(warp, slot * Layout::kSlotBytes, bias_sums);
        }
      });

  hopper::products_wait<0>();
  hopper::pin(sums);
  sm90::store_gradient<kTileOut>(group.index, thread % kGroupThreads, sums, block, split, operands, geometry);
  if (sums_bias) {
    store_bias(warp, bias_sums, block, split, operands, geometry);
  }
}

template <class Type, int kTileOut>
cudaError_t launch_kernel(const GradientLaunch& launch, cudaStream_t stream) {
  constexpr int kBytes = GradientLayout<kTileOut>::kBytes + kAlignment;
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

}  // namespace

cudaError_t launch_weight_gradient_sm90a(const GradientLaunch& launch, cudaStream_t stream) {
  return launch.is_bfloat16 ? launch_kernel<BFloat16>(launch, stream) : launch_kernel<Float16>(launch, stream);
}

}  // namespace opensora
