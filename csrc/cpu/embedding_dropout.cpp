#include <vector>

#include "glue.h"

namespace ulmfit_fast {
namespace {

// ids: contiguous.
EmbeddingDropout arguments(const char* op, const Tensor& ids, const Tensor& seed, double p,
                           int64_t padding_idx, int64_t words, int64_t width, DType dtype) {
  check_probability(op, "p", p);
  check_cpu(op, "ids", ids);
  check_dtype(op, "ids", ids, ScalarType::Long);
  check_range(op, "ids", ids_of(ids), ids.numel(), 0, words);
  ULMFIT_CHECK(padding_idx >= -1 && padding_idx < words, op, "padding_idx must be -1 (none) or in 0..",
               words - 1, ", got ", padding_idx);
  return {ids.numel(), words, width, ids_of(ids), padding_idx, seed_of(op, seed), p, dtype};
}

Tensor embedding_dropout(const Tensor& weight, const Tensor& ids, const Tensor& seed, double p,
                         int64_t padding_idx) {
  constexpr const char* op = "embedding_dropout";
  check_cpu(op, "weight", weight);
  check_dim(op, "weight", weight, 2);
  const DType dtype = dtype_of(op, "weight", weight);
  const Tensor table = torch::stable::contiguous(weight), positions = torch::stable::contiguous(ids);
  const EmbeddingDropout a =
      arguments(op, positions, seed, p, padding_idx, weight.size(0), weight.size(1), dtype);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(a.E);
  Tensor y = torch::stable::new_empty(weight, shape);
  if (y.numel() > 0) kernels().embedding_dropout(a, data_of(table), data_of(y), torch_pool());
  return y;
}

Tensor embedding_dropout_backward(const Tensor& dy, const Tensor& ids, const Tensor& seed, double p,
                                  int64_t padding_idx, int64_t num_embeddings) {
  constexpr const char* op = "embedding_dropout_backward";
  check_cpu(op, "dy", dy);
  ULMFIT_CHECK(dy.dim() == ids.dim() + 1, op, "dy must have the shape of ids and one more dimension, got ",
               shape_text(dy.sizes()), " for ids of shape ", shape_text(ids.sizes()));
  for (int64_t i = 0; i < ids.dim(); ++i) {
    ULMFIT_CHECK(dy.size(i) == ids.size(i), op, "dy must begin with the shape of ids, ",
                 shape_text(ids.sizes()), ", got ", shape_text(dy.sizes()));
  }
  ULMFIT_CHECK(num_embeddings >= 0, op, "num_embeddings must be >= 0, got ", num_embeddings);
  const int64_t width = dy.size(dy.dim() - 1);
  const Tensor gradient = torch::stable::contiguous(dy), positions = torch::stable::contiguous(ids);
  const EmbeddingDropout a =
      arguments(op, positions, seed, p, padding_idx, num_embeddings, width, dtype_of(op, "dy", dy));
  const int64_t shape[] = {num_embeddings, width};
  Tensor dweight = torch::stable::new_empty(dy, shape);
  if (dweight.numel() > 0) {
    kernels().embedding_dropout_backward(a, data_of(gradient), data_of(dweight), torch_pool());
  }
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("embedding_dropout", TORCH_BOX(&embedding_dropout));
  m.impl("embedding_dropout_backward", TORCH_BOX(&embedding_dropout_backward));
}

}  // namespace ulmfit_fast
