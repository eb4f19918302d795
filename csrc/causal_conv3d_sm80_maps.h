// Index maps of the mma.sync convolution and of its weight gradient, shared by kernels, host tests and replay.
//
// The forward pass is one matrix product: rows are output positions, the sum runs over taps and channels, 8 channels
// (16 bytes, one cp.async) at a time. The sum is flat over (tap, channel), so that 96 channels waste no lane of a step
// of 64. The weight gradient is the other product: rows are output channels, columns are flat over (tap, channel), the
// sum runs over positions. Axes: B batch, C input and O output channels, T frames, H height, W width.
#pragma once

#include <initializer_list>

#include "causal_conv3d_sm80_geometry.h"

namespace opensora::sm80 {

// ---- the sum's index: which tap and which channels --------------------------------------------------------------

struct TapVector {
  int tap;  // of all, in the order of the weight
  int t, h, w;
  int channel;  // the first of 8
};

// The order of the sum: frames and rows of taps, then blocks of 64 channels, then the taps of the row, then the
// channels of the block. The taps of a row read nearly the same pixels, so that all but the first may find them in L1.
struct RowVector {
  int w;
  int channel;
};

OPENSORA_HOST_DEVICE RowVector vector_of_row(int in_row, const Geometry& g) {
  const int block = quotient(in_row, g.by_vectors_per_block);
  const int in_block = in_row - block * (g.w.count * kStepVectors);
  const int num_left = g.num_vectors_per_tap - block * kStepVectors;
  const bool is_full = num_left >= kStepVectors;
  const int w = is_full ? in_block / kStepVectors : quotient(in_block, g.by_last_block);
  const int in_tap = in_block - w * (is_full ? kStepVectors : num_left);
  return {w, (block * kStepVectors + in_tap) * kVector};
}

OPENSORA_HOST_DEVICE TapVector tap_of_vector(int vector, const Geometry& g) {
  const int row = quotient(vector, g.by_vectors_per_row);
  const RowVector found = vector_of_row(vector - row * g.num_vectors_per_row, g);
  const int t = quotient(row, g.by_taps_h);
  return {row * g.w.count + found.w, t, row - t * g.h.count, found.w, found.channel};
}

// The same, for a thread that goes on by 8 vectors from step to step.
struct TapWalk {
  int in_row;
  int h;
  int t;
};

OPENSORA_HOST_DEVICE constexpr TapWalk onward(TapWalk walk, int num_vectors, const Geometry& g) {
  walk.in_row += num_vectors;
  while (walk.in_row >= g.num_vectors_per_row) {
    walk.in_row -= g.num_vectors_per_row;
    if (++walk.h == g.h.count) {
      walk.h = 0;
      ++walk.t;
    }
  }
  return walk;
}

OPENSORA_HOST_DEVICE TapVector tap_of_walk(const TapWalk& walk, const Geometry& g) {
  const RowVector found = vector_of_row(walk.in_row, g);
  return {(walk.t * g.h.count + walk.h) * g.w.count + found.w, walk.t, walk.h, found.w, found.channel};
}

// The frames of taps that an output frame sums over: those on frames of zeros are left out.
struct TapRange {
  int begin;
  int end;
};

OPENSORA_HOST_DEVICE constexpr TapRange taps_of_frame(int frame, const Geometry& g) {
  const int first_frame = frame * g.t.step + g.t.start;
  int begin = 0;
  if (!g.repeats_first_frame && first_frame < 0) {
    begin = ceil_div(-first_frame, g.t.dilation);
    begin = begin < g.t.count ? begin : g.t.count;
  }
  const int num_left = g.num_state + g.num_frames_in - first_frame;
  int end = num_left > 0 ? ceil_div(num_left, g.t.dilation) : 0;
  end = end < g.t.count ? end : g.t.count;
  return {begin, end > begin ? end : begin};
}

// ---- what a tap reads -------------------------------------------------------------------------------------------

OPENSORA_HOST_DEVICE constexpr int folded(int index, int size, SpacePadding padding) {
  if (padding == SpacePadding::reflect) {
    index = index < 0 ? -index : index;
    index = index < size ? index : 2 * (size - 1) - index;
  }
  index = index > 0 ? index : 0;
  return index < size ? index : size - 1;
}

// Where the frame lies: in the state or in x; frames before both are zeros or the first.
struct FramePlace {
  bool is_inside;
  bool is_state;
  int64_t offset;
};

OPENSORA_HOST_DEVICE constexpr FramePlace frame_place(int sample, int frame, const Geometry& g) {
  bool is_inside = frame < g.num_state + g.num_frames_in;
  if (frame < 0) {
    is_inside = g.repeats_first_frame && is_inside;
    frame = 0;
  }
  if (frame < g.num_state) {
    return {is_inside, true, sample * g.stride_sb + frame * g.stride_st};
  }
  return {is_inside, false, sample * g.stride_xb + (is_inside ? frame - g.num_state : 0) * g.stride_xt};
}

struct Position {
  int row;
  int column;
};

OPENSORA_HOST_DEVICE Position position_of(int index, const Geometry& g) {
  const int row = quotient(index, g.by_width);
  return {row, index - row * g.width};
}

// The input pixel that a tap reads for an output position, where what lies outside a frame copies a pixel inside.
OPENSORA_HOST_DEVICE constexpr int folded_pixel(Position position, int tap_h, int tap_w, const Geometry& g) {
  const int row = position.row * g.h.step + g.h.start + tap_h * g.h.dilation;
  const int column = position.column * g.w.step + g.w.start + tap_w * g.w.dilation;
  return folded(row, g.height_in, g.space_padding) * g.width_in + folded(column, g.width_in, g.space_padding);
}

// Where zeros surround a frame: the pixel that tap (0, 0) reads, perhaps a number outside, and which rows and columns
// of taps read inside, as bits 0-14 and 16-30. Bit 15 is never set, and tests false.
constexpr uint32_t kNever = 1u << 15;

struct Window {
  int first_pixel;
  uint32_t is_inside;
};

OPENSORA_HOST_DEVICE constexpr Window window_of(Position position, const Geometry& g) {
  const int row = position.row * g.h.step + g.h.start, column = position.column * g.w.step + g.w.start;
  uint32_t is_inside = 0;
  for (int tap = 0; tap < g.h.count; ++tap) {
    const int at = row + tap * g.h.dilation;
    is_inside |= at >= 0 && at < g.height_in ? 1u << tap : 0u;
  }
  for (int tap = 0; tap < g.w.count; ++tap) {
    const int at = column + tap * g.w.dilation;
    is_inside |= at >= 0 && at < g.width_in ? 1u << (16 + tap) : 0u;
  }
  return {row * g.width_in + column, is_inside};
}

OPENSORA_HOST_DEVICE constexpr uint32_t bits_of_tap(int tap_h, int tap_w) {
  return 1u << tap_h | 1u << (16 + tap_w);
}

OPENSORA_HOST_DEVICE constexpr int pixels_to_tap(int tap_h, int tap_w, const Geometry& g) {
  return tap_h * g.h.dilation * g.width_in + tap_w * g.w.dilation;
}

// ---- which block does what --------------------------------------------------------------------------------------

// Multiples that waste least, the larger among equals: 96 output channels are one tile, 192 two.
constexpr int tile_out_of(int num_out) {
  int best = 128;
  for (const int tile : {96, 64}) {
    best = ceil_div(num_out, tile) * tile < ceil_div(num_out, best) * best ? tile : best;
  }
  return best;
}

// Blocks of one tile of positions follow one another: they read the same input.
struct ForwardBlock {
  int sample;
  int frame;
  int tile;            // of the frame
  int first_position;  // of the tile
  int first_out;       // channel
};

OPENSORA_HOST_DEVICE constexpr int num_tiles_of_frame(const Geometry& g) {
  return ceil_div(g.num_positions, kTilePositions);
}

OPENSORA_HOST_DEVICE constexpr int64_t num_forward_blocks(const Geometry& g, int tile_out) {
  return static_cast<int64_t>(g.num_samples) * g.num_frames * num_tiles_of_frame(g) * ceil_div(g.num_out, tile_out);
}

OPENSORA_HOST_DEVICE constexpr ForwardBlock forward_block(int block, const Geometry& g, int tile_out) {
  const int num_blocks_out = ceil_div(g.num_out, tile_out);
  const int tile_of_clip = block / num_blocks_out;
  const int plane = tile_of_clip / num_tiles_of_frame(g);
  const int tile = tile_of_clip % num_tiles_of_frame(g);
  const int first_out = block % num_blocks_out * tile_out;
  return {plane / g.num_frames, plane % g.num_frames, tile, tile * kTilePositions, first_out};
}

// Weight gradient: one block sums a share of the steps for `tile_out` rows and 128 columns.
struct GradientBlock {
  int first_out;
  int first_vector;  // of the columns
  bool is_first_of_row;
};

OPENSORA_HOST_DEVICE constexpr int num_gradient_vectors(const Geometry& g) {
  return g.t.count * g.h.count * g.w.count * g.num_vectors_per_tap;
}

OPENSORA_HOST_DEVICE constexpr int num_gradient_blocks(const Geometry& g, int tile_out) {
  return ceil_div(g.num_out, tile_out) * ceil_div(num_gradient_vectors(g) * kVector, kTileColumns);
}

// Blocks of the same rows and neighbouring taps follow one another: they read the same gradient and nearly the same x.
OPENSORA_HOST_DEVICE constexpr GradientBlock gradient_block(int block, const Geometry& g, int tile_out) {
  const int num_blocks_of_columns = ceil_div(num_gradient_vectors(g) * kVector, kTileColumns);
  const int column_block = block % num_blocks_of_columns;
  return {block / num_blocks_of_columns * tile_out, column_block * (kTileColumns / kVector), column_block == 0};
}

OPENSORA_HOST_DEVICE constexpr int64_t num_gradient_steps(const Geometry& g) {
  return static_cast<int64_t>(g.num_samples) * g.num_frames * ceil_div(g.num_positions, kStepPositions);
}

// Shares of the steps, so that there are as many blocks as the Triton backend aims at: four for each SM of an H200.
constexpr int num_splits_of(const Geometry& g) {
  const int num_blocks = num_gradient_blocks(g, tile_out_of(g.num_out));
  const int64_t num_steps = num_gradient_steps(g), num_wanted = num_blocks > 0 ? 528 / num_blocks : 1;
  return static_cast<int>(num_wanted < 1 || num_steps < 1 ? 1 : num_wanted < num_steps ? num_wanted : num_steps);
}

// The first step of a share; shares differ by one step at most.
OPENSORA_HOST_DEVICE constexpr int first_step_of_split(int split, int num_splits, int num_steps) {
  return static_cast<int>(static_cast<int64_t>(num_steps) * split / num_splits);
}

// What one step of the weight gradient sums over: 64 positions of one frame of the result.
struct GradientStep {
  int plane;  // sample * num_frames + frame
  int first_position;
};

OPENSORA_HOST_DEVICE GradientStep gradient_step(int step, const Geometry& g) {
  const int plane = quotient(step, g.by_steps_per_frame);
  return {plane, (step - plane * ceil_div(g.num_positions, kStepPositions)) * kStepPositions};
}

// ---- shared memory and registers --------------------------------------------------------------------------------

// Byte of a 16-byte vector in rows of 8 vectors. The exclusive or makes the 8 rows that one phase of ldmatrix
// reads at the same vector, and the 8 vectors of a row that one phase of a copy writes, fall into 8 different groups of
// banks.
template <int kRowVectors>
OPENSORA_HOST_DEVICE constexpr int swizzled(int row, int vector) {
  static_assert(kRowVectors % 8 == 0);
  return (row * kRowVectors + (vector ^ (row & 7))) * kVectorBytes;
}

// The byte of the vector `vector ^ by` of the same row. Kernels step from one address by it: as many addresses of their
// own would fill 24 registers.
OPENSORA_HOST_DEVICE constexpr int other_vector(int byte, int by) {
  return byte ^ (by * kVectorBytes);
}

// Weight gradient: a factor's rows of 16 vectors lie in two halves of 8, as wgmma reads them.
constexpr int kHalfBytes = kStepPositions * 8 * kVectorBytes;

OPENSORA_HOST_DEVICE constexpr int swizzled_half(int row, int vector) {
  return vector / 8 * kHalfBytes + swizzled<8>(row, vector % 8);
}

// Rows of the result before they are stored: 16 bytes more, so that the 8 rows of an accumulator meet no bank twice.
template <int kTileOut>
OPENSORA_HOST_DEVICE constexpr int staged(int row, int channel) {
  return row * (kTileOut * 2 + kVectorBytes) + channel * 2;
}

struct Cell {
  int row;
  int vector;
};

// The `index`-th 16-byte vector that a thread copies into a tile of rows of kRowVectors.
template <int kRowVectors>
OPENSORA_HOST_DEVICE constexpr Cell copied_cell(int thread, int index) {
  return {thread / kRowVectors + index * (kNumThreads / kRowVectors), thread % kRowVectors};
}

// The row whose address a lane hands to ldmatrix.x4, from the first row and vector of a block of 16 rows by 16
// elements. Its four 8 x 8 matrices go down the rows, then to the next vector; or the other way.
OPENSORA_HOST_DEVICE constexpr Cell matrix_cell_rows_first(int lane) {
  return {lane & 15, lane >> 4};
}

OPENSORA_HOST_DEVICE constexpr Cell matrix_cell_vectors_first(int lane) {
  return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1};
}

