// RMS over channels and SiLU on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "rms_norm_silu_kernels.h"
#include "stable_clip.h"

namespace opensora {
namespace {

using torch::stable::Tensor;
constexpr const char* op = "rms_norm_silu";

// Writes silu(x / max(|x|, eps) * sqrt(C) * weight + bias) with `border` (left, right, top, bottom, mode) around to
// `out`.
void apply_rms(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
               bool has_silu, const std::vector<int64_t>& border, Tensor out) {
  const Clip target = clip_of(op, "out", out);
  const Clip source = clip_for(op, "x", x, target);
  const Border around = border_of(op, border, source, target);
  const float* weights = weight ? floats_of(op, "weight", *weight, source.num_channels) : nullptr;
  const float* biases = bias ? floats_of(op, "bias", *bias, source.num_channels) : nullptr;
  if (x.numel() == 0) {
    torch::stable::zero_(out);
    return;
  }
  const float root = static_cast<float>(std::sqrt(static_cast<double>(source.num_channels)));
  OPENSORA_RUN_KERNEL(normalise_rms, source, weights, biases, static_cast<float>(eps), root, has_silu, around, target);
}

}  // namespace
}  // namespace opensora

STABLE_TORCH_LIBRARY_FRAGMENT(opensora_kernels, library) {
  library.def(
      "rms_norm_silu_cpu_apply(Tensor x, Tensor? weight, Tensor? bias, float eps, bool has_silu, int[] border, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CPU, library) {
  library.impl("rms_norm_silu_cpu_apply", TORCH_BOX(&opensora::apply_rms));
}
