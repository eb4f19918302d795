// Mean and sum of squared deviations of every frame of every channel.
//
// Blocks of fixed size, each in two passes over memory that the first has brought into the cache, so that nothing
// cancels; blocks merge by Chan's formula in their order. A frame's numbers depend on nothing but the frame.

#include "group_norm_silu_kernels.h"
#include "parallel.h"
#include "vector.h"

namespace opensora::OPENSORA_CAPABILITY {

namespace {

constexpr int64_t span_elements = 4096;  // 8 to 16 KiB: stays in the first-level cache

// Of one number or of a vector of them.
template <class Number>
struct Moments {
  float count;
  Number mean, squares;
};

template <class Number>
Moments<Number> merged(Moments<Number> a, Moments<Number> b) {
  const float count = a.count + b.count;
  const Number difference = b.mean - a.mean;
  const Number mean = a.mean + difference * (b.count / count);
  return {count, mean, a.squares + b.squares + difference * difference * (a.count * (b.count / count))};
}

template <class Element, class Function>
float sum_over(const Element* source, int64_t count, Function function) {
  Vector totals[4] = {};
  int64_t i = 0;
  for (; i + 4 * num_lanes <= count; i += 4 * num_lanes) {
    for (int k = 0; k < 4; ++k) {
      totals[k] += function(load(source + i + k * num_lanes));
    }
  }
  for (; i + num_lanes <= count; i += num_lanes) {
    totals[0] += function(load(source + i));
  }
  float rest = 0.0f;
  for (; i < count; ++i) {
    rest += function(splat(load_one(source + i)))[0];
  }
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3])) + rest;
}

template <class Element>
Moments<float> moments_of(const Element* source, int64_t count) {
  const float mean = sum_over(source, count, [](Vector x) { return x; }) / count;
  const float squares = sum_over(source, count, [=](Vector x) { return (x - mean) * (x - mean); });
  return {static_cast<float>(count), mean, squares};
}

template <class Element>
void of_planes(const Clip& x, float* table) {
  const int64_t num_positions = num_positions_of(x);
  for_each_block(x.num_samples * x.num_channels * x.num_frames, num_positions, [&](int64_t plane) {
    const int64_t frame = plane % x.num_frames;
    const int64_t channel = plane / x.num_frames % x.num_channels;
    const Element* source = place_in<Element>(x, plane / x.num_frames / x.num_channels, channel, frame, 0);
    Moments<float> found = moments_of(source, num_positions < span_elements ? num_positions : span_elements);
    for (int64_t start = span_elements; start < num_positions; start += span_elements) {
      const int64_t left = num_positions - start;
      found = merged(found, moments_of(source + start, left < span_elements ? left : span_elements));
    }
    table[2 * plane] = found.mean;
    table[2 * plane + 1] = found.squares;
  });
}

// Of `count` positions and one vector of channels (`lanes` of them), or four: independent sums hide the adder's
// latency.
template <class Element, int num_vectors>
void of_block(const Element* source, int64_t stride, int64_t count, int64_t lanes, float* mean, float* squares) {
  const bool is_whole = lanes == num_vectors * num_lanes;
  auto read = [&](int64_t position, int k) {
    const Element* place = source + position * stride + k * num_lanes;
    return is_whole ? load(place) : load(place, lanes);
  };
  Vector means[num_vectors] = {}, totals[num_vectors] = {};
  for (int64_t position = 0; position < count; ++position) {
    for (int k = 0; k < num_vectors; ++k) {
      means[k] += read(position, k);
    }
  }
  for (int k = 0; k < num_vectors; ++k) {
    means[k] /= static_cast<float>(count);
  }
  for (int64_t position = 0; position < count; ++position) {
    for (int k = 0; k < num_vectors; ++k) {
      const Vector deviation = read(position, k) - means[k];
      totals[k] += deviation * deviation;
    }
  }
  for (int k = 0; k < num_vectors; ++k) {
    if (is_whole) {
      store(mean + k * num_lanes, means[k]);
      store(squares + k * num_lanes, totals[k]);
    } else {
      store(mean, means[k], lanes);
      store(squares, totals[k], lanes);
    }
  }
}

template <class Element>
void of_blocks(const Clip& x, int64_t num_blocks, float* partial) {
  const int64_t num_channels = x.num_channels, num_positions = num_positions_of(x);
  for_each_block(x.num_samples * x.num_frames * num_blocks, block_positions * num_channels, [&](int64_t index) {
    const int64_t block = index % num_blocks, frame = index / num_blocks % x.num_frames;
    const int64_t first = block * block_positions;
    const int64_t count = num_positions - first < block_positions ? num_positions - first : block_positions;
    const Element* source = place_in<Element>(x, index / num_blocks / x.num_frames, 0, frame, first);
    float* mean = partial + index * 2 * num_channels;
    float* squares = mean + num_channels;
    int64_t channel = 0;
    for (; channel + 4 * num_lanes <= num_channels; channel += 4 * num_lanes) {
      of_block<Element, 4>(source + channel, x.stride_w, count, 4 * num_lanes, mean + channel, squares + channel);
    }
    for (; channel < num_channels; channel += num_lanes) {
      const int64_t lanes = num_channels - channel < num_lanes ? num_channels - channel : num_lanes;
      of_block<Element, 1>(source + channel, x.stride_w, count, lanes, mean + channel, squares + channel);
    }
  });
}

// The blocks of each frame, a vector of channels at a time.
void merge_blocks(const Clip& x, int64_t num_blocks, const float* partial, float* table) {
  const int64_t num_channels = x.num_channels, num_positions = num_positions_of(x);
  const int64_t num_vectors = (num_channels + num_lanes - 1) / num_lanes;
  for_each_block(x.num_samples * x.num_frames * num_vectors, num_blocks * num_lanes, [&](int64_t index) {
    const int64_t channel = index % num_vectors * num_lanes, plane = index / num_vectors;
    const int64_t lanes = num_channels - channel;
    auto read = [&](const float* place) { return lanes < num_lanes ? load(place, lanes) : load(place); };
    Moments<Vector> found{};
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t left = num_positions - block * block_positions;
      const float count = static_cast<float>(left < block_positions ? left : block_positions);
      const float* place = partial + (plane * num_blocks + block) * 2 * num_channels + channel;
      const Moments<Vector> next{count, read(place), read(place + num_channels)};
      found = block == 0 ? next : merged(found, next);
    }
    const int64_t sample = plane / x.num_frames, frame = plane % x.num_frames;
    for (int64_t lane = 0; lane < num_lanes && lane < lanes; ++lane) {
      float* target = table + ((sample * num_channels + channel + lane) * x.num_frames + frame) * 2;
      target[0] = found.mean[lane];
      target[1] = found.squares[lane];
    }
  });
}

}  // namespace

void frame_statistics(const Clip& x, float* partial, float* table) {
  if (!x.channels_last) {
    x.is_bf16 ? of_planes<BFloat16>(x, table) : of_planes<float>(x, table);
    return;
  }
  const int64_t num_blocks = (num_positions_of(x) + block_positions - 1) / block_positions;
  x.is_bf16 ? of_blocks<BFloat16>(x, num_blocks, partial) : of_blocks<float>(x, num_blocks, partial);
  merge_blocks(x, num_blocks, partial, table);
}

}  // namespace opensora::OPENSORA_CAPABILITY
