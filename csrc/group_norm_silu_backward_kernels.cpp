// The way back through GroupNorm and SiLU: sums over each frame, then the gradient of x.

#include "group_norm_silu_kernels.h"
#include "parallel.h"
#include "vector.h"

namespace opensora::OPENSORA_CAPABILITY {

namespace {

constexpr int64_t span_elements = 4096;

struct Affine {
  Vector mean, scale, shift;
};

// The gradient before SiLU, rounded as the unfused chain rounds it.
template <class Element, bool has_silu>
Vector inner_gradient(Vector x, Vector grad, Affine affine) {
  if (has_silu) {
    const Vector normed = rounded_to<Element>((x - affine.mean) * affine.scale + affine.shift);
    const Vector share = sigmoid_for<Element>(normed);
    grad = rounded_to<Element>(grad * share * (1.0f + normed * (1.0f - share)));
  }
  return grad;
}

const float* affine_at(const Clip& x, const float* affine, int64_t num_parts, int64_t sample, int64_t frame) {
  return affine + (sample * num_parts + (num_parts > 1 ? frame : 0)) * 3 * x.num_channels;
}

Affine splat_affine(const float* place, int64_t num_channels) {
  return {splat(place[0]), splat(place[num_channels]), splat(place[2 * num_channels])};
}

// `lanes` channels; fewer than num_lanes at the end.
Affine load_affine(const float* place, int64_t num_channels, int64_t lanes) {
  if (lanes >= num_lanes) {
    return {load(place), load(place + num_channels), load(place + 2 * num_channels)};
  }
  return {load(place, lanes), load(place + num_channels, lanes), load(place + 2 * num_channels, lanes)};
}

template <class Element>
Vector load_some(const Element* source, int64_t lanes) {
  return lanes >= num_lanes ? load(source) : load(source, lanes);
}

// body(sample, channel, frame) for every plane.
template <class Body>
void for_each_plane(const Clip& x, const Body& body) {
  for_each_block(x.num_samples * x.num_channels * x.num_frames, num_positions_of(x), [&](int64_t plane) {
    body(plane / x.num_frames / x.num_channels, plane / x.num_frames % x.num_channels, plane % x.num_frames);
  });
}

template <class Element, bool has_silu>
void sums_of_planes(const Clip& x, const Clip& grad, const float* affine, int64_t num_parts, float* sums) {
  const int64_t num_positions = num_positions_of(x);
  for_each_plane(x, [&](int64_t sample, int64_t channel, int64_t frame) {
    const Affine here = splat_affine(affine_at(x, affine, num_parts, sample, frame) + channel, x.num_channels);
    const Element* x_place = place_in<Element>(x, sample, channel, frame, 0);
    const Element* grad_place = place_in<Element>(grad, sample, channel, frame, 0);
    float total = 0.0f, product = 0.0f;
    for (int64_t start = 0; start < num_positions; start += span_elements) {  // sums of sums round less
      const int64_t end = start + span_elements < num_positions ? start + span_elements : num_positions;
      Vector totals{}, products{};
      for (int64_t i = start; i < end; i += num_lanes) {
        const Vector value = load_some(x_place + i, end - i);  // no gradient beyond the end, so that x does not matter
        const Vector inner = inner_gradient<Element, has_silu>(value, load_some(grad_place + i, end - i), here);
        totals += inner;
        products += inner * (value - here.mean);
      }
      total += sum(totals);
      product += sum(products);
    }
    float* target = sums + ((sample * x.num_channels + channel) * x.num_frames + frame) * 2;
    target[0] = total;
    target[1] = product;
  });
}

template <class Element, bool has_silu>
void sums_of_channels_last(const Clip& x, const Clip& grad, const float* affine, int64_t num_parts, float* partial,
                           float* sums) {
  const int64_t num_channels = x.num_channels, num_positions = num_positions_of(x);
  const int64_t num_blocks = (num_positions + block_positions - 1) / block_positions;
  for_each_block(x.num_samples * x.num_frames * num_blocks, block_positions * num_channels, [&](int64_t index) {
    const int64_t block = index % num_blocks, frame = index / num_blocks % x.num_frames;
    const int64_t sample = index / num_blocks / x.num_frames, first = block * block_positions;
    const int64_t count = num_positions - first < block_positions ? num_positions - first : block_positions;
    const Element* x_place = place_in<Element>(x, sample, 0, frame, first);
    const Element* grad_place = place_in<Element>(grad, sample, 0, frame, first);
    const float* here = affine_at(x, affine, num_parts, sample, frame);
    float* target = partial + index * 2 * num_channels;
    for (int64_t channel = 0; channel < num_channels; channel += num_lanes) {
      const int64_t lanes = num_channels - channel;
      const Affine values = load_affine(here + channel, num_channels, lanes);
      Vector totals{}, products{};
      for (int64_t position = 0; position < count; ++position) {
        const Vector value = load_some(x_place + position * x.stride_w + channel, lanes);
        const Vector inner = inner_gradient<Element, has_silu>(
            value, load_some(grad_place + position * grad.stride_w + channel, lanes), values);
        totals += inner;
        products += inner * (value - values.mean);
      }
      for (int64_t lane = 0; lane < num_lanes && lane < lanes; ++lane) {
        target[channel + lane] = totals[lane];
        target[num_channels + channel + lane] = products[lane];
      }
    }
  });
  for_each_block(x.num_samples * x.num_frames * num_channels, 2 * num_blocks, [&](int64_t index) {
    const int64_t channel = index % num_channels, plane = index / num_channels;
    float total = 0.0f, product = 0.0f;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const float* place = partial + (plane * num_blocks + block) * 2 * num_channels + channel;
      total += place[0];
      product += place[num_channels];
    }
    float* target = sums + ((plane / x.num_frames * num_channels + channel) * x.num_frames + plane % x.num_frames) * 2;
    target[0] = total;
    target[1] = product;
  });
}

template <class Element, bool has_silu>
void gradient_of_planes(const Clip& x, const Clip& grad, const float* affine, const float* terms, int64_t num_parts,
                        const Clip& grad_x) {
  const int64_t num_positions = num_positions_of(x);
  for_each_plane(x, [&](int64_t sample, int64_t channel, int64_t frame) {
    const Affine here = splat_affine(affine_at(x, affine, num_parts, sample, frame) + channel, x.num_channels);
    const float* pair = terms + (sample * num_parts + (num_parts > 1 ? frame : 0)) * 2 * x.num_channels + channel;
    const Vector slope = splat(pair[0]), level = splat(pair[x.num_channels]);
    const Element* x_place = place_in<Element>(x, sample, channel, frame, 0);
    const Element* grad_place = place_in<Element>(grad, sample, channel, frame, 0);
    Element* target = place_in<Element>(grad_x, sample, channel, frame, 0);
    for (int64_t i = 0; i < num_positions; i += num_lanes) {
      const int64_t lanes = num_positions - i;
      const Vector value = load_some(x_place + i, lanes);
      const Vector inner = inner_gradient<Element, has_silu>(value, load_some(grad_place + i, lanes), here);
      const Vector result = inner * here.scale + ((value - here.mean) * slope + level);
      lanes >= num_lanes ? store(target + i, result) : store(target + i, result, lanes);
    }
  });
}

template <class Element, bool has_silu>
void gradient_of_channels_last(const Clip& x, const Clip& grad, const float* affine, const float* terms,
                               int64_t num_parts, const Clip& grad_x) {
  const int64_t num_channels = x.num_channels;
  for_each_block(x.num_samples * x.num_frames * x.height, x.width * num_channels, [&](int64_t index) {
    const int64_t row = index % x.height, frame = index / x.height % x.num_frames;
    const int64_t sample = index / x.height / x.num_frames;
    const float* here = affine_at(x, affine, num_parts, sample, frame);
    const float* pairs = terms + (sample * num_parts + (num_parts > 1 ? frame : 0)) * 2 * num_channels;
    for (int64_t position = row * x.width; position < (row + 1) * x.width; ++position) {
      const Element* x_place = place_in<Element>(x, sample, 0, frame, position);
      const Element* grad_place = place_in<Element>(grad, sample, 0, frame, position);
      Element* target = place_in<Element>(grad_x, sample, 0, frame, position);
      for (int64_t channel = 0; channel < num_channels; channel += num_lanes) {
        const int64_t lanes = num_channels - channel;
        const Affine values = load_affine(here + channel, num_channels, lanes);
        const Vector slope = load_some(pairs + channel, lanes),
                     level = load_some(pairs + num_channels + channel, lanes);
        const Vector value = load_some(x_place + channel, lanes);
        const Vector inner = inner_gradient<Element, has_silu>(value, load_some(grad_place + channel, lanes), values);
        const Vector result = inner * values.scale + ((value - values.mean) * slope + level);
        lanes >= num_lanes ? store(target + channel, result) : store(target + channel, result, lanes);
      }
    }
  });
}

template <class Element, bool has_silu>
void run_sums(const Clip& x, const Clip& grad, const float* affine, int64_t num_parts, float* partial, float* sums) {
  if (x.channels_last) {
    sums_of_channels_last<Element, has_silu>(x, grad, affine, num_parts, partial, sums);
  } else {
    sums_of_planes<Element, has_silu>(x, grad, affine, num_parts, sums);
  }
}

template <class Element, bool has_silu>
void run_gradient(const Clip& x, const Clip& grad, const float* affine, const float* terms, int64_t num_parts,
                  const Clip& grad_x) {
  if (x.channels_last) {
    gradient_of_channels_last<Element, has_silu>(x, grad, affine, terms, num_parts, grad_x);
  } else {
    gradient_of_planes<Element, has_silu>(x, grad, affine, terms, num_parts, grad_x);
  }
}

}  // namespace

void gradient_sums(const Clip& x, const Clip& grad, const float* affine, int64_t num_parts, bool has_silu,
                   float* partial, float* sums) {
  if (x.is_bf16) {
    has_silu ? run_sums<BFloat16, true>(x, grad, affine, num_parts, partial, sums)
             : run_sums<BFloat16, false>(x, grad, affine, num_parts, partial, sums);
  } else {
    has_silu ? run_sums<float, true>(x, grad, affine, num_parts, partial, sums)
             : run_sums<float, false>(x, grad, affine, num_parts, partial, sums);
  }
}

void input_gradient(const Clip& x, const Clip& grad, const float* affine, const float* terms, int64_t num_parts,
                    bool has_silu, const Clip& grad_x) {
  if (x.is_bf16) {
    has_silu ? run_gradient<BFloat16, true>(x, grad, affine, terms, num_parts, grad_x)
             : run_gradient<BFloat16, false>(x, grad, affine, terms, num_parts, grad_x);
  } else {
    has_silu ? run_gradient<float, true>(x, grad, affine, terms, num_parts, grad_x)
             : run_gradient<float, false>(x, grad, affine, terms, num_parts, grad_x);
  }
}

}  // namespace opensora::OPENSORA_CAPABILITY
