// Passes over a clip for GroupNorm and SiLU. Axes: B samples, C channels, T frames; F is T or, for the whole clip, 1.
#pragma once

#include "capability.h"
#include "clip.h"

namespace opensora {

// Positions whose sums a kernel leaves behind where channels lie side by side: 64 channels of them are 16 to 32 KiB.
inline constexpr int64_t block_positions = 128;

}  // namespace opensora

// table (B, C, T, 2): mean and sum of squared deviations of each frame. partial (B, T, K, 2, C): K blocks of positions.
OPENSORA_DECLARE_KERNEL(frame_statistics, const opensora::Clip& x, float* partial, float* table)

// out = silu((x - mean) * scale + shift) with its border; affine (B, F, 3, C) holds mean, scale and shift, F =
// num_parts. Rounded before SiLU. affine may be null: out = silu(x).
OPENSORA_DECLARE_KERNEL(normalise, const opensora::Clip& x, const float* affine, int64_t num_parts, bool has_silu,
                        const opensora::Border& border, const opensora::Clip& out)

// sums (B, C, T, 2) over each frame: of g, the gradient before SiLU, and of g * (x - mean).
OPENSORA_DECLARE_KERNEL(gradient_sums, const opensora::Clip& x, const opensora::Clip& grad, const float* affine,
                        int64_t num_parts, bool has_silu, float* partial, float* sums)

// grad_x = g * scale + (x - mean) * slope + level; terms (B, F, 2, C) holds slope and level.
OPENSORA_DECLARE_KERNEL(input_gradient, const opensora::Clip& x, const opensora::Clip& grad, const float* affine,
                        const float* terms, int64_t num_parts, bool has_silu, const opensora::Clip& grad_x)
