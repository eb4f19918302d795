// Attention's index maps: which tile a program takes, where TMA puts its elements in shared memory, where wgmma finds
// them, and which elements the registers of a thread hold. Shared by the kernel, its host tests and its replay.
//
// Axes: O, P leading axes, L queries, K keys, N heads, D head size. All offsets in shared memory are in bytes.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace opensora::attention {

// Keys of a block: scores of 64 queries take 64 registers of a thread, their weights as operands of the next product
// another 32; with 36 sums for D = 72 that leaves 28 of 160 for all else.
inline constexpr int kBlockKeys = 128;
// Rows of one product of a warpgroup, and columns that it multiplies at once.
inline constexpr int kProductRows = 64;
inline constexpr int kProductDepth = 16;
// The swizzle pattern of 128 bytes is 64 columns wide and repeats after eight rows.
inline constexpr int kWideColumns = 64;
inline constexpr int kWideBytes = 128;

// Sizes for a head size, and the layout of shared memory: queries, stages of keys, stages of values, barriers.
//
// Queries and keys are pieces of 64 columns, swizzled over 128 bytes, and a tail of 16 or 32 columns, swizzled over 32
// or 64 bytes: the 80 of D = 72 are 64 + 16, of which TMA fills the last 8 with zeros, since they lie beyond the
// tensor's innermost extent. That is 20 KB for 128 keys; two wide pieces would be 32 KB.
//
// Values are the right-hand operand with rows of keys, "MN-major", so N = D columns side by side. They are wide pieces
// alone, D = 72 as 64 + 64, of which 56 are zeros: then one product of N = 72 takes them all. A tail of its own would
// need a second product of N = 8 or 16, and products narrower than 64 columns wait for their left-hand operand; no
// swizzle would allow N = 72 too, but asks TMA for 9 boxes with rows of 16 bytes. N = 72 and 96 end within a piece:
// wgmma reads eight columns of eight keys at a time, so that the rest of the piece is passed over. If a GPU disagrees,
// N = 128 over the same tile is the same sum with zeros.
template <int kHeadSize>
struct Tile {
  static_assert(kHeadSize == 64 || kHeadSize == 72 || kHeadSize == 96 || kHeadSize == 128);
  static constexpr int kInner = (kHeadSize + 15) / 16 * 16;
  static constexpr int kNumSteps = kInner / kProductDepth;
  static constexpr int kNumWide = kHeadSize / kWideColumns;
  static constexpr int kTailColumns = kInner - kNumWide * kWideColumns;
  static constexpr int kTailBytes = kTailColumns * 2;
  static constexpr int kNumValuePieces = (kHeadSize + kWideColumns - 1) / kWideColumns;

  // Three warpgroups, where 160 registers of a thread are enough (D = 72 takes 155, D = 96 would take 173), share a
  // block of keys: two thirds of the bytes for a product that two would copy.
  static constexpr int kNumConsumers = kHeadSize <= 72 ? 3 : 2;
  static constexpr int kConsumerRegisters = kNumConsumers == 3 ? 160 : 232;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kNumThreads = 128 * (1 + kNumConsumers);
  static constexpr int kBlockQueries = kProductRows * kNumConsumers;
  static constexpr int kNumStages = 3;

  static constexpr int kRowBytes = kNumWide * kWideBytes + kTailBytes;
  static constexpr int kQueryBytes = kBlockQueries * kRowBytes;
  static constexpr int kKeyBytes = kBlockKeys * kRowBytes;
  static constexpr int kValueBytes = kBlockKeys * kNumValuePieces * kWideBytes;

  static constexpr int kKeys = kQueryBytes;
  static constexpr int kValues = kKeys + kNumStages * kKeyBytes;
  static constexpr int kBarriers = kValues + kNumStages * kValueBytes;
  static constexpr int kNumBarriers = 2 + 4 * kNumStages;
  // 1024 to spare: the patterns of 128 bytes must begin at multiples of 1024
  static constexpr int kSharedBytes = kBarriers + 8 * kNumBarriers + 1024;
  static_assert(kSharedBytes <= 227 * 1024, "a multiprocessor's shared memory");
  static_assert(kQueryBytes % 1024 == 0 && kKeyBytes % 1024 == 0 && kValueBytes % 1024 == 0);
};

enum class Barrier { kQueriesFull, kQueriesEmpty, kKeysFull, kKeysEmpty, kValuesFull, kValuesEmpty };

// From the first barrier; stages count for keys and values.
OPENSORA_HOST_DEVICE constexpr uint32_t barrier_offset(Barrier barrier, int stage = 0) {
  const int kind = static_cast<int>(barrier);
  return 8u * static_cast<uint32_t>(kind < 2 ? kind : 2 + 4 * stage + (kind - 2));
}

// A place in a ring of stages and the parity of the phase that fills it. Who empties stages waits for `parity`, who
// fills them for the one before, which a barrier that never ended a phase counts as ended.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  OPENSORA_HOST_DEVICE constexpr void advance(int num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Place {
  int64_t sample;
  int o, p, head, first_query;
};

// Blocks of queries go by first, so that neighbours share keys and values through the cache.
OPENSORA_HOST_DEVICE constexpr Place place(int tile, int num_blocks, int num_heads, int num_inner, int block_queries) {
  const int rest = tile / num_blocks;
  const int sample = rest / num_heads;
  return {sample, sample / num_inner, sample % num_inner, rest % num_heads, tile % num_blocks * block_queries};
}

