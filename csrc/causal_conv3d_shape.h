// The shape of a causal convolution, and which frame each of its taps reads. Axes as in causal_conv3d.h.
#pragma once

#include "host_device.h"

namespace opensora {

// Forward or backward: the gradient of the input is a convolution too. C and O are multiples of 8.
struct ConvolutionShape {
  int num_samples;
  int num_channels;
  int num_out;
  int height, width;  // of x and of the state
  int out_frames, out_height, out_width;
  int kernel[3], dilation[3], start[3];
  bool replicates_front;
  bool is_bfloat16;  // else float16; sums are float32
  int step[3] = {1, 1, 1};
  int space_padding = 0;  // rows and columns outside are 0 zeros, 1 the border, 2 its reflection
};

enum class FrameSource { kNothing, kState, kClip };

struct InputFrame {
  FrameSource source;
  int frame;  // of the state or of the clip
};

// What tap `tap` in time reads for a frame of the result, at step 1. Frames behind the clip are nothing, too: the
// gradient of the input reads them.
OPENSORA_HOST_DEVICE constexpr InputFrame input_frame(const ConvolutionShape& shape, int num_state, int num_frames,
                                                      int out_frame, int tap) {
  int frame = out_frame + shape.start[0] + tap * shape.dilation[0];
  if (frame < 0 && shape.replicates_front && num_state == 0) {
    frame = 0;
  }
  if (frame < 0 || frame >= num_state + num_frames) {
    return {FrameSource::kNothing, 0};
  }
  return frame < num_state ? InputFrame{FrameSource::kState, frame} : InputFrame{FrameSource::kClip, frame - num_state};
}

}  // namespace opensora
