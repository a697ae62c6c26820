// Dropout masks from Philox: rows of kept / dropped, as 0 and 1/(1-p).
#pragma once
#include "storage.h"

ULMFIT_BEGIN

// The random words of a group's elements, in their order.
constexpr int kMaskVectors = kMaskGroup / kLanes;
inline void mask_words(const Dropout& drop, uint64_t group, VU (&words)[kMaskVectors]) {
  constexpr int kHalves = 16 / kLanes;
  VU lanes = {};
  for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<uint32_t>(l);
  for (int half = 0; half < kHalves; ++half) {
    const uint64_t counter = group * 16 + half * kLanes;
    VU c0 = lanes + static_cast<uint32_t>(counter);  // no carry: 16 divides 2^32
    VU c1 = VU{} + static_cast<uint32_t>(counter >> 32), c2 = {}, c3 = {};
    philox4x32_10(c0, c1, c2, c3, drop.key0, drop.key1);
    words[half] = c0;
    words[half + kHalves] = c1;
    words[half + 2 * kHalves] = c2;
    words[half + 3 * kHalves] = c3;
  }
}

// Multiplies values[0..n) by the mask of elements first .. first + n; n is at most one group's rest.
template <class T>
inline void apply_mask_group(const Dropout& drop, uint64_t first, int n, T* values) {
  VU words[kMaskVectors];
  mask_words(drop, first / kMaskGroup, words);
  const T scale = static_cast<T>(drop.scale);
  if (n == kMaskGroup) {
    if constexpr (std::is_same_v<T, float>) {
      for (int i = 0; i < kMaskVectors; ++i) {
        const VF kept = words[i] >= drop.threshold ? broadcast(scale) : VF{};
        store(values + i * kLanes, load(values + i * kLanes) * kept);
      }
      return;
    }
  }
  alignas(64) uint32_t word[kMaskGroup];
  for (int i = 0; i < kMaskVectors; ++i) store(word + i * kLanes, words[i]);
  const int offset = static_cast<int>(first % kMaskGroup);
  for (int j = 0; j < n; ++j) values[j] *= word[offset + j] >= drop.threshold ? scale : T(0);
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
  constexpr int64_t kChunk = 32 * kMaskGroup;  // elements of a work item
  parallel((n + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kChunk; first < end * kChunk && first < n; first += kMaskGroup) {
      alignas(64) T values[kMaskGroup];
      for (T& value : values) value = T(1);
      const int count = static_cast<int>(n - first < kMaskGroup ? n - first : kMaskGroup);
      apply_mask_group(drop, static_cast<uint64_t>(first), count, values);
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
