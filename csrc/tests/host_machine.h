// A machine for the kernels' steps on the host: shared memory as bytes, copies that arrive as late as the pipeline
// allows or at once, products of wgmma that run as late as it allows, ldmatrix, mma and wgmma worked out lane by lane.
// What is not written yet is 0xff everywhere, which is NaN in every type.
#pragma once

#include <cstring>
#include <deque>
#include <vector>

#include "../causal_conv3d_sm90_gradient_steps.h"

namespace opensora::sm80 {

struct Range {
  const void* begin;
  int64_t num_bytes;
};

// Shared memory of a block, and its copies on their way.
class Machine {
 public:
  Machine(int num_bytes, std::vector<Range> ranges, bool lands_at_once)
      : ranges_(std::move(ranges)), bytes_(num_bytes + 16, '\xff'), lands_at_once_(lands_at_once) {}

  char* shared() {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(bytes_.data()) + 15) / 16 * 16);
  }

  void copy(int byte, const void* source, bool is_read) {
    Copy copy{byte, {}};
    if (is_read) {
      is_wrong_ = is_wrong_ || !is_readable(source) || byte % kVectorBytes != 0;
      if (is_wrong_) {
        return;
      }
      std::memcpy(copy.vector.words, source, kVectorBytes);
    }
    newest_.push_back(copy);
    if (lands_at_once_) {
      land(copy);
    }
  }

  void commit() {
    groups_.push_back(std::move(newest_));
    newest_.clear();
  }

  // What cp.async.wait_group promises, and no more.
  void wait(size_t num_left) {
    while (groups_.size() > num_left) {
      for (const Copy& copy : groups_.front()) {
        if (!lands_at_once_) {
          land(copy);
        }
      }
      groups_.pop_front();
    }
  }

  bool is_wrong() const {
    return is_wrong_;
  }

 private:
  struct Copy {
    int byte;
    Vector vector;
  };

  void land(const Copy& copy) {
    std::memcpy(shared() + copy.byte, copy.vector.words, kVectorBytes);
  }

  bool is_readable(const void* source) const {
    const auto at = reinterpret_cast<uintptr_t>(source);
    for (const Range& range : ranges_) {
      const auto begin = reinterpret_cast<uintptr_t>(range.begin);
      if (at >= begin && at + kVectorBytes <= begin + range.num_bytes) {
        return at % kVectorBytes == 0;
      }
    }
    return false;
  }

  std::vector<Range> ranges_;
  std::vector<char> bytes_;
  bool lands_at_once_;
  std::vector<Copy> newest_;
  std::deque<std::vector<Copy>> groups_;
  bool is_wrong_ = false;
};

// 32 lanes: see causal_conv3d_sm80_steps.h.
template <class Type>
struct HostWarp {
  struct Matrices {
    uint32_t words[32][4];
  };
  struct Sums {
    float values[32][4] = {};
  };

  const char* shared;
  int index;

  template <class ByteOfLane>
  Matrices load(ByteOfLane byte_of_lane) const {
    return loaded(byte_of_lane, false);
  }

  template <class ByteOfLane>
  Matrices load_transposed(ByteOfLane byte_of_lane) const {
    return loaded(byte_of_lane, true);
  }

  void multiply(Sums& sums, const Matrices& a, const Matrices& b, int half) const {
    float b_KN[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Element at = element_of_b(lane, i);
        b_KN[at.row][at.column] = Type::widened(b.words[lane][2 * half + i / 2] >> (i % 2 * 16));
      }
    }
    add_product(sums, a, b_KN);
  }

  void add_rows(Sums& sums, const Matrices& a) const {
    float b_KN[16][8];
    for (auto& row : b_KN) {
      for (float& value : row) {
        value = Type::widened(Type::kTwoOnes);
      }
    }
    add_product(sums, a, b_KN);
  }

  template <class Function>
  void each_lane(const Sums& sums, Function function) const {
    for (int lane = 0; lane < 32; ++lane) {
      function(lane, sums.values[lane]);
    }
  }

 private:
  // Matrix m has the rows whose addresses lanes 8 m to 8 m + 7 give; every lane gets two elements of one of them.
  template <class ByteOfLane>
  Matrices loaded(ByteOfLane byte_of_lane, bool is_transposed) const {
    Matrices found;
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t word = 0;
        for (int i = 0; i < 2; ++i) {
          const int along = lane % 4 * 2 + i, across = lane / 4;
          const int row = is_transposed ? along : across, column = is_transposed ? across : along;
          uint16_t element;
          std::memcpy(&element, shared + byte_of_lane(8 * matrix + row) + 2 * column, sizeof(element));
          word |= static_cast<uint32_t>(element) << 16 * i;
        }
        found.words[lane][matrix] = word;
      }
    }
    return found;
  }

  static void add_product(Sums& sums, const Matrices& a, const float (&b_KN)[16][8]) {
    float a_MK[16][16];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const Element at = element_of_a(lane, i);
        a_MK[at.row][at.column] = Type::widened(a.words[lane][i / 2] >> (i % 2 * 16));
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Element at = element_of_c(lane, i);
        float sum = sums.values[lane][i];
        for (int k = 0; k < 16; ++k) {
          sum += a_MK[at.row][k] * b_KN[k][at.column];
        }
        sums.values[lane][i] = sum;
      }
    }
  }
};

// The 128 threads of a group and wgmma.m64nNk16 with both factors transposed, which it finds by their descriptors.
template <class Type, int kTileOut>
struct HostGroup {
  struct Sums {
    float values[sm90::kGroupThreads][kTileOut / 2] = {};
  };

  const char* shared;
  int index;

  void multiply(Sums& sums, int x_byte, int grad_byte) const {
    const uint64_t x = sm90::transposed_operand(x_byte), grad = sm90::transposed_operand(grad_byte);
    for (int thread = 0; thread < sm90::kGroupThreads; ++thread) {
      for (int i = 0; i < kTileOut / 2; ++i) {
        const Element at = sm90::element_of_sum(thread, i);
        for (int k = 0; k < sm90::kDepth; ++k) {
          sums.values[thread][i] += element(x, at.row, k) * element(grad, at.column, k);
        }
      }
    }
  }

 private:
  // Of a transposed factor: 64 columns, 128 bytes, lie side by side; rows of the sum 128 bytes apart, eights of them by
  // one stride and further columns by the other; bits 4 to 6 of an address are turned by bits 7 to 9.
  float element(uint64_t descriptor, int column, int k) const {
    const auto field = [&](int first) { return static_cast<int>(descriptor >> first & 0x3FFF) * 16; };
    const int byte = field(0) + column / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + column % 64 * 2;
    uint16_t bits;
    std::memcpy(&bits, shared + (byte ^ (byte >> 7 & 7) << 4), sizeof(bits));
    return Type::widened(bits);
  }
};

template <class Function>
void each_thread(Function function) {
  for (int thread = 0; thread < kNumThreads; ++thread) {
    function(thread);
  }
}

}  // namespace opensora::sm80
