// Runs CUDA kernels on the CPU: what of CUDA's language csrc/kernels/cuda uses, for a compiler that has none.
//
// The threads of a block are fibers that take turns: each runs until it ends, meets a barrier or waits for
// another block's flag; a barrier opens when all threads that have not ended stand at it. A block whose
// threads stand at different barriers, which hangs a GPU, throws. Memory accesses are the kernels' own, so
// the address sanitizer sees them. The blocks of a plain launch run one after the other; those of a
// cooperative one take turns, in an order that is drawn anew each time, and each runs until it must wait:
// where all wait, it throws. No two run at once and memory is never late: what a GPU's memory model allows
// beyond that stays unseen.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
#define ULMFIT_UNROLL
#define ULMFIT_UNROLL_ALL
#define ULMFIT_DEVICE_CHECK(condition, message)          \
  do {                                                   \
    if (!(condition)) throw std::runtime_error(message); \
  } while (0)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if (v != v) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
struct __half {
  _Float16 value;
};
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }

namespace ulmfit_fast::cuda {

class BlocksOnCpu {
 public:
  static BlocksOnCpu*& current() {
    static thread_local BlocksOnCpu* blocks = nullptr;
    return blocks;
  }

  BlocksOnCpu(dim3 grid, dim3 size, unsigned blocks, size_t shared_bytes)
      : grid(grid), size(size), threads(size.x * size.y * size.z), shared(blocks), fibers(blocks * threads) {
    while (stacks.size() < fibers.size()) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
    for (auto& memory : shared) memory.resize((shared_bytes + 15) / 16);
  }

  // The blocks from `first` on, all at once.
  void run(unsigned first, const std::function<void()>& thread) {
    body = &thread;
    first_block = first;
    for (size_t i = 0; i < fibers.size(); ++i) start(fibers[i], stacks[i].get());
    std::vector<unsigned> order(shared.size());
    for (unsigned b = 0; b < order.size(); ++b) order[b] = b;
    for (bool moved = true; moved;) {
      std::shuffle(order.begin(), order.end(), random);
      moved = false;
      for (const unsigned block : order)
        while (take_turn(block)) moved = true;
    }
    const auto any = [&](auto test) { return std::any_of(fibers.begin(), fibers.end(), test); };
    if (any([](const Fiber& f) { return f.state == kAtFlag; }))
      throw std::logic_error("thread blocks wait for each other");
    if (any([](const Fiber& f) { return f.state != kDone; }))
      throw std::logic_error("threads of a block wait at different barriers");
  }

  // A barrier of the block, or of the calling thread's warp.
  void wait(bool whole_block) { stop(whole_block ? kAtBlock : kAtWarp); }

  void wait_for(const unsigned* flag, unsigned value) {
    fibers[running].flag = flag;
    fibers[running].value = value;
    stop(kAtFlag);
  }

  // Hands `value` to the warp; afterwards of_lane() has what each lane handed over, until the next time.
  template <class V>
  void hand_over(const V& value) {
    Fiber& me = fibers[running];
    ++me.round;  // two slots: a fast reader may write again
    std::memcpy(me.slot[me.round % 2], &value, sizeof value);
    wait(false);
  }
  template <class V>
  V of_lane(unsigned lane) const {
    V value;
    std::memcpy(&value, fibers[running / 32 * 32 + lane].slot[fibers[running].round % 2], sizeof value);
    return value;
  }
  unsigned lane() const { return running % 32; }
  char* shared_memory() { return reinterpret_cast<char*>(shared[running / threads].data()); }

 private:
  static constexpr size_t kStack = 1 << 16;
  enum State { kReady, kAtWarp, kAtBlock, kAtFlag, kDone };
  struct Fiber {
    ucontext_t context;
    State state;
    unsigned round;
    char slot[2][32];
    const unsigned* flag;  // waits until it is at least value
    unsigned value;
  };

  void start(Fiber& fiber, char* stack) {
    fiber.state = kReady;
    fiber.round = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, &BlocksOnCpu::enter, 0);
  }

