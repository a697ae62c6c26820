// Checks and shapes of embedding_dropout, on any device.
#pragma once
#include <vector>

#include "views.h"

namespace ulmfit_fast {

// first: weight (V, E) or dy (*ids, E). That each id is in 0..V-1 is for the device to check.
inline void check_embedding(const char* op, const char* name, const Tensor& first, const Tensor& ids,
                            const Tensor& seed, double p, int64_t padding_idx, int64_t words) {
  dtype_of(op, name, first);
  check_probability(op, "p", p);
  check_device(op, "ids", ids, first);
  check_dtype(op, "ids", ids, ScalarType::Long);
  ULMFIT_CHECK(padding_idx >= -1 && padding_idx < words, op, "padding_idx must be -1 (none) or in 0..",
               words - 1, ", got ", padding_idx);
  check_seed(op, seed, first);
}

inline void check_embedding_gradient(const char* op, const Tensor& dy, const Tensor& ids, int64_t words) {
  ULMFIT_CHECK(dy.dim() == ids.dim() + 1, op, "dy must have the shape of ids and one more dimension, got ",
               shape_text(dy.sizes()), " for ids of shape ", shape_text(ids.sizes()));
  for (int64_t i = 0; i < ids.dim(); ++i) {
    ULMFIT_CHECK(dy.size(i) == ids.size(i), op, "dy must begin with the shape of ids, ",
                 shape_text(ids.sizes()), ", got ", shape_text(dy.sizes()));
  }
  ULMFIT_CHECK(words >= 0, op, "num_embeddings must be >= 0, got ", words);
}

// (*ids, E)
inline Tensor empty_rows(const Tensor& weight, const Tensor& ids) {
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(weight.size(1));
  return torch::stable::new_empty(weight, shape);
}

}  // namespace ulmfit_fast
