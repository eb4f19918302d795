// The kernel of softmax attention on Hopper, forward, for bf16 and fp16 heads of 64, 72, 96 or 128 elements; after
// FlashAttention-3.
//
// One thread copies tiles by TMA into rings of shared memory; two or three warpgroups take 64 queries each. A warpgroup
// weighs the scores of one block of keys while the tensor cores add up the values of the block before. Scores, maxima
// and sums are fp32; weights are rounded once, to the values' dtype; the result is rounded once.

#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "attention_maps.h"
#include "attention_products.h"
#include "hopper.h"

namespace opensora::attention {
namespace {  // so that symbols name the file that instantiates them

struct Maps {
  CUtensorMap queries, query_tails, keys, key_tails, values;
};

struct Arguments {
  const int64_t* lengths;  // keys of each sample, or null: all
  const int64_t* ends;     // of packed keys, the one after each sample's last, or null
  void* out;
  float* lse;  // to base 2, as Triton's backward pass reads it
  int num_tiles, num_blocks, num_heads, num_inner, num_queries, num_keys;
  float scale_log2;
};

__device__ __forceinline__ Keys keys_at(const Arguments& arguments, const Place& at) {
  return keys_of(arguments.num_keys, arguments.lengths == nullptr ? nullptr : arguments.lengths + at.sample,
                 arguments.ends == nullptr ? nullptr : arguments.ends + at.sample);
}

// One thread. Waits for stages that consumers left, and fills them in the order in which these take them.
template <int kHeadSize>
__device__ __forceinline__ void produce(const Maps& maps, const Arguments& arguments, uint32_t shared) {
  using T = Tile<kHeadSize>;
  const auto barrier = [&](Barrier kind, int stage = 0) { return shared + T::kBarriers + barrier_offset(kind, stage); };
  // pieces of 64 columns, then the tail, of `num_rows` rows from `row` on
  const auto copy_rows = [&](uint32_t target, const CUtensorMap& wide, const CUtensorMap& tail, uint32_t full,
                             int num_rows, int row, int head, int p, int o) {
#pragma unroll
    for (int piece = 0; piece < T::kNumWide; ++piece) {
      hopper::copy_box(target + piece * num_rows * kWideBytes, &wide, full, piece * kWideColumns, row, head, p, o);
    }
    if constexpr (T::kTailColumns > 0) {
      hopper::copy_box(target + T::kNumWide * num_rows * kWideBytes, &tail, full, T::kNumWide * kWideColumns, row, head,
                       p, o);
    }
  };
  Ring ring;
  Ring rounds;  // of queries, in a ring of one
  for (int tile = blockIdx.x; tile < arguments.num_tiles; tile += gridDim.x) {
    const Place at = place(tile, arguments.num_blocks, arguments.num_heads, arguments.num_inner, T::kBlockQueries);
    const Keys keys = keys_at(arguments, at);
    const int num_blocks = num_key_blocks(keys.length);
    if (num_blocks == 0) {
      continue;
    }
    const int o = arguments.ends == nullptr ? at.o : 0;
    const int p = arguments.ends == nullptr ? at.p : 0;
    hopper::barrier_wait(barrier(Barrier::kQueriesEmpty), rounds.parity ^ 1);
    hopper::barrier_arrive_expecting(barrier(Barrier::kQueriesFull), T::kQueryBytes);
    copy_rows(shared, maps.queries, maps.query_tails, barrier(Barrier::kQueriesFull), T::kBlockQueries, at.first_query,
              at.head, at.p, at.o);
    rounds.advance(1);
#pragma unroll 1
    for (int block = 0; block < num_blocks; ++block) {
      const int first_key = keys.first + block * kBlockKeys;
      const uint32_t keys_full = barrier(Barrier::kKeysFull, ring.stage);
      hopper::barrier_wait(barrier(Barrier::kKeysEmpty, ring.stage), ring.parity ^ 1);
      hopper::barrier_arrive_expecting(keys_full, T::kKeyBytes);
      copy_rows(shared + T::kKeys + ring.stage * T::kKeyBytes, maps.keys, maps.key_tails, keys_full, kBlockKeys,
                first_key, at.head, p, o);
      const uint32_t values_full = barrier(Barrier::kValuesFull, ring.stage);
      hopper::barrier_wait(barrier(Barrier::kValuesEmpty, ring.stage), ring.parity ^ 1);
      hopper::barrier_arrive_expecting(values_full, T::kValueBytes);
#pragma unroll
      for (int piece = 0; piece < T::kNumValuePieces; ++piece) {
        hopper::copy_box(shared + T::kValues + ring.stage * T::kValueBytes + piece * kBlockKeys * kWideBytes,
                         &maps.values, values_full, piece * kWideColumns, first_key, at.head, p, o);
      }
      ring.advance(T::kNumStages);
    }
  }
}

// Two neighbouring elements of a row.
template <typename Element>
__device__ __forceinline__ uint32_t packed(float first, float second) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ float exp2_fast(float x) {
  float power;  // weights below 2^-126 become zero
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// What a thread knows of its two rows, eight apart; their columns lie in four neighbouring threads.
struct Rows {
  float highest[2] = {-INFINITY, -INFINITY};  // score, of all columns
  float total[2] = {0.0f, 0.0f};              // weight, of this thread's columns
  float rescale[2];                           // from the highest score before to the highest one
};

// Scores become weights relative to the highest score so far. The first block has a key, so that is finite.
__device__ __forceinline__ void weigh(float (&scores)[kBlockKeys / 2], Rows& rows, int num_left, float scale_log2) {
  if (num_left < kBlockKeys) {
#pragma unroll
    for (int i = 0; i < kBlockKeys / 2; ++i) {
      scores[i] = sum_column(threadIdx.x % 128, i) < num_left ? scores[i] : -INFINITY;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float highest = rows.highest[half];
#pragma unroll
    for (int i = 2 * half; i < kBlockKeys / 2; i += 4) {
      highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
    }
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
    rows.rescale[half] = exp2_fast((rows.highest[half] - highest) * scale_log2);
    rows.highest[half] = highest;
    const float shift = -highest * scale_log2;
    float total = rows.total[half] * rows.rescale[half];
#pragma unroll
    for (int i = 2 * half; i < kBlockKeys / 2; i += 4) {
      scores[i] = exp2_fast(fmaf(scores[i], scale_log2, shift));
      scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale_log2, shift));
      total += scores[i] + scores[i + 1];
    }
    rows.total[half] = total;
  }
}

template <typename Element>
__device__ __forceinline__ void round_weights(const float (&scores)[kBlockKeys / 2],
                                              uint32_t (&weights)[kBlockKeys / 4]) {
#pragma unroll
  for (int i = 0; i < kBlockKeys / 4; ++i) {
    weights[i] = packed<Element>(scores[first_score(i)], scores[first_score(i) + 1]);
  }
}

template <int kHeadSize, typename Element>
__device__ __forceinline__ void start_scores(float (&scores)[kBlockKeys / 2], uint32_t queries, uint32_t keys,
                                             int first_row) {
#pragma unroll
  for (int step = 0; step < Tile<kHeadSize>::kNumSteps; ++step) {
    hopper::rows_by_rows<Element>(scores, query_descriptor<kHeadSize>(queries, first_row, step),
                                  key_descriptor<kHeadSize>(keys, step), step > 0);
  }
  hopper::products_commit();
}

template <int kHeadSize, typename Element>
__device__ __forceinline__ void start_values(float (&sums)[kHeadSize / 2], const uint32_t (&weights)[kBlockKeys / 4],
                                             uint32_t values) {
#pragma unroll
  for (int step = 0; step < kBlockKeys / kProductDepth; ++step) {
    hopper::add_registers_by_columns<kHeadSize, Element>(sums, weights[4 * step], weights[4 * step + 1],
                                                         weights[4 * step + 2], weights[4 * step + 3],
                                                         value_descriptor(values, step));
  }
  hopper::products_commit();
}

// Results of one warpgroup's queries. Four bytes a store: a tile is written once for all its blocks of keys.
template <int kHeadSize, typename Element>
__device__ __forceinline__ void store(const Arguments& arguments, const Place& at, int first_row, const Rows& rows,
                                      const float (&sums)[kHeadSize / 2]) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = rows.total[half];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    const int query = at.first_query + first_row + sum_row(thread, 2 * half);
    if (query >= arguments.num_queries) {
      continue;
    }
    const bool has_keys = total > 0.0f;  // a sample without any gives zeros
    const float inverse = 1.0f / (has_keys ? total : 1.0f);
    Element* row = static_cast<Element*>(arguments.out) +
                   out_offset(at, query, arguments.num_queries, arguments.num_heads, kHeadSize);
#pragma unroll
    for (int i = 2 * half; i < kHeadSize / 2; i += 4) {
      *reinterpret_cast<uint32_t*>(row + sum_column(thread, i)) =
          packed<Element>(sums[i] * inverse, sums[i + 1] * inverse);
    }
    if (thread % 4 == 0) {
      arguments.lse[lse_offset(at, query, arguments.num_queries, arguments.num_heads)] =
          has_keys ? rows.highest[half] * arguments.scale_log2 + log2f(total) : INFINITY;
    }
  }
}

