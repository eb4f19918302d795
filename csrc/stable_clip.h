// From torch's tensors to the plain data that kernels of the CPU library take.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

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

// fp32 numbers of `tensor`, nullptr for none.
inline const float* floats_of(const char* op, const char* name, const torch::stable::Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.is_contiguous() && tensor.numel() == count,
      op, ": ", name, " must hold ", std::to_string(count), " contiguous numbers of float32");
  return static_cast<const float*>(tensor.const_data_ptr());
}

}  // namespace opensora
