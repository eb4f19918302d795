// What the kernels of causal_conv3d take, and how they are launched. Stride 1, one group, channels last.
//
// Axes: B samples, T frames, H rows, W columns, C input and O output channels, S frames of the state, K taps (the
// kernel's frames, then its rows, then its columns). Output (b, t, h, w) is the sum over taps (i, j, k) of the input's
// frame t + start[0] + i * dilation[0], row h + start[1] + j * dilation[1], column w + start[2] + k * dilation[2].
// Frames count from the state's first if there is a state, else from x's first. What lies outside is zero; with
// `replicates_front`, and no state, frames before x's first are that frame.
// The gradient of the input is the same convolution of the result's gradient with flipped, transposed taps.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace opensora {

// (B, T, H, W, C) with dense frames: W * C elements from row to row, C from column to column. Strides in elements,
// multiples of 8; pointers 16-byte aligned.
struct Clip {
  const void* data;
  int num_frames;
  int64_t sample_stride;
  int64_t frame_stride;
};

// The shape of a convolution, forward or backward. C and O are multiples of 8.
struct ConvolutionShape {
  int num_samples;
  int num_channels;
  int num_out;
  int height, width;  // of x and of the state
  int out_frames, out_height, out_width;
  int kernel[3], dilation[3], start[3];
  bool replicates_front;
  bool is_bfloat16;  // else float16; sums are float32
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
  const void* grad;    // (B, T', H', W', O)
  float* grad_weight;  // (K, O, C)
  float* workspace;    // as above
};

// Each returns cudaSuccess or the first error. Nothing waits for the device.
cudaError_t causal_conv3d_sm90a(const ConvolutionForward& convolution, cudaStream_t stream);
cudaError_t causal_conv3d_sm80(const ConvolutionForward& convolution, cudaStream_t stream);
cudaError_t causal_conv3d_weight_gradient_sm80(const ConvolutionWeightGradient& convolution, cudaStream_t stream);

// Floats of device memory that a launch needs besides its results.
int64_t causal_conv3d_sm90a_workspace(const ConvolutionForward& convolution);
int64_t causal_conv3d_sm80_workspace(const ConvolutionForward& convolution);
int64_t causal_conv3d_weight_gradient_sm80_workspace(const ConvolutionWeightGradient& convolution);

// Statistics of tiles, merged into those of frames in a fixed order. `partials` (B, T', tiles, O, 2): mean and squared
// deviations of each rectangle of tile_height x tile_width positions (rows of tiles first; cut off at the frame's
// edge). A kernel whose tiles are runs of positions passes height 1, width H' * W', tile_height 1.
struct FrameStatistics {
  const float* partials;
  float* statistics;  // (B, O, T', 2)
  int num_samples, num_frames, num_out;
  int height, width, tile_height, tile_width;
};
cudaError_t merge_frame_statistics(const FrameStatistics& merge, cudaStream_t stream);

}  // namespace opensora
