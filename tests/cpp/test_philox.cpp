// Philox against the published vectors, and every instruction set's masks against the scalar definition.
#include "check.h"
#include "kernels/philox.h"

using namespace ulmfit_fast;

// Random123 1.14, tests/kat_vectors: philox4x32 with 10 rounds; counter, key -> words.
void known_answers() {
  const struct {
    uint32_t counter[4], key[2], words[4];
  } cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& c : cases) {
    uint32_t w[4] = {c.counter[0], c.counter[1], c.counter[2], c.counter[3]};
    philox4x32_10(w[0], w[1], w[2], w[3], c.key[0], c.key[1]);
    for (int i = 0; i < 4; ++i) CHECK(w[i] == c.words[i], "word %d is %08x, not %08x", i, w[i], c.words[i]);
  }
}

void masks() {
  for (const Kernels* table : every_isa())
    for (int64_t n : {0, 1, 63, 64, 65, 1000})
      for (double p : {0.0, 0.1, 0.5, 0.999})
        for (uint64_t seed : {uint64_t{0}, uint64_t{0xfedcba9876543210}})
          for (int count : {1, 3}) {
            const Dropout drop(seed, p);
            std::vector<float> mask(n, -1.0f);
            table->dropout_mask(seed, p, n, DType::f32, mask.data(), threads(count));
            for (int64_t e = 0; e < n; ++e) {
              const float expected = drop.kept(e) ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
              CHECK(mask[e] == expected, "%s: p %g, element %lld of %lld is %g, not %g", table->isa, p,
                    static_cast<long long>(e), static_cast<long long>(n), mask[e], expected);
            }
          }
}

int main() {
  known_answers();
  masks();
}
