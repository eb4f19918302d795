// The sm_90a kernel of causal_conv3d replayed on the CPU, tile by tile and with the kernel's own maps: boxes are loaded
// into swizzled slots, operands read through their descriptors, sums held as fragments, words exchanged, results
// written, moments merged. A C interface for Python's ctypes.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../causal_conv3d_maps.h"
#include "../half_types.h"
#include "../moments.h"

namespace {

using namespace opensora;
using namespace opensora::conv90;

// (B, frames, H, W, C) with strides in numbers.
struct HostClip {
  const uint16_t* data;
  int64_t num_frames, sample_stride, frame_stride;
};

struct Replay {
  HostClip x, state;
  const uint16_t* weight;    // (K, O, C)
  const uint16_t* bias;      // or null
  const uint16_t* residual;  // or null
  uint16_t* out;
  float* statistics;  // or null
};

// What the copy engine does: a box at signed coordinates, zeros outside, 16-byte pieces swizzled.
void load_clip_box(const Schedule& schedule, const HostClip& clip, int first_channel, int column, int row, int frame,
                   int sample, uint8_t* slot) {
  const ConvolutionShape& shape = schedule.shape;
  for (int h = 0; h < box_rows(schedule); ++h) {
    for (int w = 0; w < kTileWidth; ++w) {
      for (int c = 0; c < kChunk; ++c) {
        const int channel = first_channel + c, y = row + h, x = column + w;
        const bool is_inside = channel < shape.num_channels && y >= 0 && y < shape.height && x >= 0 && x < shape.width;
        const int64_t place = sample * clip.sample_stride + frame * clip.frame_stride +
                              (int64_t{y} * shape.width + x) * shape.num_channels + channel;
        const uint16_t bits = is_inside ? clip.data[place] : 0;
        std::memcpy(slot + swizzle((h * kTileWidth + w) * kRowBytes + 2 * c), &bits, 2);
      }
    }
  }
}

void load_weight_box(const Schedule& schedule, const uint16_t* weight, int first_channel, int first_out, int tap,
                     uint8_t* slot) {
  const ConvolutionShape& shape = schedule.shape;
  for (int n = 0; n < schedule.tile_channels; ++n) {
    for (int c = 0; c < kChunk; ++c) {
      const bool is_inside = first_channel + c < shape.num_channels && first_out + n < shape.num_out;
      const int64_t place = (int64_t{tap} * shape.num_out + first_out + n) * shape.num_channels + first_channel + c;
      const uint16_t bits = is_inside ? weight[place] : 0;
      std::memcpy(slot + swizzle(n * kRowBytes + 2 * c), &bits, 2);
    }
  }
}

// What the tensor cores do: rows of an operand by its descriptor, as the PTX manual lays them out.
template <class Type>
void read_operand(const uint8_t* shared, uint64_t descriptor, int num_rows, float (*operand)[kMmaDepth]) {
  const uint32_t start = (descriptor & 0x3FFF) * 16, stride = (descriptor >> 32 & 0x3FFF) * 16;
  for (int row = 0; row < num_rows; ++row) {
    for (int k = 0; k < kMmaDepth; ++k) {
      uint32_t address = start + row / 8 * stride + row % 8 * 128 + 2 * k;
      address ^= (address / 128 % 8) * 16;
      uint16_t bits;
      std::memcpy(&bits, shared + address, 2);
      operand[row][k] = Type::widened(bits);
    }
  }
}

template <class Type, int N>
struct TileReplay {
  static constexpr int kBlocks = Tile<N>::kBlocks;
  std::vector<uint8_t> shared = std::vector<uint8_t>(Tile<N>::kBytes);
  std::vector<float> sums = std::vector<float>(kNumConsumers * kBlocks * 128 * (N / 2));
  std::vector<float> moments = std::vector<float>(kNumWarps * N * 2);

  float* fragment(int consumer, int block, int thread) {
    return sums.data() + ((consumer * kBlocks + block) * 128 + thread) * (N / 2);
  }

  void multiply(uint32_t clip, uint32_t weight, int row_tap, int num_steps) {
    static float left[kMmaRows][kMmaDepth], right[N][kMmaDepth], product[kMmaRows][N];
    for (int step = 0; step < num_steps; ++step) {
      read_operand<Type>(shared.data(), moved(operand_descriptor(weight), weight_operand(step)), N, right);
      for (int whole = 0; whole < kNumConsumers * kBlocks; ++whole) {
        const uint32_t first = clip + clip_operand(whole / kBlocks * kBlocks, row_tap, 0);
        const uint64_t descriptor = moved(operand_descriptor(first), clip_operand(whole % kBlocks, 0, step));
        read_operand<Type>(shared.data(), descriptor, kMmaRows, left);
        for (int row = 0; row < kMmaRows; ++row) {
          for (int column = 0; column < N; ++column) {
            float sum = 0.0f;
            for (int k = 0; k < kMmaDepth; ++k) {
              sum += left[row][k] * right[column][k];
            }
            product[row][column] = sum;
          }
        }
        for (int thread = 0; thread < 128; ++thread) {
          float* own = fragment(whole / kBlocks, whole % kBlocks, thread);
          for (int index = 0; index < N / 2; ++index) {
            own[index] += product[fragment_row(thread, index)][fragment_channel(thread, index)];
          }
        }
      }
    }
  }

