// causal_conv3d for sm_90a: one matrix product whose rows are output positions and whose sum runs over taps and
// channels. A producer warp fills two rings of shared memory by TMA, boxes of the clip and of the weight; two
// warpgroups multiply them with wgmma and write the result. causal_conv3d_maps.h says where everything lies.
//
// Blocks are persistent: while the consumers write one tile, the producer loads the next one's first boxes.

#include <algorithm>

#include "causal_conv3d.h"
#include "causal_conv3d_maps.h"
#include "causal_conv3d_results.cuh"
#include "hopper.h"
#include "hopper_products.h"
#include "shared_memory.h"
#include "tensor_map.h"

namespace opensora {
namespace {

using namespace conv90;

constexpr int kThreads = 128 * (1 + kNumConsumers);
// 65536 registers / 384 threads = 168 at launch; the producer's 128 threads give theirs to the consumers' 256.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(128 * (kProducerRegisters + kNumConsumers * kConsumerRegisters) <= 65536);

struct Arguments {
  CUtensorMap x, state, weight;  // (C, W, H, T, B) twice and (C, O, K); 64-byte aligned by their type
  Schedule schedule;
  Results results;
};

// Addresses in shared memory. A slot's full barrier waits for the producer's arrival and its bytes, its empty barrier
// for one arrival of every consumer warp: each knows only of its own part of a product that it is done.
template <int N>
struct Slots {
  uint32_t base;

  __device__ uint32_t clip(int slot) const {
    return base + slot * Tile<N>::kClipSlotBytes;
  }
  __device__ uint32_t weight(int slot) const {
    return base + Tile<N>::kWeightOffset + slot * Tile<N>::kWeightSlotBytes;
  }
  __device__ uint32_t barrier(int index) const {
    return base + Tile<N>::kBarrierOffset + 8 * index;
  }
  __device__ uint32_t clip_full(int slot) const {
    return barrier(slot);
  }
  __device__ uint32_t clip_empty(int slot) const {
    return barrier(kClipSlots + slot);
  }
  __device__ uint32_t weight_full(int slot) const {
    return barrier(2 * kClipSlots + slot);
  }
  __device__ uint32_t weight_empty(int slot) const {
    return barrier(2 * kClipSlots + Tile<N>::kWeightSlots + slot);
  }
};

// One thread: every box of every tile, in the order in which the consumers read them.
template <int N>
__device__ void load_tiles(const Arguments& arguments, const Slots<N>& slots) {
  const Schedule& schedule = arguments.schedule;
  const ConvolutionShape& shape = schedule.shape;
  const uint32_t clip_bytes = box_rows(schedule) * kTileWidth * kRowBytes;
  const int total = static_cast<int>(num_tiles(schedule));
  Ring clip{0, 0}, weight{0, 0};
  for (int tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const TilePosition at = tile_position(schedule, tile);
    for (int i = 0; i < shape.kernel[0]; ++i) {
      const InputFrame input = input_frame(shape, schedule.num_state, schedule.num_frames, at.frame, i);
      if (input.source == FrameSource::kNothing) {
        continue;
      }
      const CUtensorMap* map = input.source == FrameSource::kState ? &arguments.state : &arguments.x;
      for (int j = 0; j < shape.kernel[1]; j += schedule.row_taps) {
        for (int k = 0; k < shape.kernel[2]; ++k) {
          for (int chunk = 0; chunk < schedule.num_chunks; ++chunk) {
            hopper::barrier_wait(slots.clip_empty(clip.slot), clip.phase ^ 1);
            hopper::barrier_arrive_expecting(slots.clip_full(clip.slot), clip_bytes);
            hopper::copy_box(slots.clip(clip.slot), map, slots.clip_full(clip.slot), chunk * kChunk,
                             box_column(schedule, at, k), box_row(schedule, at, j), input.frame, at.sample);
            clip = next(clip, kClipSlots);
            for (int row_tap = 0; row_tap < schedule.row_taps; ++row_tap) {
              hopper::barrier_wait(slots.weight_empty(weight.slot), weight.phase ^ 1);
              hopper::barrier_arrive_expecting(slots.weight_full(weight.slot), Tile<N>::kWeightSlotBytes);
              hopper::copy_box(slots.weight(weight.slot), &arguments.weight, slots.weight_full(weight.slot),
                               chunk * kChunk, at.channel, tap_index(shape, i, j + row_tap, k), 0, 0);
              weight = next(weight, Tile<N>::kWeightSlots);
            }
          }
        }
      }
    }
  }
}

// One batch: a weight slot times the positions of a warpgroup, `kSteps` steps of the sum. Without a branch inside,
// since ptxas counts every basic block with products as a batch of its own, and waits for too many.
template <class Type, int N, int kSteps>
__device__ __forceinline__ void multiply_slots(uint64_t left, uint64_t right, float (&sums)[Tile<N>::kBlocks][N / 2]) {
  hopper::products_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int block = 0; block < Tile<N>::kBlocks; ++block) {
      hopper::multiply(Type(), sums[block], moved(left, clip_operand(block, 0, step)),
                       moved(right, weight_operand(step)));
    }
  }
  hopper::products_commit();
}

