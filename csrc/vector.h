// Fixed-width vectors of fp32 for kernels that CMake compiles once for each capability of a CPU.
//
// GCC's and Clang's vector extensions, so that one text serves x86-64 and aarch64. Numbers are loaded from fp32 or bf16
// and computed with in fp32. Kernel files include no header of torch and call nothing but what is here and in
// parallel.h: an inline function compiled with AVX512 could otherwise replace its like in the rest of the library.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifndef OPENSORA_CAPABILITY
#define OPENSORA_CAPABILITY generic
#endif

namespace opensora {

// The bits of a bfloat16.
struct BFloat16 {
  uint16_t bits;
};

namespace OPENSORA_CAPABILITY {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define OPENSORA_HAS_AVX512
inline constexpr int num_lanes = 16;
#elif defined(__AVX2__)
inline constexpr int num_lanes = 8;
#else
inline constexpr int num_lanes = 4;
#endif

using Vector = float __attribute__((vector_size(4 * num_lanes)));
using Integers = int32_t __attribute__((vector_size(4 * num_lanes)));
using Bits = uint32_t __attribute__((vector_size(4 * num_lanes)));
using Halves = uint16_t __attribute__((vector_size(2 * num_lanes)));

inline Vector splat(float value) {
  return value - Vector{};  // keeps the sign of zero
}

// a * b + c, rounded once where the CPU can (the compiler's contraction), else twice.
inline Vector fma(Vector a, Vector b, Vector c) {
  return a * b + c;
}

// In intrinsics where GCC 12 makes several instructions of one. NaN where b is NaN.
inline Vector maximum(Vector a, Vector b) {
#ifdef OPENSORA_HAS_AVX512
  return (Vector)_mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return (Vector)_mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return (Vector)_mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vector minimum(Vector a, Vector b) {
#ifdef OPENSORA_HAS_AVX512
  return (Vector)_mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return (Vector)_mm256_min_ps(a, b);
#elif defined(__x86_64__)
  return (Vector)_mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline Vector widened(Halves halves) {
#ifdef OPENSORA_HAS_AVX512
  const Bits bits = (Bits)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
  const Bits bits = (Bits)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  const Bits bits = __builtin_convertvector(halves, Bits);
#endif
  return (Vector)(bits << 16);
}

// To bf16, to the nearest, ties to even; NaN stays NaN.
inline Halves narrowed(Vector value) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh(value);  // takes subnormal numbers, below 1.2e-38, for zero
#else
  const Bits bits = (Bits)value;
  const Bits rounded = bits + (0x7fff + ((bits >> 16) & 1));
  const Bits kept = value == value ? rounded : (bits | 0x400000);
#if defined(OPENSORA_HAS_AVX512)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)(kept >> 16));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)(kept >> 16), (__m256i)(kept >> 16));
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(kept >> 16, Halves);
#endif
#endif
}

// Rounded to the element's type and back, as a chain of operators that stores in between does.
template <class Element>
inline Vector rounded_to(Vector value);

template <>
inline Vector rounded_to<float>(Vector value) {
  return value;
}

template <>
inline Vector rounded_to<BFloat16>(Vector value) {
#ifdef __AVX512BF16__
  return widened(narrowed(value));
#else
  const Bits bits = (Bits)value;  // without packing lanes for memory
  const Bits rounded = bits + (0x7fff + ((bits >> 16) & 1));
  return (Vector)((value == value ? rounded : (bits | 0x400000)) & 0xffff0000u);
#endif
}

inline Vector load(const float* source) {
  Vector value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

inline Vector load(const BFloat16* source) {
  Halves halves;
  std::memcpy(&halves, source, sizeof(halves));
  return widened(halves);
}

inline void store(float* target, Vector value) {
  std::memcpy(target, &value, sizeof(value));
}

inline void store(BFloat16* target, Vector value) {
  const Halves halves = narrowed(value);
  std::memcpy(target, &halves, sizeof(halves));
}

#ifdef OPENSORA_HAS_AVX512

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1);
}

// The first `count` < num_lanes elements, zero in the other lanes; nothing beyond them is read.
inline Vector load(const float* source, int64_t count) {
  return (Vector)_mm512_maskz_loadu_ps(first_lanes(count), source);
}

inline Vector load(const BFloat16* source, int64_t count) {
  return widened((Halves)_mm256_maskz_loadu_epi16(first_lanes(count), source));
}

inline void store(float* target, Vector value, int64_t count) {
  _mm512_mask_storeu_ps(target, first_lanes(count), value);
}

inline void store(BFloat16* target, Vector value, int64_t count) {
  _mm256_mask_storeu_epi16(target, first_lanes(count), (__m256i)narrowed(value));
}

#else

// The first `count` < num_lanes elements, zero in the other lanes; nothing beyond them is read.
inline Vector load(const float* source, int64_t count) {
  Vector value{};
  std::memcpy(&value, source, sizeof(float) * count);
  return value;
}

inline Vector load(const BFloat16* source, int64_t count) {
  Halves halves{};
  std::memcpy(&halves, source, sizeof(BFloat16) * count);
  return widened(halves);
}

inline void store(float* target, Vector value, int64_t count) {
  std::memcpy(target, &value, sizeof(float) * count);
}

inline void store(BFloat16* target, Vector value, int64_t count) {
  const Halves halves = narrowed(value);
  std::memcpy(target, &halves, sizeof(BFloat16) * count);
}

#endif

inline float load_one(const float* source) {
  return *source;
}

inline float load_one(const BFloat16* source) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(source->bits) << 16);
}

