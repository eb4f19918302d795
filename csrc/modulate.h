// Arguments of the kernels of `modulate` and `gate_residual`: one pass over tokens serves both.
//
// Axes: B samples, L = T*S tokens of T frames, C channels, K tables (gate, shift, scale), P blocks of tokens.
#pragma once

#include "capability.h"

namespace opensora {

// (B, L, C) with the channels side by side.
struct Tokens {
  void* data = nullptr;  // none: not given, or not wanted
  bool is_narrow = false;
  int64_t sample_stride = 0;
  int64_t token_stride = 0;
};

// (B, C) with the channels side by side.
struct Table {
  const void* data = nullptr;
  bool is_narrow = false;
  int64_t stride = 0;
};

struct ModulateCall {
  int64_t num_samples, num_tokens, num_channels;
  int64_t num_frames;      // 1 without a mask
  const bool* frame_mask;  // (B, T): which of a pair of tables a frame takes, the first where True
  Tokens x, y;             // y and a gate: what is modulated is x + gate * y
  Table gate[2], shift[2], scale[2];
  bool has_gate, modulates, normalizes;
  bool rounds_gated;      // gate * y to bf16, since both are
  bool rounds_scale;      // 1 + scale to bf16, since the tables are
  bool rounds_modulated;  // the product with 1 + scale to bf16, since both factors are
  float eps;
  Tokens total, out;  // x + gate * y; the modulation
  // of the backward pass
  Tokens grad_total, grad_out, grad_x, grad_y;
  bool wants_tables;
  int64_t block_size, num_blocks;  // tokens of one sample to a block; blocks of all samples
  float* partial;                  // (P, 2, K, C)
  float* grad_tables;              // (K, 2, B, C)
};

inline constexpr int num_tables = 3;

}  // namespace opensora

OPENSORA_DECLARE_KERNEL(modulate_forward, const ModulateCall& call)
OPENSORA_DECLARE_KERNEL(modulate_backward, const ModulateCall& call)
