// Which of the variants of a kernel this CPU runs.
//
// A kernel of `<op>_kernels.cpp` stands in `namespace opensora::OPENSORA_CAPABILITY` and is compiled once for each
// capability; its header declares it with OPENSORA_DECLARE_KERNEL, and host code calls it with OPENSORA_RUN_KERNEL.
#pragma once

#include <cstdint>

namespace opensora {

enum class Capability : int64_t { generic = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best that this CPU has, found once, or a lower one that a test asked for.
Capability capability();

// Use at most `most` from now on; all that the CPU has if it is negative. Returns what is in use.
Capability limit_capability(int64_t most);

}  // namespace opensora

#define OPENSORA_DECLARE_IN(space, name, ...) \
  namespace opensora::space {                 \
  void name(__VA_ARGS__);                     \
  }

#ifdef __x86_64__
// void name(arguments) in each capability's namespace.
#define OPENSORA_DECLARE_KERNEL(name, ...)        \
  OPENSORA_DECLARE_IN(generic, name, __VA_ARGS__) \
  OPENSORA_DECLARE_IN(avx2, name, __VA_ARGS__)    \
  OPENSORA_DECLARE_IN(avx512, name, __VA_ARGS__)  \
  OPENSORA_DECLARE_IN(avx512_bf16, name, __VA_ARGS__)

// name(arguments) of the capability in use.
#define OPENSORA_RUN_KERNEL(name, ...)              \
  do {                                              \
    switch (::opensora::capability()) {             \
      case ::opensora::Capability::avx512_bf16:     \
        ::opensora::avx512_bf16::name(__VA_ARGS__); \
        break;                                      \
      case ::opensora::Capability::avx512:          \
        ::opensora::avx512::name(__VA_ARGS__);      \
        break;                                      \
      case ::opensora::Capability::avx2:            \
        ::opensora::avx2::name(__VA_ARGS__);        \
        break;                                      \
      case ::opensora::Capability::generic:         \
        ::opensora::generic::name(__VA_ARGS__);     \
        break;                                      \
    }                                               \
  } while (false)
#else
#define OPENSORA_DECLARE_KERNEL(name, ...) OPENSORA_DECLARE_IN(generic, name, __VA_ARGS__)
#define OPENSORA_RUN_KERNEL(name, ...) ::opensora::generic::name(__VA_ARGS__)
#endif
