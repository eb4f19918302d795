// What the mma.sync kernels of causal_conv3d know of one convolution, and arithmetic that its index maps share.
// Axes: B batch, C input and O output channels, T frames, H height, W width.
#pragma once

#include <cstdint>

#include "causal_conv3d_shape.h"
#include "host_device.h"

namespace opensora::sm80 {

constexpr int kNumThreads = 256;
constexpr int kNumWarps = kNumThreads / 32;
constexpr int kVector = 8;  // elements of 2 bytes in one 16-byte copy
constexpr int kVectorBytes = 16;
constexpr int kMostTaps = 15;            // along an axis
constexpr int kNumStages = 3;            // of 32 KB at most: two blocks fit into an SM of Hopper, one into Ampere's
constexpr int kTilePositions = 128;      // forward: positions of one block
constexpr int kStepVectors = 8;          // forward: 64 of the (tap, channel) pairs in one step
constexpr int kStepPositions = 64;       // weight gradient: positions in one step
constexpr int kTileColumns = 128;        // weight gradient: (tap, channel) pairs of one block
constexpr int kGradientRowVectors = 16;  // weight gradient: a row of shared memory, of either factor

// Exact n / divisor for 0 <= n < 2^31 by one high product, since a division costs some twenty instructions and every
// gathered row needs one.
struct Divisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(int value) : divisor(value > 0 ? static_cast<uint32_t>(value) : 1) {  // 0 of empty tensors
    while ((uint64_t{1} << shift) < divisor) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
};

OPENSORA_HOST_DEVICE int quotient(int n, const Divisor& by) {
#ifdef __CUDA_ARCH__
  const uint32_t high = __umulhi(static_cast<uint32_t>(n), by.multiplier);
#else
  const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * by.multiplier) >> 32);
#endif
  return static_cast<int>((high + static_cast<uint32_t>(n)) >> by.shift);
}

// In one instruction: the compiler makes five of a product of sign-extended numbers.
OPENSORA_HOST_DEVICE int64_t wide_product(int a, int b) {
#ifdef __CUDA_ARCH__
  int64_t wide;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(wide) : "r"(a), "r"(b));
  return wide;
#else
  return static_cast<int64_t>(a) * b;
#endif
}

OPENSORA_HOST_DEVICE constexpr int ceil_div(int n, int by) {
  return (n + by - 1) / by;
}

// Along one axis, output i reads the inputs i * step + start + k * dilation for k < count.
struct Taps {
  int count;
  int step;
  int start;
  int dilation;
};

enum class SpacePadding : int { zeros = 0, replicate = 1, reflect = 2 };

// What one convolution reads and how far its results go. Input frames are counted from the state's first.
struct Geometry {
  int num_samples;
  int num_channels;  // C, a multiple of 8
  int num_out;       // O, a multiple of 8
  int num_state;     // frames of the state before x
  int num_frames_in;
  int height_in;
  int width_in;
  int num_frames;  // of the result
  int height;
  int width;
  Taps t, h, w;
  bool repeats_first_frame;  // else frames before the first are zeros
  SpacePadding space_padding;
  // Strides in elements, multiples of 8; rows, columns and channels of x and state are dense.
  int64_t stride_xb, stride_xt;
  int64_t stride_sb, stride_st;
  // What follows from these.
  int num_positions;        // height * width
  int num_vectors_per_tap;  // C / 8
  int num_vectors_per_row;  // of the taps of one kernel row
  Divisor by_width, by_vectors_per_row, by_vectors_per_block, by_last_block, by_taps_h;
  Divisor by_steps_per_frame, by_frames;  // of the weight gradient
};

// Of a clip in memory: frames, and strides in elements.
struct ClipPlace {
  int num_frames;
  int64_t sample_stride, frame_stride;
};

inline Geometry geometry_of(const ConvolutionShape& shape, const ClipPlace& x, const ClipPlace& state) {
  Geometry g{};
  g.num_samples = shape.num_samples;
  g.num_channels = shape.num_channels;
  g.num_out = shape.num_out;
  g.num_state = state.num_frames;
  g.num_frames_in = x.num_frames;
  g.height_in = shape.height;
  g.width_in = shape.width;
  g.num_frames = shape.out_frames;
  g.height = shape.out_height;
  g.width = shape.out_width;
  Taps* const axes[3] = {&g.t, &g.h, &g.w};
  for (int axis = 0; axis < 3; ++axis) {
    *axes[axis] = {shape.kernel[axis], shape.step[axis], shape.start[axis], shape.dilation[axis]};
  }
  g.repeats_first_frame = shape.replicates_front && state.num_frames == 0;
  g.space_padding = static_cast<SpacePadding>(shape.space_padding);
  g.stride_xb = x.sample_stride;
  g.stride_xt = x.frame_stride;
  g.stride_sb = state.sample_stride;
  g.stride_st = state.frame_stride;
  g.num_positions = g.height * g.width;
  g.num_vectors_per_tap = g.num_channels / kVector;
  g.num_vectors_per_row = g.w.count * g.num_vectors_per_tap;
  const int num_left = g.num_vectors_per_tap % kStepVectors;
  g.by_width = Divisor(g.width);
  g.by_vectors_per_row = Divisor(g.num_vectors_per_row);
  g.by_vectors_per_block = Divisor(g.w.count * kStepVectors);
  g.by_last_block = Divisor(num_left > 0 ? num_left : 1);
  g.by_taps_h = Divisor(g.h.count);
  g.by_steps_per_frame = Divisor(ceil_div(g.num_positions, kStepPositions));
  g.by_frames = Divisor(g.num_frames);
  return g;
}

// Whether 32 bits count what the kernels count in them, and 15 bits the taps of a row.
inline bool is_served(const Geometry& g) {
  constexpr int64_t kMost = INT32_MAX - 2 * kTilePositions;
  const int64_t num_vectors = static_cast<int64_t>(g.t.count) * g.h.count * g.num_vectors_per_row;
  return g.t.count <= kMostTaps && g.h.count <= kMostTaps && g.w.count <= kMostTaps &&
         static_cast<int64_t>(g.height) * g.width <= kMost &&
         2 * static_cast<int64_t>(g.height_in) * g.width_in <= kMost && num_vectors <= kMost / kVector;
}

}  // namespace opensora::sm80
