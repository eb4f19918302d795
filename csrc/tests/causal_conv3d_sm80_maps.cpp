// Every index map of the mma.sync convolution, tried over its whole domain. Prints what is wrong and exits with 1.

#include <array>
#include <climits>
#include <cstdio>
#include <set>
#include <vector>

#include "../causal_conv3d_sm90_gradient_steps.h"

namespace {

using namespace opensora;
using namespace opensora::sm80;

int num_wrong = 0;

void check(bool is_right, const char* what, int a = 0, int b = 0, int c = 0) {
  if (!is_right && ++num_wrong <= 20) {
    std::fprintf(stderr, "%s: wrong at %d, %d, %d\n", what, a, b, c);
  }
}

Geometry geometry(int num_channels, std::array<int, 3> kernel, std::array<int, 3> size,
                  std::array<int, 3> step = {1, 1, 1}, std::array<int, 3> dilation = {1, 1, 1},
                  std::array<int, 3> start = {-2, -1, -1}, int num_state = 0, bool replicates_front = false,
                  int space_padding = 0) {
  ConvolutionShape shape{};
  shape.num_samples = 2;
  shape.num_channels = num_channels;
  shape.num_out = 40;
  shape.height = shape.out_height = size[1];
  shape.width = shape.out_width = size[2];
  shape.out_frames = size[0];
  for (int axis = 0; axis < 3; ++axis) {
    shape.kernel[axis] = kernel[axis];
    shape.step[axis] = step[axis];
    shape.dilation[axis] = dilation[axis];
    shape.start[axis] = start[axis];
  }
  shape.replicates_front = replicates_front;
  shape.space_padding = space_padding;
  const int64_t frame = int64_t{size[1]} * size[2] * num_channels;
  return geometry_of(shape, {size[0], frame * size[0], frame}, {num_state, frame * num_state, frame});
}

void divisors() {
  std::vector<int> all = {8191, 65535, 65536, 65537, 1000003, INT_MAX / 2, INT_MAX - 1, INT_MAX};
  for (int divisor = 1; divisor <= 4096; ++divisor) {
    all.push_back(divisor);
  }
  for (const int divisor : all) {
    const Divisor by(divisor);
    const int64_t last = INT_MAX / divisor, stride = last / 1000 + 1;
    for (int64_t multiple = 0; multiple <= last; multiple += multiple < 1000 ? 1 : stride) {
      for (int64_t n = multiple * divisor - 1; n <= multiple * divisor + 1; ++n) {
        check(n < 0 || n > INT_MAX || quotient(static_cast<int>(n), by) == n / divisor, "quotient", static_cast<int>(n),
              divisor);
      }
    }
    check(quotient(INT_MAX, by) == INT_MAX / divisor, "quotient", INT_MAX, divisor);
  }
}

// Bytes are distinct, and what is touched at once falls into different banks: 16 bytes span 4 of the 32.
template <int kRowVectors>
void swizzle(int num_rows, int (*byte_of)(int, int)) {
  std::set<int> bytes;
  for (int row = 0; row < num_rows; ++row) {
    for (int vector = 0; vector < kRowVectors; ++vector) {
      const int byte = byte_of(row, vector);
      check(byte % 16 == 0 && byte >= 0 && byte < num_rows * kRowVectors * 16, "swizzled", row, vector);
      bytes.insert(byte);
      check(byte_of(row + 16, vector) == byte + 16 * 128, "16 rows further", row, vector);
    }
  }
  check(static_cast<int>(bytes.size()) == num_rows * kRowVectors, "swizzled: bytes meet");
  for (int first = 0; first < num_rows; first += 8) {
    for (int vector = 0; vector < kRowVectors; ++vector) {
      std::set<int> banks;
      for (int row = first; row < first + 8; ++row) {
        banks.insert(byte_of(row, vector) / 16 % 8);
      }
      check(banks.size() == 8, "ldmatrix meets a bank twice", first, vector);
    }
  }
  for (int thread = 0; thread < kNumThreads; thread += 8) {
    std::set<int> banks;
    for (int i = 0; i < 8; ++i) {
      const Cell cell = copied_cell<kRowVectors>(thread + i, 0);
      banks.insert(byte_of(cell.row, cell.vector) / 16 % 8);
    }
    check(banks.size() == 8, "a copy meets a bank twice", thread);
  }
  std::set<std::pair<int, int>> cells;
  for (int thread = 0; thread < kNumThreads; ++thread) {
    for (int i = 0; i < num_rows * kRowVectors / kNumThreads; ++i) {
      const Cell cell = copied_cell<kRowVectors>(thread, i);
      check(cell.row < num_rows && cell.vector < kRowVectors, "copied_cell", thread, i);
      cells.insert({cell.row, cell.vector});
    }
  }
  check(static_cast<int>(cells.size()) == num_rows * kRowVectors, "copied_cell: cells are left out");
}

// Kernels compute one address and step from it.
void other_vectors() {
  for (int row = 0; row < 16; ++row) {
    for (int vector = 0; vector < 2; ++vector) {
      for (int by = 0; by < kGradientRowVectors; by += 2) {
        check(by >= 8 || other_vector(swizzled<8>(row, vector), by) == swizzled<8>(row, vector + by), "other_vector",
              row, vector, by);
        check(byte_of_cell({row, vector}, by) == swizzled_half(row, vector + by), "byte_of_cell", row, vector, by);
      }
    }
  }
}

template <int kTileOut>
void staging() {
  for (int row = 0; row < kTilePositions; row += 8) {
    for (int channel = 0; channel < kTileOut; channel += 8) {
      std::set<int> banks;
      for (int lane = 0; lane < 32; ++lane) {
        const Element at = element_of_c(lane, 0);
        banks.insert(staged<kTileOut>(row + at.row, channel + at.column) / 4 % 32);
      }
      check(banks.size() == 32, "staged: a bank is met twice", row, channel);
      check(staged<kTileOut>(row, channel) % 16 == 0, "staged: not aligned", row, channel);
    }
  }
  std::set<int> bytes;
  for (int row = 0; row < kTilePositions; ++row) {
    for (int channel = 0; channel < kTileOut; ++channel) {
      bytes.insert(staged<kTileOut>(row, channel));
    }
  }
  check(bytes.size() == size_t{kTilePositions} * kTileOut, "staged: bytes meet");
}

// ldmatrix gives a lane of matrix m the elements (lane / 4, lane % 4 * 2 + i), of its rows or, transposed, its columns.
Element loaded(Cell (*cell_of)(int), int lane, int matrix, int i, bool is_transposed) {
  const int along = lane % 4 * 2 + i, across = lane / 4;
  const Cell cell = cell_of(8 * matrix + (is_transposed ? along : across));
  return {cell.row, cell.vector * 8 + (is_transposed ? across : along)};
}

bool same(Element a, int row, int column) {
  return a.row == row && a.column == column;
}

void fragments() {
  const auto rows_first = [](int lane) { return matrix_cell_rows_first(lane); };
  const auto vectors_first = [](int lane) { return matrix_cell_vectors_first(lane); };
  std::set<std::pair<int, int>> a_cells, b_cells, c_cells;
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int i = 0; i < 2; ++i) {
        const Element a = element_of_a(lane, 2 * matrix + i), b = element_of_b(lane, 2 * (matrix % 2) + i);
        const Element c = element_of_c(lane, 2 * (matrix % 2) + i);
        const int column_b = b.column + matrix / 2 * 8;
        a_cells.insert({a.row, a.column});
        b_cells.insert({b.row, b.column});
        c_cells.insert({c.row, c.column});
        // forward: positions x channels of x, output channels x channels of the weight
        check(same(loaded(rows_first, lane, matrix, i, false), a.row, a.column), "x as A", lane, matrix, i);
        check(same(loaded(vectors_first, lane, matrix, i, false), column_b, b.row), "weight as B", lane, matrix, i);
        // weight gradient: positions x output channels, positions x columns
        check(same(loaded(vectors_first, lane, matrix, i, true), a.column, a.row), "gradient as A", lane, matrix, i);
        check(same(loaded(rows_first, lane, matrix, i, true), b.row, column_b), "x as B", lane, matrix, i);
      }
    }
  }
  check(a_cells.size() == 256 && b_cells.size() == 128 && c_cells.size() == 128, "fragments leave elements out");
  std::set<std::pair<int, int>> group_cells;
  for (int thread = 0; thread < sm90::kGroupThreads; ++thread) {
    for (int i = 0; i < 64; ++i) {
      const Element at = sm90::element_of_sum(thread, i);
      check(at.row < 64 && at.column < 128, "element_of_sum", thread, i);
      group_cells.insert({at.row, at.column});
    }
  }
  check(group_cells.size() == 64 * 128, "element_of_sum leaves elements out");
  for (const int tile_out : {64, 96, 128}) {
    std::set<std::pair<int, int>> forward, gradient;
    for (int warp = 0; warp < kNumWarps; ++warp) {
      for (int i = 0; i < 32; ++i) {
        for (int j = 0; j < tile_out / 2; ++j) {
          const Element f = forward_warp_origin(warp, tile_out), d = gradient_warp_origin(warp, tile_out);
          forward.insert({f.row + i, f.column + j});
          gradient.insert({d.row + j, d.column + i});
        }
      }
    }
    check(forward.size() == size_t{kTilePositions} * tile_out && forward.rbegin()->first < kTilePositions,
          "forward_warp_origin", tile_out);
    check(gradient.size() == size_t{kTileColumns} * tile_out && gradient.rbegin()->first < tile_out,
          "gradient_warp_origin", tile_out);
  }
}

