// Loops over blocks of work, shared between torch's threads.
//
// What one block computes must not depend on how blocks are shared out: kernels reduce within a block, in a fixed
// order, and merge blocks in another fixed order afterwards. Results are then the same with any number of threads.
#pragma once

#include <cstdint>

#ifndef OPENSORA_CAPABILITY
#define OPENSORA_CAPABILITY generic
#endif

namespace opensora {

// Elements that one thread should at least get: below that, waking another one (about 5 us) costs more than it saves.
inline constexpr int64_t grain_elements = 32768;

// body(begin, end, context) for parts of [0, num_blocks), by torch's threads; at least `grain` blocks each.
void run_in_parallel(int64_t num_blocks, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                     const void* context);

namespace OPENSORA_CAPABILITY {

// body(block) for every block in [0, num_blocks), of about `block_elements` elements each.
template <class Body>
inline void for_each_block(int64_t num_blocks, int64_t block_elements, const Body& body) {
  const int64_t grain =
      block_elements < grain_elements ? grain_elements / (block_elements > 0 ? block_elements : 1) : 1;
  auto run = [](int64_t begin, int64_t end, const void* context) {
    for (int64_t block = begin; block < end; ++block) {
      (*static_cast<const Body*>(context))(block);
    }
  };
  run_in_parallel(num_blocks, grain, run, &body);
}

}  // namespace OPENSORA_CAPABILITY
}  // namespace opensora
