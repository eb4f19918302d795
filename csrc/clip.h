// A clip (B, C, T, H, W) in memory, as kernels of the CPU library take it; plain data, without torch.
//
// Rows follow each other and either positions (channels_last false) or channels (true) lie side by side. The functions
// are each capability's own, so that none compiled for another CPU takes their place.
#pragma once

#include <cstdint>

#ifndef OPENSORA_CAPABILITY
#define OPENSORA_CAPABILITY generic
#endif

namespace opensora {

struct Clip {
  char* data;
  bool is_bf16;  // else fp32
  bool channels_last;
  int64_t num_samples, num_channels, num_frames, height, width;
  int64_t stride_b, stride_c, stride_t, stride_w;  // in elements; a row is `width` positions after the one before it
};

enum class SpacePadding : int64_t { zeros = 0, replicate = 1, reflect = 2 };

// Pixels around each frame of a result, and where they come from.
struct Border {
  int64_t left, right, top, bottom;
  SpacePadding mode;
};

namespace OPENSORA_CAPABILITY {

inline int64_t num_positions_of(const Clip& clip) {
  return clip.height * clip.width;
}

template <class Element>
inline Element* place_in(const Clip& clip, int64_t sample, int64_t channel, int64_t frame, int64_t position) {
  return reinterpret_cast<Element*>(clip.data) + sample * clip.stride_b + channel * clip.stride_c +
         frame * clip.stride_t + position * clip.stride_w;
}

inline bool is_empty(const Border& border) {
  return border.left == 0 && border.right == 0 && border.top == 0 && border.bottom == 0;
}

// The row or column that `index`, counted from the frame's own first, shows; -1 for zeros.
inline int64_t source_of(int64_t index, int64_t size, SpacePadding mode) {
  if (index >= 0 && index < size) {
    return index;
  }
  if (mode == SpacePadding::zeros) {
    return -1;
  }
  if (mode == SpacePadding::replicate) {
    return index < 0 ? 0 : size - 1;
  }
  return index < 0 ? -index : 2 * (size - 1) - index;
}

}  // namespace OPENSORA_CAPABILITY
}  // namespace opensora
