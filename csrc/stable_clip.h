// From torch's tensors to the plain data that kernels of the CPU library take.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <vector>

#include "clip.h"

namespace opensora {

inline bool is_bf16(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  const bool is_bf16 = type == torch::headeronly::ScalarType::BFloat16;
  STD_TORCH_CHECK(is_bf16 || type == torch::headeronly::ScalarType::Float, op, ": ", name,
                  " must be float32 or bfloat16");
  return is_bf16;
}

// The clip in `tensor`, whose rows must follow each other with positions or channels side by side.
inline Clip clip_of(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 5, op, ": ", name, " must be (B, C, T, H, W) on the CPU");
  Clip clip{static_cast<char*>(tensor.data_ptr()),
            is_bf16(op, name, tensor),
            false,
            tensor.size(0),
            tensor.size(1),
            tensor.size(2),
            tensor.size(3),
            tensor.size(4),
            tensor.stride(0),
            tensor.stride(1),
            tensor.stride(2),
            0};
  clip.stride_w = clip.width > 1 ? tensor.stride(4) : clip.height > 1 ? tensor.stride(3) : 1;
  const bool rows_follow = clip.height == 1 || clip.width == 1 || tensor.stride(3) == clip.width * clip.stride_w;
  // a single position is a plane whatever its channels' stride
  clip.channels_last =
      clip.num_channels > 1 && clip.stride_c == 1 && clip.stride_w != 1 && clip.height * clip.width > 1;
  STD_TORCH_CHECK(tensor.numel() == 0 || (rows_follow && (clip.channels_last || clip.stride_w == 1)), op, ": ", name,
                  " must have positions or channels side by side and rows that follow each other");
  return clip;
}

// The same, in the order of axes of `target` where a single position leaves it open.
inline Clip clip_for(const char* op, const char* name, const torch::stable::Tensor& tensor, const Clip& target) {
  Clip clip = clip_of(op, name, tensor);
  if (clip.height * clip.width == 1 && clip.stride_c == 1) {
    clip.channels_last = target.channels_last;
  }
  return clip;
}

inline void check_like(const char* op, const char* name, const Clip& clip, const Clip& x, int64_t height,
                       int64_t width) {
  const bool is_empty = x.num_samples * x.num_channels * x.num_frames * x.height * x.width == 0;
  const bool has_same_order = clip.channels_last == x.channels_last || x.num_channels == 1 || is_empty;
  STD_TORCH_CHECK(clip.num_samples == x.num_samples && clip.num_channels == x.num_channels &&
                      clip.num_frames == x.num_frames && clip.height == height && clip.width == width &&
                      clip.is_bf16 == x.is_bf16 && has_same_order,
                  op, ": ", name, " must have x's dtype, order of axes and sizes");
}

// The border (left, right, top, bottom, mode) of `out` around x.
inline Border border_of(const char* op, const std::vector<int64_t>& sizes, const Clip& x, const Clip& out) {
  STD_TORCH_CHECK(sizes.size() == 5, op, ": border must be (left, right, top, bottom, mode)");
  const Border border{sizes[0], sizes[1], sizes[2], sizes[3], static_cast<SpacePadding>(sizes[4])};
  check_like(op, "out", out, x, x.height + border.top + border.bottom, x.width + border.left + border.right);
  STD_TORCH_CHECK(generic::is_empty(border) || !out.channels_last || out.stride_w == out.num_channels, op,
                  ": out must have pixels side by side");
  return border;
}

// fp32 numbers of `tensor`, nullptr for none.
inline const float* floats_of(const char* op, const char* name, const torch::stable::Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count,
      op, ": ", name, " must hold ", std::to_string(count), " contiguous numbers of float32");
  return static_cast<const float*>(tensor.const_data_ptr());
}

}  // namespace opensora
