// What the mma.sync kernels ask of the machine: asynchronous copies, ldmatrix and the tensor cores. See Warp and Copy
// in causal_conv3d_sm80_steps.h.
#pragma once

#include "half_types.h"

namespace opensora::sm80 {

// Blocks of 96 KB that the shared memory of an SM holds: 228 KB from Hopper on, 164 KB or less before. Two leave 128
// registers to a thread.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksOfMultiprocessor = 1;
#else
constexpr int kBlocksOfMultiprocessor = 2;
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, or zeros without reading. Keeps them in L1, where the next tap of the row finds them.
__device__ __forceinline__ void copy_through_l1(uint32_t target, const void* source, bool is_read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(is_read ? 16 : 0)
               : "memory");
}

// The same past L1: what no thread of this SM reads again soon.
__device__ __forceinline__ void copy_past_l1(uint32_t target, const void* source, bool is_read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(is_read ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kNumLeft of this thread's groups are on their way.
template <int kNumLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNumLeft) : "memory");
}

template <class Type>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_first,
                                             uint32_t b_second);

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_first,
                                                       uint32_t b_second) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_first), "r"(b_second));
}

template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_first,
                                                      uint32_t b_second) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_first), "r"(b_second));
}

template <class Type>
struct Warp {
  struct Matrices {
    uint32_t words[4];
  };
  struct Sums {
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  };

  uint32_t shared;  // address of byte 0
  int index;
  int lane;

  template <class ByteOfLane>
  __device__ __forceinline__ Matrices load(ByteOfLane byte_of_lane) const {
    Matrices found;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.words[0]), "=r"(found.words[1]), "=r"(found.words[2]), "=r"(found.words[3])
                 : "r"(shared + byte_of_lane(lane))
                 : "memory");
    return found;
  }

  template <class ByteOfLane>
  __device__ __forceinline__ Matrices load_transposed(ByteOfLane byte_of_lane) const {
    Matrices found;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.words[0]), "=r"(found.words[1]), "=r"(found.words[2]), "=r"(found.words[3])
                 : "r"(shared + byte_of_lane(lane))
                 : "memory");
    return found;
  }

  __device__ __forceinline__ void multiply(Sums& sums, const Matrices& a, const Matrices& b, int half) const {
    multiply_add<Type>(sums.values, a.words, b.words[2 * half], b.words[2 * half + 1]);
  }

  __device__ __forceinline__ void add_rows(Sums& sums, const Matrices& a) const {
    multiply_add<Type>(sums.values, a.words, Type::kTwoOnes, Type::kTwoOnes);
  }

  template <class Function>
  __device__ __forceinline__ void each_lane(const Sums& sums, Function function) const {
    function(lane, sums.values);
  }
};

}  // namespace opensora::sm80
