// Runs CUDA kernels on the CPU: what of CUDA's language csrc/kernels/cuda uses, for a compiler that has none.
//
// The threads of a block are fibers that take turns, forwards or backwards from one that is drawn anew: each
// runs until it ends, meets a barrier or waits for another block's flag; a barrier opens when all threads
// that have not ended stand at it. A block whose threads stand at different barriers, which hangs a GPU,
// throws. Memory accesses are the kernels' own, so the address sanitizer sees them. The blocks of a plain
// launch run one after the other; those of a cooperative one take turns, in an order that is drawn anew each
// time; each goes on to its next barrier, or, which is drawn as well, until it must wait. Where all wait, it
// throws. So it does where a block reaches for the shared memory of one of its cluster that has not started
// or has ended, or its threads do not arrive and wait in turn at the cluster's barrier. Shared memory holds
// NaNs until it is written, and again when its block has ended. No two blocks run at once and memory is never
// late: what a GPU's memory model allows beyond that stays unseen.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "card_on_cpu.h"
#include "float16_on_cpu.h"
#ifdef ULMFIT_PTX_ON_CPU
#include "ptx_kernels.h"
#endif

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

namespace ulmfit_fast::cuda {

class BlocksOnCpu {
 public:
  static BlocksOnCpu*& current() {
    static thread_local BlocksOnCpu* blocks = nullptr;
    return blocks;
  }

  // cluster: how many neighbouring blocks are in one.
  BlocksOnCpu(dim3 grid, dim3 size, unsigned blocks, size_t shared_bytes, unsigned cluster)
      : grid(grid),
        size(size),
        threads(size.x * size.y * size.z),
        cluster(cluster),
        bytes(shared_bytes),
        blocks(blocks),
        fibers(blocks * threads),
        arrivals(blocks / cluster) {
    if (blocks % cluster != 0) throw std::logic_error("the grid is not made of whole clusters");
    while (stacks.size() < fibers.size()) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
    for (Block& block : this->blocks) block.shared.resize((shared_bytes + 15) / 16);
  }

