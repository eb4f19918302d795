// The mma.sync convolution's kernels in parts that touch the machine only through a few functions, so that the replay
// on the host runs these same parts: every thread's copies, every lane's matrix addresses, the pipeline, the epilogue.
//
// A `Copy` takes (byte of shared memory, address, whether it is read; else 16 bytes of zeros). A `Warp` has
//   Matrices load(byte_of_lane)   ldmatrix.x4, and load_transposed
//   void multiply(Sums&, Matrices a, Matrices b, half)   mma.m16n8k16 with the half-th 8 columns of b
//   void add_rows(Sums&, Matrices a)   the same with ones for b
//   void each_lane(Sums, function)   function(lane, pointer to its 4 sums) for each lane
#pragma once

#include "causal_conv3d_sm80_maps.h"
#include "half_types.h"

#ifdef __CUDACC__
#define OPENSORA_KERNEL_PART __device__ __forceinline__
#define OPENSORA_UNROLL _Pragma("unroll")
#define OPENSORA_ONE_BY_ONE _Pragma("unroll 1")
#else
#define OPENSORA_KERNEL_PART inline
#define OPENSORA_UNROLL
#define OPENSORA_ONE_BY_ONE
#endif

namespace opensora::sm80 {

struct alignas(kVectorBytes) Vector {
  uint32_t words[4];
};

struct alignas(8) Pair {
  float first, second;
};

struct Operands {
  const uint16_t* x;
  const uint16_t* state;
  const uint16_t* weight;    // (K, O, C)
  const uint16_t* bias;      // (O,) or null
  const uint16_t* residual;  // as out, or null
  uint16_t* out;             // (B, T', H', W', O)
  float* partials;           // (B, T', tiles, O, 2) or null
};

// A ring of slots in shared memory, filled `kNumStages - 1` steps ahead. Products that run by themselves are started
// first, so that the next copies are worked out meanwhile.
template <bool kMultipliesFirst = false, class Copy, class Commit, class Wait, class Multiply>
OPENSORA_KERNEL_PART void run_pipeline(int num_steps, Copy copy, Commit commit, Wait wait, Multiply multiply) {
  for (int step = 0; step < kNumStages - 1; ++step) {
    if (step < num_steps) {
      copy(step, step);
    }
    commit();  // also of nothing, so that the number of groups tells which step has arrived
  }
  int slot = 0, free_slot = kNumStages - 1;
  for (int step = 0; step < num_steps; ++step) {
    // All groups but the newest kNumStages - 2 have arrived for every thread, and no warp still reads the slot that
    // the step before used, which is filled next.
    wait();
    if constexpr (kMultipliesFirst) {
      multiply(slot);
    }
    if (step + kNumStages - 1 < num_steps) {
      copy(step + kNumStages - 1, free_slot);
    }
    commit();
    if constexpr (!kMultipliesFirst) {
      multiply(slot);
    }
    free_slot = slot;
    slot = slot + 1 == kNumStages ? 0 : slot + 1;
  }
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <int kTileOut>
struct ForwardLayout {
  static_assert(kTileOut % 32 == 0 && kTileOut <= 128);
  static constexpr int kRowVectors = kStepVectors;
  static constexpr int kXBytes = kTilePositions * kRowVectors * kVectorBytes;
  static constexpr int kSlotBytes = kXBytes + kTileOut * kRowVectors * kVectorBytes;
  static constexpr int kStagedBytes = kTilePositions * (kTileOut * 2 + kVectorBytes);
  static constexpr int kNumGroups = 4;  // of rows, for the statistics
  static constexpr int kTableBytes = kNumGroups * kTileOut * 4;
  static constexpr int kFramesByte = kNumStages * kSlotBytes;  // where each frame of taps begins to read
  static constexpr int kBytes = kFramesByte + (kMostTaps + 1) * 8;
  static constexpr int kMatricesX = 2;                // 16 x 16, of a warp's 32 positions
  static constexpr int kMatricesOut = kTileOut / 32;  // 16 x 16, of a warp's channels
  static_assert(kStagedBytes + 3 * kTableBytes <= kFramesByte);
  static_assert(kNumGroups * (kTileOut / 2) <= kNumThreads);
};

// What one thread copies: always the same rows of the two tiles. `step` is called for one step after another.
template <int kTileOut>
class ForwardCopies {
 public:
  // A barrier must follow: threads find the frames of the sample in shared memory.
  OPENSORA_KERNEL_PART ForwardCopies(int thread, char* shared, const ForwardBlock& block, const Operands& operands,
                                     const Geometry& geometry)
      : g(geometry), o(operands), thread_(thread), block_(block) {
    frames_ = reinterpret_cast<const uint16_t**>(shared + ForwardLayout<kTileOut>::kFramesByte);
    if (thread < g.t.count) {
      const FramePlace frame = frame_place(block.sample, block.frame * g.t.step + g.t.start + thread * g.t.dilation, g);
      frames_[thread] = (frame.is_state ? o.state : o.x) + frame.offset;
    }
    const TapRange taps = taps_of_frame(block.frame, g);
    end_ = taps.end;
    walk_ = onward({0, 0, taps.begin}, copied_cell<kStepVectors>(thread, 0).vector, g);
    OPENSORA_UNROLL
    for (int i = 0; i < kNumRows; ++i) {
      windows_[i] = window_of(position(i), g);
    }
  }

  OPENSORA_KERNEL_PART int num_steps() const {
    const TapRange taps = taps_of_frame(block_.frame, g);
    return ceil_div((taps.end - taps.begin) * g.h.count * g.num_vectors_per_row, kStepVectors);
  }

  template <class CopyX, class CopyWeight>
  OPENSORA_KERNEL_PART void step(int slot_byte, CopyX copy_x, CopyWeight copy_weight) {
    const bool is_summed = walk_.t < end_;
    const TapVector tap = tap_of_walk(walk_, g);
    walk_ = onward(walk_, kStepVectors, g);
    const uint16_t* x = frames_[is_summed ? tap.t : 0] + tap.channel;
    if (g.space_padding == SpacePadding::zeros) {
      const uint32_t bits = is_summed ? bits_of_tap(tap.h, tap.w) : kNever;
      x += wide_product(pixels_to_tap(tap.h, tap.w, g), g.num_channels);
      OPENSORA_UNROLL
      for (int i = 0; i < kNumRows; ++i) {
        copy_x(slot_byte + byte(i), x + wide_product(windows_[i].first_pixel, g.num_channels),
               (windows_[i].is_inside & bits) == bits);
      }
    } else {
      OPENSORA_ONE_BY_ONE
      for (int i = 0; i < kNumRows; ++i) {
        const int pixel = folded_pixel(position(i), tap.h, tap.w, g);
        copy_x(slot_byte + byte(i), x + wide_product(pixel, g.num_channels), is_summed);
      }
    }
    const int first_out = block_.first_out + copied_cell<kStepVectors>(thread_, 0).row;
    const int64_t row = static_cast<int64_t>(tap.tap) * g.num_out + first_out;
    const uint16_t* weight = o.weight + row * g.num_channels + tap.channel;
    OPENSORA_UNROLL
    for (int i = 0; i < kTileOut / kRowsAtOnce; ++i) {
      copy_weight(slot_byte + ForwardLayout<kTileOut>::kXBytes + byte(i),
                  weight + wide_product(i * kRowsAtOnce, g.num_channels),
                  is_summed && first_out + i * kRowsAtOnce < g.num_out);
    }
  }

 private:
  static constexpr int kRowsAtOnce = kNumThreads / kStepVectors;
  static constexpr int kNumRows = kTilePositions / kRowsAtOnce;
  static_assert(kTileOut % kRowsAtOnce == 0);

  OPENSORA_KERNEL_PART int byte(int i) const {
    const Cell cell = copied_cell<kStepVectors>(thread_, i);
    return swizzled<kStepVectors>(cell.row, cell.vector);
  }

  // Behind the last position its copy, of which nothing is stored.
  OPENSORA_KERNEL_PART Position position(int i) const {
    const int index = block_.first_position + copied_cell<kStepVectors>(thread_, i).row;
    return position_of(index < g.num_positions ? index : g.num_positions - 1, g);
  }

  const Geometry& g;
  const Operands& o;
  int thread_;
  ForwardBlock block_;
  const uint16_t** frames_;
  int end_;
  TapWalk walk_;
  Window windows_[kNumRows];
};

template <int kTileOut, class Warp, class Sums>
OPENSORA_KERNEL_PART void multiply_forward(Warp& warp, int slot_byte,
                                           Sums (&sums)[2][ForwardLayout<kTileOut>::kMatricesOut * 2]) {
  using Layout = ForwardLayout<kTileOut>;
  constexpr int kRowBytes = kStepVectors * kVectorBytes;
  const Element origin = forward_warp_origin(warp.index, kTileOut);
  OPENSORA_UNROLL
  for (int k = 0; k < kStepVectors; k += 2) {
    typename Warp::Matrices weight[Layout::kMatricesOut];
    OPENSORA_UNROLL
    for (int j = 0; j < Layout::kMatricesOut; ++j) {
      weight[j] = warp.load([&](int lane) {
        const Cell cell = matrix_cell_vectors_first(lane);
        const int byte = swizzled<kStepVectors>(origin.column + cell.row, cell.vector);
        return slot_byte + Layout::kXBytes + 16 * j * kRowBytes + other_vector(byte, k);
      });
    }
    OPENSORA_UNROLL
    for (int i = 0; i < Layout::kMatricesX; ++i) {
      const typename Warp::Matrices x = warp.load([&](int lane) {
        const Cell cell = matrix_cell_rows_first(lane);
        const int byte = swizzled<kStepVectors>(origin.row + cell.row, cell.vector);
        return slot_byte + 16 * i * kRowBytes + other_vector(byte, k);
      });
      OPENSORA_UNROLL
      for (int j = 0; j < 2 * Layout::kMatricesOut; ++j) {
        warp.multiply(sums[i][j], x, weight[j / 2], j % 2);
      }
    }
  }
}

// Adds the bias and rounds, into shared memory.
template <class Type, int kTileOut, class Warp, class Sums>
OPENSORA_KERNEL_PART void stage_forward(Warp& warp, Sums (&sums)[2][ForwardLayout<kTileOut>::kMatricesOut * 2],
                                        char* shared, const ForwardBlock& block, const Operands& o, const Geometry& g) {
  const Element origin = forward_warp_origin(warp.index, kTileOut);
  OPENSORA_UNROLL
  for (int j = 0; j < 2 * ForwardLayout<kTileOut>::kMatricesOut; ++j) {
    OPENSORA_UNROLL
    for (int i = 0; i < ForwardLayout<kTileOut>::kMatricesX; ++i) {
      warp.each_lane(sums[i][j], [&](int lane, const float* values) {
        const int channel = origin.column + 8 * j + element_of_c(lane, 0).column;
        float bias[2] = {0.0f, 0.0f};
        if (o.bias != nullptr && block.first_out + channel < g.num_out) {
          bias[0] = Type::widened(o.bias[block.first_out + channel]);
          bias[1] = Type::widened(o.bias[block.first_out + channel + 1]);
        }
        OPENSORA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = origin.row + 16 * i + element_of_c(lane, 2 * half).row;
          *reinterpret_cast<uint32_t*>(shared + staged<kTileOut>(row, channel)) =
              Type::rounded(values[2 * half] + bias[0], values[2 * half + 1] + bias[1]);
        }
      });
    }
  }
}

// Adds the residual and rounds again; where statistics follow, what was stored goes back into shared memory.
template <class Type, int kTileOut>
OPENSORA_KERNEL_PART void store_forward(int thread, char* shared, const ForwardBlock& block, const Operands& o,
                                        const Geometry& g) {
  constexpr int kVectorsOut = kTileOut / kVector;
  const int64_t plane = static_cast<int64_t>(block.sample) * g.num_frames + block.frame;
  OPENSORA_UNROLL
  for (int i = 0; i < kTilePositions * kVectorsOut / kNumThreads; ++i) {
    const int index = i * kNumThreads + thread;
    const int row = index / kVectorsOut, channel = index % kVectorsOut * kVector;
    const int position = block.first_position + row, out = block.first_out + channel;
    if (position >= g.num_positions || out >= g.num_out) {
      continue;
    }
    Vector* staging = reinterpret_cast<Vector*>(shared + staged<kTileOut>(row, channel));
    Vector value = *staging;
    const int64_t offset = (plane * g.num_positions + position) * g.num_out + out;
    if (o.residual != nullptr) {
      const Vector residual = *reinterpret_cast<const Vector*>(o.residual + offset);
      OPENSORA_UNROLL
      for (int word = 0; word < 4; ++word) {
        const uint32_t ours = value.words[word], theirs = residual.words[word];
        value.words[word] = Type::rounded(Type::widened(ours) + Type::widened(theirs),
                                          Type::widened(ours >> 16) + Type::widened(theirs >> 16));
      }
      if (o.partials != nullptr) {
        *staging = value;
      }
    }
    *reinterpret_cast<Vector*>(o.out + offset) = value;
  }
}

// Statistics of a tile in three parts, with a barrier before each: four threads for two channels, a quarter of the
// rows each. `table` 0 holds their sums, 1 and 2 the sums of deviations and of their squares.
template <int kTileOut>
OPENSORA_KERNEL_PART float* statistics_table(char* shared, int table) {
  using Layout = ForwardLayout<kTileOut>;
  return reinterpret_cast<float*>(shared + Layout::kStagedBytes + table * Layout::kTableBytes);
}

template <class Type, int kTileOut, class Function>
OPENSORA_KERNEL_PART void each_staged_pair(int thread, int num_rows, const char* shared, Function function) {
  constexpr int kNumPairs = kTileOut / 2, kRows = kTilePositions / ForwardLayout<kTileOut>::kNumGroups;
  const int first = thread / kNumPairs * kRows;
  for (int row = first; row < first + kRows && row < num_rows; ++row) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(shared + staged<kTileOut>(row, thread % kNumPairs * 2));
    function(Type::widened(pair), Type::widened(pair >> 16));
  }
}