// A consumer warpgroup's sums of one tile. A batch runs while the next one is issued; its slots are given back after
// that.
template <class Type, int N>
__device__ void multiply_tile(const Schedule& schedule, int count, int consumer, const Slots<N>& slots, Ring& clip,
                              Ring& weight, float (&sums)[Tile<N>::kBlocks][N / 2]) {
  constexpr int kBlocks = Tile<N>::kBlocks;
  const bool signals = threadIdx.x % 32 == 0;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int index = 0; index < N / 2; ++index) {
      sums[block][index] = 0.0f;
    }
  }
  int row_tap = 0, chunk = 0, clip_done = -1, weight_done = -1;
  for (int product = 0; product < count; ++product) {
    if (row_tap == 0) {
      hopper::barrier_wait(slots.clip_full(clip.slot), clip.phase);
    }
    hopper::barrier_wait(slots.weight_full(weight.slot), weight.phase);
    const uint64_t left = operand_descriptor(slots.clip(clip.slot) + clip_operand(consumer * kBlocks, row_tap, 0));
    const uint64_t right = operand_descriptor(slots.weight(weight.slot));
    switch (num_steps(schedule, chunk)) {
      case 4:
        multiply_slots<Type, N, 4>(left, right, sums);
        break;
      case 3:
        multiply_slots<Type, N, 3>(left, right, sums);
        break;
      case 2:
        multiply_slots<Type, N, 2>(left, right, sums);
        break;
      default:
        multiply_slots<Type, N, 1>(left, right, sums);
    }
    hopper::products_wait<1>();
    if (signals && weight_done >= 0) {
      hopper::barrier_arrive(slots.weight_empty(weight_done));
    }
    if (signals && clip_done >= 0) {
      hopper::barrier_arrive(slots.clip_empty(clip_done));
    }
    weight_done = weight.slot;
    weight = next(weight, Tile<N>::kWeightSlots);
    clip_done = -1;
    if (++row_tap == schedule.row_taps) {
      row_tap = 0;
      clip_done = clip.slot;
      clip = next(clip, kClipSlots);
      chunk = chunk + 1 == schedule.num_chunks ? 0 : chunk + 1;
    }
  }
  hopper::products_wait<0>();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    hopper::pin(sums[block]);
  }
  if (signals && count > 0) {
    hopper::barrier_arrive(slots.weight_empty(weight_done));
    hopper::barrier_arrive(slots.clip_empty(clip_done));
  }
}

template <class Type, int N>
__global__ void __launch_bounds__(kThreads, 1) convolution_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ uint8_t unaligned[];
  uint8_t* shared = unaligned + (1024 - hopper::shared_address(unaligned) % 1024) % 1024;
  const Slots<N> slots{hopper::shared_address(shared)};
  if (threadIdx.x == 0) {
    hopper::prefetch_map(&arguments.x);
    hopper::prefetch_map(&arguments.state);
    hopper::prefetch_map(&arguments.weight);
    for (int slot = 0; slot < kClipSlots; ++slot) {
      hopper::barrier_init(slots.clip_full(slot), 1);
      hopper::barrier_init(slots.clip_empty(slot), kNumWarps);
    }
    for (int slot = 0; slot < Tile<N>::kWeightSlots; ++slot) {
      hopper::barrier_init(slots.weight_full(slot), 1);
      hopper::barrier_init(slots.weight_empty(slot), kNumWarps);
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();
  // the same for all of a warp, and the compiler is to know it
  const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      load_tiles<N>(arguments, slots);
    }
    return;
  }
  hopper::take_registers<kConsumerRegisters>();
  const Schedule& schedule = arguments.schedule;
  float* moments = reinterpret_cast<float*>(shared + Tile<N>::kStatisticsOffset);
  const int total = static_cast<int>(num_tiles(schedule));
  Ring clip{0, 0}, weight{0, 0};
  for (int tile = blockIdx.x; tile < total; tile += gridDim.x) {
    const TilePosition at = tile_position(schedule, tile);
    float sums[Tile<N>::kBlocks][N / 2];
    multiply_tile<Type, N>(schedule, num_products(schedule, at), warpgroup - 1, slots, clip, weight, sums);
    write_tile<Type, N>(schedule, arguments.results, at, warpgroup - 1, sums, moments);
    if (arguments.results.partials != nullptr) {
      write_moments<N>(schedule, arguments.results, at, moments);
    }
  }
}

