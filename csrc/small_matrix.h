// Products of small matrices in fp32 whose rows fill whole vectors, tile by tile in registers.
#pragma once

#include <utility>

#include "rows.h"

namespace opensora::OPENSORA_CAPABILITY {

// The left factor, element (i, k) at data[i * row_stride + k * depth_stride]: as it is or transposed.
struct LeftFactor {
  const float* data;
  int64_t row_stride, depth_stride;
};

#ifdef OPENSORA_HAS_AVX512
inline constexpr int most_tile_vectors = 5;
inline constexpr int tile_rows_of[] = {0, 12, 8, 8, 6, 5};  // 32 registers: the sums, a row of b, one of a
#else
inline constexpr int most_tile_vectors = 3;
inline constexpr int tile_rows_of[] = {0, 8, 5, 4};  // 16 registers
#endif

template <int num_rows, int num_vectors, bool accumulates>
inline void multiply_tile(const LeftFactor& a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                          int64_t depth) {
  Vector sums[num_rows][num_vectors];
#pragma GCC unroll 16
  for (int row = 0; row < num_rows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < num_vectors; ++i) {
      sums[row][i] = accumulates ? load(c + row * c_stride + i * num_lanes) : Vector{};
    }
  }
  const float* left = a.data;
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[num_vectors];
#pragma GCC unroll 8
    for (int i = 0; i < num_vectors; ++i) {
      right[i] = load(b + i * num_lanes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < num_rows; ++row) {
      const Vector factor = splat(left[row * a.row_stride]);
#pragma GCC unroll 8
      for (int i = 0; i < num_vectors; ++i) {
        sums[row][i] = fma(factor, right[i], sums[row][i]);
      }
    }
    left += a.depth_stride;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int row = 0; row < num_rows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < num_vectors; ++i) {
      store(c + row * c_stride + i * num_lanes, sums[row][i]);
    }
  }
}

// The last rows, fewer than a whole tile's.
template <int most_rows, int num_vectors, bool accumulates>
inline void multiply_rest(int64_t num_rows, const LeftFactor& a, const float* b, int64_t b_stride, float* c,
                          int64_t c_stride, int64_t depth) {
  if constexpr (most_rows > 0) {
    if (num_rows == most_rows) {
      multiply_tile<most_rows, num_vectors, accumulates>(a, b, b_stride, c, c_stride, depth);
    } else {
      multiply_rest<most_rows - 1, num_vectors, accumulates>(num_rows, a, b, b_stride, c, c_stride, depth);
    }
  }
}

template <int num_vectors, bool accumulates>
inline void multiply_columns(int64_t num_rows, LeftFactor a, const float* b, int64_t b_stride, float* c,
                             int64_t c_stride, int64_t depth) {
  constexpr int tile_rows = tile_rows_of[num_vectors];
  int64_t row = 0;
  for (; row + tile_rows <= num_rows; row += tile_rows) {
    multiply_tile<tile_rows, num_vectors, accumulates>(a, b, b_stride, c + row * c_stride, c_stride, depth);
    a.data += tile_rows * a.row_stride;
  }
  multiply_rest<tile_rows - 1, num_vectors, accumulates>(num_rows - row, a, b, b_stride, c + row * c_stride, c_stride,
                                                         depth);
}

// c = a b, or c + a b: `num_rows` rows of `num_columns` numbers, filled up to whole vectors.
template <bool accumulates = false>
inline void multiply(int64_t num_rows, int64_t num_columns, int64_t depth, const LeftFactor& a, const float* b,
                     int64_t b_stride, float* c, int64_t c_stride) {
  int64_t left = (num_columns + num_lanes - 1) / num_lanes;
  while (left > 0) {
    const int64_t num_parts = (left + most_tile_vectors - 1) / most_tile_vectors;
    const int64_t width = (left + num_parts - 1) / num_parts;
    switch (width) {
      case 1:
        multiply_columns<1, accumulates>(num_rows, a, b, b_stride, c, c_stride, depth);
        break;
      case 2:
        multiply_columns<2, accumulates>(num_rows, a, b, b_stride, c, c_stride, depth);
        break;
      case 3:
        multiply_columns<3, accumulates>(num_rows, a, b, b_stride, c, c_stride, depth);
        break;
#ifdef OPENSORA_HAS_AVX512
      case 4:
        multiply_columns<4, accumulates>(num_rows, a, b, b_stride, c, c_stride, depth);
        break;
      default:
        multiply_columns<5, accumulates>(num_rows, a, b, b_stride, c, c_stride, depth);
#endif
    }
    left -= width;
    b += width * num_lanes;
    c += width * num_lanes;
  }
}

// The lanes of a, then those of b, as numbered.
template <int... lane>
inline Vector chosen(Vector a, Vector b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, lane...);
#else  // GCC 11, that of Ubuntu 22.04
  return __builtin_shuffle(a, b, Integers{lane...});
#endif
}

// Row i of a square block keeps its lanes without the bit `distance` in their index, and gets those with it from lane
// to lane of row i + distance; that row the others: with every distance once, a transposition.
template <int distance, int... lane>
inline void exchange(Vector (&block)[num_lanes], std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int row = 0; row < num_lanes; ++row) {
    if ((row & distance) == 0) {
      const Vector a = block[row], b = block[row + distance];
      block[row] = chosen<(lane & distance ? num_lanes + lane - distance : lane)...>(a, b);
      block[row + distance] = chosen<(lane & distance ? num_lanes + lane : lane + distance)...>(a, b);
    }
  }
  if constexpr (distance > 1) {
    exchange<distance / 2>(block, std::integer_sequence<int, lane...>{});
  }
}

// target[column][row] = source[row][column], whole blocks at a time: both have memory for whole ones.
inline void transpose(const Rows& source, int64_t num_rows, int64_t num_columns, const Rows& target) {
  for (int64_t first_row = 0; first_row < num_rows; first_row += num_lanes) {
    for (int64_t first_column = 0; first_column < num_columns; first_column += num_lanes) {
      Vector block[num_lanes];
#pragma GCC unroll 16
      for (int i = 0; i < num_lanes; ++i) {
        block[i] = load(source[first_row + i] + first_column);
      }
      exchange<num_lanes / 2>(block, std::make_integer_sequence<int, num_lanes>{});
#pragma GCC unroll 16
      for (int i = 0; i < num_lanes; ++i) {
        store(target[first_column + i] + first_row, block[i]);
      }
    }
  }
}

}  // namespace opensora::OPENSORA_CAPABILITY
