// The mma.sync weight gradient's kernel in parts, as causal_conv3d_sm80_steps.h has those of the convolution.
//
// dW[o, tap, c] = sum over positions of grad[position, o] * x[what tap reads there, c]. Both factors lie in shared
// memory as they do in memory, a row for each position, and ldmatrix transposes them.
#pragma once

#include "causal_conv3d_sm80_steps.h"

namespace opensora::sm80 {

struct GradientOperands {
  const uint16_t* x;
  const uint16_t* state;
  const uint16_t* grad;  // (B, T', H', W', O)
  float* sums;           // (K, O, C) for each split, `split_stride` floats apart
  float* bias_sums;      // (O,) for each split, likewise; or null
  int64_t split_stride;
};

template <int kTileOut>
struct GradientLayout {
  static_assert(kTileOut % 32 == 0 && kTileOut <= kGradientRowVectors * kVector);
  static constexpr int kGradBytes = kStepPositions * kGradientRowVectors * kVectorBytes;
  static constexpr int kSlotBytes = 2 * kGradBytes;
  static constexpr int kBytes = kNumStages * kSlotBytes;
  static constexpr int kMatricesOut = kTileOut / 32;  // 16 x 16, of a warp's output channels
  static constexpr int kMatricesX = 2;                // 16 x 16, of a warp's 32 columns
};

// What one thread copies: it keeps its output channels, its tap and its channels through all steps.
template <int kTileOut>
class GradientCopies {
 public:
  OPENSORA_KERNEL_PART GradientCopies(int thread, const GradientBlock& block, int first_step,
                                      const GradientOperands& operands, const Geometry& geometry)
      : g(geometry), o(operands), thread_(thread), first_step_(first_step) {
    const int vector = copied_cell<kGradientRowVectors>(thread, 0).vector;
    out_ = block.first_out + vector * kVector;
    has_out_ = vector < kTileOut / kVector && out_ < g.num_out;
    has_column_ = block.first_vector + vector < num_gradient_vectors(g);
    tap_ = tap_of_vector(has_column_ ? block.first_vector + vector : 0, g);
    first_row_ = g.h.start + tap_.h * g.h.dilation;
    first_column_ = g.w.start + tap_.w * g.w.dilation;
  }

  template <class Copy>
  OPENSORA_KERNEL_PART void step(int step, int slot_byte, Copy copy) {
    const GradientStep at = gradient_step(first_step_ + step, g);
    if (at.plane != plane_) {
      go_to(at.plane);
    }
    OPENSORA_UNROLL
    for (int i = 0; i < kNumRows; ++i) {
      const int index = at.first_position + row(i);
      copy(slot_byte + byte(i), grad_ + wide_product(index, g.num_out), has_out_ && index < g.num_positions);
    }
    slot_byte += GradientLayout<kTileOut>::kGradBytes;
    if (g.space_padding == SpacePadding::zeros) {
      OPENSORA_UNROLL
      for (int i = 0; i < kNumRows; ++i) {
        const int index = at.first_position + row(i);
        const Position position = position_of(index, g);
        const int row_in = position.row * g.h.step + first_row_, column_in = position.column * g.w.step + first_column_;
        const bool is_inside = static_cast<unsigned>(row_in) < static_cast<unsigned>(g.height_in) &&
                               static_cast<unsigned>(column_in) < static_cast<unsigned>(g.width_in);
        copy(slot_byte + byte(i), x_ + wide_product(row_in * g.width_in + column_in, g.num_channels),
             is_read_ && is_inside && index < g.num_positions);
      }
    } else {
      OPENSORA_ONE_BY_ONE
      for (int i = 0; i < kNumRows; ++i) {
        const int index = at.first_position + row(i);
        const int pixel = folded_pixel(position_of(index, g), tap_.h, tap_.w, g);
        copy(slot_byte + byte(i), x_ + wide_product(pixel, g.num_channels), is_read_ && index < g.num_positions);
      }
    }
  }

 private:
  OPENSORA_KERNEL_PART void go_to(int plane) {
    plane_ = plane;
    grad_ = o.grad + static_cast<int64_t>(plane) * g.num_positions * g.num_out + out_;
    const int sample = quotient(plane, g.by_frames), frame = plane - sample * g.num_frames;
    const FramePlace place = frame_place(sample, frame * g.t.step + g.t.start + tap_.t * g.t.dilation, g);
    x_ = (place.is_state ? o.state : o.x) + place.offset + tap_.channel;
    is_read_ = has_column_ && place.is_inside;
  }

  static constexpr int kNumRows = kStepPositions * kGradientRowVectors / kNumThreads;

  OPENSORA_KERNEL_PART int row(int i) const {
    return copied_cell<kGradientRowVectors>(thread_, i).row;
  }

  OPENSORA_KERNEL_PART int byte(int i) const {
    const Cell cell = copied_cell<kGradientRowVectors>(thread_, i);
    return swizzled_half(cell.row, cell.vector);
  }

