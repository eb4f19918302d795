// The schemas of the operators that the CUDA library implements. They are defined in the CPU library, which loads
// everywhere, so that a machine without a GPU can check that Python's calls fit them.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(opensora_kernels, library) {
  library.def("smoke(Tensor x) -> Tensor");
  library.def("pack_shards_cuda_forward(Tensor[] tensors, int num_shards, int dim) -> Tensor");
  library.def("pack_shards_cuda_push(Tensor[] tensors, int num_shards, int dim, int[] targets) -> ()");
  library.def(
      "unpack_shards_cuda_forward(Tensor packed, int[] shape, int num_shards, int dim, int num_tensors) -> Tensor[]");
  // attention_sm90a.cu: q, out (O, P, L, N, D); k, v (O, P, K, N, D), or packed (1, 1, K, N, D); lengths, ends (O *
  // P,); lse (O * P, N, L)
  library.def(
      "attention_cuda_forward(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? ends, float scale, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  // x (B, T, H, W, C), state (B, S, H, W, C), weight (K, O, C), residual and out (B, T', H', W', O), statistics
  // (B, O, T', 2); grad_weight (K, O, C) and grad_bias (O,) in float32. causal_conv3d.h says what the numbers mean.
  library.def(
      "causal_conv3d_cuda_forward(Tensor x, Tensor? state, Tensor weight, Tensor? bias, Tensor? residual, "
      "int[] kernel, int[] step, int[] dilation, int[] start, bool replicates_front, int space_padding, "
      "Tensor(a!) out, Tensor(b!)? statistics) -> ()");
  library.def(
      "causal_conv3d_cuda_weight_gradient(Tensor x, Tensor? state, Tensor grad, int[] kernel, int[] step, "
      "int[] dilation, int[] start, bool replicates_front, int space_padding, Tensor(a!) grad_weight, "
      "Tensor(b!)? grad_bias) -> ()");
}