// One warpgroup, whose queries begin at `first_row` of the tile. Each warp says for itself that it has left a stage: it
// can't know how far the others' products are.
template <int kHeadSize, typename Element>
__device__ __forceinline__ void consume(const Arguments& arguments, uint32_t shared, int first_row) {
  using T = Tile<kHeadSize>;
  const auto barrier = [&](Barrier kind, int stage = 0) { return shared + T::kBarriers + barrier_offset(kind, stage); };
  const auto leave = [&](Barrier kind, int stage = 0) {
    if (threadIdx.x % 32 == 0) {
      hopper::barrier_arrive(barrier(kind, stage));
    }
  };
  Ring key_ring, value_ring, rounds;
  for (int tile = blockIdx.x; tile < arguments.num_tiles; tile += gridDim.x) {
    const Place at = place(tile, arguments.num_blocks, arguments.num_heads, arguments.num_inner, T::kBlockQueries);
    const int length = keys_at(arguments, at).length;
    const int num_blocks = num_key_blocks(length);
    Rows rows;
    float sums[kHeadSize / 2] = {};
    if (num_blocks > 0) {
      float scores[kBlockKeys / 2];
      uint32_t weights[kBlockKeys / 4];
      hopper::barrier_wait(barrier(Barrier::kQueriesFull), rounds.parity);
      hopper::barrier_wait(barrier(Barrier::kKeysFull, key_ring.stage), key_ring.parity);
      hopper::products_fence();
      start_scores<kHeadSize, Element>(scores, shared, shared + T::kKeys + key_ring.stage * T::kKeyBytes, first_row);
      hopper::products_wait<0>();
      hopper::pin(scores);
      leave(Barrier::kKeysEmpty, key_ring.stage);
      key_ring.advance(T::kNumStages);
      weigh(scores, rows, keys_left(length, 0), arguments.scale_log2);
      round_weights<Element>(scores, weights);
      hopper::barrier_wait(barrier(Barrier::kValuesFull, value_ring.stage), value_ring.parity);
#pragma unroll 1
      for (int block = 1; block < num_blocks; ++block) {
        hopper::barrier_wait(barrier(Barrier::kKeysFull, key_ring.stage), key_ring.parity);
        hopper::products_fence();
        start_scores<kHeadSize, Element>(scores, shared, shared + T::kKeys + key_ring.stage * T::kKeyBytes, first_row);
        start_values<kHeadSize, Element>(sums, weights, shared + T::kValues + value_ring.stage * T::kValueBytes);
        hopper::products_wait<1>();
        hopper::pin(scores);
        leave(Barrier::kKeysEmpty, key_ring.stage);
        key_ring.advance(T::kNumStages);
        weigh(scores, rows, keys_left(length, block), arguments.scale_log2);
        // The next values, awaited here: without a branch before it the compiler moves the wait for the products of the
        // last ones up to the maxima, and no weight overlaps a product.
        const Ring last_values = value_ring;
        value_ring.advance(T::kNumStages);
        hopper::barrier_wait(barrier(Barrier::kValuesFull, value_ring.stage), value_ring.parity);
        hopper::products_wait<0>();
        hopper::pin(sums);
        hopper::pin(weights);
        leave(Barrier::kValuesEmpty, last_values.stage);
#pragma unroll
        for (int i = 0; i < kHeadSize / 2; ++i) {
          sums[i] *= rows.rescale[i / 2 % 2];
        }
        round_weights<Element>(scores, weights);
      }
      leave(Barrier::kQueriesEmpty);
      rounds.advance(1);
      hopper::products_fence();
      start_values<kHeadSize, Element>(sums, weights, shared + T::kValues + value_ring.stage * T::kValueBytes);
      hopper::products_wait<0>();
      hopper::pin(sums);
      leave(Barrier::kValuesEmpty, value_ring.stage);
      value_ring.advance(T::kNumStages);
    }
    store<kHeadSize, Element>(arguments, at, first_row, rows, sums);
  }
}