// All lanes joined to one, halves onto halves, the same order always. In intrinsics: GCC 12 makes a loop through memory
// of anything else.
template <class Join>
inline float folded(Vector value, const Join& join) {
#ifdef __x86_64__
#ifdef OPENSORA_HAS_AVX512
  const __m256 eight = join(_mm512_castps512_ps256((__m512)value), _mm512_extractf32x8_ps((__m512)value, 1));
  const __m128 four = join(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX2__)
  const __m128 four = join(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
#else
  const __m128 four = (__m128)value;
#endif
  const __m128 two = join(four, _mm_movehl_ps(four, four));
  return join(two, _mm_shuffle_ps(two, two, 1))[0];
#else
  const float first = join(value[0], value[2]), second = join(value[1], value[3]);
  return join(first, second);
#endif
}

inline float sum(Vector value) {
  return folded(value, [](auto a, auto b) { return a + b; });
}

inline float largest(Vector value) {
  return folded(value, [](auto a, auto b) { return a > b ? a : b; });
}

inline Vector square_root(Vector value) {
#ifdef OPENSORA_HAS_AVX512
  return (Vector)_mm512_sqrt_ps(value);
#elif defined(__AVX2__)
  return (Vector)_mm256_sqrt_ps(value);
#elif defined(__x86_64__)
  return (Vector)_mm_sqrt_ps(value);
#else
  for (int i = 0; i < num_lanes; ++i) {
    value[i] = __builtin_sqrtf(value[i]);
  }
  return value;
#endif
}

// 1 / sqrt(value) by a root and a division: the CPU's own estimate has 14 bits.
inline Vector reciprocal_root(Vector value) {
  return 1.0f / square_root(value);
}

// value * 2^exponent for whole exponents in [-252, 254].
inline Vector scaled(Vector value, [[maybe_unused]] Vector exponent, [[maybe_unused]] Integers whole) {
#ifdef OPENSORA_HAS_AVX512
  return (Vector)_mm512_scalef_ps(value, exponent);
#else
  const Integers half = whole >> 1;  // in two steps: 2^128 is no number, and results below 2^-126 are rounded once
  return value * (Vector)((half + 127) << 23) * (Vector)((whole - half + 127) << 23);
#endif
}

// e^value: 2^n e^r with |r| <= log(2) / 2, e^r = 1 + r + r^2 p(r); p by minimax, relative error 5e-11. At most one unit
// in the last place with fma; 0 below -104, infinity above 88.8, NaN for NaN.
inline Vector exponential(Vector value) {
  value = minimum(splat(89.0f), maximum(splat(-104.5f), value));
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
  const Vector shifted = value * 1.44269504f + shift;
  const Vector number = shifted - shift;
  Vector rest = value - number * 0.693359375f;  // exact: nine bits
  rest = rest - number * -2.12194440e-4f;
  Vector series = rest * 1.97903413e-4f + 1.39446591e-3f;
  series = series * rest + 8.3334968e-3f;
  series = series * rest + 4.16662954e-2f;
  series = series * rest + 1.66666657e-1f;
  series = series * rest + 0.5f;
  series = series * (rest * rest) + rest + 1.0f;
  return scaled(series, number, (Integers)shifted - __builtin_bit_cast(int32_t, shift));
}

inline Vector sigmoid(Vector value) {
  return 1.0f / (1.0f + exponential(-value));
}

// As PyTorch: value / (1 + e^-value).
inline Vector silu(Vector value) {
  return value / (1.0f + exponential(-value));
}

// e^value for results that are rounded to bf16: relative error 2e-7 plus 6e-8 |value|, a thousandth of that rounding or
// less; 0 below -104, infinity above 89, NaN for NaN. In half of exponential's instructions.
inline Vector coarse_exponential(Vector value) {
#ifdef OPENSORA_HAS_AVX512
  const Vector power = value * 1.44269504f;
  const Vector rest = (Vector)_mm512_reduce_ps(power, 0);  // from the nearest whole number; 0 for infinities
  const Vector number = power - rest;
#else
  const float shift = 12582912.0f;
  const Vector power = minimum(splat(129.0f), maximum(splat(-151.0f), value * 1.44269504f));
  const Vector shifted = power + shift;
  const Vector number = shifted - shift, rest = power - number;
#endif
  Vector series = rest * 1.3264713e-3f + 9.671523e-3f;
  series = series * rest + 5.550734e-2f;
  series = series * rest + 2.4022242e-1f;
  series = series * rest + 6.93147e-1f;
  series = series * rest + 1.0f;
#ifdef OPENSORA_HAS_AVX512
  return (Vector)_mm512_scalef_ps(series, number);
#else
  return scaled(series, number, (Integers)shifted - __builtin_bit_cast(int32_t, shift));
#endif
}

// SiLU and sigmoid as precise as results of type Element need them.
template <class Element>
inline Vector sigmoid_for(Vector value) {
  return sigmoid(value);
}

template <>
inline Vector sigmoid_for<BFloat16>(Vector value) {
  return 1.0f / (1.0f + coarse_exponential(-value));
}

template <class Element>
inline Vector silu_for(Vector value) {
  return silu(value);
}

template <>
inline Vector silu_for<BFloat16>(Vector value) {
  return value / (1.0f + coarse_exponential(-value));
}

}  // namespace OPENSORA_CAPABILITY
}  // namespace opensora