  // The blocks from `first` on, all at once.
  void run(unsigned first, const std::function<void()>& thread) {
    body = &thread;
    first_block = first;
    for (size_t i = 0; i < fibers.size(); ++i) start(fibers[i], stacks[i].get());
    for (Block& block : blocks) block.started = false, block.ended = 0, block.poison();
    std::vector<unsigned> order(blocks.size());
    for (unsigned b = 0; b < order.size(); ++b) order[b] = b;
    for (bool moved = true; moved;) {
      std::shuffle(order.begin(), order.end(), random);
      moved = false;
      for (const unsigned block : order) {
        const bool once = random() % 2 == 0;
        while (take_turn(block)) {
          moved = true;
          if (once) break;
        }
      }
    }
    const auto any = [&](auto test) { return std::any_of(fibers.begin(), fibers.end(), test); };
    if (any([](const Fiber& f) { return f.state == kAtFlag; }))
      throw std::logic_error("thread blocks wait for each other");
    if (any([](const Fiber& f) { return f.state == kAtCluster; }))
      throw std::logic_error("thread blocks of a cluster wait at different barriers");
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

  void yield() { stop(kReady); }

  // The two halves of the cluster's barrier. All have arrived for the n'th time when the arrivals are n times
  // its threads: nobody arrives again before.
  void arrive_at_cluster() {
    Fiber& me = fibers[running];
    if (me.arrived++ != me.waited) throw std::logic_error("a thread arrives twice at its cluster's barrier");
    ++arrivals[running / threads / cluster];
  }
  void wait_for_cluster() {
    Fiber& me = fibers[running];
    if (me.arrived != ++me.waited) throw std::logic_error("a thread waits for its cluster before it arrives");
    stop(kAtCluster);
  }

  // Where an address of this block's shared memory is in that of block `rank` of its cluster.
  template <class T>
  const T* in_cluster(const T* address, unsigned rank) {
    const unsigned own = running / threads;
    Block& other = blocks.at(own / cluster * cluster + rank);
    const auto offset =
        reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(blocks[own].memory());
    if (rank >= cluster || offset + sizeof(T) > 16 * other.shared.size())
      throw std::logic_error("no shared memory of the cluster");
    if (!other.started || other.ended == threads)
      throw std::logic_error("a block reads the shared memory of one that is not running");
    return reinterpret_cast<const T*>(other.memory() + offset);
  }

  // Hands `value` to the warp; afterwards of_lane() has what each lane handed over, until the next time.
  template <class V>
  void hand_over(const V& value) {
    Fiber& me = fibers[running];
    static_assert(sizeof value <= sizeof me.slot[0]);
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
  unsigned fiber() const { return running; }
  char* shared_memory() { return blocks[running / threads].memory(); }
  size_t shared_bytes() const { return bytes; }

 private:
  static constexpr size_t kStack = 1 << 17;  // translated kernels keep thousands of registers there
  enum State { kReady, kAtWarp, kAtBlock, kAtFlag, kAtCluster, kDone };
  struct Fiber {
    ucontext_t context;
    void* point[5];  // where it goes on
    bool begun;
    State state;
    unsigned round;
    char slot[2][32];
    const unsigned* flag;  // waits until it is at least value
    unsigned value;
    unsigned arrived, waited;  // how often, at the cluster's barrier
  };
  struct alignas(16) Sixteen {
    char bytes[16];
  };
  struct Block {
    std::vector<Sixteen> shared;  // shared memory; where kernels are C++, the dynamic part alone
    bool started;
    unsigned ended;  // threads
    char* memory() { return reinterpret_cast<char*>(shared.data()); }
    void poison() {
      if (!shared.empty()) std::memset(shared.data(), 0xFF, 16 * shared.size());
    }
  };

  void start(Fiber& fiber, char* stack) {
    fiber.state = kReady;
    fiber.begun = false;
    fiber.round = fiber.arrived = fiber.waited = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, &BlocksOnCpu::enter, 0);
  }

  static void enter() {
    BlocksOnCpu& blocks = *current();
    try {
      (*blocks.body)();
      if (blocks.fibers[blocks.running].arrived != blocks.fibers[blocks.running].waited)
        throw std::logic_error("a thread arrives at its cluster's barrier and does not wait");
    } catch (...) {
      blocks.error = std::current_exception();
    }
    blocks.stop(kDone);
  }

  void stop(State state) {
    fibers[running].state = state;
    leave(fibers[running]);
  }

  // From the scheduler to a fiber, and back. swapcontext makes a system call each time, which took most of a
  // test's time; but the address sanitizer does not follow jumps from stack to stack.
#ifdef __SANITIZE_ADDRESS__
  void go_on(Fiber& fiber) { swapcontext(&scheduler, &fiber.context); }
  void leave(Fiber& fiber) { swapcontext(&fiber.context, &scheduler); }
#else
  void go_on(Fiber& fiber) {
    if (__builtin_setjmp(scheduler_point) != 0) return;
    if (std::exchange(fiber.begun, true)) jump(fiber.point);
    setcontext(&fiber.context);
  }
  void leave(Fiber& fiber) {
    if (__builtin_setjmp(fiber.point) == 0) jump(scheduler_point);
  }
  [[gnu::noinline, noreturn]] static void jump(void** point) { __builtin_longjmp(point, 1); }
  void* scheduler_point[5];
#endif

  // Runs what threads of a block can run, and opens its complete barriers; false when there was nothing to
  // do.
  bool take_turn(unsigned block) {
    const unsigned first = block * threads, index = first_block + block;
    bool moved = false;
    blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    const unsigned begin = random() % threads, step = random() % 2 == 0 ? 1 : threads - 1;
    for (unsigned n = 0; n < threads; ++n) {
      const unsigned i = (begin + uint64_t{n} * step) % threads;
      Fiber& fiber = fibers[first + i];
      if (fiber.state == kAtFlag && *fiber.flag >= fiber.value) fiber.state = kReady;
      if (fiber.state == kAtCluster && arrivals[block / cluster] >= fiber.waited * cluster * threads)
        fiber.state = kReady;
      if (fiber.state != kReady) continue;
      moved = blocks[block].started = true;
      running = first + i;
      threadIdx = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
      go_on(fiber);
      if (error) std::rethrow_exception(std::exchange(error, nullptr));
      if (fiber.state == kDone && ++blocks[block].ended == threads) blocks[block].poison();
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
  dim3 grid, size;
  unsigned threads, cluster;
  size_t bytes;  // of shared memory, of each block
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;       // block by block
  std::vector<unsigned> arrivals;  // at each cluster's barrier, of all times
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  unsigned running = 0, first_block = 0;
  std::exception_ptr error;
};

// cluster: 0 for a plain launch; else a cooperative one, with shared_bytes of dynamic shared memory, of
// clusters of so many blocks.
inline void run_on_cpu(dim3 grid, dim3 block, const std::function<void()>& thread, size_t shared_bytes = 0,
                       unsigned cluster = 0) {
  static std::mutex one_kernel;  // __shared__ is static memory here
  const std::lock_guard<std::mutex> lock(one_kernel);
  const unsigned blocks = grid.x * grid.y * grid.z;
  const unsigned together = cluster > 0 ? blocks : 1;
  BlocksOnCpu runner(grid, block, together, shared_bytes, std::max(cluster, 1u));
  BlocksOnCpu::current() = &runner;
  gridDim = grid;
  blockDim = block;
  for (unsigned b = 0; b < blocks; b += together) runner.run(b, thread);
}

// A kernel: itself, or the translation of its PTX.
template <class... P>
void run_kernel_on_cpu(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster,
                       P... arguments) {
#ifdef ULMFIT_PTX_ON_CPU
  const ptx::Kernel& translation = ptx::translation_of(reinterpret_cast<const void*>(kernel));
  void* parameters[] = {&arguments...};
  run_on_cpu(
      grid, block, [&] { translation.run(parameters); }, shared_bytes + translation.shared_bytes, cluster);
#else
  run_on_cpu(grid, block, [&] { kernel(arguments...); }, shared_bytes, cluster);
#endif
}

}  // namespace ulmfit_fast::cuda

inline void __trap() { throw std::logic_error("a kernel runs where it was not compiled for"); }
inline void __syncthreads() { ulmfit_fast::cuda::BlocksOnCpu::current()->wait(true); }
inline void __syncwarp() { ulmfit_fast::cuda::BlocksOnCpu::current()->wait(false); }
template <class V>
V __shfl_xor_sync(unsigned, V value, int lane_mask) {
  auto& blocks = *ulmfit_fast::cuda::BlocksOnCpu::current();
  blocks.hand_over(value);
  return blocks.of_lane<V>(blocks.lane() ^ static_cast<unsigned>(lane_mask));
}
