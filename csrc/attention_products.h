// Products of matrices by a warpgroup of sm_90a: wgmma of 16-bit elements with sums in fp32.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

namespace opensora::hopper {

// PTX numbers operands by position, so the registers of each width are named once here.
#define OPENSORA_NAMES_32                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPENSORA_NAMES_36 \
  OPENSORA_NAMES_32       \
  ", %32, %33, %34, %35"
#define OPENSORA_NAMES_48 \
  OPENSORA_NAMES_36       \
  ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define OPENSORA_NAMES_64 \
  OPENSORA_NAMES_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPENSORA_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define OPENSORA_SUMS_16(i) OPENSORA_SUMS_4(i), OPENSORA_SUMS_4(i + 4), OPENSORA_SUMS_4(i + 8), OPENSORA_SUMS_4(i + 12)
#define OPENSORA_SUMS_32 OPENSORA_SUMS_16(0), OPENSORA_SUMS_16(16)
#define OPENSORA_SUMS_36 OPENSORA_SUMS_32, OPENSORA_SUMS_4(32)
#define OPENSORA_SUMS_48 OPENSORA_SUMS_32, OPENSORA_SUMS_16(32)
#define OPENSORA_SUMS_64 OPENSORA_SUMS_48, OPENSORA_SUMS_16(48)

// sums (+)= a b^T with a (64, 16) and b (128, 16) in shared memory, a row's columns side by side.
#define OPENSORA_ROWS_BY_ROWS(TYPE)                                                                                \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE \
               "." TYPE " {" OPENSORA_NAMES_64 "}, %64, %65, adds, 1, 1, 0, 0;\n}\n"                               \
               : OPENSORA_SUMS_64                                                                                  \
               : "l"(a), "l"(b), "r"(static_cast<int32_t>(adds)))

template <typename Element>
__device__ __forceinline__ void rows_by_rows(float (&sums)[64], uint64_t a, uint64_t b, bool adds) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    OPENSORA_ROWS_BY_ROWS("bf16");
  } else {
    OPENSORA_ROWS_BY_ROWS("f16");
  }
}

// sums += a b with a (64, 16) in registers and b (16, kColumns) in shared memory, a row's columns side by side.
#define OPENSORA_ADD_REGISTERS_BY_COLUMNS(TYPE, COLUMNS, COUNT, A, B)                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" OPENSORA_NAMES_##COUNT \
               "}, {" A "}, " B ", 1, 1, 1, 1;\n"                                                                \
               : OPENSORA_SUMS_##COUNT                                                                           \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))

#define OPENSORA_ADD_REGISTERS(TYPE)                                               \
  if constexpr (kColumns == 64) {                                                  \
    OPENSORA_ADD_REGISTERS_BY_COLUMNS(TYPE, 64, 32, "%32, %33, %34, %35", "%36");  \
  } else if constexpr (kColumns == 72) {                                           \
    OPENSORA_ADD_REGISTERS_BY_COLUMNS(TYPE, 72, 36, "%36, %37, %38, %39", "%40");  \
  } else if constexpr (kColumns == 96) {                                           \
    OPENSORA_ADD_REGISTERS_BY_COLUMNS(TYPE, 96, 48, "%48, %49, %50, %51", "%52");  \
  } else {                                                                         \
    static_assert(kColumns == 128);                                                \
    OPENSORA_ADD_REGISTERS_BY_COLUMNS(TYPE, 128, 64, "%64, %65, %66, %67", "%68"); \
  }

template <int kColumns, typename Element>
__device__ __forceinline__ void add_registers_by_columns(float (&sums)[kColumns / 2], uint32_t a0, uint32_t a1,
                                                         uint32_t a2, uint32_t a3, uint64_t b) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    OPENSORA_ADD_REGISTERS("bf16")
  } else {
    OPENSORA_ADD_REGISTERS("f16")
  }
}

#undef OPENSORA_ADD_REGISTERS
#undef OPENSORA_ADD_REGISTERS_BY_COLUMNS
#undef OPENSORA_ROWS_BY_ROWS
#undef OPENSORA_SUMS_64
#undef OPENSORA_SUMS_48
#undef OPENSORA_SUMS_36
#undef OPENSORA_SUMS_32
#undef OPENSORA_SUMS_16
#undef OPENSORA_SUMS_4
#undef OPENSORA_NAMES_64
#undef OPENSORA_NAMES_48
#undef OPENSORA_NAMES_36
#undef OPENSORA_NAMES_32

}  // namespace opensora::hopper
