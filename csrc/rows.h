// What kernels over rows of numbers share: loops over a row's vectors, sums of a row, and rows in fp32 of their own.
#pragma once

#include <cstdlib>

#include "parallel.h"
#include "vector.h"

namespace opensora::OPENSORA_CAPABILITY {

// A whole vector, or the first few lanes of a row's last one: tags by which one text serves both.
struct AllLanes {};
struct FirstLanes {
  int64_t count;
};

template <class Element>
inline Vector load(const Element* source, AllLanes) {
  return load(source);
}

template <class Element>
inline Vector load(const Element* source, FirstLanes lanes) {
  return load(source, lanes.count);
}

template <class Element>
inline void store(Element* target, Vector value, AllLanes) {
  store(target, value);
}

template <class Element>
inline void store(Element* target, Vector value, FirstLanes lanes) {
  store(target, value, lanes.count);
}

inline Vector kept(Vector value, AllLanes) {
  return value;
}

// `other` in the other lanes; `lanes` may be all.
inline Vector kept(Vector value, FirstLanes lanes, float other = 0.0f) {
#ifdef OPENSORA_HAS_AVX512
  return (Vector)_mm512_mask_mov_ps((__m512)splat(other), first_lanes(lanes.count), (__m512)value);
#else
  for (int i = 0; i < num_lanes; ++i) {
    value[i] = i < lanes.count ? value[i] : other;
  }
  return value;
#endif
}

// A product that the compiler may not contract with a sum that follows: it is rounded, as PyTorch's own are.
inline Vector product(Vector a, Vector b) {
  Vector value = a * b;
#if defined(OPENSORA_HAS_AVX512)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

// Neighbours change places.
inline Vector swapped_pairs(Vector value) {
#if defined(OPENSORA_HAS_AVX512)
  return (Vector)_mm512_permute_ps(value, 0xb1);
#elif defined(__AVX2__)
  return (Vector)_mm256_permute_ps(value, 0xb1);
#elif defined(__x86_64__)
  return (Vector)_mm_shuffle_ps(value, value, 0xb1);
#else
  return Vector{value[1], value[0], value[3], value[2]};
#endif
}

// body(start, lanes) for a row's vectors.
template <class Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + num_lanes <= size; i += num_lanes) {
    body(i, AllLanes{});
  }
  if (i < size) {
    body(i, FirstLanes{size - i});
  }
}

// The sum of body(start, lanes) over a row, whose lanes beyond the row are left out.
template <class Body>
inline __attribute__((always_inline)) float sum_of_row(int64_t size, const Body& body) {
  Vector totals[4] = {};  // apart, so that no sum waits for the one before
  int64_t i = 0;
  for (; i + 4 * num_lanes <= size; i += 4 * num_lanes) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      totals[part] += body(i + part * num_lanes, AllLanes{});
    }
  }
  for (; i + num_lanes <= size; i += num_lanes) {
    totals[0] += body(i, AllLanes{});
  }
  if (i < size) {
    const FirstLanes lanes{size - i};
    totals[1] += kept(body(i, lanes), lanes);
  }
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

// 1 / sqrt(value) in all lanes. By a scalar root and division: those of 16 lanes take three times as long.
inline Vector reciprocal_root_of(float value) {
  return splat(1.0f / __builtin_sqrtf(value));
}

// Rows of fp32, each beginning at a vector's boundary and filled with zeros.
class Rows {
 public:
  Rows(int64_t num_rows, int64_t size) : stride_(padded(size)) {
    const size_t num_bytes = sizeof(float) * static_cast<size_t>(num_rows * stride_) + 64;
    memory_ = std::malloc(num_bytes);
    if (memory_ == nullptr) {
      std::abort();  // a few hundred kilobytes
    }
    std::memset(memory_, 0, num_bytes);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_);
    first_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
  ~Rows() {
    std::free(memory_);
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  float* operator[](int64_t row) const {
    return first_ + row * stride_;
  }
  int64_t stride() const {
    return stride_;
  }

  // Numbers of the vectors that hold `size` numbers.
  static int64_t padded(int64_t size) {
    return (size + num_lanes - 1) / num_lanes * num_lanes;
  }

 private:
  void* memory_;
  float* first_;
  int64_t stride_;
};

// body(begin, end) for parts of [0, num_rows) of about `row_elements` elements each, by torch's threads.
template <class Body>
inline void for_each_range(int64_t num_rows, int64_t row_elements, const Body& body) {
  const int64_t grain = row_elements < grain_elements ? grain_elements / (row_elements > 0 ? row_elements : 1) : 1;
  auto run = [](int64_t begin, int64_t end, const void* context) { (*static_cast<const Body*>(context))(begin, end); };
  run_in_parallel(num_rows, grain, run, &body);
}

// Converts a row of fp32, or of bf16 if `is_narrow`.
inline void copy_row(float* target, const void* source, bool is_narrow, int64_t size) {
  for_each_vector(size, [&](int64_t i, auto lanes) {
    const Vector value = is_narrow ? load(static_cast<const BFloat16*>(source) + i, lanes)
                                   : load(static_cast<const float*>(source) + i, lanes);
    store(target + i, value, lanes);
  });
}

}  // namespace opensora::OPENSORA_CAPABILITY
