// Arguments of the kernels of `qk_norm_rope` and `rms_norm`.
#pragma once

#include "capability.h"
#include "heads.h"

namespace opensora {

struct NormRopeCall {
  int64_t num_heads, head_size;
  struct Side {  // q or k
    Heads x, out, grad_out, grad_x;
    NormRope form;
  } sides[2];
  int num_sides;
  // of the backward pass: blocks of tokens, or of the samples of one token where gradients of angles are wanted
  int64_t block_size, num_blocks;
  float* weight_sums;  // (2, P, W) of P blocks; none if not wanted
  float* angle_sums;   // (2, L, D/2): of cosines and of sines; none if not wanted
};

}  // namespace opensora

OPENSORA_DECLARE_KERNEL(norm_rope_forward, const NormRopeCall& call)
OPENSORA_DECLARE_KERNEL(norm_rope_backward, const NormRopeCall& call)
