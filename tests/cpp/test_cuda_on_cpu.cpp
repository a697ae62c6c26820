// What runs CUDA kernels on the CPU: blocks of a cooperative launch that wait for one another, deadlocks,
// barriers, and a matrix instruction by the manual's table of who holds what.
#include "check.h"
#include "kernels/cuda/mma.h"

using namespace ulmfit_fast::cuda;

namespace {

struct Ring {
  unsigned* flags;
  int* order;  // of the blocks, as they came by
  int stuck;   // this one never publishes
};

// Each block but the last waits for its right neighbour, by its second warp.
void ring_kernel(Ring a) {
  const int block = blockIdx.x, last = gridDim.x - 1;
  int* count = reinterpret_cast<int*>(dynamic_shared_memory());
  if (threadIdx.x == 0) *count = block;
  __syncthreads();
  if (threadIdx.x / kWarp == 1 && block < last) wait_for_flags(a.flags, block + 1, block + 2, 1);
  __syncthreads();
  if (threadIdx.x != 0 || block == a.stuck) return;
  a.order[last - block] = *count;
  publish(a.flags + block, 1);
}

void crossed_barriers_kernel(Ring) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __syncwarp();
  if (threadIdx.x == 40) __syncthreads();
  __syncwarp();
}

std::string error_of(void (*kernel)(Ring), Ring ring, int blocks) {
  try {
    launch_cooperative("test", kernel, blocks, 64, 16, nullptr, ring);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

struct Matrices {
  const float *a, *b;  // (16, 16), (16, 8)
  float* c;            // (16, 8)
};

// The PTX manual, "Matrix Fragments for mma.m16n8k16": element i of a lane's part of each matrix.
void mma_kernel(Matrices m) {
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  bf16 a[8], b[4];
  float c[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8,
              k = in_group * 2 + i % 2 + (i < 4 ? 0 : 8);
    a[i] = __float2bfloat16_rn(m.a[row * 16 + k]);
  }
  for (int i = 0; i < 4; ++i)
    b[i] = __float2bfloat16_rn(m.b[(in_group * 2 + i % 2 + (i < 2 ? 0 : 8)) * 8 + group]);
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + i % 2; };
  for (int i = 0; i < 4; ++i) c[i] = m.c[at(i)];
  uint32_t a_words[4], b_words[2];
  std::memcpy(a_words, a, sizeof a);
  std::memcpy(b_words, b, sizeof b);
  mma<bf16>(c, a_words, b_words);
  for (int i = 0; i < 4; ++i) m.c[at(i)] = c[i];
}

}  // namespace

int main() {
  const int blocks = 5;
  for (int round = 0; round < 10; ++round) {
    unsigned flags[blocks] = {};
    int order[blocks] = {};
    CHECK(error_of(ring_kernel, {flags, order, -1}, blocks).empty(), "a ring of blocks stops");
    for (int i = 0; i < blocks; ++i)
      CHECK(order[i] == blocks - 1 - i, "block %d came as number %d", order[i], i);
  }
  unsigned flags[blocks] = {};
  int order[blocks];
  CHECK(error_of(ring_kernel, {flags, order, 3}, blocks) == "thread blocks wait for each other",
        "no deadlock");
  const std::string said = error_of(crossed_barriers_kernel, {}, 1);
  CHECK(said == "threads of a block wait at different barriers", "%s", said.c_str());

  const auto small = [](int n, unsigned seed) {  // whole numbers: exact in bf16, and their sums in fp32
    std::vector<float> values = random_values<float>(n, seed, 9);
    for (float& v : values) v = std::round(v);
    return values;
  };
  const std::vector<float> a = small(16 * 16, 1), b = small(16 * 8, 2), before = small(16 * 8, 3);
  std::vector<float> c = before;
  launch("test", mma_kernel, dim3(1), dim3(32), nullptr, Matrices{a.data(), b.data(), c.data()});
  for (int row = 0; row < 16; ++row)
    for (int n = 0; n < 8; ++n) {
      float sum = before[row * 8 + n];
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * 8 + n];
      CHECK(c[row * 8 + n] == sum, "(%d, %d) is %g, not %g", row, n, c[row * 8 + n], sum);
    }
}
