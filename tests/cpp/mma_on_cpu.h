// The matrix instructions of csrc/kernels/cuda/mma.h on the CPU.
#pragma once
#include "cuda_on_cpu.h"

namespace ulmfit_fast::cuda {

// cvt.rna.tf32.f32: 10 bits of the fraction, halves away from zero.
inline float tf32_on_cpu(float v) {
  if (v != v) return v;
  return std::bit_cast<float>((std::bit_cast<uint32_t>(v) + 0x1000) & ~0x1FFFu);
}

// mma.sync.m16n8k16, and for float m16n8k8 in TF32, by the layout of their fragments in the PTX manual: c +=
// a b with a (16, K) by rows, b (K, 8) by columns. A register holds two 16-bit neighbours of a row of a, or
// of a column of b, the first in its lower half; or one float, which must be rounded: a card would cut its
// bits off.
template <class S, class F>
void mma_on_cpu(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F&& widened) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  constexpr unsigned kOfWord = 4 / sizeof(S);  // elements in a register
  const auto element = [&](uint32_t word, unsigned i) {
    S value;
    std::memcpy(&value, reinterpret_cast<const char*>(&word) + i * sizeof value, sizeof value);
    const float wide = widened(value);
    if (kOfWord == 1 && wide == wide && tf32_on_cpu(wide) != wide)
      throw std::logic_error("an operand of TF32 is not rounded");
    return wide;
  };
  BlocksOnCpu& blocks = *BlocksOnCpu::current();
  Operands mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  blocks.hand_over(mine);
  const unsigned group = blocks.lane() / 4, in_group = blocks.lane() % 4;
  for (unsigned k = 0; k < 8 * kOfWord; ++k) {
    // which lane of a group holds element k, in which register, and where in it
    const unsigned holder = k / kOfWord % 4, word = k / kOfWord / 4, place = k % kOfWord;
    float column[2];
    for (unsigned n = 0; n < 2; ++n) {
      const auto other = blocks.of_lane<Operands>(4 * (2 * in_group + n) + holder);
      column[n] = element(other.b[word], place);
    }
    const auto other = blocks.of_lane<Operands>(4 * group + holder);
    for (unsigned half = 0; half < 2; ++half) {  // rows group and group + 8
      const float row = element(other.a[2 * word + half], place);
      for (unsigned n = 0; n < 2; ++n) c[2 * half + n] += row * column[n];
    }
  }
}

}  // namespace ulmfit_fast::cuda