void taps_of_sums() {
  for (const int num_channels : {8, 24, 64, 72, 96, 128, 200}) {
    for (const std::array<int, 3> kernel : {std::array{1, 1, 1}, {3, 3, 3}, {2, 1, 3}, {1, 3, 5}, {4, 2, 1}}) {
      const Geometry g = geometry(num_channels, kernel, {3, 4, 5});
      std::set<std::pair<int, int>> found;
      for (int vector = 0; vector < num_gradient_vectors(g); ++vector) {
        const TapVector tap = tap_of_vector(vector, g);
        check(tap.tap == (tap.t * kernel[1] + tap.h) * kernel[2] + tap.w && tap.t < kernel[0] && tap.h < kernel[1] &&
                  tap.w < kernel[2] && tap.channel % 8 == 0 && tap.channel < num_channels,
              "tap_of_vector", num_channels, vector);
        found.insert({tap.tap, tap.channel});
        const TapWalk from_start = onward({0, 0, 0}, vector, g);
        const TapVector walked = tap_of_walk(
            vector < kStepVectors ? from_start : onward(onward({0, 0, 0}, vector - kStepVectors, g), kStepVectors, g),
            g);
        check(walked.tap == tap.tap && walked.t == tap.t && walked.h == tap.h && walked.w == tap.w &&
                  walked.channel == tap.channel,
              "tap_of_walk", num_channels, vector);
      }
      check(static_cast<int>(found.size()) == num_gradient_vectors(g), "tap_of_vector: left out", num_channels);
    }
  }
}

