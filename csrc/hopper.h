// What sm_90a offers beyond CUDA C++: barriers that count bytes, bulk copies of tensor boxes, register hand-over.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace opensora::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void initialize_barrier(uint32_t barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

// Barriers are written by ordinary stores; the copy engine ("async proxy") sees them after this and a __syncthreads.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `num_bytes` as well. Boxes count in full, also what lies outside the tensor.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}

// Until the phase of parity `phase` is complete. try_wait sleeps in hardware; the loop covers its time limit.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t phase) {
  uint32_t is_complete = 0;
  while (is_complete == 0) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(is_complete)
        : "r"(barrier), "r"(phase)
        : "memory");
  }
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at signed coordinates, innermost axis first, into shared memory. `barrier` gets its bytes.
__device__ __forceinline__ void load_box(uint32_t target, const CUtensorMap* map, uint32_t barrier, int i0, int i1,
                                         int i2, int i3, int i4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2), "r"(i3), "r"(i4)
      : "memory");
}

__device__ __forceinline__ void load_box(uint32_t target, const CUtensorMap* map, uint32_t barrier, int i0, int i1,
                                         int i2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2)
      : "memory");
}

// Every warp of a warpgroup must run these; multiples of 8.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  static_assert(kRegisters % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Warps that have `num_threads` in all meet at hardware barrier `index` (0 is __syncthreads).
__device__ __forceinline__ void meet(int index, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(index), "r"(num_threads) : "memory");
}

}  // namespace opensora::hopper
