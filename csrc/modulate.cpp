#include "modulate.h"

#include <memory>
#include <tuple>
#include <vector>

#include "cpu_tensors.h"

namespace opensora {

namespace {

using torch::stable::Tensor;

constexpr const char* op = "modulate";

// Blocks to sum in: many enough for the threads of a large machine, few enough that their sums are a small part of
// what is read.
constexpr int64_t most_blocks = 128;
constexpr int64_t smallest_block = 32;

Tokens tokens_of(const char* name, const Tensor& tensor) {
  check_rows(op, name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 3, op, ": ", name, " must have shape (B, L, C)");
  return {tensor.data_ptr(), is_narrow(tensor), tensor.stride(0), tensor.stride(1)};
}

Tokens tokens_of(const char* name, const OptionalTensor& tensor) {
  return tensor ? tokens_of(name, *tensor) : Tokens{};
}

void set_tables(const char* name, Table* tables, const OptionalTensor& first, const OptionalTensor& second) {
  const OptionalTensor* given[] = {&first, &second};
  for (int choice = 0; choice < 2; ++choice) {
    if (const OptionalTensor& tensor = *given[choice]; tensor) {
      check_rows(op, name, *tensor);
      tables[choice] = {tensor->data_ptr(), is_narrow(*tensor), tensor->stride(0)};
    }
  }
}

bool are_narrow(const Table* tables) {
  return tables[0].is_narrow && (tables[1].data == nullptr || tables[1].is_narrow);
}

// What both passes take.
ModulateCall call_of(const Tensor& x, const OptionalTensor& y, const OptionalTensor& gate, const OptionalTensor& gate0,
                     const OptionalTensor& shift, const OptionalTensor& shift0, const OptionalTensor& scale,
                     const OptionalTensor& scale0, const OptionalTensor& frame_mask, bool normalize, double eps) {
  ModulateCall call{};
  call.num_samples = x.size(0);
  call.num_tokens = x.size(1);
  call.num_channels = x.size(2);
  call.num_frames = frame_mask ? frame_mask->size(1) : 1;
  if (frame_mask) {
    STD_TORCH_CHECK(frame_mask->is_contiguous(), op, ": frame_mask must be contiguous");
    call.frame_mask = static_cast<const bool*>(frame_mask->const_data_ptr());
  }
  call.x = tokens_of("x", x);
  call.y = tokens_of("y", y);
  set_tables("gate", call.gate, gate, gate0);
  set_tables("shift", call.shift, shift, shift0);
  set_tables("scale", call.scale, scale, scale0);
  call.has_gate = y.has_value();
  call.modulates = shift.has_value();
  call.normalizes = normalize;
  call.rounds_gated = call.has_gate && call.y.is_narrow && are_narrow(call.gate);
  call.rounds_scale = call.modulates && are_narrow(call.scale);
  call.rounds_modulated = call.rounds_scale && call.x.is_narrow;
  call.eps = static_cast<float>(eps);
  return call;
}

// [x + gate * y if y is given, the modulation of it or of x if shift is given], both contiguous, in x's dtype.
std::vector<Tensor> modulate_cpu_forward(const Tensor& x, const OptionalTensor& y, const OptionalTensor& gate,
                                         const OptionalTensor& gate0, const OptionalTensor& shift,
                                         const OptionalTensor& shift0, const OptionalTensor& scale,
                                         const OptionalTensor& scale0, const OptionalTensor& frame_mask, bool normalize,
                                         double eps) {
  ModulateCall call = call_of(x, y, gate, gate0, shift, shift0, scale, scale0, frame_mask, normalize, eps);
  std::vector<Tensor> outs;
  if (call.has_gate) {
    outs.push_back(torch::stable::new_empty(x, x.sizes()));
    call.total = tokens_of("total", outs.back());
  }
  if (call.modulates) {
    outs.push_back(torch::stable::new_empty(x, x.sizes()));
    call.out = tokens_of("out", outs.back());
  }
  if (x.numel() > 0) {
    OPENSORA_RUN_KERNEL(modulate_forward, call);
  }
  return outs;
}

// grad_x and grad_y in memory as x and y, if wanted, and (3, 2, B, C) in fp32: gradients of gate, shift and scale,
// those of frames with True before the others; where there are none, or they are not wanted, memory as it came.
std::tuple<Tensor, Tensor, Tensor> modulate_cpu_backward(const OptionalTensor& grad_total,
                                                         const OptionalTensor& grad_out, bool wants_x, bool wants_y,
                                                         bool wants_tables, const Tensor& x, const OptionalTensor& y,
                                                         const OptionalTensor& gate, const OptionalTensor& gate0,
                                                         const OptionalTensor& shift, const OptionalTensor& shift0,
                                                         const OptionalTensor& scale, const OptionalTensor& scale0,
                                                         const OptionalTensor& frame_mask, bool normalize, double eps) {
  ModulateCall call = call_of(x, y, gate, gate0, shift, shift0, scale, scale0, frame_mask, normalize, eps);
  STD_TORCH_CHECK(call.modulates == grad_out.has_value(), op, ": grad_out must be given with shift, and only then");
  call.grad_total = tokens_of("grad_total", grad_total);
  call.grad_out = tokens_of("grad_out", grad_out);
  const std::vector<int64_t> none = {0, 1, 1};
  Tensor grad_x = wants_x ? gradient_like(x) : torch::stable::new_empty(x, none);
  Tensor grad_y = wants_y && y ? gradient_like(*y) : torch::stable::new_empty(x, none);
  call.grad_x = wants_x ? tokens_of("grad_x", grad_x) : Tokens{};
  call.grad_y = wants_y && y ? tokens_of("grad_y", grad_y) : Tokens{};
  const std::vector<int64_t> sizes = {num_tables, 2, wants_tables ? x.size(0) : 0, x.size(2)};
  Tensor grad_tables = torch::stable::new_empty(x, sizes, torch::headeronly::ScalarType::Float);
  if (x.numel() == 0) {
    return {grad_x, grad_y, torch::stable::zero_(grad_tables)};
  }
  const int64_t num_rows = call.num_samples * call.num_tokens;
  call.block_size = std::max(smallest_block, (num_rows + most_blocks - 1) / most_blocks);
  call.num_blocks = call.num_samples * ((call.num_tokens + call.block_size - 1) / call.block_size);
  call.wants_tables = wants_tables;
  const int64_t num_sums = wants_tables ? call.num_blocks * 2 * num_tables * call.num_channels : 0;
  const std::unique_ptr<float[]> partial(new float[num_sums]);
  call.partial = partial.get();
  call.grad_tables = static_cast<float*>(grad_tables.mutable_data_ptr());
  OPENSORA_RUN_KERNEL(modulate_backward, call);
  return {grad_x, grad_y, grad_tables};
}

}  // namespace

}  // namespace opensora

STABLE_TORCH_LIBRARY_FRAGMENT(opensora_kernels, library) {
  library.def(
      "modulate_cpu_forward(Tensor x, Tensor? y, Tensor? gate, Tensor? gate0, Tensor? shift, Tensor? shift0, "
      "Tensor? scale, Tensor? scale0, Tensor? frame_mask, bool normalize, float eps) -> Tensor[]");
  library.def(
      "modulate_cpu_backward(Tensor? grad_total, Tensor? grad_out, bool wants_x, bool wants_y, bool wants_tables, "
      "Tensor x, Tensor? y, Tensor? gate, Tensor? gate0, Tensor? shift, Tensor? shift0, Tensor? scale, Tensor? scale0, "
      "Tensor? frame_mask, bool normalize, float eps) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(opensora_kernels, CPU, library) {
  library.impl("modulate_cpu_forward", TORCH_BOX(&opensora::modulate_cpu_forward));
  library.impl("modulate_cpu_backward", TORCH_BOX(&opensora::modulate_cpu_backward));
}