  static void enter() {
    BlocksOnCpu& blocks = *current();
    try {
      (*blocks.body)();
    } catch (...) {
      blocks.error = std::current_exception();
    }
    blocks.fibers[blocks.running].state = kDone;
  }

  void stop(State state) {
    fibers[running].state = state;
    swapcontext(&fibers[running].context, &scheduler);
  }

  // Runs what threads of a block can run, and opens its complete barriers; false when there was nothing to
  // do.
  bool take_turn(unsigned block) {
    const unsigned first = block * threads, index = first_block + block;
    bool moved = false;
    blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[first + i];
      if (fiber.state == kAtFlag && *fiber.flag >= fiber.value) fiber.state = kReady;
      if (fiber.state != kReady) continue;
      moved = true;
      running = first + i;
      threadIdx = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
      swapcontext(&scheduler, &fiber.context);
      if (error) std::rethrow_exception(std::exchange(error, nullptr));
    }
    return release(first) || moved;
  }

  // Opens what barriers of a block are complete; whether there was one.
  bool release(unsigned first) {
    const unsigned last = first + threads;
    unsigned standing = 0, released = 0;
    for (unsigned i = first; i < last; ++i)
      standing += fibers[i].state == kDone || fibers[i].state == kAtBlock;
    const auto open = [&](unsigned begin, unsigned end, State barrier) {
      for (unsigned i = begin; i < end; ++i)
        if (fibers[i].state == barrier) fibers[i].state = kReady, ++released;
    };
    if (standing == threads) open(first, last, kAtBlock);
    for (unsigned warp = first; warp < last; warp += 32) {
      const unsigned end = std::min(warp + 32, last);
      bool complete = true;
      for (unsigned i = warp; i < end; ++i) complete &= fibers[i].state == kAtWarp;
      if (complete) open(warp, end, kAtWarp);
    }
    return released > 0;
  }

  static inline std::vector<std::unique_ptr<char[]>> stacks;  // kept: kernels run one at a time
  static inline std::minstd_rand random;
  struct alignas(16) Sixteen {
    char bytes[16];
  };
  dim3 grid, size;
  unsigned threads;
  std::vector<std::vector<Sixteen>> shared;  // each block's dynamic shared memory
  std::vector<Fiber> fibers;                 // block by block
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  unsigned running = 0, first_block = 0;
  std::exception_ptr error;
};

// together: a cooperative launch, with shared_bytes of dynamic shared memory.
inline void run_on_cpu(dim3 grid, dim3 block, const std::function<void()>& thread, size_t shared_bytes = 0,
                       bool together = false) {
  static std::mutex one_kernel;  // __shared__ is static memory here
  const std::lock_guard<std::mutex> lock(one_kernel);
  const unsigned blocks = grid.x * grid.y * grid.z;
  BlocksOnCpu runner(grid, block, together ? blocks : 1, shared_bytes);
  BlocksOnCpu::current() = &runner;
  gridDim = grid;
  blockDim = block;
  for (unsigned b = 0; b < blocks; b += together ? blocks : 1) runner.run(b, thread);
}

// A pretended card: ULMFIT_ON_CPU_CARD="multiprocessors,KB of shared memory", default an H200's.
template <class Limits>
Limits limits_on_cpu() {
  int multiprocessors = 132, kilobytes = 227;
  if (const char* card = std::getenv("ULMFIT_ON_CPU_CARD")) {
    if (std::sscanf(card, "%d,%d", &multiprocessors, &kilobytes) != 2)
      throw std::runtime_error("ULMFIT_ON_CPU_CARD must be two numbers, like 132,227");
  }
  return {multiprocessors, kilobytes * 1024, 90, true};
}

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

inline void __syncthreads() { ulmfit_fast::cuda::BlocksOnCpu::current()->wait(true); }
inline void __syncwarp() { ulmfit_fast::cuda::BlocksOnCpu::current()->wait(false); }
template <class V>
V __shfl_xor_sync(unsigned, V value, int lane_mask) {
  auto& blocks = *ulmfit_fast::cuda::BlocksOnCpu::current();
  blocks.hand_over(value);
  return blocks.of_lane<V>(blocks.lane() ^ static_cast<unsigned>(lane_mask));
}