// mma.m16n8k16: what element `index` of each factor, or of the sum, is in a lane. (row, column) of A (16 x 16), B (16 x
// 8, row is the sum's index) and C (16 x 8).
struct Element {
  int row;
  int column;
};

OPENSORA_HOST_DEVICE constexpr Element element_of_a(int lane, int index) {
  return {lane / 4 + (index >> 1 & 1) * 8, lane % 4 * 2 + (index & 1) + (index >> 2) * 8};
}

OPENSORA_HOST_DEVICE constexpr Element element_of_b(int lane, int index) {
  return {lane % 4 * 2 + (index & 1) + (index >> 1) * 8, lane / 4};
}

OPENSORA_HOST_DEVICE constexpr Element element_of_c(int lane, int index) {
  return {lane / 4 + (index >> 1) * 8, lane % 4 * 2 + (index & 1)};
}

// Where a warp's part of the block's tile begins. Forward: 4 x 2 warps of 32 positions by half of the channels.
OPENSORA_HOST_DEVICE constexpr Element forward_warp_origin(int warp, int tile_out) {
  return {(warp & 3) * 32, (warp >> 2) * (tile_out / 2)};
}

// Weight gradient by mma.sync: 2 x 4 warps of half of the output channels by 32 columns.
OPENSORA_HOST_DEVICE constexpr Element gradient_warp_origin(int warp, int tile_out) {
  return {(warp & 1) * (tile_out / 2), (warp >> 1) * 32};
}

}  // namespace opensora::sm80
