// wgmma: the four warps of a warpgroup multiply 64 rows by N columns from shared memory and add to sums in registers.
#pragma once

#include <cstdint>

#include "half_types.h"

namespace opensora::hopper {

// An instruction names each of a thread's N / 2 sums, so that there is one function for each N. After them come the
// descriptors of both factors, whether to add to the sums (1), the factors' signs, and whether they are transposed: the
// sum runs along the rows of both factors in shared memory (`multiply`), or rows of both follow one another along the
// sum (`multiply_transposed`).
#define OPENSORA_SUMS_16(i)                                                                                     \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7]), "+f"(sums[i + 8]), "+f"(sums[i + 9]), "+f"(sums[i + 10]),           \
      "+f"(sums[i + 11]), "+f"(sums[i + 12]), "+f"(sums[i + 13]), "+f"(sums[i + 14]), "+f"(sums[i + 15])
#define OPENSORA_SUMS_32 OPENSORA_SUMS_16(0), OPENSORA_SUMS_16(16)
#define OPENSORA_SUMS_48 OPENSORA_SUMS_32, OPENSORA_SUMS_16(32)
#define OPENSORA_SUMS_64 OPENSORA_SUMS_48, OPENSORA_SUMS_16(48)
#define OPENSORA_SUMS_96 OPENSORA_SUMS_64, OPENSORA_SUMS_16(64), OPENSORA_SUMS_16(80)
#define OPENSORA_NAMES_32                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPENSORA_NAMES_48 \
  OPENSORA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define OPENSORA_NAMES_64 \
  OPENSORA_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPENSORA_NAMES_96                                                                   \
  OPENSORA_NAMES_64                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define OPENSORA_MULTIPLY(name, transposed, Type, dtype, n, num_sums, left_name, right_name, adds_name)           \
  __device__ __forceinline__ void name(Type, float (&sums)[num_sums], uint64_t left, uint64_t right) {            \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds_name                                              \
                 ", 0;\n"                                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." dtype "." dtype " {" OPENSORA_NAMES_##num_sums \
                 "}, " left_name ", " right_name ", adds, 1, 1, " transposed ", " transposed ";\n}\n"             \
                 : OPENSORA_SUMS_##num_sums                                                                       \
                 : "l"(left), "l"(right), "r"(1));                                                                \
  }
#define OPENSORA_MULTIPLY_BOTH(name, transposed, ...)                \
  OPENSORA_MULTIPLY(name, transposed, BFloat16, "bf16", __VA_ARGS__) \
  OPENSORA_MULTIPLY(name, transposed, Float16, "f16", __VA_ARGS__)

OPENSORA_MULTIPLY_BOTH(multiply, "0", 64, 32, "%32", "%33", "%34")
OPENSORA_MULTIPLY_BOTH(multiply, "0", 96, 48, "%48", "%49", "%50")
OPENSORA_MULTIPLY_BOTH(multiply, "0", 128, 64, "%64", "%65", "%66")
OPENSORA_MULTIPLY_BOTH(multiply, "0", 192, 96, "%96", "%97", "%98")
OPENSORA_MULTIPLY_BOTH(multiply_transposed, "1", 64, 32, "%32", "%33", "%34")
OPENSORA_MULTIPLY_BOTH(multiply_transposed, "1", 96, 48, "%48", "%49", "%50")
OPENSORA_MULTIPLY_BOTH(multiply_transposed, "1", 128, 64, "%64", "%65", "%66")

#undef OPENSORA_MULTIPLY_BOTH
#undef OPENSORA_MULTIPLY
#undef OPENSORA_NAMES_96
#undef OPENSORA_NAMES_64
#undef OPENSORA_NAMES_48
#undef OPENSORA_NAMES_32
#undef OPENSORA_SUMS_96
#undef OPENSORA_SUMS_64
#undef OPENSORA_SUMS_48
#undef OPENSORA_SUMS_32
#undef OPENSORA_SUMS_16

}  // namespace opensora::hopper
