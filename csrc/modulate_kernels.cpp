#include "modulate.h"
#include "rows.h"

namespace opensora::OPENSORA_CAPABILITY {

namespace {

template <class Element>
inline Element* row_of(const Tokens& tokens, int64_t sample, int64_t token) {
  return static_cast<Element*>(tokens.data) + sample * tokens.sample_stride + token * tokens.token_stride;
}

// The tables of the frame that a thread is in, in fp32 and rounded as the reference rounds them.
class FrameTables {
 public:
  explicit FrameTables(const ModulateCall& call) : call_(call), rows_(num_tables, call.num_channels) {}

  const float* gate() const {
    return rows_[0];
  }
  const float* shift() const {
    return rows_[1];
  }
  const float* one_plus_scale() const {
    return rows_[2];
  }

  // Returns which of the pairs of tables the token's frame takes.
  int at(int64_t sample, int64_t token) {
    const int64_t num_sites = call_.num_tokens / call_.num_frames;
    const bool* mask = call_.frame_mask;
    const int choice = mask == nullptr || mask[sample * call_.num_frames + token / num_sites] ? 0 : 1;
    if (sample != sample_ || choice != choice_) {
      sample_ = sample;
      choice_ = choice;
      read();
    }
    return choice;
  }

 private:
  void read() {
    if (call_.has_gate) {
      copy(rows_[0], call_.gate[choice_]);
    }
    if (!call_.modulates) {
      return;
    }
    copy(rows_[1], call_.shift[choice_]);
    copy(rows_[2], call_.scale[choice_]);
    float* scale = rows_[2];
    for_each_vector(call_.num_channels, [&](int64_t i, auto lanes) {
      const Vector wide = 1.0f + load(scale + i, lanes);
      store(scale + i, call_.rounds_scale ? rounded_to<BFloat16>(wide) : wide, lanes);
    });
  }

  void copy(float* target, const Table& table) {
    const int64_t start = sample_ * table.stride * (table.is_narrow ? sizeof(BFloat16) : sizeof(float));
    copy_row(target, static_cast<const char*>(table.data) + start, table.is_narrow, call_.num_channels);
  }

