// Dropout masks from Philox: rows of kept / dropped, as 0 and 1/(1-p).
#pragma once
#include "storage.h"

ULMFIT_BEGIN

// The random words of a group's elements, in their order.
constexpr int kMaskVectors = kMaskGroup / kLanes;
ULMFIT_HD void mask_words(const Dropout& drop, uint64_t group, VU (&words)[kMaskVectors]) {
  constexpr int kParts = 16 / kLanes;
  VW even = {};
  for (int l = 0; l < kLanes / 2; ++l) even[l] = static_cast<uint64_t>(2 * l);
  for (int part = 0; part < kParts; ++part) {
    const uint64_t counter = group * 16 + part * kLanes;
    const VW high = VW{} + (counter >> 32);
    Words c0 = {even + counter, even + (counter + 1)}, c1 = {high, high}, c2 = {}, c3 = {};
    philox4x32_10(c0, c1, c2, c3, drop.key0, drop.key1);
    words[part] = in_order(c0);
    words[part + kParts] = in_order(c1);
    words[part + 2 * kParts] = in_order(c2);
    words[part + 3 * kParts] = in_order(c3);
  }
}

// Multiplies values[0..n) by the mask of elements first .. first + n; n is at most one group's rest.
template <class T>
inline void apply_mask_group(const Dropout& drop, uint64_t first, int n, T* values) {
  VU words[kMaskVectors];
  mask_words(drop, first / kMaskGroup, words);
  const T scale = static_cast<T>(drop.scale);
  if constexpr (std::is_same_v<T, float>) {
    if (n == kMaskGroup) {
      for (int i = 0; i < kMaskVectors; ++i) {
        const VF factor = words[i] >= drop.threshold ? broadcast(scale) : VF{};
        store(values + i * kLanes, load(values + i * kLanes) * factor);
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
  uint32_t scale = 0;                          // as it is stored; for doubles the loop below does not need it
  if (dtype != DType::f64) store_as<float>(dtype, &scale, 0, broadcast(static_cast<float>(drop.scale)), 1);
  parallel(ceil_div(n, kChunk), [&](int64_t begin, int64_t end) {
    const Dropout own = drop;  // no store can change it, so that what rounds add to its keys is kept
    const VU kept = VU{} + scale;
    int64_t first = begin * kChunk;
    const int64_t last = end * kChunk < n ? end * kChunk : n;
    for (; std::is_same_v<T, float> && last - first >= kMaskGroup; first += kMaskGroup) {
      VU words[kMaskVectors];
      mask_words(own, static_cast<uint64_t>(first) / kMaskGroup, words);
      for (int i = 0; i < kMaskVectors; ++i) {
        const VU value = words[i] >= own.threshold ? kept : VU{};
        if (dtype == DType::f32) {
          store(static_cast<uint32_t*>(out) + first + i * kLanes, value);
        } else {
          store_halves(static_cast<uint16_t*>(out) + first + i * kLanes, narrowed(value), kLanes);
        }
      }
    }
    for (; first < last; first += kMaskGroup) {
      alignas(64) T values[kMaskGroup];
      for (T& value : values) value = T(1);
      const int count = static_cast<int>(last - first < kMaskGroup ? last - first : kMaskGroup);
      apply_mask_group(own, static_cast<uint64_t>(first), count, values);
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
