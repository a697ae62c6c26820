// What runs CUDA kernels on the CPU: blocks of a cooperative launch that wait for one another, deadlocks,
// barriers, and the matrix instructions by the manual's tables of who holds what.
#include "check.h"
#include "kernels/cuda/mma.h"

using namespace ulmfit_fast::cuda;

namespace {

struct Ring {
  Flag* flags;
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
    launch_cooperative("test", kernel, blocks, 64, 16, 1, nullptr, ring);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

// Blocks of a cluster read each other's number, with at most one mistake.
enum class Mistake { none, no_wait, early_end, not_all_arrive, twice };
void cluster_kernel(Mistake mistake) {
  struct Number {
    int64_t block;
  };
  auto* mine = reinterpret_cast<Number*>(dynamic_shared_memory());
  const auto in_turn = [&](bool wait) {
    arrive_at_cluster();
    if (mistake == Mistake::twice) arrive_at_cluster();
    if (wait) wait_for_cluster();
  };
  CHECK(mine->block == -1, "shared memory is not poisoned");
  __syncthreads();
  if (threadIdx.x == 0) mine->block = blockIdx.x;
  __syncthreads();
  if (mistake == Mistake::not_all_arrive && blockIdx.x == 2) return;
  in_turn(mistake != Mistake::no_wait);
  for (int rank = 0; rank < 4; ++rank) {
    const int64_t found = load_from_cluster(mine, rank).block;
    if (found != blockIdx.x / 4 * 4 + rank) throw std::logic_error("a block finds another number");
  }
  if (mistake != Mistake::early_end && mistake != Mistake::no_wait) in_turn(true);
}

void check_clusters() {
  const auto error_with = [](Mistake mistake) -> std::string {
    try {
      launch_cooperative("test", cluster_kernel, 8, 64, 16, 4, nullptr, mistake);
    } catch (const std::logic_error& error) {
      return error.what();
    }
    return "";
  };
  const auto check = [&](Mistake mistake, const char* expected) {
    const std::string said = error_with(mistake);
    CHECK(said == expected, "mistake %d: '%s', not '%s'", static_cast<int>(mistake), said.c_str(), expected);
  };
  for (int round = 0; round < 10; ++round) {
    check(Mistake::none, "");
    CHECK(!error_with(Mistake::no_wait).empty(), "a block that does not wait finds what it should");
    check(Mistake::early_end, "a block reads the shared memory of one that is not running");
    check(Mistake::not_all_arrive, "thread blocks of a cluster wait at different barriers");
    check(Mistake::twice, "a thread arrives twice at its cluster's barrier");
  }
}

struct Matrices {
  const float *a, *b;  // (16, K), (K, 8)
  float* c;            // (16, 8)
};

// The PTX manual, "Matrix Fragments for mma.m16n8k16" and, for .tf32, "m16n8k8": element i of a lane's part
// of each matrix.
template <class S>
void mma_kernel(Matrices m) {
  constexpr bool k16 = sizeof(S) == 2;
  constexpr int K = k16 ? 16 : 8;
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  S a[k16 ? 8 : 4], b[k16 ? 4 : 2];
  float c[4];
  for (int i = 0; i < K / 2; ++i) {
    const bool upper = k16 ? i < 2 || (4 <= i && i < 6) : i % 2 == 0;
    const int k = k16 ? in_group * 2 + i % 2 + (i < 4 ? 0 : 8) : in_group + (i < 2 ? 0 : 4);
    a[i] = narrow<S>(m.a[(upper ? group : group + 8) * K + k]);
  }
  for (int i = 0; i < K / 4; ++i) {
    const int k = k16 ? in_group * 2 + i % 2 + (i < 2 ? 0 : 8) : in_group + 4 * i;
    b[i] = narrow<S>(m.b[k * 8 + group]);
  }
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + i % 2; };
  for (int i = 0; i < 4; ++i) c[i] = m.c[at(i)];
  uint32_t a_words[4], b_words[2];
  static_assert(sizeof a == sizeof a_words && sizeof b == sizeof b_words);
  std::memcpy(a_words, a, sizeof a);
  std::memcpy(b_words, b, sizeof b);
  mma<S>(c, a_words, b_words);
  for (int i = 0; i < 4; ++i) m.c[at(i)] = c[i];
}

// Beside a plain product, of whole numbers: exact in bf16 and TF32, and their sums in fp32.
template <class S>
void check_mma(int K) {
  const auto small = [](int n, unsigned seed) {
    std::vector<float> values = random_values<float>(n, seed, 9);
    for (float& v : values) v = std::round(v);
    return values;
  };
  std::vector<float> a = small(16 * K, 1), b = small(K * 8, 2), before = small(16 * 8, 3), c = before;
  const auto run = [&] {
    launch("test", mma_kernel<S>, Grid{1}, dim3(32), nullptr, Matrices{a.data(), b.data(), c.data()});
  };
  run();
  for (int row = 0; row < 16; ++row)
    for (int n = 0; n < 8; ++n) {
      float sum = before[row * 8 + n];
      for (int k = 0; k < K; ++k) sum += a[row * K + k] * b[k * 8 + n];
      CHECK(c[row * 8 + n] == sum, "(%d, %d) is %g, not %g", row, n, c[row * 8 + n], sum);
    }
  if (sizeof(S) == 2) return;
  a[5] = 1 + 0x1p-12f;
  try {
    run();
    CHECK(false, "an operand that is not rounded passes");
  } catch (const std::logic_error& error) {
    CHECK(std::string(error.what()) == "an operand of TF32 is not rounded", "%s", error.what());
  }
}

// As cvt.rna.tf32.f32: the nearest of 10 bits, halves away from zero.
void check_tf32() {
  const float inf = INFINITY;
  const std::pair<float, float> cases[] = {{1 + 0x1p-10f, 1 + 0x1p-10f},
                                           {1 + 0x1p-11f, 1 + 0x1p-10f},
                                           {-1 - 0x1p-11f, -1 - 0x1p-10f},
                                           {1 + 0x1.fep-12f, 1},
                                           {0x1.ffcp-1f, 0x1.ffcp-1f},
                                           {0x1.fffp-1f, 1},
                                           {-0.0f, -0.0f},
                                           {inf, inf},
                                           {-inf, -inf}};
  for (const auto& [value, expected] : cases)
    CHECK(as_operand(value) == expected, "%a becomes %a, not %a", value, as_operand(value), expected);
  CHECK(std::isnan(as_operand(NAN)), "NaN is lost");
}

}  // namespace

int main() {
  const int blocks = 5;
  for (int round = 0; round < 10; ++round) {
    Flag flags[blocks] = {};
    int order[blocks] = {};
    CHECK(error_of(ring_kernel, {flags, order, -1}, blocks).empty(), "a ring of blocks stops");
    for (int i = 0; i < blocks; ++i)
      CHECK(order[i] == blocks - 1 - i, "block %d came as number %d", order[i], i);
  }
  Flag flags[blocks] = {};
  int order[blocks];
  CHECK(error_of(ring_kernel, {flags, order, 3}, blocks) == "thread blocks wait for each other",
        "no deadlock");
  const std::string said = error_of(crossed_barriers_kernel, {}, 1);
  CHECK(said == "threads of a block wait at different barriers", "%s", said.c_str());

  check_mma<bf16>(16), check_mma<f16>(16), check_mma<float>(8);
  check_tf32();
  check_clusters();
}
