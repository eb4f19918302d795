// Arguments of the kernels of `attention` and `qk_norm_attention`.
//
// One head of one sample is attended to in fp32, all of its keys in cache: made for short sequences, and still twice as
// fast as PyTorch's fused attention for 2048 keys. Axes: L queries, K keys, N heads, D head
// size, P blocks of heads.
#pragma once

#include "capability.h"
#include "heads.h"

namespace opensora {

struct ShortAttentionCall {
  int64_t num_heads, head_size;
  float scale;
  Heads q, k, v, out;
  NormRope q_form, k_form;
  bool is_packed;                          // the keys of all samples follow one another in one (K, N, D)
  const int64_t *key_starts, *key_counts;  // of each sample; none: all keys of its own
  // of the backward pass
  Heads grad_out, grad_q, grad_k, grad_v;
  int64_t block_size, num_blocks;  // heads of samples
  float* weight_sums;              // (P, 2, D); none if not wanted
  float* angle_sums;               // (P, 2, L, D/2); none if not wanted
};

}  // namespace opensora

OPENSORA_DECLARE_KERNEL(short_attention_forward, const ShortAttentionCall& call)
OPENSORA_DECLARE_KERNEL(short_attention_backward, const ShortAttentionCall& call)