  // Producer and consumers in turn: the rings advance as theirs do.
  void sum_tile(const Schedule& schedule, const Replay& replay, const TilePosition& at, Ring& clip, Ring& weight) {
    const ConvolutionShape& shape = schedule.shape;
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int i = 0; i < shape.kernel[0]; ++i) {
      const InputFrame input = input_frame(shape, schedule.num_state, schedule.num_frames, at.frame, i);
      if (input.source == FrameSource::kNothing) {
        continue;
      }
      const HostClip& source = input.source == FrameSource::kState ? replay.state : replay.x;
      for (int j = 0; j < shape.kernel[1]; j += schedule.row_taps) {
        for (int k = 0; k < shape.kernel[2]; ++k) {
          for (int chunk = 0; chunk < schedule.num_chunks; ++chunk) {
            const uint32_t clip_slot = clip.slot * Tile<N>::kClipSlotBytes;
            load_clip_box(schedule, source, chunk * kChunk, box_column(schedule, at, k), box_row(schedule, at, j),
                          input.frame, at.sample, shared.data() + clip_slot);
            clip = next(clip, kClipSlots);
            for (int row_tap = 0; row_tap < schedule.row_taps; ++row_tap) {
              const uint32_t weight_slot = Tile<N>::kWeightOffset + weight.slot * Tile<N>::kWeightSlotBytes;
              load_weight_box(schedule, replay.weight, chunk * kChunk, at.channel, tap_index(shape, i, j + row_tap, k),
                              shared.data() + weight_slot);
              weight = next(weight, Tile<N>::kWeightSlots);
              multiply(clip_slot, weight_slot, row_tap, num_steps(schedule, chunk));
            }
          }
        }
      }
    }
  }

