#include "capability.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "parallel.h"

namespace opensora {

namespace {

Capability best_capability() {
#ifdef __x86_64__
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx2 && has_avx512) {
    return __builtin_cpu_supports("avx512bf16") ? Capability::avx512_bf16 : Capability::avx512;
  }
  if (has_avx2) {
    return Capability::avx2;
  }
#endif
  return Capability::generic;
}

std::atomic<Capability>& in_use() {
  static std::atomic<Capability> value(best_capability());
  return value;
}

int64_t cpu_capability(int64_t most) {
  return static_cast<int64_t>(limit_capability(most));
}

}  // namespace

Capability capability() {
  return in_use().load(std::memory_order_relaxed);
}

Capability limit_capability(int64_t most) {
  const Capability best = best_capability();
  const bool is_lower = most >= 0 && most < static_cast<int64_t>(best);
  in_use().store(is_lower ? static_cast<Capability>(most) : best, std::memory_order_relaxed);
  return capability();
}

void run_in_parallel(int64_t num_blocks, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                     const void* context) {
  torch::stable::parallel_for(0, num_blocks, grain, [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace opensora

STABLE_TORCH_LIBRARY_FRAGMENT(opensora_kernels, library) {
  library.def("cpu_capability(int most) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&opensora::cpu_capability));
}
