// From shapes and strides to the launches of pack_shards and unpack_shards; host code without torch, so that the replay
// on a CPU goes the same way as a launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "pack_shards_maps.h"

namespace opensora::shards {

struct Axis {
  int64_t size;
  std::vector<int64_t> strides;  // of each tensor, in elements
};

// What one launch moves. Sizes are those of every tensor, strides each one's own.
struct CopyPlan {
  int64_t a0 = 1, a1 = 1, m = 1, j = 1;
  int64_t c = 1;  // bytes
  int vector_bytes = 1;
  bool is_wide = false;  // whether a shard has too many vectors for 32-bit indices
  Shards shards{};
  int32_t num_shards = 0;
  int64_t first_tensor = 0, total_tensors = 0;
  std::vector<char*> tensors;
  std::vector<Strides> strides;
  char* packed = nullptr;
  std::vector<char*> targets;  // of each shard, or none: all go into `packed`

  int64_t widest() const {  // vectors of the longest shard
    return (shards.size + (shards.num_longer > 0 ? 1 : 0)) * a0 * a1 * j * (c / vector_bytes);
  }
  int64_t num_blocks() const {
    const int64_t chunks = (widest() + kVectorsPerBlock - 1) / kVectorsPerBlock;
    return chunks * num_shards * static_cast<int64_t>(tensors.size());
  }
};

// Axes that lie behind one another in every tensor as one.
inline std::vector<Axis> merged(const std::vector<Axis>& axes) {
  std::vector<Axis> found;
  for (const Axis& axis : axes) {
    if (axis.size == 1) {
      continue;
    }
    bool follows = !found.empty();
    for (size_t tensor = 0; follows && tensor < axis.strides.size(); ++tensor) {
      follows = found.back().strides[tensor] == axis.strides[tensor] * axis.size;
    }
    if (follows) {
      found.back() = {found.back().size * axis.size, axis.strides};
    } else {
      found.push_back(axis);
    }
  }
  return found;
}

struct Tensors {  // of one shape; none of the sizes is 0
  std::vector<char*> pointers;
  std::vector<std::vector<int64_t>> strides;
  std::vector<int64_t> sizes;
  int64_t dim;
  int64_t element_size;
};

// The widest vector that divides every address and every run of bytes.
inline int vector_bytes_of(const CopyPlan& plan) {
  uint64_t all = static_cast<uint64_t>(plan.c) | reinterpret_cast<uintptr_t>(plan.packed);
  for (const char* pointer : plan.targets) {
    all |= reinterpret_cast<uintptr_t>(pointer);
  }
  for (size_t tensor = 0; tensor < plan.tensors.size(); ++tensor) {
    const Strides& strides = plan.strides[tensor];
    all |= reinterpret_cast<uintptr_t>(plan.tensors[tensor]) | static_cast<uint64_t>(strides.a0 | strides.a1) |
           static_cast<uint64_t>(strides.m | strides.j);
  }
  int bytes = 16;
  while (all % bytes != 0) {
    bytes /= 2;
  }
  return bytes;
}

// The launch for at most kMaxTensors tensors, or nothing where their strides need more axes than a copy has.
inline std::optional<CopyPlan> plan_copy(const Tensors& tensors, int64_t num_shards) {
  std::vector<Axis> axes;
  for (size_t axis = 0; axis < tensors.sizes.size(); ++axis) {
    std::vector<int64_t> strides;
    for (const std::vector<int64_t>& of_tensor : tensors.strides) {
      strides.push_back(of_tensor[axis]);
    }
    axes.push_back({tensors.sizes[axis], strides});
  }
  const Axis cut = axes[tensors.dim];
  const std::vector<Axis> before = merged({axes.begin(), axes.begin() + tensors.dim});
  std::vector<Axis> after = merged({axes.begin() + tensors.dim + 1, axes.end()});
  CopyPlan plan;
  plan.c = tensors.element_size;
  const auto is_dense = [](const Axis& axis) {
    return std::all_of(axis.strides.begin(), axis.strides.end(), [](int64_t stride) { return stride == 1; });
  };
  if (!after.empty() && is_dense(after.back())) {
    plan.c *= after.back().size;
    after.pop_back();
  }
  if (before.size() > 2 || after.size() > 1) {
    return std::nullopt;
  }
  plan.m = cut.size;
  plan.j = after.empty() ? 1 : after[0].size;
  plan.a1 = before.empty() ? 1 : before.back().size;
  plan.a0 = before.size() < 2 ? 1 : before[0].size;
  plan.tensors = tensors.pointers;
  for (size_t tensor = 0; tensor < tensors.pointers.size(); ++tensor) {
    const auto bytes = [&](bool is_there, const Axis* axis) {  // an axis of size 1 has no say in the alignment
      return is_there ? axis->strides[tensor] * tensors.element_size : 0;
    };
    plan.strides.push_back({bytes(before.size() > 1, before.data()), bytes(!before.empty(), &before.back()),
                            bytes(plan.m > 1, &cut), bytes(!after.empty(), after.data())});
  }
  plan.shards = {plan.m / num_shards, plan.m % num_shards};
  plan.num_shards = static_cast<int32_t>(std::min(num_shards, plan.m));  // the others, the last ones, are empty
  return plan;
}

// Where the copy goes to or comes from, which decides on vectors and indices.
inline void place_packed(CopyPlan& plan, char* packed, const std::vector<char*>& targets, int64_t first_tensor,
                         int64_t total_tensors) {
  plan.packed = packed;
  plan.targets = targets;
  plan.first_tensor = first_tensor;
  plan.total_tensors = total_tensors;
  plan.vector_bytes = vector_bytes_of(plan);
  plan.is_wide = plan.widest() >= (int64_t{1} << 31);
}

template <typename Index>
Copy<Index> copy_of(const CopyPlan& plan) {
  Copy<Index> copy{};
  for (size_t tensor = 0; tensor < plan.tensors.size(); ++tensor) {
    copy.tensors[tensor] = plan.tensors[tensor];
    copy.strides[tensor] = plan.strides[tensor];
  }
  std::copy(plan.targets.begin(), plan.targets.end(), copy.targets);
  copy.packed = plan.packed;
  copy.has_targets = !plan.targets.empty();
  copy.num_shards = plan.num_shards;
  copy.num_tensors = static_cast<int32_t>(plan.tensors.size());
  copy.first_tensor = plan.first_tensor;
  copy.total_tensors = plan.total_tensors;
  copy.num_rows = plan.a0 * plan.a1;
  copy.row_vectors = plan.j * (plan.c / plan.vector_bytes);
  copy.shards = plan.shards;
  copy.vectors = divisor_of<Index>(plan.c / plan.vector_bytes);
  copy.columns = divisor_of<Index>(plan.j);
  copy.own[0] = divisor_of<Index>(std::max<int64_t>(plan.shards.size, 1));
  copy.own[1] = divisor_of<Index>(plan.shards.size + 1);
  copy.rows = divisor_of<Index>(plan.a1);
  return copy;
}

// Calls run.template operator()<vector bytes, Index>(copy) with the plan's variant.
template <typename Index, typename Run>
void with_vector(const CopyPlan& plan, Run&& run) {
  const Copy<Index> copy = copy_of<Index>(plan);
  switch (plan.vector_bytes) {
    case 16:
      return run.template operator()<16>(copy);
    case 8:
      return run.template operator()<8>(copy);
    case 4:
      return run.template operator()<4>(copy);
    case 2:
      return run.template operator()<2>(copy);
    default:
      return run.template operator()<1>(copy);
  }
}

template <typename Run>
void with_variant(const CopyPlan& plan, Run&& run) {
  if (plan.is_wide) {
    with_vector<uint64_t>(plan, run);
  } else {
    with_vector<uint32_t>(plan, run);
  }
}

}  // namespace opensora::shards
