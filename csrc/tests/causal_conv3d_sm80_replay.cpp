// Replays the mma.sync kernels of causal_conv3d, and the weight gradient by wgmma, on the host, block by block: the
// kernels' own steps on the machine of host_machine.h. A shared object for ctypes.

#include <limits>
#include <vector>

#include "../causal_conv3d_sm80_gradient_steps.h"
#include "../causal_conv3d_sm90_gradient_steps.h"
#include "../moments.h"
#include "host_machine.h"

namespace {

using namespace opensora;
using namespace opensora::sm80;

template <class Type, int kTileOut>
bool replay_forward_block(int index, const Operands& operands, const Geometry& g, const std::vector<Range>& ranges,
                          bool lands_at_once) {
  using Layout = ForwardLayout<kTileOut>;
  Machine machine(Layout::kBytes, ranges, lands_at_once);
  const ForwardBlock block = forward_block(index, g, kTileOut);
  std::vector<ForwardCopies<kTileOut>> copies;
  each_thread([&](int thread) { copies.emplace_back(thread, machine.shared(), block, operands, g); });
  std::vector<HostWarp<Type>> warps;
  struct WarpSums {
    typename HostWarp<Type>::Sums sums[Layout::kMatricesX][2 * Layout::kMatricesOut];
  };
  std::vector<WarpSums> sums(kNumWarps);
  for (int warp = 0; warp < kNumWarps; ++warp) {
    warps.push_back({machine.shared(), warp});
  }
  const auto copy = [&](int byte, const void* source, bool is_read) { machine.copy(byte, source, is_read); };
  run_pipeline(
      copies[0].num_steps(),
      [&](int, int slot) {
        each_thread([&](int thread) { copies[thread].step(slot * Layout::kSlotBytes, copy, copy); });
      },
      [&] { machine.commit(); }, [&] { machine.wait(kNumStages - 2); },
      [&](int slot) {
        for (int warp = 0; warp < kNumWarps; ++warp) {
          multiply_forward<kTileOut>(warps[warp], slot * Layout::kSlotBytes, sums[warp].sums);
        }
      });
  if (machine.is_wrong()) {
    return false;
  }
  for (int warp = 0; warp < kNumWarps; ++warp) {
    stage_forward<Type, kTileOut>(warps[warp], sums[warp].sums, machine.shared(), block, operands, g);
  }
  each_thread([&](int thread) { store_forward<Type, kTileOut>(thread, machine.shared(), block, operands, g); });
  if (operands.partials != nullptr) {
    const int num_rows = num_rows_of(block, g);
    each_thread([&](int thread) { sum_tile<Type, kTileOut>(thread, num_rows, machine.shared()); });
    each_thread([&](int thread) { sum_deviations<Type, kTileOut>(thread, num_rows, machine.shared()); });
    each_thread(
        [&](int thread) { store_statistics<kTileOut>(thread, num_rows, machine.shared(), block, operands, g); });
  }
  machine.wait(0);  // of nothing: a copy that arrived now would have overwritten what was staged
  return !machine.is_wrong();
}

template <class Type, int kTileOut>
bool replay_gradient_block(int index, int split, int num_splits, const GradientOperands& operands, const Geometry& g,
                           const std::vector<Range>& ranges, bool lands_at_once) {
  using Layout = GradientLayout<kTileOut>;
  Machine machine(Layout::kBytes, ranges, lands_at_once);
  const int num_steps_in_all = static_cast<int>(num_gradient_steps(g));
  const GradientBlock block = gradient_block(index, g, kTileOut);
  const int first_step = first_step_of_split(split, num_splits, num_steps_in_all);
  const int num_steps = first_step_of_split(split + 1, num_splits, num_steps_in_all) - first_step;
  std::vector<GradientCopies<kTileOut>> copies;
  each_thread([&](int thread) { copies.emplace_back(thread, block, first_step, operands, g); });
  struct WarpSums {
    typename HostWarp<Type>::Sums sums[Layout::kMatricesOut][2 * Layout::kMatricesX];
    typename HostWarp<Type>::Sums bias;
  };
  std::vector<HostWarp<Type>> warps;
  std::vector<WarpSums> sums(kNumWarps);
  for (int warp = 0; warp < kNumWarps; ++warp) {
    warps.push_back({machine.shared(), warp});
  }
  const auto copy = [&](int byte, const void* source, bool is_read) { machine.copy(byte, source, is_read); };
  run_pipeline(
      num_steps,
      [&](int step, int slot) {
        each_thread([&](int thread) { copies[thread].step(step, slot * Layout::kSlotBytes, copy); });
      },
      [&] { machine.commit(); }, [&] { machine.wait(kNumStages - 2); },
      [&](int slot) {
        for (int warp = 0; warp < kNumWarps; ++warp) {
          multiply_gradient<kTileOut>(warps[warp], slot * Layout::kSlotBytes,
                                      warp_sums_bias<kTileOut>(warp, block, operands), sums[warp].sums,
                                      sums[warp].bias);
        }
      });
  if (machine.is_wrong()) {
    return false;
  }
  for (int warp = 0; warp < kNumWarps; ++warp) {
    store_gradient<kTileOut>(warps[warp], sums[warp].sums, sums[warp].bias, block, split, operands, g);
  }
  return true;
}

template <class Type, int kTileOut>
bool replay_wide_gradient_block(int index, int split, int num_splits, const GradientOperands& operands,
                                const Geometry& g, const std::vector<Range>& ranges, bool lands_at_once) {
  using Layout = GradientLayout<kTileOut>;
  Machine machine(Layout::kBytes, ranges, lands_at_once);
  const int num_steps_in_all = static_cast<int>(num_gradient_steps(g));
  const GradientBlock block = gradient_block(index, g, kTileOut);
  const int first_step = first_step_of_split(split, num_splits, num_steps_in_all);
  const int num_steps = first_step_of_split(split + 1, num_splits, num_steps_in_all) - first_step;
  std::vector<GradientCopies<kTileOut>> copies;
  each_thread([&](int thread) { copies.emplace_back(thread, block, first_step, operands, g); });
  HostGroup<Type, kTileOut> groups[sm90::kNumGroups] = {{machine.shared(), 0}, {machine.shared(), 1}};
  std::vector<typename HostGroup<Type, kTileOut>::Sums> sums(sm90::kNumGroups);
  typename HostWarp<Type>::Sums bias_sums[kNumWarps];
  const auto copy = [&](int byte, const void* source, bool is_read) { machine.copy(byte, source, is_read); };
  int slot_of_products = -1;
  const auto finish = [&] {
    for (int group = 0; group < sm90::kNumGroups && slot_of_products >= 0; ++group) {
      sm90::multiply_gradient<kTileOut>(groups[group], slot_of_products * Layout::kSlotBytes, sums[group]);
    }
    slot_of_products = -1;
  };
  const auto each_bias_warp = [&](auto function) {
    for (int index = 0; index < kNumWarps; ++index) {
      HostWarp<Type> warp{machine.shared(), index};
      if (sm90::warp_sums_bias<kTileOut>(index, block, operands)) {
        function(warp, bias_sums[index]);
      }
    }
  };
  run_pipeline<true>(
      num_steps,
      [&](int step, int slot) {
        each_thread([&](int thread) { copies[thread].step(step, slot * Layout::kSlotBytes, copy); });
      },
      [&] { machine.commit(); },
      [&] {
        finish();
        machine.wait(kNumStages - 2);
      },
      [&](int slot) {
        slot_of_products = slot;  // they run until they are waited for
        each_bias_warp([&](auto& warp, auto& sum) { sm90::multiply_bias(warp, slot * Layout::kSlotBytes, sum); });
      });
  finish();
  for (int group = 0; group < sm90::kNumGroups; ++group) {
    for (int thread = 0; thread < sm90::kGroupThreads; ++thread) {
      sm90::store_gradient<kTileOut>(group, thread, sums[group].values[thread], block, split, operands, g);
    }
  }
  each_bias_warp([&](auto& warp, auto& sum) { sm90::store_bias(warp, sum, block, split, operands, g); });
  return !machine.is_wrong();
}

template <class Function>
bool with_kernel(bool is_bfloat16, int tile_out, Function function) {
  const auto with_type = [&]<class Type>(Type type) {
    return tile_out == 64   ? function(type, std::integral_constant<int, 64>())
           : tile_out == 96 ? function(type, std::integral_constant<int, 96>())
                            : function(type, std::integral_constant<int, 128>());
  };
  return is_bfloat16 ? with_type(BFloat16()) : with_type(Float16());
}

// In the order of `numbers`: see tests/csrc/sm80_replay.py.
struct Problem {
  ConvolutionShape shape;
  Geometry geometry;
};

Problem problem_of(const int64_t* numbers) {
  ConvolutionShape shape{};
  int* const sizes[8] = {&shape.num_samples, &shape.num_channels, &shape.num_out,    &shape.height,
                         &shape.width,       &shape.out_frames,   &shape.out_height, &shape.out_width};
  for (int i = 0; i < 8; ++i) {
    *sizes[i] = static_cast<int>(*numbers++);
  }
  int* const triples[4] = {shape.kernel, shape.step, shape.dilation, shape.start};
  for (int* triple : triples) {
    for (int axis = 0; axis < 3; ++axis) {
      triple[axis] = static_cast<int>(*numbers++);
    }
  }
  shape.replicates_front = *numbers++ != 0;
  shape.space_padding = static_cast<int>(*numbers++);
  shape.is_bfloat16 = *numbers++ != 0;
  const ClipPlace x{static_cast<int>(numbers[0]), numbers[1], numbers[2]};
  const ClipPlace state{static_cast<int>(numbers[3]), numbers[4], numbers[5]};
  return {shape, geometry_of(shape, x, state)};
}

Range range_of(const void* begin, int64_t num_elements) {
  return {begin, num_elements * 2};
}

int64_t clip_elements(const Geometry& g, int num_frames, int64_t sample_stride, int64_t frame_stride) {
  const int64_t frame = static_cast<int64_t>(g.height_in) * g.width_in * g.num_channels;
  return num_frames > 0 ? (g.num_samples - 1) * sample_stride + (num_frames - 1) * frame_stride + frame : 0;
}

}  // namespace

