// How the two kernels of the weight gradient are launched, for the function that divides the work among blocks.
#pragma once

#include <cuda_runtime.h>

#include "causal_conv3d_sm80_gradient_steps.h"

namespace opensora {

struct GradientLaunch {
  sm80::GradientOperands operands;
  sm80::Geometry geometry;
  int tile_out, num_splits, num_steps;
  bool is_bfloat16;

  template <int kTileOut>
  dim3 grid() const {
    return dim3(static_cast<unsigned>(sm80::num_gradient_blocks(geometry, kTileOut)),
                static_cast<unsigned>(num_splits));
  }
};

cudaError_t launch_weight_gradient_sm80(const GradientLaunch& launch, cudaStream_t stream);
cudaError_t launch_weight_gradient_sm90a(const GradientLaunch& launch, cudaStream_t stream);

}  // namespace opensora
