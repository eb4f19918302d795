// What a library was built with, as a text in its file: the doctor has to say it also of a library that does not load.
// For one source file of each library.
#pragma once

#include <torch/headeronly/version.h>

#define OPENSORA_TEXT_OF(...) #__VA_ARGS__
#define OPENSORA_TEXT(...) OPENSORA_TEXT_OF(__VA_ARGS__)
#define OPENSORA_DOTTED(major, minor, patch) OPENSORA_TEXT(major) "." OPENSORA_TEXT(minor) "." OPENSORA_TEXT(patch)

__attribute__((used)) static const char opensora_build_facts[] =
    "opensora_kernels build facts: version=" OPENSORA_VERSION "; torch ABI=" OPENSORA_TEXT(TORCH_TARGET_VERSION)
    "; torch headers=" OPENSORA_DOTTED(TORCH_VERSION_MAJOR, TORCH_VERSION_MINOR, TORCH_VERSION_PATCH)
    "; compiler="
#ifdef __clang__
    "Clang " __clang_version__
#else
    "GCC " __VERSION__
#endif
#ifdef __CUDACC__
    "; nvcc=" OPENSORA_DOTTED(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, __CUDACC_VER_BUILD__)
    "; architectures=" OPENSORA_ARCHITECTURES
#endif
    ;
