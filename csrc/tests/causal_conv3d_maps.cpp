// Exhaustive checks of causal_conv3d_maps.h against what is written out here by hand. Prints each failure.

#include "../causal_conv3d_maps.h"

#include <cstdio>
#include <random>
#include <set>
#include <vector>

namespace {

using namespace opensora;
using namespace opensora::conv90;

int num_failures = 0;

void expect(bool holds, const char* what, int64_t value = 0) {
  if (!holds && ++num_failures <= 20) {
    std::printf("%s: %lld\n", what, static_cast<long long>(value));
  }
}

ConvolutionShape shape_like(int frames, int height, int width, int num_channels, int num_out) {
  ConvolutionShape shape{};
  shape.num_samples = 2;
  shape.num_channels = num_channels;
  shape.num_out = num_out;
  shape.height = shape.out_height = height;
  shape.width = shape.out_width = width;
  shape.out_frames = frames;
  for (int axis = 0; axis < 3; ++axis) {
    shape.kernel[axis] = 3;
    shape.dilation[axis] = 1;
    shape.start[axis] = axis == 0 ? -2 : -1;
  }
  return shape;
}

// The copy engine numbers the 16-byte pieces of row r anew by r modulo 8.
void test_swizzle() {
  std::set<uint32_t> places;
  for (uint32_t row = 0; row < 18 * 16; ++row) {
    std::set<uint32_t> banks;
    for (uint32_t piece = 0; piece < 8; ++piece) {
      const uint32_t place = swizzle(row * 128 + piece * 16);
      expect(place == row * 128 + (piece ^ row % 8) * 16, "swizzle moves a piece elsewhere, row", row);
      places.insert(place);
    }
  }
  expect(places.size() == 18 * 16 * 8, "swizzle loses pieces", places.size());
  for (uint32_t first = 0; first < 64; first += 8) {  // wgmma reads one piece of eight rows at once
    std::set<uint32_t> banks;
    for (uint32_t row = first; row < first + 8; ++row) {
      banks.insert(swizzle(row * 128) % 128);
    }
    expect(banks.size() == 8, "eight rows share banks, from row", first);
  }
}

void test_descriptor() {
  for (uint32_t address = 0; address < kMostSharedBytes; address += 16) {
    const uint64_t descriptor = operand_descriptor(address);
    expect((descriptor & 0x3FFF) * 16 == address, "descriptor's address", address);
    expect((descriptor >> 14 & 3) == 0 && (descriptor >> 16 & 0x3FFF) == 1, "descriptor's leading offset", address);
    expect((descriptor >> 32 & 0x3FFF) * 16 == 1024, "descriptor's stride", address);
    expect(moved(operand_descriptor(4096), address) == operand_descriptor(4096 + address) || address + 4096 >= 1 << 18,
           "a moved descriptor", address);
    expect((descriptor >> 46 & 0xFFFF) == 0 && descriptor >> 62 == 1, "descriptor's layout", address);
  }
}

// Row r of an operand lies 128 bytes behind row r - 1, its sum of 16 channels within 32 bytes; all in one swizzle row.
template <int N>
void test_operands() {
  for (int consumer = 0; consumer < kNumConsumers; ++consumer) {
    for (int block = 0; block < Tile<N>::kBlocks; ++block) {
      for (int row_tap = 0; row_tap < kMostRowTaps; ++row_tap) {
        for (int step = 0; step < 4; ++step) {
          const int whole = consumer * Tile<N>::kBlocks + block;
          const uint32_t operand = clip_operand(whole, row_tap, step);
          expect(operand == clip_operand(consumer * Tile<N>::kBlocks, row_tap, 0) + clip_operand(block, 0, step),
                 "the kernel adds two operands' places", operand);
          // position (h, w) of the tile reads row h + row_tap, column w of the box
          const int position = whole * 64;
          expect(operand == uint32_t(((position / 16 + row_tap) * 16 + position % 16) * 128 + step * 32),
                 "clip operand begins elsewhere", operand);
          expect(operand / 128 % 8 == 0, "operand begins within the swizzle's pattern", operand);
          expect(operand + 63 * 128 < uint32_t(Tile<N>::kClipSlotBytes), "operand leaves its slot", operand);
        }
      }
    }
  }
  static_assert(weight_operand(1) == 32 && weight_operand(3) == 96);
}

// The PTX manual's figure of the sums of wgmma.m64nNk16.
template <int N>
void test_fragments() {
  std::vector<int> seen(64 * N, 0);
  for (int thread = 0; thread < 128; ++thread) {
    for (int index = 0; index < N / 2; ++index) {
      const int row = fragment_row(thread, index), channel = fragment_channel(thread, index);
      const int lane = thread % 32, half = index >> 1 & 1;
      expect(row == thread / 32 * 16 + lane / 4 + 8 * half, "row of a sum", row);
      expect(channel == (index >> 2) * 8 + lane % 4 * 2 + (index & 1), "channel of a sum", channel);
      ++seen[row * N + channel];
    }
  }
  for (const int count : seen) {
    expect(count == 1, "a sum is held so many times", count);
  }
}

void test_exchange() {
  int words[32][4], given[32];
  for (int lane = 0; lane < 32; ++lane) {
    for (int word = 0; word < 4; ++word) {
      words[lane][word] = lane * 4 + word;
    }
  }
  for (int mask = 1; mask <= 2; mask *= 2) {
    for (int pair = 0; pair < 2; ++pair) {
      for (int lane = 0; lane < 32; ++lane) {
        given[lane] = words[lane][given_word(lane, mask, pair)];
      }
      for (int lane = 0; lane < 32; ++lane) {
        words[lane][given_word(lane, mask, pair)] = given[lane ^ mask];
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int word = 0; word < 4; ++word) {
      expect(words[lane][word] == (lane / 4 * 4 + word) * 4 + lane % 4, "a word ends elsewhere, lane", lane);
    }
  }
}

// Every number of the result is written once, by the thread that has its eight channels after the exchange.
void test_tiles(int height, int width, int num_out) {
  const ConvolutionShape shape = shape_like(3, height, width, 40, num_out);
  const int n = choose_tile_channels(num_out);
  const Schedule schedule = make_schedule(shape, 0, 3, tile_height(n), n);
  const int num_blocks = tile_height(n) * kTileWidth / 128;
  std::vector<int> written(int64_t{2} * 3 * height * width * num_out, 0), partials(num_partials(schedule), 0);
  for (int tile = 0; tile < num_tiles(schedule); ++tile) {
    const TilePosition at = tile_position(schedule, tile);
    for (int warp = 0; warp < kNumWarps; ++warp) {
      int count = 0;
      for (int lane = 0; lane < 32; ++lane) {
        for (int row = 0; row < 2 * num_blocks; ++row) {
          const int thread = warp % 4 * 32 + lane, within = fragment_row(thread, row % 2 * 2);
          const int h = at.row + tile_row(warp / 4 * num_blocks + row / 2, within);
          const int w = at.column + tile_column(within);
          count += is_inside(shape, h, w) && lane % 4 == 0;
          for (int group = 0; group < n / 32 && is_inside(shape, h, w); ++group) {
            const int channel = at.channel + written_channel(thread, group);
            for (int each = channel; each < channel + 8 && channel < num_out; ++each) {
              ++written.at(result_offset(shape, at, h, w, each));
            }
          }
        }
      }
      expect(count == num_positions(schedule, at, warp), "positions of a warp", count);
    }
    for (int channel = at.channel; channel < at.channel + n && channel < num_out; ++channel) {
      ++partials.at(partial_offset(schedule, at, channel));
      ++partials.at(partial_offset(schedule, at, channel) + 1);
    }
  }
  for (const int count : written) {
    expect(count == 1, "a number of the result is written so many times", count);
  }
  for (const int count : partials) {
    expect(count == 1, "a partial moment is written so many times", count);
  }
}

// The frames in front are laid out, and a tap reads what lies there.
void test_frames(int num_state, int num_frames, int num_front, int dilation, bool replicates) {
  struct Padded {
    FrameSource source;
    int frame;
  };
  std::vector<Padded> padded;
  for (int frame = 0; frame < num_state; ++frame) {
    padded.push_back({FrameSource::kState, frame});
  }
  for (int frame = 0; frame < num_front && num_state == 0; ++frame) {
    padded.push_back({replicates ? FrameSource::kClip : FrameSource::kNothing, 0});
  }
  for (int frame = 0; frame < num_frames; ++frame) {
    padded.push_back({FrameSource::kClip, frame});
  }
  ConvolutionShape shape = shape_like(1, 4, 4, 8, 8);
  shape.dilation[0] = dilation;
  shape.start[0] = num_state > 0 ? 0 : -num_front;
  shape.replicates_front = replicates;
  for (int out = 0; out < static_cast<int>(padded.size()); ++out) {
    for (int tap = 0; tap < 3; ++tap) {
      const size_t place = out + tap * dilation;  // behind the clip lies nothing
      const Padded expected = place < padded.size() ? padded[place] : Padded{FrameSource::kNothing, 0};
      const InputFrame found = input_frame(shape, num_state, num_frames, out, tap);
      expect(found.source == expected.source && found.frame == expected.frame, "a tap reads another frame", out);
    }
  }
}

// One producer and eight consumer warps in random turns, on barriers that count as mbarriers do.
template <int kSlots>
void test_ring() {
  struct Barrier {
    int most, pending;
    uint32_t phase = 0;
    void arrive() {
      if (--pending == 0) {
        pending = most;
        phase ^= 1;
      }
    }
    bool has_ended(uint32_t parity) const {
      return phase != parity;
    }
  };
  std::vector<Barrier> full(kSlots, {1, 1}), empty(kSlots, {kNumWarps, kNumWarps});
  std::vector<int> slots(kSlots, -1), readers(kSlots, 0);
  std::mt19937 random(kSlots);
  constexpr int kLoads = 500;
  struct Actor {
    Ring ring{0, 0};
    int num_done = 0;
  } actors[1 + kNumWarps];
  int idle = 0;
  while (actors[0].num_done < kLoads && ++idle < 10000) {
    const int index = random() % (1 + kNumWarps);
    Actor& actor = actors[index];
    const int slot = actor.ring.slot;
    if (!(index == 0 ? empty[slot].has_ended(actor.ring.phase ^ 1) : full[slot].has_ended(actor.ring.phase))) {
      continue;
    }
    idle = 0;
    if (index == 0) {
      expect(slots[slot] == -1 || readers[slot] == kNumWarps, "a slot is filled before all have read it", slot);
      slots[slot] = actor.num_done;
      readers[slot] = 0;
      full[slot].arrive();
    } else {
      expect(slots[slot] == actor.num_done, "a warp reads another load", actor.num_done);
      ++readers[slot];
      empty[slot].arrive();
    }
    actor.ring = next(actor.ring, kSlots);
    ++actor.num_done;
  }
  expect(actors[0].num_done == kLoads, "the ring stands still after", actors[0].num_done);
}

// What the consumers count is what the producer loads, and a tap along rows has its own weights.
void test_products() {
  for (const int dilation : {1, 2}) {
    for (int kernel_rows = 1; kernel_rows <= 5; ++kernel_rows) {
      ConvolutionShape shape = shape_like(4, 20, 20, 72, 96);
      shape.kernel[1] = kernel_rows;
      shape.dilation[1] = dilation;
      const Schedule schedule = make_schedule(shape, 0, 4, tile_height(96), 96);
      expect(kernel_rows % schedule.row_taps == 0 && schedule.row_taps <= kMostRowTaps, "taps that share", kernel_rows);
      expect(schedule.row_taps == 1 || dilation == 1, "rows that share lie apart", dilation);
      TilePosition at{};
      for (at.frame = 0; at.frame < 4; ++at.frame) {
        std::set<int> taps;
        for (int i = 0; i < 3; ++i) {
          const bool is_nothing = at.frame + i < 2;
          for (int j = 0; j < kernel_rows && !is_nothing; ++j) {
            for (int k = 0; k < 3; ++k) {
              taps.insert(tap_index(shape, i, j, k));
            }
          }
        }
        expect(num_products(schedule, at) == static_cast<int>(taps.size()) * 2, "products of a frame", at.frame);
        expect(*taps.rbegin() == 9 * kernel_rows - 1, "the last tap", *taps.rbegin());
      }
      expect(num_steps(schedule, 0) == 4 && num_steps(schedule, 1) == 1, "steps of 72 channels", 72);
    }
  }
}

void test_choices() {
  const int choices[][2] = {{8, 64},    {64, 64},   {72, 96},  {96, 96},   {128, 128}, {160, 192},
                            {192, 192}, {256, 128}, {320, 64}, {384, 128}, {512, 128}};
  for (const auto& [num_out, tile] : choices) {
    expect(choose_tile_channels(num_out) == tile, "tile for channels", num_out);
  }
}

}  // namespace

int main() {
  test_swizzle();
  test_descriptor();
  test_operands<64>();
  test_operands<96>();
  test_operands<128>();
  test_operands<192>();
  test_fragments<64>();
  test_fragments<96>();
  test_fragments<128>();
  test_fragments<192>();
  test_exchange();
  for (const int num_out : {8, 96, 136, 192, 256}) {
    test_tiles(1, 1, num_out);
    test_tiles(16, 16, num_out);
    test_tiles(17, 35, num_out);
  }
  for (const bool replicates : {false, true}) {
    for (int dilation = 1; dilation <= 2; ++dilation) {
      for (int num_front = 0; num_front <= 4; ++num_front) {
        test_frames(0, 5, num_front, dilation, replicates);
        test_frames(num_front, 3, 0, dilation, replicates);
      }
    }
  }
  test_ring<kClipSlots>();
  test_ring<Tile<64>::kWeightSlots>();
  test_ring<Tile<128>::kWeightSlots>();
  test_products();
  test_choices();
  std::printf("%d failures\n", num_failures);
  return num_failures != 0;
}
