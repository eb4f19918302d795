// Pixels around the rows of a clip.
#pragma once

#include <cstring>

#include "clip.h"

namespace opensora::OPENSORA_CAPABILITY {

template <class Element>
inline void clear(Element* target, int64_t count) {
  std::memset(target, 0, sizeof(Element) * count);
}

// To the left and right of a row of pixels, `num_channels` elements each, that begins `border.left` pixels after `row`.
template <class Element>
inline void add_sides(Element* row, int64_t width, const Border& border, int64_t num_channels) {
  auto fill = [&](int64_t column) {
    const int64_t source = source_of(column, width, border.mode);
    Element* target = row + (border.left + column) * num_channels;
    if (source < 0) {
      clear(target, num_channels);
    } else {
      std::memcpy(target, row + (border.left + source) * num_channels, sizeof(Element) * num_channels);
    }
  };
  for (int64_t column = -border.left; column < 0; ++column) {
    fill(column);
  }
  for (int64_t column = width; column < width + border.right; ++column) {
    fill(column);
  }
}

}  // namespace opensora::OPENSORA_CAPABILITY
