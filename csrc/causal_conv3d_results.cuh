// How the sm_90a kernel of causal_conv3d writes a tile: bias, residual, rounding and moments, from the sums that
// wgmma leaves in registers. Places are those of causal_conv3d_maps.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "causal_conv3d_maps.h"
#include "half_types.h"
#include "moments.h"

namespace opensora::conv90 {

struct Results {
  const void* bias;
  const void* residual;
  void* out;
  float* partials;  // null unless statistics are wanted
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

template <class Type>
__device__ __forceinline__ float2 widened_pair(uint32_t word) {
  return {Type::widened(word), Type::widened(word >> 16)};
}

template <class Type>
__device__ __forceinline__ void add_words(const uint4& others, uint32_t (&words)[4]) {
  const uint32_t added[4] = {others.x, others.y, others.z, others.w};
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const float2 value = widened_pair<Type>(words[word]), other = widened_pair<Type>(added[word]);
    words[word] = Type::rounded(value.x + other.x, value.y + other.y);
  }
}

// What a warp's rows of eight channels have for mean and squared deviations, into shared memory for its block.
template <class Type, int kRows>
__device__ void gather_moments(const uint32_t (&written)[kRows][4], const bool (&counts)[kRows], int num_counted,
                               int lane, float* moments) {
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float2 total{0.0f, 0.0f}, squares{0.0f, 0.0f};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float2 value = widened_pair<Type>(written[row][word]);
      total.x += counts[row] ? value.x : 0.0f;
      total.y += counts[row] ? value.y : 0.0f;
    }
    const float num_positions = static_cast<float>(max(num_counted, 1));
    const float2 mean{sum_of_rows(total.x) / num_positions, sum_of_rows(total.y) / num_positions};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float2 value = widened_pair<Type>(written[row][word]);
      const float2 apart{value.x - mean.x, value.y - mean.y};
      squares.x += counts[row] ? apart.x * apart.x : 0.0f;
      squares.y += counts[row] ? apart.y * apart.y : 0.0f;
    }
    squares = {sum_of_rows(squares.x), sum_of_rows(squares.y)};
    if (lane < 4) {
      *reinterpret_cast<float4*>(moments + 4 * word) = {mean.x, squares.x, mean.y, squares.y};
    }
  }
}

// Bias, rounding, residual, rounding, 16 bytes a thread; and the moments of what was written.
template <class Type, int N>
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
      bias[word] = widened_pair<Type>(has_bias ? static_cast<const uint32_t*>(results.bias)[channel / 2] : 0);
    }
    const int channel = written_channel(thread, column_group);
    const bool is_channel = at.channel + channel < shape.num_out;
    uint32_t written[kRows][4];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int index = (column_group * 4 + word) * 4 + row % 2 * 2;
        written[row][word] =
            Type::rounded(sums[row / 2][index] + bias[word].x, sums[row / 2][index + 1] + bias[word].y);
      }
      exchange(written[row], lane);
      if (!is_row[row] || !is_channel) {
        continue;
      }
      if (results.residual != nullptr) {
        const uint16_t* source = static_cast<const uint16_t*>(results.residual) + offsets[row] + channel;
        add_words<Type>(*reinterpret_cast<const uint4*>(source), written[row]);
      }
      uint16_t* target = static_cast<uint16_t*>(results.out) + offsets[row] + channel;
      *reinterpret_cast<uint4*>(target) = {written[row][0], written[row][1], written[row][2], written[row][3]};
    }
    if (results.partials != nullptr) {
      gather_moments<Type>(written, is_row, num_counted, lane, shared_moments + (warp * N + channel) * 2);
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
