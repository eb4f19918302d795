// The index map of pack_shards, exhaustively at small sizes and at the edges of large ones.

#include "../pack_shards_maps.h"

#include <cstdio>
#include <random>
#include <vector>

namespace {

using namespace opensora::shards;

int failures = 0;

void expect(bool holds, const char* what, int64_t left, int64_t right) {
  if (!holds && failures++ < 10) {
    std::printf("%s: %lld and %lld\n", what, static_cast<long long>(left), static_cast<long long>(right));
  }
}

static_assert(divide<uint32_t>(2147483647u, divisor_of<uint32_t>(3)) == 715827882u);
static_assert(divide<uint64_t>(9223372036854775807u, divisor_of<uint64_t>(10)) == 922337203685477580u);

template <typename Index>
void check_divisor(Index divisor) {
  const Divisor<Index> by = divisor_of<Index>(static_cast<int64_t>(divisor));
  const Index largest = static_cast<Index>(~Index{0}) >> 1;
  const auto check = [&](Index n) {
    expect(divide(n, by) == n / divisor, "a quotient", static_cast<int64_t>(n), static_cast<int64_t>(divisor));
  };
  for (Index n = 0; n < 2048; ++n) {
    check(n);
  }
  for (Index times : {largest / divisor, largest / divisor / 2, largest / divisor / 3}) {
    const Index multiple = times * divisor;  // a wrong multiplier shows just below a multiple
    check(multiple);
    check(multiple == 0 ? 0 : multiple - 1);
    check(multiple == largest ? largest : multiple + 1);
  }
  check(largest);
}

void check_divisors() {
  std::mt19937_64 random(0);
  for (uint32_t divisor = 1; divisor < 5000; ++divisor) {
    check_divisor<uint32_t>(divisor);
    check_divisor<uint64_t>(divisor);
  }
  for (int sample = 0; sample < 5000; ++sample) {
    const uint64_t drawn = random() >> (1 + sample % 62);
    check_divisor<uint64_t>(drawn + (drawn == 0));
    const uint32_t narrow = static_cast<uint32_t>(random() >> (33 + sample % 30));
    check_divisor<uint32_t>(narrow + (narrow == 0));
  }
}

struct Sizes {
  int64_t a0, a1, m, j, c;  // c in vectors
};

template <typename Index>
Copy<Index> copy_of(const Sizes& sizes, int64_t num_shards) {
  Copy<Index> copy{};
  copy.shards = {sizes.m / num_shards, sizes.m % num_shards};
  copy.num_rows = sizes.a0 * sizes.a1;
  copy.row_vectors = sizes.j * sizes.c;
  copy.vectors = divisor_of<Index>(sizes.c);
  copy.columns = divisor_of<Index>(sizes.j);
  copy.own[0] = divisor_of<Index>(copy.shards.size > 0 ? copy.shards.size : 1);
  copy.own[1] = divisor_of<Index>(copy.shards.size + 1);
  copy.rows = divisor_of<Index>(sizes.a1);
  return copy;
}

// Every vector of every shard of every tensor: in the order of torch.tensor_split and reshape(-1), each packed vector
// once, and at the right place of a tensor whose axes lie in any order.
template <typename Index>
void check_every_vector(const Sizes& sizes, int64_t num_shards, int64_t num_tensors) {
  const Copy<Index> copy = copy_of<Index>(sizes, num_shards);
  const int64_t across = copy.num_rows * copy.row_vectors;
  const Strides strides{2 * sizes.a1, 2, sizes.a0 * sizes.a1 * 2, sizes.a0 * sizes.a1 * 2 * sizes.m};
  int64_t next_packed = 0;  // in order, so each once and without gaps
  int64_t next_m = 0;
  for (int64_t shard = 0; shard < num_shards; ++shard) {
    const int64_t start = shard_start(copy.shards, shard), size = shard_size(copy.shards, shard);
    expect(start == next_m, "where a shard starts", start, next_m);
    next_m += size;
    for (int64_t tensor = 0; tensor < num_tensors; ++tensor) {
      expect(packed_vectors(copy.shards, shard, tensor, num_tensors, across, false) == next_packed, "a part", shard,
             tensor);
      expect(packed_vectors(copy.shards, shard, tensor, num_tensors, across, true) == tensor * size * across,
             "a part in a target", shard, tensor);
      Index flat = 0;
      for (int64_t a0 = 0; a0 < sizes.a0; ++a0)
        for (int64_t a1 = 0; a1 < sizes.a1; ++a1)
          for (int64_t m = 0; m < size; ++m)
            for (int64_t j = 0; j < sizes.j; ++j)
              for (int64_t c = 0; c < sizes.c; ++c, ++flat) {
                const Place place = place_of(flat, copy, shard < copy.shards.num_longer);
                const bool holds = place.a0 == a0 && place.a1 == a1 && place.m == m && place.j == j && place.c == c;
                expect(holds, "a place", static_cast<int64_t>(flat), shard);
                const int64_t offset = a0 * strides.a0 + a1 * strides.a1 + (start + m) * strides.m + j * strides.j;
                expect(tensor_offset(place, strides, start, 2) == offset + 2 * c, "an offset", offset, shard);
              }
      next_packed += static_cast<int64_t>(flat);
    }
  }
  expect(next_m == sizes.m, "all of the axis", next_m, sizes.m);
  expect(next_packed == num_tensors * across * sizes.m, "all vectors", next_packed, across * sizes.m);
}

void check_small_sizes() {
  for (int64_t a0 = 1; a0 <= 3; ++a0)
    for (int64_t a1 = 1; a1 <= 3; ++a1)
      for (int64_t m = 1; m <= 9; ++m)
        for (int64_t j = 1; j <= 3; ++j)
          for (int64_t c = 1; c <= 5; c += 2)
            for (int64_t num_shards = 1; num_shards <= 9; ++num_shards) {
              check_every_vector<uint32_t>({a0, a1, m, j, c}, num_shards, 1 + (m + c) % 3);
              check_every_vector<uint64_t>({a0, a1, m, j, c}, num_shards, 1 + (m + c) % 3);
            }
}

// Tensors beyond 2^31 elements: samples against the formula in wider numbers.
void check_large_sizes() {
  std::mt19937_64 random(1);
  const Sizes sizes{3, 1000003, 70001, 2, 9};
  const Copy<uint64_t> copy = copy_of<uint64_t>(sizes, 7);
  const Strides strides{sizes.a1 * sizes.m * 18 * 16, sizes.m * 18 * 16, 18 * 16, 9 * 16};
  const int64_t across = copy.num_rows * copy.row_vectors;
  for (int sample = 0; sample < 20000; ++sample) {
    const int64_t shard = sample % 7, size = shard_size(copy.shards, shard);
    const int64_t flat = static_cast<int64_t>(random() % static_cast<uint64_t>(across * size));
    const Place place = place_of<uint64_t>(static_cast<uint64_t>(flat), copy, shard < copy.shards.num_longer);
    const int64_t row = place.a0 * sizes.a1 + place.a1;
    const int64_t back = ((row * size + place.m) * sizes.j + place.j) * sizes.c + place.c;
    expect(back == flat, "a large place", back, flat);
    const int64_t start = shard_start(copy.shards, shard);
    const __int128 offset = (static_cast<__int128>(row) * sizes.m + start + place.m) * 18 + place.j * 9 + place.c;
    expect(tensor_offset(place, strides, start, 16) == static_cast<int64_t>(offset * 16), "a large offset", flat,
           shard);
  }
}

}  // namespace

int main() {
  check_divisors();
  check_small_sizes();
  check_large_sizes();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
