// Embedding lookup with whole rows of the vocabulary dropped. Only the rows
// that occur are read; a row's mask element is recomputed at each occurrence,
// which costs one call of Philox, twenty multiplications, against a row of
// hundreds of floats.
#pragma once
#include "storage.h"

ULMFIT_BEGIN

template <class T>
inline void embedding_dropout_as(const EmbeddingDropout& a, const void* weight, void* out,
                                 const Parallel& parallel) {
  constexpr int64_t kRows = 16;  // positions of a work item
  constexpr int L = lanes_of<T>;
  const Dropout drop(a.seed, a.p);
  parallel(ceil_div(a.n, kRows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kRows; i < end * kRows && i < a.n; ++i) {
      const int64_t from = a.ids[i] * a.E, to = i * a.E;
      const T scale = drop.factor<T>(a.ids[i]);
      int64_t j = 0;
      for (; j + L <= a.E; j += L) {
        store_as<T>(a.dtype, out, to + j, load_as<T>(a.dtype, weight, from + j, L) * scale, L);
      }
      if (const int rest = static_cast<int>(a.E - j)) {
        store_as<T>(a.dtype, out, to + j, load_as<T>(a.dtype, weight, from + j, rest) * scale, rest);
      }
    }
  });
}

// dweight, dense and written once: each row sums the gradients of its positions in their order, so the result
// does not depend on how rows are shared out. Sums are float for the 16-bit types.
template <class T>
inline void embedding_dropout_backward_as(const EmbeddingDropout& a, const void* dy, void* dweight,
                                          const Parallel& parallel) {
  constexpr int64_t kRows = 64, kColumns = 1024;  // vocabulary rows of a work item; columns summed at a time
  constexpr int L = lanes_of<T>;
  const Dropout drop(a.seed, a.p);

  // counting sort, stable: positions[first[v] .. first[v + 1]) hold word v, in ascending order
  const Scratch<int64_t> first(a.V + 2), positions(a.n);
  for (int64_t v = 0; v < a.V + 2; ++v) first[v] = 0;
  for (int64_t i = 0; i < a.n; ++i) ++first[a.ids[i] + 2];
  for (int64_t v = 2; v < a.V + 2; ++v) first[v] += first[v - 1];
  for (int64_t i = 0; i < a.n; ++i) positions[first[a.ids[i] + 1]++] = i;

  parallel(ceil_div(a.V, kRows), [&](int64_t begin, int64_t end) {
    alignas(64) T sum[kColumns];
    for (int64_t v = begin * kRows; v < end * kRows && v < a.V; ++v) {
      const T scale = v == a.padding_idx || first[v] == first[v + 1] ? T(0) : drop.factor<T>(v);
      for (int64_t column = 0; column < a.E; column += kColumns) {
        const int64_t n = a.E - column < kColumns ? a.E - column : kColumns;
        for (int64_t j = 0; j < kColumns; ++j) sum[j] = T(0);
        for (int64_t k = first[v]; scale != T(0) && k < first[v + 1]; ++k) {
          const int64_t from = positions[k] * a.E + column;
          int64_t j = 0;
          for (; j + L <= n; j += L)
            store(sum + j, load(sum + j) + load_as<T>(a.dtype, dy, from + j, L) * scale);
          if (const int rest = static_cast<int>(n - j)) {
            store_n(sum + j, load(sum + j) + load_as<T>(a.dtype, dy, from + j, rest) * scale, rest);
          }
        }
        store_row(a.dtype, dweight, v * a.E + column, n, sum);
      }
    }
  });
}

inline void embedding_dropout(const EmbeddingDropout& a, const void* weight, void* out,
                              const Parallel& parallel) {
  if (a.dtype == DType::f64) return embedding_dropout_as<double>(a, weight, out, parallel);
  embedding_dropout_as<float>(a, weight, out, parallel);
}

inline void embedding_dropout_backward(const EmbeddingDropout& a, const void* dy, void* dweight,
                                       const Parallel& parallel) {
  if (a.dtype == DType::f64) return embedding_dropout_backward_as<double>(a, dy, dweight, parallel);
  embedding_dropout_backward_as<float>(a, dy, dweight, parallel);
}

ULMFIT_END
