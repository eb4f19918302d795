// Where everything lies in the sm_90a kernel of causal_conv3d: tiles, shared memory, operands, fragments, results.
// The kernel, its host tests and its host replay share these functions. Axes as in causal_conv3d.h.
//
// A tile is kHeight x 16 positions of one frame of the result by N of its channels. The sum runs over taps in time and
// columns and over chunks of 64 input channels; for each of these one box of the clip is loaded, with as many more
// rows as the kernel has, so that the taps along rows are the same box read from 16 positions (2048 bytes, a multiple
// of the swizzle's 1024) further down. A box per tap would move 2.4 to 2.7 times as much of the clip from L2.
#pragma once

#include <cstdint>

#include "causal_conv3d_shape.h"
#include "host_device.h"

namespace opensora::conv90 {

constexpr int kTileWidth = 16;
constexpr int kChunk = 64;  // input channels of a load: 128 bytes, the span of the widest swizzle
constexpr int kRowBytes = 128;
constexpr int kMmaRows = 64, kMmaDepth = 16;  // of one wgmma; its third size is N
constexpr int kNumConsumers = 2;              // warpgroups
constexpr int kNumWarps = 4 * kNumConsumers;
constexpr int kMostRowTaps = 3;
constexpr int kClipSlots = 3;
constexpr int kMostSharedBytes = 232448;  // of a block on sm_90: 227 KiB

// The tile of N channels. A thread holds kBlocks * N / 2 sums, at most 128 of its 240 registers.
template <int N>
struct Tile {
  static constexpr int kBlocks = N <= 128 ? 2 : 1;  // products of 64 rows for each warpgroup
  static constexpr int kPositions = kNumConsumers * kBlocks * kMmaRows;
  static constexpr int kHeight = kPositions / kTileWidth;
  static constexpr int kWeightSlots = N == 64 ? 8 : N == 96 ? 7 : 5;
  static constexpr int kClipSlotBytes = (kHeight + kMostRowTaps - 1) * kTileWidth * kRowBytes;
  static constexpr int kWeightSlotBytes = N * kRowBytes;
  static constexpr int kWeightOffset = kClipSlots * kClipSlotBytes;
  static constexpr int kStatisticsOffset = kWeightOffset + kWeightSlots * kWeightSlotBytes;
  static constexpr int kBarrierOffset = kStatisticsOffset + kNumWarps * N * 2 * 4;
  static constexpr int kBarriers = 2 * (kClipSlots + kWeightSlots);
  static constexpr int kBytes = kBarrierOffset + 8 * kBarriers;
  static_assert(N % 32 == 0, "the epilogue writes 32 channels at once");
  static_assert(kClipSlotBytes % 1024 == 0 && kWeightSlotBytes % 1024 == 0, "the swizzle repeats after 1024 bytes");
  static_assert(kBytes + 1024 <= kMostSharedBytes, "with what aligns the first slot");
};

OPENSORA_HOST_DEVICE constexpr int tile_height(int tile_channels) {
  return tile_channels <= 128 ? Tile<128>::kHeight : Tile<192>::kHeight;
}
static_assert(tile_height(64) == Tile<64>::kHeight && tile_height(96) == Tile<96>::kHeight);

// What one launch works through.
struct Schedule {
  ConvolutionShape shape;
  int num_state, num_frames;
  int row_taps;  // taps along rows that share one box
  int tile_height, tile_channels;
  int tiles_h, tiles_w, tiles_o;
  int num_chunks;
};

OPENSORA_HOST_DEVICE constexpr int divide_up(int number, int divisor) {
  return (number + divisor - 1) / divisor;
}

OPENSORA_HOST_DEVICE constexpr Schedule make_schedule(const ConvolutionShape& shape, int num_state, int num_frames,
                                                      int tile_height, int tile_channels) {
  const bool shares = shape.dilation[1] == 1 && shape.kernel[1] <= kMostRowTaps;
  return {shape,
          num_state,
          num_frames,
          shares ? shape.kernel[1] : 1,
          tile_height,
          tile_channels,
          divide_up(shape.out_height, tile_height),
          divide_up(shape.out_width, kTileWidth),
          divide_up(shape.num_out, tile_channels),
          divide_up(shape.num_channels, kChunk)};
}

// The fewest channels computed in vain; among equals the tile with the most work for each byte loaded.
OPENSORA_HOST_DEVICE constexpr int choose_tile_channels(int num_out) {
  constexpr int kChoices[] = {128, 192, 96, 64};
  int best = kChoices[0];
  for (const int choice : kChoices) {
    if (divide_up(num_out, choice) * choice < divide_up(num_out, best) * best) {
      best = choice;
    }
  }
  return best;
}

// ---- Tiles ----

struct TilePosition {
  int sample, frame;
  int row, column;  // of the tile's first position
  int channel;      // the first
  int rectangle;    // number of the tile within its frame
};

OPENSORA_HOST_DEVICE constexpr int64_t num_tiles(const Schedule& schedule) {
  return static_cast<int64_t>(schedule.shape.num_samples) * schedule.shape.out_frames * schedule.tiles_h *
         schedule.tiles_w * schedule.tiles_o;
}

// Channels first, then columns, rows, frames: tiles that run at once read the same boxes of the clip.
OPENSORA_HOST_DEVICE constexpr TilePosition tile_position(const Schedule& schedule, int tile) {
  const int channel = tile % schedule.tiles_o * schedule.tile_channels;
  tile /= schedule.tiles_o;
  const int rectangle = tile % (schedule.tiles_h * schedule.tiles_w);
  tile /= schedule.tiles_h * schedule.tiles_w;
  return {tile / schedule.shape.out_frames,
          tile % schedule.shape.out_frames,
          rectangle / schedule.tiles_w * schedule.tile_height,
          rectangle % schedule.tiles_w * kTileWidth,
          channel,
          rectangle};
}

// ---- Loads ----

OPENSORA_HOST_DEVICE constexpr int box_rows(const Schedule& schedule) {
  return schedule.tile_height + schedule.row_taps - 1;
}

// First row and column of the box for tap (any, j, k); j is the first tap along rows of those that share it. They may
// lie outside: the hardware loads zeros there, and counts them among the bytes that arrive.
OPENSORA_HOST_DEVICE constexpr int box_row(const Schedule& schedule, const TilePosition& at, int j) {
  return at.row + schedule.shape.start[1] + j * schedule.shape.dilation[1];
}

OPENSORA_HOST_DEVICE constexpr int box_column(const Schedule& schedule, const TilePosition& at, int k) {
  return at.column + schedule.shape.start[2] + k * schedule.shape.dilation[2];
}

OPENSORA_HOST_DEVICE constexpr int tap_index(const ConvolutionShape& shape, int i, int j, int k) {
  return (i * shape.kernel[1] + j) * shape.kernel[2] + k;
}

// How many boxes of weights a tile multiplies by; frames that are nothing are left out.
OPENSORA_HOST_DEVICE constexpr int num_products(const Schedule& schedule, const TilePosition& at) {
  int num_taps = 0;
  for (int i = 0; i < schedule.shape.kernel[0]; ++i) {
    num_taps += input_frame(schedule.shape, schedule.num_state, schedule.num_frames, at.frame, i).source !=
                FrameSource::kNothing;
  }
  return num_taps * schedule.shape.kernel[1] * schedule.shape.kernel[2] * schedule.num_chunks;
}

// Products along the sum that a chunk needs: the last may hold fewer than 64 channels, and zeros need none.
OPENSORA_HOST_DEVICE constexpr int num_steps(const Schedule& schedule, int chunk) {
  const int left = schedule.shape.num_channels - chunk * kChunk;
  return left >= kChunk ? kChunk / kMmaDepth : divide_up(left, kMmaDepth);
}

// A position in a ring of slots. Consumers wait for `phase` of a slot's full barrier, the producer for the other one of
// its empty barrier, which a fresh barrier has behind it.
struct Ring {
  int slot;
  uint32_t phase;
};

OPENSORA_HOST_DEVICE constexpr Ring next(Ring ring, int num_slots) {
  return ring.slot + 1 == num_slots ? Ring{0, ring.phase ^ 1} : Ring{ring.slot + 1, ring.phase};
}

// ---- Operands ----

// 128-byte swizzle, as TMA writes and wgmma reads it: the 16-byte piece of a row is numbered anew by the row modulo 8.
// Of addresses whose zero is a multiple of 1024.
OPENSORA_HOST_DEVICE constexpr uint32_t swizzle(uint32_t address) {
  return address ^ ((address >> 3) & 0x70);
}

// Bytes into a clip slot where the operand begins for a block of 64 positions, a tap along rows and a step of the sum.
OPENSORA_HOST_DEVICE constexpr uint32_t clip_operand(int block, int row_tap, int step) {
  return (block * kMmaRows + row_tap * kTileWidth) * kRowBytes + step * kMmaDepth * 2;
}

OPENSORA_HOST_DEVICE constexpr uint32_t weight_operand(int step) {
  return step * kMmaDepth * 2;
}

// A wgmma operand whose rows of 128 bytes lie along the sum ("K-major"): start address / 16 in bits 0-13; leading byte
// offset / 16 in bits 16-29, not used with a swizzle, 1 by custom; stride / 16 from eight rows to the next, 1024 bytes,
// in bits 32-45; base offset 0 in bits 49-51, since the swizzle's pattern begins at a multiple of 1024; layout 1, the
// 128-byte swizzle, in bits 62-63.
OPENSORA_HOST_DEVICE constexpr uint64_t operand_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// The operand `num_bytes` further on, in one addition: all of shared memory fits the address's bits.
OPENSORA_HOST_DEVICE constexpr uint64_t moved(uint64_t descriptor, uint32_t num_bytes) {
  return descriptor + (num_bytes >> 4);
}

// ---- Results ----

// Row (of 64) and channel (of N) of register `index` of a thread of a warpgroup.
OPENSORA_HOST_DEVICE constexpr int fragment_row(int thread, int index) {
  return thread / 32 * 16 + thread % 32 / 4 + index / 2 % 2 * 8;
}

OPENSORA_HOST_DEVICE constexpr int fragment_channel(int thread, int index) {
  return index / 4 * 8 + thread % 4 * 2 + index % 2;
}

// Four threads that share rows hold two channels of each of four blocks of eight; they exchange words until each holds
// the eight channels of one block, 16 bytes of the result. Round `mask` (1, then 2), exchange `pair` (0 and 1): a
// thread gives its word `given_word` to thread ^ mask and gets one for the same place. Word k of thread q ends as word
// q of thread k.
OPENSORA_HOST_DEVICE constexpr int given_word(int thread, int mask, int pair) {
  const int low = mask == 1 ? 2 * pair : pair;
  return (thread & mask) != 0 ? low : low + mask;
}

OPENSORA_HOST_DEVICE constexpr int written_channel(int thread, int column_group) {
  return column_group * 32 + thread % 4 * 8;
}

// Position in the tile of a row of one of the blocks of 64.
OPENSORA_HOST_DEVICE constexpr int tile_row(int block, int row) {
  return (block * kMmaRows + row) / kTileWidth;
}

OPENSORA_HOST_DEVICE constexpr int tile_column(int row) {
  return row % kTileWidth;
}

OPENSORA_HOST_DEVICE constexpr bool is_inside(const ConvolutionShape& shape, int row, int column) {
  return row < shape.out_height && column < shape.out_width;
}

OPENSORA_HOST_DEVICE constexpr int64_t result_offset(const ConvolutionShape& shape, const TilePosition& at, int row,
                                                     int column, int channel) {
  const int64_t plane = static_cast<int64_t>(at.sample) * shape.out_frames + at.frame;
  return ((plane * shape.out_height + row) * shape.out_width + column) * shape.num_out + channel;
}

// Of the pair (mean, squared deviations) of a channel in a tile.
OPENSORA_HOST_DEVICE constexpr int64_t partial_offset(const Schedule& schedule, const TilePosition& at, int channel) {
  const int64_t plane = static_cast<int64_t>(at.sample) * schedule.shape.out_frames + at.frame;
  return ((plane * schedule.tiles_h * schedule.tiles_w + at.rectangle) * schedule.shape.num_out + channel) * 2;
}

OPENSORA_HOST_DEVICE constexpr int64_t num_partials(const Schedule& schedule) {
  return static_cast<int64_t>(schedule.shape.num_samples) * schedule.shape.out_frames * schedule.tiles_h *
         schedule.tiles_w * schedule.shape.num_out * 2;
}

// Positions inside the frame of those that a warp (0 to 7) holds: one row of the tile for each of its blocks.
OPENSORA_HOST_DEVICE constexpr int num_positions(const Schedule& schedule, const TilePosition& at, int warp) {
  const int num_blocks = schedule.tile_height * kTileWidth / (kNumConsumers * kMmaRows);
  const int left = schedule.shape.out_width - at.column;
  int count = 0;
  for (int block = 0; block < num_blocks; ++block) {
    const int row = at.row + tile_row(warp / 4 * num_blocks + block, warp % 4 * 16);
    count += row < schedule.shape.out_height ? (left < kTileWidth ? left : kTileWidth) : 0;
  }
  return count;
}

}  // namespace opensora::conv90
