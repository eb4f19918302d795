// Every index map of attention_maps.h against the hardware's rules, over all its arguments. Prints what failed.

#include "../attention_maps.h"

#include <cstdio>
#include <set>
#include <vector>

#include "hopper_model.h"

using namespace opensora::attention;
namespace model = opensora::model;

namespace {

int num_failures = 0;

void expect(bool holds, const char* what, int a = 0, int b = 0, int c = 0) {
  if (!holds && ++num_failures <= 20) {
    std::printf("%s: %d %d %d\n", what, a, b, c);
  }
}

// A matrix whose elements say where they stand; zero never stands for one.
std::vector<uint16_t> numbered(int num_rows, int num_columns) {
  std::vector<uint16_t> matrix(static_cast<size_t>(num_rows) * num_columns);
  for (size_t i = 0; i < matrix.size(); ++i) {
    matrix[i] = static_cast<uint16_t>(i + 1);
  }
  return matrix;
}

model::TensorMap map_of(const std::vector<uint16_t>& matrix, int num_rows, int num_columns, int box_columns) {
  return {matrix.data(), {num_columns, num_rows, 1, 1, 1}, {1, num_columns, 0, 0, 0}, box_columns, num_rows};
}

// The boxes of queries or keys as the kernel copies them; the bytes they fill.
template <int kHeadSize>
uint32_t copy_rows(model::SharedMemory& shared, uint32_t target, const std::vector<uint16_t>& matrix, int num_rows) {
  using T = Tile<kHeadSize>;
  uint32_t num_bytes = 0;
  for (int piece = 0; piece < T::kNumWide; ++piece) {
    num_bytes += model::copy_box(shared, target + piece * num_rows * kWideBytes,
                                 map_of(matrix, num_rows, kHeadSize, kWideColumns), {piece * kWideColumns, 0, 0, 0, 0});
  }
  if (T::kTailColumns > 0) {
    num_bytes +=
        model::copy_box(shared, target + T::kNumWide * num_rows * kWideBytes,
                        map_of(matrix, num_rows, kHeadSize, T::kTailColumns), {T::kNumWide * kWideColumns, 0, 0, 0, 0});
  }
  return num_bytes;
}

template <int kHeadSize>
void products_find_what_tma_put() {
  using T = Tile<kHeadSize>;
  model::SharedMemory shared(T::kBarriers, 0xee);
  const auto queries = numbered(T::kBlockQueries, kHeadSize), keys = numbered(kBlockKeys, kHeadSize);
  expect(copy_rows<kHeadSize>(shared, 0, queries, T::kBlockQueries) == T::kQueryBytes, "bytes of queries", kHeadSize);
  for (int stage = 0; stage < T::kNumStages; ++stage) {
    const uint32_t target = T::kKeys + stage * T::kKeyBytes, values = T::kValues + stage * T::kValueBytes;
    expect(copy_rows<kHeadSize>(shared, target, keys, kBlockKeys) == T::kKeyBytes, "bytes of keys", kHeadSize);
    uint32_t num_bytes = 0;
    for (int piece = 0; piece < T::kNumValuePieces; ++piece) {
      num_bytes +=
          model::copy_box(shared, values + piece * kBlockKeys * kWideBytes,
                          map_of(keys, kBlockKeys, kHeadSize, kWideColumns), {piece * kWideColumns, 0, 0, 0, 0});
    }
    expect(num_bytes == T::kValueBytes, "bytes of values", kHeadSize);
  }
  // Read after everything was written, so that parts that overlap are found.
  const auto element = [](const std::vector<uint16_t>& matrix, int row, int column) -> uint16_t {
    return column < kHeadSize ? matrix[static_cast<size_t>(row) * kHeadSize + column] : 0;
  };
  for (int step = 0; step < T::kNumSteps; ++step) {
    for (int k = 0; k < kProductDepth; ++k) {
      for (int row = 0; row < T::kBlockQueries; ++row) {
        const int first_row = row / kProductRows * kProductRows;
        const uint64_t descriptor = query_descriptor<kHeadSize>(0, first_row, step);
        const uint16_t found = model::load(shared, model::row_operand_address(descriptor, row - first_row, k));
        expect(found == element(queries, row, step * kProductDepth + k), "query", kHeadSize, row, step);
      }
      for (int row = 0; row < kBlockKeys * T::kNumStages; ++row) {
        const uint32_t tile = T::kKeys + row / kBlockKeys * T::kKeyBytes;
        const uint64_t descriptor = key_descriptor<kHeadSize>(tile, step);
        const uint16_t found = model::load(shared, model::row_operand_address(descriptor, row % kBlockKeys, k));
        expect(found == element(keys, row % kBlockKeys, step * kProductDepth + k), "key", kHeadSize, row, step);
      }
    }
  }
  for (int row = 0; row < kBlockKeys * T::kNumStages; ++row) {
    const uint32_t tile = T::kValues + row / kBlockKeys * T::kValueBytes;
    const uint64_t descriptor = value_descriptor(tile, row % kBlockKeys / kProductDepth);
    for (int column = 0; column < kHeadSize; ++column) {
      const uint32_t address = model::column_operand_address(descriptor, column, row % kProductDepth);
      expect(model::load(shared, address) == element(keys, row % kBlockKeys, column), "value", kHeadSize, row, column);
    }
  }
}

template <int kHeadSize>
void constants_fit() {
  using T = Tile<kHeadSize>;
  expect(T::kInner >= kHeadSize && T::kInner < kHeadSize + kProductDepth, "columns of scores", kHeadSize);
  expect(T::kTailColumns == 0 || T::kTailColumns == 16 || T::kTailColumns == 32, "columns of the tail", kHeadSize);
  expect(T::kNumStages >= 2, "values of one block are awaited while those of the last are held", T::kNumStages);
  const int num_registers = 128 * (T::kProducerRegisters + T::kNumConsumers * T::kConsumerRegisters);
  expect(num_registers <= 65536, "registers of a multiprocessor", kHeadSize, num_registers);
  std::set<uint32_t> offsets;
  for (int kind = 0; kind < 6; ++kind) {
    for (int stage = 0; stage < (kind < 2 ? 1 : T::kNumStages); ++stage) {
      const uint32_t offset = barrier_offset(static_cast<Barrier>(kind), stage);
      expect(offset % 8 == 0 && offset < 8u * T::kNumBarriers && offsets.insert(offset).second, "barrier", kind, stage);
    }
  }
  expect(static_cast<int>(offsets.size()) == T::kNumBarriers, "number of barriers", kHeadSize);
}

void registers_hold_what_the_hardware_says() {
  for (int thread = 0; thread < 128; ++thread) {
    for (int index = 0; index < kBlockKeys / 2; ++index) {
      const model::Element want = model::sum_element(thread, index);
      expect(sum_row(thread, index) == want.row, "row", thread, index);
      expect(sum_column(thread, index) == want.column, "column", thread, index);
    }
    for (int index = 0; index < kBlockKeys / 4; ++index) {
      for (int half = 0; half < 2; ++half) {
        const model::Element want = model::left_element(thread, index % 4, half);
        const model::Element have = model::sum_element(thread, first_score(index) + half);
        expect(have.row == want.row, "row of a weight", thread, index);
        expect(have.column == want.column + index / 4 * kProductDepth, "column of a weight", thread, index);
      }
    }
  }
}

void every_query_has_one_place() {
  for (int num_blocks = 1; num_blocks <= 3; ++num_blocks) {
    for (int num_heads = 1; num_heads <= 3; ++num_heads) {
      for (int num_inner = 1; num_inner <= 3; ++num_inner) {
        std::set<std::vector<int>> places;
        const int num_tiles = num_blocks * num_heads * num_inner * 2;
        for (int tile = 0; tile < num_tiles; ++tile) {
          const Place at = place(tile, num_blocks, num_heads, num_inner, 192);
          places.insert({at.o, at.p, at.head, at.first_query});
          const bool is_inside = at.o >= 0 && at.o < 2 && at.p >= 0 && at.p < num_inner && at.head >= 0 &&
                                 at.head < num_heads && at.first_query >= 0 && at.first_query < 192 * num_blocks;
          expect(is_inside && at.first_query % 192 == 0, "place", tile, num_blocks, num_heads);
          expect(at.sample == at.o * num_inner + at.p, "sample", tile, num_inner);
        }
        expect(static_cast<int>(places.size()) == num_tiles, "places", num_blocks, num_heads, num_inner);
      }
    }
  }
}

void results_fill_their_tensors() {
  const int num_samples = 3, num_queries = 5, num_heads = 2, head_size = 8;
  std::set<int64_t> rows, sums;
  for (int sample = 0; sample < num_samples; ++sample) {
    for (int head = 0; head < num_heads; ++head) {
      for (int query = 0; query < num_queries; ++query) {
        const Place at = {sample, 0, 0, head, 0};
        rows.insert(out_offset(at, query, num_queries, num_heads, head_size));
        sums.insert(lse_offset(at, query, num_queries, num_heads));
        expect(out_offset(at, query, num_queries, num_heads, head_size) ==
                   ((sample * num_queries + query) * num_heads + head) * head_size,
               "row of a result", sample, query, head);
      }
    }
  }
  const size_t num_rows = num_samples * num_queries * num_heads;
  expect(rows.size() == num_rows && *rows.rbegin() == static_cast<int64_t>(num_rows - 1) * head_size, "results");
  expect(sums.size() == num_rows && *sums.rbegin() == static_cast<int64_t>(num_rows) - 1, "sums");
  // beyond 2^31 elements
  expect(out_offset({100000, 0, 0, 0, 0}, 0, 3600, 16, 72) == 414720000000, "a large result");
}

void samples_have_their_own_keys() {
  for (int num_keys = 0; num_keys <= 9; ++num_keys) {
    const Keys all = keys_of(num_keys, nullptr, nullptr);
    expect(all.first == 0 && all.length == num_keys, "all keys", num_keys);
    for (int64_t length = 0; length <= 11; ++length) {
      const Keys padded = keys_of(num_keys, &length, nullptr);
      expect(padded.first == 0 && padded.length == (length < num_keys ? length : num_keys), "padded keys", num_keys,
             static_cast<int>(length));
      for (int64_t start = 0; start <= 11; ++start) {
        const int64_t end = start + length;
        const Keys packed = keys_of(num_keys, &length, &end);
        int number = 0;
        for (int key = 0; key < num_keys; ++key) {
          const bool is_its_own = key >= start && key < end;
          expect(is_its_own == (key >= packed.first && key < packed.first + packed.length), "packed key", key,
                 static_cast<int>(start), static_cast<int>(length));
          number += is_its_own;
        }
        expect(packed.length == number, "packed keys", num_keys, static_cast<int>(start), static_cast<int>(length));
      }
    }
  }
}

void blocks_cover_the_keys_and_no_block_is_empty() {
  for (int length = 0; length <= 3 * kBlockKeys + 1; ++length) {
    int number = 0;
    for (int block = 0; block < num_key_blocks(length); ++block) {
      const int left = keys_left(length, block);
      expect(left > 0, "a block without keys", length, block);
      number += left < kBlockKeys ? left : kBlockKeys;
    }
    expect(number == length, "keys of all blocks", length);
  }
}

void rings_count_phases() {
  for (int num_stages = 1; num_stages <= 4; ++num_stages) {
    Ring ring;
    for (int step = 0; step < 20; ++step) {
      expect(ring.stage == step % num_stages, "stage", num_stages, step);
      expect(ring.parity == static_cast<uint32_t>(step / num_stages % 2), "parity", num_stages, step);
      ring.advance(num_stages);
    }
  }
}

template <int kHeadSize>
void check() {
  constants_fit<kHeadSize>();
  products_find_what_tma_put<kHeadSize>();
}

}  // namespace

int main() {
  check<64>();
  check<72>();
  check<96>();
  check<128>();
  registers_hold_what_the_hardware_says();
  every_query_has_one_place();
  results_fill_their_tensors();
  samples_have_their_own_keys();
  blocks_cover_the_keys_and_no_block_is_empty();
  rings_count_phases();
  return num_failures == 0 ? 0 : 1;
}
