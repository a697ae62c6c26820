// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") -> dropout masks.
//
// A mask is a pure function of (seed, element index, p), so it is never stored:
// forward and backward, every ISA, every thread count and every device compute
// the same bits. The one definition, for element e of a flat row-major tensor:
//
//   group g = e / 64, r = e % 64, lane = r % 16, word = r / 16
//   counter = g * 16 + lane (64 bits in c0, c1; c2 = c3 = 0), key = seed (low word, high word)
//   dropped  iff  philox(counter, key)[word] < floor(p * 2^32);    kept elements are scaled by 1 / (1 - p)
//
// 16 consecutive counters fill one AVX-512 register, and their four output
// words are then four runs of 16 consecutive elements: no shuffle is needed,
// and narrower machines take the same counters in two or four parts.
#pragma once
#include <cstdint>

#include "isa_namespace.h"

ULMFIT_BEGIN

constexpr int kMaskGroup = 64;  // elements that one run of 16 counters covers

// 32 x 32 -> 64 bit product, in halves. The SIMD wrapper
// declares it for vectors before it includes this file.
ULMFIT_HD void mul_hi_lo(uint32_t a, uint32_t b, uint32_t& hi, uint32_t& lo) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  hi = static_cast<uint32_t>(product >> 32);
  lo = static_cast<uint32_t>(product);
}

// U: uint32_t or a vector of them. c0..c3 hold the counter on entry and the four random words on return.
template <class U>
ULMFIT_HD void philox4x32_10(U& c0, U& c1, U& c2, U& c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    U hi0, lo0, hi1, lo1;
    mul_hi_lo(c0, 0xD2511F53u, hi0, lo0);
    mul_hi_lo(c2, 0xCD9E8D57u, hi1, lo1);
    const U t1 = c1, t3 = c3;
    c0 = hi1 ^ t1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ t3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// What an op needs to regenerate its mask: the seed, and p as an integer threshold and a scale.
struct Dropout {
  uint32_t key0 = 0, key1 = 0;
  uint32_t threshold = 0;  // dropped iff the random word is below it; 0: nothing is dropped
  double scale = 1.0;      // 1 / (1 - p)

  Dropout() = default;
  ULMFIT_HD Dropout(uint64_t seed, double p)
      : key0(static_cast<uint32_t>(seed)),
        key1(static_cast<uint32_t>(seed >> 32)),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        scale(1.0 / (1.0 - p)) {}

  ULMFIT_HD bool active() const { return threshold != 0; }

  // The four words of one counter: elements of a group that lie 16 apart.
  ULMFIT_HD void words(uint64_t counter, uint32_t (&c)[4]) const {
    c[0] = static_cast<uint32_t>(counter);
    c[1] = static_cast<uint32_t>(counter >> 32);
    c[2] = c[3] = 0u;
    philox4x32_10(c[0], c[1], c[2], c[3], key0, key1);
  }

  // One element, for code that has no lanes (edges, CUDA's scattered rows).
  ULMFIT_HD bool kept(uint64_t element) const {
    uint32_t c[4];
    words(element / kMaskGroup * 16 + element % 16, c);
    const int word = element % kMaskGroup / 16;  // c[word] would put c into memory on a GPU
    return (word < 2 ? (word == 0 ? c[0] : c[1]) : (word == 2 ? c[2] : c[3])) >= threshold;
  }
  // What it is multiplied by.
  template <class T>
  ULMFIT_HD T factor(int64_t element) const {
    return !active() ? T(1) : kept(static_cast<uint64_t>(element)) ? static_cast<T>(scale) : T(0);
  }
};

ULMFIT_END
