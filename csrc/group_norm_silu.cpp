// GroupNorm and SiLU on the CPU: checks, scratch memory and what is small enough for plain loops.
//
// Axes: B samples, C channels, T frames, G groups; F is T where statistics are per frame, else 1.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "group_norm_silu_kernels.h"
#include "stable_clip.h"

namespace opensora {
namespace {

using torch::stable::Tensor;
constexpr const char* op = "group_norm_silu";

// For the sums that a pass over channels side by side leaves behind for each block of positions.
std::vector<float> partial_of(const Clip& x) {
  const int64_t num_blocks = (x.height * x.width + block_positions - 1) / block_positions;
  return std::vector<float>(x.channels_last ? x.num_samples * x.num_frames * num_blocks * 2 * x.num_channels : 0);
}

// (B, C, T, 2): mean and sum of squared deviations of each frame.
Tensor statistics(const Tensor& x) {
  const Clip clip = clip_of(op, "x", x);
  const auto type = torch::headeronly::ScalarType::Float;
  Tensor table = torch::stable::new_empty(x, {clip.num_samples, clip.num_channels, clip.num_frames, 2}, type);
  std::vector<float> partial = partial_of(clip);
  if (x.numel() > 0) {
    OPENSORA_RUN_KERNEL(frame_statistics, clip, partial.data(), static_cast<float*>(table.mutable_data_ptr()));
  } else {
    torch::stable::zero_(table);
  }
  return table;
}

// (B, F, G, 2): mean and 1 / sqrt(variance + eps) of each group, from frames of `frame_size` positions. In fp64, since
// there are few: merging squares += count (mean - mean of all)^2 then costs no digit.
Tensor moments(const Tensor& statistics, int64_t num_groups, double eps, bool per_frame, int64_t frame_size) {
  const int64_t num_samples = statistics.size(0), num_channels = statistics.size(1), num_frames = statistics.size(2);
  const float* table = floats_of(op, "statistics", statistics, num_samples * num_channels * num_frames * 2);
  const int64_t num_parts = per_frame ? num_frames : 1, frames_each = per_frame ? 1 : num_frames;
  Tensor found = torch::stable::new_empty(statistics, {num_samples, num_parts, num_groups, 2});
  float* target = static_cast<float*>(found.mutable_data_ptr());
  const int64_t channels_each = num_channels / num_groups;
  const double count = static_cast<double>(channels_each * frames_each);
  for (int64_t index = 0; index < num_samples * num_parts * num_groups; ++index) {
    const int64_t group = index % num_groups, part = index / num_groups % num_parts;
    const int64_t sample = index / num_groups / num_parts;
    const float* first = table + ((sample * num_channels + group * channels_each) * num_frames + part) * 2;
    double mean = 0.0, deviations = 0.0;
    for (int64_t i = 0; i < channels_each * frames_each; ++i) {
      mean += first[(i / frames_each * num_frames + i % frames_each) * 2];
    }
    mean /= count;
    for (int64_t i = 0; i < channels_each * frames_each; ++i) {
      const float* entry = first + (i / frames_each * num_frames + i % frames_each) * 2;
      deviations += entry[1] + static_cast<double>(frame_size) * (entry[0] - mean) * (entry[0] - mean);
    }
    target[2 * index] = static_cast<float>(mean);
    target[2 * index + 1] = static_cast<float>(1.0 / std::sqrt(deviations / (count * frame_size) + eps));
  }
  return found;
}

// (B, F, 3, C) from moments (B, F, G, 2): mean, scale and shift of each channel.
std::vector<float> affine_of(const Clip& x, const Tensor& moments, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias) {
  const int64_t num_parts = moments.size(1), num_groups = moments.size(2), num_channels = x.num_channels;
  const float* pairs = floats_of(op, "moments", moments, x.num_samples * num_parts * num_groups * 2);
  const float* weights = weight ? floats_of(op, "weight", *weight, num_channels) : nullptr;
  const float* biases = bias ? floats_of(op, "bias", *bias, num_channels) : nullptr;
  std::vector<float> affine(x.num_samples * num_parts * 3 * num_channels);
  for (int64_t part = 0; part < x.num_samples * num_parts; ++part) {
    float* target = affine.data() + part * 3 * num_channels;
    for (int64_t channel = 0; channel < num_channels; ++channel) {
      const float* pair = pairs + (part * num_groups + channel / (num_channels / num_groups)) * 2;
      target[channel] = pair[0];
      target[num_channels + channel] = pair[1] * (weights ? weights[channel] : 1.0f);
      target[2 * num_channels + channel] = biases ? biases[channel] : 0.0f;
    }
  }
  return affine;
}

// Writes silu((x - mean) * rstd * weight + bias) with `border` (left, right, top, bottom, mode) around it to `out`.
void apply(const Tensor& x, const std::optional<Tensor>& moments, const std::optional<Tensor>& weight,
           const std::optional<Tensor>& bias, bool has_silu, const std::vector<int64_t>& border, Tensor out) {
  const Clip target = clip_of(op, "out", out);
  const Clip source = clip_for(op, "x", x, target);
  const Border around = border_of(op, border, source, target);
  if (x.numel() == 0) {
    torch::stable::zero_(out);
    return;
  }
  const std::vector<float> affine = moments ? affine_of(source, *moments, weight, bias) : std::vector<float>();
  const int64_t num_parts = moments ? moments->size(1) : 1;
  OPENSORA_RUN_KERNEL(normalise, source, moments ? affine.data() : nullptr, num_parts, has_silu, around, target);
}

// (B, C, T, 2): sums over each frame of the gradient before SiLU, and of its product with (x - mean).
Tensor gradient_sums_of(const Tensor& x, const Tensor& grad, const Tensor& moments, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, bool has_silu) {
  const Clip source = clip_of(op, "x", x), gradient = clip_of(op, "grad", grad);
  check_like(op, "grad", gradient, source, source.height, source.width);
  const auto type = torch::headeronly::ScalarType::Float;
  Tensor sums = torch::stable::new_empty(x, {source.num_samples, source.num_channels, source.num_frames, 2}, type);
  if (x.numel() == 0) {
    return torch::stable::zero_(sums);
  }
  const std::vector<float> affine = affine_of(source, moments, weight, bias);
  std::vector<float> partial = partial_of(source);
  OPENSORA_RUN_KERNEL(gradient_sums, source, gradient, affine.data(), moments.size(1), has_silu, partial.data(),
                      static_cast<float*>(sums.mutable_data_ptr()));
  return sums;
}

// Writes g * scale + (x - mean) * slope + level to grad_x; terms (B, F, 2, C) holds slope and level.
void input_gradient_of(const Tensor& x, const Tensor& grad, const Tensor& moments, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, const Tensor& terms, bool has_silu, Tensor grad_x) {
  const Clip source = clip_of(op, "x", x), gradient = clip_of(op, "grad", grad), target = clip_of(op, "grad_x", grad_x);
  check_like(op, "grad", gradient, source, source.height, source.width);
  check_like(op, "grad_x", target, source, source.height, source.width);
  const float* pairs = floats_of(op, "terms", terms, source.num_samples * moments.size(1) * 2 * source.num_channels);
  if (x.numel() > 0) {
    const std::vector<float> affine = affine_of(source, moments, weight, bias);
    OPENSORA_RUN_KERNEL(input_gradient, source, gradient, affine.data(), pairs, moments.size(1), has_silu, target);
  }
}

}  // namespace
}  // namespace opensora

