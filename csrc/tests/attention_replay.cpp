// attention_sm90a.cuh on the host: the same loops over the same maps, with TMA, barriers, wgmma and registers by
// hopper_model.h. Products read shared memory when they are waited for, and copies land as early or as late as they
// may, so that a stage that is left or taken too early gives wrong results, and a phase that never ends is found.
// Loaded by the tests of attention.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <vector>

#include "../attention_maps.h"
#include "hopper_model.h"
#include "replay.h"

using namespace opensora::attention;
namespace model = opensora::model;
using model::Role, model::Wait, model::rounded, model::widened;

namespace {

struct Problem {
  model::TensorMap q, k, v;  // boxes are set for each copy
  const int64_t *lengths, *ends;
  uint16_t* out;
  float* lse;
  int num_tiles, num_blocks, num_heads, num_inner, num_queries, num_keys;
  float scale_log2;
  bool is_bfloat16;
  int num_programs;
};

// Which role goes on where several can, and whether a copy lands a step after it began or when no role can go on.
struct Schedule {
  bool consumers_first, copies_at_once;
};

template <int kHeadSize>
struct Program {
  using T = Tile<kHeadSize>;

  const Problem& problem;
  int index;
  model::SharedMemory shared;
  std::vector<model::Barrier> barriers;
  std::deque<std::function<void()>> copies;  // under way

  Program(const Problem& given, int number)
      : problem(given), index(number), shared(T::kBarriers, 0xff), barriers(T::kNumBarriers) {
    const int num_warps = 4 * T::kNumConsumers;
    barrier(Barrier::kQueriesFull).init(1);
    barrier(Barrier::kQueriesEmpty).init(num_warps);
    for (int stage = 0; stage < T::kNumStages; ++stage) {
      barrier(Barrier::kKeysFull, stage).init(1);
      barrier(Barrier::kKeysEmpty, stage).init(num_warps);
      barrier(Barrier::kValuesFull, stage).init(1);
      barrier(Barrier::kValuesEmpty, stage).init(num_warps);
    }
  }

  model::Barrier& barrier(Barrier kind, int stage = 0) {
    return barriers[barrier_offset(kind, stage) / 8];
  }

  Place place_of(int tile) const {
    return place(tile, problem.num_blocks, problem.num_heads, problem.num_inner, T::kBlockQueries);
  }

  Keys keys_at(const Place& at) const {
    return keys_of(problem.num_keys, problem.lengths ? problem.lengths + at.sample : nullptr,
                   problem.ends ? problem.ends + at.sample : nullptr);
  }

  void copy(uint32_t target, model::TensorMap map, int columns, int rows, model::Barrier& full, std::array<int, 5> at) {
    map.columns = columns;
    map.rows = rows;
    copies.push_back([this, target, map, &full, at] {
      full.land(model::copy_box(shared, target, map, {at[0], at[1], at[2], at[3], at[4]}));
    });
  }

  void copy_rows(uint32_t target, const model::TensorMap& map, model::Barrier& full, int num_rows, int row, int head,
                 int p, int o) {
    for (int piece = 0; piece < T::kNumWide; ++piece) {
      copy(target + piece * num_rows * kWideBytes, map, kWideColumns, num_rows, full,
           {piece * kWideColumns, row, head, p, o});
    }
    if (T::kTailColumns > 0) {
      copy(target + T::kNumWide * num_rows * kWideBytes, map, T::kTailColumns, num_rows, full,
           {T::kNumWide * kWideColumns, row, head, p, o});
    }
  }

  Role produce() {
    Ring ring, rounds;
    for (int tile = index; tile < problem.num_tiles; tile += problem.num_programs) {
      const Place at = place_of(tile);
      const Keys keys = keys_at(at);
      const int num_blocks = num_key_blocks(keys.length);
      if (num_blocks == 0) {
        continue;
      }
      const int o = problem.ends ? 0 : at.o, p = problem.ends ? 0 : at.p;
      co_await Wait{&barrier(Barrier::kQueriesEmpty), rounds.parity ^ 1};
      barrier(Barrier::kQueriesFull).expect(T::kQueryBytes);
      copy_rows(0, problem.q, barrier(Barrier::kQueriesFull), T::kBlockQueries, at.first_query, at.head, at.p, at.o);
      rounds.advance(1);
      for (int block = 0; block < num_blocks; ++block) {
        const int first_key = keys.first + block * kBlockKeys;
        co_await Wait{&barrier(Barrier::kKeysEmpty, ring.stage), ring.parity ^ 1};
        barrier(Barrier::kKeysFull, ring.stage).expect(T::kKeyBytes);
        copy_rows(T::kKeys + ring.stage * T::kKeyBytes, problem.k, barrier(Barrier::kKeysFull, ring.stage), kBlockKeys,
                  first_key, at.head, p, o);
        co_await Wait{&barrier(Barrier::kValuesEmpty, ring.stage), ring.parity ^ 1};
        barrier(Barrier::kValuesFull, ring.stage).expect(T::kValueBytes);
        for (int piece = 0; piece < T::kNumValuePieces; ++piece) {
          copy(T::kValues + ring.stage * T::kValueBytes + piece * kBlockKeys * kWideBytes, problem.v, kWideColumns,
               kBlockKeys, barrier(Barrier::kValuesFull, ring.stage), {piece * kWideColumns, first_key, at.head, p, o});
        }
        ring.advance(T::kNumStages);
      }
    }
  }

