// Runs CUDA kernels on the CPU: what of CUDA's language csrc/kernels/cuda uses, for a compiler that has none.
//
// Thread blocks run one after the other. The threads of a block are fibers that take turns: each runs until
// it ends or meets a barrier, and a barrier opens when all threads that have not ended stand at it. A block
// whose threads stand at different barriers, which hangs a GPU, throws. Memory accesses are the kernels' own,
// so the address sanitizer sees them. No two blocks ever run at once: races between blocks stay unseen.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
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

class BlockOnCpu {
 public:
  static BlockOnCpu*& current() {
    static thread_local BlockOnCpu* block = nullptr;
    return block;
  }

  explicit BlockOnCpu(dim3 size) : size(size), fibers(size.x * size.y * size.z) {
    while (stacks.size() < fibers.size()) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
  }

  void run(const std::function<void()>& thread) {
    body = &thread;
    for (size_t i = 0; i < fibers.size(); ++i) start(fibers[i], stacks[i].get());
    for (bool open = true; open;) {
      for (unsigned i = 0; i < fibers.size(); ++i) {
        if (fibers[i].state != kReady) continue;
        running = i;
        threadIdx = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
        swapcontext(&scheduler, &fibers[i].context);
        if (error) std::rethrow_exception(std::exchange(error, nullptr));
      }
      open = release();
    }
  }

  // A barrier of the block, or of the calling thread's warp.
  void wait(bool whole_block) {
    fibers[running].state = whole_block ? kAtBlock : kAtWarp;
    swapcontext(&fibers[running].context, &scheduler);
  }

  template <class V>
  V exchange(V value, unsigned lane_mask) {
    const unsigned me = running, round = fibers[me].round++ % 2;  // two slots: a fast reader may write again
    std::memcpy(fibers[me].slot[round], &value, sizeof value);
    wait(false);
    std::memcpy(&value, fibers[me ^ lane_mask].slot[round], sizeof value);
    return value;
  }

 private:
  static constexpr size_t kStack = 1 << 16;
  enum State { kReady, kAtWarp, kAtBlock, kDone };
  struct Fiber {
    ucontext_t context;
    State state;
    unsigned round;
    char slot[2][16];
  };

  void start(Fiber& fiber, char* stack) {
    fiber.state = kReady;
    fiber.round = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, &BlockOnCpu::enter, 0);
  }

  static void enter() {
    BlockOnCpu& block = *current();
    try {
      (*block.body)();
    } catch (...) {
      block.error = std::current_exception();
    }
    block.fibers[block.running].state = kDone;
  }

  // Opens what barriers are complete; false when all threads have ended.
  bool release() {
    unsigned done = 0, at_block = 0, released = 0;
    for (const Fiber& fiber : fibers) done += fiber.state == kDone, at_block += fiber.state == kAtBlock;
    if (done == fibers.size()) return false;
    const auto open = [&](size_t begin, size_t end, State barrier) {
      for (size_t i = begin; i < end; ++i)
        if (fibers[i].state == barrier) fibers[i].state = kReady, ++released;
    };
    if (done + at_block == fibers.size()) open(0, fibers.size(), kAtBlock);
    for (size_t warp = 0; warp < fibers.size(); warp += 32) {
      const size_t end = std::min(warp + 32, fibers.size());
      bool complete = true;
      for (size_t i = warp; i < end; ++i) complete &= fibers[i].state == kAtWarp;
      if (complete) open(warp, end, kAtWarp);
    }
    if (released == 0) throw std::logic_error("threads of a block wait at different barriers");
    return true;
  }

  static inline std::vector<std::unique_ptr<char[]>> stacks;  // kept: kernels run one at a time
  dim3 size;
  std::vector<Fiber> fibers;
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  unsigned running = 0;
  std::exception_ptr error;
};

inline void run_on_cpu(dim3 grid, dim3 block, const std::function<void()>& thread) {
  static std::mutex one_kernel;  // __shared__ is static memory here
  const std::lock_guard<std::mutex> lock(one_kernel);
  BlockOnCpu runner(block);
  BlockOnCpu::current() = &runner;
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        runner.run(thread);
      }
}

}  // namespace ulmfit_fast::cuda

inline void __syncthreads() { ulmfit_fast::cuda::BlockOnCpu::current()->wait(true); }
template <class V>
V __shfl_xor_sync(unsigned, V value, int lane_mask) {
  return ulmfit_fast::cuda::BlockOnCpu::current()->exchange(value, lane_mask);
}
