// How the kernels of every device see a tensor: a pointer, a dtype, strides. Nothing here knows torch.
#pragma once
#include <cstdint>

namespace ulmfit_fast {

enum class DType : int { f32, f64, bf16, f16 };
inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// A matrix stored in `dtype`: row r starts at data + r * stride elements, its columns are contiguous.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
  const void* row(int64_t r) const { return static_cast<const char*>(data) + r * stride * size_of(dtype); }
};
// A (T, B, width) tensor in either layout: only the last dimension has to be contiguous.
struct Sequence {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_t = 0, stride_b = 0;
  void* row(int64_t t, int64_t b) const {
    return static_cast<char*>(data) + (t * stride_t + b * stride_b) * size_of(dtype);
  }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hidden units that the saved gates and cells have room for: whole vectors, whatever the instruction set.
constexpr int64_t padded_units(int64_t H) { return round_up(H, 16); }

}  // namespace ulmfit_fast
