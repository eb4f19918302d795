// Dynamic shared memory beyond 48 KiB, which a kernel has to ask for.
#pragma once

#include <cuda_runtime.h>

namespace opensora {

// Lets `kernel` be launched with `bytes` of dynamic shared memory. Not inlined: tests/sass.py reads from the name of
// this symbol how many bytes each kernel takes, which is written nowhere in its machine code.
template <auto kernel, int bytes>
__attribute__((noinline)) cudaError_t allow_shared_memory() {
  static_assert(bytes <= 227 * 1024, "a block's on sm_90; sm_80 has 163 KiB");
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace opensora