// Each returns whether every copy was aligned and inside its tensor. is_wide: by wgmma. A tile_out of 0 is the kernel's
// choice.
extern "C" bool replay_forward(const int64_t* numbers, bool lands_at_once, int tile_out, const uint16_t* x,
                               const uint16_t* state, const uint16_t* weight, const uint16_t* bias,
                               const uint16_t* residual, uint16_t* out, float* statistics) {
  const auto [shape, g] = problem_of(numbers);
  tile_out = tile_out == 0 ? tile_out_of(g.num_out) : tile_out;
  const std::vector<Range> ranges = {
      range_of(x, clip_elements(g, g.num_frames_in, g.stride_xb, g.stride_xt)),
      range_of(state, clip_elements(g, g.num_state, g.stride_sb, g.stride_st)),
      range_of(weight, int64_t{num_gradient_vectors(g)} * kVector * g.num_out),
  };
  const int64_t num_planes = int64_t{g.num_samples} * g.num_frames;
  std::vector<float> partials(num_planes * num_tiles_of_frame(g) * g.num_out * 2,
                              std::numeric_limits<float>::quiet_NaN());
  const Operands operands{x, state, weight, bias, residual, out, statistics == nullptr ? nullptr : partials.data()};
  for (int block = 0; block < num_forward_blocks(g, tile_out); ++block) {
    const bool is_right = with_kernel(
        shape.is_bfloat16, tile_out, [&]<class Type, int kTileOut>(Type, std::integral_constant<int, kTileOut>) {
          return replay_forward_block<Type, kTileOut>(block, operands, g, ranges, lands_at_once);
        });
    if (!is_right) {
      return false;
    }
  }
  const FrameStatistics merge{partials.data(), statistics, g.num_samples, g.num_frames, g.num_out, 1,
                              g.num_positions, 1,          kTilePositions};
  for (int64_t plane = 0; statistics != nullptr && plane < num_planes; ++plane) {
    for (int channel = 0; channel < g.num_out; ++channel) {
      const Moments all = moments_of_slice(merge, plane, channel, 0, 1);
      statistics[statistics_offset(merge, plane, channel)] = all.mean;
      statistics[statistics_offset(merge, plane, channel) + 1] = all.squares;
    }
  }
  return true;
}