// Against the definition, and against what the sm_90a kernel reads.
void frames() {
  for (const int num_state : {0, 1, 3}) {
    for (const bool replicates : {false, true}) {
      for (const int dilation : {1, 2}) {
        for (const int step : {1, 2}) {
          for (int start = -6; start <= 1; ++start) {
            const Geometry g =
                geometry(8, {3, 1, 1}, {5, 2, 3}, {step, 1, 1}, {dilation, 1, 1}, {start, 0, 0}, num_state, replicates);
            ConvolutionShape shape{};
            shape.start[0] = start;
            shape.dilation[0] = dilation;
            shape.replicates_front = replicates;
            for (int frame = 0; frame < 8; ++frame) {
              const TapRange taps = taps_of_frame(frame, g);
              for (int tap = 0; tap < 3; ++tap) {
                const int at = frame * step + start + tap * dilation;
                const FramePlace source = frame_place(1, at, g);
                check(source.is_inside == (tap >= taps.begin && tap < taps.end), "taps_of_frame", frame, tap, start);
                const bool repeats = replicates && num_state == 0 && at < 0;
                check(source.is_inside == (repeats || (at >= 0 && at < num_state + 5)), "frame_place", at, num_state);
                if (source.is_inside) {
                  const int in_clip = repeats ? 0 : at - num_state;
                  const int64_t expected =
                      at >= 0 && at < num_state ? g.stride_sb + at * g.stride_st : g.stride_xb + in_clip * g.stride_xt;
                  check(source.offset == expected && source.is_state == (at >= 0 && at < num_state), "frame_place", at,
                        num_state);
                }
                const InputFrame theirs = input_frame(shape, num_state, 5, frame, tap);
                check(step > 1 || (theirs.source == opensora::FrameSource::kNothing) == !source.is_inside,
                      "input_frame", frame, tap, start);
              }
            }
          }
        }
      }
    }
  }
}

