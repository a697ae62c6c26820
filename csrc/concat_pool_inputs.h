// Checks and results of concat_pool, on any device. That each length is in 0..T is for the device to check.
#pragma once
#include "views.h"

namespace ulmfit_fast {

struct ConcatPoolInputs {
  Tensor out, lengths;    // out (B, T, H) with contiguous rows
  Tensor pooled, argmax;  // unwritten
  int64_t B, T, H;

  ConcatPoolInputs(const char* op, const Tensor& out_in, const Tensor& lengths_in) {
    check_dim(op, "out", out_in, 3);
    dtype_of(op, "out", out_in);
    B = out_in.size(0), T = out_in.size(1), H = out_in.size(2);
    ULMFIT_CHECK(T < INT32_MAX, op, "out must have fewer than 2^31 - 1 time steps, got ", T);
    check_lengths(op, lengths_in, B, out_in);
    out = with_contiguous_rows(out_in);
    lengths = torch::stable::contiguous(lengths_in);
    pooled = empty_like(out, {B, 3 * H});
    argmax = empty_like(lengths, {B, H});
  }
};

struct ConcatPoolGradients {
  Tensor dpooled, lengths, argmax;  // contiguous
  Tensor dout;                      // unwritten
  int64_t B, T, H;

  ConcatPoolGradients(const char* op, const Tensor& dpooled_in, const Tensor& lengths_in,
                      const Tensor& argmax_in, int64_t time)
      : T(time) {
    dtype_of(op, "dpooled", dpooled_in);
    check_device(op, "argmax", argmax_in, dpooled_in);
    check_dtype(op, "argmax", argmax_in, ScalarType::Long);
    check_dim(op, "argmax", argmax_in, 2);
    B = argmax_in.size(0), H = argmax_in.size(1);
    check_shape(op, "dpooled", dpooled_in, {B, 3 * H});
    ULMFIT_CHECK(time >= 0 && time < INT32_MAX, op, "time must be in 0..2^31 - 2, got ", time);
    check_lengths(op, lengths_in, B, dpooled_in);
    dpooled = torch::stable::contiguous(dpooled_in);
    lengths = torch::stable::contiguous(lengths_in);
    argmax = torch::stable::contiguous(argmax_in);
    dout = empty_like(dpooled, {B, T, H});
  }
};

}  // namespace ulmfit_fast
