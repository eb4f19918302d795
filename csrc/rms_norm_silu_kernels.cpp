// RMS over the channels at each position, then SiLU. Channels add up in their order, or in that of vectors of them, so
// that every position rounds alike wherever it lies.

#include "rms_norm_silu_kernels.h"

#include "border.h"
#include "parallel.h"
#include "vector.h"

namespace opensora::OPENSORA_CAPABILITY {

namespace {

constexpr int64_t span_positions = 256;  // of 512 channels: 256 to 512 KiB, read twice from the second-level cache

struct Factors {
  const float *weight, *bias;
  float eps, root;
  bool has_silu;
};

template <class Element>
Vector chain(Vector x, Vector length, const Factors& factors, Vector weight, Vector bias) {
  x = rounded_to<Element>(rounded_to<Element>(x / length) * factors.root);
  if (factors.weight) {
    x = rounded_to<Element>(x * weight);
  }
  if (factors.bias) {
    x = rounded_to<Element>(x + bias);
  }
  return factors.has_silu ? silu_for<Element>(x) : x;
}

template <class Element>
Vector load_some(const Element* source, int64_t lanes) {
  return lanes >= num_lanes ? load(source) : load(source, lanes);
}

template <class Element>
void store_some(Element* target, Vector value, int64_t lanes) {
  lanes >= num_lanes ? store(target, value) : store(target, value, lanes);
}

// `count` <= span_positions positions, of channels `stride` and `target_stride` apart.
template <class Element>
void span_of_planes(const Element* source, int64_t stride, Element* target, int64_t target_stride, int64_t count,
                    int64_t num_channels, const Factors& factors) {
  float lengths[span_positions + num_lanes];
  for (int64_t i = 0; i < count; i += num_lanes) {
    store(lengths + i, Vector{});
  }
  for (int64_t channel = 0; channel < num_channels; ++channel) {
    for (int64_t i = 0; i < count; i += num_lanes) {
      const Vector x = load_some(source + channel * stride + i, count - i);
      store(lengths + i, load(lengths + i) + x * x);
    }
  }
  for (int64_t i = 0; i < count; i += num_lanes) {
    store(lengths + i, maximum(splat(factors.eps), square_root(load(lengths + i))));
  }
  for (int64_t channel = 0; channel < num_channels; ++channel) {
    const Vector weight = splat(factors.weight ? factors.weight[channel] : 1.0f);
    const Vector bias = splat(factors.bias ? factors.bias[channel] : 0.0f);
    for (int64_t i = 0; i < count; i += num_lanes) {
      const Vector x = load_some(source + channel * stride + i, count - i);
      const Vector result = chain<Element>(x, load(lengths + i), factors, weight, bias);
      store_some(target + channel * target_stride + i, result, count - i);
    }
  }
}

template <class Element>
void pixels(const Element* source, int64_t stride, Element* target, int64_t target_stride, int64_t count,
            int64_t num_channels, const Factors& factors) {
  for (int64_t position = 0; position < count; ++position) {
    const Element* x = source + position * stride;
    Vector squares[2] = {};  // two sums: the adder's latency would double the time of 96 channels
    int64_t channel = 0;
    for (; channel + 2 * num_lanes <= num_channels; channel += 2 * num_lanes) {
      const Vector first = load(x + channel), second = load(x + channel + num_lanes);
      squares[0] += first * first;
      squares[1] += second * second;
    }
    for (; channel < num_channels; channel += num_lanes) {
      const Vector value = load_some(x + channel, num_channels - channel);
      squares[0] += value * value;
    }
    const Vector length = maximum(splat(factors.eps), square_root(splat(sum(squares[0] + squares[1]))));
    for (channel = 0; channel < num_channels; channel += num_lanes) {
      const int64_t lanes = num_channels - channel;
      const Vector weight = factors.weight ? load_some(factors.weight + channel, lanes) : Vector{};
      const Vector bias = factors.bias ? load_some(factors.bias + channel, lanes) : Vector{};
      const Vector result = chain<Element>(load_some(x + channel, lanes), length, factors, weight, bias);
      store_some(target + position * target_stride + channel, result, lanes);
    }
  }
}

template <class Element>
void planes(const Clip& x, const Factors& factors, const Border& border, const Clip& out) {
  // a block: some positions of a frame or, where the result has a border, a row with its sides, which repeat its pixels
  const bool is_plain = is_empty(border);
  const int64_t width = is_plain ? num_positions_of(x) : x.width;
  const int64_t num_rows = is_plain ? 1 : out.height, block_width = is_plain ? span_positions : width;
  const int64_t num_blocks = (width + block_width - 1) / block_width;
  const int64_t num_planes = x.num_samples * x.num_frames;
  for_each_block(num_planes * num_rows * num_blocks, block_width * x.num_channels, [&](int64_t index) {
    const int64_t start = index % num_blocks * block_width, row = index / num_blocks % num_rows;
    const int64_t plane = index / num_blocks / num_rows;
    const int64_t sample = plane / x.num_frames, frame = plane % x.num_frames;
    const int64_t end = start + block_width < width ? start + block_width : width;
    const int64_t source_row = source_of(row - border.top, is_plain ? 1 : x.height, border.mode);
    Element* target = place_in<Element>(out, sample, 0, frame, is_plain ? 0 : row * out.width);
    for (int64_t first = start; source_row >= 0 && first < end; first += span_positions) {
      const int64_t count = end - first < span_positions ? end - first : span_positions;
      span_of_planes(place_in<Element>(x, sample, 0, frame, source_row * width + first), x.stride_c,
                     target + border.left + first, out.stride_c, count, x.num_channels, factors);
    }
    for (int64_t channel = 0; !is_plain && channel < x.num_channels; ++channel) {
      Element* target_row = target + channel * out.stride_c;
      source_row < 0 ? clear(target_row, out.width) : add_sides(target_row, x.width, border, 1);
    }
  });
}

template <class Element>
void channels_last(const Clip& x, const Factors& factors, const Border& border, const Clip& out) {
  for_each_block(x.num_samples * x.num_frames * out.height, out.width * x.num_channels, [&](int64_t index) {
    const int64_t row = index % out.height, frame = index / out.height % x.num_frames;
    const int64_t sample = index / out.height / x.num_frames;
    const int64_t source_row = source_of(row - border.top, x.height, border.mode);
    Element* target = place_in<Element>(out, sample, 0, frame, row * out.width);
    if (source_row < 0) {
      clear(target, out.width * x.num_channels);
      return;
    }
    pixels(place_in<Element>(x, sample, 0, frame, source_row * x.width), x.stride_w,
           target + border.left * out.stride_w, out.stride_w, x.width, x.num_channels, factors);
    add_sides(target, x.width, border, x.num_channels);
  });
}

template <class Element>
void run(const Clip& x, const Factors& factors, const Border& border, const Clip& out) {
  x.channels_last ? channels_last<Element>(x, factors, border, out) : planes<Element>(x, factors, border, out);
}

}  // namespace

void normalise_rms(const Clip& x, const float* weight, const float* bias, float eps, float root, bool has_silu,
                   const Border& border, const Clip& out) {
  const Factors factors{weight, bias, eps, root, has_silu};
  x.is_bf16 ? run<BFloat16>(x, factors, border, out) : run<float>(x, factors, border, out);
}

}  // namespace opensora::OPENSORA_CAPABILITY
