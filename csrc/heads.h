// Where the heads of queries, keys and values lie, and what is done to them before attention.
//
// Axes: L tokens, N heads, D head size; the leading ones of (*, L, N, D) are counted through as samples.
#pragma once

#include <cstdint>

namespace opensora {

// (*, L, N, D) of fp32 or bf16 with each head's elements side by side.
struct Heads {
  static constexpr int most_axes = 6;

  void* data = nullptr;  // none: not given, or not wanted
  bool is_narrow = false;
  int64_t num_axes = 0;  // leading ones
  int64_t sizes[most_axes] = {}, strides[most_axes] = {};
  int64_t num_samples = 1, num_tokens = 0, token_stride = 0, head_stride = 0;
};

// RMSNorm and rotation, in either order. What the fp32 rows below hold is made by `HeadParameters`.
struct NormRope {
  bool has_norm = false, has_rope = false;
  bool is_rope_first = false, is_interleaved = true;
  bool is_token = false;         // one mean of all heads of a token
  bool rounds_products = false;  // the rotation's, to bf16
  bool weight_is_narrow = false, angles_are_narrow = false;
  float eps = 0;
  const void* weight = nullptr;               // (D,), or (N*D,) if is_token; none: ones
  const void *cos = nullptr, *sin = nullptr;  // (L, D/2)
};

}  // namespace opensora
