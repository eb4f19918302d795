// The launches of pack_shards.cu on a CPU: the same plan, and the same work of every thread of every block.

#include <cstdint>

#include "../pack_shards_plan.h"

namespace {

using opensora::shards::Copy;
using opensora::shards::CopyPlan;

void run_launch(const CopyPlan& plan, bool is_packing) {
  opensora::shards::with_variant(plan, [&]<int kVectorBytes, typename Index>(const Copy<Index>& copy) {
    for (int64_t block = 0; block < plan.num_blocks(); ++block) {
      for (uint32_t thread = 0; thread < opensora::shards::kThreads; ++thread) {
        if (is_packing) {
          opensora::shards::copy_vectors<kVectorBytes, true>(copy, static_cast<uint32_t>(block), thread);
        } else {
          opensora::shards::copy_vectors<kVectorBytes, false>(copy, static_cast<uint32_t>(block), thread);
        }
      }
    }
  });
}

}  // namespace

// Addresses and strides (in elements) of `num_tensors` tensors with `num_axes` axes; `targets` of every shard, or null.
// `force_wide`: with the indices of huge tensors. Returns the bytes of a vector; 0: the strides need a copy first.
extern "C" int replay_copy(int is_packing, const int64_t* pointers, const int64_t* strides, const int64_t* sizes,
                           int64_t num_tensors, int64_t num_axes, int64_t dim, int64_t element_size, int64_t num_shards,
                           int64_t packed, const int64_t* targets, int force_wide) {
  int vector_bytes = 16;
  for (int64_t first = 0; first < num_tensors; first += opensora::shards::kMaxTensors) {
    opensora::shards::Tensors tensors{{}, {}, {sizes, sizes + num_axes}, dim, element_size};
    for (int64_t tensor = first; tensor < std::min(num_tensors, first + opensora::shards::kMaxTensors); ++tensor) {
      tensors.pointers.push_back(reinterpret_cast<char*>(pointers[tensor]));
      tensors.strides.emplace_back(strides + tensor * num_axes, strides + (tensor + 1) * num_axes);
    }
    std::optional<CopyPlan> plan = opensora::shards::plan_copy(tensors, num_shards);
    if (!plan) {
      return 0;
    }
    std::vector<char*> of_shards;
    for (int64_t shard = 0; targets != nullptr && shard < num_shards; ++shard) {
      of_shards.push_back(reinterpret_cast<char*>(targets[shard]));
    }
    opensora::shards::place_packed(*plan, reinterpret_cast<char*>(packed), of_shards, first, num_tensors);
    plan->is_wide = plan->is_wide || force_wide != 0;
    run_launch(*plan, is_packing != 0);
    vector_bytes = std::min(vector_bytes, plan->vector_bytes);
  }
  return vector_bytes;
}