  const ModulateCall& call_;
  Rows rows_;
  int64_t sample_ = -1;
  int choice_ = 0;
};

struct Statistics {
  Vector mean, rstd;
};

template <class Source>
inline Statistics layer_norm(int64_t num_channels, float eps, const Source& source) {
  const float inverse = 1.0f / static_cast<float>(num_channels);
  const Vector mean = splat(sum_of_row(num_channels, source) * inverse);
  const float variance = inverse * sum_of_row(num_channels, [&](int64_t i, auto lanes) {
                           const Vector centred = source(i, lanes) - mean;
                           return centred * centred;
                         });
  return {mean, reciprocal_root_of(variance + eps)};
}

// Not yet rounded: storing rounds.
inline Vector gated_sum(const ModulateCall& call, Vector x, Vector y, Vector gate) {
  const Vector gated = product(gate, y);
  return x + (call.rounds_gated ? rounded_to<BFloat16>(gated) : gated);
}

template <class X, class Y, bool has_gate, bool modulates, bool normalizes>
void forward_range(const ModulateCall& call, int64_t begin, int64_t end) {
  const int64_t num_channels = call.num_channels;
  FrameTables tables(call);
  const Rows total_row(1, num_channels);
  float* total = total_row[0];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / call.num_tokens, token = row % call.num_tokens;
    tables.at(sample, token);
    const X* x = row_of<const X>(call.x, sample, token);
    if constexpr (has_gate) {
      const Y* y = row_of<const Y>(call.y, sample, token);
      X* total_out = row_of<X>(call.total, sample, token);
      for_each_vector(num_channels, [&](int64_t i, auto lanes) {
        const Vector value = gated_sum(call, load(x + i, lanes), load(y + i, lanes), load(tables.gate() + i, lanes));
        store(total_out + i, value, lanes);
        if constexpr (modulates) {
          store(total + i, rounded_to<X>(value), lanes);
        }
      });
    }
    if constexpr (modulates) {
      const auto source = [&](int64_t i, auto lanes) {
        if constexpr (has_gate) {
          return load(total + i, lanes);
        } else {
          return load(x + i, lanes);
        }
      };
      Statistics statistics{};
      if constexpr (normalizes) {
        statistics = layer_norm(num_channels, call.eps, source);
      }
      X* out = row_of<X>(call.out, sample, token);
      for_each_vector(num_channels, [&](int64_t i, auto lanes) {
        Vector value = source(i, lanes);
        if constexpr (normalizes) {
          value = rounded_to<X>((value - statistics.mean) * statistics.rstd);
        }
        value = product(value, load(tables.one_plus_scale() + i, lanes));
        value = call.rounds_modulated ? rounded_to<BFloat16>(value) : value;
        store(out + i, value + load(tables.shift() + i, lanes), lanes);
      });
    }
  }
}

template <class Lanes>
inline void add_to(float* target, Vector value, Lanes lanes) {
  store(target, load(target, lanes) + value, lanes);
}

// The sum's gradient g, that through the modulation included: x gets g, y gets g * gate. Into the block's sums of the
// choice go g * y for gate, and those of the modulation's shift and scale.
template <class X, class Y, bool has_gate, bool modulates, bool normalizes>
void backward_block(const ModulateCall& call, int64_t block) {
  const int64_t num_channels = call.num_channels;
  const int64_t blocks_of_sample = call.num_blocks / call.num_samples;
  const int64_t sample = block / blocks_of_sample, first = block % blocks_of_sample * call.block_size;
  const int64_t last = first + call.block_size < call.num_tokens ? first + call.block_size : call.num_tokens;
  float* sums = call.partial + block * 2 * num_tables * num_channels;
  if (call.wants_tables) {
    std::memset(sums, 0, sizeof(float) * 2 * num_tables * num_channels);
  }
  FrameTables tables(call);
  const Rows total_row(1, num_channels);
  float* total = total_row[0];
  const float inverse = 1.0f / static_cast<float>(num_channels);
  for (int64_t token = first; token < last; ++token) {
    const int choice = tables.at(sample, token);
    float* sum_gate = sums + choice * num_tables * num_channels;
    float* sum_shift = sum_gate + num_channels;
    float* sum_scale = sum_shift + num_channels;
    const X* x = row_of<const X>(call.x, sample, token);
    const Y* y = has_gate ? row_of<const Y>(call.y, sample, token) : nullptr;
    const float *gate = tables.gate(), *one_plus_scale = tables.one_plus_scale();
    if constexpr (has_gate && modulates) {  // the sum again: keeping it would read as many bytes as x
      for_each_vector(num_channels, [&](int64_t i, auto lanes) {
        const Vector value = gated_sum(call, load(x + i, lanes), load(y + i, lanes), load(gate + i, lanes));
        store(total + i, rounded_to<X>(value), lanes);
      });
    }
    const auto source = [&](int64_t i, auto lanes) {
      if constexpr (has_gate) {
        return load(total + i, lanes);
      } else {
        return load(x + i, lanes);
      }
    };
    const X* grad_out = modulates ? row_of<const X>(call.grad_out, sample, token) : nullptr;
    Statistics statistics{};
    Vector mean{}, slope{};
    if constexpr (modulates && normalizes) {
      statistics = layer_norm(num_channels, call.eps, source);
      mean = splat(inverse * sum_of_row(num_channels, [&](int64_t i, auto lanes) {
                     return load(grad_out + i, lanes) * load(one_plus_scale + i, lanes);
                   }));
      slope = splat(inverse * sum_of_row(num_channels, [&](int64_t i, auto lanes) {
                      const Vector normed = (source(i, lanes) - statistics.mean) * statistics.rstd;
                      return load(grad_out + i, lanes) * load(one_plus_scale + i, lanes) * normed;
                    }));
    }
    const X* grad_total = call.grad_total.data == nullptr ? nullptr : row_of<const X>(call.grad_total, sample, token);
    X* grad_x = call.grad_x.data == nullptr ? nullptr : row_of<X>(call.grad_x, sample, token);
    Y* grad_y = call.grad_y.data == nullptr ? nullptr : row_of<Y>(call.grad_y, sample, token);
    for_each_vector(num_channels, [&](int64_t i, auto lanes) {
      Vector grad = grad_total == nullptr ? Vector{} : load(grad_total + i, lanes);
      if constexpr (modulates) {
        const Vector of_out = load(grad_out + i, lanes);
        Vector of_source = of_out * load(one_plus_scale + i, lanes);
        Vector normed = source(i, lanes);
        if constexpr (normalizes) {
          normed = (normed - statistics.mean) * statistics.rstd;
          of_source = (of_source - mean - normed * slope) * statistics.rstd;
        }
        grad += of_source;
        if (call.wants_tables) {
          add_to(sum_shift + i, of_out, lanes);
          add_to(sum_scale + i, of_out * rounded_to<X>(normed), lanes);  // what the forward pass multiplied
        }
      }
      if (grad_x != nullptr) {
        store(grad_x + i, grad, lanes);
      }
      if constexpr (has_gate) {
        if (grad_y != nullptr) {
          store(grad_y + i, grad * load(gate + i, lanes), lanes);
        }
        if (call.wants_tables) {
          add_to(sum_gate + i, grad * load(y + i, lanes), lanes);
        }
      }
    });
  }
}

// Sums of the blocks of each sample, in their order.
void sum_blocks(const ModulateCall& call) {
  const int64_t num_channels = call.num_channels, blocks_of_sample = call.num_blocks / call.num_samples;
  const int64_t num_choices = call.frame_mask == nullptr ? 1 : 2;
  for_each_block(num_tables * 2 * call.num_samples, blocks_of_sample * num_channels, [&](int64_t row) {
    const int64_t table = row / (2 * call.num_samples), choice = row / call.num_samples % 2;
    if (choice >= num_choices || (table == 0 ? !call.has_gate : !call.modulates)) {
      return;
    }
    float* target = call.grad_tables + row * num_channels;
    const int64_t first_block = row % call.num_samples * blocks_of_sample;
    const float* sums = call.partial + ((first_block * 2 + choice) * num_tables + table) * num_channels;
    for_each_vector(num_channels, [&](int64_t i, auto lanes) {
      Vector total{};
      for (int64_t block = 0; block < blocks_of_sample; ++block) {
        total += load(sums + block * 2 * num_tables * num_channels + i, lanes);
      }
      store(target + i, total, lanes);
    });
  });
}

// run.operator()<X, Y, has_gate, modulates, normalizes>() for the call's.
template <class X, class Run>
inline void with_variant(const ModulateCall& call, const Run& run) {
  if (!call.has_gate) {
    call.normalizes ? run.template operator()<X, X, false, true, true>()
                    : run.template operator()<X, X, false, true, false>();
  } else if (call.y.is_narrow) {
    call.modulates ? run.template operator()<X, BFloat16, true, true, true>()
                   : run.template operator()<X, BFloat16, true, false, false>();
  } else {
    call.modulates ? run.template operator()<X, float, true, true, true>()
                   : run.template operator()<X, float, true, false, false>();
  }
}

template <class Run>
inline void with_types(const ModulateCall& call, const Run& run) {
  call.x.is_narrow ? with_variant<BFloat16>(call, run) : with_variant<float>(call, run);
}

}  // namespace

void modulate_forward(const ModulateCall& call) {
  with_types(call, [&]<class X, class Y, bool has_gate, bool modulates, bool normalizes>() {
    for_each_range(call.num_samples * call.num_tokens, call.num_channels, [&](int64_t begin, int64_t end) {
      forward_range<X, Y, has_gate, modulates, normalizes>(call, begin, end);
    });
  });
}

void modulate_backward(const ModulateCall& call) {
  with_types(call, [&]<class X, class Y, bool has_gate, bool modulates, bool normalizes>() {
    for_each_block(call.num_blocks, call.block_size * call.num_channels,
                   [&](int64_t block) { backward_block<X, Y, has_gate, modulates, normalizes>(call, block); });
  });
  if (call.wants_tables) {
    sum_blocks(call);
  }
}

}  // namespace opensora::OPENSORA_CAPABILITY
