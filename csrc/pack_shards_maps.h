// Where every vector of a shard lies in its tensor and in the packed buffer: the index map of pack_shards and
// unpack_shards, and the work of one thread. The kernel, the host tests and the replay on a CPU share it.
//
// A tensor cut along axis M is (A0, A1, M, J, C): two axes before M, one after it, and C bytes side by side, which move
// as vectors of V bytes. The packed buffer holds the first shard of every tensor, then the second; inside a shard of a
// tensor the bytes follow one another in the order of the axes. A push is packing whose shards go to a buffer each.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace opensora::shards {

constexpr int kMaxTensors = 8;  // of one launch; a longer list takes several
constexpr int kMaxTargets = 8;  // the GPUs of one node
constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;  // all loaded before the first is stored
constexpr int kVectorsPerBlock = kThreads * kVectorsPerThread;

// n / divisor for 0 <= n < 2^(bits - 1) by a multiplication: a division costs tens of instructions, and a vector of 16
// bytes takes four of them.
template <typename Index>
struct Divisor {
  Index divisor;
  Index multiplier;
  uint32_t shift;
};

template <typename Index>
OPENSORA_HOST_DEVICE constexpr Divisor<Index> divisor_of(int64_t divisor) {
  constexpr int bits = 8 * sizeof(Index);
  const unsigned __int128 one = 1;
  uint32_t shift = 0;
  while ((one << shift) < static_cast<unsigned __int128>(divisor)) {
    ++shift;
  }
  const unsigned __int128 excess = (one << shift) - static_cast<unsigned __int128>(divisor);
  const Index multiplier = static_cast<Index>((excess << bits) / static_cast<unsigned __int128>(divisor) + 1);
  return {static_cast<Index>(divisor), multiplier, shift};
}

OPENSORA_HOST_DEVICE constexpr uint32_t high_half(uint32_t left, uint32_t right) {
#ifdef __CUDA_ARCH__
  return __umulhi(left, right);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(left) * right) >> 32);
#endif
}

OPENSORA_HOST_DEVICE constexpr uint64_t high_half(uint64_t left, uint64_t right) {
#ifdef __CUDA_ARCH__
  return __umul64hi(left, right);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(left) * right) >> 64);
#endif
}

// The sum does not overflow: its first part is at most n, and n has a bit to spare.
template <typename Index>
OPENSORA_HOST_DEVICE constexpr Index divide(Index n, const Divisor<Index>& by) {
  return (high_half(n, by.multiplier) + n) >> by.shift;
}

// Shards of an axis as torch.tensor_split cuts it: the first `num_longer` hold one more.
struct Shards {
  int64_t size;
  int64_t num_longer;
};

OPENSORA_HOST_DEVICE constexpr int64_t shard_start(const Shards& shards, int64_t shard) {
  return shard * shards.size + (shard < shards.num_longer ? shard : shards.num_longer);
}

OPENSORA_HOST_DEVICE constexpr int64_t shard_size(const Shards& shards, int64_t shard) {
  return shards.size + (shard < shards.num_longer ? 1 : 0);
}

struct Strides {  // in bytes
  int64_t a0, a1, m, j;
};

// One launch: `num_tensors` tensors from `first_tensor` on, of `total_tensors` in the packed buffer.
template <typename Index>
struct Copy {
  char* tensors[kMaxTensors];
  Strides strides[kMaxTensors];
  char* targets[kMaxTargets];  // where each shard goes, if has_targets
  char* packed;                // where all of them lie, if not
  bool has_targets;
  int32_t num_shards;  // those that are not empty
  int32_t num_tensors;
  int64_t first_tensor;
  int64_t total_tensors;
  int64_t num_rows;     // A0 * A1
  int64_t row_vectors;  // J * C / V
  Shards shards;
  Divisor<Index> vectors;  // C / V
  Divisor<Index> columns;  // J
  Divisor<Index> own[2];   // M of a shard, and of a longer one
  Divisor<Index> rows;     // A1
};

struct Place {
  int64_t a0, a1, m, j, c;  // m in the shard; c in vectors
};

