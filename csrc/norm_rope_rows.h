// RMSNorm and rotation of the heads of one token, and their gradients: what kernels of several operators share.
//
// Axes: L tokens, N heads, D head size, F = D/2 pairs.
#pragma once

#include "heads.h"
#include "rows.h"

namespace opensora::OPENSORA_CAPABILITY {

// Where a sample begins, in elements.
inline int64_t offset_of(const Heads& heads, int64_t sample) {
  int64_t offset = 0;
  for (int64_t axis = heads.num_axes - 1; axis >= 0; --axis) {
    offset += sample % heads.sizes[axis] * heads.strides[axis];
    sample /= heads.sizes[axis];
  }
  return offset;
}

template <class Element>
inline Element* sample_of(const Heads& heads, int64_t sample) {
  return static_cast<Element*>(heads.data) + offset_of(heads, sample);
}

// Fetches the row that lies `ahead` elements behind this one, to be read soon: tokens may lie pages apart, so that the
// CPU can't tell by itself what follows. Reading 30 rows of 72 in bf16 for each head: 8.7 GB/s, so 12.6 (2026-11-30).
template <class X>
inline void fetch_ahead(const X* row, int64_t ahead, int64_t head_size) {
  constexpr int64_t step = 64 / sizeof(X);
  for (int64_t i = 0; i < head_size + step - 1; i += step) {
    __builtin_prefetch(row + ahead + (i < head_size ? i : head_size - 1));
  }
}

// Cosines and sines in fp32, as `rotate` takes them: for interleaved pairs one for each element, with the sines of
// first elements negated; else one for each pair.
class Angles {
 public:
  Angles(const NormRope& form, int64_t num_tokens, int64_t head_size)
      : rows_(form.has_rope ? 2 * num_tokens : 0, form.is_interleaved ? head_size : head_size / 2) {
    const int64_t num_pairs = head_size / 2;
    for_each_block(form.has_rope ? 2 * num_tokens : 0, head_size, [&](int64_t row) {
      const int64_t start = row / 2 * num_pairs * (form.angles_are_narrow ? sizeof(BFloat16) : sizeof(float));
      const char* source = static_cast<const char*>(row % 2 ? form.sin : form.cos) + start;
      float* target = rows_[row];
      copy_row(target, source, form.angles_are_narrow, num_pairs);
      for (int64_t pair = form.is_interleaved ? num_pairs - 1 : -1; pair >= 0; --pair) {
        const float value = target[pair];
        target[2 * pair] = row % 2 ? -value : value;
        target[2 * pair + 1] = value;
      }
    });
  }

  const float* cos(int64_t token) const {
    return rows_[2 * token];
  }
  const float* sin(int64_t token) const {
    return rows_[2 * token + 1];
  }

 private:
  Rows rows_;
};

// Weights in fp32, rounded to the dtype of what they multiply; ones where there are none.
template <class X>
class Weight {
 public:
  Weight(const NormRope& form, int64_t size) : rows_(form.has_norm ? 1 : 0, size) {
    float* row = rows_[0];
    if (form.has_norm && form.weight != nullptr) {
      copy_row(row, form.weight, form.weight_is_narrow, size);
    }
    for (int64_t i = 0; form.has_norm && i < Rows::padded(size); i += num_lanes) {
      store(row + i, form.weight == nullptr ? splat(1.0f) : rounded_to<X>(load(row + i)));
    }
  }

  const float* operator()() const {
    return rows_[0];
  }

 private:
  Rows rows_;
};

// write(start, lanes, value) of read(start, lanes) turned by the angles, the sums not yet rounded; back turns by the
// negated angles.
template <bool back = false, class Read, class Write>
inline void rotate(const NormRope& form, int64_t head_size, const float* cos, const float* sin, const Read& read,
                   const Write& write) {
  const bool rounds = form.rounds_products && !back;
  const auto part = [&](Vector value, Vector factor) {
    const Vector turned = product(value, factor);
    return rounds ? rounded_to<BFloat16>(turned) : turned;
  };
  if (form.is_interleaved) {
    for_each_vector(head_size, [&](int64_t i, auto lanes) {
      const Vector value = read(i, lanes), wide_sin = load(sin + i, lanes);
      const Vector other = part(swapped_pairs(value), back ? -wide_sin : wide_sin);
      write(i, lanes, part(value, load(cos + i, lanes)) + other);
    });
    return;
  }
  const int64_t half = head_size / 2;
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Vector first = read(i, lanes), second = read(half + i, lanes);
    const Vector wide_cos = load(cos + i, lanes), row_sin = load(sin + i, lanes);
    const Vector wide_sin = back ? -row_sin : row_sin;
    write(i, lanes, part(first, wide_cos) - part(second, wide_sin));
    write(half + i, lanes, part(second, wide_cos) + part(first, wide_sin));
  });
}