  // The registers of a warpgroup's threads.
  struct Registers {
    float scores[128][kBlockKeys / 2];
    uint32_t weights[128][kBlockKeys / 4];
    float sums[128][kHeadSize / 2];
    float highest[128][2], total[128][2], rescale[128][2];
  };

  float element(uint32_t address) const {
    return widened(model::load(shared, address), problem.is_bfloat16);
  }

  void multiply_scores(Registers& registers, uint32_t keys, int first_row) const {
    static thread_local float left[kProductRows][T::kInner], right[kBlockKeys][T::kInner];
    for (int step = 0; step < T::kNumSteps; ++step) {
      const uint64_t a = query_descriptor<kHeadSize>(0, first_row, step), b = key_descriptor<kHeadSize>(keys, step);
      for (int k = 0; k < kProductDepth; ++k) {
        for (int row = 0; row < kProductRows; ++row) {
          left[row][step * kProductDepth + k] = element(model::row_operand_address(a, row, k));
        }
        for (int row = 0; row < kBlockKeys; ++row) {
          right[row][step * kProductDepth + k] = element(model::row_operand_address(b, row, k));
        }
      }
    }
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < kBlockKeys / 2; ++i) {
        const model::Element at = model::sum_element(thread, i);
        float sum = 0.0f;
        for (int k = 0; k < T::kInner; ++k) {
          sum += left[at.row][k] * right[at.column][k];
        }
        registers.scores[thread][i] = sum;
      }
    }
  }

  void add_values(Registers& registers, uint32_t values) const {
    static thread_local float left[kProductRows][kBlockKeys], right[kHeadSize][kBlockKeys];
    for (int step = 0; step < kBlockKeys / kProductDepth; ++step) {
      const uint64_t b = value_descriptor(values, step);
      for (int k = 0; k < kProductDepth; ++k) {
        for (int column = 0; column < kHeadSize; ++column) {
          right[column][step * kProductDepth + k] = element(model::column_operand_address(b, column, k));
        }
      }
      for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < 4; ++i) {
          for (int half = 0; half < 2; ++half) {
            const model::Element at = model::left_element(thread, i, half);
            const uint32_t pair = registers.weights[thread][4 * step + i];
            left[at.row][step * kProductDepth + at.column] =
                widened(static_cast<uint16_t>(pair >> 16 * half), problem.is_bfloat16);
          }
        }
      }
    }
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < kHeadSize / 2; ++i) {
        const model::Element at = model::sum_element(thread, i);
        float sum = 0.0f;
        for (int k = 0; k < kBlockKeys; ++k) {
          sum += left[at.row][k] * right[at.column][k];
        }
        registers.sums[thread][i] += sum;
      }
    }
  }

  void weigh(Registers& registers, int num_left) const {
    for (int thread = 0; thread < 128; ++thread) {
      float (&scores)[kBlockKeys / 2] = registers.scores[thread];
      for (int i = 0; i < kBlockKeys / 2; ++i) {
        if (num_left < kBlockKeys && sum_column(thread, i) >= num_left) {
          scores[i] = -std::numeric_limits<float>::infinity();
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      float own[128];  // maxima of a thread's columns, then of its quad's
      for (int thread = 0; thread < 128; ++thread) {
        own[thread] = registers.highest[thread][half];
        for (int i = 2 * half; i < kBlockKeys / 2; i += 4) {
          own[thread] = std::fmax(own[thread], registers.scores[thread][i]);
          own[thread] = std::fmax(own[thread], registers.scores[thread][i + 1]);
        }
      }
      for (int thread = 0; thread < 128; ++thread) {
        const int quad = thread / 4 * 4;
        const float highest = std::fmax(std::fmax(own[quad], own[quad + 1]), std::fmax(own[quad + 2], own[quad + 3]));
        float& total = registers.total[thread][half];
        registers.rescale[thread][half] = std::exp2((registers.highest[thread][half] - highest) * problem.scale_log2);
        registers.highest[thread][half] = highest;
        total *= registers.rescale[thread][half];
        for (int i = 2 * half; i < kBlockKeys / 2; i += 4) {
          for (float& score : {std::ref(registers.scores[thread][i]), std::ref(registers.scores[thread][i + 1])}) {
            score = std::exp2(std::fma(score, problem.scale_log2, -highest * problem.scale_log2));
            total += score;
          }
        }
      }
    }
  }

  void round_weights(Registers& registers) const {
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < kBlockKeys / 4; ++i) {
        const float* pair = registers.scores[thread] + first_score(i);
        registers.weights[thread][i] =
            rounded(pair[0], problem.is_bfloat16) | static_cast<uint32_t>(rounded(pair[1], problem.is_bfloat16)) << 16;
      }
    }
  }

  void rescale(Registers& registers) const {
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < kHeadSize / 2; ++i) {
        registers.sums[thread][i] *= registers.rescale[thread][i / 2 % 2];
      }
    }
  }

  void store(const Registers& registers, const Place& at, int first_row) const {
    for (int thread = 0; thread < 128; ++thread) {
      for (int half = 0; half < 2; ++half) {
        const int quad = thread / 4 * 4;
        float total = 0.0f;
        for (int other = quad; other < quad + 4; ++other) {
          total += registers.total[other][half];
        }
        const int query = at.first_query + first_row + sum_row(thread, 2 * half);
        if (query >= problem.num_queries) {
          continue;
        }
        const bool has_keys = total > 0.0f;
        const float inverse = 1.0f / (has_keys ? total : 1.0f);
        uint16_t* row = problem.out + out_offset(at, query, problem.num_queries, problem.num_heads, kHeadSize);
        for (int i = 2 * half; i < kHeadSize / 2; i += 4) {
          for (int j = i; j < i + 2; ++j) {
            row[sum_column(thread, j)] = rounded(registers.sums[thread][j] * inverse, problem.is_bfloat16);
          }
        }
        if (thread % 4 == 0) {
          problem.lse[lse_offset(at, query, problem.num_queries, problem.num_heads)] =
              has_keys ? registers.highest[thread][half] * problem.scale_log2 + std::log2(total)
                       : std::numeric_limits<float>::infinity();
        }
      }
    }
  }

  Role consume(int first_row) {
    constexpr int kWarps = 4;
    Ring key_ring, value_ring, rounds;
    for (int tile = index; tile < problem.num_tiles; tile += problem.num_programs) {
      const Place at = place_of(tile);
      const int length = keys_at(at).length;
      const int num_blocks = num_key_blocks(length);
      std::vector<Registers> owner(1);
      Registers& registers = owner.front();  // zeros
      for (auto& highest : registers.highest) {
        highest[0] = highest[1] = -std::numeric_limits<float>::infinity();
      }
      if (num_blocks > 0) {
        co_await Wait{&barrier(Barrier::kQueriesFull), rounds.parity};
        co_await Wait{&barrier(Barrier::kKeysFull, key_ring.stage), key_ring.parity};
        multiply_scores(registers, T::kKeys + key_ring.stage * T::kKeyBytes, first_row);
        barrier(Barrier::kKeysEmpty, key_ring.stage).arrive(kWarps);
        key_ring.advance(T::kNumStages);
        weigh(registers, keys_left(length, 0));
        round_weights(registers);
        co_await Wait{&barrier(Barrier::kValuesFull, value_ring.stage), value_ring.parity};
        for (int block = 1; block < num_blocks; ++block) {
          co_await Wait{&barrier(Barrier::kKeysFull, key_ring.stage), key_ring.parity};
          multiply_scores(registers, T::kKeys + key_ring.stage * T::kKeyBytes, first_row);
          barrier(Barrier::kKeysEmpty, key_ring.stage).arrive(kWarps);
          key_ring.advance(T::kNumStages);
          weigh(registers, keys_left(length, block));
          const Ring last_values = value_ring;
          value_ring.advance(T::kNumStages);
          co_await Wait{&barrier(Barrier::kValuesFull, value_ring.stage), value_ring.parity};
          add_values(registers, T::kValues + last_values.stage * T::kValueBytes);  // as late as it may
          barrier(Barrier::kValuesEmpty, last_values.stage).arrive(kWarps);
          rescale(registers);
          round_weights(registers);
        }
        barrier(Barrier::kQueriesEmpty).arrive(kWarps);
        rounds.advance(1);
        add_values(registers, T::kValues + value_ring.stage * T::kValueBytes);
        barrier(Barrier::kValuesEmpty, value_ring.stage).arrive(kWarps);
        value_ring.advance(T::kNumStages);
      }
      store(registers, at, first_row);
    }
  }

  // Runs all roles to their ends, always the first of those that can go on. False where none can, or where a barrier
  // was misused.
  bool run(Schedule schedule) {
    std::vector<Role> roles = {produce()};
    for (int warpgroup = 0; warpgroup < T::kNumConsumers; ++warpgroup) {
      roles.insert(schedule.consumers_first ? roles.begin() : roles.end(), consume(warpgroup * kProductRows));
    }
    bool is_alive = true;
    while (is_alive) {
      const auto role = std::find_if(roles.begin(), roles.end(), [](const Role& each) { return each.can_go_on(); });
      is_alive = role != roles.end() || !copies.empty();
      if (role != roles.end()) {
        role->handle.resume();
      }
      if (!copies.empty() && (schedule.copies_at_once || role == roles.end())) {
        copies.back()();  // the last one first: they finish in any order
        copies.pop_back();
      }
    }
    bool is_done = true;
    for (Role& role : roles) {
      is_done = is_done && role.handle.done();
      role.handle.destroy();
    }
    for (const model::Barrier& each : barriers) {
      is_done = is_done && !each.is_misused();
    }
    return is_done;
  }
};