extern "C" bool replay_weight_gradient(const int64_t* numbers, bool lands_at_once, bool is_wide, int tile_out,
                                       int num_splits, const uint16_t* x, const uint16_t* state, const uint16_t* grad,
                                       float* grad_weight, float* grad_bias) {
  const auto [shape, g] = problem_of(numbers);
  tile_out = tile_out == 0 ? tile_out_of(g.num_out) : tile_out;
  num_splits = num_splits == 0 ? num_splits_of(g) : num_splits;
  const std::vector<Range> ranges = {
      range_of(x, clip_elements(g, g.num_frames_in, g.stride_xb, g.stride_xt)),
      range_of(state, clip_elements(g, g.num_state, g.stride_sb, g.stride_st)),
      range_of(grad, int64_t{g.num_samples} * g.num_frames * g.num_positions * g.num_out),
  };
  const int64_t num_weights = int64_t{num_gradient_vectors(g)} * kVector * g.num_out;
  const int64_t split_stride = num_weights + g.num_out;
  std::vector<float> sums(num_splits * split_stride, std::numeric_limits<float>::quiet_NaN());
  const GradientOperands operands{
      x, state, grad, sums.data(), grad_bias == nullptr ? nullptr : sums.data() + num_weights, split_stride};
  for (int split = 0; split < num_splits; ++split) {
    for (int block = 0; block < num_gradient_blocks(g, tile_out); ++block) {
      const bool is_right = with_kernel(
          shape.is_bfloat16, tile_out, [&]<class Type, int kTileOut>(Type, std::integral_constant<int, kTileOut>) {
            return (is_wide ? replay_wide_gradient_block<Type, kTileOut>
                            : replay_gradient_block<Type, kTileOut>)(block, split, num_splits, operands, g, ranges,
                                                                     lands_at_once);
          });
      if (!is_right) {
        return false;
      }
    }
  }
  for (int64_t index = 0; index < (grad_bias == nullptr ? num_weights : split_stride); ++index) {
    float total = sums[index];
    for (int split = 1; split < num_splits; ++split) {
      total += sums[split * split_stride + index];
    }
    (index < num_weights ? grad_weight[index] : grad_bias[index - num_weights]) = total;
  }
  return true;
}