CUtensorMap clip_map(const Schedule& schedule, const Clip& clip) {
  const ConvolutionShape& shape = schedule.shape;
  const int64_t num_channels = shape.num_channels;
  return tensor_map<5>("causal_conv3d", clip.data, shape.is_bfloat16,
                       {num_channels, shape.width, shape.height, clip.num_frames, shape.num_samples},
                       {num_channels, num_channels * shape.width, clip.frame_stride, clip.sample_stride},
                       {kChunk, kTileWidth, box_rows(schedule), 1, 1}, kRowBytes);
}

CUtensorMap weight_map(const Schedule& schedule, const void* weight) {
  const ConvolutionShape& shape = schedule.shape;
  const int64_t num_channels = shape.num_channels, num_out = shape.num_out;
  const int64_t num_taps = int64_t{1} * shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
  return tensor_map<5>("causal_conv3d", weight, shape.is_bfloat16, {num_channels, num_out, num_taps, 1, 1},
                       {num_channels, num_channels * num_out, 1, 1}, {kChunk, schedule.tile_channels, 1, 1, 1},
                       kRowBytes);
}

#define OPENSORA_RETURN_ERROR(call)                           \
  if (const cudaError_t error = call; error != cudaSuccess) { \
    return error;                                             \
  }

template <class Type, int N>
cudaError_t launch(const ConvolutionForward& convolution, const Schedule& schedule, cudaStream_t stream) {
  const ConvolutionShape& shape = convolution.shape;
  Arguments arguments{};
  arguments.schedule = schedule;
  arguments.results = {convolution.bias, convolution.residual, convolution.out,
                       convolution.statistics == nullptr ? nullptr : convolution.workspace};
  arguments.x = clip_map(schedule, convolution.x);
  // without a state its map is never read; any will do
  arguments.state = schedule.num_state > 0 ? clip_map(schedule, convolution.state) : arguments.x;
  arguments.weight = weight_map(schedule, convolution.weight);
  int device = 0, num_multiprocessors = 0;
  OPENSORA_RETURN_ERROR(cudaGetDevice(&device));
  OPENSORA_RETURN_ERROR(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (num_tiles(schedule) > INT32_MAX - num_multiprocessors) {  // a block counts one round beyond the last tile
    return cudaErrorInvalidValue;
  }
  constexpr int kSharedBytes = Tile<N>::kBytes + 1024;  // the first slot begins at a multiple of 1024
  OPENSORA_RETURN_ERROR((allow_shared_memory<convolution_kernel<Type, N>, kSharedBytes>()));
  const auto num_blocks = static_cast<unsigned>(std::min<int64_t>(num_tiles(schedule), num_multiprocessors));
  convolution_kernel<Type, N><<<num_blocks, kThreads, kSharedBytes, stream>>>(arguments);
  OPENSORA_RETURN_ERROR(cudaGetLastError());
  if (convolution.statistics == nullptr) {
    return cudaSuccess;
  }
  return merge_frame_statistics({convolution.workspace, convolution.statistics, shape.num_samples, shape.out_frames,
                                 shape.num_out, shape.out_height, shape.out_width, schedule.tile_height, kTileWidth},
                                stream);
}

#undef OPENSORA_RETURN_ERROR

template <int N>
cudaError_t launch_of_type(const ConvolutionForward& convolution, const Schedule& schedule, cudaStream_t stream) {
  return convolution.shape.is_bfloat16 ? launch<BFloat16, N>(convolution, schedule, stream)
                                       : launch<Float16, N>(convolution, schedule, stream);
}

Schedule schedule_of(const ConvolutionForward& convolution) {
  const int tile_channels = choose_tile_channels(convolution.shape.num_out);
  return make_schedule(convolution.shape, convolution.state.num_frames, convolution.x.num_frames,
                       tile_height(tile_channels), tile_channels);
}

}  // namespace

int64_t causal_conv3d_sm90a_workspace(const ConvolutionForward& convolution) {
  return convolution.statistics == nullptr ? 0 : num_partials(schedule_of(convolution));
}

cudaError_t causal_conv3d_sm90a(const ConvolutionForward& convolution, cudaStream_t stream) {
  const Schedule schedule = schedule_of(convolution);
  switch (schedule.tile_channels) {
    case 64:
      return launch_of_type<64>(convolution, schedule, stream);
    case 96:
      return launch_of_type<96>(convolution, schedule, stream);
    case 128:
      return launch_of_type<128>(convolution, schedule, stream);
    default:
      return launch_of_type<192>(convolution, schedule, stream);
  }
}

}  // namespace opensora