  const Geometry& g;
  const GradientOperands& o;
  int thread_, first_step_, out_, first_row_, first_column_;
  bool has_out_, has_column_, is_read_;
  TapVector tap_;
  int plane_ = -1;  // which of all samples' frames these belong to
  const uint16_t* grad_;
  const uint16_t* x_;
};

// The gradient of the bias is that of a column of ones: in the first block of a row of blocks, the warp of the n-th
// columns adds it up for the n-th 16 of its output channels.
OPENSORA_KERNEL_PART int warp_column(int warp) {
  return gradient_warp_origin(warp, 0).column / 32;
}

template <int kTileOut>
OPENSORA_KERNEL_PART bool warp_sums_bias(int warp, const GradientBlock& block, const GradientOperands& o) {
  return o.bias_sums != nullptr && block.is_first_of_row && warp_column(warp) < GradientLayout<kTileOut>::kMatricesOut;
}

constexpr int kRowBytes = 8 * kVectorBytes;

// Of a lane's cell in a block of two vectors from the even vector `first` on.
OPENSORA_KERNEL_PART int byte_of_cell(Cell cell, int first) {
  return first / 8 * kHalfBytes + other_vector(swizzled<8>(cell.row, cell.vector), first % 8);
}

template <int kTileOut, class Warp, class Sums>
OPENSORA_KERNEL_PART void multiply_gradient(Warp& warp, int slot_byte, bool sums_bias,
                                            Sums (&sums)[GradientLayout<kTileOut>::kMatricesOut][4], Sums& bias_sums) {
  using Layout = GradientLayout<kTileOut>;
  const Element origin = gradient_warp_origin(warp.index, kTileOut);
  OPENSORA_UNROLL
  for (int k = 0; k < kStepPositions; k += 16) {
    typename Warp::Matrices x[Layout::kMatricesX];
    OPENSORA_UNROLL
    for (int j = 0; j < Layout::kMatricesX; ++j) {
      x[j] = warp.load_transposed([&](int lane) {
        const Cell cell = matrix_cell_rows_first(lane);
        return slot_byte + Layout::kGradBytes + k * kRowBytes + byte_of_cell(cell, (origin.column + 16 * j) / kVector);
      });
    }
    OPENSORA_UNROLL
    for (int i = 0; i < Layout::kMatricesOut; ++i) {
      const typename Warp::Matrices grad = warp.load_transposed([&](int lane) {
        const Cell cell = matrix_cell_vectors_first(lane);
        return slot_byte + k * kRowBytes + byte_of_cell(cell, (origin.row + 16 * i) / kVector);
      });
      OPENSORA_UNROLL
      for (int j = 0; j < 2 * Layout::kMatricesX; ++j) {
        warp.multiply(sums[i][j], grad, x[j / 2], j % 2);
      }
      if (sums_bias && i == warp_column(warp.index)) {
        warp.add_rows(bias_sums, grad);
      }
    }
  }
}

template <int kTileOut, class Warp, class Sums>
OPENSORA_KERNEL_PART void store_gradient(Warp& warp, Sums (&sums)[GradientLayout<kTileOut>::kMatricesOut][4],
                                         Sums& bias_sums, const GradientBlock& block, int split,
                                         const GradientOperands& o, const Geometry& g) {
  const Element origin = gradient_warp_origin(warp.index, kTileOut);
  float* target = o.sums + split * o.split_stride;
  OPENSORA_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int vector = block.first_vector + origin.column / kVector + j;
    if (vector >= num_gradient_vectors(g)) {
      continue;
    }
    const TapVector tap = tap_of_vector(vector, g);
    OPENSORA_UNROLL
    for (int i = 0; i < GradientLayout<kTileOut>::kMatricesOut; ++i) {
      warp.each_lane(sums[i][j], [&](int lane, const float* values) {
        OPENSORA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Element element = element_of_c(lane, 2 * half);
          const int row = origin.row + 16 * i + element.row, out = block.first_out + row;
          if (out < g.num_out) {
            const int64_t offset = static_cast<int64_t>(tap.tap) * g.num_out + out;
            *reinterpret_cast<Pair*>(target + offset * g.num_channels + tap.channel + element.column) =
                Pair{values[2 * half], values[2 * half + 1]};
          }
        }
      });
    }
  }
  if (!warp_sums_bias<kTileOut>(warp.index, block, o)) {
    return;
  }
  warp.each_lane(bias_sums, [&](int lane, const float* values) {
    OPENSORA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Element element = element_of_c(lane, 2 * half);  // every column holds the same sum
      const int out = block.first_out + origin.row + 16 * warp_column(warp.index) + element.row;
      if (element.column == 0 && out < g.num_out) {
        o.bias_sums[split * o.split_stride + out] = values[2 * half];
      }
    }
  });
}

}  // namespace opensora::sm80