struct Keys {
  int first, length;
};

// The keys of a sample: all; its first `*length` of padded ones; or those before `*end` of packed ones.
OPENSORA_HOST_DEVICE constexpr Keys keys_of(int num_keys, const int64_t* length, const int64_t* end) {
  if (length == nullptr) {
    return {0, num_keys};
  }
  const int64_t first = end == nullptr ? 0 : *end - *length;
  const int64_t after = first + *length < num_keys ? first + *length : num_keys;
  return {static_cast<int>(first), after > first ? static_cast<int>(after - first) : 0};
}

OPENSORA_HOST_DEVICE constexpr int num_key_blocks(int length) {
  return (length + kBlockKeys - 1) / kBlockKeys;
}

// How many keys of a block a sample has; more than kBlockKeys before the last one.
OPENSORA_HOST_DEVICE constexpr int keys_left(int length, int block) {
  return length - block * kBlockKeys;
}

// The part of a tile of queries or keys that holds 16 columns: where its rows begin, and how wide they are.
struct Step {
  uint32_t offset;
  int span_bytes;
};

template <int kHeadSize>
OPENSORA_HOST_DEVICE constexpr Step step_of(int step, int num_rows) {
  constexpr int kStepsOfPiece = kWideColumns / kProductDepth;
  const int piece = step / kStepsOfPiece;
  const int column_bytes = step % kStepsOfPiece * kProductDepth * 2;
  return {static_cast<uint32_t>(piece * num_rows * kWideBytes + column_bytes),
          piece < Tile<kHeadSize>::kNumWide ? kWideBytes : Tile<kHeadSize>::kTailBytes};
}

// wgmma's description of an operand: where it begins, `offset` after `tile`, distances between its parts and swizzle.
// In two halves, of which the constant parts are added to the tile's, so that a step costs one addition.
OPENSORA_HOST_DEVICE constexpr uint64_t descriptor(uint32_t tile, uint32_t offset, uint32_t leading_bytes,
                                                   uint32_t stride_bytes, int span_bytes) {
  const uint32_t swizzle = span_bytes == 128 ? 1 : span_bytes == 64 ? 2 : 3;
  const uint32_t low = (tile >> 4) + ((offset >> 4) + (leading_bytes >> 4 << 16));
  return static_cast<uint64_t>((stride_bytes >> 4) + (swizzle << 30)) << 32 | low;
}

// Sixteen columns of queries or keys ("K-major": a row's columns side by side): eight rows after eight rows. The
// leading distance is not used.
OPENSORA_HOST_DEVICE constexpr uint64_t row_descriptor(uint32_t tile, const Step& step, int first_row) {
  const uint32_t span_bytes = static_cast<uint32_t>(step.span_bytes);
  return descriptor(tile, step.offset + static_cast<uint32_t>(first_row) * span_bytes, 16, 8 * span_bytes,
                    step.span_bytes);
}

// `queries` is the tile of all warpgroups, and `first_row` this one's in it.
template <int kHeadSize>
OPENSORA_HOST_DEVICE constexpr uint64_t query_descriptor(uint32_t queries, int first_row, int step) {
  return row_descriptor(queries, step_of<kHeadSize>(step, Tile<kHeadSize>::kBlockQueries), first_row);
}

template <int kHeadSize>
OPENSORA_HOST_DEVICE constexpr uint64_t key_descriptor(uint32_t keys, int step) {
  return row_descriptor(keys, step_of<kHeadSize>(step, kBlockKeys), 0);
}

// All columns of sixteen keys' values ("MN-major"): piece after piece of 64 columns, eight keys after eight keys.
OPENSORA_HOST_DEVICE constexpr uint64_t value_descriptor(uint32_t values, int step) {
  return descriptor(values, static_cast<uint32_t>(step * kProductDepth * kWideBytes), kBlockKeys * kWideBytes,
                    8 * kWideBytes, kWideBytes);
}

// Element (row, column) of a product that register `index` of a warpgroup's thread holds.
OPENSORA_HOST_DEVICE constexpr int sum_row(int thread, int index) {
  return thread / 32 * 16 + thread % 32 / 4 + index / 2 % 2 * 8;
}

OPENSORA_HOST_DEVICE constexpr int sum_column(int thread, int index) {
  return index / 4 * 8 + thread % 4 * 2 + index % 2;
}

// Scores become the left-hand operand of the next product where they are: register `index` of the weights' pairs is
// made of the scores `first_score(index)` and the one after it; step s of that product takes the pairs 4s .. 4s + 3.
OPENSORA_HOST_DEVICE constexpr int first_score(int index) {
  return 2 * index;
}

// Of out (B, L, N, D) and of the log-sum-exp (B, N, L).
OPENSORA_HOST_DEVICE constexpr int64_t out_offset(const Place& at, int query, int num_queries, int num_heads,
                                                  int head_size) {
  return ((at.sample * num_queries + query) * num_heads + at.head) * head_size;
}

OPENSORA_HOST_DEVICE constexpr int64_t lse_offset(const Place& at, int query, int num_queries, int num_heads) {
  return (at.sample * num_heads + at.head) * num_queries + query;
}

}  // namespace opensora::attention