// Heads of one token that share a mean: all of them, or one.
template <class X>
struct HeadGroup {
  const X* x;
  int64_t head_stride, num_heads, head_size;
  const float *weight, *cos, *sin;
  float* row;  // of the heads' elements; for the backward pass three times as many
};

// body(group, head) for the token's groups, whose first head it names. `group` describes all heads of the token.
template <class X, class Body>
inline void for_each_group(const NormRope& form, HeadGroup<X> group, const Body& body) {
  if (form.is_token) {
    body(group, int64_t{0});
    return;
  }
  const int64_t num_heads = group.num_heads;
  group.num_heads = 1;
  for (int64_t head = 0; head < num_heads; ++head) {
    body(group, head);
    group.x += group.head_stride;
  }
}

// 1 / sqrt(mean + eps) of the squares of a group.
template <class X, class Read>
inline Vector reciprocal_length(const NormRope& form, const HeadGroup<X>& group, const Read& read) {
  float squares = 0;
  for (int64_t head = 0; head < group.num_heads; ++head) {
    squares += sum_of_row(group.head_size, [&](int64_t i, auto lanes) {
      const Vector value = read(head, i, lanes);
      return value * value;
    });
  }
  return reciprocal_root_of(squares / static_cast<float>(group.num_heads * group.head_size) + form.eps);
}

// write(head, start, lanes, value) of the group's normalised and rotated heads, rounded where the reference rounds but
// for the last time.
template <class X, bool has_norm, bool has_rope, bool is_rope_first, class Write>
inline void norm_rope_group(const NormRope& form, const HeadGroup<X>& group, const Write& write) {
  constexpr bool is_turned_first = has_norm && has_rope && is_rope_first;
  const int64_t size = group.head_size;
  if constexpr (is_turned_first) {
    for (int64_t head = 0; head < group.num_heads; ++head) {
      const X* x = group.x + head * group.head_stride;
      float* row = group.row + head * size;
      rotate(
          form, size, group.cos, group.sin, [&](int64_t i, auto lanes) { return load(x + i, lanes); },
          [&](int64_t i, auto lanes, Vector value) { store(row + i, rounded_to<X>(value), lanes); });
    }
  }
  const auto read = [&](int64_t head, int64_t i, auto lanes) {
    if constexpr (is_turned_first) {
      return load(group.row + head * size + i, lanes);
    } else {
      return load(group.x + head * group.head_stride + i, lanes);
    }
  };
  Vector rstd{};
  if constexpr (has_norm) {
    rstd = reciprocal_length(form, group, read);
  }
  for (int64_t head = 0; head < group.num_heads; ++head) {
    const float* weight = group.weight + head * size;
    const auto normed = [&](int64_t i, auto lanes) {
      const Vector value = read(head, i, lanes);
      if constexpr (has_norm) {
        return rounded_to<X>(value * rstd) * load(weight + i, lanes);
      } else {
        return value;
      }
    };
    const auto write_head = [&](int64_t i, auto lanes, Vector value) { write(head, i, lanes, value); };
    if constexpr (has_rope && !is_turned_first) {
      rotate(
          form, size, group.cos, group.sin, [&](int64_t i, auto lanes) { return rounded_to<X>(normed(i, lanes)); },
          write_head);
    } else {
      for_each_vector(size, [&](int64_t i, auto lanes) { write_head(i, lanes, normed(i, lanes)); });
    }
  }
}

// Sums that gradients are added to; none where they are not wanted.
struct ParameterSums {
  float* weight = nullptr;               // of the group's heads
  float *cos = nullptr, *sin = nullptr;  // (D/2,), of this token
};

// To the sums g1 a + g2 b and g2 a - g1 b of the pairs (a, b) of x and (g1, g2) of grad.
inline void add_angle_gradients(const NormRope& form, int64_t head_size, const float* x, const float* grad,
                                const ParameterSums& sums) {
  const int64_t num_pairs = head_size / 2;
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const int64_t first = form.is_interleaved ? 2 * pair : pair;
    const int64_t second = form.is_interleaved ? first + 1 : first + num_pairs;
    sums.cos[pair] += grad[first] * x[first] + grad[second] * x[second];
    sums.sin[pair] += grad[second] * x[first] - grad[first] * x[second];
  }
}

template <class Lanes>
inline void add_to(float* target, Vector value, Lanes lanes) {
  store(target, load(target, lanes) + value, lanes);
}

