// Count, mean and sum of squared deviations, merged without cancellation (Chan's formula).
#pragma once

#include "host_device.h"

namespace opensora {

struct Moments {
  float count, mean, squares;
};

OPENSORA_HOST_DEVICE constexpr Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0.0f) {
    return {0.0f, 0.0f, 0.0f};
  }
  const float apart = b.mean - a.mean;
  const float share = b.count / count;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

// How many of `size` positions lie in the part that begins at `first`.
OPENSORA_HOST_DEVICE constexpr int positions_of_part(int first, int part_size, int size) {
  return size - first < part_size ? size - first : part_size;
}

}  // namespace opensora
