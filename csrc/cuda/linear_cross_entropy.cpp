#include "../linear_cross_entropy_inputs.h"

#include <algorithm>

#include "glue.h"

namespace ulmfit_fast::cuda {
namespace {

constexpr int64_t kLogitsBytes = int64_t{1} << 30;  // of a chunk, unless the caller says how many rows
constexpr int64_t kAlign = 8;  // columns: 16-bit rows begin at 16 bytes, which products and kernels want

int64_t padded(int64_t columns) { return (columns + kAlign - 1) / kAlign * kAlign; }

Tensor columns_of(const Tensor& t, int64_t n) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 1, 0, n);
}
Tensor rows_of(const Tensor& t, int64_t first, int64_t n) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, n);
}

// Logits of a chunk of rows, which become their own gradient; the products are torch's. With a bias the
// products are those of [h | 1] and [weight | bias].
class Pass {
 public:
  Pass(const LinearCrossEntropyInputs& in, int64_t chunk_rows, const Tensor* row_gradient, bool need_dw)
      : in(in),
        row_gradient(row_gradient),
        need_dw(row_gradient != nullptr && need_dw),
        out(in, row_gradient != nullptr, need_dw),
        device(in.h),
        dtype(dtype_of(in.op, "h", in.h)),
        width(in.bias.has_value() ? padded(in.E + 1) : in.E) {
    ULMFIT_CHECK(chunk_rows >= 0, in.op, "chunk_rows must be at least 1, or 0 (chosen here), got ",
                 chunk_rows);
    // A row's logits, or what is larger for a small vocabulary: its 16-bit dh before it is rounded.
    const int64_t row_bytes = std::max(padded(in.V) * size_of(dtype), size_of(dtype) == 2 ? 4 * in.E : 0);
    if (chunk_rows == 0) chunk_rows = even_chunk(kLogitsBytes / row_bytes);
    chunk = std::max<int64_t>(1, std::min(chunk_rows, in.N));
  }

  LinearCrossEntropyResults run() {
    weight = operand(in.weight, "weight", in.bias_data());
    h = operand(in.h, "h", nullptr);
    logits = empty_like(in.h, {std::min(chunk, in.N), padded(in.V)});
    for (int64_t first = 0; first < in.N; first += chunk) {
      const int64_t rows = std::min(chunk, in.N - first);
      Tensor part = columns_of(rows_of(logits, 0, rows), in.V);
      const Tensor h_rows = rows_of(h, first, rows);
      multiply(h_rows, transposed(weight), part);
      softmax(part, first, rows);
      if (row_gradient != nullptr) input_gradient(part, rows_of(out.dh, first, rows));
      if (need_dw) weight_gradient(part, h_rows, first == 0);
    }
    if (need_dw) store_weight_gradient();
    return out;
  }

 private:
  // Rows of even chunks, an eighth more than `rows` at most. Each chunk reads the weight twice and adds to
  // its gradient, so a few rows too many are not worth one of their own.
  int64_t even_chunk(int64_t rows) const {
    const int64_t most = std::max<int64_t>(1, rows + rows / 8), chunks = (in.N + most - 1) / most;
    return chunks > 0 ? (in.N + chunks - 1) / chunks : 1;
  }

  // h or weight in h's dtype, with the bias (nullptr: ones) as another column where there is one.
  Tensor operand(const Tensor& t, const char* name, const void* column) const {
    const ScalarType type = in.h.scalar_type();
    if (!in.bias.has_value() && t.scalar_type() == type) return t;
    const Tensor result = empty_like(t, {t.size(0), width}, type);
    const Matrix from = matrix_of(in.op, name, t);
    if (in.bias.has_value()) {
      append_column(from, t.size(0), in.E, column, dtype, data_of(result), width, device.stream);
    } else {
      masked_copy(in.op, from, t.size(0), in.E, Mask(), dtype, data_of(result), device.stream);
    }
    return result;
  }

  void softmax(const Tensor& part, int64_t first, int64_t rows) const {
    const auto from_row = [&](const Tensor& t) { return data_of(rows_of(t, first, rows)); };
    CrossEntropy a;
    a.rows = rows;
    a.V = in.V;
    a.stride = padded(in.V);
    a.dtype = dtype;
    a.logits = data_of(part);
    a.target = static_cast<const int64_t*>(from_row(in.target));
    a.ignore_index = in.ignore_index;
    a.label_smoothing = in.label_smoothing;
    a.row_gradient = row_gradient == nullptr ? nullptr : from_row(*row_gradient);
    a.loss = from_row(out.loss);
    cross_entropy(a, device.stream);
  }