template <int kHeadSize, typename Element>
__global__ void __launch_bounds__(Tile<kHeadSize>::kNumThreads, 1)
    attention_forward_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments arguments) {
  using T = Tile<kHeadSize>;
  extern __shared__ uint8_t shared_memory[];
  const uint32_t shared = (hopper::shared_address(shared_memory) + 1023) & ~1023u;
  const uint32_t barriers = shared + T::kBarriers;
  if (threadIdx.x == 0) {
    const auto init = [&](Barrier kind, int stage, uint32_t num_arrivals) {
      hopper::barrier_init(barriers + barrier_offset(kind, stage), num_arrivals);
    };
    constexpr uint32_t kNumConsumerWarps = 4 * T::kNumConsumers;
    init(Barrier::kQueriesFull, 0, 1);
    init(Barrier::kQueriesEmpty, 0, kNumConsumerWarps);
    for (int stage = 0; stage < T::kNumStages; ++stage) {
      init(Barrier::kKeysFull, stage, 1);
      init(Barrier::kKeysEmpty, stage, kNumConsumerWarps);
      init(Barrier::kValuesFull, stage, 1);
      init(Barrier::kValuesEmpty, stage, kNumConsumerWarps);
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // known to be the same in a warp
  if (warpgroup == 0) {
    hopper::give_registers<T::kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<kHeadSize>(maps, arguments, shared);
    }
  } else {
    hopper::take_registers<T::kConsumerRegisters>();
    consume<kHeadSize, Element>(arguments, shared, (warpgroup - 1) * kProductRows);
  }
}

}  // namespace
}  // namespace opensora::attention
