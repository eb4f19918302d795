// The weight gradient by wgmma, in parts as in causal_conv3d_sm80_gradient_steps.h, whose copies it shares: cp.async
// gathers what strides and borders ask for, which the tensor memory accelerator can't.
//
// Rows of the product are columns of the mma.sync kernel, flat over taps and channels, 64 for each of two warpgroups;
// its columns are output channels, since they come in 96 as well. Both factors are transposed ("MN-major"): along the
// sum lie rows of shared memory.
#pragma once

#include "causal_conv3d_sm80_gradient_steps.h"

namespace opensora::sm90 {

using namespace sm80;

constexpr int kNumGroups = 2;
constexpr int kGroupThreads = kNumThreads / kNumGroups;
constexpr int kDepth = 16;  // rows of shared memory that one wgmma sums over
static_assert(kNumGroups * 64 == kTileColumns);

// A transposed factor in halves of 64 columns: start address / 16 in bits 0-13; from half to half / 16 in bits 16-29;
// from eight rows of 128 bytes to the next eight / 16 in bits 32-45; layout 1, the 128-byte swizzle, in bits 62-63.
OPENSORA_HOST_DEVICE constexpr uint64_t transposed_operand(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{kHalfBytes >> 4} << 16 |
         uint64_t{8 * kRowBytes >> 4} << 32 | uint64_t{1} << 62;
}

// A `Group` has multiply(Sums&, byte of x, byte of the gradient): wgmma.m64nNk16, both factors transposed.
template <int kTileOut, class Group, class Sums>
OPENSORA_KERNEL_PART void multiply_gradient(Group& group, int slot_byte, Sums& sums) {
  const int x_byte = slot_byte + GradientLayout<kTileOut>::kGradBytes + group.index * kHalfBytes;
  OPENSORA_UNROLL
  for (int k = 0; k < kStepPositions; k += kDepth) {
    group.multiply(sums, x_byte + k * kRowBytes, slot_byte + k * kRowBytes);
  }
}

// The bias by mma.sync with ones, 16 output channels for each warp of the first block.
template <int kTileOut>
OPENSORA_KERNEL_PART bool warp_sums_bias(int warp, const GradientBlock& block, const GradientOperands& o) {
  return o.bias_sums != nullptr && block.is_first_of_row && 16 * warp < kTileOut;
}

template <class Warp, class Sums>
OPENSORA_KERNEL_PART void multiply_bias(Warp& warp, int slot_byte, Sums& bias_sums) {
  OPENSORA_UNROLL
  for (int k = 0; k < kStepPositions; k += 16) {
    const typename Warp::Matrices grad = warp.load_transposed([&](int lane) {
      return slot_byte + k * kRowBytes + byte_of_cell(matrix_cell_vectors_first(lane), 2 * warp.index);
    });
    warp.add_rows(bias_sums, grad);
  }
}

// Row (of 64) and column (of kTileOut) of the sum `index` of a thread of a group.
OPENSORA_HOST_DEVICE constexpr Element element_of_sum(int thread, int index) {
  return {thread / 32 * 16 + thread % 32 / 4 + index / 2 % 2 * 8, index / 4 * 8 + thread % 4 * 2 + index % 2};
}

// `values` are the kTileOut / 2 sums of thread `thread` of group `group`.
template <int kTileOut>
OPENSORA_KERNEL_PART void store_gradient(int group, int thread, const float* values, const GradientBlock& block,
                                         int split, const GradientOperands& o, const Geometry& g) {
  OPENSORA_UNROLL
  for (int half = 0; half < 2; ++half) {  // rows 8 apart, of two vectors
    const int column = group * 64 + element_of_sum(thread, 2 * half).row;
    const int vector = block.first_vector + column / kVector;
    if (vector >= num_gradient_vectors(g)) {
      continue;
    }
    const TapVector tap = tap_of_vector(vector, g);
    const int64_t offset = static_cast<int64_t>(tap.tap) * g.num_out * g.num_channels + tap.channel + column % kVector;
    float* target = o.sums + split * o.split_stride + offset;
    OPENSORA_UNROLL
    for (int index = 0; index < kTileOut / 2; ++index) {
      if (index / 2 % 2 == half) {
        const int out = block.first_out + element_of_sum(thread, index).column;
        if (out < g.num_out) {
          target[wide_product(out, g.num_channels)] = values[index];
        }
      }
    }
  }
}

template <class Warp, class Sums>
OPENSORA_KERNEL_PART void store_bias(Warp& warp, const Sums& bias_sums, const GradientBlock& block, int split,
                                     const GradientOperands& o, const Geometry& g) {
  warp.each_lane(bias_sums, [&](int lane, const float* values) {
    OPENSORA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Element element = element_of_c(lane, 2 * half);  // every column holds the same sum
      const int out = block.first_out + 16 * warp.index + element.row;
      if (element.column == 0 && out < g.num_out) {
        o.bias_sums[split * o.split_stride + out] = values[2 * half];
      }
    }
  });
}

}  // namespace opensora::sm90