template <int kHeadSize>
bool replay(Problem problem, int64_t num_samples, Schedule schedule) {
  constexpr int kBlockQueries = Tile<kHeadSize>::kBlockQueries;
  problem.num_blocks = (problem.num_queries + kBlockQueries - 1) / kBlockQueries;
  problem.num_tiles = static_cast<int>(num_samples) * problem.num_heads * problem.num_blocks;
  for (int index = 0; index < problem.num_programs; ++index) {
    if (!Program<kHeadSize>(problem, index).run(schedule)) {
      return false;
    }
  }
  return true;
}

}  // namespace

// sizes: O, P, L, N, D of q, and O, P, K of k and v; strides: of q's five axes, k's and v's. 0, or 1 where the kernel
// would hang, or 2 for a head size that it does not have.
extern "C" int attention_replay(const uint16_t* q, const uint16_t* k, const uint16_t* v, const int64_t* lengths,
                                const int64_t* ends, uint16_t* out, float* lse, const int64_t* sizes,
                                const int64_t* strides, float scale_log2, int is_bfloat16, int num_programs,
                                int consumers_first, int copies_at_once) {
  // O, P, L, N, D -> D, L, N, P, O
  const auto map_of = [&](const uint16_t* data, int64_t o, int64_t p, int64_t length, const int64_t* s) {
    return model::TensorMap{data, {sizes[4], length, sizes[3], p, o}, {s[4], s[2], s[3], s[1], s[0]}, 0, 0};
  };
  Problem problem{};
  problem.q = map_of(q, sizes[0], sizes[1], sizes[2], strides);
  problem.k = map_of(k, sizes[5], sizes[6], sizes[7], strides + 5);
  problem.v = map_of(v, sizes[5], sizes[6], sizes[7], strides + 10);
  problem.lengths = lengths;
  problem.ends = ends;
  problem.out = out;
  problem.lse = lse;
  problem.num_heads = static_cast<int>(sizes[3]);
  problem.num_inner = static_cast<int>(sizes[1]);
  problem.num_queries = static_cast<int>(sizes[2]);
  problem.num_keys = static_cast<int>(sizes[7]);
  problem.scale_log2 = scale_log2;
  problem.is_bfloat16 = is_bfloat16 != 0;
  problem.num_programs = num_programs;
  const int64_t num_samples = sizes[0] * sizes[1];
  const Schedule schedule = {consumers_first != 0, copies_at_once != 0};
  switch (sizes[4]) {
    case 64:
      return !replay<64>(problem, num_samples, schedule);
    case 72:
      return !replay<72>(problem, num_samples, schedule);
    case 96:
      return !replay<96>(problem, num_samples, schedule);
    case 128:
      return !replay<128>(problem, num_samples, schedule);
    default:
      return 2;
  }
}
