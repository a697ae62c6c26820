// Concat pooling, [last, max, mean] over the first lengths[b]
// steps, in one pass over the sequence; and its gradient.
#pragma once
#include "storage.h"

ULMFIT_BEGIN

// Lane indices of the same width as T, so that a comparison of values selects among them.
template <class T>
using LaneIndex = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
constexpr int64_t kPoolColumns = 256;  // columns of a work item: its accumulators stay in the L1 cache

template <class T>
inline void concat_pool_as(const ConcatPool& a, void* pooled, int64_t* argmax, const Parallel& parallel) {
  using Index = LaneIndex<T>;
  constexpr int L = lanes_of<T>;
  const DType dtype = a.in.dtype;
  const int64_t blocks = ceil_div(a.H, kPoolColumns);

  parallel(a.B * blocks, [&](int64_t begin, int64_t end) {
    alignas(64) T largest[kPoolColumns], sum[kPoolColumns];
    alignas(64) Index where[kPoolColumns];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, column = item % blocks * kPoolColumns;
      const int64_t n = a.H - column < kPoolColumns ? a.H - column : kPoolColumns;
      const int64_t length = a.lengths == nullptr ? a.T : a.lengths[b];
      const int64_t last = b * 3 * a.H + column;  // in pooled; max and mean follow at +H and +2H
      for (int64_t j = 0; j < kPoolColumns; ++j) sum[j] = largest[j] = T(0), where[j] = -1;
      for (int64_t t = 0; t < length; ++t) {
        const void* row = a.in.row(t, b);
        const auto take = [&](int64_t j, int lanes) {
          const Vec<T> value = load_as<T>(dtype, row, column + j, lanes);
          const Vec<T> best = load(largest + j);
          const Vec<Index> at = load(where + j);
          // the first of equal steps stays; NaN wins over numbers, as in torch
          const Vec<Index> better = (value > best) | ((value != value) & (best == best)) | (at < 0);
          store(largest + j, better ? value : best);
          store(where + j, better ? Vec<Index>{} + static_cast<Index>(t) : at);
          store(sum + j, load(sum + j) + value);
          if (t + 1 == length) store_as<T>(dtype, pooled, last + j, value, lanes);
        };
        int64_t j = 0;
        for (; j + L <= n; j += L) take(j, L);  // a constant number of lanes: no partial loads
        if (j < n) take(j, static_cast<int>(n - j));
      }
      if (length == 0) store_row(dtype, pooled, last, n, sum);
      const T count = static_cast<T>(length > 0 ? length : 1);
      for (int64_t j = 0; j < n; ++j) sum[j] /= count;
      store_row(dtype, pooled, last + a.H, n, largest);
      store_row(dtype, pooled, last + 2 * a.H, n, sum);
      for (int64_t j = 0; j < n; ++j) argmax[b * a.H + column + j] = where[j];
    }
  });
}

// Every element of the gradient is written once: the mean's share, plus the maximum's and the last step's
// where they are.
template <class T>
inline void concat_pool_backward_as(const ConcatPool& a, Matrix dpooled, const int64_t* argmax,
                                    const Parallel& parallel) {
  using Index = LaneIndex<T>;
  constexpr int L = lanes_of<T>;
  constexpr int64_t kTime = 64;  // steps of a work item
  const DType dtype = dpooled.dtype;
  const int64_t blocks = ceil_div(a.T, kTime);

  parallel(a.B * blocks, [&](int64_t begin, int64_t end) {
    alignas(64) T of_last[kPoolColumns], of_max[kPoolColumns], of_mean[kPoolColumns], sum[kPoolColumns];
    alignas(64) Index where[kPoolColumns];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, t0 = item % blocks * kTime, t1 = t0 + kTime < a.T ? t0 + kTime : a.T;
      const int64_t length = a.lengths == nullptr ? a.T : a.lengths[b];
      const T count = static_cast<T>(length > 0 ? length : 1);
      for (int64_t column = 0; column < a.H; column += kPoolColumns) {
        const int64_t n = a.H - column < kPoolColumns ? a.H - column : kPoolColumns;
        load_row(dtype, dpooled.row(b), column, n, of_last);
        load_row(dtype, dpooled.row(b), a.H + column, n, of_max);
        load_row(dtype, dpooled.row(b), 2 * a.H + column, n, of_mean);
        for (int64_t j = 0; j < n; ++j) {
          of_mean[j] /= count;
          where[j] = static_cast<Index>(argmax[b * a.H + column + j]);
        }
        for (int64_t t = t0; t < t1; ++t) {
          for (int64_t j = 0; j < n; j += L) {
            const Vec<Index> here = load(where + j) == static_cast<Index>(t);
            Vec<T> d = load(of_mean + j) + (here ? load(of_max + j) : Vec<T>{});
            if (t == length - 1) d += load(of_last + j);
            store(sum + j, t < length ? d : Vec<T>{});
          }
          store_row(dtype, a.in.row(t, b), column, n, sum);
        }
      }
    }
  });
}

inline void concat_pool(const ConcatPool& a, void* pooled, int64_t* argmax, const Parallel& parallel) {
  if (a.in.dtype == DType::f64) return concat_pool_as<double>(a, pooled, argmax, parallel);
  concat_pool_as<float>(a, pooled, argmax, parallel);
}

inline void concat_pool_backward(const ConcatPool& a, Matrix dpooled, const int64_t* argmax,
                                 const Parallel& parallel) {
  if (dpooled.dtype == DType::f64) return concat_pool_backward_as<double>(a, dpooled, argmax, parallel);
  concat_pool_backward_as<float>(a, dpooled, argmax, parallel);
}

ULMFIT_END