  // dh = part @ weight, a sum over the whole vocabulary: in fp32 wherever the library cuts it into pieces.
  void input_gradient(const Tensor& part, Tensor dh) const {
    const Tensor w = columns_of(weight, in.E);
    if (size_of(dtype) > 2) return multiply(part, w, dh);
    const Tensor sums = product(part, w, compute_type(in.h));
    masked_copy(in.op, matrix_of(in.op, "h", sums), dh.size(0), in.E, Mask(), dtype, data_of(dh),
                device.stream);
  }

  // dw (V, width) += part^T @ h, in fp32 where several chunks are summed
  void weight_gradient(const Tensor& part, const Tensor& h_rows, bool first) {
    const ScalarType type = chunk < in.N ? compute_type(in.h) : in.weight.scalar_type();
    if (first && !in.bias.has_value() && out.dweight.scalar_type() == type) {
      dw = out.dweight;  // no bias to split off, no cast: the result itself
      return multiply(transposed(part), h_rows, dw);
    }
    const Tensor product = cuda::product(transposed(part), h_rows, type);
    if (first) {
      dw = product;
    } else {
      add(in.op, data_of(dw), data_of(product), dtype_of(in.op, "weight", dw), dtype_of(in.op, "weight", dw),
          dw.numel(), data_of(dw), device.stream);
    }
  }

  void store_weight_gradient() const {
    const DType type = dtype_of(in.op, "weight", in.weight);
    if (in.N == 0) {
      Tensor dweight = out.dweight, dbias = out.dbias;
      torch::stable::zero_(dweight);
      torch::stable::zero_(dbias);
    } else if (in.bias.has_value()) {
      split_column(matrix_of(in.op, "weight", dw), in.V, in.E, type, data_of(out.dweight), data_of(out.dbias),
                   device.stream);
    } else if (data_of(dw) != data_of(out.dweight)) {
      masked_copy(in.op, matrix_of(in.op, "weight", dw), in.V, in.E, Mask(), type, data_of(out.dweight),
                  device.stream);
    }
  }

  const LinearCrossEntropyInputs& in;
  const Tensor* row_gradient;
  const bool need_dw;  // dweight and dbias are wanted
  LinearCrossEntropyResults out;
  const Device device;
  const DType dtype;
  const int64_t width;
  int64_t chunk;
  Tensor weight, h, logits, dw;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_op(const Tensor& h, const Tensor& weight,
                                                                   const OptionalTensor& bias,
                                                                   const Tensor& target, int64_t ignore_index,
                                                                   double label_smoothing, int64_t reduction,
                                                                   bool high, bool grad, bool need_dw,
                                                                   int64_t chunk_rows) {
  const LinearCrossEntropyInputs in("linear_cross_entropy", h, weight, bias, target, ignore_index,
                                    label_smoothing);
  check_reduction(in.op, reduction, grad);
  Tensor ones = empty_like(h, {grad ? in.N : 0}, compute_type(h));
  torch::stable::fill_(ones, 1.0);
  const auto out = Pass(in, chunk_rows, grad ? &ones : nullptr, need_dw).run();
  return {reduction == kSum ? torch::stable::sum(out.loss) : out.loss, out.dh, out.dweight, out.dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_op(
    const Tensor& dloss, const Tensor& h, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& target, int64_t ignore_index, double label_smoothing, bool high, bool need_dw,
    int64_t chunk_rows) {
  const LinearCrossEntropyInputs in("linear_cross_entropy_backward", h, weight, bias, target, ignore_index,
                                    label_smoothing);
  const Tensor upstream = checked_row_gradient(in, dloss);
  const auto out = Pass(in, chunk_rows, &upstream, need_dw).run();
  return {out.dh, out.dweight, out.dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ulmfit_fast, ULMFIT_CUDA_KEY, m) {
  m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy_op));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&linear_cross_entropy_backward_op));
}

}  // namespace ulmfit_fast::cuda
