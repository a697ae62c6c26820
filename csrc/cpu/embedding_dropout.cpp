#include "../embedding_dropout_inputs.h"
#include "glue.h"

namespace ulmfit_fast {
namespace {

// ids: contiguous.
EmbeddingDropout arguments(const char* op, const Tensor& ids, const Tensor& seed, double p,
                           int64_t padding_idx, int64_t words, int64_t width, DType dtype) {
  check_range(op, "ids", ids_of(ids), ids.numel(), 0, words);
  return {ids.numel(), words, width, ids_of(ids), padding_idx, seed_of(seed), p, dtype};
}

Tensor embedding_dropout(const Tensor& weight, const Tensor& ids, const Tensor& seed, double p,
                         int64_t padding_idx) {
  constexpr const char* op = "embedding_dropout";
  check_dim(op, "weight", weight, 2);
  check_embedding(op, "weight", weight, ids, seed, p, padding_idx, weight.size(0));
  const Tensor table = torch::stable::contiguous(weight), positions = torch::stable::contiguous(ids);
  const EmbeddingDropout a = arguments(op, positions, seed, p, padding_idx, weight.size(0), weight.size(1),
                                       dtype_of(op, "weight", weight));
  const Tensor y = empty_rows(weight, ids);
  if (y.numel() > 0) kernels().embedding_dropout(a, data_of(table), data_of(y), torch_pool());
  return y;
}

Tensor embedding_dropout_backward(const Tensor& dy, const Tensor& ids, const Tensor& seed, double p,
                                  int64_t padding_idx, int64_t num_embeddings) {
  constexpr const char* op = "embedding_dropout_backward";
  check_embedding_gradient(op, dy, ids, num_embeddings);
  check_embedding(op, "dy", dy, ids, seed, p, padding_idx, num_embeddings);
  const int64_t width = dy.size(dy.dim() - 1);
  const Tensor gradient = torch::stable::contiguous(dy), positions = torch::stable::contiguous(ids);
  const EmbeddingDropout a =
      arguments(op, positions, seed, p, padding_idx, num_embeddings, width, dtype_of(op, "dy", dy));
  const Tensor dweight = lent(dy, {num_embeddings, width}, dy.scalar_type());
  if (dweight.numel() > 0)
    kernels().embedding_dropout_backward(a, data_of(gradient), data_of(dweight), torch_pool());
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, CPU, m) {
  m.impl("embedding_dropout", TORCH_BOX(&embedding_dropout));
  m.impl("embedding_dropout_backward", TORCH_BOX(&embedding_dropout_backward));
}

}  // namespace ulmfit_fast
