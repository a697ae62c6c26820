// Checks and shapes of variational_dropout, on any device.
#pragma once
#include "views.h"

namespace ulmfit_fast {

struct VariationalDropoutInputs {
  int64_t T, B, F;
  Tensor x, y;    // x with contiguous rows and y unwritten, as (B, T, F) or (T, B, F)
  Tensor result;  // y in x's shape

  VariationalDropoutInputs(const char* op, const char* name, const Tensor& x_in, const Tensor& seed, double p,
                           bool batch_first)
      : x(x_in), result(torch::stable::new_empty(x_in, x_in.sizes())) {
    check_probability(op, "p", p);
    dtype_of(op, name, x);
    ULMFIT_CHECK(x.dim() >= 2, op, name, " must have at least 2 dimensions, got shape ",
                 shape_text(x.sizes()));
    check_seed(op, seed, x);
    B = x.size(batch_first ? 0 : 1);
    T = x.size(batch_first ? 1 : 0);
    F = x.numel() == 0 ? 0 : x.numel() / (B * T);
    if (F == 0) return;
    // for the usual 3-D input the view is x itself, with its strides
    const int64_t flat[] = {x.size(0), x.size(1), F};
    x = with_contiguous_rows(x.dim() == 3 ? x : torch::stable::reshape(x, flat));
    y = torch::stable::view(result, flat);
  }
};

}  // namespace ulmfit_fast
