// One pass over a clip that normalises, applies SiLU and adds the border that a convolution reads.

#include "group_norm_silu_kernels.h"

#include "border.h"
#include "parallel.h"
#include "vector.h"

namespace opensora::OPENSORA_CAPABILITY {

namespace {

constexpr int64_t span_elements = 8192;  // one thread's share where rows need no border

template <class Element, bool has_affine, bool has_silu>
Vector result_of(Vector x, Vector mean, Vector scale, Vector shift) {
  if (has_affine) {
    x = (x - mean) * scale + shift;
  }
  if (has_silu) {
    x = silu_for<Element>(rounded_to<Element>(x));  // of the rounded value, as the unfused chain
  }
  return x;
}

template <class Element, bool has_affine, bool has_silu>
void span_of_plane(const Element* source, Element* target, int64_t count, float mean, float scale, float shift) {
  const Vector means = splat(mean), scales = splat(scale), shifts = splat(shift);
  int64_t i = 0;
  for (; i + num_lanes <= count; i += num_lanes) {
    store(target + i, result_of<Element, has_affine, has_silu>(load(source + i), means, scales, shifts));
  }
  if (const int64_t left = count - i; left > 0) {
    const Vector x = load(source + i, left);
    store(target + i, result_of<Element, has_affine, has_silu>(x, means, scales, shifts), left);
  }
}

template <class Element, bool has_affine, bool has_silu>
void planes(const Clip& x, const float* affine, int64_t num_parts, const Border& border, const Clip& out) {
  const int64_t num_channels = x.num_channels;
  // without a border a plane is one long row, cut into spans; with one, each block makes some rows
  const bool is_plain = is_empty(border);
  const int64_t num_positions = num_positions_of(out);
  const int64_t rows_at_once = out.width < span_elements ? span_elements / out.width : 1;
  const int64_t num_blocks =
      is_plain ? (num_positions + span_elements - 1) / span_elements : (out.height + rows_at_once - 1) / rows_at_once;
  const int64_t num_planes = x.num_samples * num_channels * x.num_frames;
  for_each_block(num_planes * num_blocks, num_positions / num_blocks, [&](int64_t index) {
    const int64_t block = index % num_blocks, plane = index / num_blocks;
    const int64_t frame = plane % x.num_frames, channel = plane / x.num_frames % num_channels;
    const int64_t sample = plane / x.num_frames / num_channels;
    const float* place =
        has_affine ? affine + (sample * num_parts + (num_parts > 1 ? frame : 0)) * 3 * num_channels + channel : affine;
    const float mean = has_affine ? place[0] : 0.0f, scale = has_affine ? place[num_channels] : 1.0f;
    const float shift = has_affine ? place[2 * num_channels] : 0.0f;
    const Element* source = place_in<Element>(x, sample, channel, frame, 0);
    Element* target = place_in<Element>(out, sample, channel, frame, 0);
    if (is_plain) {
      const int64_t first = block * span_elements;
      const int64_t count = num_positions - first < span_elements ? num_positions - first : span_elements;
      span_of_plane<Element, has_affine, has_silu>(source + first, target + first, count, mean, scale, shift);
      return;
    }
    const int64_t last = (block + 1) * rows_at_once < out.height ? (block + 1) * rows_at_once : out.height;
    for (int64_t row = block * rows_at_once; row < last; ++row) {
      const int64_t source_row = source_of(row - border.top, x.height, border.mode);
      Element* target_row = target + row * out.width;
      if (source_row < 0) {
        clear(target_row, out.width);
        continue;
      }
      span_of_plane<Element, has_affine, has_silu>(source + source_row * x.width, target_row + border.left, x.width,
                                                   mean, scale, shift);
      add_sides(target_row, x.width, border, 1);
    }
  });
}

template <class Element, bool has_affine, bool has_silu>
void pixels(const Element* source, int64_t stride, Element* target, int64_t target_stride, int64_t count,
            int64_t num_channels, const float* affine) {
  for (int64_t position = 0; position < count; ++position) {
    const Element* x = source + position * stride;
    Element* out = target + position * target_stride;
    int64_t channel = 0;
    for (; channel + num_lanes <= num_channels; channel += num_lanes) {
      const float* place = affine + channel;
      const Vector mean = has_affine ? load(place) : Vector{}, scale = has_affine ? load(place + num_channels) : mean;
      const Vector shift = has_affine ? load(place + 2 * num_channels) : mean;
      store(out + channel, result_of<Element, has_affine, has_silu>(load(x + channel), mean, scale, shift));
    }
    if (const int64_t left = num_channels - channel; left > 0) {
      const float* place = affine + channel;
      const Vector mean = has_affine ? load(place, left) : Vector{};
      const Vector scale = has_affine ? load(place + num_channels, left) : mean;
      const Vector shift = has_affine ? load(place + 2 * num_channels, left) : mean;
      store(out + channel, result_of<Element, has_affine, has_silu>(load(x + channel, left), mean, scale, shift), left);
    }
  }
}

template <class Element, bool has_affine, bool has_silu>
void channels_last(const Clip& x, const float* affine, int64_t num_parts, const Border& border, const Clip& out) {
  const int64_t num_channels = x.num_channels;
  for_each_block(x.num_samples * x.num_frames * out.height, out.width * num_channels, [&](int64_t index) {
    const int64_t row = index % out.height, frame = index / out.height % x.num_frames;
    const int64_t sample = index / out.height / x.num_frames;
    const int64_t source_row = source_of(row - border.top, x.height, border.mode);
    Element* target = place_in<Element>(out, sample, 0, frame, row * out.width);
    if (source_row < 0) {
      clear(target, out.width * num_channels);
      return;
    }
    const float* place =
        has_affine ? affine + (sample * num_parts + (num_parts > 1 ? frame : 0)) * 3 * num_channels : affine;
    const Element* source = place_in<Element>(x, sample, 0, frame, source_row * x.width);
    pixels<Element, has_affine, has_silu>(source, x.stride_w, target + border.left * out.stride_w, out.stride_w,
                                          x.width, num_channels, place);
    add_sides(target, x.width, border, num_channels);
  });
}

template <class Element, bool has_affine, bool has_silu>
void run(const Clip& x, const float* affine, int64_t num_parts, const Border& border, const Clip& out) {
  if (x.channels_last) {
    channels_last<Element, has_affine, has_silu>(x, affine, num_parts, border, out);
  } else {
    planes<Element, has_affine, has_silu>(x, affine, num_parts, border, out);
  }
}

template <class Element>
void run_with(const Clip& x, const float* affine, int64_t num_parts, bool has_silu, const Border& border,
              const Clip& out) {
  if (affine == nullptr) {
    has_silu ? run<Element, false, true>(x, affine, 1, border, out)
             : run<Element, false, false>(x, affine, 1, border, out);
  } else {
    has_silu ? run<Element, true, true>(x, affine, num_parts, border, out)
             : run<Element, true, false>(x, affine, num_parts, border, out);
  }
}

}  // namespace

void normalise(const Clip& x, const float* affine, int64_t num_parts, bool has_silu, const Border& border,
               const Clip& out) {
  x.is_bf16 ? run_with<BFloat16>(x, affine, num_parts, has_silu, border, out)
            : run_with<float>(x, affine, num_parts, has_silu, border, out);
}

}  // namespace opensora::OPENSORA_CAPABILITY
