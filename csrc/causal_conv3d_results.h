// How the sm_90a kernel of causal_conv3d writes a tile: bias, residual, rounding and moments, from the sums that
// wgmma leaves in registers. Places are those of causal_conv3d_maps.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "causal_conv3d_maps.h"
#include "moments.h"

namespace opensora::conv90 {

struct Results {
  const void* bias;
  const void* residual;
  void* out;
  float* partials;  // null unless statistics are wanted
};

template <typename Element>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  static __device__ uint32_t packed(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ float2 unpacked(uint32_t word) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
  }
};

template <>
struct Pair<__half> {
  static __device__ uint32_t packed(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ float2 unpacked(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
};

__device__ __forceinline__ void exchange(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      // both places are constants, so that words stay in registers
      const int of_lower = given_word(0, mask, pair), of_upper = given_word(mask, mask, pair);
      const bool is_upper = (lane & mask) != 0;
      const uint32_t got = __shfl_xor_sync(0xFFFFFFFF, is_upper ? words[of_upper] : words[of_lower], mask);
      words[of_upper] = is_upper ? got : words[of_upper];
      words[of_lower] = is_upper ? words[of_lower] : got;
    }
  }
}

// Sum over the eight lanes that hold the same channels.
__device__ __forceinline__ float sum_of_rows(float value) {
#pragma unroll
  for (int mask = 4; mask <= 16; mask *= 2) {
    value += __shfl_xor_sync(0xFFFFFFFF, value, mask);
  }
  return value;
}

// What a warp's rows of eight channels have for mean and squared deviations, into shared memory for its block.
template <typename Element, int kRows>
__device__ void gather_moments(const uint4 (&written)[kRows], const bool (&counts)[kRows], int num_counted, int lane,
                               float* moments) {
  float mean[8] = {}, squares[8] = {};
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const uint32_t words[4] = {written[row].x, written[row].y, written[row].z, written[row].w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const float2 value = Pair<Element>::unpacked(words[word]);
        const float low = pass == 0 ? value.x : value.x - mean[2 * word];
        const float high = pass == 0 ? value.y : value.y - mean[2 * word + 1];
        squares[2 * word] += counts[row] ? (pass == 0 ? low : low * low) : 0.0f;
        squares[2 * word + 1] += counts[row] ? (pass == 0 ? high : high * high) : 0.0f;
      }
    }
#pragma unroll
    for (int channel = 0; channel < 8; ++channel) {
      const float total = sum_of_rows(squares[channel]);
      mean[channel] = pass == 0 ? total / max(num_counted, 1) : mean[channel];
      squares[channel] = pass == 0 ? 0.0f : total;
    }
  }
  if (lane < 4) {
#pragma unroll
    for (int channel = 0; channel < 8; ++channel) {
      moments[2 * channel] = mean[channel];
      moments[2 * channel + 1] = squares[channel];
    }
  }
}

// Bias, rounding, residual, rounding, 16 bytes a thread; and the moments of what was written.
template <typename Element, int N>
__device__ void write_tile(const Schedule& schedule, const Results& results, const TilePosition& at, int consumer,
                           const float (&sums)[Tile<N>::kBlocks][N / 2], float* shared_moments) {
  constexpr int kBlocks = Tile<N>::kBlocks, kRows = 2 * kBlocks;
  const ConvolutionShape& shape = schedule.shape;
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = consumer * 4 + thread / 32;
  int64_t offsets[kRows];
  bool is_row[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int within = fragment_row(thread, row % 2 * 2);
    const int h = at.row + tile_row(consumer * kBlocks + row / 2, within), w = at.column + tile_column(within);
    is_row[row] = is_inside(shape, h, w);
    offsets[row] = result_offset(shape, at, h, w, at.channel);
  }
  const int num_counted = num_positions(schedule, at, warp);
#pragma unroll
  for (int column_group = 0; column_group < N / 32; ++column_group) {
    float2 bias[4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const int channel = at.channel + fragment_channel(thread, (column_group * 4 + word) * 4);
      const bool has_bias = results.bias != nullptr && channel < shape.num_out;
      bias[word] = has_bias ? Pair<Element>::unpacked(static_cast<const uint32_t*>(results.bias)[channel / 2])
                            : float2{0.0f, 0.0f};
    }
    const int channel = written_channel(thread, column_group);
    const bool is_channel = at.channel + channel < shape.num_out;
    uint4 written[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      uint32_t words[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int index = (column_group * 4 + word) * 4 + row % 2 * 2;
        words[word] =
            Pair<Element>::packed(sums[row / 2][index] + bias[word].x, sums[row / 2][index + 1] + bias[word].y);
      }
      exchange(words, lane);
      if (is_row[row] && is_channel && results.residual != nullptr) {
        const uint4 residual =
            *reinterpret_cast<const uint4*>(static_cast<const Element*>(results.residual) + offsets[row] + channel);
        const uint32_t others[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const float2 value = Pair<Element>::unpacked(words[word]), other = Pair<Element>::unpacked(others[word]);
          words[word] = Pair<Element>::packed(value.x + other.x, value.y + other.y);
        }
      }
      written[row] = {words[0], words[1], words[2], words[3]};
      if (is_row[row] && is_channel) {
        *reinterpret_cast<uint4*>(static_cast<Element*>(results.out) + offsets[row] + channel) = written[row];
      }
    }
    if (results.partials != nullptr) {
      gather_moments<Element>(written, is_row, num_counted, lane, shared_moments + (warp * N + channel) * 2);
    }
  }
}

// Barrier 0 is __syncthreads, which the producer would have to join.
__device__ __forceinline__ void meet_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(128 * kNumConsumers) : "memory");
}

// The moments of the tile's eight warps, merged in their order: one thread for each channel.
template <int N>
__device__ void write_moments(const Schedule& schedule, const Results& results, const TilePosition& at,
                              const float* shared_moments) {
  meet_consumers();
  const int channel = threadIdx.x - 128;
  if (channel < N && at.channel + channel < schedule.shape.num_out) {
    Moments all{0.0f, 0.0f, 0.0f};
    for (int warp = 0; warp < kNumWarps; ++warp) {
      const float* moments = shared_moments + (warp * N + channel) * 2;
      const float count = static_cast<float>(num_positions(schedule, at, warp));
      all = merged(all, {count, moments[0], moments[1]});
    }
    float2* partial = reinterpret_cast<float2*>(results.partials + partial_offset(schedule, at, at.channel + channel));
    *partial = {all.mean, all.squares};
  }
  meet_consumers();  // before the next tile's moments take the place of these
}

}  // namespace opensora::conv90