// write(head, start, lanes, gradient of x) from read_grad(head, start, lanes), that of `norm_rope_group`'s results.
//
// With n = x rstd and y = w n: grad_x = rstd (g w - n mean(g w n)), grad_w = g n.
template <class X, bool has_norm, bool has_rope, bool is_rope_first, class ReadGrad, class Write>
inline void norm_rope_group_backward(const NormRope& form, const HeadGroup<X>& group, const ReadGrad& read_grad,
                                     const ParameterSums& sums, const Write& write) {
  constexpr bool is_turned_first = has_norm && has_rope && is_rope_first;
  const int64_t size = group.head_size, group_size = group.num_heads * size;
  float *values = group.row, *grads = values + group_size, *others = grads + group_size;
  for (int64_t head = 0; head < group.num_heads; ++head) {
    const X* x = group.x + head * group.head_stride;
    float *value_row = values + head * size, *grad_row = grads + head * size;
    const auto read_x = [&](int64_t i, auto lanes) { return load(x + i, lanes); };
    const auto read = [&](int64_t i, auto lanes) { return read_grad(head, i, lanes); };
    const auto write_value = [&](int64_t i, auto lanes, Vector value) {
      store(value_row + i, rounded_to<X>(value), lanes);
    };
    const auto write_grad = [&](int64_t i, auto lanes, Vector value) { store(grad_row + i, value, lanes); };
    if constexpr (is_turned_first) {
      rotate(form, size, group.cos, group.sin, read_x, write_value);
    } else if (has_norm || sums.cos != nullptr) {
      for_each_vector(size, [&](int64_t i, auto lanes) { write_value(i, lanes, read_x(i, lanes)); });
    }
    if constexpr (has_rope && !is_turned_first) {
      rotate<true>(form, size, group.cos, group.sin, read, write_grad);
    } else {
      for_each_vector(size, [&](int64_t i, auto lanes) { write_grad(i, lanes, read(i, lanes)); });
    }
  }
  Vector rstd{}, slope{};
  if constexpr (has_norm) {
    rstd = reciprocal_length(
        form, group, [&](int64_t head, int64_t i, auto lanes) { return load(values + head * size + i, lanes); });
    const float total = sum_of_row(group_size, [&](int64_t i, auto lanes) {  // waits for no root, unlike that of n
      return load(grads + i, lanes) * load(group.weight + i, lanes) * load(values + i, lanes);
    });
    slope = splat(total / static_cast<float>(group_size)) * rstd;
  }
  for (int64_t head = 0; head < group.num_heads; ++head) {
    const int64_t start = head * size;
    float *value_row = values + start, *grad_row = grads + start, *other_row = others + start;
    if (sums.cos != nullptr && !is_turned_first) {  // of what was turned, and of what came of it
      for_each_vector(size, [&](int64_t i, auto lanes) {
        if constexpr (has_norm) {
          const Vector normed = rounded_to<X>(load(value_row + i, lanes) * rstd);
          store(other_row + i, rounded_to<X>(normed * load(group.weight + start + i, lanes)), lanes);
        } else {
          store(other_row + i, load(value_row + i, lanes), lanes);
        }
      });
    }
    const auto gradient = [&](int64_t i, auto lanes) {
      const Vector grad = load(grad_row + i, lanes);
      if constexpr (has_norm) {
        const Vector normed = load(value_row + i, lanes) * rstd;
        if (sums.weight != nullptr) {
          add_to(sums.weight + start + i, grad * rounded_to<X>(normed), lanes);
        }
        return rstd * (grad * load(group.weight + start + i, lanes) - normed * slope);
      } else {
        return grad;
      }
    };
    const auto write_head = [&](int64_t i, auto lanes, Vector value) { write(head, i, lanes, value); };
    if constexpr (is_turned_first) {
      for_each_vector(size, [&](int64_t i, auto lanes) { store(grad_row + i, gradient(i, lanes), lanes); });
      rotate<true>(
          form, size, group.cos, group.sin, [&](int64_t i, auto lanes) { return load(grad_row + i, lanes); },
          write_head);
    } else {
      for_each_vector(size, [&](int64_t i, auto lanes) { write_head(i, lanes, gradient(i, lanes)); });
    }
    if (sums.cos != nullptr) {
      const X* x = group.x + head * group.head_stride;
      float *turned = is_turned_first ? value_row : other_row, *grad_turned = grad_row;
      for_each_vector(size, [&](int64_t i, auto lanes) {
        if constexpr (is_turned_first) {
          store(turned + i, load(x + i, lanes), lanes);
        } else {
          store(grad_turned + i, read_grad(head, i, lanes), lanes);
        }
      });
      add_angle_gradients(form, size, turned, grad_turned, sums);
    }
  }
}

}  // namespace opensora::OPENSORA_CAPABILITY