STABLE_TORCH_LIBRARY_FRAGMENT(opensora_kernels, library) {
  library.def("group_norm_silu_cpu_statistics(Tensor x) -> Tensor");
  library.def(
      "group_norm_silu_cpu_moments(Tensor statistics, int num_groups, float eps, bool per_frame, int frame_size) -> "
      "Tensor");
  library.def(
      "group_norm_silu_cpu_apply(Tensor x, Tensor? moments, Tensor? weight, Tensor? bias, bool has_silu, int[] border, "
      "Tensor(a!) out) -> ()");
  library.def(
      "group_norm_silu_cpu_gradient_sums(Tensor x, Tensor grad, Tensor moments, Tensor? weight, Tensor? bias, "
      "bool has_silu) -> Tensor");
  library.def(
      "group_norm_silu_cpu_input_gradient(Tensor x, Tensor grad, Tensor moments, Tensor? weight, Tensor? bias, "
      "Tensor terms, bool has_silu, Tensor(a!) grad_x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CPU, library) {
  library.impl("group_norm_silu_cpu_statistics", TORCH_BOX(&opensora::statistics));
  library.impl("group_norm_silu_cpu_moments", TORCH_BOX(&opensora::moments));
  library.impl("group_norm_silu_cpu_apply", TORCH_BOX(&opensora::apply));
  library.impl("group_norm_silu_cpu_gradient_sums", TORCH_BOX(&opensora::gradient_sums_of));
  library.impl("group_norm_silu_cpu_input_gradient", TORCH_BOX(&opensora::input_gradient_of));
}