void pixels() {
  for (int padding = 0; padding < 3; ++padding) {
    for (const int step : {1, 2}) {
      const Geometry g = geometry(8, {1, 3, 4}, {1, 5, 7}, {1, step, 1}, {1, 1, 2}, {0, -2, -3}, 0, false, padding);
      for (int row = 0; row < g.height; ++row) {
        for (int column = 0; column < g.width; ++column) {
          const Window window = window_of({row, column}, g);
          for (int h = 0; h < 3; ++h) {
            for (int w = 0; w < 4; ++w) {
              const int at_h = row * step - 2 + h, at_w = column - 3 + 2 * w;
              const bool is_inside = at_h >= 0 && at_h < 5 && at_w >= 0 && at_w < 7;
              const uint32_t bits = bits_of_tap(h, w);
              check(((window.is_inside & bits) == bits) == is_inside, "window_of", row, column, h);
              check((window.is_inside & kNever) == 0, "window_of", row, column);
              check(window.first_pixel + pixels_to_tap(h, w, g) == at_h * 7 + at_w, "pixels_to_tap", row, column, h);
              if (is_inside) {
                check(folded_pixel({row, column}, h, w, g) == at_h * 7 + at_w, "folded_pixel", row, column, h);
              }
            }
          }
        }
      }
    }
  }
  for (int size = 1; size < 6; ++size) {
    for (int index = -size + 1; index < 2 * size - 1; ++index) {
      const int clamped = index < 0 ? 0 : index < size ? index : size - 1;
      const int mirrored = index < 0 ? -index : index < size ? index : 2 * (size - 1) - index;
      check(folded(index, size, SpacePadding::replicate) == clamped, "folded", index, size);
      check(folded(index, size, SpacePadding::reflect) == mirrored, "folded", index, size);
    }
  }
}

void blocks() {
  for (const std::array<int, 3> size : {std::array{1, 1, 1}, {3, 9, 17}, {2, 16, 16}, {5, 8, 8}}) {
    const Geometry g = geometry(72, {3, 3, 3}, size);
    for (const int tile_out : {64, 96, 128}) {
      std::set<std::array<int, 4>> seen;
      for (int block = 0; block < num_forward_blocks(g, tile_out); ++block) {
        const ForwardBlock at = forward_block(block, g, tile_out);
        check(at.sample < 2 && at.frame < size[0] && at.first_position == at.tile * kTilePositions &&
                  at.first_position < g.num_positions && at.first_out < g.num_out,
              "forward_block", block, tile_out);
        seen.insert({at.sample, at.frame, at.tile, at.first_out});
      }
      check(static_cast<int64_t>(seen.size()) == num_forward_blocks(g, tile_out), "forward_block: left out", tile_out);
      std::set<std::array<int, 2>> columns;
      for (int block = 0; block < num_gradient_blocks(g, tile_out); ++block) {
        const GradientBlock at = gradient_block(block, g, tile_out);
        check(at.first_out < g.num_out && at.first_vector < num_gradient_vectors(g) &&
                  at.is_first_of_row == (at.first_vector == 0),
              "gradient_block", block, tile_out);
        columns.insert({at.first_out, at.first_vector});
      }
      check(static_cast<int>(columns.size()) == num_gradient_blocks(g, tile_out), "gradient_block: left out", tile_out);
    }
    const int num_steps = static_cast<int>(num_gradient_steps(g));
    std::set<std::array<int, 2>> steps;
    for (int step = 0; step < num_steps; ++step) {
      const GradientStep at = gradient_step(step, g);
      check(at.plane < 2 * size[0] && at.first_position % kStepPositions == 0 && at.first_position < g.num_positions,
            "gradient_step", step);
      steps.insert({at.plane, at.first_position});
    }
    check(static_cast<int>(steps.size()) == num_steps, "gradient_step: left out");
    for (int num_splits = 1; num_splits <= num_steps; ++num_splits) {
      check(first_step_of_split(0, num_splits, num_steps) == 0, "first_step_of_split", num_splits);
      check(first_step_of_split(num_splits, num_splits, num_steps) == num_steps, "first_step_of_split", num_splits);
      for (int split = 0; split < num_splits; ++split) {
        const int share =
            first_step_of_split(split + 1, num_splits, num_steps) - first_step_of_split(split, num_splits, num_steps);
        check(share == num_steps / num_splits || share == num_steps / num_splits + 1, "first_step_of_split", split);
      }
    }
    check(num_splits_of(g) >= 1 && num_splits_of(g) <= num_steps, "num_splits_of");
  }
  const int expected[][2] = {{8, 64}, {64, 64}, {72, 96}, {96, 96}, {128, 128}, {192, 96}, {256, 128}, {384, 128}};
  for (const auto& [num_out, tile_out] : expected) {
    check(tile_out_of(num_out) == tile_out, "tile_out_of", num_out, tile_out_of(num_out));
  }
}

}  // namespace

int main() {
  divisors();
  swizzle<kStepVectors>(kTilePositions, swizzled<kStepVectors>);
  swizzle<kGradientRowVectors>(kStepPositions, swizzled_half);
  other_vectors();
  staging<64>();
  staging<96>();
  staging<128>();
  fragments();
  taps_of_sums();
  frames();
  pixels();
  blocks();
  return num_wrong > 0;
}
