// The schemas of the operators that the CUDA library implements. They are defined in the CPU library, which loads
// everywhere, so that a machine without a GPU can check that Python's calls fit them.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(opensora_kernels, library) {
  library.def("smoke(Tensor x) -> Tensor");
}
