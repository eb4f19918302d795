// What the kernels of causal_conv3d take, and how they are launched. One group, channels last.
//
// Axes: B samples, T frames, H rows, W columns, C input and O output channels, S frames of the state, K taps (the
// kernel's frames, then its rows, then its columns). Output (b, t, h, w) is the sum over taps (i, j, k) of the input's
// frame t * step[0] + start[0] + i * dilation[0], row h * step[1] + start[1] + j * dilation[1], column w * step[2] +
// start[2] + k * dilation[2]. The sm_90a kernel takes step 1 and zeros around a frame only.
// Frames count from the state's first if there is a state, else from x's first. What lies outside is zero; with
// `replicates_front`, and no state, frames before x's first are that frame.
// The gradient of the input is the same convolution of the result's gradient with flipped, transposed taps.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "causal_conv3d_shape.h"
#include "moments.h"

namespace opensora {

// (B, T, H, W, C) with dense frames: W * C elements from row to row, C from column to column. Strides in elements,
// multiples of 8; pointers 16-byte aligned.
struct Clip {
  const void* data;
  int num_frames;
  int64_t sample_stride;
  int64_t frame_stride;
};

struct ConvolutionForward {
  ConvolutionShape shape;
  Clip x;
  Clip state;            // data is null and num_frames 0 without a state
  const void* weight;    // (K, O, C)
  const void* bias;      // (O,) or null
  const void* residual;  // (B, T', H', W', O) or null: added to what is already rounded, and rounded again
  void* out;             // (B, T', H', W', O)
  float* statistics;     // (B, O, T', 2) or null: mean and squared deviations of each frame of the rounded result
  float* workspace;      // as many floats as *_workspace says; null if that is 0
};

struct ConvolutionWeightGradient {
  ConvolutionShape shape;
  Clip x;
  Clip state;
  const void* grad;            // (B, T', H', W', O)
  float* grad_weight;          // (K, O, C)
  float* workspace;            // as above
  float* grad_bias = nullptr;  // (O,) or null
};

// Each returns cudaSuccess or the first error. Nothing waits for the device.
cudaError_t causal_conv3d_sm90a(const ConvolutionForward& convolution, cudaStream_t stream);
cudaError_t causal_conv3d_sm80(const ConvolutionForward& convolution, cudaStream_t stream);
cudaError_t causal_conv3d_weight_gradient_sm80(const ConvolutionWeightGradient& convolution, cudaStream_t stream);
cudaError_t causal_conv3d_weight_gradient_sm90a(const ConvolutionWeightGradient& convolution, cudaStream_t stream);

// Floats of device memory that a launch needs besides its results.
int64_t causal_conv3d_sm90a_workspace(const ConvolutionForward& convolution);
int64_t causal_conv3d_sm80_workspace(const ConvolutionForward& convolution);
int64_t causal_conv3d_weight_gradient_workspace(const ConvolutionWeightGradient& convolution);

// In a fixed order of tiles.
cudaError_t merge_frame_statistics(const FrameStatistics& merge, cudaStream_t stream);

}  // namespace opensora
