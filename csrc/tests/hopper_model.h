// What Hopper's instructions do, written from their documentation and not from the kernels' maps: TMA's boxes, wgmma's
// operands and registers, and barriers. The maps' tests and the kernels' replays check the maps against these.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace opensora::model {

// Shared memory from address 0 on, which is aligned as strictly as any swizzle wants.
using SharedMemory = std::vector<uint8_t>;

// Where TMA and wgmma move the byte at `address`: the pattern is a line of 128 bytes wide and spans / 16 lines high; in
// line i the piece of 16 bytes that is number c of its span is stored as number c xor i.
inline uint32_t physical(uint32_t address, uint32_t span) {
  const uint32_t pieces = span / 16, line = address / 128, piece = address / 16;
  const uint32_t moved = piece / pieces * pieces + (piece % pieces ^ line % pieces);
  return moved * 16 + address % 16;
}

inline uint16_t load(const SharedMemory& shared, uint32_t address) {
  uint16_t element;
  std::memcpy(&element, &shared.at(address), 2);
  return element;
}

// A tensor map of 16-bit elements: first axis dense, strides in elements.
struct TensorMap {
  const uint16_t* data;
  int64_t extents[5];
  int64_t strides[5];
  int columns, rows;  // of a box; its other axes are 1
};

// Copies a box to `target` and returns its bytes, those beyond the tensor, which are zeros, among them.
inline uint32_t copy_box(SharedMemory& shared, uint32_t target, const TensorMap& map, const int (&at)[5]) {
  for (int row = 0; row < map.rows; ++row) {
    for (int column = 0; column < map.columns; ++column) {
      const int64_t index[5] = {at[0] + column, at[1] + row, at[2], at[3], at[4]};
      bool is_inside = true;
      int64_t offset = 0;
      for (int axis = 0; axis < 5; ++axis) {
        is_inside = is_inside && index[axis] >= 0 && index[axis] < map.extents[axis];
        offset += index[axis] * map.strides[axis];
      }
      const uint16_t element = is_inside ? map.data[offset] : 0;
      const uint32_t address = target + static_cast<uint32_t>(row * map.columns + column) * 2;
      std::memcpy(&shared.at(physical(address, static_cast<uint32_t>(map.columns) * 2)), &element, 2);
    }
  }
  return static_cast<uint32_t>(map.rows * map.columns) * 2;
}

// A descriptor's fields, in bytes.
struct Operand {
  uint32_t start, leading, stride, span;
};

inline Operand operand(uint64_t descriptor) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16; };
  const uint32_t spans[4] = {0, 128, 64, 32};
  return {field(0), field(16), field(32), spans[descriptor >> 62]};
}

// Element (row, k) of an operand whose rows hold their k side by side ("K-major"), k < 16.
inline uint32_t row_operand_address(uint64_t descriptor, uint32_t row, uint32_t k) {
  const Operand at = operand(descriptor);
  return physical(at.start + row / 8 * at.stride + row % 8 * at.span + k * 2, at.span);
}

// Element (column, k) of an operand whose k hold their columns side by side ("MN-major").
inline uint32_t column_operand_address(uint64_t descriptor, uint32_t column, uint32_t k) {
  const Operand at = operand(descriptor);
  const uint32_t columns = at.span / 2;
  return physical(at.start + column / columns * at.leading + column % columns * 2 + k / 8 * at.stride + k % 8 * at.span,
                  at.span);
}

// Row and column of a 64-row sum that register d[index] of a thread holds.
struct Element {
  int row, column;
};

inline Element sum_element(int thread, int index) {
  const int warp = thread / 32, group = thread % 32 / 4, in_group = thread % 4;
  return {16 * warp + group + (index % 4 >= 2 ? 8 : 0), 8 * (index / 4) + 2 * in_group + (index & 1)};
}

// Row and column of a (64, 16) left-hand operand that half `half` of register a[index] of a thread holds.
inline Element left_element(int thread, int index, int half) {
  const int warp = thread / 32, group = thread % 32 / 4, in_group = thread % 4;
  return {16 * warp + group + (index == 1 || index == 3 ? 8 : 0), 2 * in_group + half + (index >= 2 ? 8 : 0)};
}

// An mbarrier: a phase ends when the expected number has arrived and all announced bytes have landed.
class Barrier {
 public:
  void init(int num_arrivals) {
    num_arrivals_ = pending_ = num_arrivals;
  }

  void arrive(int number = 1) {
    pending_ -= number;
    end_phase_if_complete();
  }

  void expect(uint32_t num_bytes) {
    bytes_ += num_bytes;
    arrive();
  }

  void land(uint32_t num_bytes) {
    bytes_ -= num_bytes;
    end_phase_if_complete();
  }

  // Whether a wait for the phase of this parity returns.
  bool has_ended(uint32_t parity) const {
    return phase_ % 2 != parity;
  }

  // More arrivals or fewer bytes than a phase has, which the hardware does not check.
  bool is_misused() const {
    return pending_ < 0 || bytes_ < 0;
  }

 private:
  void end_phase_if_complete() {
    if (pending_ == 0 && bytes_ == 0) {
      ++phase_;
      pending_ = num_arrivals_;
    }
  }

  int num_arrivals_ = 0, pending_ = 0;
  int64_t bytes_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace opensora::model
