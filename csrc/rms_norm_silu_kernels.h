// RMS over the channels at each position, then SiLU, with the border that a convolution reads.
#pragma once

#include "capability.h"
#include "clip.h"

// out = silu(x / max(|x|, eps) * root * weight + bias), |x| over channels; rounded to x's type after each of these
// steps. weight and bias (C,) may be null.
OPENSORA_DECLARE_KERNEL(normalise_rms, const opensora::Clip& x, const float* weight, const float* bias, float eps,
                        float root, bool has_silu, const opensora::Border& border, const opensora::Clip& out)