template <class Type, int kTileOut>
OPENSORA_KERNEL_PART void sum_tile(int thread, int num_rows, char* shared) {
  constexpr int kNumPairs = kTileOut / 2;
  if (thread >= ForwardLayout<kTileOut>::kNumGroups * kNumPairs) {
    return;
  }
  float sum[2] = {0.0f, 0.0f};
  each_staged_pair<Type, kTileOut>(thread, num_rows, shared, [&](float first, float second) {
    sum[0] += first;
    sum[1] += second;
  });
  float* sums = statistics_table<kTileOut>(shared, 0) + thread / kNumPairs * kTileOut + thread % kNumPairs * 2;
  sums[0] = sum[0];
  sums[1] = sum[1];
}

template <int kTileOut>
OPENSORA_KERNEL_PART float sum_of_groups(const float* table, int channel) {
  float sum = 0.0f;
  for (int group = 0; group < ForwardLayout<kTileOut>::kNumGroups; ++group) {
    sum += table[group * kTileOut + channel];
  }
  return sum;
}

template <class Type, int kTileOut>
OPENSORA_KERNEL_PART void sum_deviations(int thread, int num_rows, char* shared) {
  constexpr int kNumPairs = kTileOut / 2;
  if (thread >= ForwardLayout<kTileOut>::kNumGroups * kNumPairs) {
    return;
  }
  const int channel = thread % kNumPairs * 2;
  const float* sums = statistics_table<kTileOut>(shared, 0);
  const float mean[2] = {sum_of_groups<kTileOut>(sums, channel) / num_rows,
                         sum_of_groups<kTileOut>(sums, channel + 1) / num_rows};
  float sum[2] = {0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
  each_staged_pair<Type, kTileOut>(thread, num_rows, shared, [&](float first, float second) {
    const float deviation[2] = {first - mean[0], second - mean[1]};
    for (int i = 0; i < 2; ++i) {
      sum[i] += deviation[i];
      squares[i] += deviation[i] * deviation[i];
    }
  });
  for (int i = 0; i < 2; ++i) {
    statistics_table<kTileOut>(shared, 1)[thread / kNumPairs * kTileOut + channel + i] = sum[i];
    statistics_table<kTileOut>(shared, 2)[thread / kNumPairs * kTileOut + channel + i] = squares[i];
  }
}

// The deviations' own sum is what the mean's rounding lost: a gradient of these statistics adds (out - mean) up again,
// where it would not cancel.
template <int kTileOut>
OPENSORA_KERNEL_PART void store_statistics(int thread, int num_rows, char* shared, const ForwardBlock& block,
                                           const Operands& o, const Geometry& g) {
  const int out = block.first_out + thread;
  if (thread >= kTileOut || out >= g.num_out) {
    return;
  }
  const float mean = sum_of_groups<kTileOut>(statistics_table<kTileOut>(shared, 0), thread) / num_rows;
  const float lost = sum_of_groups<kTileOut>(statistics_table<kTileOut>(shared, 1), thread) / num_rows;
  const float squares = sum_of_groups<kTileOut>(statistics_table<kTileOut>(shared, 2), thread);
  const int64_t plane = static_cast<int64_t>(block.sample) * g.num_frames + block.frame;
  float* target = o.partials + ((plane * num_tiles_of_frame(g) + block.tile) * g.num_out + out) * 2;
  target[0] = mean + lost;
  target[1] = squares - lost * lost * num_rows;
}

OPENSORA_KERNEL_PART int num_rows_of(const ForwardBlock& block, const Geometry& g) {
  const int num_left = g.num_positions - block.first_position;
  return num_left < kTilePositions ? num_left : kTilePositions;
}

}  // namespace opensora::sm80
