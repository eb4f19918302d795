// What replays of kernels share: 16-bit numbers, and roles that stop at barriers.
#pragma once

#include <algorithm>
#include <cmath>
#include <coroutine>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>

#include "hopper_model.h"

namespace opensora::model {

// ---- numbers ----

inline float widened(uint16_t element, bool is_bfloat16) {
  const uint32_t bits = element;
  if (is_bfloat16) {
    const uint32_t wide = bits << 16;
    float number;
    std::memcpy(&number, &wide, 4);
    return number;
  }
  const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return fraction ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  }
  return sign * std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
}

// To nearest, ties to even, for finite numbers within the type's range.
inline uint16_t rounded(float number, bool is_bfloat16) {
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  if (std::isnan(number)) {
    return 0x7fff;
  }
  if (is_bfloat16) {
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  const float size = std::fabs(number);
  const int exponent = size == 0.0f ? -14 : std::max(-14, std::ilogb(size));
  // between 0 and 2048: the fraction with its leading one, which may carry into the exponent
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>((bits >> 31 << 15) | static_cast<uint32_t>(((exponent + 14) << 10) + fraction));
}

// ---- roles: coroutines, which stop at barriers ----

struct Wait {
  const Barrier* barrier;
  uint32_t parity;
};

struct Role {
  struct promise_type {
    Wait awaited{};

    Role get_return_object() {
      return {std::coroutine_handle<promise_type>::from_promise(*this)};
    }
    std::suspend_always initial_suspend() noexcept {
      return {};
    }
    std::suspend_always final_suspend() noexcept {
      return {};
    }
    std::suspend_always await_transform(Wait wait) {
      awaited = wait;
      return {};
    }
    void return_void() {}
    void unhandled_exception() {
      std::terminate();
    }
  };

  std::coroutine_handle<promise_type> handle;

  bool can_go_on() const {
    const Wait& awaited = handle.promise().awaited;
    return !handle.done() && (awaited.barrier == nullptr || awaited.barrier->has_ended(awaited.parity));
  }
};

}  // namespace opensora::model
