// Dropout masks from Philox: rows of kept / dropped, as 0 and 1/(1-p).
#pragma once
#include "storage.h"

ULMFIT_BEGIN

// Multiplies values[0..n) by the mask of elements first .. first + n; n is at most one group's rest.
template <class T>
inline void apply_mask_group(const Dropout& drop, uint64_t first, int n, T* values) {
  constexpr int L = lanes_of<T>;
  const uint64_t group = first / kMaskGroup;
  const int offset = static_cast<int>(first % kMaskGroup);
  alignas(64) uint32_t words[kMaskGroup];
  for (int lane = 0; lane < 16; lane += kLanes) {
    const uint64_t counter = group * 16 + lane;
    VU c0, c1 = VU{} + static_cast<uint32_t>(counter >> 32), c2 = {}, c3 = {};
    for (int l = 0; l < kLanes; ++l) c0[l] = static_cast<uint32_t>(counter) + l;  // no carry: 16 divides 2^32
    philox4x32_10(c0, c1, c2, c3, drop.key0, drop.key1);
    store(words + lane, c0);
    store(words + 16 + lane, c1);
    store(words + 32 + lane, c2);
    store(words + 48 + lane, c3);
  }
  const T scale = static_cast<T>(drop.scale);
  if (n == kMaskGroup) {
    if constexpr (L == kLanes) {
      for (int j = 0; j < kMaskGroup; j += L) {
        const VF kept = load(words + j) >= drop.threshold ? broadcast(scale) : VF{};
        store(values + j, load(values + j) * kept);
      }
      return;
    }
  }
  for (int j = 0; j < n; ++j) values[j] *= words[offset + j] >= drop.threshold ? scale : T(0);
}

// values[j] *= mask[first + j]
template <class T>
inline void apply_mask(const Dropout& drop, uint64_t first, int64_t n, T* values) {
  if (!drop.active()) return;
  while (n > 0) {
    const int64_t in_group = kMaskGroup - static_cast<int64_t>(first % kMaskGroup);
    const int count = static_cast<int>(n < in_group ? n : in_group);
    apply_mask_group(drop, first, count, values);
    first += count;
    values += count;
    n -= count;
  }
}

// The mask itself, n elements in `dtype`.
template <class T>
inline void dropout_mask_as(const Dropout& drop, int64_t n, DType dtype, void* out,
                            const Parallel& parallel) {
  constexpr int64_t kChunk = 32 * kMaskGroup;  // elements of a work item: fits the L1 cache, begins a group
  parallel((n + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
    alignas(64) T values[kChunk];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, count = n - first < kChunk ? n - first : kChunk;
      for (int64_t j = 0; j < kChunk; ++j) values[j] = T(1);
      apply_mask(drop, first, count, values);
      store_row(dtype, out, first, count, values);
    }
  });
}

inline void dropout_mask(uint64_t seed, double p, int64_t n, DType dtype, void* out,
                         const Parallel& parallel) {
  const Dropout drop(seed, p);
  if (dtype == DType::f64) return dropout_mask_as<double>(drop, n, dtype, out, parallel);
  dropout_mask_as<float>(drop, n, dtype, out, parallel);
}

ULMFIT_END
