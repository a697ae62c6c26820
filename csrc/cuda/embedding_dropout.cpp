#include <tuple>

#include "../embedding_dropout_inputs.h"
#include "glue.h"

namespace ulmfit_fast::cuda {
namespace {

Tensor embedding_dropout_op(const Tensor& weight, const Tensor& ids, const Tensor& seed, double p,
                            int64_t padding_idx) {
  constexpr const char* op = "embedding_dropout";
  check_dim(op, "weight", weight, 2);
  check_embedding(op, "weight", weight, ids, seed, p, padding_idx, weight.size(0));
  const Device device(weight);
  const Tensor table = torch::stable::contiguous(weight), positions = torch::stable::contiguous(ids);
  const Tensor y = empty_rows(weight, ids);
  const EmbeddingDropout a = {ids.numel(),       weight.size(0),   weight.size(1),
                              ids_of(positions), mask_of(seed, p), dtype_of(op, "weight", weight)};
  if (y.numel() > 0) embedding_dropout(a, data_of(table), data_of(y), device.stream);
  return y;
}

// (sorted ids, where each stood): equal ids keep their order, so that a word's gradient is summed in the
// order of its positions, always the same.
std::tuple<Tensor, Tensor> sorted(const Tensor& ids) {
  using torch::stable::detail::from;
  const int64_t flat[] = {ids.numel()};
  std::array<StableIValue, 4> stack{from(torch::stable::reshape(ids, flat)), from(std::optional<bool>(true)),
                                    from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor embedding_dropout_backward_op(const Tensor& dy, const Tensor& ids, const Tensor& seed, double p,
                                     int64_t padding_idx, int64_t num_embeddings) {
  constexpr const char* op = "embedding_dropout_backward";
  check_embedding_gradient(op, dy, ids, num_embeddings);
  check_embedding(op, "dy", dy, ids, seed, p, padding_idx, num_embeddings);
  const Device device(dy);
  const int64_t width = dy.size(dy.dim() - 1), shape[] = {num_embeddings, width};
  const Tensor dweight = torch::stable::new_zeros(dy, shape);
  if (dy.numel() == 0 || dweight.numel() == 0) return dweight;
  const Tensor gradient = torch::stable::contiguous(dy);
  const auto [words, order] = sorted(ids);
  const EmbeddingDropout a = {ids.numel(),   num_embeddings,   width,
                              ids_of(words), mask_of(seed, p), dtype_of(op, "dy", dy)};
  embedding_dropout_backward(a, padding_idx, ids_of(order), data_of(gradient), data_of(dweight),
                             device.stream);
  return dweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, ULMFIT_CUDA_KEY, m) {
  m.impl("embedding_dropout", TORCH_BOX(&embedding_dropout_op));
  m.impl("embedding_dropout_backward", TORCH_BOX(&embedding_dropout_backward_op));
}

}  // namespace ulmfit_fast::cuda