  // One warp's rows of 32 channels, exchanged and written; `written` keeps them for the moments.
  void write_words(const Schedule& schedule, const Replay& replay, const TilePosition& at, int warp, int row,
                   int column_group, uint32_t (*written)[4]) {
    const ConvolutionShape& shape = schedule.shape;
    const int consumer = warp / 4, block = row / 2;
    for (int lane = 0; lane < 32; ++lane) {
      const int thread = warp % 4 * 32 + lane;
      for (int word = 0; word < 4; ++word) {
        const int index = (column_group * 4 + word) * 4 + row % 2 * 2;
        const int channel = at.channel + fragment_channel(thread, index);
        const bool has_bias = replay.bias != nullptr && channel < shape.num_out;
        const float* own = fragment(consumer, block, thread) + index;
        written[lane][word] = Type::rounded(own[0] + (has_bias ? Type::widened(replay.bias[channel]) : 0.0f),
                                            own[1] + (has_bias ? Type::widened(replay.bias[channel + 1]) : 0.0f));
      }
    }
    for (int mask = 1; mask <= 2; mask *= 2) {
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t given[32];
        for (int lane = 0; lane < 32; ++lane) {
          given[lane] = written[lane][given_word(lane, mask, pair)];
        }
        for (int lane = 0; lane < 32; ++lane) {
          written[lane][given_word(lane, mask, pair)] = given[lane ^ mask];
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int thread = warp % 4 * 32 + lane, within = fragment_row(thread, row % 2 * 2);
      const int h = at.row + tile_row(consumer * kBlocks + block, within), w = at.column + tile_column(within);
      const int channel = at.channel + written_channel(thread, column_group);
      if (!is_inside(shape, h, w) || channel >= shape.num_out) {
        continue;
      }
      const int64_t offset = result_offset(shape, at, h, w, channel);
      for (int word = 0; word < 4; ++word) {
        uint32_t& value = written[lane][word];
        if (replay.residual != nullptr) {
          const uint16_t* other = replay.residual + offset + 2 * word;
          value = Type::rounded(Type::widened(value) + Type::widened(other[0]),
                                Type::widened(value >> 16) + Type::widened(other[1]));
        }
        std::memcpy(replay.out + offset + 2 * word, &value, 4);
      }
    }
  }

  // Mean and squared deviations of a warp's positions for each of 32 channels.
  void gather_moments(const Schedule& schedule, const TilePosition& at, int warp, int column_group,
                      const uint32_t (*written)[32][4]) {
    const float count = static_cast<float>(std::max(num_positions(schedule, at, warp), 1));
    for (int quad = 0; quad < 4; ++quad) {
      for (int channel = 0; channel < 8; ++channel) {
        float mean = 0.0f, squares = 0.0f;
        for (int pass = 0; pass < 2; ++pass) {
          float total = 0.0f;
          for (int row = 0; row < 2 * kBlocks; ++row) {
            for (int lane = quad; lane < 32; lane += 4) {
              const int within = fragment_row(warp % 4 * 32 + lane, row % 2 * 2);
              const int h = at.row + tile_row(warp / 4 * kBlocks + row / 2, within);
              const float value = Type::widened(written[row][lane][channel / 2] >> (channel % 2 * 16));
              if (is_inside(schedule.shape, h, at.column + tile_column(within))) {
                total += pass == 0 ? value : (value - mean) * (value - mean);
              }
            }
          }
          (pass == 0 ? mean : squares) = pass == 0 ? total / count : total;
        }
        float* own = moments.data() + (warp * N + written_channel(quad, column_group) + channel) * 2;
        own[0] = mean;
        own[1] = squares;
      }
    }
  }

  void write_tile(const Schedule& schedule, const Replay& replay, const TilePosition& at, float* partials) {
    for (int warp = 0; warp < kNumWarps; ++warp) {
      for (int column_group = 0; column_group < N / 32; ++column_group) {
        uint32_t written[2 * kBlocks][32][4];
        for (int row = 0; row < 2 * kBlocks; ++row) {
          write_words(schedule, replay, at, warp, row, column_group, written[row]);
        }
        gather_moments(schedule, at, warp, column_group, written);
      }
    }
    for (int channel = 0; partials != nullptr && channel < N && at.channel + channel < schedule.shape.num_out;
         ++channel) {
      Moments all{0.0f, 0.0f, 0.0f};
      for (int warp = 0; warp < kNumWarps; ++warp) {
        const float* own = moments.data() + (warp * N + channel) * 2;
        all = merged(all, {static_cast<float>(num_positions(schedule, at, warp)), own[0], own[1]});
      }
      float* partial = partials + partial_offset(schedule, at, at.channel + channel);
      partial[0] = all.mean;
      partial[1] = all.squares;
    }
  }
};

void merge(const FrameStatistics& statistics) {
  constexpr int kSlices = 8;
  for (int plane = 0; plane < statistics.num_samples * statistics.num_frames; ++plane) {
    for (int channel = 0; channel < statistics.num_out; ++channel) {
      Moments all = moments_of_slice(statistics, plane, channel, 0, kSlices);
      for (int slice = 1; slice < kSlices; ++slice) {
        all = merged(all, moments_of_slice(statistics, plane, channel, slice, kSlices));
      }
      float* target = statistics.statistics + statistics_offset(statistics, plane, channel);
      target[0] = all.mean;
      target[1] = all.squares;
    }
  }
}

template <class Type, int N>
void run(const ConvolutionShape& shape, const Replay& replay) {
  const Schedule schedule = make_schedule(shape, static_cast<int>(replay.state.num_frames),
                                          static_cast<int>(replay.x.num_frames), Tile<N>::kHeight, N);
  std::vector<float> partials(replay.statistics == nullptr ? 0 : num_partials(schedule));
  TileReplay<Type, N> tiles;
  Ring clip{0, 0}, weight{0, 0};
  for (int tile = 0; tile < num_tiles(schedule); ++tile) {
    const TilePosition at = tile_position(schedule, tile);
    tiles.sum_tile(schedule, replay, at, clip, weight);
    tiles.write_tile(schedule, replay, at, replay.statistics == nullptr ? nullptr : partials.data());
  }
  if (replay.statistics != nullptr) {
    merge({partials.data(), replay.statistics, shape.num_samples, shape.out_frames, shape.num_out, shape.out_height,
           shape.out_width, schedule.tile_height, kTileWidth});
  }
}

template <class Type>
void run_of_type(const ConvolutionShape& shape, const Replay& replay) {
  switch (choose_tile_channels(shape.num_out)) {
    case 64:
      return run<Type, 64>(shape, replay);
    case 96:
      return run<Type, 96>(shape, replay);
    case 128:
      return run<Type, 128>(shape, replay);
    default:
      return run<Type, 192>(shape, replay);
  }
}

}  // namespace

// sizes: B, C, O, H, W, T', H', W', kernel, dilation and start (3 each), replicates_front, is_bfloat16; then for x and
// for the state: frames, stride of samples, stride of frames. pointers: x, state, weight, bias, residual, out,
// statistics.
extern "C" void causal_conv3d_replay(const int64_t* sizes, void* const* pointers) {
  const auto number = [&](int index) { return static_cast<int>(sizes[index]); };
  ConvolutionShape shape{number(0), number(1), number(2), number(3), number(4),      number(5),     number(6),
                         number(7), {},        {},        {},        sizes[17] != 0, sizes[18] != 0};
  for (int axis = 0; axis < 3; ++axis) {
    shape.kernel[axis] = number(8 + axis);
    shape.dilation[axis] = number(11 + axis);
    shape.start[axis] = number(14 + axis);
  }
  const auto half = [&](int index) { return static_cast<uint16_t*>(pointers[index]); };
  const Replay replay{{half(0), sizes[19], sizes[20], sizes[21]},
                      {half(1), sizes[22], sizes[23], sizes[24]},
                      half(2),
                      half(3),
                      half(4),
                      half(5),
                      static_cast<float*>(pointers[6])};
  shape.is_bfloat16 ? run_of_type<BFloat16>(shape, replay) : run_of_type<Float16>(shape, replay);
}
