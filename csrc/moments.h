// Count, mean and sum of squared deviations, merged without cancellation (Chan's formula): of warps into tiles, of
// tiles into frames. Axes: B samples, T' frames, O channels.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace opensora {

struct Moments {
  float count, mean, squares;
};

OPENSORA_HOST_DEVICE constexpr Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0.0f) {
    return {0.0f, 0.0f, 0.0f};
  }
  const float apart = b.mean - a.mean;
  const float share = b.count / count;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

// Statistics of tiles, to be merged into those of frames. `partials` (B, T', tiles, O, 2): mean and squared deviations
// of each rectangle of tile_height x tile_width positions (rows of tiles first; cut off at the frame's edge). A kernel
// whose tiles are runs of positions passes height 1, width H' * W', tile_height 1.
struct FrameStatistics {
  const float* partials;
  float* statistics;  // (B, O, T', 2)
  int num_samples, num_frames, num_out;
  int height, width, tile_height, tile_width;
};

OPENSORA_HOST_DEVICE constexpr int positions_of_tile(const FrameStatistics& merge, int tile) {
  const int tiles_w = (merge.width + merge.tile_width - 1) / merge.tile_width;
  const int rows = merge.height - tile / tiles_w * merge.tile_height;
  const int columns = merge.width - tile % tiles_w * merge.tile_width;
  return (rows < merge.tile_height ? rows : merge.tile_height) *
         (columns < merge.tile_width ? columns : merge.tile_width);
}

// Of every `num_slices`-th tile of a plane (sample * T' + frame).
OPENSORA_HOST_DEVICE constexpr Moments moments_of_slice(const FrameStatistics& merge, int64_t plane, int channel,
                                                        int slice, int num_slices) {
  const int num_tiles = ((merge.height + merge.tile_height - 1) / merge.tile_height) *
                        ((merge.width + merge.tile_width - 1) / merge.tile_width);
  Moments all{0.0f, 0.0f, 0.0f};
  for (int tile = slice; tile < num_tiles; tile += num_slices) {
    const float* partial = merge.partials + ((plane * num_tiles + tile) * merge.num_out + channel) * 2;
    all = merged(all, {static_cast<float>(positions_of_tile(merge, tile)), partial[0], partial[1]});
  }
  return all;
}

OPENSORA_HOST_DEVICE constexpr int64_t statistics_offset(const FrameStatistics& merge, int64_t plane, int channel) {
  const int64_t sample = plane / merge.num_frames, frame = plane % merge.num_frames;
  return ((sample * merge.num_out + channel) * merge.num_frames + frame) * 2;
}

}  // namespace opensora
