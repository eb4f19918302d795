// float16 and bfloat16 as bits, rounded to nearest even, alike on device and host.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace opensora {

OPENSORA_HOST_DEVICE float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

OPENSORA_HOST_DEVICE uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

struct BFloat16 {
  static constexpr uint32_t kTwoOnes = 0x3f803f80u;

  static OPENSORA_HOST_DEVICE float widened(uint32_t bits) {
    return float_of_bits(bits << 16);
  }

  // Two numbers in one word, the first in its lower half.
  static OPENSORA_HOST_DEVICE uint32_t rounded(float first, float second) {
#ifdef __CUDA_ARCH__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
#else
    return rounded(first) | rounded(second) << 16;
#endif
  }

 private:
  static OPENSORA_HOST_DEVICE uint32_t rounded(float value) {
    const uint32_t bits = bits_of_float(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
};

struct Float16 {
  static constexpr uint32_t kTwoOnes = 0x3c003c00u;

  static OPENSORA_HOST_DEVICE float widened(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu)));
#else
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) {  // infinite or NaN
      return float_of_bits(sign | 0x7f800000u | (magnitude & 0x007fffffu));
    }
    return float_of_bits(sign | bits_of_float(float_of_bits(magnitude) * 0x1p112f));  // subnormal numbers as well
#endif
  }

  static OPENSORA_HOST_DEVICE uint32_t rounded(float first, float second) {
#ifdef __CUDA_ARCH__
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
#else
    return rounded(first) | rounded(second) << 16;
#endif
  }

 private:
  static OPENSORA_HOST_DEVICE uint32_t rounded(float value) {
    const uint32_t sign = bits_of_float(value) >> 16 & 0x8000u, magnitude = bits_of_float(value) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      return 0x7fffu;
    }
    if (magnitude < 0x38800000u) {  // subnormal: at 0.5 an fp32 counts in steps of 2^-24, as these do
      return sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u);
    }
    const uint32_t nearest = (magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
    return sign | (nearest < 0x7c00u ? nearest : 0x7c00u);
  }
};

}  // namespace opensora