// The axes of vector `flat` of a shard. The quotients of 32-bit indices stay in 32 bits until here.
template <typename Index>
OPENSORA_HOST_DEVICE constexpr Place place_of(Index flat, const Copy<Index>& copy, bool is_longer) {
  const Divisor<Index>& own = copy.own[is_longer ? 1 : 0];
  const Index run = divide(flat, copy.vectors);
  const Index m_and_up = divide(run, copy.columns);
  const Index row = divide(m_and_up, own);
  const Index a0 = divide(row, copy.rows);
  return {static_cast<int64_t>(a0), static_cast<int64_t>(row - a0 * copy.rows.divisor),
          static_cast<int64_t>(m_and_up - row * own.divisor),
          static_cast<int64_t>(run - m_and_up * copy.columns.divisor),
          static_cast<int64_t>(flat - run * copy.vectors.divisor)};
}

// Bytes from a tensor's start to a place in its shard that begins at `start`.
OPENSORA_HOST_DEVICE constexpr int64_t tensor_offset(const Place& place, const Strides& strides, int64_t start,
                                                     int vector_bytes) {
  return place.a0 * strides.a0 + place.a1 * strides.a1 + (start + place.m) * strides.m + place.j * strides.j +
         place.c * vector_bytes;
}

// Vectors from the start of the packed buffer, or of the shard's own, to the part of `tensor` in `shard`.
OPENSORA_HOST_DEVICE constexpr int64_t packed_vectors(const Shards& shards, int64_t shard, int64_t tensor,
                                                      int64_t total_tensors, int64_t shard_vectors, bool has_targets) {
  const int64_t before = has_targets ? 0 : shard_start(shards, shard) * total_tensors;
  return (before + tensor * shard_size(shards, shard)) * shard_vectors;
}

template <int kVectorBytes>
struct alignas(kVectorBytes) Vector {
  using Word = uint32_t;
  Word words[kVectorBytes / sizeof(Word)];
};
template <>
struct Vector<2> {
  uint16_t word;
};
template <>
struct Vector<1> {
  uint8_t word;
};

// The work of one thread: four vectors of one shard of one tensor, a block's width apart. Neighbouring blocks take the
// shards of the same rows, which lie side by side in memory; a push so writes to all peers at once.
template <int kVectorBytes, bool kIsPacking, typename Index>
OPENSORA_HOST_DEVICE void copy_vectors(const Copy<Index>& copy, uint32_t block, uint32_t thread) {
  using Moved = Vector<kVectorBytes>;
  const uint32_t num_units = static_cast<uint32_t>(copy.num_shards) * static_cast<uint32_t>(copy.num_tensors);
  const uint32_t chunk = block / num_units;
  const uint32_t unit = block - chunk * num_units;
  const uint32_t tensor = unit / static_cast<uint32_t>(copy.num_shards);
  const uint32_t shard = unit - tensor * static_cast<uint32_t>(copy.num_shards);

  const bool is_longer = shard < copy.shards.num_longer;
  const int64_t start = shard_start(copy.shards, shard);
  const int64_t across = copy.num_rows * copy.row_vectors;  // of one position of M
  const Index count = static_cast<Index>(shard_size(copy.shards, shard) * across);
  const int64_t first =
      packed_vectors(copy.shards, shard, copy.first_tensor + tensor, copy.total_tensors, across, copy.has_targets);
  Moved* packed = reinterpret_cast<Moved*>(copy.has_targets ? copy.targets[shard] : copy.packed) + first;
  char* own = copy.tensors[tensor];
  const Strides strides = copy.strides[tensor];

  const Index base = static_cast<Index>(chunk) * kVectorsPerBlock + thread;
  Moved moved[kVectorsPerThread];
  Moved* there[kVectorsPerThread];
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const Index flat = base + i * kThreads;
    if (flat < count) {
      there[i] =
          reinterpret_cast<Moved*>(own + tensor_offset(place_of(flat, copy, is_longer), strides, start, kVectorBytes));
      moved[i] = kIsPacking ? *there[i] : packed[flat];
    }
  }
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const Index flat = base + i * kThreads;
    if (flat < count) {
      *(kIsPacking ? packed + flat : there[i]) = moved[i];
    }
  }
}

}  // namespace opensora::shards
